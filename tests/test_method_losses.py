"The losses of the published systems against loops, and against values and gradients of their own programs."
import json
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from helpers import unit

from dqe_cir.core import generator
from dqe_cir.losses import aleatoric, batch_aleatoric, batch_classification, hn_nce, pairwise_kl
from dqe_cir.losses import reversed_info_nce
from dqe_cir.methods.mgur import blurred
from dqe_cir.methods.parts import Combiner


# ---- loops

def loop_hn_nce(query, target, group, alpha, beta, temperature):
    "Number by number."
    size = len(query)
    score = [[query[i] @ target[j] / temperature for j in range(size)] for i in range(size)]
    def direction(s):
        losses = []
        for i in range(size):
            wrong = [j for j in range(size) if group[j] != group[i]]
            total = sum((beta * s[i][j]).exp() for j in wrong)
            weighted = sum(len(wrong) * (beta * s[i][j]).exp() / total * s[i][j].exp() for j in wrong)
            losses.append((alpha * s[i][i].exp() + weighted).log() - s[i][i])
        return torch.stack(losses)
    return direction(score) + direction([list(column) for column in zip(*score)])


def hn_nce_as_run(query, target, alpha, beta, temperature):
    "CoVR's arithmetic: plain exponentials, sums that hold the diagonal first, and the row term's sums laid along the columns."
    scores, diagonal = query @ target.T / temperature, torch.eye(len(query), dtype=torch.bool)
    hard = (beta * scores).exp()
    def denominator(axis):
        total = hard.sum(axis) - hard.diagonal()
        weight = torch.where(diagonal, alpha, (len(query) - 1) * hard / total)
        return (scores.exp() * weight).sum(axis).log()
    return denominator(1) + denominator(0) - 2 * scores.diagonal()


def loop_cross_entropy(query, target, group, scale=1.0):
    losses = []
    for i in range(len(query)):
        scores = {j: scale * (query[i] @ target[j]) for j in range(len(query)) if j == i or group[j] != group[i]}
        losses.append(sum(score.exp() for score in scores.values()).log() - scores[i])
    return torch.stack(losses)


def vectors(size, seed, count=3): return [unit(torch.randn(size, 5, generator=generator(seed, "losses", k), dtype=torch.float64)) for k in range(count)]


groups = st.lists(st.integers(0, 4), min_size=1, max_size=6)
seeds = st.integers(0, 99)


@given(groups, seeds, st.sampled_from([0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.3]))
def test_hn_nce_is_the_loop(group, seed, alpha, beta):
    query, target, _ = vectors(len(group), seed)
    assert_close(hn_nce(query, target, alpha, beta, 0.5, torch.tensor(group)), loop_hn_nce(query, target, group, alpha, beta, 0.5))


@given(groups, seeds, st.sampled_from([1.0, 16.0]))
def test_batch_classification_and_aleatoric_are_the_loop(group, seed, scale):
    query, target, blurred = vectors(len(group), seed)
    ids = torch.tensor(group)
    assert_close(batch_classification(query, target, ids, scale), loop_cross_entropy(query, target, group, scale))
    mean = blurred.sum() / blurred.numel()
    sigma = ((blurred - mean).square().sum() / (blurred.numel() - 1)).sqrt()
    expected = (loop_cross_entropy(query, blurred, group) * math.exp(-sigma) + sigma) / 2
    assert_close(aleatoric(query, blurred, ids), expected)
    assert_close(batch_aleatoric(query, target, blurred, 0.5, ids), math.exp(-0.5) * expected + (1 - math.exp(-0.5)) * loop_cross_entropy(query, target, group))


@given(groups, seeds)
def test_reversed_info_nce_is_the_loop(group, seed):
    texts, target, reference = vectors(len(group), seed)
    back = unit(texts[:, None] + target[None])
    losses = []
    for i in range(len(group)):
        scores = {j: 10 * (unit(texts[i] + target[j]) @ reference[i]) for j in range(len(group)) if j == i or group[j] != group[i]}
        losses.append(sum(score.exp() for score in scores.values()).log() - scores[i])
    assert_close(reversed_info_nce(back, reference, torch.tensor(group), scale=10.0), torch.stack(losses))


