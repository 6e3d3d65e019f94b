"Samplers on random scores: what is never drawn, what does not change the choice, and QuRe's rule against figures from its own code."
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import slow_mining
from slow_mining import Largest

from dqe_cir import sampler as sampler_module
from dqe_cir.core import generator
from dqe_cir.sampler import Hardest, MidZone, Random, ScoreDropBand, row_portions, zone_ends

SAMPLERS = {"quantile": MidZone(), "absolute": MidZone("absolute"), "meanstd": MidZone("meanstd"), "random": Random(), "hardest": Hardest(),
            "qure": ScoreDropBand(), "qure_window": ScoreDropBand(window=5)}
each = pytest.mark.parametrize("name", list(SAMPLERS))


@st.composite
def scored(draw, columns=12):
    "Scores with ties, a target per row, and which candidates are valid."
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, columns))
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(rows, columns)) if draw(st.booleans()) else rng.integers(0, 4, (rows, columns)) / 4
    return torch.tensor(scores).float(), torch.tensor(rng.integers(0, columns, rows)), torch.tensor(rng.random((rows, columns)) < draw(st.sampled_from([0.0, 0.5, 1.0])))


@each
@given(case=scored())
def test_only_valid_non_targets_are_ever_drawn(name, case):
    scores, target, valid = case
    sampler = SAMPLERS[name]
    zone, drawn = sampler.zone(scores, target, valid), sampler.draw(scores, target, valid, generator(0))
    assert not (zone & ~valid).any() and not zone.gather(1, target[:, None]).any()
    for row, pick in enumerate(drawn.tolist()):
        others = [i for i in valid[row].nonzero().flatten().tolist() if i != target[row]]
        assert (pick in others) if others else pick == -1
        if zone[row].any(): assert zone[row, pick]


@each
@given(case=scored())
def test_a_row_does_not_depend_on_its_neighbours(name, case):
    if name == "meanstd": return  # its bounds are pooled over the queries, by definition
    scores, target, valid = case
    together = SAMPLERS[name].zone(scores, target, valid)
    for row in range(len(scores)):
        assert torch.equal(SAMPLERS[name].zone(scores[row:row + 1], target[row:row + 1], valid[row:row + 1])[0], together[row])


@pytest.mark.parametrize("name", ["quantile", "random", "hardest", "qure"])
@given(case=scored(), shift=st.integers(-8, 8), scale=st.sampled_from([0.25, 2.0, 8.0]))
def test_shift_and_positive_scale_change_nothing(name, case, shift, scale):
    scores, target, valid = case
    scores = (scores * 64).round() / 64  # exact in float32, so that rounding makes no ties and breaks none
    assert torch.equal(SAMPLERS[name].zone(scores * scale + shift, target, valid), SAMPLERS[name].zone(scores, target, valid))


@each
def test_nan_names_the_query(name):
    scores = torch.zeros(3, 4)
    scores[2, 1] = torch.nan
    with pytest.raises(ValueError, match="query row 2"): SAMPLERS[name].zone(scores, torch.zeros(3, dtype=torch.long), torch.ones(3, 4, dtype=torch.bool))


# ---- the quantile zone, from its definition, in exact arithmetic

SHARES = ("0", "0.005", "0.02", "0.03", "0.05", "0.1", "0.125", "0.25", "0.5", "1")  # of these, single precision makes exact ends of up to 20,000 candidates


def exact_ends(count, low, high, smallest):
    "Positions ceil(low M) to ceil(high M), at least `smallest` of them if there are so many; the shares as written, not as rounded."
    first = min(math.ceil(Fraction(low) * count), count)
    last = min(max(math.ceil(Fraction(high) * count), first + smallest), count)
    return min(first, max(0, last - smallest)), last


