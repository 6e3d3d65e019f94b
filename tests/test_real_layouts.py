"""Real annotation files with stand-in pictures, as a user has them: train and evaluate run from end to end, and the files for the servers are complete.

The pictures say nothing, so no figure is looked at but for its presence. `-m slow` takes more rows and goes through papermill."""
import json
import os
import re
import shutil

import pytest
from PIL import Image

from helpers import ROOT, data_in, papermill

from dqe_cir.core import generator, write_json
from dqe_cir.data import load_dataset
from dqe_cir.encoder import cache_tokens
from dqe_cir.evaluator import evaluate, protocol_for, submissions, write_submission
from dqe_cir.data import load_hp_fashioniq
from dqe_cir.evaluator import evaluate_preferences
from dqe_cir.trainer import build_method, evaluation_config, fit, load_run, open_run, train_config
from dqe_cir.trainer import training_origin, training_set

COLOURS = ("crimson", "navy", "olive", "gold", "teal", "purple", "gray", "orange")


def stand_ins(paths):
    "A small picture under each path: eight different files, hard links of them everywhere else."
    first = {}
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        if i % 8 in first: os.link(first[i % 8], path)
        else:
            Image.new("RGB", (8, 8), COLOURS[i % 8]).save(path)
            first[i % 8] = path


def read(path): return json.loads(path.read_text())


def fashioniq(source, root, rows):
    "The first rows of each category, with the images that they name and a few more."
    for split in ("train", "val"):
        for category in ("dress", "shirt", "toptee"):
            chosen = read(source / "captions" / f"cap.{category}.{split}.json")[:rows]
            named = {row[side] for row in chosen for side in ("candidate", "target")}
            every = read(source / "image_splits" / f"split.{category}.{split}.json")
            images = [name for i, name in enumerate(every) if name in named or i < 20]
            write_json(root / "captions" / f"cap.{category}.{split}.json", chosen)
            write_json(root / "image_splits" / f"split.{category}.{split}.json", images)
            stand_ins([path for name in images if not (path := root / "images" / f"{name}.png").exists()])


def cirr(source, root, rows):
    "Rows of val, all of test1; the training captions are not with us, so other rows of val stand in for them under training names."
    paths, queries = (read(source / folder / f"{kind}.rc2.val.json") for folder, kind in (("image_splits", "split"), ("captions", "cap")))
    named = lambda some: {name for row in some for name in row["img_set"]["members"]}
    for split, some in (("val", queries[:rows]), ("train", queries[-rows:])):
        kept = named(some)
        for row in some: kept |= {row["reference"], row["target_hard"], *row["target_soft"]}
        listing = {name: path for i, (name, path) in enumerate(paths.items()) if name in kept or i < 60}
        write_json(root / "captions" / f"cap.rc2.{split}.json", some)
        write_json(root / "image_splits" / f"split.rc2.{split}.json", listing)
        stand_ins([place for path in listing.values() if not (place := root / "img_raw" / path).exists()])
    for folder, kind in (("image_splits", "split"), ("captions", "cap")): shutil.copy(source / folder / f"{kind}.rc2.test1.json", root / folder)
    stand_ins([root / "img_raw" / path for path in read(root / "image_splits" / "split.rc2.test1.json").values()])


def circo(source, root, rows):
    "Rows of val, all of test; the gallery is what they name."
    for split, count in (("val", rows), ("test", None)): write_json(root / "annotations" / f"{split}.json", read(source / "annotations" / f"{split}.json")[:count])
    rows = [row for split in ("val", "test") for row in read(root / "annotations" / f"{split}.json")]
    named = sorted({image for row in rows for image in (row["reference_img_id"], *row.get("gt_img_ids", ()))})
    stand_ins([root / "unlabeled2017" / f"{image:012d}.jpg" for image in named])


def preferences(root):
    "Questions about the stand-ins, in the form of hpfiq.json."
    rows = read(root / "captions" / "cap.shirt.val.json")[:8]
    images = read(root / "image_splits" / "split.shirt.val.json")
    where = lambda name: f"/-/image_data/shirt/{name}.jpg"
    sets = lambda start: [{"img_path": [where(name) for name in images[start + i:start + i + 5]], "user_score": "3"} for i in range(len(rows))]
    lists = {"ref_img_paths": [where(r["candidate"]) for r in rows], "targ_img_paths": [where(r["target"]) for r in rows],
             "sentences": ["  and ".join(r["captions"]) + "dotmark" for r in rows], "retrieved_set1": sets(0), "retrieved_set2": sets(5), "preferred set": ["1", "2"] * 4}
    write_json(root / "hpfiq.json", {f"user_{i}": {"question_set_1": lists} for i in (1, 2)})


