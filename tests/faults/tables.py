"""Malformed tables of one's own pictures, made from a small sound one by seeded change: header, rows, cells, encodings, what lies in the place of the
table, pictures and roots. What spreadsheets write is harmless: then the table must be read as before."""
import csv
import io
import json
import random
from collections.abc import Iterator

from dqe_cir.data import load_dataset

from .datasets import INSTEAD, Kind, changed, png, put, replaced, roots_of, short
from .frame import Case

HEAD = ["reference", "text", "target", "split"]
ROWS = [["a", "is red", "b", "train"], ["b", "is long", "c", "train"], ["c", "has dots", "d", "train"], ["e", "is blue", "f", "val"]]


def written(head, rows, sign=","):
    csv.writer(text := io.StringIO(), delimiter=sign).writerows([head, *rows])
    return text.getvalue()


def table(root):
    "Six pictures, three requests to train with and one to evaluate."
    put(root / "triplets.csv", written(HEAD, ROWS))
    for name in "abcdef": put(root / "images" / f"{name}.png", png())


def lines(root):
    "The same as JSON lines."
    table(root)
    (root / "triplets.csv").unlink()
    put(root / "triplets.jsonl", "".join(json.dumps(dict(zip(HEAD, row))) + "\n" for row in ROWS))


def both(root): return [load_dataset("custom", root, split) for split in ("train", "val")][0]


CSV = Kind("custom", table, both, ("triplets.csv",), "images")
JSONL = Kind("custom_jsonl", lines, both, ("triplets.jsonl",), "images")
WRONG = {
    "reference": ["", " ", "z", "../a", "/etc/passwd", "a\0", "b/../a", "images", ".", "a" * 5000, "\ud83d".encode("utf-8", "replace").decode()],
    "target": ["", "z", "../b", "/dev/null", "b\0", "target", "9" * 400],
    "text": ["", " ", "...", "\0", "\t"],
    "split": ["", "valid", "Train ing", "test1", "0", "train,val"],
}
JUNK = {
    "empty": "", "blanks": " \n\n", "one line": "reference,text,target\n", "page": "<!DOCTYPE html><html>404</html>", "null bytes": "\0" * 60,
    "pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "prose": "not found", "open quote": written(HEAD, ROWS) + '"a,is',
    "a long cell": written(HEAD, [["a", "is " + "x" * 200_000, "z", "train"]]), "quotes": '"' * 999, "signs": ",;\t" * 99, "object": "{}", "list": "[]",
}


def cell_set(row, column, value):
    def edit(root):
        rows = [list(cells) for cells in ROWS]
        rows[row][HEAD.index(column)] = value
        put(root / "triplets.csv", written(HEAD, rows))
    return edit


def head_set(head):
    def edit(root): put(root / "triplets.csv", written(head, ROWS))
    return edit


def text_set(name, content):
    def edit(root): put(root / name, content)
    return edit


def line_set(row, change):
    "A line of the JSON lines, changed as a dictionary, or replaced by text."
    def edit(root):
        rows = [dict(zip(HEAD, cells)) for cells in ROWS]
        made = [json.dumps(cells) for cells in rows]
        made[row] = change if isinstance(change, str) else json.dumps(rows[row] | change)
        put(root / "triplets.jsonl", "\n".join(made) + "\n")
    return edit


def of_csv(rng) -> Iterator[Case]:
    for column, values in WRONG.items():
        for value in dict.fromkeys(rng.sample(values, 4) + values[:1]):
            yield changed(CSV, f"{column} {short(value)}", cell_set(rng.randrange(3), column, value), names="triplets.csv")
    for column in HEAD[:3]:
        yield changed(CSV, f"no column {column}", head_set([f"{name}s" if name == column else name for name in HEAD]), names="triplets.csv")
        yield changed(CSV, f"column {column} twice", head_set([column, *HEAD[1:]] if column != HEAD[0] else [HEAD[0], HEAD[0], *HEAD[2:]]), names="triplets.csv")
    for what, content in JUNK.items(): yield changed(CSV, f"table {what}", text_set("triplets.csv", content), names="triplets.csv")
    for what, instead in INSTEAD.items(): yield changed(CSV, f"table {what}", replaced("triplets.csv", instead), names="triplets")
    for count in (1, 3, 6): yield changed(CSV, f"{count} cells", text_set("triplets.csv", written(HEAD, [*ROWS, ["a"] * count])), names="triplets.csv")
    yield changed(CSV, "a row twice", text_set("triplets.csv", written(HEAD, [*ROWS, rng.choice(ROWS)])), names="triplets.csv")
    yield changed(CSV, "target is reference", cell_set(1, "target", "b"), names="triplets.csv")
    yield changed(CSV, "two tables", text_set("triplets.jsonl", "{}\n"), names="triplets")
    yield changed(CSV, "latin", text_set("triplets.csv", written(HEAD, [["a", "is café", "b", "train"], *ROWS[1:]]).encode("latin-1")), names="triplets.csv")
    for what, sign, code in (("mark", ",", "utf-8-sig"), ("semicolons", ";", "utf-8"), ("tabs", "\t", "utf-16")):
        yield changed(CSV, what, text_set("triplets.csv", written(HEAD, ROWS, sign).encode(code)), "accept")
    yield changed(CSV, "lines of Unix", text_set("triplets.csv", written(HEAD, ROWS).replace("\r\n", "\n")), "accept")
    yield changed(CSV, "blank lines", text_set("triplets.csv", written(HEAD, ROWS) + "\r\n\r\n"), "accept")


def of_lines(rng) -> Iterator[Case]:
    odd = [None, 3, 1.5, True, [], {}, ["a"], "", "z", "../a"]
    for column in HEAD[:3]:
        for value in rng.sample(odd, 4):
            if column == "text" and value in ("z", "../a"): continue  # words like others
            yield changed(JSONL, f"{column} {short(value)}", line_set(rng.randrange(3), {column: value}), names="triplets.jsonl")
    for what, line in (("no object", "[1]"), ("cut", '{"reference": "a", "te'), ("nested", "[" * 100_000), ("word", '"a"'), ("not a number", '{"reference": NaN}'), ("null", "null")):
        yield changed(JSONL, f"line {what}", line_set(rng.randrange(3), line), names="triplets.jsonl")
    for what, content in JUNK.items(): yield changed(JSONL, f"table {what}", text_set("triplets.jsonl", content), names="triplets.jsonl")


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    yield from of_csv(rng)
    yield from of_lines(rng)
    yield from roots_of(CSV)
