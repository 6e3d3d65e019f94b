"Readings of attributes: the score and both terms against plain loops, and runs that read, stop, go on, are saved and refused."
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from helpers import ROOT, unit

from dqe_cir.core import generator
from dqe_cir.data import load_dataset
from dqe_cir.encoder import cache_tokens
from dqe_cir.evaluator import score_dataset
from dqe_cir.methods import METHODS
from dqe_cir.methods.base import parameter_groups
from dqe_cir.methods.readings import READING_OPTIONS, VOCABULARIES
from dqe_cir.readings import SHARPNESS, AttributeReadings
from dqe_cir.retriever import Retriever
from dqe_cir.trainer import build_method, fit, load_run, open_run, train_config, training_set
from dqe_cir.trainer.config import options_of
from dqe_cir.trainer.runs import trained_state
from dqe_cir.vocabulary import Vocabulary

READERS = [name for name, method in METHODS.items() if "readings" in options_of(method)]


# ---- the law of the score, and the terms

shapes = st.tuples(st.lists(st.integers(2, 5), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))


def drawn(sizes, dimension, rows, seed):
    "Readings of double precision with uneven weights, and unit vectors (rows,dimension)."
    draw = generator(seed, "readings")
    readings = AttributeReadings(tuple(sizes), dimension).double()
    with torch.no_grad():
        readings.directions.copy_(torch.randn(readings.directions.shape, generator=draw))
        readings.root.copy_(torch.rand(len(sizes), generator=draw))
    return readings, unit(torch.randn(rows, dimension, generator=draw, dtype=torch.float64)), draw


def loop_reading(readings, vector):
    "One list of shares per attribute, number by number."
    read, row = [], 0
    for size in readings.sizes:
        said = []
        for direction in readings.directions.tolist()[row:row + size]:
            length = math.sqrt(sum(x * x for x in direction))
            said.append(SHARPNESS * sum(x * y for x, y in zip(vector.tolist(), direction)) / length)
        highest = max(said)
        shares = [math.exp(value - highest) for value in said]
        read.append([share / sum(shares) for share in shares])
        row += size
    return read


@given(shapes)
def test_the_score_is_the_cosine_and_the_weighted_agreement_of_the_readings(shape):
    sizes, dimension, rows, states, seed = shape
    readings, query, draw = drawn(sizes, dimension, rows, seed)
    image = unit(torch.randn(rows, states, dimension, generator=draw, dtype=torch.float64))
    mean = unit(image.mean(1))
    with torch.no_grad(): score = torch.einsum("qd,ntd->qnt", readings.extend(query), readings.extend_image(image))
    assert score.shape == (rows, rows, states)
    for q in range(rows):
        asked = loop_reading(readings, query[q])
        for n in range(rows):
            shown = loop_reading(readings, mean[n])
            agreed = sum(weight * sum(a * b for a, b in zip(one, other)) for weight, one, other in zip(readings.weights.tolist(), asked, shown))
            assert_close(score[q, n], image[n] @ query[q] + agreed)


@given(shapes)
def test_readings_are_shares_and_the_plain_vector_stays_in_front(shape):
    sizes, dimension, rows, _, seed = shape
    readings, vectors, _ = drawn(sizes, dimension, rows, seed)
    with torch.no_grad(): read, extended = readings(vectors), readings.extend(vectors)
    assert (read > 0).all() and torch.equal(extended[:, :dimension], vectors)
    for part in read.split(list(sizes), -1): assert_close(part.sum(-1), torch.ones(rows, dtype=torch.float64))


def some_labels(sizes, rows, draw):
    "Labels (rows,K) whose parts sum to 1 or to 0, as a vocabulary makes them."
    parts = []
    for size in sizes:
        named = (torch.rand(rows, size, generator=draw) < 0.4).double()
        parts.append(named / named.sum(-1, keepdim=True).clamp(min=1))
    return torch.cat(parts, -1)


@given(shapes)
def test_the_words_term_is_the_loop(shape):
    "The mean over rows is the sum over attributes of the mean cross-entropy of the rows that name a value of it."
    sizes, dimension, rows, _, seed = shape
    readings, vectors, draw = drawn(sizes, dimension, rows, seed)
    labels = some_labels(sizes, rows, draw)
    read, expected = [loop_reading(readings, vector) for vector in vectors], 0.0
    for a, named in enumerate(labels.split(list(sizes), -1)):
        naming = [row for row in range(rows) if named[row].sum() > 0]
        entropies = [-sum(y * math.log(p) for y, p in zip(named[row].tolist(), read[row][a]) if y) for row in naming]
        if naming: expected += sum(entropies) / len(naming)
    with torch.no_grad(): found = readings.named_loss(vectors, labels)
    assert found.shape == (rows,) and found.mean().item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    silent = labels.sum(-1) == 0
    assert not found[silent].any(), "who names nothing teaches nothing"


