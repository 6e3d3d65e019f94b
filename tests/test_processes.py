"""Two real processes train what one trains: the same losses, the same negatives, the same weights; and a run outlives them.

Shares, gradients and what is drawn are laws of the page `trainer/00_processes`, played by threads. Here accelerate starts processes that
talk over gloo. They are forked from this one, on one thread each, so a start costs little."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from helpers import ROOT, papermill

from dqe_cir.data import load_dataset
from dqe_cir.encoder import MINI, cache_tokens
from dqe_cir.encoder.tokens import StoredRows
from dqe_cir.files import read_jsonl, write_json
from dqe_cir.trainer import build_method, fit, launching, loop, train_config, training_set
from dqe_cir.trainer.launching import shared_run, together
from dqe_cir.trainer.processes import joined
from dqe_cir.trainer.step import Stepper

WIDE = dict(zone_low=0.0, zone_high=0.9, zone_guard=0.0)  # a zone with something in it, with a model that knows nothing yet


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    "The mini encoder without dropout: its losses are a law."
    folder = shutil.copytree(MINI, tmp_path_factory.mktemp("encoder") / "still")
    config = json.loads((folder / "config.json").read_text())
    config["qformer_config"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def settings(encoder, folder, **changes):
    "A run of few steps: four batches an epoch and a refresh before the second."
    fixed = dict(encoder=encoder, size="smoke", batch_size=48, epochs=2, lr=1e-4, device="cpu", evaluate_every=0, run_dir=str(folder))
    return train_config(fixed | changes)


def train_until(config, until, count):
    "What `train` does, up to an epoch; each process makes sure of the others."
    processes = joined(config.device)
    assert processes.count == count == (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    run = shared_run(config, processes)
    train_set = load_dataset("garments", split="train", size="smoke")
    method = build_method(config)
    with processes.first(): tokens = cache_tokens(method.encoder, train_set, progress=False)
    data = training_set(config, train_set, tokens)
    fit(method, data, run, until=until, processes=processes)
    if processes.main and data.negatives: write_json(run.folder / "pools.json", data.negatives.pools.tolist() if data.negatives.pools is not None else [])


def run_in(count, config, until=None):
    if count == 1: train_until(config, until, 1)
    else: together(train_until, (config, until, count), count)


NEAR = ("seconds", "temperature", "delta", "zone_bounds", "counts")  # scores differ in the seventh digit, and may fall into the next step of a histogram


def mined(folder):
    "What was drawn from, what was drawn, and whose words are read."
    return {name: (Path(folder) / name).read_text() for name in ("pools.json", "negatives.json", "vocabulary.json") if (Path(folder) / name).exists()}


def figures(folder):
    "All losses of a run, flat, and what it said of its refreshes but their seconds."
    losses, reports = {}, []
    for event in read_jsonl(Path(folder) / "metrics.jsonl"):
        if event["kind"] == "epoch": losses |= {f"{event['epoch']} {name}": value for name, value in event["loss"].items()}
        if event["kind"] == "refresh": reports.append({name: value for name, value in event.items() if name not in NEAR})
    return losses, reports


def same(one, other):
    "Two finished runs learned the same."
    (losses, reports), (others, repeated) = figures(one), figures(other)
    assert losses.keys() == others.keys() and losses
    for name in losses: assert others[name] == pytest.approx(losses[name], abs=1e-5), name
    assert reports == repeated and mined(one) == mined(other)
    weights, repeated = (load_file(Path(folder) / "model.safetensors") for folder in (one, other))
    assert weights.keys() == repeated.keys()
    for key, value in weights.items():  # the softmax cancels what the keys' biases add: they have no gradient, but noise that AdamW enlarges
        if not key.endswith("key.bias"): assert_close(repeated[key], value, rtol=0, atol=1e-5, msg=lambda said: f"{key}: {said}")


METHODS = {
    "dqe_cir": dict(method="dqe_cir", readings="hand", warmup_epochs=1, **WIDE),  # clustered batches, labels
    "dqe_cir, paper": dict(method="dqe_cir", recipe="paper", warmup_epochs=1, accumulate=2, zone="quantile", **WIDE),
    "qure": dict(method="qure", warmup_epochs=1, negatives_per_query=2),
    "sprc": dict(method="sprc", epochs=1),
    "info_nce": dict(method="info_nce", epochs=1, recipe="paper"),
}


@pytest.mark.parametrize("name", list(METHODS))
def test_two_processes_train_what_one_trains(name, still, home, tmp_path):
    for count in (1, 2): run_in(count, settings(still, tmp_path / str(count), **METHODS[name]))
    same(tmp_path / "1", tmp_path / "2")
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == sorted(path.name for path in (tmp_path / "2").iterdir())


# ---- another number, and none

@pytest.fixture(scope="module")
def whole(still, home, tmp_path_factory):
    "A run of one process, its negatives mined before the second epoch."
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_in(1, settings(still, folder, **METHODS["dqe_cir"]))
    return folder


@pytest.mark.parametrize("counts", [(2, 1), (1, 2)])
def test_a_run_goes_on_in_another_number_of_processes(counts, whole, still, tmp_path):
    config = settings(still, tmp_path / "run", **METHODS["dqe_cir"])
    for count, until in zip(counts, (1, None)): run_in(count, dataclasses.replace(config, processes=count), until)
    same(whole, tmp_path / "run")


def lose_one(config):
    "The second process is killed in the middle of the second epoch."
    set_rate, seen = Stepper.set_rate, []
    def stop(stepper, factor):
        seen.append(factor)
        if stepper.processes.rank == 1 and len(seen) == 4: os.kill(os.getpid(), signal.SIGKILL)
        set_rate(stepper, factor)
    Stepper.set_rate = stop  # in this process alone
    train_until(config, None, 2)


def test_a_killed_process_ends_the_others_in_one_line_and_the_run_goes_on(whole, still, tmp_path):
    config = settings(still, tmp_path / "run", **METHODS["dqe_cir"])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError) as ended: together(lose_one, (config,), 2)
    said = str(ended.value)
    assert "process 1 of 2 was killed (SIGKILL)" in said or "process 0 of 2 has lost another one" in said
    assert "\n" not in said and said.endswith("finished epochs are kept: start it again with its run_dir, in as many processes as you like")
    assert signal.getsignal(signal.SIGINT) is before
    assert [event["kind"] for event in read_jsonl(tmp_path / "run" / "metrics.jsonl")][:1] == ["epoch"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    run_in(1, config)
    same(whole, tmp_path / "run")


def refuse(config):
    "The process that does not write meets what is wrong with the data."
    processes = joined(config.device)
    if not processes.main: raise ValueError("captions.json, row 3, names\nno target: correct it")
    processes.wait()


def test_what_one_process_finds_wrong_is_said_as_it_would_say_it_alone(still, tmp_path):
    with pytest.raises(RuntimeError) as ended: together(refuse, (settings(still, tmp_path / "run", method="info_nce"),), 2)
    assert str(ended.value).startswith(("captions.json, row 3, names no target: correct it", "process 0 of 2 has lost another one"))


# ---- as people start them

def words(**values):
    return [word for name, value in values.items() for word in ("-p", name, str(value))]


SMALL = dict(method="info_nce", size="smoke", batch_size=48, epochs=1, lr=1e-4, device="cpu", evaluate_every=0)


def command(*arguments, home):
    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"} | dict(PYTHONPATH=str(ROOT), DQE_CIR_DATA=str(home), OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_the_command_trains_and_refuses_in_one_line(home, still, tmp_path):
    done = command("dqe_cir.trainer", *words(**SMALL, encoder=still, processes=2, run_dir=tmp_path / "run"), home=home)
    assert done.returncode == 0 and f"run folder: {tmp_path / 'run'}" in done.stdout, done.stderr
    assert [event["kind"] for event in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == ["epoch"]


@pytest.mark.slow
def test_accelerate_launches_it(home, still, tmp_path):
    launch = "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m"
    done = command(*launch, "dqe_cir.trainer", *words(**SMALL, encoder=still, run_dir=tmp_path / "run"), home=home)
    assert done.returncode == 0 and (tmp_path / "run" / "model.safetensors").exists(), done.stderr
    refused = command(*launch, "dqe_cir.trainer", *words(**SMALL, processes=3), home=home)
    assert refused.returncode != 0 and refused.stderr.count("processes=3, but 2 were launched: leave it out\n") == 1


@pytest.mark.slow
def test_the_notebook_starts_them(home, still, tmp_path):
    given = {**SMALL, "encoder": still, "run_dir": str(tmp_path / "run")}
    done = papermill(ROOT / "nbs" / "train.ipynb", tmp_path / "train.ipynb", *given.items(), ("processes", 2), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    assert record["metrics"]["R@10"] > 0 and "Launching training on 2" in (tmp_path / "train.ipynb").read_text()


# ---- what a command is asked for reaches the training, and what is wrong is said before there is a folder

def test_categories_and_the_place_of_tokens_reach_the_training(home, tmp_path, monkeypatch):
    seen = []
    for place in (launching, loop): monkeypatch.setattr(place, "fit", lambda method, data, *rest, **more: seen.append(data))
    asked = dict(method="info_nce", dataset="fashioniq", size="smoke", categories="dress", tokens_on="disk", device="cpu")
    launching.train(train_config(asked | {"run_dir": str(tmp_path / "run")}))
    loop.smoke_run(**asked)
    for data in seen:
        assert set(data.dataset.galleries) == {"dress"} and isinstance(data.tokens.tokens, StoredRows)
    assert len(seen) == 2


@pytest.mark.parametrize("wrong, said", [(dict(dataset="cirr", data_root="/nowhere"), "/nowhere"), (dict(start_from="/nowhere"), "start_from=/nowhere is no run"),
                                         (dict(start_from="garments", method="info_nce"), "start_from=garments holds weights of method dqe_cir, not info_nce")])
def test_a_command_that_cannot_begin_says_so_in_one_line_and_leaves_no_folder(wrong, said, tmp_path, capsys):
    assert launching.main(words(**wrong, run_dir=tmp_path / "run")) == 1
    out, problem = capsys.readouterr()
    assert said in problem and problem.count("\n") == 1 and not out and not (tmp_path / "run").exists()


def test_a_command_says_what_it_begins_from_and_how_a_stopped_one_goes_on(tmp_path, capsys, monkeypatch, home):
    monkeypatch.setattr(launching, "fit", mock.Mock(side_effect=KeyboardInterrupt))
    assert launching.main(words(start_from="garments", size="smoke", device="cpu", run_dir=tmp_path / "run")) == 130
    out, problem = capsys.readouterr()
    assert out.startswith("begins from garments (dqe_cir on ") and f"\nrun folder: {tmp_path / 'run'}\n" in out
    assert problem.endswith("stopped; finished epochs are kept: start it again with its run_dir, in as many processes as you like\n")
