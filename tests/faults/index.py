"Folders, stored indexes, lessons, references and uploads: damaged, exchanged, spelled in every way."
import functools
import json
import os
import random
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file

from dqe_cir.retriever import Retriever, Session
from dqe_cir.retriever.index import MADE, keep_records
from dqe_cir.retriever.lessons import ROWS, TAUGHT, VECTORS, Lessons, read_lessons, told_lessons, write_lessons

from .frame import Case

COLOURS = dict(coat="red", hat="blue", sock="green", scarf="gold", glove="purple")


@functools.cache
def shipped(): return Retriever.load("garments", device="cpu")


def empty() -> Retriever:
    "The shipped model without pictures."
    return Retriever(shipped().method, shipped().config)


def closet(folder: Path) -> Path:
    "Five pictures, one of them in a subfolder."
    place = folder / "closet"
    for name, colour in COLOURS.items():
        path = place / ("feet" if name == "sock" else ".") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 50), colour).save(path)
    return place


NAMES = {"coat.png", "feet/sock.png", "glove.png", "hat.png", "scarf.png"}


def exported(folder: Path) -> Path:
    "The shipped model with an index of the closet."
    retriever = empty()
    retriever.index(closet(folder))
    place = folder / "model"
    place.mkdir()
    for name in ("config.json", "model.safetensors", "results.json", "vocabulary.json"): shutil.copyfile(shipped().folder / name, place / name)
    retriever.write_index(place)
    return place


# ---- a value of a JSON file changed in one place

def changed(about: dict, field: str, how: str, rng: random.Random):
    "The description with one field changed; every way of changing it makes another description."
    value = about[field]
    if how == "drop": return {name: kept for name, kept in about.items() if name != field}
    if how == "type": return about | {field: rng.choice([3, None, True, 2.5, {"a": 1}, [[]], "words"])} if not isinstance(value, (str, type(None))) else about | {field: rng.choice([3, True, [1], {"a": 1}])}
    if how == "swap": return about | {field: value[1::-1] + value[2:]}
    if how == "twice": return about | {field: [value[0], *value[:-1]]}
    if how == "fewer": return about | {field: value[:-1]}
    if how == "more": return about | {field: [*value, value[0]]}
    if how == "entry": return about | {field: [rng.choice([0, None, [], {}, 1e308, True]), *value[1:]]}
    if how == "outside": return about | {field: [rng.choice(["../../etc/hostname", "/etc/hostname", "a/../../b", "..", "\0", " "]), *value[1:]]}
    if how == "renamed": return about | {field: ["another.png", *value[1:]]}
    return about | {field: "something else"}


FIELDS = {"ids": ("drop", "type", "swap", "twice", "fewer", "more", "entry", "outside", "renamed"), "keys": ("drop", "type", "swap", "twice", "fewer", "more", "entry"),
          "files": ("drop", "type", "swap", "twice", "fewer", "entry", "outside"), "root": ("drop", "type", "other"), "source": ("drop", "type", "other"), "vectors": ("drop", "type", "other"), "unreadable": ("drop",)}


def loading(place: Path, name: str = "index.json"):
    "Loading an export whose index must not be served."
    def act(): return [result.path for result in Retriever.load(place, device="cpu").search("coat.png", "is blue")]
    return act


def description(field: str, how: str, seed: int):
    def make(folder):
        place = exported(folder)
        path = place / "index.json"
        path.write_text(json.dumps(changed(json.loads(path.read_text()), field, how, random.Random(seed))))
        return loading(place)
    return make


def tensors(path: Path) -> tuple[dict, dict]:
    with safe_open(path, framework="pt") as file: about = file.metadata()
    return load_file(path), about


def damage(path: Path, how: str, rng: random.Random) -> None:
    "A file made unsound in one way."
    content = path.read_bytes()
    if how == "bit":
        place = rng.randrange(len(content) - 300, len(content))  # among the numbers
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1:])
    elif how == "cut": path.write_bytes(content[:rng.randrange(1, len(content))])
    elif how == "empty": path.write_bytes(b"")
    elif how == "page": path.write_text("<!doctype html><title>Not found</title>")
    elif how == "pointer": path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif how == "random": path.write_bytes(rng.randbytes(500))
    elif how == "NUL": path.write_bytes(bytes(400))
    elif how == "nested": path.write_text("[" * 100_000)
    elif how == "digits": path.write_text("1" * 10_000)
    elif how == "surrogate": path.write_text(json.dumps({"ids": ["\ud800"]}))
    else:
        path.unlink()
        if how == "folder": path.mkdir()
        elif how == "pipe": os.mkfifo(path)
        elif how == "socket": socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
        elif how == "device": path.symlink_to("/dev/zero")
        elif how == "loop": path.symlink_to(path)


