"What captions say, vocabularies and their labels, merging against a slow twin, and planted attributes that are found."
import functools
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dqe_cir.attributes import LEXICON
from dqe_cir.core import generator
from dqe_cir.data.garments.benchmark import fashioniq_rows, make_world
from dqe_cir.data.garments.draw import ATTRIBUTES
from dqe_cir.vocabulary import (BORDERS, DENIALS, STOP_WORDS, Vocabulary, area_under_curve, candidates, comparatives,
                                faulty, found_in, judged, linkage, merges, mined_vocabulary, named_by, spoken)

COLOURS = (("red", "crimson"), ("blue", "navy"), ("black", "jet black"))
LENGTHS = (("long",), ("short", "very short"))
BY_HAND = Vocabulary({"colour": COLOURS, "length": LENGTHS})
WORDS = ["red", "crimson", "blue", "jet", "black", "long", "very", "short", "no", "not", "than", "instead", "of",
         "and", "but", ",", "is", "darker", "sleeves"]
texts = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


@pytest.mark.parametrize("text, named", [
    ("is red", ["red"]),
    ("is red instead of blue", ["red"]),
    ("isn't red", []), ("is not red or blue", []), ("is not red, blue", ["blue"]), ("is not red but blue", ["blue"]),
    ("darker than the blue one", []), ("without red and with blue", ["blue"]), ("has less red", []),
    ("is blue instead", ["blue"]), ("is red and blue", ["red", "blue"]), ("Crimson.", ["red"]),
    ("is jet-black", ["black"]), ("is jet black", ["black"]), ("is jet, black", ["black"]), ("is very short", ["short"]),
    ("redder and shorter", []), ("no red, then red", ["red"]), ("", []), (",;.", []),
])
def test_what_a_text_names(text, named):
    row = BY_HAND.label([text])[0]
    assert [name for (_, name), value in zip(BY_HAND.values, row.tolist()) if value] == named


def test_the_longest_phrase_uses_up_its_words():
    one = Vocabulary({"a": (("long sleeves",), ("long",)), "b": (("sleeves long red",), ("red",))})
    assert one.label(["long sleeves"]).tolist() == [[1, 0, 0, 0]]
    assert one.label(["sleeves long red"]).tolist() == [[0, 0, 1, 0]]
    assert one.label(["sleeves long, red"]).tolist() == [[0, 1, 0, 1]]
    assert found_in("no long sleeves", {"long sleeves", "long"}) == [("long sleeves", False)]


@given(st.lists(texts, max_size=5))
def test_each_attribute_of_a_row_sums_to_one_or_zero(some):
    labels = BY_HAND.label(some)
    assert labels.shape == (len(some), 5) and labels.dtype == torch.float32 and (labels >= 0).all()
    for part in labels.split(BY_HAND.sizes, dim=1):
        total = part.sum(1)
        assert (((total - 1).abs() < 1e-6) | (total == 0)).all()


@given(texts, texts)
def test_the_order_of_captions_does_not_matter(one, other):
    there, back, joined = BY_HAND.label([(one, other), (other, one), f"{one} and {other}"])
    assert torch.equal(there, back) and torch.equal(there, joined)


@given(texts)
def test_clauses_hold_the_words_in_order_and_denial_never_ends_within_one(text):
    clauses = spoken(text)
    assert [word for clause in clauses for word, _ in clause] == [word for word in text.split() if word not in BORDERS | {","}]
    for clause in clauses:
        assert [said for _, said in clause] == sorted((said for _, said in clause), reverse=True)


@given(st.dictionaries(st.text("abc/ ", min_size=1), st.integers(2, 4), max_size=4))
def test_a_record_comes_back_the_same(sizes):
    words = itertools.count()
    one = Vocabulary({name: tuple((f"w{next(words)}", f"two w{next(words)}") for _ in range(size)) for name, size in sizes.items()})
    again = Vocabulary.from_record(json.loads(json.dumps(one.record())))
    assert again == one and again.sizes == one.sizes and again.values == one.values
    assert again.label(["w0", "two w1"]).shape == (2, sum(one.sizes))


