"Refreshing negatives against one naive pass, its report by hand, what is never a candidate, and draws between two refreshes."
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import slow_mining
from helpers import PAIRWISE
from slow_mining import Largest

from dqe_cir import sampler as sampler_module
from dqe_cir.trainer import mining
from dqe_cir.core import generator
from dqe_cir.data import CIRDataset, Triplet
from dqe_cir.methods import Method
from dqe_cir.trainer import NegativePool
from dqe_cir.trainer.mining import blocks_of, candidate_ids, merged, mine, mine_block, overlap, refresh, right_answers
from dqe_cir.trainer.mining import same_pictures, summed_up, valid_candidates, zone_report
from dqe_cir.sampler import Hardest, MidZone, Random, ScoreDropBand
from dqe_cir.trainer import TrainingSet, train_config
from dqe_cir.trainer.batches import negative_tokens, other_targets
from dqe_cir.trainer.runs import load_checkpoint, save_checkpoint


class Tokens(dict):
    "Four random tokens of width 6 per image id."
    def __getitem__(self, ids): return torch.stack([torch.randn(4, 6, generator=generator(0, name)) for name in ids])


class Adding(Method):
    "Reference and text are added; an image is its tokens."
    def __init__(self): super().__init__(nn.Linear(1, 1))
    def encode_query(self, reference, texts): return F.normalize(reference[:, 0] + torch.stack([torch.randn(6, generator=generator(1, text)) for text in texts]), dim=-1)
    def encode_target(self, tokens): return F.normalize(tokens, dim=-1)


def query(reference, target, caption="is red", category="dress", positives=()):
    return Triplet(reference, target, (caption,), category, pair_id=f"{reference}-{target}-{caption}", positives=frozenset({target, *positives}))


def two_galleries(name="garments"):
    "Thirteen queries over 40 dresses and six over 25 shirts."
    ids = {"dress": [f"d{i}" for i in range(40)], "shirt": [f"s{i}" for i in range(25)]}
    triplets = [query(f"d{i}", f"d{3 * i + 1}", f"caption {i}") for i in range(13)] + [query(f"s{i}", f"s{24 - i}", f"caption {i}", "shirt") for i in range(6)]
    return CIRDataset(name, "train", triplets[::2] + triplets[1::2], ids, Path("nowhere"))


# ---- one refresh

def naive_pools(method, dataset, tokens, sampler):
    "Query by query, image by image: the ids that may be drawn, and the rung."
    found = []
    for triplet in dataset.triplets:
        ids = dataset.galleries[triplet.category]
        vector = method.encode_query(tokens[[triplet.reference]], [triplet.captions[0]])[0]
        scores = torch.tensor([[max(float(vector @ token) for token in method.encode_target(tokens[[name]])[0]) for name in ids]])
        valid = torch.tensor([[name not in triplet.positives for name in ids]])
        eligible, rung = sampler.rungs(scores, torch.tensor([ids.index(triplet.target)]), valid)
        found.append(({name for name, chosen in zip(ids, eligible[0].tolist()) if chosen}, rung.item()))
    return found


@pytest.mark.parametrize("block", [1, 4, 512])
@pytest.mark.parametrize("sampler", [MidZone(), MidZone("absolute", 0.1, 0.3), Random(), Hardest(), ScoreDropBand(), ScoreDropBand(window=8)], ids=lambda s: type(s).__name__)
def test_refresh_in_blocks_equals_one_naive_pass(monkeypatch, block, sampler):
    monkeypatch.setattr(mining, "BLOCK", block)
    dataset, method, tokens = two_galleries(), Adding(), Tokens()
    pools, report = refresh(method, dataset, tokens, sampler, seed=3, epoch=5)
    expected = naive_pools(method, dataset, tokens, sampler)
    for triplet, pool, (names, _) in zip(dataset.triplets, pools.tolist(), expected, strict=True):
        drawn = [dataset.galleries[triplet.category][i] for i in pool if i >= 0]
        assert len(drawn) == len(set(drawn)) and set(drawn) == names
    rungs = [rung for _, rung in expected]
    assert report["rungs"] == {str(rung): rungs.count(rung) for rung in sorted(set(rungs))}
    assert pools.dtype == torch.int32 and pools.shape == (19, mining.POOL)