def numbers(path: Path, how: str) -> None:
    "The tensors of a file changed, the file sound as such."
    found, about = tensors(path)
    (name, value), = found.items()
    value = {"order": value.flip(0), "fewer": value[:-1], "NaN": value.index_fill(0, torch.tensor([0]), float("nan")), "whole": value.int(), "flat": value.flatten(), "wider": torch.cat([value, value], -1),
             "zero": value * 0, "name": value, "nothing said": value.flip(0), "double": value.double()}[how]
    save_file({"other" if how == "name" else name: value.contiguous()}, path, {} if how == "nothing said" else about)


def stored_file(name: str, how: str, seed: int):
    def make(folder):
        place = exported(folder)
        damage(place / name, how, random.Random(seed))
        return loading(place)
    return make


def stored_numbers(how: str):
    def make(folder):
        place = exported(folder)
        numbers(place / "index.safetensors", how)
        return loading(place)
    return make


def indexed_again(change):
    "A store that was damaged: indexing goes on, and what is found is what a fresh index finds."
    def make(folder):
        place, store = closet(folder), folder / "store"
        first = empty()
        first.index(place, store)
        change(store)

        def act():
            again = empty()
            again.index(place, store)
            assert again.ids == first.ids == sorted(NAMES) and torch.equal(again.embeddings, first.embeddings)
            assert empty().read_index(store) and [path.name for path in again.files.values()] == [Path(name).name for name in again.ids]
        return act
    return make


def records(how: str, seed: int):
    "An index that was killed, and whose records were damaged after."
    def make(folder):
        rng, place, store = random.Random(seed), closet(folder), folder / "store"
        first = empty()
        first.index(place)
        store.mkdir()
        path = store / MADE
        keep_records(path, first.model_key() if how != "another model" else "0" * 16, 0, dict(zip(first.keys, first.embeddings)))
        content = path.read_bytes()
        if how == "cut": path.write_bytes(content[:rng.randrange(len(content))])
        if how == "bit":
            at = rng.randrange(len(content))
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:])
        if how == "random": path.write_bytes(rng.randbytes(3000))
        if how == "head": path.write_bytes(rng.choice((b"[]", b"{}", b'{"model": 3, "shape": 4}', b"[" * 9000, b'{"model": "a", "shape": [9999999999, 9999999999]}')) + b"\n" + content)
        if how == "longer": path.write_bytes(content + rng.randbytes(rng.randrange(1, 900)))

        def act():
            again = empty()
            again.index(place, store)
            assert again.ids == first.ids and (again.embeddings - first.embeddings).abs().max() < 2e-3
        return act
    return make


# ---- lessons

def lessons(change):
    def make(folder):
        generator = torch.Generator().manual_seed(0)
        taught = [(f"r{i}", f"is {colour}", f"t{i}", (f"n{i}", "r0")) for i, colour in enumerate(COLOURS.values())]
        write_lessons(Lessons(torch.randn(5, 16, generator=generator), taught), folder)
        change(folder)
        return lambda: read_lessons(folder)
    return make


def lesson_rows(field: str, how: str, seed: int):
    def change(folder):
        about = json.loads((folder / ROWS).read_text())
        (folder / ROWS).write_text(json.dumps(changed(about, field, how, random.Random(seed))))
    return lessons(change)


def told(number: int, odd):
    "What a run was taught, with one row of another form."
    def make(folder):
        rows = [dict(reference="a", target="b", captions=["is red"], negatives=["c"]) for _ in range(4)]
        rows[number] = odd if not isinstance(odd, tuple) else {**rows[number], odd[0]: odd[1]}
        (folder / TAUGHT).write_text(json.dumps(rows))
        return lambda: told_lessons(folder / TAUGHT)
    return make


# ---- folders

def folder_with(change, expected: set | None = None, unreadable: set = frozenset()):
    "The closet and something odd in it: every picture once, and a reason for the rest."
    def make(folder):
        place = closet(folder)
        change(place)

        def act():
            retriever = empty()
            retriever.index(place, folder / "store")
            assert set(retriever.ids) == (NAMES if expected is None else expected), retriever.ids
            assert set(retriever.unreadable) == set(unreadable) and all(retriever.unreadable.values()), retriever.unreadable
        return act
    return make


