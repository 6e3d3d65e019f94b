"""Malformed data sets, made from small sound ones by seeded change: annotation files, rows, split files, pictures, layouts and roots of FashionIQ, CIRR, CIRCO,
HP-FashionIQ and the garments, and rankings for the servers. Some changes are harmless: then the data set must be read as before."""
import atexit
import functools
import io
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from dqe_cir.data import load_dataset, load_hp_fashioniq, make_garments
from dqe_cir.data.datasets import complete
from dqe_cir.evaluator import circo_submission, cirr_submission

from .frame import Case

CATEGORIES = ("dress", "shirt", "toptee")


# ---- small sound data sets

@functools.cache
def png(colour="crimson"):
    "The bytes of a picture of 12 by 12 pixels."
    Image.new("RGB", (12, 12), colour).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def put(path, content):
    "Write bytes, text or JSON to a path; what was there, a hard link perhaps, is not written through."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if isinstance(content, bytes): path.write_bytes(content)
    else: path.write_text(content if isinstance(content, str) else json.dumps(content))


def fashioniq(root):
    "Three categories, four queries each in six images; one image of each is in no query."
    for category in CATEGORIES:
        ids = [f"B{category}{i}" for i in range(6)]
        rows = [dict(candidate=ids[i], target=ids[i + 1], captions=[f"is n{i} blue", "has dots"]) for i in range(4)]
        put(root / "captions" / f"cap.{category}.train.json", rows)
        put(root / "image_splits" / f"split.{category}.train.json", ids)
        for name in ids: put(root / "images" / f"{name}.png", png())


def cirr(root):
    "Two groups of six; three queries each."
    names = [f"train-{i}-0-img0" for i in range(12)]
    groups = names[:6], names[6:]
    rows = [dict(pairid=10 * g + i, reference=group[i], target_hard=group[i + 1], target_soft={group[i + 1]: 1.0, group[i + 2]: 0.5, group[0]: -1.0},
                 caption=f"shows {i} dogs", img_set=dict(id=g, members=group)) for g, group in enumerate(groups) for i in range(3)]
    put(root / "captions" / "cap.rc2.train.json", rows)
    put(root / "image_splits" / "split.rc2.train.json", {name: f"./train/{i}/{name}.png" for i, name in enumerate(names)})
    for i, name in enumerate(names): put(root / "img_raw" / "train" / str(i) / f"{name}.png", png())


def circo(root):
    "Four queries in a COCO of twenty."
    rows = [dict(id=i, reference_img_id=10 + i, target_img_id=20 + i, gt_img_ids=[20 + i, 25], relative_caption=f"has {i} dogs", shared_concept="a dog",
                 semantic_aspects=["cardinality", "negation"]) for i in range(4)]
    put(root / "annotations" / "val.json", rows)
    put(root / "COCO2017_unlabeled" / "annotations" / "image_info_unlabeled2017.json", dict(images=[dict(id=i, file_name=f"{i:012d}.jpg") for i in range(10, 30)]))
    for i in range(10, 30): put(root / "COCO2017_unlabeled" / "unlabeled2017" / f"{i:012d}.jpg", png())


def preferences(root):
    "Two persons, a set of three questions each."
    path = lambda i: f"/-/image_data/shirt/B{i:03d}.jpg"
    found = lambda start: dict(img_path=[path(i) for i in range(start, start + 5)], user_score="3")
    lists = dict(ref_img_paths=[path(i) for i in range(3)], targ_img_paths=[path(3 + i) for i in range(3)], sentences=["is redand has dotsdotmark", "is long", "is blue"],
                 retrieved_set1=[found(10 + i) for i in range(3)], retrieved_set2=[found(20 + i) for i in range(3)])
    lists["preferred set"] = ["1", "2", "1"]
    put(root / "hpfiq.json", {f"user_{i}": {"question_set_1": lists} for i in (1, 2)})
    for i in range(30): put(root / "images" / f"B{i:03d}.png", png())


@functools.cache
def drawn():
    "The smallest garments, drawn once."
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_garments(folder, "smoke", progress=False)


def garments(root):
    "A copy of the garments without CIRR's layout; the pictures are hard links."
    shutil.copytree(drawn(), root, copy_function=os.link, ignore=shutil.ignore_patterns("cirr"))