def test_a_refresh_depends_on_seed_and_epoch_and_leaves_the_method_as_it_was():
    dataset, method, tokens = two_galleries(), Adding().train(), Tokens()
    draw = lambda seed, epoch: refresh(method, dataset, tokens, Random(), seed, epoch)[0]
    assert torch.equal(draw(0, 0), draw(0, 0)) and not torch.equal(draw(0, 0), draw(1, 0)) and not torch.equal(draw(0, 0), draw(0, 1))
    assert method.training and not refresh(method.eval(), dataset, tokens, Random(), 0, 0)[0].requires_grad and not method.training


def test_a_model_that_has_diverged_chooses_no_negatives():
    dataset, method, tokens = two_galleries(), Adding(), Tokens()
    query_of = method.encode_query
    method.encode_query = lambda reference, texts: query_of(reference, texts).where(torch.tensor([[text != "caption 7"] for text in texts]), torch.nan)
    with pytest.raises(ValueError, match="query row 10 is not finite"): refresh(method, dataset, tokens, MidZone(), 0, 0)  # the eleventh query about dresses


# ---- its report

def test_report_by_hand():
    scores = torch.tensor([[0.9, 0.5, 0.4, 0.1], [0.2, 0.8, 0.3, 0.7], [0.5, 0.1, 0.1, 0.1]])
    target, valid = torch.tensor([0, 3, 0]), torch.tensor([[True] * 4, [True] * 4, [True, False, False, False]])
    triplets = [query("r", name, str(i)) for i, name in enumerate("ada")]
    dataset = SimpleNamespace(relevant={triplets[0].pair_id: {"a", "b"}, triplets[1].pair_id: {"d", "a", "c"}, triplets[2].pair_id: {"a", "b"}})
    case, right = (scores, target, valid), right_answers(dataset, triplets, {name: i for i, name in enumerate("abcd")})
    part = zone_report(*case, *Random().rungs(*case), right)
    assert part["zone"].tolist() == [3, 3, 0] and part["rung"].tolist() == [0, 0, -1] and part["rank"].tolist() == [1, 2, 1]
    assert_close(part["false"], torch.tensor([1 / 3, 2 / 3, 0.0]))  # b of b, c, d; a and c of a, b, c; nothing
    assert_close(part["delta"], torch.tensor([0.5, 0.4, torch.nan]), equal_nan=True)  # of 0.4 0.5 0.8; of 0.5 -0.1 0.4
    whole = summed_up([{name: values[:1] for name, values in part.items()}, {name: values[1:] for name, values in part.items()}])
    assert whole["zone_size"] == pytest.approx([0.6, 3.0, 3.0]) and whole["target_rank"] == pytest.approx([1.0, 1.0, 1.8])
    assert whole["delta"] == pytest.approx([0.41, 0.45, 0.49]) and whole["false_negatives"] == pytest.approx(33.33)
    assert whole["rungs"] == {"-1": 1, "0": 2} and whole["train_R@10"] == 100.0
    assert "false" not in zone_report(*case, *Random().rungs(*case))


def test_overlap_by_hand():
    assert overlap(torch.tensor([[1, 2, -1], [4, 5, 6]]), torch.tensor([[2, 3, -1], [6, 4, 5]])) == round((1 / 3 + 1) / 2, 4)
    assert overlap(torch.full((2, 3), -1), torch.full((2, 3), -1)) == 0.0


# ---- the quick refresh and the slow one

def knowing(dataset):
    "The same data, which know of every request a few answers that nobody marked."
    names = {t.pair_id: set(t.positives) | set(dataset.galleries[t.category][5 * i % 20::9]) for i, t in enumerate(dataset.triplets)}
    return dataclasses.replace(dataset, relevant=names)


@pytest.mark.parametrize("zone_on", ["query", "target"])
@pytest.mark.parametrize("block, portion", [(5, 2**18), (512, 2**18), (512, 100), (5, 1)])
@pytest.mark.parametrize("sampler", [MidZone(), MidZone(guard=1.5), MidZone("absolute", 0.1, 0.3), MidZone("absolute", 0.9, 0.95), MidZone("meanstd"), MidZone("meanstd", 2.0, 3.0), Random(), Hardest(), ScoreDropBand(),
                                     ScoreDropBand(window=8)], ids=lambda s: f"{type(s).__name__}{getattr(s, 'scale', '')}")