def other_disk(place: Path) -> Path:
    disk = place.parent / "disk"
    disk.mkdir()
    Image.new("RGB", (30, 30), "teal").save(disk / "far.png")
    return disk


def linked(place): (place / "holiday").symlink_to(other_disk(place))


def linked_in_a_circle(place):
    disk = other_disk(place)
    (place / "holiday").symlink_to(disk)
    (disk / "home").symlink_to(place)
    (disk / "self").symlink_to(disk)


def linked_twice(place):
    disk = other_disk(place)
    for name in ("one", "two", "three"): (place / name).symlink_to(disk)


def below_another(place): (place / "shoes").symlink_to(place / "feet")
def upwards(place): (place / "up").symlink_to("/")
def unplugged(place): (place / "usb").symlink_to("/media/nowhere")
def to_itself(place): (place / "me").symlink_to(place / "me")
def pipe_in(place): os.mkfifo(place / "pipe.png"), os.mkfifo(place / "quiet")
def device_in(place): (place / "zero.jpg").symlink_to("/dev/zero"), (place / "zero").symlink_to("/dev/zero")
def folder_called(place): (place / "inner.png").mkdir(), shutil.copy(place / "hat.png", place / "inner.png" / "deep.png")


def deep(place):
    for _ in range(60): place = place / "down"
    place.mkdir(parents=True)


def emptied(folder: Path):
    "The disk of an index is not there: nothing may be lost."
    place, store = closet(folder), folder / "store"
    empty().index(place, store)
    shutil.rmtree(place)
    place.mkdir()
    return lambda: empty().index(place, store)


# ---- references and uploads

def left_out(spelled):
    "A reference in one of many spellings: what it is must not be its own answer."
    def make(folder):
        place = closet(folder)
        retriever = empty()
        retriever.index(place)

        def act():
            found = {result.id for result in retriever.search(spelled(place), "is blue")}
            assert found == NAMES - {"coat.png"}, found
        return act
    return make


def through_link(place):
    (place.parent / "here").symlink_to(place)
    return place.parent / "here" / "coat.png"


def picture_link(place):
    (place.parent / "link.png").symlink_to(place / "coat.png")
    return str(place.parent / "link.png")


def hard_link(place):
    os.link(place / "coat.png", place.parent / "hard.png")
    return place.parent / "hard.png"


def in_another_place(place): return shutil.copy(place / "coat.png", place.parent / "my own.png")


SPELLED = {"id": lambda place: "coat.png", "path": lambda place: place / "coat.png", "text": lambda place: str(place / "coat.png"), "relative": lambda place: os.path.relpath(place / "coat.png"),
           "dots": lambda place: f"{place}/feet/../coat.png", "slashes": lambda place: f"{place}//./coat.png", "folder link": through_link, "link": picture_link, "hard link": hard_link,
           "copy elsewhere": in_another_place, "opened": lambda place: Image.open(place / "coat.png"), "bytes of a path": lambda place: os.fsencode(place / "coat.png")}


def asked(reference, text="is red", **more):
    def make(folder):
        retriever = empty()
        retriever.index(closet(folder))
        return lambda: retriever.search(reference, text, **more)
    return make


def uploaded(contents, expected=NAMES - {"coat.png"}):
    def make(folder):
        place = closet(folder)
        retriever = empty()
        retriever.index(place)
        session = Session(retriever)

        def act():
            for name, content in contents(place): session.upload(name, content)
            found = {result.id for result in session.search("is blue").results}
            assert found == expected, found
            assert sum(picture.width * picture.height for picture in session.uploads.values()) < 10**8
        return act
    return make