@dataclass(frozen=True)
class Kind:
    "A data set: who builds it, who reads it, and its files of annotations."
    name: str
    build: Callable
    read: Callable
    texts: tuple[str, ...]
    pictures: str


KINDS = {kind.name: kind for kind in (
    Kind("fashioniq", fashioniq, lambda root: load_dataset("fashioniq", root, "train"), ("captions/cap.shirt.train.json", "image_splits/split.shirt.train.json"), "images"),
    Kind("cirr", cirr, lambda root: load_dataset("cirr", root, "train"), ("captions/cap.rc2.train.json", "image_splits/split.rc2.train.json"), "img_raw/train/1"),
    Kind("circo", circo, lambda root: load_dataset("circo", root, "val"), ("annotations/val.json", "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"),
         "COCO2017_unlabeled/unlabeled2017"),
    Kind("hp_fashioniq", preferences, lambda root: complete(load_hp_fashioniq(root)), ("hpfiq.json",), "images"),
    Kind("garments", garments, lambda root: load_dataset("garments", root, "val"), ("garments.json", "fashioniq/captions/cap.dress.val.json"), "fashioniq/images"),
)}


def changed(kind, name, change, expected="refuse", names=""):
    "A case: build the sound data set, change it, read it. `change(root)` may return another root to give."
    def make(folder):
        root = folder / "root"
        kind.build(root)
        before = kind.read(root).triplets if expected == "accept" else None
        given = change(root) or root

        def act():
            found = kind.read(given)
            if before is not None: assert found.triplets == before and all(found.files[image].is_file() for image in found.used)
        return act
    return Case(kind.name, f"{kind.name}: {name}", make, expected, names)


# ---- what can happen to any file of JSON

def cut(text, rng): return text[:rng.randrange(1, len(text.rstrip()) - 1)]


TEXTS = {
    "cut": cut, "cut again": cut, "empty": lambda text, rng: "", "blanks": lambda text, rng: " \n\t", "prose": lambda text, rng: "not found",
    "garbage behind": lambda text, rng: text + rng.choice("]}x,"), "nested": lambda text, rng: "[" * 100_000, "nested objects": lambda text, rng: '{"a":' * 100_000,
    "digits": lambda text, rng: f"[{'9' * 10_000}]", "nan": lambda text, rng: text.rstrip()[:1] + ("NaN," if text[0] == "[" else '"a": NaN, ') + text[1:],
    "page": lambda text, rng: "<!DOCTYPE html><html>404</html>", "pointer": lambda text, rng: "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "surrogate": lambda text, rng: text.replace('": "', '": "\\ud83d', 1) if '": "' in text else '["\\ud800"]', "number": lambda text, rng: str(rng.randrange(9)),
    "word": lambda text, rng: '"text"', "null": lambda text, rng: "null", "other form": lambda text, rng: "{}" if text[0] == "[" else "[]", "rows of null": lambda text, rng: "[null]",
    "latin": lambda text, rng: text.encode()[:-2] + b"\xe9" + text.encode()[-2:], "null bytes": lambda text, rng: b"\0" * len(text),
    "key twice": lambda text, rng: text.replace("{", '{"a": 1, "a": 2, ', 1) if "{" in text else '[{"a": 1, "a": 2}]',
}
ENCODED = {"mark": lambda text: b"\xef\xbb\xbf" + text.encode(), "utf-16": lambda text: text.encode("utf-16"), "utf-32": lambda text: text.encode("utf-32"),
           "lines of Windows": lambda text: json.dumps(json.loads(text), indent=1).replace("\n", "\r\n").encode()}


def edited(file, change, rng):
    "A change of a file's text."
    def edit(root): put(root / file, change((root / file).read_text(), rng))
    return edit


def encoded(file, encode):
    def edit(root): put(root / file, encode((root / file).read_text()))
    return edit


def folder_instead(path):
    path.unlink()
    path.mkdir()


def pipe_instead(path):
    path.unlink()
    os.mkfifo(path)


def link_to_nowhere(path):
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def link_elsewhere(path):
    path.rename(path.with_suffix(".kept"))
    path.symlink_to(path.with_suffix(".kept"))


