"Losses against plain loops and numeric gradients; the published systems' losses against reference values and gradients."
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from helpers import unit

from dqe_cir.core import generator
from dqe_cir.losses import info_nce, margin, pairwise_kl


def loop_info_nce(scores, target, smoothing):
    "Row by row: the labels of the columns that take part against the logarithms of their softmax."
    losses = []
    for i, row in enumerate(scores):
        taking_part = [j for j in range(len(row)) if j == i or target[j] != target[i]]
        total = math.log(sum(math.exp(row[j]) for j in taking_part))
        label = {j: smoothing / len(taking_part) + (1 - smoothing if j == i else 0) for j in taking_part}
        losses.append(-sum(label[j] * (row[j] - total) for j in taking_part))
    return torch.tensor(losses)


batches = st.lists(st.integers(0, 4), min_size=1, max_size=9)
smoothings = st.sampled_from([0.0, 0.1, 0.9])


def scores_of(target, seed, scale=5): return scale * torch.randn(len(target), len(target), generator=generator(seed, "losses"), dtype=torch.float64)


@given(batches, smoothings, st.integers(0, 99))
def test_info_nce_is_the_loop(target, smoothing, seed):
    scores = scores_of(target, seed)
    assert_close(info_nce(scores, torch.tensor(target), smoothing), loop_info_nce(scores.tolist(), target, smoothing).double(), rtol=1e-6, atol=1e-6)


@given(st.integers(1, 9), smoothings, st.integers(0, 99))
def test_info_nce_is_cross_entropy_without_duplicates(size, smoothing, seed):
    scores = scores_of([0] * size, seed)
    expected = F.cross_entropy(scores, torch.arange(size), reduction="none", label_smoothing=smoothing)
    assert_close(info_nce(scores, label_smoothing=smoothing), expected)
    assert_close(info_nce(scores, 100 - torch.arange(size), smoothing), expected)  # ids all differ; which they are does not matter


@given(batches, smoothings, st.integers(0, 99))
def test_laws_of_the_values(target, smoothing, seed):
    scores, target = scores_of(target, seed), torch.tensor(target)
    values = info_nce(scores, target, smoothing)
    assert values.shape == target.shape and (values >= -1e-12).all()
    assert_close(info_nce(scores + 7 * torch.arange(len(target)).double()[:, None], target, smoothing), values)  # a row may be shifted
    order = torch.randperm(len(target), generator=generator(seed, "order"))
    assert_close(info_nce(scores[order][:, order], target[order], smoothing), values[order])  # the batch has no order
    left_out = (target[:, None] == target) & ~torch.eye(len(target), dtype=torch.bool)
    assert_close(info_nce(scores.masked_fill(left_out, 1e6), target, smoothing), values)  # what was left out is not looked at


@given(batches, smoothings, st.integers(0, 99))
def test_gradients(target, smoothing, seed):
    target = torch.tensor(target)
    scores = scores_of(target, seed, scale=1).requires_grad_()
    torch.autograd.gradcheck(lambda s: info_nce(s, target, smoothing), scores)
    info_nce(scores, target, smoothing).sum().backward()
    assert_close(scores.grad.sum(1), torch.zeros(len(target), dtype=torch.float64))
    left_out = (target[:, None] == target) & ~torch.eye(len(target), dtype=torch.bool)
    assert scores.grad[left_out].eq(0).all()
    if smoothing == 0: assert (scores.grad.diagonal() <= 0).all() and (scores.grad - scores.grad.diagonal().diag() >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_scores_are_widened(dtype):
    scores = (100 * torch.rand(6, 6, generator=generator(0, "types"))).to(dtype)
    assert info_nce(scores).dtype == torch.float32
    assert_close(info_nce(scores), info_nce(scores.double()).float())


@pytest.mark.parametrize("shape", [(0, 0), (3,), (3, 2), (2, 2, 2)])
def test_scores_must_have_a_column_per_row(shape):
    with pytest.raises(ValueError, match=r"scores must be \(B,B\)"): info_nce(torch.zeros(shape))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_is_a_share(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"): info_nce(torch.zeros(2, 2), label_smoothing=smoothing)


@pytest.mark.parametrize("columns, likeness, message", [
    (4, (4, 3), r"likeness must be \(4, 4\) like scores, not \(4, 3\)"), (4, (4,), r"likeness must be \(4, 4\) like scores, not \(4,\)"),
    (7, (4, 4), r"likeness \(4, 4\) says nothing about the 3 further columns of scores \(4, 7\): leave out the columns or likeness"),
    (7, (4, 7), r"likeness \(4, 7\) says nothing about the 3 further columns of scores \(4, 7\)")])
def test_likeness_is_for_the_targets_of_the_batch_alone(columns, likeness, message):
    with pytest.raises(ValueError, match=message): info_nce(torch.zeros(4, columns), label_smoothing=0.1, likeness=torch.zeros(likeness))


@pytest.mark.parametrize("target", [(3,), (5,), (4, 1), ()])
def test_targets_are_one_per_row(target):
    with pytest.raises(ValueError, match="target must hold 4 ids, one per row of scores, not"): info_nce(torch.zeros(4, 4), torch.zeros(target))


@given(batches, st.integers(0, 99))
def test_likeness_moves_the_share_among_the_others_and_nothing_else(target, seed):
    scores, likeness = scores_of(target, seed), scores_of(target, seed + 1)
    target = torch.tensor(target)
    even, liked = (info_nce(scores, target, 0.3, like) for like in (None, likeness))
    assert_close(info_nce(scores, target, 0.0, likeness), info_nce(scores, target))
    assert_close(info_nce(scores, target, 0.3, torch.zeros_like(likeness)), even, rtol=1e-5, atol=1e-5)
    losses = []
    for i, row in enumerate(scores):  # row by row
        others = [j for j in range(len(row)) if target[j] != target[i]]
        log_p = row - row[[i, *others]].logsumexp(0)
        weights = likeness[i, others].softmax(0) * len(others) / (1 + len(others))
        losses.append(-(1 - 0.3 + 0.3 / (1 + len(others))) * log_p[i] - 0.3 * (weights * log_p[others]).sum())
    assert_close(liked, torch.stack(losses), rtol=1e-5, atol=1e-5)


# ---- pairs

pairs = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))


