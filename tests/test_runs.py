"The runners from the outside: sample data are called sample, wrong values stop a run, one seed gives one result."
import ast
import dataclasses
import json
import re

import nbformat
import pytest
import torch

from helpers import ROOT, papermill

from dqe_cir.data import load_dataset
from dqe_cir.encoder import cache_tokens
from dqe_cir.evaluator import evaluate
from dqe_cir.methods import METHODS
from dqe_cir.trainer import TrainConfig, build_method, fit, load_run, open_run, train_config, training_set
from dqe_cir.trainer.config import options_of, sometimes_read
from dqe_cir.trainer.loop import SMOKE


def train(out, *parameters): return papermill(ROOT / "nbs" / "train.ipynb", out, *parameters)


@pytest.mark.parametrize("dataset, expected", [("fashioniq", {"R@10", "R@50", "mean", "dress R@10"}), ("cirr", {"R@1", "Rs@1", "mean"})])
def test_an_absent_data_set_is_replaced_by_a_sample_that_says_so(home, tmp_path, dataset, expected):
    run = train(tmp_path / "out.ipynb", ("dataset", dataset), ("size", "smoke"), ("epochs", 1), ("batch_size", 16), ("run_dir", tmp_path / "run"))
    assert run.returncode == 0, run.stderr[-2000:]
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (record["dataset"], record["data"]) == (dataset, "sample") and expected <= set(record["metrics"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["dataset"] == dataset and config["epochs"] == 1
    assert record["selection"] == {"select_on": "val", "measure": "mean", "epoch": 1, "value": pytest.approx(record["metrics"]["mean"])}
    shown = (tmp_path / "out.ipynb").read_text()
    told = run.stderr.replace("\r", "\n")  # what somebody at the terminal saw meanwhile
    assert f"data/{dataset} is not there" in told and "epoch 1 of 1 · loss" in told and "should it be stopped" in told
    assert f"data/{dataset} is not there" in shown and "DRAWN SAMPLE, NOT THE REAL DATA" in shown
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"metrics.jsonl", "model.safetensors", "contact_sheet.png"}


@pytest.mark.parametrize("parameters, message", [
    ([("dataset", "cifar")], "unknown dataset 'cifar'; choose one of fashioniq, cirr, garments"),
    ([("dataset", "cirr"), ("data_root", "no/such/folder")], "no/such/folder"),
])
def test_a_wrong_value_stops_the_run_with_one_clear_line(home, tmp_path, parameters, message):
    run = train(tmp_path / "out.ipynb", *parameters)
    assert run.returncode != 0
    assert message in run.stderr.strip().splitlines()[-1], run.stderr[-500:]


def trained(folder, seed, method="info_nce"):
    run = open_run(train_config({**SMOKE, "seed": seed, "method": method, "run_dir": str(folder), "device": "cpu"}))
    train, val = (load_dataset("garments", split=split, size="smoke") for split in ("train", "val"))
    model = build_method(run.config)
    tokens = cache_tokens(model.encoder, [train, val], progress=False)
    fit(model, training_set(run.config, train, tokens), run)
    model, _ = load_run(folder, "cpu")
    return model.state_dict(), evaluate(model, val, tokens).metrics


@pytest.mark.parametrize("method", list(METHODS))
def test_one_seed_one_result(home, tmp_path, method):
    (first, metrics), (again, same), (other, different) = (trained(tmp_path / name, seed, method) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert metrics == same and all(torch.equal(first[name], again[name]) for name in first)
    assert metrics != different and any(not torch.equal(first[name], other[name]) for name in first)


# ---- the parameters cell of nbs/train.ipynb

def parameter_groups():
    "The groups of the cell: heading -> {name: (type, default)}."
    cells = nbformat.read(ROOT / "nbs" / "train.ipynb", 4).cells
    cell = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    groups = {}
    for text in cell.split("\n\n"):
        heading, *lines = text.splitlines()
        assert heading.startswith("# "), f"a group without a heading: {heading}"
        groups[heading] = {node.target.id: (node.annotation.id, ast.literal_eval(node.value)) for node in ast.parse("\n".join(lines)).body}
    return groups


def test_the_cell_holds_every_parameter_with_its_type_and_default():
    cell = [(name, *rest) for group in parameter_groups().values() for name, rest in group.items()]
    fields = [(field.name, str(getattr(field.type, "__name__", field.type)).removesuffix(" | None"), field.default) for field in dataclasses.fields(TrainConfig)]
    assert sorted(cell, key=str) == sorted(fields, key=str)


@pytest.mark.parametrize("heading", list(parameter_groups()))
def test_a_heading_names_exactly_the_methods_that_read_its_parameters(heading):
    "`read by X only` and `read by X and Y` are true of every parameter below; what stands elsewhere is read by every run."
    if "each method reads some" in heading: return  # switches of a recipe: the page of the configuration has the table
    said = re.search(r"read by (.+?)(?: only)?$", heading)
    named = set(re.split(r", | and ", said[1])) if said else set()
    assert named <= set(METHODS)
    for name in parameter_groups()[heading]:
        assert (name in sometimes_read()) == bool(named), f"{name} under {heading!r}"
        for form in (lambda method: method, lambda method: method.native or method):
            assert {method for method, kind in METHODS.items() if name in options_of(form(kind))} == named, f"{name} under {heading!r}"