@given(shapes)
def test_the_match_term_is_the_loop_and_the_target_stands_still(shape):
    sizes, dimension, rows, _, seed = shape
    readings, query, draw = drawn(sizes, dimension, rows, seed)
    target = unit(torch.randn(rows, dimension, generator=draw, dtype=torch.float64)).requires_grad_()
    query.requires_grad_()
    found = readings.agreement_loss(query, target)
    for row in range(rows):
        asked, shown = loop_reading(readings, query[row].detach()), loop_reading(readings, target[row].detach())
        apart = [sum(p * math.log(p / q) for p, q in zip(one, other)) for one, other in zip(shown, asked)]
        assert found[row].item() == pytest.approx(sum(apart) / len(apart), rel=1e-6, abs=1e-12)
    found.sum().backward()
    assert target.grad is None and (dimension == 1 or query.grad.abs().sum() > 0)
    with torch.no_grad(): assert_close(readings.agreement_loss(query, query), torch.zeros(rows, dtype=torch.float64))


@pytest.mark.parametrize("sizes, weight, message", [((), 0.2, "two values or more"), ((3, 1), 0.2, "two values or more"), ((2,), -0.1, "weight=-0.1 must be at least 0")])
def test_readings_that_cannot_be_are_refused(sizes, weight, message):
    with pytest.raises(ValueError, match=message): AttributeReadings(sizes, 4, weight)


# ---- parameters of a run

@pytest.mark.parametrize("recipe, kind", [("common", {"dqe_cir": "mined"}), ("paper", {})])
@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_says_whether_there_are_readings_and_what_is_given_wins(recipe, kind, method):
    values = {"method": method, "recipe": recipe}
    config = train_config(values)
    assert config.readings == kind.get(method, "none")
    clustered = (method, recipe) == ("dqe_cir", "common")
    assert config.batches == ("trns" if clustered else "plain")
    if method not in READERS: return
    for given_kind in VOCABULARIES: assert train_config({**values, "readings": given_kind}).readings == given_kind


def test_readings_are_nobody_elses():
    assert READERS == ["info_nce", "dqe_cir"] and all(set(READING_OPTIONS) <= options_of(METHODS[name]) for name in READERS)
    with pytest.raises(ValueError, match="readings=mined is not read by method sprc: leave it out"): train_config({"method": "sprc", "readings": "mined"})


@pytest.mark.parametrize("method", READERS)
@pytest.mark.parametrize("values, message", [
    ({"dataset": "cirr", "readings": "hand"}, "readings=hand: nobody has written word lists for cirr; choose mined"),
    ({"readings": "learned"}, "unknown readings 'learned'; choose one of none, mined, hand, paper"),
    ({"words_weight": -1.0}, "words_weight=-1.0 must be at least 0"), ({"readings_teach_from": 1.5}, "readings_teach_from=1.5 is a share"),
    ({"label_gaps": 0.7, "label_noise": 0.7}, "together at most 1")])
def test_what_cannot_be_read_is_refused_in_one_line(method, values, message):
    with pytest.raises(ValueError) as refused: train_config({"method": method, **values})
    assert message in str(refused.value) and "\n" not in str(refused.value)


# ---- runs, with the small encoder of `tests/golden` and the words that somebody wrote for garments

RUN = {"size": "smoke", "encoder": str(ROOT / "tests" / "golden" / "encoder"), "batch_size": 16, "epochs": 4, "evaluate_every": 0, "device": "cpu", "readings": "hand"}


@pytest.fixture(scope="module")
def splits(): return [load_dataset("garments", split=split, size="smoke") for split in ("train", "val")]


@pytest.fixture(scope="module")
def tokens(splits, tmp_path_factory):
    method = build_method(train_config({"method": "info_nce", **RUN}))
    return cache_tokens(method.encoder, splits, folder=tmp_path_factory.mktemp("tokens"), progress=False)


def trained(folder, splits, tokens, until=None, **options):
    "A run in a folder, trained to its end or stopped after some epochs, and its method."
    run = open_run(train_config({**RUN, **options, "run_dir": str(folder)}))
    method = build_method(run.config)
    fit(method, training_set(run.config, splits[0], tokens), run, until=until)
    return method, run


def scores_of(method, splits, tokens): return torch.cat([part.scores for part in score_dataset(method, splits[1], tokens)])


def steady(events): return [{name: value for name, value in event.items() if "seconds" not in name} for event in events]


def same(one, other): return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module", params=READERS)
def whole(request, splits, tokens, tmp_path_factory):
    "Name, method and run of a reader that trained without a stop."
    return request.param, *trained(tmp_path_factory.mktemp("whole"), splits, tokens, method=request.param)


