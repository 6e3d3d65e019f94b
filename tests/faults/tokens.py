"Token stores that were cut, flipped, swapped, filled with something else; pictures that cannot be encoded. Right tokens or a name, never other tokens."
import functools
import json
import os
import random
import resource
import shutil

import numpy as np
import torch
from PIL import Image

from dqe_cir.encoder import cache_tokens, load_encoder

from .frame import Case

COUNT = 5


@functools.cache
def encoder():
    return load_encoder("mini", device="cpu")


def draw(path, seed, mode="RGB", size=(20, 24)):
    "A picture of noise."
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def pictures(folder, count=COUNT):
    folder.mkdir(parents=True, exist_ok=True)
    return {f"picture {i}": draw(folder / f"{i}.png", i) for i in range(count)}


def cached(paths, folder, on="auto"):
    return cache_tokens(encoder(), paths, folder / "tokens", batch_size=2, progress=False, on=on)


def right(paths):
    "What the encoder says of each, one at a time."
    return torch.cat([encoder().image_tokens(encoder().transform(Image.open(path))[None]) for path in paths.values()])


def stored(folder):
    paths = pictures(folder)
    cached(paths, folder)
    return paths


def shard(folder):
    return next((folder / "tokens").rglob("*.tokens"))


def unharmed(paths, folder):
    "Whatever was done to the files, the tokens are right."
    def act():
        torch.testing.assert_close(cached(paths, folder)[list(paths)], right(paths), rtol=1e-5, atol=1e-5)
    return act


def late(change):
    "A case of a store on disk that is changed after it was opened: at every start right tokens, or a message that names the shard; in the end right ones."
    def make(folder):
        paths = stored(folder)
        wanted, names = right(paths), list(paths)
        caches = [cached(paths, folder, on="disk")]
        change(folder)

        def act():
            for _ in range(COUNT + 1):
                cache = caches.pop() if caches else cached(paths, folder, on="disk")
                try:
                    for ids in (*([name] for name in names), names): torch.testing.assert_close(cache[ids], wanted[[names.index(name) for name in ids]], rtol=1e-5, atol=1e-5)
                    return
                except ValueError as problem:
                    if ".tokens" not in str(problem): raise
            raise AssertionError("damaged at every start")
        return act
    return make


def spoiled(change):
    "A case of a store to which something is done."
    def make(folder):
        paths = stored(folder)
        change(folder)
        return unharmed(paths, folder)
    return make


def flip(rng, name, spoiled=spoiled):
    place, bit = rng.random(), 1 << rng.randrange(8)
    def change(folder):
        file = shard(folder) if name == "tokens" else next((folder / "tokens").rglob(name))
        raw = bytearray(file.read_bytes())
        raw[int(place * len(raw))] ^= bit
        file.write_bytes(raw)
    return spoiled(change)


def cut(rng, share=None, spoiled=spoiled):
    share = rng.random() if share is None else share
    def change(folder):
        raw = shard(folder).read_bytes()
        shard(folder).write_bytes(raw[:int(share * len(raw))])
    return spoiled(change)


def swapped(rng, spoiled=spoiled):
    "Two records change places, with or without their keys."
    first, second = rng.sample(range(COUNT), 2)
    start = rng.choice([0, 16, 20, 64])
    def change(folder):
        raw = bytearray(shard(folder).read_bytes())
        size = len(raw) // COUNT
        a, b = slice(first * size + start, (first + 1) * size), slice(second * size + start, (second + 1) * size)
        raw[a], raw[b] = raw[b], raw[a]
        shard(folder).write_bytes(raw)
    return spoiled(change)


def described(rng):
    "The description says something else."
    value = rng.choice([{"shape": [96, 65]}, {"dtype": "float16"}, {"shape": [5, 65, 96]}, {"dtype": "int32"}, {"shape": []}, {"bytes_a_picture": 1}])
    whole = rng.choice([None, "", "{", "[]", "null"])
    def change(folder):
        about = next((folder / "tokens").rglob("about.json"))
        about.write_text(json.dumps(json.loads(about.read_text()) | value) if whole is None else whole)
    return spoiled(change)