def lay_out(annotations, home, rows):
    for build in (fashioniq, cirr, circo): build(annotations(build.__name__), home / build.__name__, rows)
    preferences(home / "fashioniq")


@pytest.fixture(scope="module")
def home(annotations, tmp_path_factory):
    "A data folder with a few dozen real rows of each set, and all the queries that the servers want."
    folder = tmp_path_factory.mktemp("data")
    lay_out(annotations, folder, 8)
    with data_in(folder): yield folder


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory):
    "A finished run on FashionIQ and one on CIRR, and what each measured on its own validation split."
    finished = {}
    for dataset, method in (("fashioniq", "dqe_cir"), ("cirr", "info_nce")):
        folder = tmp_path_factory.mktemp(dataset)
        run = open_run(train_config({"dataset": dataset, "method": method, "epochs": 1, "batch_size": 8, "run_dir": str(folder), "device": "cpu", "select_on": "last"}))
        train, val = (load_dataset(dataset, split=split) for split in ("train", "val"))
        model = build_method(run.config)
        tokens = cache_tokens(model.encoder, [train, val], progress=False)
        fit(model, training_set(run.config, train, tokens), run)
        write_json(folder / "results.json", {"data": train.data, "metrics": evaluate(load_run(folder, "cpu")[0], val, tokens).metrics})
        finished[dataset] = folder
    return finished


def measured(run, dataset, split="val", **rules):
    "The method of a run, a split and its tokens."
    model, data = load_run(run, "cpu")[0], load_dataset(dataset, split=split)
    return model, data, cache_tokens(model.encoder, data, progress=False), protocol_for(dataset, **rules)


def test_training_on_real_rows_is_called_real(runs):
    for dataset, folder in runs.items():
        assert training_origin(folder) == {"trained_on": dataset, "trained_data": "real"}
        assert {"R@1", "R@10", "R@50", "mean"} <= set(read(folder / "results.json")["metrics"])


@pytest.mark.parametrize("trained, dataset, rules, queries, expected", [
    ("fashioniq", "fashioniq", {"preset": "mgur"}, 48, {"dress R@10", "shirt R@50", "mean"}), ("fashioniq", "cirr", {}, 8, {"R@5", "Rs@1", "mean"}),
    ("cirr", "fashioniq", {"preset": "covr"}, 24, {"toptee R@10", "mean"}), ("cirr", "circo", {}, 8, {"mAP@5", "mAP@50", "R@25"}),
    ("fashioniq", "circo", {"preset": "qure"}, 8, {"mAP@10", "R@10"})])
def test_a_run_is_evaluated_on_any_data_set(runs, trained, dataset, rules, queries, expected):
    result = evaluate(*measured(runs[trained], dataset, **rules))
    assert expected <= set(result.metrics) and len(result.top) == queries and all(0 <= value <= 100 for value in result.metrics.values())
    if dataset == "circo":
        aspects = {name for triplet in result.dataset.triplets for name in triplet.aspects}
        assert aspects and {f"{name} mAP@10" for name in aspects} <= set(result.metrics)
    removed = dataset == "cirr" or "removed" in result.protocol
    if removed: assert not [t for t, best in zip(result.dataset.triplets, result.top) if t.reference in best]


def check_cirr_file(content, metric, rows):
    "As the server's demo files are: keys, names, lengths."
    assert len(content) == 4150 and content["version"] == "rc2" and content["metric"] == metric
    for row in rows:
        ranking, length = content[str(row["pairid"])], {"recall": 50, "recall_subset": 3}[metric]
        assert len(ranking) == len(set(ranking)) == length and row["reference"] not in ranking
        assert all(re.fullmatch(r"test1-\d+-\d-img\d", name) for name in ranking)
        if metric == "recall_subset": assert set(ranking) <= set(row["img_set"]["members"])


def test_cirr_files(home, runs, golden, tmp_path):
    files = submissions(*measured(runs["fashioniq"], "cirr", "test1"))
    rows = read(home / "cirr" / "captions" / "cap.rc2.test1.json")
    demo = read(golden("cirr_metrics.json"))["test1"]
    for metric in ("recall", "recall_subset"):
        path = write_submission(tmp_path / metric, files[f"submission-cirr-test1-{metric}.json"])
        assert path.stat().st_size < 5_000_000
        content = read(path)
        check_cirr_file(content, metric, rows)
        assert len(content) == demo[metric]["n_keys"] and set(demo[metric]["first_entries"]) <= set(content) and demo[metric]["header"].items() <= content.items()
        assert {len(value) for key, value in content.items() if key.isdigit()} == set(demo[metric]["list_length"])


