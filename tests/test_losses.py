"Losses against plain loops and numeric gradients; the published systems' losses against reference values and gradients."
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.testing import assert_close

from dqe_cir.core import generator
from dqe_cir.losses import info_nce


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


@pytest.mark.parametrize("shape", [(0, 0), (3,), (2, 3), (2, 2, 2)])
def test_scores_must_be_square(shape):
    with pytest.raises(ValueError, match=r"scores must be \(B,B\)"): info_nce(torch.zeros(shape))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_is_a_share(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"): info_nce(torch.zeros(2, 2), label_smoothing=smoothing)


# ---- reference values and gradients

@pytest.fixture(scope="module")
def reference(golden):
    arrays, values = np.load(golden("losses.npz")), json.loads(golden("losses.json").read_text())["values"]
    return lambda name: ({key.removeprefix(f"{name}/"): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(f"{name}/")}, values[name])


def unit(x): return normalize(x, dim=1)


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


@pytest.mark.parametrize("name, logits, part", [("clip4cir_combiner", "out/logits", "loss"), ("biblip4cir_combiner_fashioniq", "out/logits", "loss_forward"),
    ("biblip4cir_combiner_fashioniq", "out/logits_r", "loss_reversed"), ("biblip4cir_combiner_cirr", "out/logits", "loss_forward"),
    ("biblip4cir_combiner_cirr", "out/logits_r", "loss_reversed")])
def test_combiners_from_their_logits(reference, name, logits, part):
    stored, expected = reference(name)
    assert info_nce(stored[logits]).mean().item() == pytest.approx(expected[part], abs=1e-4)
