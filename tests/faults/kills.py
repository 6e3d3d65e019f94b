"""A smoke run is killed at every event at which something is written: before it, in the middle of it and after it. The same command again must end
with the very weights and events of a run that nobody disturbed.

The writers are patched in the process that is killed: `replacing` (before the part is made, half-way through it, between part and name, after the
move), `append_jsonl` (before, with half a line, after) and `Path.unlink`."""
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open

from . import frame  # noqa: F401  whose lock for progress bars no killed process keeps

import dqe_cir.studies.ablation  # noqa: F401  so that every module is there to be patched
from dqe_cir import files
from dqe_cir.data import load_dataset
from dqe_cir.encoder import cache_tokens
from dqe_cir.trainer import build_method, fit, open_run, train_config, training_set
from dqe_cir.trainer.loop import SMOKE

OPTIONS = dict(SMOKE, epochs=4, warmup_epochs=1, refresh_every=1, refresh_left=1, evaluate_every=1, select_on="val", recipe="paper", device="cpu")
LOOKS = {1: 40.0, 2: 60.0, 3: 50.0, 4: 55.0}  # what a look at held-out queries says after each epoch


class Clock:
    "Counts the events at which something is written, and dies at one of them."

    def __init__(self, at: int, moment: str):
        self.count, self.at, self.moment = 0, at, moment

    def tick(self) -> bool:
        "Is this the event?"
        self.count += 1
        return self.count == self.at

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)


def patched_writers(clock: Clock):
    "The writers of `dqe_cir.files`, which everything of ours uses, made to die."
    replace, appended, unlink = os.replace, files.append_jsonl, Path.unlink

    def dying_replace(part, path):
        now = clock.tick()
        if now and clock.moment == "before": clock.die()
        if now and clock.moment == "middle":
            with open(part, "r+b") as file: file.truncate(max(1, os.path.getsize(part) // 2))
            clock.die()
        replace(part, path)
        if now: clock.die()

    def dying_append(path, **event):
        now = clock.tick()
        if now and clock.moment == "before": clock.die()
        if now and clock.moment == "middle":
            with open(path, "a") as file: file.write(json.dumps(event)[: len(json.dumps(event)) // 2])
            clock.die()
        appended(path, **event)
        if now: clock.die()

    def dying_unlink(self, missing_ok=False):
        exists = os.path.lexists(self) and not self.name.startswith(".")
        now = exists and clock.tick()
        if now and clock.moment != "after": clock.die()
        unlink(self, missing_ok)
        if now: clock.die()

    replace_all({"append_jsonl": dying_append})
    files.os.replace, Path.unlink = dying_replace, dying_unlink


def replace_all(names: dict):
    "Put functions in the place of those that modules of the package have imported."
    for module in [module for name, module in sys.modules.items() if name.startswith("dqe_cir")]:
        for name, function in names.items():
            if name in vars(module): setattr(module, name, function)


def run(folder: Path, tokens: Path, at: int, moment: str, told) -> None:
    "Train in a folder and die at the given event; 0: never, and tell how many events there were, and how many of them until all was encoded."
    clock = Clock(at, moment)
    patched_writers(clock)
    dataset = load_dataset("garments", split="train", size="smoke")
    config = train_config(OPTIONS | {"run_dir": str(folder)})
    method = build_method(config)
    data = training_set(config, dataset, cache_tokens(method.encoder, dataset, tokens, progress=False))
    encoded = clock.count
    run = open_run(config)
    fit(method, data, run, lambda method: {"mAP": LOOKS[1 + sum(event["kind"] == "epoch" for event in run.events)]})
    files.write_json(run.folder / "results.json", {"data": dataset.data})
    told.send((clock.count, encoded))


def start(folder: Path, tokens: Path, at: int = 0, moment: str = "before") -> tuple[int, tuple | None]:
    "`run` in a process of its own: the exit status, and what it told."
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=run, args=(folder, tokens, at, moment, theirs))
    process.start()
    theirs.close()
    try:
        told = ours.recv()
    except EOFError:
        told = None
    process.join()
    return process.exitcode, told


def outcome(folder: Path) -> tuple:
    "Weights (as bytes), their metadata, events without times, and the names of what lies in a run folder."
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}
        about = file.metadata()
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for event in events: event.pop("seconds", None)
    return weights, about, events, sorted(path.name for path in folder.iterdir())


def rounds(step: int = 1, first: int = 1):
    """Every kill, as (event, moment, does the run end as the undisturbed one does, what went wrong); from the `first` event on every so many. Kills before
    all images are encoded start from an empty token store, the others find it filled."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        status, told = start(place / "whole", place / "tokens")
        assert status == 0, "the undisturbed run failed"
        expected, (count, encoded) = outcome(place / "whole"), told
        for at in range(first, count + 1, step):
            for moment in ("before", "middle", "after"):
                folder, own = place / f"{at}-{moment}", place / (f"tokens-{at}-{moment}" if at <= encoded else "tokens")
                killed, _ = start(folder, own, at if at <= encoded else at - encoded, moment)
                assert killed == -signal.SIGKILL, f"event {at} {moment}: the run was not killed, but ended with {killed}"
                again, _ = start(folder, own)
                left = [path.name for path in [*own.rglob("*.part"), *folder.rglob("*.part"), *folder.rglob(".lock")]]
                same = again == 0 and outcome(folder) == expected
                yield at, moment, same and not left, f"exit status {again}" if again else "another end" if not same else f"left: {left}" if left else ""