def exact_zone(scores, target, valid, low, high, guard, smallest):
    "One query, its scores whole numbers of 64ths: below the target, beyond the guard, sorted by (delta, column), cut by position."
    own = [Fraction(score) for score in scores]
    others = [i for i in range(len(own)) if valid[i] and i != target]
    delta = {i: own[target] - own[i] for i in others}
    mean = sum(delta.values()) / max(1, len(delta))
    variance = sum((value - mean) ** 2 for value in delta.values()) / max(1, len(delta))
    for value in delta.values(): assume(value <= 0 or abs(value ** 2 - Fraction(guard) ** 2 * variance) > 1e-6)  # on the very edge, rounding decides
    below = [i for i in others if delta[i] > 0 and delta[i] ** 2 >= Fraction(guard) ** 2 * variance]
    below.sort(key=lambda i: (delta[i], i))
    first, last = exact_ends(len(below), low, high, smallest)
    return set(below[first:last])


@settings(max_examples=150)
@given(case=scored(columns=60), bounds=st.lists(st.sampled_from(SHARES), min_size=2, max_size=2, unique=True), guard=st.sampled_from(["0", "0.25", "0.5", "1.5"]),
       smallest=st.integers(1, 9))
def test_the_quantile_zone_is_its_definition_in_fractions(case, bounds, guard, smallest):
    scores, target, valid = case
    scores = (scores * 64).round() / 64
    low, high = sorted(bounds, key=Fraction)
    zone = MidZone("quantile", float(low), float(high), float(guard), smallest).zone(scores, target, valid)
    for row in range(len(scores)):
        expected = exact_zone(scores[row].tolist(), target[row].item(), valid[row].tolist(), low, high, guard, smallest)
        assert set(zone[row].nonzero().flatten().tolist()) == expected


def ends(count, *bounds): return [end.tolist() for end in zone_ends(torch.as_tensor(count), *bounds)]


@pytest.mark.parametrize("low, high", [("0.02", "0.1"), ("0.005", "0.03"), ("0.005", "0.05")])
@pytest.mark.parametrize("smallest", [0, 1, 8])
def test_ends_of_the_usual_zones_are_exact_for_every_count(low, high, smallest):
    counts = range(20_001)
    expected = [exact_ends(count, low, high, smallest) for count in counts]
    assert ends(counts, float(low), float(high), smallest) == [list(side) for side in zip(*expected)]


@pytest.mark.parametrize("share, counts", [("0.001", [3000, 6000, 7000]), ("0.3", [50, 90, 100]), ("0.15", [100, 180, 200]), ("0.6", [25, 45, 50])])
def test_an_end_on_a_whole_number_may_lie_one_further_and_only_there(share, counts):
    "Single precision, written down because recorded draws rest on it: 0.3 * 50 is 15.000001, and its ceiling 16."
    found, _ = ends(range(10_001), float(share), 1.0, 0)
    late = [count for count in range(10_001) if found[count] != math.ceil(Fraction(share) * count)]
    assert late[:3] == counts
    for count in late: assert (Fraction(share) * count).denominator == 1 and found[count] == Fraction(share) * count + 1


@given(st.integers(0, 300), st.sampled_from(SHARES + ("0.3", "0.7")), st.sampled_from(SHARES + ("0.3", "0.7")), st.integers(0, 12))
def test_ends_lie_in_the_list_and_hold_enough(count, low, high, smallest):
    [first], [last] = ends([count], float(low), float(high), smallest)
    assert 0 <= first <= last <= count and last - first >= min(smallest, count)


# ---- fallbacks

def test_fallbacks_are_counted_by_rung():
    scores, valid = torch.tensor([[1.0, 0.99, 0.98, 0.97], [0.0, 1.0, 2.0, 3.0], [1.0, 5.0, 5.0, 5.0]]), torch.ones(3, 4, dtype=torch.bool)
    valid[2, 1:] = False
    eligible, rung = MidZone(guard=50.0).rungs(scores, torch.zeros(3, dtype=torch.long), valid)
    assert rung.tolist() == [1, 3, -1] and eligible[0, 1:].any() and eligible[1, 1:].all() and not eligible[2].any()


@pytest.mark.parametrize("threshold", [1, 3])
@pytest.mark.parametrize("family", ["gauss", "uniform", "exponential", "three_bands", "two_cliffs", "adjacent_cliffs"])
def test_qures_band_equals_the_reference(golden, family, threshold):
    stored = np.load(golden("qure_hard_negatives.npz"))
    scores, target = torch.from_numpy(stored[f"{family}_scores"]).float(), torch.from_numpy(stored[f"{family}_target"]).long()
    zone = ScoreDropBand(threshold).zone(scores, target, torch.ones_like(scores, dtype=torch.bool))
    ends = np.cumsum(stored[f"{family}_thr{threshold}_count"])
    expected = np.split(stored[f"{family}_thr{threshold}_candidates"], ends[:-1])
    assert [sorted(row.nonzero().flatten().tolist()) for row in zone] == [sorted(part.tolist()) for part in expected]


