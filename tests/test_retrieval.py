"Scores, ranks and best images against plain loops, over shapes, types and ties; FashionIQ and CIRR against reference results."
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.testing import assert_close

from helpers import unit

from dqe_cir.core import generator
from dqe_cir.metrics import recall_at_k, subset_ranks
from dqe_cir.retrieval import best_of_stream, block_shape, ranks, similarity, ties, top_k

sizes = st.integers(1, 9)


# ---- plain loops, written from the definitions

def loop_similarity(query, gallery, reduce):
    if gallery.dim() == 2: gallery = gallery[:, None]
    choose = max if reduce == "max" else lambda values: sum(values) / len(values)
    return torch.tensor([[choose([sum(a * b for a, b in zip(q, token)) for token in image]) for image in gallery.tolist()]
                         for q in query.tolist()])


def loop_order(row, exclude):
    "Gallery positions, best first, ties by lower position, without the excluded one."
    return sorted((j for j in range(len(row)) if j != exclude), key=lambda j: (-row[j], j))


def loop_rank(row, target, exclude):
    return 1 + sum(score > row[target] for j, score in enumerate(row) if j != exclude)


# ---- similarity

@given(queries=sizes, images=sizes, tokens=st.integers(0, 5), dimension=sizes, block_bytes=st.sampled_from([1, 40, 300, None]),
       reduce=st.sampled_from(["max", "mean"]), seed=st.integers(0, 99))
def test_similarity_is_the_loop(queries, images, tokens, dimension, block_bytes, reduce, seed):
    g = generator(seed, "similarity")
    query = torch.randn(queries, dimension, generator=g)
    gallery = torch.randn(images, *[tokens] * (tokens > 0), dimension, generator=g)
    assert_close(similarity(query, gallery, reduce, block_bytes), loop_similarity(query, gallery, reduce), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows, columns", [(512, 64), (37, 7)])
def test_chunked_equals_full(rows, columns):
    g = generator(0, "chunked")
    query, gallery = (normalize(torch.randn(*shape, generator=g), dim=-1) for shape in [(300, 32), (501, 8, 32)])
    full = torch.einsum("qd,ntd->qnt", query, gallery).amax(-1)
    assert_close(similarity(query, gallery, block_bytes=4 * 8 * rows * columns), full, rtol=0, atol=1e-6)


@given(queries=st.integers(1, 5000), tokens=st.integers(1, 300), block_bytes=st.integers(1, 2**27))
def test_block_keeps_its_budget(queries, tokens, block_bytes):
    rows, columns = block_shape(queries, tokens, block_bytes)
    assert 1 <= rows <= min(queries, 512) and columns >= 1
    assert rows * columns * tokens * 4 <= max(block_bytes, tokens * 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [(), (3,)])
def test_narrow_types_are_widened_before_the_product(dtype, tokens):
    g = generator(0, "types")
    query, gallery = torch.randn(4, 64, generator=g).to(dtype), torch.randn(5, *tokens, 64, generator=g).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for reduce in ("max", "mean"):
        scores = similarity(query, gallery, reduce)
        assert scores.dtype == wide
        assert_close(scores, similarity(query.to(wide), gallery.to(wide), reduce))
    assert similarity(query, gallery.float()).dtype == wide  # a half-precision gallery may meet float32 queries
    with torch.autocast("cpu", torch.bfloat16): scores = similarity(query, gallery)
    assert_close(scores, similarity(query, gallery))


def test_a_strided_gallery_is_scored_as_it_reads():
    g = generator(0, "strides")
    query, stored = torch.randn(3, 4, generator=g), torch.randn(5, 4, 6, generator=g)
    assert_close(similarity(query, stored.transpose(1, 2)), similarity(query, stored.transpose(1, 2).contiguous()))
    assert_close(similarity(query, stored[::2].transpose(1, 2)), similarity(query, stored.transpose(1, 2))[:, ::2])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 16_400])