@pytest.mark.parametrize("attributes, words", [
    ({"colour": ()}, "'colour' has 0 values"), ({"colour": (("red",),)}, "'colour' has 1 values"),
    ({"colour": (("red",), ())}, "a value that nothing says"), ({"colour": (("red",), ("!",))}, "a value that nothing says"),
    ({"a": (("Red",), ("x",)), "b": (("red",), ("y",))}, "phrase 'red' is given twice"),
])
def test_a_vocabulary_that_cannot_be_read_says_why(attributes, words):
    with pytest.raises(ValueError, match=words): Vocabulary(attributes)


def slow_linkage(alike, threshold, power):
    "Merging as it is written down: all pairs of groups, all pairs of their members."
    groups = [[item] for item in range(len(alike))]
    while len(groups) > 1:
        scores = {(i, j): sum(alike[a][b] for a in groups[i] for b in groups[j]) / (len(groups[i]) * len(groups[j])) ** power
                  for i in range(len(groups)) for j in range(i + 1, len(groups))}
        i, j = max(scores, key=scores.get)
        if scores[i, j] <= threshold: break
        groups[i] += groups.pop(j)
    return sorted(sorted(group) for group in groups)


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_merging_is_what_its_slow_twin_does(seed, power):
    alike = torch.randn(12, 12, generator=generator(seed, "alike"), dtype=torch.float64)
    alike = alike + alike.T
    for threshold in (-9.0, -0.5, 0.0, 0.7, 2.0, 99.0):
        assert linkage(alike, threshold, power) == slow_linkage(alike.tolist(), threshold, power)
    assert len(list(merges(alike, power))) == 11 and linkage(torch.zeros(0, 0), 0.0) == []


def test_area_is_the_share_of_pairs_in_the_right_order():
    source = generator(0, "area")
    scores = torch.randint(6, (40, 5), generator=source).double()
    said = torch.randint(2, (40, 5), generator=source).double()
    for column, value in enumerate(area_under_curve(scores, said).tolist()):
        ones, zeros = scores[said[:, column] == 1, column], scores[said[:, column] == 0, column]
        pairs = (ones.unsqueeze(1) > zeros).double() + (ones.unsqueeze(1) == zeros).double() / 2
        assert value == pytest.approx(pairs.mean().item())


def test_faults_come_in_their_shares_and_keep_the_sums():
    labels = BY_HAND.label(["is red and blue, long", "is short", "", "is black"] * 3000)
    spoiled = faulty(labels, BY_HAND.sizes, 0.25, 0.15, generator(0, "faults"))
    for before, after in zip(labels.split(BY_HAND.sizes, 1), spoiled.split(BY_HAND.sizes, 1)):
        named = before.sum(1) > 0
        assert not after[~named].any()
        gone = after[named].sum(1) == 0
        kept = (after[named] == before[named]).all(1)
        replaced = ~gone & ~kept
        assert gone.float().mean() == pytest.approx(0.25, abs=0.02) and replaced.float().mean() == pytest.approx(0.15, abs=0.02)
        assert (after[named][replaced].sum(1) == 1).all() and not (after[named][replaced] * before[named][replaced]).any()
    again = faulty(labels, BY_HAND.sizes, 0.25, 0.15, generator(0, "faults"))
    assert torch.equal(spoiled, again)
    with pytest.raises(ValueError, match="gaps -0.1 and noise 0.0"): faulty(labels, BY_HAND.sizes, -0.1, 0.0, generator(0))


@functools.cache
def full_world():
    return make_world("full", 0)


def garment_triplets(noise, seed=0):
    "Captions of the full garments, and embeddings that show every value by a direction of its own: no picture is drawn."
    world = full_world()
    captions, looks, categories = [], [], []
    for category, queries in world.queries["train"].items():
        for row in fashioniq_rows(queries, category, np.random.default_rng([seed, *category.encode()])):
            captions.append(tuple(row["captions"]))
            categories.append(category)
            looks.append([world.images["train"][row[name]] for name in ("candidate", "target")])
    source, vectors = generator(seed, "garments"), 0
    for attribute, values in ATTRIBUTES.items():
        shown = torch.tensor([[values.index(getattr(garment, attribute)) for garment in pair] for pair in looks])
        vectors = vectors + torch.randn(len(values), 96, generator=source)[shown]
    vectors = F.normalize(vectors + noise * torch.randn(vectors.shape, generator=source), dim=-1)
    return captions, vectors[:, 0], vectors[:, 1], categories


