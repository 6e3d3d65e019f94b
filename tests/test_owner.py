"A run folder: one owner, one kind of data, one encoder, and a record that is never replaced by another kind's."
import dataclasses
import json
import multiprocessing
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from dqe_cir import core
from dqe_cir.data import load_dataset
from dqe_cir.encoder import cache_tokens, load_encoder
from dqe_cir.encoder.blip2 import MINI
from dqe_cir.evaluator import GalleryScores, evaluate_scores
from dqe_cir.files import DataError, owned, read_tensors
from dqe_cir.methods import METHODS
from dqe_cir.retriever import Retriever
from dqe_cir.trainer import build_method, fit, load_run, open_run, train_config, training_set
from dqe_cir.trainer import runs as runs_module
from dqe_cir.trainer.evaluation_config import evaluation_config, record_path
from dqe_cir.trainer.loop import SMOKE

QUICK = dict(SMOKE, epochs=2, evaluate_every=0, method="info_nce", device="cpu")


@pytest.fixture(scope="module")
def garments(home):
    return load_dataset("garments", split="train", size="smoke")


def started(garments, folder, until=None, **changes):
    "A training of seconds in a folder; returns its method and its run."
    config = train_config(QUICK | {"run_dir": str(folder)} | changes)
    method, run = build_method(config), open_run(config)
    tokens = cache_tokens(method.encoder, garments, progress=False)
    fit(method, training_set(config, garments, tokens), run, until=until)
    return method, run


HOLD = "import sys, time; from dqe_cir.files import owned\nwith owned(sys.argv[1]): print('held', flush=True); sys.stdin.readline()"


def test_a_second_training_is_told_who_holds_the_folder(garments, tmp_path):
    started(garments, tmp_path / "run", until=1)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(DataError, match=f"is being written to by process {holder.pid} on .*: wait for it, or choose another run_dir"):
        started(garments, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    holder.kill()  # however it dies, it holds nothing any more
    holder.wait()
    started(garments, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists() and not (tmp_path / "run" / ".lock").exists()


def named_folder(home):
    runs_module.runs_folder = lambda: home
    return str(open_run(train_config(QUICK)).folder)


def test_two_starts_at_once_get_two_folders(tmp_path):
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
        folders = list(pool.map(named_folder, [tmp_path / "runs"] * 8))
    assert len(set(folders)) == 8


def test_a_failed_start_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runs_module, "runs_folder", lambda: tmp_path / "runs")
    runs_module.check_place(train_config(QUICK))
    with pytest.raises(DataError, match="cannot be a folder"): runs_module.check_place(train_config(QUICK | {"run_dir": "x" * 300}))
    assert [path.name for path in tmp_path.rglob("*")] in ([], ["runs"])


def test_other_data_in_the_same_place_are_refused(garments, tmp_path):
    started(garments, tmp_path / "run", until=1)
    real = dataclasses.replace(garments, data="real")
    with pytest.raises(ValueError, match=r"what differs: the kind of data \(garments then, real now\)"): started(real, tmp_path / "run")
    fewer = dataclasses.replace(garments, triplets=garments.triplets[:-1])
    with pytest.raises(ValueError, match="what differs: the annotations"): started(fewer, tmp_path / "run")
    started(garments, tmp_path / "run")


def test_another_encoder_in_the_same_place_is_refused(garments, tmp_path):
    encoder = shutil.copytree(MINI, tmp_path / "encoder")
    changes = dict(encoder=str(encoder), epochs=2)
    started(garments, tmp_path / "run", until=1, **changes)
    other = load_encoder(str(encoder), "cpu")
    with torch.no_grad(): next(other.vision_tower.parameters()).add_(0.01)
    other.save_pretrained(encoder) if hasattr(other, "save_pretrained") else altered(encoder)
    with pytest.raises(ValueError, match="what differs: the encoder's weights"): started(garments, tmp_path / "run", **changes)
    shutil.rmtree(encoder)
    shutil.copytree(MINI, encoder)
    started(garments, tmp_path / "run", **changes)
    altered(encoder)
    with pytest.raises(DataError, match="is not the one that .* was trained with"): load_run(tmp_path / "run", "cpu")


def altered(folder):
    "Change one weight of the tower in an encoder's folder."
    from safetensors.torch import save_file
    path = folder / "model.safetensors"
    tensors, about = read_tensors(path)
    name = next(name for name in sorted(tensors) if "vision" in name and tensors[name].is_floating_point())
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path, metadata=about)


def test_an_edited_configuration_is_refused(garments, tmp_path):
    _, run = started(garments, tmp_path / "run")
    path = run.folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"aligned": not values["aligned"]}))
    with pytest.raises(DataError, match="config.json has other values of aligned than the weights beside it"): load_run(run.folder, "cpu")