@pytest.mark.parametrize("query, target", [((4, 5), (3, 5)), ((3, 5), (4, 5)), ((4, 5), (4, 1)), ((4, 5), (5,)), ((4, 2, 5), (4, 2, 5))])
def test_vectors_of_other_shapes_are_refused_with_both(query, target):
    "Some of them einsum would stretch, and some info_nce would take for further wrong answers."
    one, other = torch.zeros(query), torch.zeros(target)
    for loss in (batch_classification, hn_nce, aleatoric, lambda q, t: batch_aleatoric(q, t, q, 0.5)):
        with pytest.raises(ValueError, match=rf"must be \(B,D\) alike, not {re.escape(f'{query} and {target}')}|alike, not {re.escape(f'{query} and {query}')}"):
            loss(one, other)


@pytest.mark.parametrize("back, reference", [((4, 4, 5), (3, 5)), ((4, 3, 5), (4, 5)), ((4, 6, 5), (4, 5)), ((4, 4, 1), (4, 5)), ((4, 5), (4, 5))])
def test_the_way_back_needs_every_pair(back, reference):
    message = re.escape(f"back must be (B,B,D) and reference (B,D), not {back} and {reference}")
    with pytest.raises(ValueError, match=message): reversed_info_nce(torch.zeros(back), torch.zeros(reference))


@given(groups, seeds)
def test_gradients_are_finite_even_without_wrong_columns(group, seed):
    leaves = [x.requires_grad_() for x in vectors(len(group), seed)]
    for ids in (torch.tensor(group), torch.zeros(len(group))):
        loss = hn_nce(leaves[0], leaves[1], group=ids) + batch_aleatoric(*leaves, 0.3, ids)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss.sum(), leaves))


# ---- reference values and gradients

@pytest.fixture(scope="module")
def reference(golden):
    arrays, values = np.load(golden("losses.npz")), json.loads(golden("losses.json").read_text())["values"]
    return lambda name: ({key.removeprefix(f"{name}/"): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(f"{name}/")}, values[name])


def check(reference, name, compute, atol=1e-5):
    "Value and gradients of every input, for per-query losses (B,) computed from the stored inputs."
    stored, expected = reference(name)
    inputs = {key.removeprefix("in/"): value.clone().requires_grad_() for key, value in stored.items() if key.startswith("in/")}
    loss = compute(**inputs).mean()
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5, abs=atol)
    for key, gradient in zip(inputs, gradients):
        assert_close(gradient, stored[f"grad/{key}"], rtol=1e-5, atol=atol)
        assert gradient.norm().item() == pytest.approx(expected["grad_norm"][key], rel=1e-4, abs=atol)


MGUR = {f"mgur_batch_aleatoric_gamma1_epoch{epoch}of50": partial(batch_aleatoric, progress=epoch / 50) for epoch in (0, 10, 49)}
PAIRS = ("qure_pairwise_kl", "qure_pairwise_kl_extreme")
LOSSES = MGUR | {
    "cosmo_batch_classification_raw": batch_classification,
    "cosmo_batch_classification_normscale4": lambda query, target: batch_classification(unit(query), unit(target), scale=16),
    "clip4cir_finetune_sum_x100": lambda reference, text, target: batch_classification(unit(reference + text), unit(target), scale=100),
    "covr_cross_entropy_temp0.07": lambda query, target: hn_nce(query, target, beta=0.0) / 2,
    "mgur_aleatoric": lambda query, target, augmented: aleatoric(query, augmented),
} | dict.fromkeys(PAIRS, lambda scores: pairwise_kl(scores[:, 0], scores[:, 1]))


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(reference, name):
    check(reference, name, LOSSES[name], atol=1e-4 if "x100" in name else 1e-5)


HN = [(alpha, beta, temperature) for alpha, beta in ((1.0, 0.0), (1.0, 0.5), (0.7, 1.3)) for temperature in (0.07, 0.5)]


def hn_name(alpha, beta, temperature): return f"covr_hn_nce_alpha{alpha:g}_beta{beta}_temp{temperature}"


