"Figures read from events, tables that cannot lie, and sheets whose every frame stands where it should."
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dqe_cir.data import CIRDataset, Triplet
from dqe_cir.show import COLOURS, FRAMES, banner, contact_sheet, evenly_spaced, framed, interval_figure, line_figure
from dqe_cir.show import loss_figure, metric_figure, metrics_table, point_figure, refresh_figure, request_text
from dqe_cir.show import table_title, text_table, verdict
from dqe_cir.show.figures import STAMPS, label_places

# ---- figures


def epoch(number, loss, metrics=None): return {"kind": "epoch", "epoch": number, "loss": loss, "metrics": metrics}


def drawn(figure): return {line.name: (list(line.x), list(line.y)) for line in figure.data}


def titles(figure):
    layout = figure.layout
    return layout.title.text, layout.xaxis.title.text, layout.yaxis.title.text


def test_a_loss_of_one_term_is_drawn_once():
    events = [epoch(1, {"total": 3.0, "info_nce": 3.0}), {"kind": "step", "loss": 9.0}, epoch(2, {"total": 2.0, "info_nce": 2.0})]
    figure = loss_figure(events)
    assert drawn(figure) == {"total": ([1, 2], [3.0, 2.0])}
    assert titles(figure) == ("Training loss", "epoch", "mean loss")
    assert titles(loss_figure(events, "Another"))[0] == "Another"


def test_terms_of_different_scale_keep_their_values_and_begin_where_they_act():
    late = {"total": 101.0, "preference": 100.0, "ranking": 1.0, "colour": 1e-6}
    figure = loss_figure([epoch(1, {"total": 2.0, "warm_up": 2.0}), epoch(2, late)])
    assert drawn(figure) == {"total": ([1, 2], [2.0, 101.0]), "warm_up": ([1, 2], [2.0, None]), "preference": ([1, 2], [None, 100.0]),
                             "ranking": ([1, 2], [None, 1.0]), "colour": ([1, 2], [None, 1e-6])}
    assert len({line.line.color for line in figure.data}) == 5


def test_metrics_are_drawn_at_the_epochs_that_have_them():
    events = [epoch(1, {}, {"mAP": 10.0, "R@10": 20.0, "R@7": 1.0}), epoch(2, {}), epoch(3, {}, {"mAP": 12.0, "R@10": 22.0, "R@7": 2.0})]
    figure = metric_figure(events)
    assert drawn(figure) == {"mAP": ([1, 3], [10.0, 12.0]), "R@10": ([1, 3], [20.0, 22.0])}
    assert titles(figure) == ("Validation", "epoch", "%")
    assert drawn(metric_figure(events, names=("R@7",))) == {"R@7": ([1, 3], [1.0, 2.0])}
    assert drawn(metric_figure(events[1:2])) == {} == drawn(loss_figure([]))


@pytest.mark.parametrize("false_negatives", [{}, {"false_negatives": None}], ids=["absent", "unknown"])
def test_refreshes_without_labels_show_no_false_negatives(false_negatives):
    events = [{"kind": "refresh", "epoch": at, "train_R@10": 10.0 * at, "kept": kept, **false_negatives} for at, kept in ((4, None), (8, 0.25))]
    assert drawn(refresh_figure(events)) == {"target in the first ten": ([4, 8], [40.0, 80.0]), "kept from the last pool": ([8], [25.0])}
    known = [{**event, "false_negatives": 7.0} for event in events]
    assert drawn(refresh_figure(known))["right answers in the zone"] == ([4, 8], [7.0, 7.0])
    assert drawn(refresh_figure([epoch(1, {})])) == {}


@given(st.integers(1, 15))
def test_every_series_has_a_colour_however_many_there_are(count):
    figure = line_figure({str(i): ([1], [i]) for i in range(count)}, "t", "x", "y")
    assert [line.line.color for line in figure.data] == [COLOURS[i % len(COLOURS)] for i in range(count)]
    assert {line.mode for line in figure.data} == {"lines+markers"}  # one point is seen as well


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(0, 9)), min_size=1, max_size=5))
def test_grey_is_a_tie_and_only_a_tie(pairs):
    figure = interval_figure({str(i): pair for i, pair in enumerate(pairs)}, "t", "points")
    for trace, (mean, half) in zip(figure.data, pairs, strict=True):
        expected = "#9a9a9a" if mean - half <= 0 <= mean + half else COLOURS[2] if mean > 0 else COLOURS[1]
        assert trace.marker.color == trace.error_x.color == expected
        assert (trace.x[0], trace.error_x.array[0]) == (mean, half)
    assert figure.layout.yaxis.autorange == "reversed"  # the first on top


points = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.tuples(*[st.integers(-5, 5)] * 3), min_size=1, max_size=5)


@given(points)
def test_a_name_turns_away_from_its_nearest_neighbour(systems):
    figure, places = point_figure(systems, "t", "x", "y"), label_places(systems)
    assert [(trace.text[0], trace.textposition) for trace in figure.data] == list(places.items())
    low, high = figure.layout.xaxis.range
    assert all(low < across < high for across, _, _ in systems.values())
    if len(systems) == 2:
        (one, (x, y, _)), (other, (a, b, _)) = systems.items()
        if x != a: assert places[one].split()[1] == ("left" if x < a else "right") != places[other].split()[1]
        if y != b: assert places[one].split()[0] == ("top" if y > b else "bottom") != places[other].split()[0]


# ---- tables

def test_figures_stand_to_the_right_and_names_to_the_left():
    table = text_table({"one": {"a": "1", "b": "22"}, "two": {"b": "3"}}, ["a", "b", "c"], "A title", bold="two")
    assert table.data.splitlines() == ["**A title**", "", "| | a | b | c |", "|---|--:|--:|--:|",
                                       "| one | 1 | 22 | – |", "| **two** | **–** | **3** | **–** |"]


@given(st.dictionaries(st.sampled_from("abcd"), st.one_of(st.none(), st.floats(0, 100)), max_size=4))
def test_percent_has_one_decimal_and_nothing_is_a_dash(values):
    *_, row = metrics_table({"x": values}, list("abcd"), "t").data.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["x", *("–" if values.get(key) is None else f"{values[key]:.1f}" for key in "abcd")]


@pytest.mark.parametrize("kind, stamp", [("real", ""), ("garments", " (garments benchmark)"), ("sample", " (DRAWN SAMPLE, NOT THE REAL DATA)"),
                                         ("borrowed", " (borrowed)"), ("custom", "")])
def test_a_title_says_what_the_data_are(kind, stamp):
    data = CIRDataset("cirr", "val", [None] * 4181, {}, Path(), data=kind)
    assert table_title(data, "reference removed") == f"cirr val{stamp} · 4,181 queries · reference removed"
    assert (kind in STAMPS) == (kind in ("real", "sample", "custom"))


def test_a_banner_shows_names_as_they_are():
    assert banner("").data == ""
    name = "</div><script>alert('x')</script> & co.png"
    box = banner(name).data
    assert box.count("<") == box.count(">") == 2 and box.startswith('<div style="') and box.endswith("</div>")
    assert "&lt;script&gt;alert('x')&lt;/script&gt; &amp; co.png" in box


# ---- sheets

COLOUR = {"reference": "#ff0000", "target": "#0000ff", "also": "#00ff00", "other": "#ffff00"}


@pytest.fixture
def squares(tmp_path):
    for name, colour in COLOUR.items(): Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
    asked = Triplet("reference", "target", ("is blue",), positives=frozenset({"target", "also"}))
    triplets = [asked, replace(asked, target=None), replace(asked, captions=("W" * 400, "has " + "long words " * 40))]
    return CIRDataset("mine", "val", triplets, {}, tmp_path, files={name: tmp_path / f"{name}.png" for name in COLOUR})


def pixel(picture, x, y): return "#%02x%02x%02x" % picture.getpixel((x, y))


def at(column, side):
    "Left edge of the reference, the target, and the found images 0, 1, .."
    return {"reference": 0, "target": side + 196}.get(column, 2 * side + 214 + (side + 6) * column if isinstance(column, int) else None)