def test_pools_and_report_are_those_of_the_slow_form(monkeypatch, sampler, block, portion, zone_on):
    monkeypatch.setattr(mining, "BLOCK", block)
    monkeypatch.setattr(sampler_module, "PORTION", portion)
    for dataset in (two_galleries(), knowing(two_galleries()), two_galleries("fashioniq")):
        pools, report = refresh(Adding(), dataset, Tokens(), sampler, seed=3, epoch=5, zone_on=zone_on)
        expected, summary = slow_mining.refresh(Adding(), dataset, Tokens(), sampler, seed=3, epoch=5, zone_on=zone_on)
        assert torch.equal(pools, expected) and pools.dtype == expected.dtype
        assert summary.items() <= report.items() and bool(dataset.relevant) == ("false_negatives" in report)


@given(seed=st.integers(0, 999), rows=st.integers(1, 30), columns=st.integers(1, 80), ties=st.booleans(), guard=st.sampled_from([0.0, 0.5, 3.0]))
def test_a_report_by_portions_is_that_of_the_slow_form(seed, rows, columns, ties, guard):
    draw = generator(seed, "report")
    scores, target = torch.randn(rows, columns, generator=draw), torch.randint(0, columns, (rows,), generator=draw)
    if ties: scores = (4 * scores).round() / 4
    valid, right = torch.rand(2, rows, columns, generator=draw) < torch.rand(1, generator=draw)
    sampler = MidZone(guard=guard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "PORTION", 200)
        _, report = mine_block(sampler, scores, target, valid, generator(0), right=right)
    expected = slow_mining.report(sampler, scores, target, valid, right)
    assert report.keys() == expected.keys()
    for name, values in expected.items(): assert_close(report[name], values, rtol=0, atol=0, equal_nan=True)


def test_candidates_are_encoded_once_and_queries_once():
    encoded, asked, method = [], [], Adding()
    target_of, query_of = method.encode_target, method.encode_query
    method.encode_target = lambda tokens: encoded.append(len(tokens)) or target_of(tokens)
    method.encode_query = lambda reference, texts: asked.append(len(texts)) or query_of(reference, texts)
    dataset = two_galleries()
    refresh(method, dataset, Tokens(), MidZone(), 0, 0, zone_on="target")
    assert encoded == [40, 25] and sum(asked) == 19
    encoded.clear()
    only = dataclasses.replace(dataset, triplets=[t for t in dataset.triplets if t.category == "shirt"])
    refresh(method, only, Tokens(), MidZone(), 0, 0)
    assert encoded == [25], "a gallery that nobody searches is not encoded"


@pytest.mark.parametrize("sampler", [MidZone(), MidZone("absolute"), Random(), Hardest(), ScoreDropBand()], ids=lambda s: type(s).__name__)
def test_a_block_makes_nothing_of_the_size_of_its_scores(sampler, monkeypatch):
    monkeypatch.setattr(sampler_module, "PORTION", 2**13)
    scores, target, valid = torch.randn(200, 1000, generator=generator(0, "memory")), torch.arange(200), torch.ones(200, 1000, dtype=torch.bool)
    with Largest() as largest: mine_block(sampler, scores, target, valid, generator(0), right=~valid)
    assert largest.numbers <= max(2 * 2**13, 200 * mining.POOL), "a portion, or the pools"


# ---- in shares

@pytest.mark.parametrize("of", [1, 2, 3, 9])
@pytest.mark.parametrize("sampler", [MidZone(), MidZone("meanstd", -1.0, 1.0), ScoreDropBand()], ids=lambda s: type(s).__name__)
def test_a_refresh_in_shares_is_that_of_one_process(monkeypatch, of, sampler):
    monkeypatch.setattr(mining, "BLOCK", 4)
    dataset, method, tokens = knowing(two_galleries()), Adding(), Tokens()
    pools, report = refresh(method, dataset, tokens, sampler, 3, 5)
    shares = [mine(method, dataset, tokens, sampler, 3, 5, share=(k, of)) for k in range(of)]
    found = [refresh(method, dataset, tokens, sampler, 3, 5, share=(k, of), gather=lambda own, k=k: [part for share in shares[::-1] for part in share]) for k in range(of)]
    for other, told in found:
        assert torch.equal(other, pools) and {**told, "seconds": 0} == {**report, "seconds": 0}
    assert sum(len(share) for share in shares) == len(blocks_of(dataset)) == 6