def test_circo_file(home, runs, tmp_path):
    content, = submissions(*measured(runs["cirr"], "circo", "test")).values()
    path = write_submission(tmp_path / "circo.json", content)
    content, references = read(path), {str(row["id"]): row["reference_img_id"] for row in read(home / "circo" / "annotations" / "test.json")}
    assert path.stat().st_size < 5_000_000 and set(content) == set(references) == {str(i) for i in range(800)}
    assert all(len(row) == len(set(row)) == 50 and all(type(image) is int for image in row) and references[key] not in row for key, row in content.items())


def test_preferences(home, runs):
    model, data = load_run(runs["fashioniq"], "cpu")[0], load_hp_fashioniq(home / "fashioniq")
    result = evaluate_preferences(model, data, cache_tokens(model.encoder, data, progress=False), generator(0, "people"))
    assert len(data.questions) == 16 and {"preference ratio", "agreement", "agreement low", "agreement high"} <= set(result.metrics)


def test_fashioniq_test_is_refused_before_anything_is_loaded(runs):
    ask = lambda **options: evaluation_config({"run_dir": str(runs["cirr"]), **options})
    with pytest.raises(ValueError, match="the test split of fashioniq has no targets"): ask(dataset="fashioniq", split="test")
    with pytest.raises(ValueError, match="cirr has no choice of gallery"): ask(dataset="cirr", gallery="val_union")


# ---- the same through the notebooks

def run_notebook(name, out, *parameters):
    done = papermill(ROOT / "nbs" / name, out, *parameters)
    assert done.returncode == 0, done.stderr[-2000:]


EVALUATIONS = [("fashioniq", "val", "mgur"), ("fashioniq", "val", "covr"), ("cirr", "val", ""), ("cirr", "test1", ""), ("circo", "val", "qure"), ("circo", "test", ""),
               ("hp_fashioniq", "val", "")]


def test_an_evaluation_by_papermill(home, runs, tmp_path):
    "One run trained on FashionIQ writes CIRCO's file: rules and training set are in record and title."
    run_notebook("evaluate.ipynb", tmp_path / "out.ipynb", ("run_dir", runs["fashioniq"]), ("dataset", "circo"), ("protocol", "qure"), ("device", "cpu"))
    record = read(runs["fashioniq"] / "evaluation-circo-val-kept-a_photo_of_that_caption.json")
    assert (record["trained_on"], record["trained_data"], record["data"], record["dataset"]) == ("fashioniq", "real", "real", "circo")
    assert record["rules"]["prompt"] == "a photo of $ that {caption}" and not record["rules"]["exclude_reference"] and "mAP@5" in record["metrics"]
    assert "dqe_cir trained on fashioniq, circo val" in (tmp_path / "out.ipynb").read_text() and "reference kept" in record["protocol"]


@pytest.mark.slow
def test_everything_by_papermill(annotations, tmp_path, monkeypatch):
    "Sixty-four rows of every file; both training sets; every kind of evaluation."
    lay_out(annotations, tmp_path / "data", 64)
    monkeypatch.setenv("DQE_CIR_DATA", str(tmp_path / "data"))
    for trained, evaluations in (("fashioniq", EVALUATIONS), ("cirr", [("fashioniq", "val", "covr"), ("circo", "test", "")])):
        run = tmp_path / trained
        run_notebook("train.ipynb", tmp_path / "out.ipynb", ("dataset", trained), ("method", "info_nce"), ("epochs", 1), ("evaluate_every", 0), ("run_dir", run), ("device", "cpu"))
        for dataset, split, preset in evaluations:
            run_notebook("evaluate.ipynb", tmp_path / "out.ipynb", ("run_dir", run), ("dataset", dataset), ("split", split), ("protocol", preset), ("device", "cpu"))
        records = [read(path) for path in run.glob("evaluation-*.json")]
        assert len(records) == len(evaluations) and {(r["trained_on"], r["trained_data"]) for r in records} == {(trained, "real")}
    for metric in ("recall", "recall_subset"):
        content = read(tmp_path / "fashioniq" / f"submission-cirr-test1-{metric}.json")
        check_cirr_file(content, metric, read(tmp_path / "data" / "cirr" / "captions" / "cap.rc2.test1.json"))