@pytest.mark.parametrize("side", [40, 84, 120])
def test_every_picture_has_the_frame_of_its_verdict(squares, side):
    top = [["also", "target", "other"], ["other", None, "also"], ["target"] * 3]
    sheet = contact_sheet(squares, [1, 0], top, k=3, side=side)
    assert sheet.size == (2 * side + 190 + 4 * (side + 6), 22 + 2 * (side + 6))
    expected = [{"reference": ("query", "reference"), "target": None, 0: ("miss", "other"), 1: None, 2: ("valid", "also")},
                {"reference": ("query", "reference"), "target": ("target", "target"), 0: ("valid", "also"), 1: ("target", "target"), 2: ("miss", "other")}]
    for row, pictures in enumerate(expected):
        top_edge = 22 + row * (side + 6)
        for column, picture in pictures.items():
            left = at(column, side)
            frame, inside = (FRAMES[picture[0]], COLOUR[picture[1]]) if picture else ("#ffffff", "#ffffff")
            for offset in (0, 3, side - 4, side - 1):
                assert pixel(sheet, left + offset, top_edge + side // 2) == pixel(sheet, left + side // 2, top_edge + offset) == frame
            assert pixel(sheet, left + side // 2, top_edge + side // 2) == inside


def test_only_k_images_are_shown(squares):
    narrow, wide = (contact_sheet(squares, [0], [["also", "target", "other"]], k=k) for k in (1, 3))
    assert narrow.size == (2 * 84 + 190 + 2 * 90, 22 + 90) and wide.size[0] - narrow.size[0] == 2 * 90
    assert narrow.crop((0, 22, at(1, 84), 106)).tobytes() == wide.crop((0, 22, at(1, 84), 106)).tobytes()


@pytest.mark.parametrize("side", [40, 84])
def test_a_long_request_stays_in_its_column(squares, side):
    squares.triplets[2] = replace(squares.triplets[2], target=None)
    sheet = contact_sheet(squares, [2, 2], [[None]] * 3, k=1, side=side)
    beyond = sheet.crop((side + 196, 22, sheet.width, sheet.height))
    between = sheet.crop((side, 22 + side, side + 196, 22 + side + 6))
    assert beyond.getcolors() == [(beyond.width * beyond.height, (255, 255, 255))]
    assert between.getcolors() == [(between.width * between.height, (255, 255, 255))]
    assert len(sheet.crop((side + 6, 22, side + 190, 22 + side)).getcolors()) > 1  # and yet something is written


@given(st.lists(st.text(st.characters(categories=["L"]), min_size=1, max_size=60), min_size=1, max_size=12), st.integers(8, 40), st.integers(1, 6))
def test_a_request_keeps_to_its_lines(words, width, lines):
    text = request_text(Triplet("a", None, (" ".join(words), "is red")), width, lines)
    assert len(text.splitlines()) <= lines and all(len(line) <= width for line in text.splitlines())
    whole = re.sub(r"\s", "", " ".join(words) + " / is red")
    shown = re.sub(r"\s", "", text)
    assert shown == whole or shown.endswith("…") and whole.startswith(shown[:-1])


def test_frames_fit_any_picture(tmp_path):
    for size in ((300, 10), (10, 300), (50, 50)):
        picture = Image.new("RGB", size, "#123456")
        picture.save(tmp_path / "picture.png")
        one = framed(picture, "miss", 60)
        assert one.size == (60, 60) and one.tobytes() == framed(tmp_path / "picture.png", "miss", 60).tobytes()
        assert pixel(one, 0, 0) == pixel(one, 59, 30) == FRAMES["miss"] and pixel(one, 30, 30) == "#123456"


def test_the_target_is_called_the_target_even_where_it_is_one_of_several():
    triplet = Triplet("a", "b", (), positives=frozenset("bc"))
    assert [verdict(triplet, name) for name in "abcd"] == ["miss", "target", "valid", "miss"]


@given(st.integers(0, 500), st.integers(0, 60))
def test_evenly_spaced_positions(total, count):
    found = evenly_spaced(total, count)
    assert len(found) == min(total, count) and found == sorted(set(found)) and all(0 <= i < total for i in found)
    steps = [b - a for a, b in zip(found, found[1:])]
    assert not steps or max(steps) - min(steps) <= 1
    if found: assert abs(found[0] - (total - 1 - found[-1])) <= 1  # as far from the beginning as from the end
    if count >= total: assert found == list(range(total))