def test_a_broken_gallery_row_is_named_by_its_own_number(broken, position):
    gallery = torch.zeros(16_500, 1)
    gallery[position] = broken
    for call in (lambda: similarity(torch.ones(2, 1), gallery), lambda: top_k(torch.ones(2, 1), gallery, 3)):
        with pytest.raises(ValueError, match=rf"gallery row {position} is not finite"): call()


@pytest.mark.parametrize("query, gallery", [((2, 3), (0, 3)), ((2, 3), (4, 0, 3)), ((2, 3), (4, 5)), ((3,), (4, 3)), ((2, 3), (4, 1, 1, 3)), ((2, 0), (4, 0))])
def test_wrong_shapes_are_named(query, gallery):
    for call in (similarity, lambda q, g: top_k(q, g, 1)):
        with pytest.raises(ValueError, match=r"\(.*\d"): call(torch.zeros(query), torch.zeros(gallery))


# ---- ranks and ties

scored_queries = st.integers(2, 12).flatmap(lambda images: st.lists(
    st.tuples(st.lists(st.integers(-2, 2), min_size=images, max_size=images), st.permutations(range(images))), min_size=1, max_size=6))


@given(scored_queries, st.booleans())
def test_ranks_and_ties_are_the_loop(rows, excluding):
    scores = torch.tensor([row for row, _ in rows], dtype=torch.float32)
    target, exclude = (torch.tensor([order[i] for _, order in rows]) for i in (0, 1))
    exclude = exclude if excluding else None
    removed = exclude.tolist() if excluding else [None] * len(rows)
    best = [loop_rank(row, t, r) for row, t, r in zip(scores.tolist(), target.tolist(), removed)]
    worst = [sum(s >= row[t] for j, s in enumerate(row) if j != r) for row, t, r in zip(scores.tolist(), target.tolist(), removed)]
    assert ranks(scores, target, exclude).tolist() == best
    assert (ranks(scores, target, exclude) + ties(scores, target, exclude)).tolist() == worst


@given(scored_queries, st.randoms(use_true_random=False))
def test_ranks_do_not_depend_on_the_order_of_the_gallery(rows, random):
    scores = torch.tensor([row for row, _ in rows], dtype=torch.float32)
    target, exclude = (torch.tensor([order[i] for _, order in rows]) for i in (0, 1))
    moved = torch.tensor(random.sample(range(scores.shape[1]), scores.shape[1]))
    back = moved.argsort()
    assert_close(ranks(scores[:, moved], back[target], back[exclude]), ranks(scores, target, exclude))


@pytest.mark.parametrize("wrong, message", [([0, -1], r"target\[1\] is -1, outside the gallery 0\.\.2"), ([3, 0], r"target\[0\] is 3, outside"),
                                            ([0.0, 1.0], "target must hold 2 integers"), ([True, False], "target must hold 2 integers"), ([0], "not \\(1,\\)")])
def test_targets_must_be_places_in_the_gallery(wrong, message):
    for call in (ranks, ties):
        with pytest.raises(ValueError, match=message): call(torch.zeros(2, 3), torch.tensor(wrong))
        with pytest.raises(ValueError, match=message.replace("target", "exclude")): call(torch.zeros(2, 3), torch.tensor([2, 2]), torch.tensor(wrong))


def test_ranks_take_infinite_scores_and_no_queries():
    scores = torch.tensor([[float("-inf"), 0.0, float("inf")]])
    assert [ranks(scores, [i]).item() for i in range(3)] == [3, 2, 1]
    assert ranks(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).shape == (0,)


# ---- top_k

