"Run folders: configuration, events, weights, checkpoint, vocabulary and record, cut, edited, exchanged."
import functools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dqe_cir.data import load_dataset
from dqe_cir.encoder import cache_tokens
from dqe_cir.trainer import build_method, fit, load_run, open_run, train_config, training_set
from dqe_cir.trainer.evaluation_config import training_origin
from dqe_cir.trainer.loop import SMOKE
from dqe_cir.trainer.runs import finished_record

from .frame import Case

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
OPTIONS = dict(SMOKE, epochs=3, evaluate_every=1, select_on="last", readings="hand", device="cpu")
MINING = dict(SMOKE, epochs=3, evaluate_every=0, recipe="paper", warmup_epochs=1, device="cpu")


@functools.lru_cache
def parts(mining: bool):
    "Data, tokens and the folder of a template run: finished, or (mining) stopped after its second epoch."
    folder = Path(tempfile.mkdtemp(prefix="template-")) / "run"
    config = train_config((MINING if mining else OPTIONS) | {"run_dir": str(folder)})
    dataset, method = load_dataset("garments", split="train", size="smoke"), build_method(config)
    tokens = cache_tokens(method.encoder, dataset, progress=False)
    look = None if mining else lambda method: {"mAP": 1.0}
    fit(method, training_set(config, dataset, tokens), open_run(config), look, until=2 if mining else None)
    return dataset, tokens, folder


def copied(folder: Path, mining: bool) -> Path:
    run = folder / "run"
    shutil.copytree(parts(mining)[2], run)
    return run


def go_on(run: Path, mining: bool):
    "What the same command does with the folder."
    dataset, tokens, _ = parts(mining)
    config = train_config((MINING if mining else OPTIONS) | {"run_dir": str(run)})
    method = build_method(config)
    return fit(method, training_set(config, dataset, tokens), open_run(config), None if mining else lambda method: {"mAP": 1.0})


def read(run: Path, mining: bool = False): return load_run(run, "cpu")


# ---- files as files

def cut(path, dice): path.write_bytes(path.read_bytes()[:dice.randrange(1, path.stat().st_size - 2)])
def emptied(path, dice): path.write_bytes(b"")
def pointer(path, dice): path.write_text(POINTER)
def page(path, dice): path.write_text(dice.choice(["<!DOCTYPE html>\n<html>404</html>", "<html><body>sign in", "  <HTML>no</HTML>"]))
def noise(path, dice): path.write_bytes(dice.randbytes(dice.randrange(10, 5000)))
def a_folder(path, dice): path.unlink(), path.mkdir()
def a_pipe(path, dice): path.unlink(), os.mkfifo(path)
def dead_link(path, dice): path.unlink(), path.symlink_to(path.parent / "nowhere")
def latin(path, dice): path.write_bytes(path.read_bytes().replace(b'"', "é".encode("latin-1"), 1))


WHOLE = [cut, emptied, pointer, page, noise, a_folder, a_pipe, dead_link]


def on_file(name, spoil, act, mining=False, expected="refuse", seed=0):
    def make(folder):
        run = copied(folder, mining)
        spoil(run / name, random.Random(seed))
        return lambda: act(run, mining)
    return make


# ---- JSON as JSON

def other_type(value, dice):
    choices = [None, True, 7, 0.5, "word", [1], {"a": 1}, -1, "NaN"]
    return dice.choice([choice for choice in choices if type(choice) is not type(value)])


def edited(change):
    def spoil(path, dice):
        value = json.loads(path.read_text())
        path.write_text(json.dumps(change(value, dice), indent=1))
    return spoil


MOVED = ("run_dir", "data_root", "device", "recipe", "made_from")  # where a run lies, and what it is called


def field(value, dice): return dice.choice([name for name in value if name not in MOVED])


def drop_field(value, dice):
    value.pop(field(value, dice))
    return value


def retype_field(value, dice):
    name = field(value, dice)
    return value | {name: other_type(value[name], dice)}


def flip_field(value, dice):
    name = dice.choice([name for name in value if isinstance(value[name], (bool, int, float)) and name not in MOVED])
    old = value[name]
    return value | {name: not old if isinstance(old, bool) else old + 1}


def as_list(value, dice): return [value]
def strange_field(value, dice): return value | {"colour": 1}
def nan_field(value, dice): return value | {"lr": float("nan")}


def nested(path, dice): path.write_text("[" * 100_000 + "]" * 100_000)
def digits(path, dice): path.write_text('{"epochs": ' + "9" * 10_000 + "}")
def twice(path, dice): path.write_text(path.read_text().replace("{", '{\n "seed": 1,', 1))
def with_mark(path, dice): path.write_text(path.read_text(), encoding=dice.choice(["utf-8-sig", "utf-16"]))
def surrogate(path, dice): path.write_text(path.read_text().replace("{", '{\n "\\ud800": 1,', 1))


CONFIG = [edited(drop_field), edited(retype_field), edited(flip_field), edited(as_list), edited(strange_field), edited(nan_field), nested, digits, twice, surrogate, latin]


# ---- events

def lines(change):
    def spoil(path, dice):
        kept = path.read_text().splitlines()
        path.write_text("\n".join(change(kept, dice)) + "\n")
    return spoil


def epochs_of(kept): return [i for i, line in enumerate(kept) if json.loads(line)["kind"] == "epoch"]


