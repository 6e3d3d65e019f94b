"Diagrams are well-formed, whatever their words, and refuse what cannot be drawn well."
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqe_cir.show import Box, flow_figure
from dqe_cir.show.diagrams import ACROSS, DOWN, KINDS, LETTERS, ends

SVG = "{http://www.w3.org/2000/svg}"
places = st.tuples(st.integers(0, 5), st.integers(0, 5))
words = st.text(st.characters(codec="utf-8", exclude_categories=("C",)), max_size=LETTERS)


@given(st.dictionaries(places, st.tuples(words, st.sampled_from(sorted(KINDS))), min_size=1, max_size=8))
def test_any_words_make_a_drawing_that_holds_them(drawn):
    boxes = {str(place): Box(*place, text, kind) for place, (text, kind) in drawn.items()}
    page = ElementTree.fromstring(flow_figure(boxes, []).data)
    said = [element.text or "" for element in page.iter(f"{SVG}text")]
    for text, _ in drawn.values(): assert text in said
    for box in boxes.values():
        (x, y), (wide, high) = box.centre, box.half
        assert 0 <= x - wide and x + wide <= float(page.get("width")) and 0 <= y - high and y + high <= float(page.get("height"))


@given(places, places)
def test_arrows_touch_both_boxes_and_point_from_one_to_the_other(place, other):
    if place == other: return
    one, two = Box(*place, "one", "input"), Box(*other, "two\nlines", "vector")
    x, y, u, v = ends(one, two)
    for box, (across, down) in ((one, (x, y)), (two, (u, v))):
        (a, b), (wide, high) = box.centre, box.half
        assert (abs(across - a), abs(down - b)) in ((wide, 0), (0, high))
    assert ends(two, one) == (u, v, x, y)
    assert (u - x) * (other[0] - place[0]) >= 0 and (other[0] != place[0] or (v - y) * (other[1] - place[1]) > 0)


def test_a_diagram_is_the_same_every_time():
    boxes = {"a": Box(0, 0, "a", "input"), "b": Box(1, 1, "b", "loss")}
    assert flow_figure(boxes, [("a", "b", "then")]).data == flow_figure(boxes, [("a", "b", "then")]).data
    page = ElementTree.fromstring(flow_figure(boxes, []).data)
    assert (float(page.get("width")), float(page.get("height"))) == (2 * ACROSS, 2 * DOWN + 30)


@pytest.mark.parametrize("arrow, complaint", [
    (("a", "z"), "an arrow names 'z'"), (("a", "c"), "the arrow from 'a' to 'c' runs through 'b'"), (("c", "a"), "runs through 'b'")])
def test_an_arrow_that_cannot_be_drawn_well_is_refused(arrow, complaint):
    boxes = {name: Box(i, 0, name, "input") for i, name in enumerate("abc")}
    with pytest.raises(ValueError, match=complaint): flow_figure(boxes, [arrow])