@given(images=st.integers(2, 30), queries=sizes, k=st.integers(1, 29), stretch=st.integers(1, 40), excluding=st.booleans(), seed=st.integers(0, 99))
def test_top_k_is_the_loop_with_ties_by_lower_index(images, queries, k, stretch, excluding, seed):
    g = generator(seed, "top_k")
    query, gallery = (torch.randint(-1, 2, shape, generator=g).float() for shape in [(queries, 2), (images, 2, 2)])
    exclude = torch.randint(images, (queries,), generator=g) if excluding else None
    k = min(k, images - excluding)
    rows = loop_similarity(query, gallery, "max").tolist()
    expected = [loop_order(row, r)[:k] for row, r in zip(rows, exclude.tolist() if excluding else [None] * queries)]
    values, indices = top_k(query, gallery, k, exclude)
    assert indices.tolist() == expected
    assert_close(values, torch.tensor([[row[j] for j in best] for row, best in zip(rows, expected)]))
    assert_close(best_of_stream(query, gallery, k, exclude, "max", stretch), (values, indices), rtol=0, atol=0)


def test_top_k_over_several_blocks_of_queries_and_a_long_gallery():
    g = generator(0, "long")
    query, gallery = torch.randint(-3, 4, (520, 3), generator=g).half(), torch.randint(-3, 4, (20_000, 3), generator=g).half()
    exclude = torch.randint(20_000, (520,), generator=g)
    values, indices = top_k(query, gallery, 5, exclude)
    scores = similarity(query, gallery).scatter(1, exclude[:, None], -torch.inf).sort(dim=1, descending=True, stable=True)
    assert_close(indices, scores.indices[:, :5])
    assert_close(values, scores.values[:, :5])


