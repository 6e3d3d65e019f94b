"Recipe and method apart: what is given wins, two recipes resolve for every method, and a switch changes what reads it and nothing else."
import dataclasses

import pytest
import torch

from helpers import PAIRWISE

from dqe_cir.core import generator
from dqe_cir.data import load_dataset
from dqe_cir.methods import METHODS
from dqe_cir.methods.base import Batch
from dqe_cir.trainer import build_method, load_run, train_config, training_set
from dqe_cir.trainer.batches import negative_tokens, other_targets
from dqe_cir.trainer.config import COMMON, EVERYBODY, PLAIN, options_of
from dqe_cir.trainer.loop import smoke_run

RECIPES = ("common", "paper")
OTHER = {"aligned": True, "label_smoothing": 0.05, "temperature": 0.2, "warm_up": "none", "captions": "some", "zone": "meanstd"}  # in no recipe
PAIRS = [name for name, method in METHODS.items() if method.uses_negatives]


def reads(method): return {*options_of(METHODS[method]), *EVERYBODY} & set(PLAIN)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_what_the_method_reads_and_what_is_given_wins(method, recipe):
    config = train_config({"method": method, "recipe": recipe})
    own = COMMON if recipe == "common" else PLAIN | METHODS[method].paper
    for name in PLAIN:
        idle = None if name == "warm_up" else PLAIN[name]
        assert getattr(config, name) == (own[name] if name in reads(method) else idle), name
    for name in reads(method):
        value = OTHER[name]
        negatives = {"negatives": "trns"} if name == "zone" else {}
        assert getattr(train_config({"method": method, "recipe": recipe, name: value, **negatives}), name) == value


@pytest.mark.parametrize("encoder, recipe", [("mini", "common"), ("a full-size one", "paper")])
def test_the_encoders_size_chooses_the_recipe_that_nobody_names(encoder, recipe):
    for method in METHODS: assert train_config({"method": method, "encoder": encoder}) == train_config({"method": method, "encoder": encoder, "recipe": recipe})


@pytest.mark.parametrize("values, message", [
    ({"recipe": "mine"}, "unknown recipe 'mine'; choose one of common, paper"), ({"captions": "all"}, "unknown captions 'all'"),
    ({"warm_up": "hot"}, "unknown warm_up 'hot'; choose one of none, random, contrastive"), ({"temperature": 0.7}, "temperature=0.7 must be from 0.01 to 0.5"),
    ({"temperature": float("nan")}, "temperature=nan must be a finite number"), ({"method": "sprc", "aligned": True}, "aligned=True is not read by method sprc"),
    ({"method": "info_nce", "warm_up": "random"}, "warm_up=random is not read by method info_nce"),
    ({"warm_up": "none", "warmup_epochs": 2}, "warm_up=none and warmup_epochs=2 contradict"), ({"warm_up": "contrastive", "warmup_epochs": 0}, "contradict")])
def test_what_cannot_be_meant_is_refused_in_one_line(values, message):
    with pytest.raises(ValueError) as refused: train_config(values)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_method_trains_under_both_recipes(method, recipe):
    folder = smoke_run(method=method, recipe=recipe, epochs=1, device="cpu")
    trained, config = load_run(folder, "cpu")
    assert config.recipe == recipe and not trained.training


@pytest.fixture(scope="module")
def garments(): return load_dataset("garments", split="train", size="smoke")


class Noise:
    "Tokens that an image's name decides."
    def __init__(self, shape): self.shape = shape
    def __getitem__(self, ids): return torch.stack([torch.randn(self.shape, generator=generator(0, name)) for name in ids])


def first_step(garments, **options):
    "Batch and loss terms of the first step of a run, without dropout."
    torch.manual_seed(0)
    config = train_config({"size": "smoke", "device": "cpu", "epochs": 4, **options})
    method = build_method(config).eval()
    data, rows = training_set(config, garments, Noise(method.encoder.token_shape)), list(range(6))
    batch = data.batch(rows, method, generator(0), 0.0, negative_tokens(data, rows, 0, config))
    with torch.no_grad(): return batch, method.losses(batch)


@pytest.mark.parametrize("method, switch, value", [
    ("info_nce", "aligned", False), ("info_nce", "label_smoothing", 0.0), ("info_nce", "temperature", 0.2), ("sprc", "label_smoothing", 0.0), ("sprc", "temperature", 0.2),
    ("qure", "aligned", False), ("qure", "label_smoothing", 0.0), ("qure", "temperature", 0.2), ("dqe_cir", "aligned", False), ("dqe_cir", "label_smoothing", 0.0), ("dqe_cir", "temperature", 0.2)])
def test_a_switch_of_the_method_moves_its_terms_and_not_its_batch(garments, method, switch, value):
    batch, terms = first_step(garments, method=method)
    same, moved = first_step(garments, method=method, **{switch: value})
    assert batch.texts == same.texts and torch.equal(batch.target, same.target) and batch.negative is same.negative is None
    assert list(terms) == list(moved) and not all(torch.equal(terms[name], moved[name]) for name in terms)


@pytest.mark.parametrize("method", METHODS)
def test_captions_are_the_same_for_every_method_but_where_they_are_its_own(garments, method):
    shown = {name: first_step(garments, method=method, captions=name)[0].texts for name in ("both", "some", "own")}
    long = [len(triplet.captions) > 1 for triplet in garments.triplets[:6]]
    assert all(long) and all(" and " in text for text in shown["both"]) and shown["both"] != shown["some"]


@pytest.mark.parametrize("method", PAIRS)
def test_a_random_warm_up_learns_from_another_rows_target(garments, method):
    pairs = PAIRWISE if method == "dqe_cir" else {}
    batch, terms = first_step(garments, method=method, warm_up="random", **pairs)
    again, contrast = first_step(garments, method=method, warm_up="contrastive", **pairs)
    assert again.negative is None and list(contrast) == ["warm_up"] and "preference" in terms
    data = training_set(train_config({"method": method}), garments, {})
    borrowed = Noise(batch.target.shape[1:])[other_targets(data, list(range(6)))]
    assert torch.equal(batch.negative, borrowed.unsqueeze(1)) and not (batch.negative[:, 0] == batch.target).flatten(1).all(1).any()


@pytest.mark.parametrize("method", PAIRS)
def test_without_a_warm_up_negatives_are_mined_at_once(garments, method):
    config = train_config({"method": method, "warm_up": "none", "size": "smoke"})
    assert config.warmup_epochs == 0 and training_set(config, garments, {}).refresh_due(0, config)