def test_a_pool_is_renewed_in_shares(monkeypatch):
    monkeypatch.setattr(mining, "BLOCK", 4)
    alone, shared = pool_of(two_galleries()), NegativePool(two_galleries(), Tokens(), MidZone(), seed=0, warmup=2, every=3)
    rest = mine(Adding(), two_galleries(), Tokens(), MidZone(), 0, 2, share=(1, 2))
    report = shared.renew(Adding(), 2, share=(0, 2), gather=lambda own: own + rest)
    assert torch.equal(alone.pools, shared.pools) and shared.since == 2 and report["kept"] is None


def test_what_is_handed_in_must_be_every_block_once():
    dataset, tokens = two_galleries(), Tokens()
    first, second = mine(Adding(), dataset, tokens, MidZone(), 0, 0)
    for wrong in ([first], [first, second, first], []):
        with pytest.raises(ValueError, match="a refresh has the blocks 0 to 1, but those handed in are"): merged(wrong, dataset)
    for share in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="must be .k, n. with k from 0 to n - 1"): mine(Adding(), dataset, tokens, MidZone(), 0, 0, share=share)


# ---- what is never a candidate

def test_fashioniq_draws_from_targets_the_others_from_the_gallery():
    fashioniq, garments = two_galleries("fashioniq"), two_galleries("garments")
    assert candidate_ids(garments) == garments.galleries
    assert candidate_ids(fashioniq) == {"dress": sorted(f"d{3 * i + 1}" for i in range(13)), "shirt": sorted(f"s{24 - i}" for i in range(6))}


@pytest.mark.parametrize("name", ["garments", "fashioniq", "cirr"])
def test_known_answers_and_on_cirr_the_reference_are_no_candidates(name):
    ids = list("abcdef")
    dataset = CIRDataset(name, "train", [query("a", "b", positives="c"), query("d", "e")], {"all": ids}, Path("nowhere"))
    valid = valid_candidates(dataset, dataset.triplets, {image: i for i, image in enumerate(ids)})
    left_out = [{image for image, free in zip(ids, row) if not free} for row in valid.tolist()]
    assert left_out == ([set("abc"), set("de")] if name == "cirr" else [set("bc"), set("e")])


def with_files(folder, contents):
    for name, content in contents.items(): (folder / f"{name}.png").write_bytes(content)
    return CIRDataset("garments", "train", [query("a", "b")], {"dress": list(contents)}, folder, {name: folder / f"{name}.png" for name in contents})


def test_an_answer_under_another_name_is_no_candidate(tmp_path):
    dataset = with_files(tmp_path, {"a": b"one", "b": b"two", "c": b"six", "d": b"two", "e": b"longer", "f": b"one"})
    same = same_pictures(dataset, dataset.gallery)
    assert same == {"a": {"a", "f"}, "f": {"a", "f"}, "b": {"b", "d"}, "d": {"b", "d"}}
    position = {name: i for i, name in enumerate("abcdef")}
    assert valid_candidates(dataset, dataset.triplets, position, same).tolist() == [[True, False, True, False, True, True]]
    cirr = dataclasses.replace(dataset, name="cirr")
    assert valid_candidates(cirr, cirr.triplets, position, same).tolist() == [[False, False, True, False, True, False]]
    pools, _ = refresh(Adding(), dataset, Tokens(), Random(), 0, 0)
    assert {i for i in pools[0].tolist() if i >= 0} == {0, 2, 4, 5}


# ---- between two refreshes

def pool_of(dataset, **options):
    pool = NegativePool(dataset, Tokens(), **dict(sampler=MidZone(), seed=0, warmup=2, every=3) | options)
    pool.renew(Adding(), epoch=2)
    return pool


def test_when_a_refresh_is_due():
    due = lambda warmup, every: [epoch for epoch in range(12) if NegativePool(two_galleries(), None, MidZone(), 0, warmup, every).due(epoch)]
    assert due(2, 3) == [2, 5, 8, 11] and due(2, 0) == [2] and due(0, 1) == list(range(12)) and due(20, 1) == []