INSTEAD = {"folder": folder_instead, "pipe": pipe_instead, "link to nowhere": link_to_nowhere, "missing": Path.unlink}


def replaced(file, instead):
    def edit(root): instead(root / file)
    return edit


def texts_of(kind, rng):
    for file in kind.texts:
        name = Path(file).name
        for what, change in TEXTS.items(): yield changed(kind, f"{name} {what}", edited(file, change, rng), names=name)
        for what, encode in ENCODED.items(): yield changed(kind, f"{name} {what}", encoded(file, encode), "accept")
        for what, instead in INSTEAD.items():
            if "image_info" in name and what == "missing": continue  # CIRCO is read without COCO's list as well
            yield changed(kind, f"{name} {what}", replaced(file, instead), names=name)
        yield changed(kind, f"{name} a link", replaced(file, link_elsewhere), "accept")


# ---- what can happen to a value

WRONG = (None, True, 3.5, -1, [], {}, [["x"]], {"x": 1}, "", "../x", "/etc/passwd", "a\0b", "x" * 100_000, "two\nlines", 10**25)
NO_TEXT = (None, True, 3.5, 7, [], {}, ["x"], "", " \t", "\u3000", "\u200b .")


def value_set(file, place, value):
    "A change of one value of a file: `place` leads to it, and a place of a missing last name is made."
    def edit(root):
        content = json.loads((root / file).read_text())
        *way, last = place
        inner = functools.reduce(lambda part, step: part[step], way, content)
        inner[last] = value
        put(root / file, content)
    return edit


def value_dropped(file, place):
    def edit(root):
        content = json.loads((root / file).read_text())
        *way, last = place
        del functools.reduce(lambda part, step: part[step], way, content)[last]
        put(root / file, content)
    return edit


def content_changed(file, change):
    "A change of all a file holds; `change` returns the new content, or edits the one it is given and returns None."
    def edit(root):
        content = json.loads((root / file).read_text())
        new = change(content)
        put(root / file, content if new is None else new)
    return edit


def short(value): return repr(value)[:16].replace("/", "|").replace("\0", "0")


def fields_of(kind, file, rows, fields, rng):
    "For each field of a row: left out, and three wrong values."
    for field, wrong in fields.items():
        row = rng.randrange(rows)
        yield changed(kind, f"{field} left out", value_dropped(file, (row, field)), names=Path(file).name)
        for value in rng.sample(wrong, 3): yield changed(kind, f"{field} {short(value)}", value_set(file, (row, field), value), names=Path(file).name)


# ---- what can happen to pictures

def moved(to, suffix=None):
    "All pictures moved from their folder to another; `{category}` in it is the category that a name tells."
    def edit(root):
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".png", ".jpg") and p.is_file()):
            category = next((name for name in CATEGORIES if name in path.stem), "dress")
            new = root / to.format(category=category) / (path.stem + (suffix or path.suffix))
            new.parent.mkdir(parents=True, exist_ok=True)
            path.rename(new)
    return edit


def one_picture(kind, rng, change):
    "A change of one picture that is looked at."
    def edit(root):
        used = kind.read(root)
        change(used.files[rng.choice(used.used)])
    return edit


def another_beside(path): put(path.with_suffix(".bmp"), png("navy"))
def copy_beside(path): put(path.with_suffix(".webp"), path.read_bytes())
def renamed(suffix): return lambda path: path.rename(path.with_suffix(suffix))


def pictures_of(kind, rng):
    drawn = r"make_garments\(\) draw it again"  # of drawn pictures that are gone the remedy is to draw them
    for what, change in {"missing": Path.unlink, "folder": folder_instead, "pipe": pipe_instead, "another of the name": another_beside, "as gif": renamed(".gif"),
                         "link to nowhere": link_to_nowhere}.items():
        yield changed(kind, f"picture {what}", one_picture(kind, rng, change), names=rf"[\w-]+\.\w+|{drawn}")
    for what, change in {"copy of the name": copy_beside, "a link": link_elsewhere, "capital ending": lambda path: path.rename(path.with_suffix(".JPG"))}.items():
        yield changed(kind, f"picture {what}", one_picture(kind, rng, change), "accept")
    yield changed(kind, "pictures elsewhere", moved("somewhere/else"), names=f"somewhere/else|{drawn}")
    yield changed(kind, "pictures as tiff", moved("images", ".tiff"), names=rf"\.tiff is there|{drawn}")


