"Attribute weights against a loop that follows the equations, the word lists, a third attribute, and the maps over the picture."
import json
import math
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from dqe_cir.retriever.attention import as_grid, attribute_maps, overlay
from dqe_cir.attributes import AttributeWeights, LEXICON, MODES, lexicon_record, speaks_of
from dqe_cir.core import generator
from dqe_cir.encoder import cross_attention, load_encoder
from dqe_cir.methods import Batch
from dqe_cir.methods.dqe_cir import ATTRIBUTE_MARGINS, DQECIR

BATCH, STATES, HIDDEN, WIDTH = 4, 5, 24, 6


def module(attributes, mode="learned", aligned=False, moved=True):
    "A module whose every number has moved from its start, and its projection."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        projection = nn.Linear(HIDDEN, WIDTH)
        weights = AttributeWeights(projection, attributes, mode, aligned)
        with torch.no_grad():
            for parameter in weights.parameters() if moved else (): parameter.copy_(0.5 * torch.randn(parameter.shape))
    return weights, projection


def inputs(seed): return torch.randn(BATCH, STATES, HIDDEN, generator=generator(seed, "fused")), torch.randn(BATCH, 7, HIDDEN, generator=generator(seed, "words"))


def unit(vector): return vector / vector.norm()


def joined(states, shares, aligned):
    if aligned: return unit(torch.cat([share * unit(state) for share, state in zip(shares, states)]))
    return unit(sum(share * state for share, state in zip(shares, states)))


def loop(weights, projection, fused, words, mode, aligned):
    "One query at a time, one attribute at a time: query, base, parts, gate, attention."
    found = []
    for h, w in zip(fused, words):
        text, even = weights.norm(w[0]), [1 / STATES] * STATES
        keys = weights.weigh.states(weights.weigh.norm(h))
        base, parts, attention = joined(projection(h), even, aligned), [], []
        for a in range(len(weights.attributes)):
            key = weights.weigh.base[a] + weights.weigh.text[a] @ text
            alpha = torch.softmax(torch.stack([z @ key for z in keys]) / math.sqrt(len(key)), 0).tolist()
            if mode in ("off", "gate_only"): alpha = even
            pooled = sum(share * state for share, state in zip(alpha, h))
            adapted = weights.up[a].weight @ F.gelu(weights.down[a](pooled))
            parts.append(joined(projection(h) + adapted, alpha, aligned)); attention.append(alpha)
        logits = weights.gate.bias if mode == "token_only" else weights.gate.weight @ text + weights.gate.bias
        count = 1 + len(parts)
        gate = {"off": torch.eye(count)[0], "fixed_gate": torch.full((count,), 1 / count)}.get(mode, logits.softmax(0))
        found.append((unit(sum(g * v for g, v in zip(gate, [base, *parts]))), base, torch.stack(parts), gate, torch.tensor(attention)))
    return [torch.stack(values) for values in zip(*found)]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attributes", [("colour", "shape"), ("colour", "shape", "pattern"), ("shape",)])