@pytest.mark.parametrize("noise, seed", [(0.5, 0), (1.0, 1), (1.5, 2)])
def test_five_attributes_are_found_in_garments(noise, seed):
    "Captions as they are; what an encoder would see is made up, more or less clearly."
    captions, reference, target, categories = garment_triplets(noise, seed)
    found = mined_vocabulary(captions, reference, target, categories)
    own = {attribute: [value for value in values if value != ("collarless",)] for attribute, values in found.attributes.items()}
    assert sorted(map(len, own.values())) == [3, 3, 3, 3, 10]  # "collarless" is a round neck or a v-neck
    together = [{"red", "crimson"}, {"grey", "gray"}, {"blue", "navy"}, {"long sleeves", "wrist"}, {"dotted", "polka dots"},
                {"medium length", "mid length"}]
    values = [set(phrases) for values in found.attributes.values() for phrases in values]
    for words in together: assert any(words <= phrases for phrases in values), words
    assert not any("er" == word[-2:] for phrases in values for phrase in phrases for word in phrase.split() if word != "silver")
    lists = {"colour": LEXICON["colour"], "shape": LEXICON["shape"]}
    assert sorted(name.split(":")[0] for name in named_by(found, lists).attributes) == ["colour", "shape", "shape", "shape"]


def test_the_order_of_triplets_does_not_matter():
    captions, reference, target, categories = garment_triplets(1.0, 1)
    order = torch.randperm(len(captions), generator=generator(0)).tolist()
    again = mined_vocabulary([captions[row] for row in order], reference[order], target[order],
                             [categories[row] for row in order])
    assert again == mined_vocabulary(captions, reference, target, categories)


def test_where_nothing_is_shown_nothing_is_mined():
    captions, reference, target, categories = garment_triplets(1.0)
    shuffled = torch.randperm(len(captions), generator=generator(0, "shuffle"))
    assert mined_vocabulary(captions, reference[shuffled], target[shuffled], categories) == Vocabulary({})
    assert mined_vocabulary([], reference[:0], target[:0]) == Vocabulary({})
    assert mined_vocabulary(captions[:1], reference[:1], target[:1]) == Vocabulary({})
    same = torch.ones_like(reference)
    assert mined_vocabulary(captions, same, same, categories) == Vocabulary({})


def real_captions(folder, pattern):
    rows = [row for path in sorted(folder.glob(pattern)) for row in json.loads(path.read_text())]
    return [tuple(row["captions"]) if "captions" in row else (row["caption"],) for row in rows]


def test_real_captions_of_fashioniq(annotations):
    captions = real_captions(annotations("fashioniq") / "captions", "cap.*.train.json")
    verdict = judged(captions)
    kept = {phrase for phrase, against in verdict.items() if not against}
    assert {"black", "long sleeves", "v neck", "floral", "sleeveless", "striped", "silver", "sheer", "halter"} <= kept
    compared = {phrase for phrase, against in verdict.items() if against == "comparison"}
    assert {"longer", "darker", "shorter", "lighter", "brighter", "looser", "sexier", "bigger", "revealing"} <= compared
    assert not compared & {"shoulder", "silver", "flower", "center", "sweater", "zipper", "letter", "character"}
    assert not any(set(phrase.split()) & (DENIALS | STOP_WORDS) for phrase in kept if " " not in phrase)
    denied = sum(any(not said for text in texts for clause in spoken(text) for _, said in clause) for texts in captions)
    assert 0.15 < denied / len(captions) < 0.25  # mostly "no" and "less"


def test_real_captions_of_cirr(annotations):
    captions = real_captions(annotations("cirr") / "captions", "cap.rc2.val.json")
    kept, compared = candidates(captions), comparatives(captions)
    assert {"dog", "grass", "black", "two"} <= set(kept)
    assert {"smaller", "larger", "darker", "closer"} <= compared and not compared & {"water", "number", "paper", "beer"}