# ---- roots

def inside(folder): return lambda root: root / folder
def above(root): return root.parent


def roots_of(kind):
    given = {"above": above, "missing": inside("nowhere"), "null": inside("a\0b"), "long": inside("x" * 3000), "deep": inside("x/" * 3000), "the pictures": inside(kind.pictures),
             "annotations": inside(str(Path(kind.texts[0]).parent) if "/" in kind.texts[0] else "nothing")}
    for what, change in given.items(): yield changed(kind, f"root {what}", change)

    def a_file(root): return root / kind.texts[0]
    if kind.name != "hp_fashioniq": yield changed(kind, "root a file", a_file)

    def a_pipe(root):
        os.mkfifo(root.parent / "pipe")
        return root.parent / "pipe"
    yield changed(kind, "root a pipe", a_pipe)


# ---- each data set

def fashioniq_cases(kind, rng):
    captions, listing = kind.texts
    names = Path(captions).name
    blanks = [["", ""], [" ", "\t"], ["\u3000", " ."], ["is red"], ["a", "b", "c"], ["is red", None], ["is red", ["x"]], "is red", [], {}]
    yield from fields_of(kind, captions, 4, dict(candidate=WRONG, target=WRONG), rng)
    for value in blanks: yield changed(kind, f"captions {short(value)}", value_set(captions, (rng.randrange(4), "captions"), value), names=names)
    yield changed(kind, "no rows", content_changed(captions, lambda rows: []), names=names)
    yield changed(kind, "a row twice", content_changed(captions, lambda rows: rows + [rng.choice(rows)]), names=names)
    yield changed(kind, "target is reference", content_changed(captions, lambda rows: rows[2].update(target=rows[2]["candidate"])), names=names)
    yield changed(kind, "another layout", lambda root: put(root / "captions" / "cap.rc2.train.json", []), names="CIRR's layout")
    for value in WRONG[:10] + WRONG[11:14]:
        yield changed(kind, f"split names {short(value)}", content_changed(listing, functools.partial(one_more, value)), names=Path(listing).name)
    yield changed(kind, "split names one twice", content_changed(listing, lambda ids: ids + [rng.choice(ids)]), names=Path(listing).name)
    yield changed(kind, "split lacks one", content_changed(listing, lambda ids: ids[1:]), names=names)
    yield changed(kind, "split is empty", content_changed(listing, lambda ids: []), names=names)
    yield changed(kind, "unused picture missing", lambda root: (root / "images" / "Bshirt5.png").unlink(), "accept")
    for place in ("image", "resized_image", "image_data/{category}", "images/{category}"): yield changed(kind, f"pictures in {place}", moved(place), "accept")
    yield changed(kind, "one blank caption", lambda root: None, "accept")


def one_more(value, names): names.append(value)