def test_a_run_with_readings_learns_them_and_says_so(whole):
    name, method, run = whole
    losses = [event["loss"] for event in run.events if event["kind"] == "epoch"]
    assert all({"words", "match"} <= set(loss) for loss in losses) and [("gate" in loss) for loss in losses] == [False, True, True, True]
    assert losses[-1]["words"] < losses[0]["words"]
    assert method.vocabulary.sizes == (10, 3, 3, 3, 3) and not torch.allclose(method.readings.weights, torch.tensor(0.2))
    assert len({len(group["params"]) for group in parameter_groups(method, 1e-3, 0.0) if group["clip"] == "apart"}) and "readings.directions" in trained_state(method)


def test_a_stopped_run_goes_on_to_the_same_weights(whole, splits, tokens, tmp_path):
    name, method, run = whole
    trained(tmp_path / "run", splits, tokens, until=2, method=name)
    words = (tmp_path / "run" / "vocabulary.json").read_bytes()
    again, resumed = trained(tmp_path / "run", splits, tokens, method=name)
    assert same(trained_state(again), trained_state(method)) and steady(resumed.events) == steady(run.events)
    assert (tmp_path / "run" / "vocabulary.json").read_bytes() == words


def test_a_finished_run_is_loaded_with_equal_scores(whole, splits, tokens, tmp_path):
    name, method, run = whole
    expected = scores_of(method.eval(), splits, tokens)
    loaded, config = load_run(run.folder, "cpu")
    assert config.readings == "hand" and loaded.vocabulary == method.vocabulary
    assert torch.equal(scores_of(loaded, splits, tokens), expected)
    finished, _ = trained(run.folder, splits, tokens, method=name)
    assert torch.equal(scores_of(finished.eval(), splits, tokens), expected)
    with torch.no_grad(): loaded.readings.root.zero_()
    assert not torch.equal(scores_of(loaded, splits, tokens), expected), "the readings are part of the score"


def test_an_exported_folder_searches_as_the_run_does(whole, splits, tmp_path):
    name, method, run = whole
    retriever = Retriever.load(run.folder, "cpu")
    folder = retriever.save(tmp_path / "exported")
    again = Retriever.load(folder, "cpu", encoder=RUN["encoder"])
    assert json.loads((folder / "vocabulary.json").read_text()) == json.loads((run.folder / "vocabulary.json").read_text())
    reference = splits[1].gallery[0]
    for side in (retriever, again): side.index(splits[1])
    assert torch.equal(retriever.embeddings, again.embeddings)
    found = [[(hit.id, hit.score) for hit in side.search(reference, "is red and has long sleeves")] for side in (retriever, again)]
    assert found[0] == found[1]


def labels_of(folder, splits, tokens, **options):
    "The training labels that a run prepares in a folder."
    run = open_run(train_config({"method": "info_nce", **RUN, **options, "run_dir": str(folder)}))
    method = build_method(run.config)
    return method.prepare(splits[0], tokens, Path(folder)), method


def test_label_faults_are_the_runs_own_and_stay(splits, tokens, tmp_path):
    plain, method = labels_of(tmp_path / "plain", splits, tokens)
    spoiled, faults = [], {"label_gaps": 0.3, "label_noise": 0.2}
    for folder, seed in (("one", 0), ("one", 0), ("two", 0), ("three", 1)): spoiled.append(labels_of(tmp_path / folder, splits, tokens, seed=seed, **faults)[0])
    assert torch.equal(spoiled[0], spoiled[1]) and torch.equal(spoiled[0], spoiled[2]) and not torch.equal(spoiled[0], spoiled[3])
    named = gone = wrong = 0
    for before, after in zip(plain.split(method.vocabulary.sizes, 1), spoiled[0].split(method.vocabulary.sizes, 1)):
        rows = before.sum(1) > 0
        named, gone = named + rows.sum().item(), gone + (after[rows].sum(1) == 0).sum().item()
        wrong += ((after[rows].sum(1) > 0) & (after[rows] != before[rows]).any(1)).sum().item()
        assert not after[~rows].any(), "nothing is said for those who said nothing"
    assert gone / named == pytest.approx(0.3, abs=0.1) and wrong / named == pytest.approx(0.2, abs=0.1)


@pytest.mark.parametrize("kind", ["mined", "paper"])
@pytest.mark.parametrize("method", READERS)
def test_where_nothing_can_be_mined_a_run_says_so_and_trains(method, kind, splits, tokens, tmp_path):
    options = {"method": method, "readings": kind, "epochs": 2}
    with pytest.warns(UserWarning, match=f"readings={kind}: .* triplets of garments give no attribute .* trains without readings"):
        silent, run = trained(tmp_path / "run", splits, tokens, **options)
    assert silent.readings is None and json.loads((tmp_path / "run" / "vocabulary.json").read_text()) == Vocabulary({}).record()
    loaded, _ = load_run(run.folder, "cpu")
    plain, _ = trained(tmp_path / "plain", splits, tokens, **{**options, "readings": "none"})
    assert same(trained_state(plain), trained_state(silent))
    assert torch.equal(scores_of(loaded, splits, tokens), scores_of(plain.eval(), splits, tokens))
