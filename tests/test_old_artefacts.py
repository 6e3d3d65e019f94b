"""What earlier code left behind still loads, and still means the same numbers.

`tests/golden/README.md` says how the two run folders were made. They and the numbers of `old_artefacts.npz` are never made again:
they stand for the folders that people have. Only the searches of the shipped model follow it when it is exported anew:

    python tests/test_old_artefacts.py --write
"""
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from helpers import PAIRWISE, ROOT

from dqe_cir.data import load_dataset
from dqe_cir.encoder import cache_tokens
from dqe_cir.evaluator import evaluate, score_dataset
from dqe_cir.methods import METHODS
from dqe_cir.methods.zoo import TRAIN_FREE
from dqe_cir.retriever import Retriever
from dqe_cir.retriever.drawn import drawn_at_once
from dqe_cir.retriever.share import export
from dqe_cir.trainer.config import as_meant
from dqe_cir.trainer import build_method, fit, load_run, open_run, train_config, training_set

GOLDEN = ROOT / "tests" / "golden"
CLOSE = 1e-4  # relative: another processor adds in another order; the one that wrote the numbers repeats them to the last digit

OLD = {"method": "dqe_cir", "encoder": "encoder", "size": "smoke", "epochs": 2, "batch_size": 16, "evaluate_every": 1, "device": "cpu", "run_dir": "old_run"}
BEFORE = {**PAIRWISE, "temperature": 0.07, "captions": "own"}  # what these runs did before a recipe said otherwise; their folders do not name it
STOPPED = {"method": "dqe_cir", "encoder": "encoder", "size": "smoke", "epochs": 3, "batch_size": 16, "lr": 2e-4, "warmup_epochs": 1, "refresh_every": 2,
           "evaluate_every": 0, "device": "cpu", "run_dir": "stopped_run"}


@pytest.fixture(scope="module")
def expected(): return {name: torch.from_numpy(values) for name, values in np.load(GOLDEN / "old_artefacts.npz").items()}


@pytest.fixture(scope="module")
def splits(): return [load_dataset("garments", split=split, size="smoke") for split in ("train", "val")]


@pytest.fixture
def home(tmp_path, monkeypatch):
    "The working folder of a copy of the old artefacts: the runs name their encoder by a path that starts there."
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return tmp_path / "golden"


def tokens_of(method, splits, folder): return cache_tokens(method.encoder, splits, folder=folder / "tokens", progress=False)


def scores_of(method, dataset, tokens): return torch.cat([part.scores for part in score_dataset(method, dataset, tokens)])


def norms_of(method): return torch.stack([value.detach().float().norm() for _, value in sorted(method.named_parameters()) if value.requires_grad])


def test_an_old_run_scores_as_it_did(home, splits, expected):
    method, config = load_run(home / "old_run", "cpu")
    assert (config.method, config.epochs, config.negatives, config.aligned) == ("dqe_cir", 2, "trns", True)
    tokens = tokens_of(method, splits, home)
    assert_close(scores_of(method, splits[1], tokens), expected["old_run"], rtol=CLOSE, atol=1e-6)
    record = json.loads((home / "old_run" / "results.json").read_text())
    assert evaluate(method, splits[1], tokens).metrics == pytest.approx(record["metrics"], rel=CLOSE)


def test_an_old_run_is_finished_and_not_trained_again(home, splits, expected):
    "The same parameters find their folder, whatever parameters there are besides; `fit` loads it."
    before = {path.name: path.read_bytes() for path in (home / "old_run").iterdir()}
    run = open_run(train_config(OLD | BEFORE))
    method = build_method(run.config)
    tokens = tokens_of(method, splits, home)
    events = fit(method, training_set(run.config, splits[0], tokens), run)
    assert [(event["kind"], event["epoch"]) for event in events] == [("epoch", 1), ("refresh", 2), ("epoch", 2)]
    assert {path.name: path.read_bytes() for path in (home / "old_run").iterdir()} == before
    assert_close(scores_of(method, splits[1], tokens), expected["old_run"], rtol=CLOSE, atol=1e-6)


@pytest.mark.parametrize("folder", [OLD, STOPPED], ids=lambda folder: folder["run_dir"])
def test_an_old_run_is_not_taken_for_one_of_todays_recipe(home, folder):
    with pytest.raises(ValueError, match="holds a run with other values of (.*): choose another run_dir") as refused: open_run(train_config(folder))
    named = refused.match("other values of (.*): choose") and str(refused.value).split("values of ")[1].split(": choose")[0].split(", ")
    assert {"temperature", "captions", "readings", "batches", "attribute_mode", "contrastive_weight"} <= set(named)


def test_what_an_old_run_did_not_name_is_what_its_method_did():
    "Only two methods read smoothed labels and aligned states, whatever the schedule wrote into the folder."
    for method, options in {"info_nce": {}, "sprc": {}, "qure": {"warm_up": "random"}, "dqe_cir": {"warm_up": "contrastive", "temperature": 0.07}}.items():
        meant = as_meant({"method": method, "aligned": True, "label_smoothing": 0.2, "warmup_epochs": 8})
        read = method in ("info_nce", "dqe_cir")
        assert (meant["aligned"], meant["label_smoothing"]) == (read, 0.2 * read), method
        asked = {"temperature": None, "warm_up": None, "captions": "own", "recipe": None, "readings": "none", "batches": "plain"}
        assert {name: meant[name] for name in asked} == asked | options


def every_state(attention, arguments, options):
    "Where the last layer computed all states, and so drew dropout masks for all of them."
    options.pop("read", None)