def cirr_cases(kind, rng):
    captions, listing = kind.texts
    names, split = Path(captions).name, Path(listing).name
    yield from fields_of(kind, captions, 6, dict(pairid=(None, True, 7.0, "seven", [7], {}, -1, 10**25, "\u0667", "7\n"), reference=WRONG, target_hard=WRONG, caption=NO_TEXT,
                                                 img_set=(None, True, 3, [], {}, "x", {"id": 1}, {"members": {}}, {"members": None})), rng)
    for value in (True, [], 3, "x", {"train-1-0-img0": True}, {"train-1-0-img0": "x"}, {"train-1-0-img0": 7.5}, {"nobody": 1.0}, {"nobody": -1.0}, {"train-1-0-img0": 10**400}):
        yield changed(kind, f"target_soft {short(value)}", value_set(captions, (0, "target_soft"), value), names=names)
    for what, change in {"empty": lambda m: [], "five": lambda m: m[:5], "seven": lambda m: m + ["train-11-0-img0"], "one twice": lambda m: m[:5] + m[:1],
                         "without reference": lambda m: [m[0], *m[2:], "train-11-0-img0"], "a stranger": lambda m: m[:5] + ["nobody"], "numbers": lambda m: [1, 2, 3, 4, 5, 6],
                         "nested": lambda m: [m] * 6}.items():
        yield changed(kind, f"members {what}", content_changed(captions, functools.partial(members_changed, change)), names=names)
    yield changed(kind, "no rows", content_changed(captions, lambda rows: []), names=names)
    yield changed(kind, "pairid twice", content_changed(captions, lambda rows: rows[1].update(pairid=str(rows[0]["pairid"]))), names=names)
    yield changed(kind, "target is reference", content_changed(captions, lambda rows: rows[2].update(target_hard=rows[2]["reference"])), names=names)
    yield changed(kind, "another layout", lambda root: put(root / "captions" / "cap.dress.train.json", []), names="FashionIQ's layout")
    for value in (None, True, 3, [], {}, "", "/etc/passwd", "../../train-1-0-img0.png", "./train/../../../train-1-0-img0.png", "./train/1/train-1-0-img0\0.png",
                  "./train/0/train-0-0-img0.png", "x/" * 3000, "..", ".", "\\..\\train-1-0-img0"):
        yield changed(kind, f"path {short(value)}", value_set(listing, ("train-1-0-img0",), value), names=split)
    for name in ("../x", "/x", "", "a\0", "a\n", "y" * 300): yield changed(kind, f"name {short(name)}", value_set(listing, (name,), f"./train/1/{name}.png"), names=split)
    yield changed(kind, "paths exchanged", content_changed(listing, lambda paths: dict(zip(paths, [*list(paths.values())[1:], list(paths.values())[0]]))), names=split)
    yield changed(kind, "split lacks one", value_dropped(listing, ("train-1-0-img0",)), names=names)
    yield changed(kind, "split is empty", content_changed(listing, lambda paths: {}), names=names)
    for place in ("img_raw/train", "train", "images/train"): yield changed(kind, f"pictures in {place}", moved(place), "accept")
    yield changed(kind, "pairids as digits", content_changed(captions, digits), "accept")


def members_changed(change, rows): rows[1]["img_set"]["members"] = change(rows[1]["img_set"]["members"])


def digits(rows):
    for row in rows: row["pairid"] = str(row["pairid"])


def circo_cases(kind, rng):
    rows, listing = kind.texts
    names, listed = Path(rows).name, Path(listing).name
    numbers = (None, True, 3.5, "x", [], {}, -1, 10**25, "", "\u0667", "1" * 5000, "7.0", [12])
    yield from fields_of(kind, rows, 4, dict(id=numbers, reference_img_id=numbers, target_img_id=numbers, relative_caption=NO_TEXT), rng)
    for value in (7, True, "negation", {"a": 1}, [7], [["negation"]], [None], ["negation", "negation"], ["two\nlines"]):
        yield changed(kind, f"aspects {short(value)}", value_set(rows, (rng.randrange(4), "semantic_aspects"), value), names=names)
    for value in (None, [], [25], [20, 20], [20, "20"], [20, 10], [20, 3.5], [20, None], [20, [25]], 20, True, "20", {"20": 1}, [20, 99]):
        yield changed(kind, f"right answers {short(value)}", value_set(rows, (0, "gt_img_ids"), value), names=rf"{names}|{listed}")
    yield changed(kind, "no rows", content_changed(rows, lambda rows: []), names=names)
    yield changed(kind, "id twice", content_changed(rows, lambda rows: rows[1].update(id="0")), names=names)
    yield changed(kind, "target is reference", content_changed(rows, lambda rows: rows[1].update(reference_img_id=21)), names=names)
    for what, change in {"one image": lambda images: images[:1], "half": lambda images: images[10:], "one left out": lambda images: images[:-1], "twice": lambda images: images + images[:1],
                         "float": lambda images: [dict(id=image["id"] + 0.5) for image in images], "true": lambda images: images + [dict(id=True)],
                         "no objects": lambda images: [image["id"] for image in images], "no ids": lambda images: [{} for _ in images], "none": lambda images: None,
                         "empty": lambda images: [], "text": lambda images: "images"}.items():
        yield changed(kind, f"listing {what}", content_changed(listing, functools.partial(images_changed, change)), names=listed)
    yield changed(kind, "two files of a number", lambda root: put(root / kind.pictures / "12.jpg", png()), names="'12' twice")
    yield changed(kind, "strange names beside", lambda root: put(root / kind.pictures / "\u00b2.jpg", png()), "accept")
    yield changed(kind, "no listing", lambda root: (root / listing).unlink(), "accept")
    yield changed(kind, "no aspects", content_changed(rows, lambda rows: None), "accept")