@pytest.mark.parametrize("count", [1, 3])
def test_rounds_are_permutations_and_each_a_fresh_one(count):
    dataset = two_galleries()
    pool = pool_of(dataset, count=count)
    for row, triplet in enumerate(dataset.triplets):
        size = int((pool.pools[row] >= 0).sum())
        drawn = [name for epoch in range(2, 2 + 4 * size) for name in pool.draw([row], epoch)[0]]
        rounds = [tuple(drawn[i:i + size]) for i in range(0, 3 * size, size)]
        assert {frozenset(names) for names in rounds} == {frozenset(dataset.galleries[triplet.category][i] for i in pool.pools[row, :size].tolist())}
        assert len(rounds[0]) == len(set(rounds[0])) == size and (size < 5 or len(set(rounds)) == 3)
        assert rounds[0] == tuple(dataset.galleries[triplet.category][i] for i in pool.pools[row, :size].tolist())


def test_draws_depend_on_query_and_epoch_alone():
    pool = pool_of(two_galleries())
    for epoch in (2, 9, 40):
        together = pool.draw([7, 3, 11], epoch)
        assert together == [pool.draw([row], epoch)[0] for row in (7, 3, 11)] and pool.draw([11, 7], epoch) == [together[2], together[0]]


def test_a_pool_of_one_gives_that_one_and_an_empty_one_nothing():
    dataset = two_galleries()
    alone = pool_of(dataset, sampler=Hardest())
    assert [alone.draw([0], epoch) for epoch in (2, 3, 99)] == [alone.draw([0], 2)] * 3
    small = CIRDataset("garments", "train", [query("a", "b"), query("b", "a", positives="c"), query("c", "a", positives="bc")], {"dress": list("abc")}, Path("nowhere"))
    pool = NegativePool(small, Tokens(), Random(), seed=0, warmup=0, every=1)
    report = pool.renew(Adding(), epoch=0)
    assert report["rungs"] == {"-1": 1, "0": 2}
    assert [pool.draw([row], 5)[0][0] for row in range(3)][1:] == ["b", None] and pool.draw([0], 0)[0][0] in "ac"


def test_a_pool_goes_on_from_a_checkpoint_without_another_refresh(tmp_path):
    dataset = two_galleries()
    pool, model = pool_of(dataset), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(tmp_path / "resume.safetensors", model, optimizer, 4, pool)
    resumed = NegativePool(dataset, Tokens(), MidZone(), seed=0, warmup=2, every=3)
    assert load_checkpoint(tmp_path / "resume.safetensors", model, optimizer, resumed) == 4
    rows = list(range(len(dataset.triplets)))
    assert resumed.since == 2 and not resumed.due(4)
    for epoch in (4, 30): assert resumed.draw(rows, epoch) == pool.draw(rows, epoch)


# ---- negatives from the batch

@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_in_batch_negatives_are_the_next_other_answer(groups):
    data = SimpleNamespace(groups=torch.tensor([9, *groups]), triplets=[SimpleNamespace(target=f"t{i}") for i in range(len(groups) + 1)])
    rows = list(range(len(groups), 0, -1))  # in an order of their own; row 0 is not in the batch
    for i, (row, name) in enumerate(zip(rows, other_targets(data, rows), strict=True)):
        whole = [*range(row + 1, len(groups) + 1), *range(row)]
        following = [other for other in rows[i + 1:] + rows[:i] + whole if data.groups[other] != data.groups[row]]
        assert name == f"t{following[0]}"  # a batch of one answer borrows from the whole set, never its own target


def test_tokens_of_the_negatives():
    dataset, tokens, rows = two_galleries(), Tokens(), [0, 4, 9]
    config = train_config(dict(method="dqe_cir", warmup_epochs=2, negatives="in_batch", **PAIRWISE))
    data = TrainingSet(dataset, tokens)
    assert negative_tokens(data, rows, 1, config) is None
    assert_close(negative_tokens(data, rows, 2, config), tokens[other_targets(data, rows)].unsqueeze(1))
    data.negatives = pool_of(dataset, count=2)
    data.negatives.pools[4] = -1  # nothing to draw: the batch lends its negative
    expected = [names if row != 4 else [other_targets(data, rows)[1]] * 2 for row, names in zip(rows, data.negatives.draw(rows, 3))]
    assert_close(negative_tokens(data, rows, 3, config), torch.stack([tokens[names] for names in expected]))
    assert negative_tokens(data, rows, 3, dataclasses.replace(config, method="info_nce")) is None