def pair_scores(size, count, seed):
    draw = lambda *shape: 3 * torch.randn(shape, generator=generator(seed, "pairs", *shape), dtype=torch.float64)
    return draw(size), draw(size, count)


@given(pairs, st.sampled_from([0.0, 0.1, 0.4]))
def test_pairwise_kl_is_the_loop(case, smoothing):
    positive, negative = pair_scores(*case)
    expected = []
    for p, others in zip(positive.tolist(), negative.tolist()):
        values = []
        for n in others:
            share = 1 / (1 + math.exp(n - p))
            wanted, found = (1 - smoothing, smoothing), (share, 1 - share)
            values.append(sum(w * math.log(w / f) for w, f in zip(wanted, found) if w))
        expected.append(sum(values) / len(values))
    assert_close(pairwise_kl(positive, negative, smoothing), torch.tensor(expected, dtype=torch.float64))
    if negative.shape[1] == 1: assert_close(pairwise_kl(positive, negative[:, 0], smoothing), pairwise_kl(positive, negative, smoothing))


@given(pairs, st.sampled_from([0.0, 0.1]))
def test_pairwise_kl_gradient(case, smoothing):
    positive, negative = (scores.requires_grad_() for scores in pair_scores(*case))
    torch.autograd.gradcheck(lambda p, n: pairwise_kl(p, n, smoothing), (positive, negative))
    pairwise_kl(positive, negative).sum().backward()
    assert (positive.grad < 0).all() and (negative.grad > 0).all()
    assert_close(positive.grad, -negative.grad.sum(1))


@given(pairs, st.floats(0.0, 2.0), st.integers(0, 2))
def test_margin_is_the_loop(case, wanted, kind):
    positive, negative = pair_scores(*case)
    active = {0: None, 1: torch.ones(len(positive), dtype=torch.bool), 2: positive > 0}[kind]
    short = [sum(max(0.0, wanted - p + n) for n in others) / len(others) for p, others in zip(positive.tolist(), negative.tolist())]
    counted = [s for s, on in zip(short, [True] * len(short) if active is None else active.tolist()) if on]
    values = margin(positive, negative, wanted, active)
    assert values.shape == positive.shape
    assert values.mean().item() == pytest.approx(sum(counted) / max(1, len(counted)))


def test_no_active_row_gives_exactly_zero_and_a_zero_gradient():
    positive, negative = (scores.requires_grad_() for scores in pair_scores(4, 2, 0))
    loss = margin(positive, negative, 5.0, torch.zeros(4, dtype=torch.bool)).mean()
    loss.backward()
    assert loss.item() == 0.0 and positive.grad.eq(0).all() and negative.grad.eq(0).all()