@pytest.mark.parametrize("k, exclude", [(0, None), (4, None), (3, [0, 0])])
def test_top_k_refuses_what_cannot_be_ranked(k, exclude):
    with pytest.raises(ValueError, match=f"k={k}, but"): top_k(torch.ones(2, 2), torch.ones(3, 2), k, exclude)
    with pytest.raises(ValueError, match=r"exclude\[1\] is 3, outside"): top_k(torch.ones(2, 2), torch.ones(3, 2), 1, [0, 3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees_with_cpu():
    g = generator(0, "gpu")
    query, gallery = (torch.randint(-3, 4, shape, generator=g).float() for shape in [(600, 8), (900, 4, 8)])
    target, exclude = torch.arange(600), torch.arange(600) + 1
    scores = similarity(query.cuda(), gallery)  # the gallery may stay on the host
    assert scores.is_cuda and similarity(query.cuda().half(), gallery.cuda().half()).dtype == torch.float32
    assert_close(scores.cpu(), similarity(query, gallery))
    assert_close(ranks(scores, target, exclude).cpu(), ranks(scores.cpu(), target, exclude))
    assert_close([x.cpu() for x in top_k(query.cuda(), gallery.cuda(), 50, exclude)], list(top_k(query, gallery, 50, exclude)))


# ---- reference results

def load(golden, name):
    return np.load(golden(f"{name}.npz")), json.loads(golden(f"{name}.json").read_text())


def ids(array): return torch.from_numpy(array).long()


CATEGORIES = ("dress", "shirt", "toptee")
PROTOCOLS = [("original_split", False, False), ("union_split", True, False), ("original_split_without_reference", False, True),
             ("union_split_without_reference", True, True)]


def hits(ranks, k): return int((ranks <= k).sum())


@pytest.mark.parametrize("stored", ["fashioniq_dress", "fashioniq_metrics"])
@pytest.mark.parametrize("protocol, union, without_reference", PROTOCOLS)
def test_fashioniq_hit_counts(golden, stored, protocol, union, without_reference):
    arrays, expected = load(golden, stored)
    recalls = []
    for category in [name for name in CATEGORIES if name in expected]:
        gallery, reference, target = unit(arrays[f"{category}_gallery"]), ids(arrays[f"{category}_ref"]), ids(arrays[f"{category}_target"])
        if union:
            chosen = ids(arrays[f"{category}_union"])
            place = torch.full((len(gallery),), -1).scatter(0, chosen, torch.arange(len(chosen)))
            gallery, reference, target = gallery[chosen], place[reference], place[target]
        found = ranks(similarity(unit(arrays[f"{category}_query"]), gallery), target, reference if without_reference else None)
        for k in (1, 10, 50):
            if (wanted := expected[category][protocol].get(f"recall_at{k}")) is None: continue
            assert hits(found, k) == round(wanted / 100 * len(found)), (category, k)
            if protocol == "original_split" and k > 1: assert hits(found, k) == expected[category][protocol][f"hits{k}"]
        recalls.append(recall_at_k(found, [10, 50]))
        for k in (10, 50): assert recalls[-1][k] == pytest.approx(expected[category][protocol][f"recall_at{k}"], abs=1e-4)
    if stored == "fashioniq_dress": return
    means = [sum(recall[k] for recall in recalls) / 3 for k in (10, 50)]
    average = expected["average"][protocol]
    assert [*means, sum(means) / 2] == pytest.approx([average["recall_at10"], average["recall_at50"], average["average_recall"]], abs=1e-4)


@pytest.mark.parametrize("stored, category", [("fashioniq_dress", "dress"), ("fashioniq_metrics", "toptee")])
def test_fashioniq_best_token(golden, stored, category):
    arrays, expected = load(golden, stored)
    scores = similarity(unit(arrays[f"{category}_query_single"]), unit(arrays[f"{category}_gallery_tokens"]), "max")
    found = ranks(scores, ids(arrays[f"{category}_target"]))
    for k in (10, 50):
        assert hits(found, k) == round(expected[category]["qure_max_over_tokens"][f"recall_at{k}"] / 100 * len(found))


@pytest.mark.parametrize("category", ["dress", "toptee"])
def test_fashioniq_mean_of_tokens_without_reference(golden, category):
    arrays, expected = load(golden, "fashioniq_metrics")
    query = unit(arrays[f"{category}_query_tokens"]).mean(1)  # unit tokens, averaged, not normalised again
    scores = similarity(query, unit(arrays[f"{category}_gallery_tokens"]), "mean")
    recalls = recall_at_k(ranks(scores, ids(arrays[f"{category}_target"]), ids(arrays[f"{category}_ref"])), [1, 5, 10, 50])
    wanted = expected[category]["covr_mean_tokens_without_reference"]
    assert {f"R{k}": round(value, 2) for k, value in recalls.items()} == {k: v for k, v in wanted.items() if k[0] == "R"}


def test_cirr_val_hit_counts(golden):
    arrays, expected = load(golden, "cirr_val")
    expected = expected["val"]
    scores = similarity(unit(arrays["val_query"]), unit(arrays["val_gallery"]))
    target, reference = ids(arrays["val_target"]), ids(arrays["val_reference"])
    found, within = ranks(scores, target, reference), subset_ranks(scores, target, ids(arrays["val_group"]), reference)
    counted = {f"recall_at{k}": hits(found, k) for k in (1, 5, 10, 50)} | {f"group_recall_at{k}": hits(within, k) for k in (1, 2, 3)}
    assert counted == expected["hits"]
    assert (recall_at_k(found, [5])[5] + recall_at_k(within, [1])[1]) / 2 == pytest.approx(expected["mean_r5_rsub1"], abs=1e-4)
    kept = recall_at_k(ranks(scores, target), [1, 5, 10, 50])
    assert [kept[k] for k in kept] == pytest.approx([expected["wrong_if_reference_is_kept"][f"recall_at{k}"] for k in kept], abs=1e-4)


def test_cirr_test_lists(golden):
    arrays, _ = load(golden, "cirr_metrics")
    reference = ids(arrays["test1_reference"])
    _, best = top_k(unit(arrays["test1_query"]), unit(arrays["test1_gallery"]), 50, exclude=reference)
    assert_close(best, ids(arrays["test1_top50"]))