def doubled(kept, dice):
    i = dice.choice(epochs_of(kept))
    return [*kept[:i + 1], *kept[i:]]


def missing(kept, dice):
    i = dice.choice(epochs_of(kept)[:2])
    return kept[:i] + kept[i + 1:]


def broken(kept, dice): return [kept[0][:-4], *kept[1:]]
def a_number(kept, dice): return ["7", *kept]
def no_epoch(kept, dice): return ['{"kind": "epoch"}', *kept]
def text_epoch(kept, dice): return ['{"kind": "epoch", "epoch": "one"}', *kept]
def swapped(kept, dice): return kept[::-1]


def cut_line(path, dice): path.write_text(path.read_text() + '{"kind": "epo')


EVENTS = [lines(change) for change in (doubled, missing, broken, a_number, no_epoch, text_epoch, swapped)]


# ---- tensors

def tensors(change):
    def spoil(path, dice):
        with safe_open(path, framework="pt") as file:
            found, about = {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})
        found, about = change(found, about, dice)
        save_file(found, path, metadata=about)
    return spoil


def floating(found, dice, start=""): return dice.choice(sorted(n for n, v in found.items() if v.is_floating_point() and v.numel() and n.startswith(start)))


def one_odd(found, about, dice):
    name = floating(found, dice)
    found[name].view(-1)[dice.randrange(found[name].numel())] = dice.choice([float("nan"), float("inf"), -float("inf")])
    return found, about


def one_gone(found, about, dice):
    found.pop(floating(found, dice))
    return found, about


def one_more(found, about, dice): return found | {"odd.weight": torch.ones(2)}, about


def other_shape(found, about, dice):
    name = floating(found, dice)
    return found | {name: torch.cat([found[name].reshape(-1), torch.ones(1)])}, about


def as_integers(found, about, dice):
    name = floating(found, dice, "model/" if any(n.startswith("model/") for n in found) else "")
    return found | {name: found[name].long()}, about


def no_optimizer(found, about, dice): return {n: v for n, v in found.items() if not n.startswith("optimizer/")}, about
def half_optimizer(found, about, dice):
    found.pop(dice.choice(sorted(n for n in found if n.startswith("optimizer/"))))
    return found, about


def far_pools(found, about, dice):
    found["pools"][dice.randrange(len(found["pools"])), 0] = dice.choice([10**6, -7])
    return found, about


def other_pools(found, about, dice): return found | {"pools": found["pools"][:5]}, about
def odd_epoch(found, about, dice): return found, about | {"epoch": dice.choice(["99", "-1", "0", "two", ""])}
def no_epoch_at_all(found, about, dice): return found, {name: value for name, value in about.items() if name != "epoch"}
def odd_scale(found, about, dice): return found, about | {"scale": "{"}


WEIGHTS = [tensors(change) for change in (one_odd, one_gone, one_more, other_shape, as_integers)]
CHECKPOINT = [*WEIGHTS, *map(tensors, (no_optimizer, half_optimizer, far_pools, other_pools, odd_epoch, no_epoch_at_all, odd_scale))]


# ---- vocabulary

def no_attributes(value, dice): return {}
def odd_attributes(value, dice): return {"attributes": dice.choice([7, [], {"colour": 3}, {"colour": [[1]]}, {"colour": "red"}, {"colour": ["red"]}])}
def one_word_less(value, dice):
    name = dice.choice(sorted(value["attributes"]))
    value["attributes"][name] = value["attributes"][name][:-1]
    return value


VOCABULARY = [edited(no_attributes), edited(odd_attributes), edited(one_word_less), edited(as_list)]


def origin(run, mining): return training_origin(run)


def record(run, mining):
    config = train_config(OPTIONS | {"run_dir": str(run)})
    return finished_record(open_run(config))


def with_record(spoil):
    def both(path, dice):
        path.write_text('{"data": "garments"}')
        spoil(path, dice)
    return both


PLAN = [
    ("config.json", [*WHOLE, *CONFIG], read, False), ("metrics.jsonl", [*EVENTS, a_folder, a_pipe, pointer], go_on, False),
    ("metrics.jsonl", EVENTS, go_on, True), ("model.safetensors", [*WHOLE, *WEIGHTS], read, False), ("resume.safetensors", [*WHOLE[:5], *CHECKPOINT], go_on, True),
    ("vocabulary.json", [*WHOLE, *VOCABULARY], read, False), ("results.json", [with_record(spoil) for spoil in (cut, pointer, page, edited(as_list), nested)], record, False),
]


def cases(seed: int = 0) -> Iterator[Case]:
    "Every way to spoil every file of a run folder, twice, with dice of their own; and three that must be accepted."
    parts(False), parts(True)  # here, and not in the process of every case
    for name, ways, act, mining in PLAN:
        for number, spoil in enumerate(ways):
            for turn in range(2):
                dice = seed * 1000 + number * 10 + turn
                yield Case(f"run folder: {name}", f"{name} {number}.{turn}", on_file(name, spoil, act, mining, seed=dice))
    yield Case("run folder: accepted", "byte order mark", on_file("config.json", with_mark, read), "accept")
    yield Case("run folder: accepted", "last line cut", on_file("metrics.jsonl", cut_line, go_on, True), "accept")
    yield Case("run folder: accepted", "as it was", on_file("config.json", lambda path, dice: None, go_on), "accept")