@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_pairs_stay_finite_at_extreme_scores(gap):
    positive = torch.tensor([gap], requires_grad=True)
    loss = pairwise_kl(positive, torch.zeros(1))
    loss.backward()
    assert_close(loss.detach(), torch.tensor([max(0.0, -gap)]))
    assert_close(positive.grad, torch.tensor([-1.0 if gap < 0 else 0.0]))


@pytest.mark.parametrize("positive, negative", [((4,), (3,)), ((4,), (3, 4)), ((4,), (1,)), ((4, 1), (4,)), ((), (4,)), ((4,), (4, 2, 1)), ((4,), ()), ((4,), (4, 0))])
def test_pairs_of_other_shapes_are_refused_with_both(positive, negative):
    message = re.escape(f"positive must be (B,) and negative (B,) or (B,K) with the same B, not {positive} and {negative}")
    for loss in (pairwise_kl, lambda p, n: margin(p, n, 0.1)):
        with pytest.raises(ValueError, match=message): loss(torch.zeros(positive), torch.zeros(negative))


@pytest.mark.parametrize("active", [(1,), (3,), (4, 1)])
def test_active_says_something_about_every_row(active):
    message = re.escape(f"active must be (4,) like positive, not {active}")
    with pytest.raises(ValueError, match=message): margin(torch.zeros(4), torch.zeros(4), 0.1, torch.ones(active, dtype=torch.bool))


# ---- reference values and gradients

@pytest.fixture(scope="module")
def reference(golden):
    arrays, values = np.load(golden("losses.npz")), json.loads(golden("losses.json").read_text())["values"]
    return lambda name: ({key.removeprefix(f"{name}/"): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(f"{name}/")}, values[name])


def check(reference, name, compute):
    "Value and gradients of every input, for a loss computed from the stored inputs."
    stored, expected = reference(name)
    inputs = {key.removeprefix("in/"): value.clone().requires_grad_() for key, value in stored.items() if key.startswith("in/")}
    loss = compute(**inputs)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5)
    for key, value in inputs.items(): assert_close(value.grad, stored[f"grad/{key}"], rtol=1e-4, atol=1e-4)


def test_clip4cir_finetuning(reference):
    check(reference, "clip4cir_finetune_sum_x100",
          lambda reference, text, target: info_nce(100 * unit(reference + text) @ unit(target).T).mean())


def test_cosmo(reference):
    check(reference, "cosmo_batch_classification_raw", lambda query, target: info_nce(query @ target.T).mean())
    check(reference, "cosmo_batch_classification_normscale4", lambda query, target: info_nce(4 * unit(query) @ (4 * unit(target)).T).mean())


def both_directions(query, target, temperature):
    scores = query @ target.T / temperature
    return info_nce(scores).mean() + info_nce(scores.T).mean()


def test_covr(reference):
    check(reference, "covr_cross_entropy_temp0.07", lambda query, target: both_directions(query, target, 0.07) / 2)
    for temperature in (0.07, 0.5):  # without its weights on hard negatives, HN-NCE is InfoNCE in both directions
        check(reference, f"covr_hn_nce_alpha1_beta0.0_temp{temperature}", lambda query, target: both_directions(query, target, temperature))


def test_qure_pairs(reference):
    for name in ("qure_pairwise_kl", "qure_pairwise_kl_extreme"):
        check(reference, name, lambda scores: pairwise_kl(*scores.unbind(1)).mean())
    assert reference("qure_pairwise_kl")[1]["equals_mean_softplus_neg_minus_pos"] == reference("qure_pairwise_kl")[1]["loss"]


@pytest.mark.parametrize("data, share", [("fashioniq", 0.5), ("cirr", 0.1)])
def test_biblip4cir_weighs_the_way_back(reference, data, share):
    stored, expected = reference(f"biblip4cir_combiner_{data}")
    total = info_nce(stored["out/logits"]).mean() + share * info_nce(stored["out/logits_r"]).mean()
    assert total.item() == pytest.approx(expected["loss"], abs=1e-4)


@pytest.mark.parametrize("name, logits, part", [("clip4cir_combiner", "out/logits", "loss"), ("biblip4cir_combiner_fashioniq", "out/logits", "loss_forward"),
    ("biblip4cir_combiner_fashioniq", "out/logits_r", "loss_reversed"), ("biblip4cir_combiner_cirr", "out/logits", "loss_forward"),
    ("biblip4cir_combiner_cirr", "out/logits_r", "loss_reversed")])
def test_combiners_from_their_logits(reference, name, logits, part):
    stored, expected = reference(name)
    assert info_nce(stored[logits]).mean().item() == pytest.approx(expected[part], abs=1e-4)