def test_an_edited_export_is_refused_and_a_sound_one_keeps_what_it_stands_on(garments, tmp_path):
    _, run = started(garments, tmp_path / "run")
    folder = Retriever.load(run.folder, device="cpu").save(tmp_path / "shared")
    values = json.loads((folder / "config.json").read_text())
    assert values["made_from"] == json.loads((run.folder / "config.json").read_text())["made_from"]
    load_run(folder, "cpu")
    (folder / "config.json").write_text(json.dumps(values | {"aligned": not values["aligned"]}))
    with pytest.raises(DataError, match="other values of aligned"): load_run(folder, "cpu")


def test_a_method_that_was_built_by_hand_trains(garments, tmp_path):
    config = train_config(QUICK | {"run_dir": str(tmp_path / "run")})
    method = METHODS["info_nce"].from_config(load_encoder("mini", "cpu"), config)
    fit(method, training_set(config, garments, cache_tokens(method.encoder, garments, progress=False)), open_run(config))
    assert "encoder" not in json.loads((tmp_path / "run" / "config.json").read_text())["made_from"]


def test_a_record_of_another_kind_of_data_stays(tmp_path):
    record = tmp_path / "evaluation-cirr-val.json"
    record.write_text('{"data": "real"}')
    assert record_path(tmp_path, "evaluation-cirr-val", "real") == record
    assert record_path(tmp_path, "evaluation-cirr-val", "sample").name == "evaluation-cirr-val-sample.json"


def test_an_evaluation_takes_the_data_of_its_run(garments, tmp_path):
    _, run = started(garments, tmp_path / "run", data_root=str(garments.root))
    assert evaluation_config({"run_dir": str(run.folder)}).data_root == str(garments.root)
    assert evaluation_config({"run_dir": str(run.folder), "dataset": "circo"}).data_root == "", "of another data set, nothing is known"


def test_a_finished_run_in_a_folder_of_another_owner_is_read(garments, tmp_path):
    _, run = started(garments, tmp_path / "run")
    with owned(run.folder):
        times = lambda: {path.name: path.stat().st_mtime_ns for path in run.folder.iterdir() if path.name != ".lock"}
        before = times()
        method, again = started(garments, run.folder)
        assert again.finished and times() == before


# ---- numbers

def scores_of(dataset, value): return [GalleryScores(list(range(len(dataset.triplets))), dataset.gallery, torch.full((len(dataset.triplets), len(dataset.gallery)), value))]


def test_a_collapsed_model_ranks_last(garments):
    with pytest.warns(UserWarning, match="the scores do not tell images apart"): found = evaluate_scores(garments, scores_of(garments, 0.3))
    assert found.metrics["R@10"] == 0 and found.tied == 100


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(garments, value):
    scored = scores_of(garments, 0.0)
    scored[0].scores = torch.randn(scored[0].scores.shape, generator=core.generator(0))
    scored[0].scores[3, 5] = value
    with pytest.raises(ValueError, match="scores of 1 of .* queries are not finite, such as of reference"): evaluate_scores(garments, scored)


def test_a_few_equal_pictures_change_no_figure(garments):
    scored = scores_of(garments, 0.0)
    scored[0].scores = torch.randn(scored[0].scores.shape, generator=core.generator(1))
    plain = evaluate_scores(garments, scored)
    first = garments.triplets[0]
    other = next(name for name in garments.gallery if name not in (first.target, first.reference))
    scored[0].scores[0, scored[0].position[other]] = scored[0].scores[0, scored[0].position[first.target]]
    tied = evaluate_scores(garments, scored)
    assert tied.measures["rank"][0] <= plain.measures["rank"][0] and 0 < tied.tied < 100


def test_a_gradient_that_is_not_finite_stops_before_the_step(garments, tmp_path, monkeypatch):
    _, run = started(garments, tmp_path / "run", until=1)
    kept = (run.folder / "resume.safetensors").read_bytes()
    losses = METHODS["info_nce"].losses

    def odd(self, batch):
        terms = losses(self, batch)
        return terms | {"odd": (self.temperature * 0).abs().sqrt().expand(len(batch.texts))}  # zero, and its gradient is not

    monkeypatch.setattr(METHODS["info_nce"], "losses", odd)
    with pytest.raises(FloatingPointError, match=r"step \d+ \(epoch 2, images .* -> .*\): the gradient of .* is not finite: lower lr; the checkpoint of epoch 1 is good"):
        started(garments, tmp_path / "run")
    assert (run.folder / "resume.safetensors").read_bytes() == kept and not (run.folder / "model.safetensors").exists()
