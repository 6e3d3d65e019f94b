"""What the five systems on other backbones compute, against naive twins written from their programs' rules, number by number."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from helpers import unit

from dqe_cir.core import generator
from dqe_cir.data import load_dataset
from dqe_cir.encoder import cache_tokens
from dqe_cir.methods import METHODS
from dqe_cir.methods.base import Batch
from dqe_cir.methods.parts import ContentStyle
from dqe_cir.trainer import build_method, fit, open_run, train_config, training_set
from dqe_cir.trainer.runs import load_state, trained_state
from dqe_cir.trainer.step import learning_rate_factor


def drawn(*shape, seed=0): return torch.randn(*shape, generator=generator(seed, "faithful"), dtype=torch.float64)


# ---- CoSMo, whose block MGUR takes over

class NaiveBlock:
    "Map (W,H,H) and text (C,) to the changed map: 1 x 1 convolutions and loops over heads and places."

    def __init__(self, state, width, text, heads): self.state, self.width, self.text, self.heads = state, width, text, heads

    def weight(self, name): return self.state[f"{name}.weight"]

    def attention(self, block, z, t):
        at = lambda name: f"content.{block}.{name}"
        places, share = z.shape[1], self.width // self.heads
        merged = self.weight(at("merge")) @ torch.cat([z, t[:, None].expand(-1, places)])  # no bias
        value, query, key = (self.weight(at(name)) @ source for name, source in (("value", merged), ("query", z), ("key", z)))
        asked = self.weight(at("text")) @ t + self.state[at("text.bias")]
        found = torch.zeros_like(z)
        for head in range(self.heads):
            rows = slice(head * share, (head + 1) * share)
            from_text = (z[rows].T @ asked[rows] / math.sqrt(share)).softmax(0)
            for place in range(places):
                among = torch.stack([query[rows, place] @ key[rows, other] for other in range(places)]) / math.sqrt(share)
                found[rows, place] = value[rows] @ (among.softmax(0) + from_text)
        return self.weight(at("out")) @ found + self.state[at("out.bias")][:, None]

    def equal(self, name, t): return math.sqrt(2 / self.text) * (self.weight(name) @ t) + self.state[f"{name}.bias"]

    def __call__(self, x, t):
        z = F.instance_norm(x[None, :, :, None])[0, :, :, 0]  # the layer that the program uses: population variance, 1e-5 under the root
        for block in range(2): z = z + self.state["weight"][block] * self.attention(block, z, t)
        mean, deviation = x.mean(1, keepdim=True), ((x - x.mean(1, keepdim=True)) ** 2).mean(1, keepdim=True).sqrt()
        wide, high = self.equal("gates", t).sigmoid().chunk(2)
        scale, shift = self.equal("style", t).chunk(2)
        return (wide[:, None] * deviation + scale[:, None]) * z + high[:, None] * mean + shift[:, None]


@pytest.fixture
def style():
    torch.manual_seed(0)
    change = ContentStyle(16, 6, heads=4).double()
    with torch.no_grad():
        for parameter in change.parameters(): parameter.add_(0.1 * torch.randn_like(parameter))
    return change


def test_the_block_of_cosmo_is_the_naive_one(style):
    maps, texts = 0.01 * drawn(3, 9, 16), drawn(3, 6, seed=1)  # a faint map: 1e-5 beside a variance of 1e-4
    naive = NaiveBlock(style.state_dict(), 16, 6, heads=4)
    for got, x, t in zip(style(maps, texts), maps, texts): assert_close(got, naive(x.T, t).T, rtol=1e-9, atol=1e-9)


def test_a_worked_number_of_the_instance_norm():
    "Values 1 and 3 of variance 1: (3 - 2) / sqrt(1 + 1e-5). With the deviation plus 1e-5 it would be 0.99999, with the sample's 0.707."
    change = ContentStyle(8, 4).double()
    with torch.no_grad(): change.weight.zero_(), change.gates.bias.fill_(-1e3)  # content and style alone, scale 1 and shift 0
    got = change(torch.tensor([1.0, 3.0], dtype=torch.float64)[None, :, None].expand(1, 2, 8), torch.zeros(1, 4, dtype=torch.float64))
    assert_close(got[0, 1], torch.full((8,), 0.999995000037, dtype=torch.float64), rtol=1e-10, atol=0)


def test_which_layers_have_a_bias(style):
    biased = {name.removesuffix(".bias") for name, _ in style.named_parameters() if name.endswith("bias")}
    assert biased == {"gates", "style", *(f"content.{block}.{layer}" for block in (0, 1) for layer in ("out", "text"))}


def test_the_content_passes_its_gradient_on_and_the_style_does_not(style):
    "As with the program: its statistics of the style are detached, its instance norm is not."
    x, t = drawn(1, 5, 16).requires_grad_(), drawn(1, 6, seed=1)
    (gradient,) = torch.autograd.grad(style(x, t).square().sum(), x)
    held = x.detach().clone().requires_grad_()
    naive = NaiveBlock({name: value.detach() for name, value in style.state_dict().items()}, 16, 6, heads=4)
    frozen = x.detach()[0].T
    wide, high = naive.equal("gates", t[0]).sigmoid().chunk(2)
    scale, shift = naive.equal("style", t[0]).chunk(2)
    z = F.instance_norm(held.mT[:, :, :, None])[0, :, :, 0]
    for block in range(2):
        share, merged = 4, naive.weight(f"content.{block}.merge") @ torch.cat([z, t[0][:, None].expand(-1, 5)])
        heads = lambda name, source: (naive.weight(f"content.{block}.{name}") @ source).reshape(4, share, 5)
        asked = (naive.weight(f"content.{block}.text") @ t[0] + naive.state[f"content.{block}.text.bias"]).reshape(4, share, 1)
        among = (heads("query", z).mT @ heads("key", z) / 2).softmax(-1)
        rows = among + (z.reshape(4, share, 5).mT @ asked / 2).softmax(1).mT
        found = (heads("value", merged) @ rows.mT).reshape(16, 5)
        z = z + naive.state["weight"][block] * (naive.weight(f"content.{block}.out") @ found + naive.state[f"content.{block}.out.bias"][:, None])
    deviation, mean = torch.std_mean(frozen, 1, correction=0, keepdim=True)
    (wanted,) = torch.autograd.grad(((wide[:, None] * deviation + scale[:, None]) * z + high[:, None] * mean + shift[:, None]).square().sum(), held)
    assert_close(gradient, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["cosmo", "mgur"])
def test_the_weights_of_gates_and_style_are_drawn_with_variance_one(name):
    method = METHODS[name](METHODS[name].load_encoder("mini", device="cpu"))
    for layer in (method.change.gates, method.change.style): assert layer.weight.std().item() == pytest.approx(1, abs=0.02)


# ---- Bi-BLIP4CIR

def bi_blip_batch(method, size=4):
    tokens = torch.randn(size, *method.encoder.token_shape, generator=generator(0)) + torch.randn(size, 1, method.encoder.token_shape[-1], generator=generator(1))
    there = ["is red", "has longer sleeves", "is darker and has a collar", "has polka dots"]
    return Batch(tokens, there, tokens.roll(1, 0), torch.arange(size), again=["is shorter", "is blue and has dots", "has a collar", "is black"])


def naive_way_back(combine, raw_targets, texts, raw_references, stage):
    "The program's rule: unit targets and sums in stage one; raw targets through its Combiner in stage two; 100 cosines with unit references."
    losses = []
    for i, (text, reference) in enumerate(zip(texts, raw_references)):
        logits = []
        for target in raw_targets:
            query = unit(unit(target) + text) if stage == 1 else combine(text, target)
            logits.append(100 * query @ unit(reference))
        losses.append(-torch.stack(logits).log_softmax(0)[i])
    return torch.stack(losses)


@pytest.mark.parametrize("form", ["shared", "native"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_way_back_starts_from_targets_as_the_program_has_them(form, stage):
    torch.manual_seed(0)
    kind = METHODS["bi_blip4cir"] if form == "shared" else METHODS["bi_blip4cir"].native
    method = kind(kind.load_encoder("mini", device="cpu")).eval()
    batch = replace(bi_blip_batch(method), progress=0.0 if stage == 1 else 1.0)
    with torch.no_grad():
        got = method.losses(batch)
        raw, references = method.image_vector(batch.target), method.image_vector(batch.reference)
        back = naive_way_back(method.combine, raw, method.text_vector(batch.again, 1), references, stage)
        with_unit = naive_way_back(method.combine, unit(raw), method.text_vector(batch.again, 1), references, stage)
        asked = torch.stack([method.compose(image, text) for image, text in zip(references, method.text_vector(batch.texts, 0))])
        forward = F.cross_entropy(100 * asked @ unit(raw).T, torch.arange(4), reduction="none")
    assert_close(got["backward"], back, rtol=1e-4, atol=1e-3)
    assert_close(got["forward"], forward, rtol=1e-4, atol=1e-3)
    assert torch.allclose(back, with_unit, atol=1e-3) == (stage == 1), "only in stage two does the length of a target matter"


@pytest.mark.parametrize("name, twice", [("bi_blip4cir", True), ("clip4cir", False)])
def test_both_ways_draw_their_captions_by_themselves(name, twice):
    config = train_config({"method": name, "size": "smoke", "recipe": "paper", "device": "cpu"})
    dataset = load_dataset("garments", split="train", size="smoke")
    method = build_method(config)
    data = training_set(config, dataset, type("Zeros", (), {"__getitem__": lambda self, ids: torch.zeros(len(ids), 1, 1)})())
    batch = data.batch(list(range(64)), method, generator(0), 0.0)
    assert (batch.again is not None) == twice and len(batch.texts) == 64
    if not twice: return
    same = sum(one == other for one, other in zip(batch.texts, batch.again))
    assert 6 <= same <= 32, "four equally likely texts of two captions: a quarter of 64 agree, deviation 3.5; captions alike add some"


# ---- two stages, each with a learning rate and an optimiser of its own

@pytest.mark.parametrize("name", ["clip4cir", "bi_blip4cir"])
def test_each_stage_is_a_program_of_its_own(name, tmp_path, monkeypatch):
    "Its own rise and fall of the learning rate; AdamW counts the Combiner's steps from the second stage's first; the encoder rests there."
    import dqe_cir.trainer.loop as loop
    rates, states = [], {}

    def step(method, batches, stepper):
        found = own(method, batches, stepper)
        rates.append(stepper.optimizer.param_groups[0]["lr"] / stepper.peaks[0])
        for part, parameter in method.named_parameters():
            if parameter in stepper.optimizer.state: states[part] = int(stepper.optimizer.state[parameter]["step"])
        return found

    own = loop.training_step
    monkeypatch.setattr(loop, "training_step", step)
    config = train_config({"method": name, "size": "smoke", "epochs": 2, "batch_size": 48, "device": "cpu", "run_dir": str(tmp_path / "run"), "evaluate_every": 0})
    dataset = load_dataset("garments", split="train", size="smoke")
    method = build_method(config)
    fit(method, training_set(config, dataset, cache_tokens(method.encoder, dataset, progress=False)), open_run(config))
    half = len(rates) // 2
    assert rates == pytest.approx(2 * [learning_rate_factor(number, half) for number in range(half)]) and half >= 3
    assert {steps for part, steps in states.items() if part.startswith("combine.")} == {half}
    assert {steps for part, steps in states.items() if part.startswith("encoder.")} == {half}
    assert states["log_temperature"] == 2 * half


# ---- switches, recipes and runs of before

FIVE = ("cosmo", "mgur", "clip4cir", "bi_blip4cir", "covr")
FIXED = dict(cosmo=1 / 16, mgur=1 / 16, clip4cir=0.01, bi_blip4cir=0.01, covr=0.07)


@pytest.mark.parametrize("form", ["shared", "native"])
@pytest.mark.parametrize("name", FIVE)
def test_what_each_recipe_makes_of_a_method(name, form):
    common, paper = (train_config({"method": name, "form": form, "recipe": recipe, "device": "cpu"}) for recipe in ("common", "paper"))
    ours, theirs = build_method(common), build_method(paper)
    aligned = form == "shared" and name in ("cosmo", "mgur", "covr")
    assert common.aligned == aligned and common.label_smoothing == ours.label_smoothing == 0.2 and "log_temperature" in trained_state(ours)
    assert getattr(ours, "aligned", False) == aligned and not getattr(theirs, "aligned", False)
    assert theirs.label_smoothing == 0 and theirs.temperature.item() == pytest.approx(FIXED[name]) and "log_temperature" not in trained_state(theirs)
    start = build_method(replace(common, temperature=0.1))
    assert start.temperature.item() == pytest.approx(0.1) and start.log_temperature.requires_grad


@pytest.mark.parametrize("name", FIVE)
def test_a_run_older_than_recipes_is_built_as_it_was(name):
    "Its record says nothing of recipes, and names labels and alignment that it did not read."
    config = replace(train_config({"method": name, "device": "cpu"}), recipe=None, temperature=None, aligned=False, label_smoothing=0.0)
    method = build_method(config)
    assert method.temperature.item() == pytest.approx(FIXED[name]) and method.label_smoothing == 0
    assert "log_temperature" not in trained_state(method)


def test_an_old_cosmo_is_refused_in_one_line():
    "Four biases of each block are gone: weights with them were trained for another function."
    method = METHODS["cosmo"](METHODS["cosmo"].load_encoder("mini", device="cpu"))
    old = trained_state(method)
    old |= {f"change.content.{block}.{layer}.bias": torch.zeros(96) for block in (0, 1) for layer in ("merge", "query", "key", "value")}
    with pytest.raises(ValueError, match=r"old.safetensors does not fit this method: 8 names differ, such as change.content.0.key.bias") as refused:
        load_state(method, old, "old.safetensors")
    assert "\n" not in str(refused.value)
