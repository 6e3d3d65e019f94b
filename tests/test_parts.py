"What the parts of a query know: which columns are whose, scores by one part alone, and the committed record."
import json
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from helpers import ROOT

from dqe_cir.core import generator
from dqe_cir.encoder import load_encoder
from dqe_cir.methods import METHODS
from dqe_cir.methods.readings import ReadingOptions
from dqe_cir.trainer.attributes_at_work import kind_columns, part_scores, ranked_alike
from dqe_cir.readings import mean_vector
from dqe_cir.vocabulary import Vocabulary

MINED = Vocabulary({"v neck/collar": (("v neck",), ("collar", "collared")), "yellow/grey/red": (("yellow",), ("grey", "gray"), ("red",)),
                    "dots/stripes": (("dots", "dotted"), ("stripes",)), "sleeveless/long": (("sleeveless",), ("long sleeves",))})


def test_columns_are_found_by_words_and_not_by_names():
    "Two of neckline, three of colour, two of a pattern that is neither, two of sleeves."
    assert kind_columns(MINED) == {"colour": [2, 3, 4], "shape": [0, 1, 7, 8]}
    assert kind_columns(Vocabulary({"dots/stripes": (("dots",), ("stripes",))})) == {"colour": [], "shape": []}


@pytest.fixture(scope="module")
def tokens(): return load_encoder("mini", device="cpu").image_tokens(torch.randn(6, 3, 64, 64, generator=generator(0)))


def method(**options):
    config = SimpleNamespace(dataset="garments", seed=0, **vars(ReadingOptions(readings="hand")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return METHODS["dqe_cir"](load_encoder("mini", device="cpu"), config=config, **options).eval()


@pytest.mark.parametrize("aligned", [False, True])
def test_with_readings_the_parts_are_terms_of_the_score(tokens, aligned):
    reads = method(mode="off", aligned=aligned)
    reads.read_with(MINED)
    texts = ["is red", "has long sleeves"]
    scores = part_scores(reads, tokens[:2], texts, tokens[2:])
    with torch.no_grad():
        query, image = reads.composed(tokens[:2], texts).query, reads.plain_target(tokens[2:])
        asked, shown = reads.readings(query), reads.readings(mean_vector(image))
        assert_close(scores["plain"], reads.score(query, image))
        assert_close(scores["colour"], 0.2 * asked[:, 2:5] @ shown[:, 2:5].T)
        pattern = 0.2 * asked[:, 5:7] @ shown[:, 5:7].T
    assert_close(scores["whole"], scores["plain"] + scores["colour"] + scores["shape"] + pattern)


def test_with_attention_the_parts_are_vectors(tokens):
    attends, texts = method(), ["is red", "has long sleeves"]
    scores = part_scores(attends, tokens[:2], texts, tokens[2:])
    with torch.no_grad(): composed, images = attends.composed(tokens[:2], texts), attends.encode_target(tokens[2:])
    assert list(scores) == ["whole", "plain", "colour", "shape"]
    assert_close(scores["shape"], attends.score(composed.parts[:, 1], images))
    with pytest.raises(ValueError, match="no parts"): part_scores(method(mode="off"), tokens[:2], texts, tokens[2:])
    with pytest.raises(ValueError, match="this CLIP4Cir has no parts"):
        part_scores(METHODS["clip4cir"](load_encoder("mini", device="cpu")), tokens[:2], texts, tokens[2:])


def test_alike_is_a_correlation_of_ranks_in_scale_and_shift():
    draws = torch.randn(3, 40, generator=generator(1))
    assert_close(ranked_alike(draws, 2 * draws - 1), torch.ones(3))
    other = torch.randn(3, 40, generator=generator(2))
    assert_close(ranked_alike(draws, other), ranked_alike(other, draws))


def test_the_record_says_that_readings_know_their_attribute_and_copies_do_not():
    record = json.loads((ROOT / "data" / "results" / "parts.json").read_text())
    reads, attends = (record["parts"][name] for name in ("readings", "attention"))
    known = reads["first image"]
    assert known["colour"]["colour"] > known["shape"]["colour"] + 40 and known["shape"]["shape"] > known["colour"]["shape"] + 25
    assert reads["readings"] == "mined" and reads["recipe"] == "common" and reads["queries"] == attends["queries"] == 900
    for kind in ("colour", "shape"): assert abs(attends["first image"]["colour"][kind] - attends["first image"]["shape"][kind]) < 5
    for name in ("attention", "paper"): assert record["parts"][name]["cosine"] > 0.9 and record["parts"][name]["alike"] > 0.9
    assert record["parts"]["paper"]["recipe"] == "paper" and abs(reads["alike"]) < 0.2
    assert len(reads["weights"]) == len(reads["vocabulary"]["attributes"]) and min(reads["weights"]) >= 0
