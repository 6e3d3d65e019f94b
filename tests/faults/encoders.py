"Model folders and checkpoints that were cut, flipped, renamed, wrapped, or written by somebody else."
import functools
import json
import math
import os
import pickle
import random
import shutil

import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import WORDS, lavis_state

from dqe_cir.encoder import MINI, load_encoder
from dqe_cir.encoder.checkpoints import UNUSED, convert
from dqe_cir.encoder.native import clip, resnet

from .frame import Case

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@functools.cache
def state(kind="eva"):
    return lavis_state(kind)


def copy(folder):
    "A model folder to be spoiled."
    shutil.copytree(MINI, folder / "model")
    return folder / "model"


def load(place):
    return lambda: load_encoder(str(place), device="cpu")


def on_folder(change):
    "A case of a model folder to which something is done."
    def make(folder):
        place = copy(folder)
        change(place)
        return load(place)
    return make


# ---- the files of a folder

STAND_INS = {
    "empty": lambda path, rng: path.write_bytes(b""),
    "cut": lambda path, rng: path.write_bytes(path.read_bytes()[:rng.randrange(1, path.stat().st_size * 9 // 10)]),
    "zeros": lambda path, rng: path.write_bytes(b"\0" * rng.randrange(1, 9999)),
    "noise": lambda path, rng: path.write_bytes(rng.randbytes(999)),
    "pointer": lambda path, rng: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"),
    "page": lambda path, rng: path.write_text("\n<!DOCTYPE html><html></html>"),
    "folder": lambda path, rng: (path.unlink(), path.mkdir()),
    "pipe": lambda path, rng: (path.unlink(), os.mkfifo(path)),
    "link": lambda path, rng: (path.unlink(), path.symlink_to("nowhere")),
    "list": lambda path, rng: path.write_text("[]"),
    "deep": lambda path, rng: path.write_text("[" * 100_000),
}


def stand_in(rng, kind, name):
    return on_folder(lambda place: STAND_INS[kind](place / name, rng))


def without(rng, name):
    return on_folder(lambda place: (place / name).unlink())


# ---- its configuration

def fields(config, prefix=()):
    "The path of every entry that the encoder depends on."
    for name, value in config.items():
        if name == "text_config": continue
        if isinstance(value, dict): yield from fields(value, (*prefix, name))
        else: yield (*prefix, name)


SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings", "patch_size", "image_size", "num_query_tokens",
         "image_text_hidden_size", "cross_attention_frequency", "encoder_hidden_size", "layer_norm_eps", "itc_temperature", "hidden_dropout_prob", "attention_dropout")
VALUES = [-1, 10**9, 10**30, 1e999, "many", True, [], {}, [3], "0" * 400]


def reconfigured(change):
    def spoil(place):
        config = json.loads((place / "config.json").read_text())
        config = change(config) or config
        (place / "config.json").write_text(json.dumps(config))
    return on_folder(spoil)


def setting(rng, value):
    def change(config):
        path = rng.choice([path for path in fields(config) if path[-1] in SIZES])
        for name in path[:-1]: config = config[name]
        config[path[-1]] = value
    return reconfigured(change)


def another_size(rng):
    "A size that is possible, but is not that of the weights."
    def change(config):
        part, name = rng.choice([("qformer_config", "hidden_size"), ("qformer_config", "intermediate_size"), ("vision_config", "hidden_size"), ("vision_config", "intermediate_size"),
                                 ("qformer_config", "num_hidden_layers"), ("vision_config", "num_hidden_layers"), ("qformer_config", "max_position_embeddings"), ("qformer_config", "vocab_size")])
        config[part][name] = config[part][name] * 2
    return reconfigured(change)


def dropped_part(rng):
    name = rng.choice(["vision_config", "qformer_config", "model_type"])
    return reconfigured(lambda config: {key: value for key, value in config.items() if key != name})


def another_type(rng):
    kind = rng.choice(["", "bert", "clip", "blip-3", 7, None, [], "opt", "resnet"])
    return reconfigured(lambda config: config | {"model_type": kind})


def no_object(rng):
    part, value = rng.choice(["vision_config", "qformer_config"]), rng.choice([3, "x", [], True])
    return reconfigured(lambda config: config | {part: value})


# ---- its weights

def drawn(rng, tensors):
    return rng.choice(sorted(name for name, value in tensors.items() if value.is_floating_point() and value.dim() and not UNUSED.match(name) and not name.startswith("itm_head")))


def not_finite(rng, tensors):
    name, value = drawn(rng, tensors), tensors
    changed = {key: tensor.clone() for key, tensor in value.items()}
    changed[name].view(-1)[rng.randrange(changed[name].numel())] = rng.choice([math.nan, math.inf, -math.inf])
    return changed


def recast(rng, tensors):
    name, kind = drawn(rng, tensors), rng.choice([torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64])
    return tensors | {name: tensors[name].to(kind)}


def left_out(rng, tensors):
    name = drawn(rng, tensors)
    return {key: value for key, value in tensors.items() if key != name}


def reshaped(rng, tensors):
    name = drawn(rng, tensors)
    value = tensors[name]
    ways = [value[None], value[..., :0], torch.cat([value, value]), value.flatten()[:1], value.sum()]
    return tensors | {name: rng.choice(ways).clone().contiguous()}


def far_layer(rng, tensors):
    name = rng.choice(sorted(name for name in tensors if ".layer.0." in name or ".blocks.0." in name or ".layers.0." in name))
    number = rng.choice([77, 999_999, 10**9, 10**30])
    return {key.replace(".0.", f".{number}.", 1) if key == name else key: value for key, value in tensors.items()}


def overflowing(rng, tensors):
    name = drawn(rng, tensors)
    return tensors | {name: torch.full_like(tensors[name], 1e300, dtype=torch.float64)}


def zeros(rng, tensors):
    return tensors | {name: torch.zeros_like(value) for name, value in tensors.items() if name.endswith("query_tokens")}


WEIGHTS = {"not finite": not_finite, "another type": recast, "left out": left_out, "another shape": reshaped, "far layer": far_layer, "too large": overflowing, "no queries": zeros}


def folder_weights(rng, change):
    def spoil(place):
        save_file(change(rng, load_file(place / "model.safetensors")), place / "model.safetensors", metadata={"format": "pt"})
    return on_folder(spoil)


# ---- checkpoints

def shelf(folder):
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def checkpoint(content, suffix=".pth", action=load):
    def make(folder):
        file = shelf(folder) / f"checkpoint{suffix}"
        save_file(content, file) if suffix == ".safetensors" else torch.save(content, file)
        return action(file)
    return make


def converted(file):
    return lambda: convert(file, file.with_name("converted"))


def not_a_tensor(rng, tensors):
    return tensors | {drawn(rng, tensors): rng.choice([3, None, "x", [1.0], {"a": 1}, torch.zeros(2).to_sparse(), torch.zeros(1).expand(10**10)])}


def no_name(rng, tensors):
    return tensors | {rng.choice([3, None, (1, 2), True]): torch.zeros(1)}


def temperature(rng, tensors):
    return tensors | {"temp": rng.choice([torch.tensor(math.nan), torch.tensor(-1.0), torch.tensor(0.0), torch.ones(2), torch.tensor(math.inf), torch.zeros(0)])}


def prefixed(prefix):
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


WRAPPINGS = {
    "module.": prefixed("module."), "model.": prefixed("model."), "_orig_mod.": prefixed("_orig_mod."), "module.model.": prefixed("module.model."),
    "model": lambda tensors: {"model": tensors}, "state_dict": lambda tensors: {"state_dict": tensors, "epoch": 3},
    "class": lambda tensors: {"Blip2QformerCir": tensors, "epoch": 1}, "nested": lambda tensors: {"checkpoint": {"state": {"model": prefixed("module.")(tensors)}}},
    "beside an optimizer": lambda tensors: {"optimizer": {"state": {}, "param_groups": []}, "net": tensors},
}
MIXED = {
    "two models": lambda tensors: {"student": tensors, "teacher": tensors},
    "two prefixes": lambda tensors: prefixed("a.")(tensors) | prefixed("b.")(tensors),
    "half": lambda tensors: {("module." if i % 2 else "") + name: value for i, (name, value) in enumerate(tensors.items())},
    "both": lambda tensors: prefixed("module.")(tensors) | {"temp": tensors["temp"]},
    "too deep": lambda tensors: functools.reduce(lambda inside, _: {"model": inside}, range(20), tensors),
    "nothing": lambda tensors: {}, "a list": lambda tensors: [tensors], "a tensor": lambda tensors: torch.zeros(3), "numbers": lambda tensors: {1: 2, 3: 4},
}


class Danger:
    def __reduce__(self): return (os.system, ("exit 1",))


def dangerous(folder):
    (shelf(folder) / "checkpoint.pth").write_bytes(pickle.dumps({"model": Danger()}))
    return load(folder / "checkpoint.pth")


def checkpoint_stand_in(rng, kind, suffix):
    def make(folder):
        file = shelf(folder) / f"checkpoint{suffix}"
        save_file(state(), file) if suffix == ".safetensors" else torch.save(state(), file)
        STAND_INS[kind](file, rng)
        return load(file)
    return make


def odd_words(rng):
    content = rng.choice([b"", b"\0\0\0", b"<!doctype html>\n<p>", b"red\nblue\nlong\n", b"version https://git-lfs.github.com/spec/v1\n"])
    def make(folder):
        torch.save(state(), folder / "checkpoint.pth")
        (folder / "vocab.txt").write_bytes(content)
        return load(folder / "checkpoint.pth")
    return make


def odd_name(rng):
    name = rng.choice(["a\0b", "x" * 300, "x" * 5000, "\n", "../../etc", "/dev/null", "/dev/null.pth", "a.pth\0", "x" * 300 + ".pth", "\udcff"])
    return lambda folder: lambda: load_encoder(name, device="cpu")


def native_weights(rng, change, loader):
    "A folder of another backbone."
    def make(folder):
        kept = loader()
        kept.save_pretrained(folder / "resnet")
        file = folder / "resnet" / "model.safetensors"
        save_file(change(rng, load_file(file)), file, metadata={"format": "pt"})
        return lambda: resnet.load_resnet(str(folder / "resnet"), device="cpu")
    return make


def native_config(rng):
    value = rng.choice([{"depths": [10**9]}, {"depths": "many"}, {"hidden_sizes": [10**6]}, {"embedding_size": 10**7}, {"model_type": "clip"}, {"model_type": None}])
    def make(folder):
        small_resnet().save_pretrained(folder / "resnet")
        about = folder / "resnet" / "config.json"
        about.write_text(json.dumps(json.loads(about.read_text()) | value))
        return lambda: resnet.load_resnet(str(folder / "resnet"), device="cpu")
    return make


def native_file(rng, kind):
    def make(folder):
        torch.save({"CLIP": {"visual.attnpool.positional_embedding": torch.zeros(5, 256)}}, folder / "tuned.pt")
        STAND_INS[kind](folder / "tuned.pt", rng)
        return lambda: clip.load_clip(str(folder / "tuned.pt"), device="cpu")
    return make


@functools.cache
def small_resnet():
    return resnet.load_resnet(device="cpu").image_tower


def cases(seed):
    "About a hundred and sixty, by kind."
    rng = random.Random(seed)
    for kind in STAND_INS:
        for name in FILES:
            if (kind, name) not in {("list", "model.safetensors"), ("deep", "model.safetensors")}: yield Case("file of a folder", f"{name}, {kind}", stand_in(rng, kind, name), names=r"\.json|\.safetensors")
        if kind not in ("list", "deep"):
            yield Case("checkpoint file", f"pth, {kind}", checkpoint_stand_in(rng, kind, ".pth"), names="checkpoint")
            yield Case("checkpoint file", f"safetensors, {kind}", checkpoint_stand_in(rng, kind, ".safetensors"), names="checkpoint")
            yield Case("file of another backbone", kind, native_file(rng, kind), names="tuned")
    for name in ("config.json", "model.safetensors", "tokenizer.json"): yield Case("file missing", name, without(rng, name))
    for value in VALUES:
        for i in range(2): yield Case("setting", f"{str(value)[:20]} {i}", setting(rng, value))
    for i in range(4): yield Case("another size", str(i), another_size(rng))
    for i in range(3): yield Case("part dropped", str(i), dropped_part(rng))
    for i in range(3): yield Case("model type", str(i), another_type(rng))
    for i in range(2): yield Case("no object", str(i), no_object(rng))
    yield Case("setting", "nothing", on_folder(lambda place: (place / "config.json").write_text("{}")), names="config.json")
    for kind, change in WEIGHTS.items():
        for i in range(2):
            if kind != "far layer": yield Case("weights of a folder", f"{kind} {i}", folder_weights(rng, change), names=r"model|query")
            yield Case("checkpoint", f"{kind} {i}", checkpoint(change(rng, state()), rng.choice([".pth", ".safetensors"])), names=r"checkpoint\.")
            yield Case("conversion", f"{kind} {i}", checkpoint(change(rng, state("clip")), ".pth", converted), names=r"checkpoint\.")
    for change in (not_a_tensor, no_name, temperature):
        for i in range(3): yield Case("checkpoint entry", f"{change.__name__} {i}", checkpoint(change(rng, state())), names=r"checkpoint\.")
    for kind, wrap in WRAPPINGS.items(): yield Case("wrapping", kind, checkpoint(wrap(state(rng.choice(["eva", "clip"])))), "accept")
    for kind, wrap in MIXED.items(): yield Case("wrapping", kind, checkpoint(wrap(state())), names=r"checkpoint\.")
    yield Case("checkpoint file", "code", dangerous, names="checkpoint")
    for i in range(4): yield Case("words", str(i), odd_words(rng))
    for i in range(6): yield Case("name", str(i), odd_name(rng), names="encoder|name|/")
    for kind in ("not finite", "another type", "left out", "another shape"): yield Case("weights of another backbone", kind, native_weights(rng, WEIGHTS[kind], small_resnet), names="resnet")
    for i in range(4): yield Case("settings of another backbone", str(i), native_config(rng), names="resnet")