@pytest.mark.parametrize("alpha, beta, temperature", HN)
def test_covr(reference, alpha, beta, temperature):
    "Our value is the stored textbook value; the program's own value and gradients are met by the same formula with its slip."
    name = hn_name(alpha, beta, temperature)
    options = dict(alpha=alpha, beta=beta, temperature=temperature)
    check(reference, name, lambda query, target: hn_nce_as_run(query, target, **options))
    stored, expected = reference(name)
    query, target = (stored[f"in/{side}"].requires_grad_() for side in ("query", "target"))
    ours = hn_nce(query, target, **options).mean()
    assert ours.item() == pytest.approx(expected["textbook_value_row_normaliser_on_rows"], rel=1e-5)
    by_loop = torch.autograd.grad(loop_hn_nce(query, target, range(8), **options).mean(), (query, target))
    for ours, theirs in zip(torch.autograd.grad(ours, (query, target)), by_loop): assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_covr_without_weights(reference, temperature):
    "With beta 0 there is no slip, and our function has the program's value and gradients."
    check(reference, hn_name(1.0, 0.0, temperature), lambda query, target: hn_nce(query, target, beta=0.0, temperature=temperature))


# ---- compositions that the losses come with

PARTS = {"text_projection_layer": "text", "image_projection_layer": "image", "combiner_layer": "joint", "output_layer": "out", "dynamic_scalar.0": "share_joint", "dynamic_scalar.3": "share"}


def stored_combiner(golden, name):
    arrays = np.load(golden("losses.npz"))
    stored = {key.removeprefix(f"{name}/weights/"): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(f"{name}/weights/")}
    combine = Combiner(16, 24, 32).eval()
    combine.load_state_dict({f"{PARTS[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value for key, value in stored.items()})
    return combine


def test_clip4cir_combiner(golden, reference):
    combine, (stored, _) = stored_combiner(golden, "clip4cir_combiner"), reference("clip4cir_combiner")
    query = combine(stored["in/text"], stored["in/reference"])
    assert_close(query, stored["out/query"], rtol=1e-5, atol=1e-5)
    assert_close(100 * query @ unit(stored["in/target"]).T, stored["out/logits"], rtol=1e-5, atol=1e-4)
    check(reference, "clip4cir_combiner", lambda reference, text, target: batch_classification(combine(text, reference), unit(target), scale=100), atol=1e-4)


BACKWARD = {"fashioniq": 0.5, "cirr": 0.1}  # weight of the way back


@pytest.mark.parametrize("data", BACKWARD)
def test_bi_blip4cir_combiner(golden, reference, data):
    "Images are frozen there, so it is no matter that the program for CIRR lets no gradient through the targets of the way back."
    combine, (stored, expected) = stored_combiner(golden, "biblip4cir_combiner"), reference(f"biblip4cir_combiner_{data}")
    way_back = lambda reference, negated_text, target: reversed_info_nce(combine(negated_text[:, None], (target.detach() if data == "cirr" else target)[None]), unit(reference))
    check(reference, f"biblip4cir_combiner_{data}", lambda reference, text, negated_text, target:
          batch_classification(combine(text, reference), unit(target), scale=100) + BACKWARD[data] * way_back(reference, negated_text, target), atol=1e-4)
    back = way_back(stored["in/reference"], stored["in/negated_text"], stored["in/target"])
    assert back.mean().item() == pytest.approx(expected["loss_reversed"], rel=1e-5)


def test_mgur_augmenter(golden):
    arrays = {key.rpartition("/")[2]: torch.from_numpy(value) for key, value in np.load(golden("losses.npz")).items() if key.startswith("mgur_augmenter/")}
    assert_close(blurred(arrays["features"], arrays["alpha_sample"], arrays["beta_sample"]), arrays["augmented"], rtol=1e-5, atol=1e-5)


def test_every_stored_loss_was_compared(golden):
    "The names that the tests above go through, against those of the file."
    combiners = {"clip4cir_combiner", *(f"biblip4cir_combiner_{data}" for data in BACKWARD)}
    assert {*LOSSES, *(hn_name(*options) for options in HN), *combiners} == set(json.loads(golden("losses.json").read_text())["values"])
