"Runs followed by the real libraries, where they are installed: what they kept is what the run folder says."
import json
import math

import pytest

from dqe_cir.data import load_dataset
from dqe_cir.encoder import cache_tokens
from dqe_cir.trainer import build_method, fit, open_run, train_config, training_set
from dqe_cir.trainer.loop import SMOKE
from dqe_cir.trainer.trackers import curves


@pytest.fixture(scope="module")
def train_set(home): return load_dataset("garments", split="train", size="smoke")


def followed_run(train_set, folder, tracker, epochs=2):
    "A run of the small garments that tells a tracker of its epochs."
    run = open_run(train_config({**SMOKE, "method": "info_nce", "epochs": epochs, "evaluate_every": 0, "run_dir": str(folder), "log_to": tracker}))
    method = build_method(run.config)
    fit(method, training_set(run.config, train_set, cache_tokens(method.encoder, train_set, progress=False)), run)
    return run


def told(run):
    "Epoch to the curves of its event, as `metrics.jsonl` has them."
    events = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return {event["epoch"]: curves({name: value for name, value in event.items() if name not in ("epoch", "event", "kind")}, "epoch/")
            for event in events if "loss" in event}


def test_tensorboard_reads_back_what_the_run_wrote(train_set, tmp_path):
    "Every curve of every epoch, once each, also after the run went on from where it was stopped."
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = followed_run(train_set, tmp_path / "run", "tensorboard")
    kept = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    expected = told(run)
    assert set(kept.Tags()["scalars"]) == set().union(*expected.values()) and "epoch/loss/total" in kept.Tags()["scalars"]
    for name in kept.Tags()["scalars"]:
        assert [(point.step, pytest.approx(point.value, rel=1e-6)) for point in kept.Scalars(name)] == [(epoch, values[name]) for epoch, values in expected.items() if name in values]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_dashboard_is_told_the_same(train_set, tmp_path, monkeypatch, name):
    "Without any network: wandb offline, trackio in a folder of its own. wandb has a new `log` for every run, so it is listened to from its `init` on."
    for variable, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}.items():
        monkeypatch.setenv(variable, value)
    library, heard = pytest.importorskip(name, reason=f"pip install {name}"), []
    begin = library.init

    def init(**about):
        begun, log = begin(**about), library.log

        def listened(values, step):
            heard.append((step, dict(values)))
            log(values, step=step)

        library.log = listened
        return begun

    monkeypatch.setattr(library, "log", library.log)  # set back to what it was
    monkeypatch.setattr(library, "init", init)
    run = followed_run(train_set, tmp_path / "run", name)
    assert heard == [(epoch, {**values, "epoch": epoch}) for epoch, values in told(run).items()] and [step for step, _ in heard] == [1, 2]
    kept = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".wandb", ".db"))
    assert len(kept) == 1 and kept[0].stat().st_size > 0 and run.tracker is None