def test_the_composed_query_is_the_loop(attributes, mode, aligned):
    weights, projection = module(attributes, mode, aligned)
    fused, words = inputs(len(attributes))
    composed = weights(fused, words, projection)
    for value, expected in zip((composed.query, composed.base, composed.parts, composed.gate, composed.attention), loop(weights, projection, fused, words, mode, aligned), strict=True):
        assert_close(value, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_starts_as_the_plain_query(mode, aligned):
    weights, projection = module(("colour", "shape"), mode, aligned, moved=False)
    fused, words = inputs(0)
    composed = weights(fused, words, projection)
    assert (F.cosine_similarity(composed.query, composed.base) > 0.999).all()
    assert torch.equal(composed.query, composed.base) == (mode == "off")


@given(st.integers(0, 99))
def test_a_row_does_not_depend_on_its_neighbours_and_only_the_first_word_state_counts(seed):
    weights, projection = module(("colour", "shape"))
    fused, words = inputs(seed)
    together = weights(fused, words, projection).query
    assert_close(torch.cat([weights(fused[i:i + 1], words[i:i + 1], projection).query for i in range(BATCH)]), together)
    assert torch.equal(weights(fused, torch.cat([words[:, :1], words[:, 1:].flip(1)], dim=1), projection).query, together)


# ---- word lists

@given(st.sampled_from(sorted(LEXICON)), st.data())
def test_every_listed_word_is_found_and_no_part_of_a_word(name, data):
    word = data.draw(st.sampled_from(LEXICON[name]))
    assert speaks_of([f"it is {word}", f"{word.upper()}, please", f"more ({word})"], name).all()
    assert not speaks_of([f"x{word}", f"{word}x", f"pre-{word}z", f"{word}-ish", ""], name).any()


def test_colour_and_shape_share_no_word(): assert not set(LEXICON["colour"]) & set(LEXICON["shape"])


def test_the_version_belongs_to_the_words():
    "Whoever changes a list counts LEXICON_VERSION up and writes the new digest here: results made with other words are other results."
    assert lexicon_record() == {"lexicon_version": 1, "lexicon_digest": "759ac6ab8497"}


@given(st.sampled_from(sorted(LEXICON)), st.data())
def test_the_record_changes_with_every_word_and_with_nothing_else(name, data):
    usual, words = lexicon_record(), LEXICON[name]
    left_out = data.draw(st.integers(0, len(words) - 1))
    with patch.dict(LEXICON, {name: data.draw(st.permutations(words))}): assert lexicon_record() == usual
    with patch.dict(LEXICON, {name: words[:left_out] + words[left_out + 1:]}): assert lexicon_record() != usual
    with patch.dict(LEXICON, smell=["musty"]): assert lexicon_record()["lexicon_version"] == usual["lexicon_version"] and lexicon_record() != usual
    assert json.loads(json.dumps(usual)) == usual


# ---- one more attribute, all the way to the loss

def method(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0); return DQECIR(load_encoder("mini", device="cpu"), **options).eval()


@pytest.fixture(scope="module")
def tokens(): return load_encoder("mini", device="cpu").image_tokens(torch.randn(3, 3, 64, 64, generator=generator(0, "pictures")))


@pytest.mark.parametrize("aligned", [False, True])
def test_a_third_attribute_has_its_term_and_its_gradient(tokens, aligned):
    with patch.dict(LEXICON, pattern=["dots"]):
        three = method(attributes={"colour": 5.0, "pattern": 5.0, "shape": 5.0}, aligned=aligned, attribute=0.5)
        terms = three.losses(Batch(tokens, ["has dots", "is red", "is nicer"], tokens.flip(0), torch.arange(3), tokens.roll(-1, 0).unsqueeze(1)))
    assert list(terms) == ["preference", "ranking", "colour", "pattern", "shape"] and three.weights["pattern"] == 0.5
    assert [name for name in ("colour", "pattern", "shape") if terms[name].any()] == ["colour", "pattern"]
    assert terms["pattern"][0] > 0 and terms["pattern"][1:].eq(0).all()
    terms["pattern"].mean().backward()
    assert three.compose.up[1].weight.grad.abs().max() > 0 and three.compose.up[0].weight.grad.eq(0).all()


@pytest.mark.parametrize("attributes, message", [({"colour": 0.1, "smell": 0.1}, "no word list for attribute 'smell': add one to LEXICON"),
    (("colour", "shape"), "attribute 'colour' has no margin"), ({"colour": None}, "attribute 'colour' has no margin")])
def test_an_incomplete_attribute_is_named(attributes, message):
    with pytest.raises(ValueError, match=message): method(attributes=attributes)


def test_the_default_attributes_are_the_papers(): assert list(ATTRIBUTE_MARGINS) == ["colour", "shape"] and method().compose.attributes == ("colour", "shape")


# ---- maps

def test_maps_are_the_weighted_mean_over_states(tokens):
    two, texts = method(), ["is red", "has a collar", "has long sleeves and is blue"]
    with torch.no_grad():
        for parameter in two.compose.weigh.parameters(): parameter.copy_(torch.randn(parameter.shape, generator=generator(parameter.numel())))
        alpha = two.composed(tokens, texts).attention
    looks, maps = cross_attention(two.encoder, tokens, texts), attribute_maps(two, tokens, texts)
    assert maps.shape == (3, 2, 64) and not maps.requires_grad
    for b in range(3):
        for a in range(2):
            raw = [sum(float(alpha[b, a, t] * looks[b, t, 1 + p]) for t in range(looks.shape[1])) for p in range(64)]
            assert_close(maps[b, a], torch.tensor(raw) / sum(raw))
    assert as_grid(maps)[1, 1, 2, 3] == maps[1, 1, 2 * 8 + 3]
    assert (maps[:, 0] - maps[:, 1]).abs().max() > 0.001  # weights that have moved apart look at different places


def test_an_overlay_reddens_what_has_more_than_its_share():
    from PIL import Image
    grey = Image.new("RGB", (32, 32), "#808080")
    grid = torch.full((4, 4), 0.5 / 15)
    grid[1, 2] = 0.5
    red = overlay(grey, grid)
    assert red.getpixel((20, 12))[0] > 200 > red.getpixel((20, 12))[1] and red.getpixel((2, 30)) == (128, 128, 128)
    assert overlay(grey, torch.full((4, 4), 1 / 16)).tobytes() == grey.tobytes()


@pytest.mark.parametrize("name, files, count, silent", [("cirr", "cap.rc2.val.json", 4181, 61),
                                                        ("fashioniq", "cap.*.train.json", 18000, 4)])
def test_share_of_requests_without_a_word_of_either_attribute(annotations, name, files, count, silent):
    rows = [row for path in (annotations(name) / "captions").glob(files) for row in json.loads(path.read_text())]
    texts = [row["caption"] if "caption" in row else " and ".join(row["captions"]) for row in rows]
    spoken = speaks_of(texts, "colour") | speaks_of(texts, "shape")
    assert len(texts) == count and round(100 * (~spoken).double().mean().item()) == silent