def test_a_stopped_run_goes_on_to_the_same_end(home, splits, expected, monkeypatch):
    """The checkpoint holds weights, moments and pools after two of three epochs; the third draws its batches, texts, negatives and dropout masks anew.
    The numbers are those of a last layer that computes every state, read or not: what is not read moves nothing but the masks."""
    monkeypatch.setattr("dqe_cir.encoder.blip2.only_read", every_state)
    torch.manual_seed(0)
    kept = torch.nn.functional.dropout(torch.ones(64), 0.5) > 0
    if not torch.equal(kept, expected["dropout"]): pytest.skip("this build of torch draws other dropout masks than the one that wrote the numbers")
    run = open_run(train_config(STOPPED | BEFORE))
    method = build_method(run.config)
    tokens = tokens_of(method, splits, home)
    events = fit(method, training_set(run.config, splits[0], tokens), run)
    assert [(event["kind"], event["epoch"]) for event in events] == [("epoch", 1), ("refresh", 2), ("epoch", 2), ("epoch", 3)]
    assert events[-1]["loss"] == pytest.approx(dict(zip(("total", "preference", "ranking", "colour", "shape"), expected["resumed losses"].tolist())), rel=CLOSE)
    assert_close(norms_of(method), expected["resumed norms"], rtol=CLOSE, atol=1e-4)
    assert_close(scores_of(method, splits[1], tokens), expected["resumed"], rtol=CLOSE, atol=1e-6)
    assert (home / "stopped_run" / "model.safetensors").exists() and not (home / "stopped_run" / "resume.safetensors").exists()


def test_what_queries_were_taught_is_listed(home, splits):
    "`negatives.json`: one entry per training query, in its order."
    taught = json.loads((home / "old_run" / "negatives.json").read_text())
    assert [(row["reference"], row["target"]) for row in taught] == [(t.reference, t.target) for t in splits[0].triplets]
    assert all(row["negatives"] and row["target"] not in row["negatives"] for row in taught)


def test_an_old_run_that_was_handed_on_is_searched(home, tmp_path):
    "Sub-queries, gate, maps and lessons are there, as the model that shipped before had them, and nothing is read."
    folder = export("old_run", tmp_path / "shared")
    retriever = Retriever.load(folder, "cpu", encoder="encoder")
    query = drawn_at_once("garments", "val", "smoke").triplets[3]
    found = {gate: retriever.search(query.reference, "is red", 10, gate) for gate in ("learned", "off", (0, 1, 0))}
    assert len(retriever) == 180 and retriever.parts == ("plain query", "colour", "shape") and not (folder / "vocabulary.json").exists()
    assert len({tuple(result.score for result in results) for results in found.values()}) == 3
    why = retriever.explain(query.reference, "is red", found["learned"][0].id)
    assert why.maps.shape == (2, 4, 4) and why.readings == [] and sum(why.contributions) == pytest.approx(found["learned"][0].score, abs=1e-5)
    assert retriever.nearest_lessons(query.reference, "is red")[0].negatives


# ---- the shipped model

TEXTS = ("is red and has long sleeves", "is shorter and has a v neckline", "the same in blue with stripes", "is plain black and sleeveless")


def searches():
    "Four requests on four garments of the shipped index, with the learned gate and without: the ten best ids and their scores."
    retriever = Retriever.load("garments", "cpu")
    references = [retriever.ids[i * len(retriever) // len(TEXTS)] for i in range(len(TEXTS))]
    found = []
    for reference, text in zip(references, TEXTS):
        for gate in ("learned", "off"):
            results = retriever.search(reference, text, 10, gate)
            found.append({"reference": reference, "text": text, "gate": gate, "found": {result.id: result.score for result in results}})
    return found


def test_the_shipped_model_finds_what_it_found():
    stored = json.loads((GOLDEN / "searches.json").read_text())
    for now, before in zip(searches(), stored, strict=True):
        assert {name: now[name] for name in ("reference", "text", "gate")} == {name: before[name] for name in ("reference", "text", "gate")}
        assert list(now["found"]) == list(before["found"]), f"the order of {before['text']!r} on {before['reference']}"
        assert now["found"] == pytest.approx(before["found"], rel=CLOSE)


# ---- the records

RECORDS = sorted((ROOT / "data" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_loads(path):
    "Runs by condition and seed, every condition with its parameters; or the one run of a folder, with what the contract asks of it."
    record = json.loads(path.read_text())
    assert record.get("command") or record.get("method") in {*METHODS, *TRAIN_FREE}
    for run in record.get("runs", [record] if "metrics" in record else []):
        assert all(math.isfinite(value) for value in run["metrics"].values() if value is not None) and 0 <= run["metrics"]["mAP"] <= 100
    if "conditions" in record:
        assert {run["condition"] for run in record["runs"]} == set(record["conditions"])
        assert all(parameters["method"] in METHODS for parameters in record["conditions"].values())
        assert len({(run["condition"], run["seed"]) for run in record["runs"]}) == len(record["runs"])
    if "reference_points" in record: assert {"dataset", "data", "protocol", "method", "encoder", "seed", "metrics"} <= set(record)


def test_there_are_records(): assert {"evidence", "garments-dqe_cir-seed0"} <= {path.stem for path in RECORDS}


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]: raise SystemExit("usage: python tests/test_old_artefacts.py --write")
    torch.set_num_threads(1)
    (GOLDEN / "searches.json").write_text(json.dumps(searches(), indent=1) + "\n")
    print(f"{GOLDEN / 'searches.json'} written")