def images_changed(change, content): content["images"] = change(content["images"])


def preference_cases(kind, rng):
    file, = kind.texts
    user, number = f"user_{rng.randrange(1, 3)}", "question_set_1"
    lists = ("ref_img_paths", "targ_img_paths", "sentences", "retrieved_set1", "retrieved_set2", "preferred set")
    wrong = {"ref_img_paths": WRONG[:11] + WRONG[13:], "targ_img_paths": WRONG[:11] + WRONG[13:], "sentences": NO_TEXT, "preferred set": (None, True, 1.0, "3", "", "one", [], ["1"], {}, 0, 10**25)}
    sets = (None, True, [], {}, "x", {"img_path": None}, {"img_path": []}, {"img_path": ["a.jpg"] * 5}, {"img_path": [1, 2, 3, 4, 5]}, {"img_path": ["a", "b", "c", "d", ""]},
            {"img_path": ["a", "b", "c", "d", ["e"]]}, {"img_path": ["a", "b", "c", "d", ".."]}, {"img_path": {"a": 1}}, {"img_path": list("abcdef")})
    wrong |= {"retrieved_set1": sets, "retrieved_set2": sets}
    for name in lists:
        place = (user, number, name)
        yield changed(kind, f"{name} left out", value_dropped(file, place), names=kind.texts[0])
        yield changed(kind, f"{name} shorter", value_dropped(file, (*place, 0)), names=kind.texts[0])
        for value in rng.sample(wrong[name], 4): yield changed(kind, f"{name} holds {short(value)}", value_set(file, (*place, rng.randrange(3)), value), names=kind.texts[0])
        for value in rng.sample((None, True, 3, {}, "x", [[]]), 2): yield changed(kind, f"{name} is {short(value)}", value_set(file, place, value), names=kind.texts[0])
    for value in (None, True, 3, "x", [], [{}]):
        yield changed(kind, f"sets are {short(value)}", value_set(file, (user,), value), names=kind.texts[0])
        yield changed(kind, f"lists are {short(value)}", value_set(file, (user, number), value), names=kind.texts[0])
    for name in ("", "two\nlines", "z" * 5000): yield changed(kind, f"person {short(name)}", value_set(file, (name,), {name: {}}), names=kind.texts[0])
    yield changed(kind, "no questions", content_changed(file, lambda users: {}), names=kind.texts[0])
    yield changed(kind, "both sets the same everywhere", content_changed(file, same_sets), names=kind.texts[0])
    yield changed(kind, "target is reference", value_set(file, (user, number, "targ_img_paths", 0), "/x/shirt/B000.jpg"), names=kind.texts[0])
    yield changed(kind, "more fields", value_set(file, (user, number, "remark"), ["x"]), "accept")
    for place in ("image", "resized_image", "images/{category}"): yield changed(kind, f"pictures in {place}", moved(place), "accept")


def same_sets(users):
    for sets in users.values():
        for lists in sets.values(): lists["retrieved_set2"] = lists["retrieved_set1"]


