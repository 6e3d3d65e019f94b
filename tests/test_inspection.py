"The pictures of a run: counted like a naive loop would, ordered by their stated rule, and drawn without the truth as well."
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqe_cir.data import CIRDataset, Triplet
from dqe_cir.evaluator import Evaluation
from dqe_cir.data.garments.draw import ATTRIBUTES
from dqe_cir.studies.inspection import attribute_confusion, comparison_figure, comparison_sheet
from dqe_cir.studies.inspection import confusion_figure, delta_figure, delta_range, delta_reports
from dqe_cir.studies.inspection import extreme_rows, gain_table, gains, noted, quality, request_kinds
from dqe_cir.studies.inspection import verdict_counts, worst_rows
from dqe_cir.trainer.mining import DELTA_GRID, delta_counts
from dqe_cir.sampler import around, spread_over

numbers = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=12)


@given(numbers, st.data())
def test_counts_are_those_of_a_loop(values, data):
    "Every chosen value falls into one step; what lies outside falls into the outermost."
    chosen = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    low, high, steps = DELTA_GRID
    expected = [0] * steps
    for value, taken in zip(values, chosen):
        if taken: expected[min(steps - 1, max(0, int((torch.tensor(value) - low) * (steps / (high - low)) // 1)))] += 1
    assert delta_counts(torch.tensor([values]), torch.tensor([chosen])).tolist() == expected


@given(st.lists(st.tuples(st.integers(-3, 6), st.booleans(), st.booleans()), min_size=1, max_size=10))
def test_around_is_what_a_loop_finds(rows):
    delta, possible, zone = (torch.tensor([column]) for column in zip(*rows))
    zone = zone & possible
    near, far = around(delta.float(), possible, zone)
    inside = [d for (d, _, _), z in zip(rows, zone[0].tolist()) if z]
    for place, (d, could, _) in enumerate(rows):
        assert near[0, place].item() == (could and bool(inside) and d < min(inside))
        assert far[0, place].item() == (could and bool(inside) and d > max(inside))


def test_spread_takes_both_ends():
    scores = torch.tensor([5.0, 1.0, 3.0, 4.0, 2.0])
    assert spread_over(torch.tensor([1, 1, 1, 1, 1]).bool(), scores, 3) == [0, 2, 1]
    assert spread_over(torch.tensor([0, 1, 0, 0, 0]).bool(), scores, 3) == [1] and spread_over(torch.zeros(5).bool(), scores, 3) == []


def clothes(**values):
    return {"colour": "red", "pattern": "plain", "sleeve": "long", "neckline": "round", "length": "short", **values}


@pytest.fixture
def small():
    "Three queries over four images: one names a colour, one leaves several open, one asks for a sleeve."
    images = {"a": clothes(), "b": clothes(colour="blue"), "c": clothes(colour="green", sleeve="short"), "d": clothes(sleeve="short")}
    triplets = [Triplet("a", "b", ("is blue",), None, (), "one", frozenset("b")), Triplet("a", "c", ("is lighter",), None, (), "two", frozenset("bc")),
                Triplet("a", "d", ("has short sleeves", "a | b"), None, (), "three", frozenset("d"))]
    mentions = {"one": {"colour": ["blue"]}, "two": {"colour": ["blue", "green"]}, "three": {"sleeve": ["short"]}}
    return CIRDataset("garments", "val", triplets, {"all": list("abcd")}, None, data="garments", attributes=images, mentions=mentions,
                      relevant={t.pair_id: t.positives for t in triplets})


def result(rank, precision=None, top=None):
    measures = {"rank": torch.tensor(rank)} | ({} if precision is None else {"average_precision": torch.tensor(precision)})
    return Evaluation("a protocol", {}, measures, top or [list("abcd")] * len(rank), None)


def test_confusion_by_hand(small):
    "Asked: blue, found green. Kept: the sleeve of two queries, the colour of the third. 'Lighter' expects no single colour."
    tables = attribute_confusion(small, [["c"], ["b"], ["d"]], "colour")
    place = ATTRIBUTES["colour"].index
    assert tables["asked for"].sum() == 1 and tables["asked for"][place("blue"), place("green")] == 1
    assert tables["kept"].sum() == 1 and tables["kept"][place("red"), place("red")] == 1
    sleeves = attribute_confusion(small, [["c"], ["b"], ["d"]], "sleeve")
    assert sleeves["asked for"].sum() == 1 == sleeves["asked for"].trace() and (sleeves["kept"].sum(), sleeves["kept"].trace()) == (2, 1)
    figure = confusion_figure(small, [["c"], ["b"], ["d"]])
    assert len(figure.data) == 10 and figure.layout.annotations[0].text == "colour asked for: 0 % right"
    assert figure.data[1].z == ([None] * 3,) * 3, "nobody asked for a pattern: grey, not white"


def test_kinds_of_requests(small):
    assert request_kinds(small) == {"colour": [0, 1], "sleeve": [2], "several values allowed": [1], "1 change": [0, 1, 2]}


def test_the_worst_follow_the_rule():
    "Lowest AP first; then the worse rank; then the order of the file. Without AP the rank decides."
    assert worst_rows(result([9, 3, 8, 8], [0.5, 0.1, 0.1, 0.1]), 4) == [2, 3, 1, 0]
    assert worst_rows(result([9, 3, 8, 9]), 3) == [0, 3, 2]


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=8))
def test_gains_change_sign_when_the_runs_change_places(pairs):
    one, other = (result(list(ranks)) for ranks in zip(*pairs))
    torch.testing.assert_close(gains(one, other), -gains(other, one))
    assert all((gain > 0) == (then < before) for gain, (before, then) in zip(gains(one, other).tolist(), pairs))
    up, down = extreme_rows(gains(one, other), 3)
    assert not set(up) & set(down) and len(up) <= 3 and len(down) <= 3


def test_units_of_a_gain():
    assert gains(result([8]), result([2])).tolist() == [2.0] and "halvings" in verdict_counts(result([8]), result([2]))
    torch.testing.assert_close(gains(result([8], [0.25]), result([2], [0.5])), torch.tensor([25.0]))
    assert verdict_counts(result([8, 1, 1], [0.25, 1.0, 0.5]), result([2, 1, 2], [0.5, 1.0, 0.25])) == "1 queries better, 1 worse, 1 the same; mean +0.0 points of AP"


@pytest.mark.parametrize("precision", [None, ([0.2, 1.0, 0.5], [1.0, 1.0, 0.25])])
def test_comparison_shows_every_query_once(small, precision):
    one, other = (result(rank, precision and precision[i]) for i, rank in enumerate(([5, 1, 2], [1, 1, 4])))
    figure = comparison_figure(small, one, other, ("first", "second"))
    assert [len(trace.x) for trace in figure.data[1:]] == [1, 1, 1] and "is blue" in figure.data[1].text[0]
    table = gain_table(small, one, other, ("first", "second")).data
    assert "| 0 | a | is blue |" in table and "a   b" in table and "is lighter" not in table, "equal queries are in neither list; a bar in a caption would break the table"
    with pytest.raises(ValueError, match="answer every query alike"): comparison_sheet(small, one, one, ("first", "second"))


def test_a_note_stands_before_the_captions(small):
    shown = noted(small, [2, 0], ["AP 3", "AP 5"])
    assert [t.captions for t in shown.triplets] == [("[AP 3] has short sleeves", "a | b"), ("[AP 5] is blue",)]
    assert small.triplets[2].captions[0] == "has short sleeves" and dataclasses.replace(small, relevant={}).triplets[0].positives == {"b"}


def test_a_film_without_truth_and_without_counts():
    "Runs of an older version have no counts in their reports: they are left out; unknown right answers are no group."
    counts = torch.bincount(torch.tensor([50, 60, 60]), minlength=DELTA_GRID[2]).tolist()
    report = {"kind": "refresh", "epoch": 3, "zone_size": [1, 1, 1], "zone_bounds": [[0.1] * 3, [0.2] * 3], "target_rank": [1, 2, 3], "counts": {"possible": counts, "zone": counts}}
    reports = delta_reports([report, {**report, "epoch": 5}, {"kind": "refresh", "epoch": 7}, {"kind": "epoch", "epoch": 3}])
    assert list(reports) == ["before epoch 3", "before epoch 5"]
    figure = delta_figure(reports)
    assert len(figure.data) == 3 and len(figure.frames) == 2 and "right answers" not in figure.layout.title.text
    assert max(figure.data[1].y) == 1.0 and delta_range(reports) == [-0.02, 0.24]
    assert [step.label for step in figure.layout.sliders[0].steps] == list(reports) and figure.layout.sliders[0].active == 1


def test_quality_is_higher_for_the_better():
    assert quality(result([4, 1])).tolist() == [-2.0, 0.0] and quality(result([4, 1], [0.5, 0.25])).tolist() == [50.0, 25.0]