def test_qures_band_on_short_rows(golden):
    stored = np.load(golden("qure_hard_negatives.npz"))
    for scores, target, count, threshold, first, last in zip(*(stored[f"small_{name}"] for name in ("scores", "target", "n", "threshold", "first", "last")), strict=True):
        row = torch.from_numpy(scores[:count]).float()[None]
        zone = ScoreDropBand(int(threshold)).zone(row, torch.tensor([int(target)]), torch.ones_like(row, dtype=torch.bool))[0]
        order = row[0].argsort(descending=True, stable=True).tolist()
        expected = set() if first == -2 else set(order[first:last + 1]) - {int(target)}
        assert set(zone.nonzero().flatten().tolist()) == expected


# ---- odd cases, one by one

def everything(scores): return torch.ones_like(scores, dtype=torch.bool)


def falling(columns, step=0.01): return 1.0 - step * torch.arange(columns, dtype=torch.float64).unsqueeze(0)


@pytest.mark.parametrize("guard, rung", [(0.5, 0), (50.0, 1)])
def test_an_empty_zone_first_drops_the_guard(guard, rung):
    scores, target = falling(101), torch.tensor([0])
    eligible, used = MidZone("quantile", 0.125, 0.25, guard, smallest=8).rungs(scores, target, everything(scores))
    assert used.item() == rung
    if rung: assert eligible[0].nonzero().flatten().tolist() == list(range(14, 26))  # positions 13 to 24 of 100 below the target


@pytest.mark.parametrize("name", ["quantile", "absolute", "meanstd", "hardest", "qure"])
def test_a_target_that_comes_last_still_gets_a_negative(name):
    scores, target = falling(30), torch.tensor([29])
    eligible, used = SAMPLERS[name].rungs(scores, target, everything(scores))
    assert eligible.any() and not eligible[0, 29] and used.item() >= (name != "meanstd")
    if name == "hardest": assert eligible[0].nonzero().flatten().tolist() == [28]  # the lowest of those above


def test_an_empty_absolute_zone_takes_the_nearest_beyond_its_lower_bound_then_any():
    sampler, scores = MidZone("absolute", 0.05, 0.15, smallest=3), torch.tensor([[1.0, 0.99, 0.98, 0.8, 0.7, 0.6, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]])
    eligible, used = sampler.rungs(scores, torch.tensor([0, 0]), everything(scores))
    assert used.tolist() == [1, 2] and not sampler.zone(scores, torch.tensor([0, 0]), everything(scores)).any()
    assert eligible[0].nonzero().flatten().tolist() == [3, 4, 5] and eligible[1].tolist() == [False] + [True] * 6


@given(case=scored())
@pytest.mark.parametrize("sampler", [MidZone(), MidZone(guard=0.0), MidZone("absolute"), Hardest(), ScoreDropBand()], ids=["quantile", "no_guard", "absolute", "hardest", "qure"])
def test_images_above_the_target_and_its_copies_are_in_no_zone(sampler, case):
    scores, target, valid = case
    zone = sampler.zone(scores, target, valid)
    own = scores.gather(1, target.unsqueeze(1))
    if not isinstance(sampler, ScoreDropBand): assert not (zone & (scores >= own)).any()
    assert not (zone & (scores > own)).any()


def test_ties_go_by_column():
    scores = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.5, 0.2]])
    zone = MidZone("quantile", 0.0, 0.5, guard=0.0, smallest=1).zone(scores, torch.tensor([0]), everything(scores))
    assert zone[0].nonzero().flatten().tolist() == [1, 2, 3]
    assert Hardest().zone(scores, torch.tensor([0]), everything(scores))[0].nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("high", [0.0, 0.5])