def garment_cases(kind, rng):
    truth, gallery = "garments.json", json.loads((drawn() / "fashioniq/image_splits/split.shirt.val.json").read_text())
    known = json.loads((drawn() / truth).read_text())
    queries = sorted(known["relevant"]["val"])
    for field in ("category", "colour", "pattern", "sleeve", "neckline", "length", "held_out"):
        image = rng.choice(gallery)
        yield changed(kind, f"{field} left out", value_dropped(truth, ("images", image, field)), names=truth)
        for value in rng.sample((None, 3, [], {}, ["red"], "tartan", "", "RED", 0.5), 3):
            yield changed(kind, f"{field} {short(value)}", value_set(truth, ("images", image, field), value), names=truth)
    for name in ("images", "relevant", "mentions"):
        yield changed(kind, f"{name} left out", value_dropped(truth, (name,)), names=truth)
        for value in rng.sample((None, True, 3, [], {}, "x", [{}]), 3): yield changed(kind, f"{name} {short(value)}", value_set(truth, (name,), value), names=truth)
    places = [("images", rng.choice(gallery)), ("relevant", "val"), ("relevant", "val", rng.choice(queries)), ("mentions", rng.choice(queries))]
    for place in places:
        yield changed(kind, f"{'-'.join(place[:2])} left out", value_dropped(truth, place), names=truth)
        for value in rng.sample((None, True, 3, "x", [3], [None], {"x": 1}, [["x"]]), 3):
            yield changed(kind, f"{'-'.join(place)} {short(value)}", value_set(truth, place, value), names=truth)
    query = rng.choice(queries)
    right = known["relevant"]["val"][query]
    category, split, row = query.rsplit("-", 2)
    asked = json.loads((drawn() / f"fashioniq/captions/cap.{category}.{split}.json").read_text())[int(row)]
    for what, value in {"without target": [name for name in right if name != asked["target"]], "with reference": right + [asked["candidate"]], "twice": right + right[:1],
                        "with a stranger": right + ["nobody"], "none": []}.items():
        yield changed(kind, f"answers {what}", value_set(truth, ("relevant", "val", query), value), names=truth)
    for value in ({"colour": []}, {"colour": "red"}, {"colour": ["tartan"]}, {"price": ["high"]}, {"colour": None}, {"colour": [["red"]]}, {"colour": [3]}):
        yield changed(kind, f"mentions {short(value)}", value_set(truth, ("mentions", query), value), names=truth)
    yield changed(kind, "no rows of a category", lambda root: put(root / kind.texts[1], []), names="cap.dress.val.json")
    yield changed(kind, "more fields", value_set(truth, ("remark",), "x"), "accept")


# ---- rankings for the servers

def submitted(name, submit, *values):
    def make(folder): return lambda: submit(*values, queries=None)
    return Case("submission", f"submission: {name}", make, "refuse", r"query|ranking|pair id|image number")


def submission_cases(rng):
    numbers, names = list(range(100, 150)), [f"test1-{i}-0-img0" for i in range(50)]
    for value in (True, None, 3.5, -1, "x", "", "9" * 5000, [7], "\u0667", "1.0"):
        place = rng.randrange(50)
        yield submitted(f"image {short(value)}", circo_submission, [0], [[*numbers[:place], value, *numbers[place + 1:]]])
        yield submitted(f"query {short(value)}", circo_submission, [value], [numbers])
    for value in (None, 3, "x" * 50, True): yield submitted(f"list {short(value)}", circo_submission, [0], [value])
    for value in (None, 3, ["x"], "a/b", "a.png", True):
        yield submitted(f"name {short(value)}", cirr_submission, [7], [[value, *names[1:]]], "recall")
    for value in (None, 3, "x" * 50): yield submitted(f"names {short(value)}", cirr_submission, [7], [value], "recall")
    for value in (True, None, "x", -7, 7.0, "9" * 5000 + "x"): yield submitted(f"pair {short(value)}", cirr_submission, [value], [names], "recall")


OWN = {"fashioniq": fashioniq_cases, "cirr": cirr_cases, "circo": circo_cases, "hp_fashioniq": preference_cases, "garments": garment_cases}


def every(seed, kinds):
    for name in kinds:
        kind, rng = KINDS[name], random.Random(f"{seed} {name}")
        yield from texts_of(kind, rng)
        yield from pictures_of(kind, rng)
        yield from roots_of(kind)
        yield from OWN[name](kind, rng)
    yield from submission_cases(random.Random(f"{seed} submission"))


def cases(seed: int, kinds: tuple[str, ...] = tuple(KINDS)) -> Iterator[Case]:
    "All cases of a seed: which byte, row, field and value are changed is drawn. Without the garments nothing has to be drawn first."
    named = Counter()
    for case in every(seed, kinds):
        named[case.name] += 1
        yield replace(case, name=f"{case.name} ({named[case.name]})") if named[case.name] > 1 else case
