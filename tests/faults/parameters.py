"Parameters as people mistype them: of training, evaluation, an ablation and a leaderboard."
import dataclasses
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dqe_cir.core import resolve_device
from dqe_cir.files import write_json
from dqe_cir.studies.ablation import StudyConfig, study_config
from dqe_cir.studies.leaderboard import LeaderboardConfig, leaderboard_config
from dqe_cir.trainer import EvaluateConfig, TrainConfig, evaluation_config, train_config
from dqe_cir.trainer.runs import check_place

from .frame import Case

ODD = [[1], {"a": 1}, b"x", 1 + 2j, (None,)]
NUMBERS = [float("nan"), float("inf"), -float("inf"), -1, -0.5, 10**12, 1e300]
LOOSE = {"seed", "head_rate", "lr", "weight_decay", "temperature", "zone_guard", "zone_high", "zone_low", "refresh_left", "evaluate_every", "refresh_every"}


def texts(cls): return [field.name for field in dataclasses.fields(cls) if field.type is str]
def numbers(cls): return [field.name for field in dataclasses.fields(cls) if field.type in (int, float) or field.type in (int | None, float | None)]


def a_run(folder: Path) -> str:
    write_json(folder / "run" / "config.json", dataclasses.asdict(train_config({})))
    return str(folder / "run")


def trained(values): return lambda folder: lambda: train_config(values)
def evaluated(values): return lambda folder: lambda: evaluation_config({"run_dir": a_run(folder)} | values)
def studied(values): return lambda folder: lambda: study_config({"study": str(folder)} | values)
def compared(values): return lambda folder: lambda: leaderboard_config({"study": str(folder)} | values)


KINDS = {"training": (TrainConfig, trained), "evaluation": (EvaluateConfig, evaluated), "ablation": (StudyConfig, studied), "leaderboard": (LeaderboardConfig, compared)}
NAMED = {"training": ("dataset", "method", "form", "size", "annotators", "precision", "tokens_on"), "evaluation": ("dataset", "protocol"), "ablation": ("conditions", "baseline"),
         "leaderboard": ("conditions", "baseline", "boards", "stage", "dataset")}


def placed(name):
    "A folder for a run that cannot be one, as the training notebook meets it."
    return lambda folder: lambda: check_place(train_config({"run_dir": name if name[:1] != "." else str(folder / name[2:])}))


def cases(seed: int = 0) -> Iterator[Case]:
    "Unknown names, wrong types, numbers out of range, NUL characters, words that nothing is called, folders and devices that are none."
    dice = random.Random(seed)
    for kind, (cls, ask) in KINDS.items():
        fields = [field.name for field in dataclasses.fields(cls)]
        for _ in range(4):
            name = dice.choice(fields)
            wrong = name[:-1] + dice.choice("xyz") if len(name) > 2 else name + "s"
            if wrong not in fields: yield Case(f"parameters of {kind}", f"unknown {wrong}", ask({wrong: 1}), names=wrong)
        for name in dice.sample(fields, 6):
            value = dice.choice(ODD)
            yield Case(f"parameters of {kind}", f"{name}={value!r}", ask({name: value}), names=name)
        for name in dice.sample(texts(cls), 3): yield Case(f"parameters of {kind}", f"{name} with NUL", ask({name: "a\0b"}), names=name)
        for name in NAMED[kind]: yield Case(f"parameters of {kind}", f"{name}=nothing", ask({name: "nothing-" + str(dice.randrange(99))}), names="nothing-")
    for name in dice.sample(sorted(set(numbers(TrainConfig)) - LOOSE), 12):
        for value in dice.sample(NUMBERS[:5], 2):
            wanted = dict(TrainConfig.__annotations__ if hasattr(TrainConfig, "__annotations__") else {})
            yield Case("parameters of training", f"{name}={value}", trained({name: value}), names=name)
    for value in (float("nan"), float("inf")):
        for name in sorted(LOOSE & set(numbers(TrainConfig)) - {"seed"}):
            yield Case("parameters of training", f"{name}={value}", trained({name: value}), names=name)
    for name, value in (("epochs", 10**12), ("batch_size", 10**9), ("negatives_per_query", 10**4), ("accumulate", 10**9)):
        yield Case("parameters of training", f"{name}={value}", trained({name: value, "recipe": "paper"}), names=name)
    for name in ("x" * 300, "a/" + "y" * 400, "./file/run"):
        yield Case("folders of runs", name[:20], with_file(placed(name)), names="run_dir|cannot be")
    for name in ("cpu:x", "cuda:99", "tpu", "", "cpu cpu", "meta:", "cuda:-1"):
        yield Case("devices", repr(name), lambda folder, name=name: lambda: resolve_device(name), names="device")
    for seeds in ("", "a", "0,,1", "0;1", "-1", "1.5", "0, x"):
        yield Case("seeds", repr(seeds), studied({"seeds": seeds}), names="seeds")


def with_file(make):
    def both(folder):
        (folder / "file").touch()
        return make(folder)
    return both