def same_name_twice(place): return [("image.jpg", (place / "hat.png").read_bytes()), ("image.jpg", (place / "coat.png").read_bytes())]
def other_name(place): return [("<b>&.png", (place / "coat.png").read_bytes())]


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    draw = lambda: rng.randrange(2**32)
    shipped()  # before the processes of the cases are made
    for field, ways in FIELDS.items():
        for how in ways: yield Case("description", f"{field} {how}", description(field, how, draw()), names=r"index\.json")
    for how in ("cut", "empty", "page", "pointer", "random", "NUL", "nested", "digits", "surrogate", "folder", "pipe", "device"):
        yield Case("description", how, stored_file("index.json", how, draw()), names=r"index\.json")
    for how in ("bit", "bit", "bit", "cut", "cut", "empty", "page", "pointer", "random", "NUL", "absent", "folder", "pipe", "device", "loop"):
        yield Case("embeddings", how, stored_file("index.safetensors", how, draw()), names=r"index\.safetensors")
    for how in ("order", "fewer", "NaN", "whole", "flat", "wider", "zero", "name", "nothing said", "double"):
        yield Case("embeddings", how, stored_numbers(how), names=r"index\.safetensors")
    for name in ("index.json", "index.safetensors"):
        for how in ("cut", "empty", "random", "absent", "NUL", "page"):
            yield Case("store", f"{name} {how}", indexed_again(lambda store, name=name, how=how, at=draw(): damage(store / name, how, random.Random(at))), "accept")
    for how in ("order", "fewer", "NaN", "flat", "nothing said"): yield Case("store", how, indexed_again(lambda store, how=how: numbers(store / "index.safetensors", how)), "accept")
    for how in ("whole", "cut", "cut", "bit", "bit", "bit", "random", "head", "head", "longer", "another model"): yield Case("records", how, records(how, draw()), "accept")
    for field, ways in {"ids": ("drop", "type", "swap", "twice", "fewer", "entry", "renamed"), "rows": ("drop", "type", "swap", "fewer", "more", "entry"), "texts": ("drop", "type", "swap", "fewer", "entry", "renamed"),
                        "queries": ("drop", "type", "other")}.items():
        for how in ways: yield Case("lessons", f"{field} {how}", lesson_rows(field, how, draw()), names=r"lessons\.json")
    for name, ways in {ROWS: ("cut", "empty", "page", "nested", "pipe", "folder"), VECTORS: ("bit", "cut", "empty", "pointer", "absent", "pipe", "folder")}.items():
        for how in ways: yield Case("lessons", f"{name} {how}", lessons(lambda folder, name=name, how=how, at=draw(): damage(folder / name, how, random.Random(at))), names=r"lessons\.")
    for how in ("order", "fewer", "NaN", "flat", "zero", "name", "nothing said"): yield Case("lessons", how, lessons(lambda folder, how=how: numbers(folder / VECTORS, how)), names=r"lessons\.")
    for odd in (3, None, [], "row", ("target", 7), ("target", None), ("reference", ["a"]), ("captions", "is red"), ("captions", [1]), ("negatives", {"c": 1}), ("negatives", [None])):
        yield Case("what a run was taught", str(odd), told(rng.randrange(4), odd), names=r"negatives\.json, row \d")
    holiday, inner = {"holiday/far.png"}, {"inner.png/deep.png"}
    for change, more, listed in ((linked, holiday, ()), (linked_in_a_circle, holiday, ()), (linked_twice, {"one/far.png"}, ()), (below_another, (), ()), (upwards, (), {"up"}), (unplugged, (), {"usb"}), (to_itself, (), {"me"}),
                                 (pipe_in, (), {"pipe.png"}), (device_in, (), {"zero.jpg"}), (folder_called, inner, ()), (deep, (), ())):
        yield Case("folder", change.__name__, folder_with(change, NAMES | set(more), listed), "accept")
    yield Case("folder", "emptied", emptied)
    for name, spelled in SPELLED.items(): yield Case("reference", name, left_out(spelled), "accept")
    for name, reference in {"nobody": "nobody", "nothing": "", "NUL": "\0", "long": "x" * 9000, "number": 3, "None": None, "folder": "/", "device": "/dev/null", "home of nobody": "~nobody-here/a.png", "surrogate": "\ud800"}.items():
        yield Case("no reference", name, asked(reference), names="reference")
    for name, text in {"blanks": " \t\n", "half a character": "is \ud800", "number": 3, "None": None}.items(): yield Case("no text", name, asked("coat.png", text), names="text")
    for name, contents in {"same bytes": other_name, "second of one name": same_name_twice}.items(): yield Case("upload", name, uploaded(contents), "accept")
    for name, content in {"empty": b"", "words": b"shopping list", "page": b"<html>", "script": b"%!PS-Adobe-3.0 EPSF-3.0\n", "NUL": bytes(99), "tiny": b"P5 1 1 255\n\0", "phone": b"\0\0\0\x18ftypheic" + bytes(60)}.items():
        yield Case("upload", name, uploaded(lambda place, content=content: [("mine.png", content)]), names=r"mine\.png")