def test_without_any_spread_there_is_no_guard(high):
    scores = torch.full((1, 41), high)
    scores[0, 7] = 0.5  # the target, level with the others or above them all
    eligible, used = MidZone("quantile", 0.0, 0.25, guard=3.0, smallest=2).rungs(scores, torch.tensor([7]), everything(scores))
    if high < 0.5: assert used.item() == 0 and eligible[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    else: assert used.item() == 3 and eligible.sum() == 40


@each
def test_one_valid_candidate_is_taken_and_none_gives_minus_one(name):
    scores, target, valid = torch.tensor([[0.5, 0.9, 0.1, 0.3]] * 3), torch.tensor([0, 0, 0]), torch.zeros(3, 4, dtype=torch.bool)
    valid[0, 1], valid[1, 2], valid[2, 0] = True, True, True  # above the target, below it, the target itself
    assert SAMPLERS[name].draw(scores, target, valid, generator(0)).tolist() == [1, 2, -1]
    assert SAMPLERS[name].pool(scores, target, valid, 6, generator(0)).tolist() == [[1] + [-1] * 5, [2] + [-1] * 5, [-1] * 6]


@each
def test_every_known_answer_stays_out(name):
    scores = torch.randn(20, 30, generator=generator(0, "answers"))
    target = torch.arange(20)
    valid = torch.rand(20, 30, generator=generator(1, "answers")) < 0.7
    pools = SAMPLERS[name].pool(scores, target, valid, 30, generator(2))
    for row in range(20):
        drawn = [i for i in pools[row].tolist() if i >= 0]
        assert drawn and all(valid[row, i] and i != row for i in drawn) and len(drawn) == len(set(drawn))


@given(case=scored(), seed=st.integers(0, 99))
def test_a_pool_is_the_zone_in_random_order(case, seed):
    scores, target, valid = case
    eligible, _ = MidZone().rungs(scores, target, valid)
    pools = MidZone().pool(scores, target, valid, 15, generator(seed))
    assert torch.equal(pools, MidZone().pool(scores, target, valid, 15, generator(seed)))
    for row, pool in enumerate(pools.tolist()): assert sorted(i for i in pool if i >= 0) == eligible[row].nonzero().flatten().tolist()


# ---- the quick form and the slow one

KINDS = {**SAMPLERS, "no_guard": MidZone(guard=0.0), "wide_guard": MidZone(guard=2.0), "narrow": MidZone("absolute", 0.3, 0.6, smallest=2), "all_below": MidZone("quantile", 0.0, 1.0, 0.0, 0),
         "pooled": MidZone("meanstd", -0.5, 0.5), "qure_3": ScoreDropBand(3)}


@st.composite
def crowded(draw):
    "Up to 40 rows of up to 300 columns, from no tie at all to hardly anything else, and which candidates are valid; some rows have none."
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    scores, grain = rng.normal(size=(rows, columns)) * draw(st.sampled_from([0.1, 1.0])), draw(st.sampled_from([None, 64, 8, 1]))
    if grain: scores = np.round(scores * grain) / grain
    valid = rng.random((rows, columns)) < draw(st.sampled_from([0.02, 0.5, 1.0]))
    valid[rng.random(rows) < 0.1] = False
    return torch.tensor(scores).float(), torch.tensor(rng.integers(0, columns, rows)), torch.tensor(valid)


@pytest.mark.parametrize("name", list(KINDS))
@settings(max_examples=40)
@given(case=crowded(), portion=st.sampled_from([1, 700, 4000, 2**18]))
def test_zones_rungs_and_pools_are_those_of_the_slow_form(name, case, portion):
    sampler = KINDS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "PORTION", portion)
        slowly, quickly = generator(3), generator(3)
        assert torch.equal(sampler.pool(*case, 128, quickly), slow_mining.pool(sampler, *case, 128, slowly))
        assert torch.equal(quickly.get_state(), slowly.get_state())
        assert torch.equal(sampler.zone(*case), slow_mining.ZONES[type(sampler)](sampler, *case)[0])
        expected = slow_mining.rungs(sampler, *case)
        for found, wanted in zip(sampler.rungs(*case), expected): assert torch.equal(found, wanted) and found.dtype == wanted.dtype
        for rows, eligible, rung in sampler.portions(*case): assert torch.equal(eligible, expected[0][rows]) and torch.equal(rung, expected[1][rows])