def filled(rng, spoiled=spoiled):
    "Something else in the place of the shard."
    content = rng.choice([b"", b"\0" * 100_000, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<!doctype html>" * 999, rng.randbytes(60_000)])
    return spoiled(lambda folder: shard(folder).write_bytes(content))


def tail(rng):
    extra = rng.randbytes(rng.randrange(1, 80_000))
    def change(folder):
        with shard(folder).open("ab") as file: file.write(extra)
    return spoiled(change)


def notes(rng):
    "The notes of content keys are something else."
    content = rng.choice([b"", b"\0\0", b"00000000\n", b"\xff\xfe\0", b"7 7 7 7 7 7\n" * 9, rng.randbytes(500)])
    return spoiled(lambda folder: (folder / "tokens" / "content_keys.txt").write_bytes(content))


def gone(rng):
    return spoiled(lambda folder: shutil.rmtree(shard(folder).parent))


def touched(rng):
    when = rng.choice([0, 1, 10**9, 4 * 10**9])
    def change(folder):
        for path in folder.glob("*.png"): os.utime(path, (when, when))
    return spoiled(change)


def instead(rng, kind):
    "A folder or a named pipe where the shard was."
    def make(folder):
        paths = stored(folder)
        file = shard(folder)
        file.unlink()
        if kind == "pipe": os.mkfifo(file)
        else: file.mkdir()
        return lambda: cached(paths, folder)
    return make


BROKEN = {
    "empty": lambda path, rng: path.write_bytes(b""),
    "cut": lambda path, rng: path.write_bytes(path.read_bytes()[:rng.randrange(1, 400)]),
    "noise": lambda path, rng: path.write_bytes(rng.randbytes(300)),
    "page": lambda path, rng: path.write_text("<!DOCTYPE html><title>Not found</title>"),
    "pointer": lambda path, rng: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"),
    "absent": lambda path, rng: path.unlink(),
    "folder": lambda path, rng: (path.unlink(), path.mkdir()),
    "pipe": lambda path, rng: (path.unlink(), os.mkfifo(path)),
    "link": lambda path, rng: (path.unlink(), path.symlink_to(path.with_name("nowhere"))),
    "loop": lambda path, rng: (path.unlink(), path.symlink_to(path)),
    "text": lambda path, rng: path.write_text("a red dress"),
}


def encoded_again(pixels):
    raise AssertionError(f"{len(pixels)} pictures are encoded again")


def broken(rng, kind):
    "Some of the pictures cannot be read: a message, and the others are stored."
    which = rng.sample(range(COUNT), rng.randint(1, COUNT - 1))
    def make(folder):
        paths = pictures(folder)
        good = {name: path for i, (name, path) in enumerate(paths.items()) if i not in which}
        for i in which: BROKEN[kind](paths[f"picture {i}"], rng)

        def act():
            try: cached(paths, folder)
            finally:
                encoder().image_tokens = encoded_again
                try: cached(good, folder)
                finally: del encoder().image_tokens
        return act
    return make


def named(rng):
    "Names and paths that are odd but right."
    name = rng.choice(["a b.png", "ünï.png", "line\nbreak.png", "-x.png", "%41.png", "a" * 200 + ".png", "'\".png", "\udcff.png", "日本.png"])
    def make(folder):
        paths = {"one": draw(folder / name, 3), "the same": draw(folder / "same.png", 3)}
        return unharmed(paths, folder)
    return make


def odd_path(rng):
    bad = rng.choice(["\0.png", "x" * 300, "", "no/such/folder/a.png"])
    return lambda folder: lambda: cached(pictures(folder) | {"odd": folder / bad if bad else folder}, folder)


def odd_tower(rng, value, every):
    "A tower whose tokens are not finite, for one picture or for all."
    which = None if every else rng.randrange(COUNT)
    class Odd:
        def __init__(self): self.inside, self.seen = encoder(), 0
        def __getattr__(self, name): return getattr(self.inside, name)
        def image_tokens(self, pixels):
            tokens = self.inside.image_tokens(pixels)
            for row in range(len(tokens)):
                if every or self.seen + row == which: tokens[row, rng.randrange(65), rng.randrange(96)] = value
            self.seen += len(tokens)
            return tokens
    return lambda folder: lambda: cache_tokens(Odd(), pictures(folder), folder / "tokens", batch_size=2, progress=False)


def no_room(rng):
    "A file may not grow beyond so many bytes."
    most = rng.randrange(0, 100_000)
    def make(folder):
        paths = pictures(folder)
        encoder()  # loaded while there is room
        def act():
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            try: cached(paths, folder)
            finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        return act
    return make


def not_a_folder(rng):
    def make(folder):
        (folder / "tokens").write_text("a file")
        return lambda: cached(pictures(folder / "pictures"), folder)
    return make


def cases(seed):
    "About a hundred, by kind."
    rng = random.Random(seed)
    repaired = [("flipped token", flip, ("tokens",), 14), ("flipped description", flip, ("about.json",), 3), ("cut shard", cut, (), 8), ("cut shard", cut, (0.0,), 1), ("swapped records", swapped, (), 6),
                ("description", described, (), 6), ("shard of something else", filled, (), 5), ("tail", tail, (), 3), ("notes", notes, (), 4), ("store removed", gone, (), 1), ("touched", touched, (), 2),
                ("odd name", named, (), 6), ("flipped while open", flip, ("tokens", late), 14), ("cut while open", cut, (None, late), 6),
                ("swapped while open", swapped, (late,), 6), ("something else while open", filled, (late,), 5)]
    for kind, make, arguments, times in repaired:
        for i in range(times): yield Case(kind, f"{kind} {i}", make(rng, *arguments), "accept")
    for kind in BROKEN:
        for i in range(2): yield Case("broken picture", f"{kind} {i}", broken(rng, kind), "refuse", names=r"\d\.png")
    for i in range(3): yield Case("odd path", f"odd path {i}", odd_path(rng), "refuse")
    for value in (float("nan"), float("inf"), float("-inf")):
        for every in (True, False): yield Case("tokens not finite", f"{value}, {every}", odd_tower(rng, value, every), "refuse", names=r"\d\.png")
    for i in range(4): yield Case("full disk", f"full disk {i}", no_room(rng), "refuse", names=r"tokens")
    for kind in ("pipe", "folder"): yield Case("no shard", kind, instead(rng, kind), "refuse", names=r"\.tokens")
    yield Case("no folder", "a file", not_a_folder(rng), "refuse", names="tokens")