@pytest.mark.parametrize("name", list(KINDS))
def test_a_pool_larger_than_a_portion_is_that_of_the_slow_form(name):
    scores = torch.randn(130, 5000, generator=generator(0, "large")) * 0.05
    scores[:40] = (scores[:40] * 500).round() / 500
    target, valid = scores.topk(60, dim=1).indices[torch.arange(130), torch.arange(130) % 60], torch.rand(130, 5000, generator=generator(1, "large")) < 0.9
    assert len(row_portions(scores)) == 2
    assert torch.equal(KINDS[name].pool(scores, target, valid, 128, generator(3)), slow_mining.pool(KINDS[name], scores, target, valid, 128, generator(3)))


@given(rows=st.lists(st.integers(1, 30), min_size=1, max_size=6), columns=st.integers(1, 600), seed=st.integers(0, 999))
def test_random_numbers_by_portions_of_rows_are_those_of_the_whole_matrix(rows, columns, seed):
    whole, portions = generator(seed), generator(seed)
    pieces = [torch.rand(count, columns, generator=portions) for count in rows]
    assert torch.equal(torch.cat(pieces), torch.rand(sum(rows), columns, generator=whole)) and torch.equal(portions.get_state(), whole.get_state())


@given(rows=st.integers(0, 2000), columns=st.integers(1, 400_000))
def test_portions_cover_the_rows_and_leave_none_alone(rows, columns):
    portions = row_portions(torch.empty(1).expand(rows, columns))
    assert [row for part in portions for row in range(part.start, part.stop)] == list(range(rows))
    sizes = [part.stop - part.start for part in portions]
    assert max(sizes) - min(sizes) <= 1 and (min(sizes) >= 2 or rows < 2) and max(sizes) <= max(3, 2 * sampler_module.PORTION // columns)


@each
def test_nan_in_a_later_portion_names_the_row_of_the_whole(name, monkeypatch):
    monkeypatch.setattr(sampler_module, "PORTION", 8)
    scores = torch.zeros(9, 4)
    scores[7, 1] = torch.nan
    with pytest.raises(ValueError, match="query row 7 contain NaN"):
        SAMPLERS[name].pool(scores, torch.zeros(9, dtype=torch.long), torch.ones(9, 4, dtype=torch.bool), 4, generator(0))


@pytest.mark.parametrize("sampler", [MidZone(guard=1.0), MidZone("absolute", 0.5, 0.6)], ids=["quantile", "absolute"])
def test_fallbacks_are_asked_for_rows_with_an_empty_zone_alone(sampler, monkeypatch):
    scores, target = torch.randn(50, 40, generator=generator(0, "asked")), torch.arange(50) % 40
    valid, asked = torch.rand(50, 40, generator=generator(1, "asked")) < 0.3, []
    plain = type(sampler).fallbacks
    monkeypatch.setattr(type(sampler), "fallbacks", lambda self, *case: asked.append(case[0]) or plain(self, *case))
    _, used = sampler.rungs(scores, target, valid)
    empty = ~sampler.zone(scores, target, valid).any(1)
    assert 0 < empty.sum() < 50 and torch.equal(asked[0], scores[empty]) and len(asked) == 1 and torch.equal(used != 0, empty)


def test_a_zone_that_is_its_argument_is_not_written_into():
    class Same(Random):
        def zone(self, scores, target, valid): return valid
    valid = torch.tensor([[False, False], [False, True]])
    kept = valid.clone()
    assert Same().rungs(torch.zeros(2, 2), torch.tensor([0, 0]), valid)[1].tolist() == [-1, 0] and torch.equal(valid, kept)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("meanstd", "pooled")])
def test_nothing_of_the_size_of_the_scores_is_made(name, monkeypatch):
    monkeypatch.setattr(sampler_module, "PORTION", 2**12)
    scores, target = torch.randn(64, 1000, generator=generator(0, "memory")), torch.arange(64)
    with Largest() as largest: KINDS[name].pool(scores, target, torch.ones_like(scores, dtype=torch.bool), 128, generator(0))
    assert 1000 < largest.numbers <= 2 * 2**12
