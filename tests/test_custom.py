"Own pictures and a table of rows, FashionIQ's layout with other categories, runs that begin from other runs."
import csv
import io
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dqe_cir.data import load_dataset
from dqe_cir.data.verify import main
from dqe_cir.files import DataError

GOOD = [["a", "is red", "b", "train"], ["b", "is long", "c", "train"], ["d", "is blue", "e", "val"], ["d", "has dots", "f", "val"]]
HEAD = ["reference", "text", "target", "split"]


def shop(folder, rows=GOOD, head=HEAD, sign=",", encoding="utf-8"):
    "A folder of eight pictures and a table."
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in "abcdefgh":
        if not (folder / "images" / f"{name}.png").exists(): Image.new("RGB", (16, 16), "teal").save(folder / "images" / f"{name}.png")
    csv.writer(text := io.StringIO(), delimiter=sign).writerows([head, *rows])
    (folder / "triplets.csv").write_bytes(text.getvalue().encode(encoding))
    return folder


WRONG = {
    "missing column": (dict(head=["reference", "caption", "target", "split"]), "row 1", "no column 'text'", "rename"),
    "unknown picture": (dict(rows=[*GOOD, ["a", "is red", "zzz", "train"]]), "row 6", "'zzz'", "add the picture"),
    "reference is target": (dict(rows=[*GOOD, ["a", "is red", "a.png", "train"]]), "row 6", "the reference itself", "name another"),
    "empty text": (dict(rows=[*GOOD, ["a", " . ", "c", "train"]]), "row 6", "no text", "write the request"),
    "duplicate": (dict(rows=[*GOOD, GOOD[1]]), "row 6", "the same as row 3", "remove one"),
    "wrong split": (dict(rows=[*GOOD, ["a", "is red", "c", "valid"]]), "row 6", "'valid'", "write train, val or test"),
    "one row": (dict(rows=[GOOD[0][:3]], head=HEAD[:3]), "row 2", "1 row", "add rows"),
    "no target": (dict(rows=[*GOOD, ["a", "is red", "", "train"]]), "row 6", "no target", "name the picture"),
    "comma in a text": (dict(rows=[*GOOD, ["a", "is red", " long", "c", "train"]]), "row 6", "5 cells", "double quotes"),
    "half a column": (dict(rows=[*GOOD, ["a", "is red", "c", ""]]), "row 6", "no split", "fill it in"),
    "own positive": (dict(rows=[[*row, "a"] for row in GOOD], head=[*HEAD, "positives"]), "row 2", "among its positives", "take it out"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_is_told_in_one_line(name, tmp_path, capsys):
    made, *words = WRONG[name]
    root = shop(tmp_path / "shop", **made)
    with pytest.raises(DataError) as refused: load_dataset("custom", root, "train")
    said = str(refused.value)
    assert "\n" not in said and "triplets.csv" in said and all(word in said for word in words), said
    assert main(["verify", "--dataset", "custom", "--root", str(root)]) == 1 and words[0] in capsys.readouterr().out


@pytest.mark.parametrize("made", [dict(encoding="utf-8-sig"), dict(sign=";"), dict(sign="\t", encoding="utf-16"), dict(sign=";", encoding="utf-8-sig")])
def test_what_spreadsheets_write_is_read(made, tmp_path):
    plain = load_dataset("custom", shop(tmp_path / "shop"), "val")
    assert load_dataset("custom", shop(tmp_path / "shop", **made), "val").triplets == plain.triplets
    assert (plain.data, plain.title, plain.gallery) == ("custom", "custom: shop", list("abcdefgh"))


def test_the_same_rows_as_jsonl_and_parquet(tmp_path):
    root = shop(tmp_path / "shop")
    plain = load_dataset("custom", root, "train").triplets
    rows = [dict(zip(HEAD, row)) for row in GOOD]
    (root / "triplets.csv").unlink()
    (root / "triplets.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = load_dataset("custom", root, "train").triplets
    assert [t.captions for t in found] == [t.captions for t in plain] and [t.target for t in found] == [t.target for t in plain]
    (root / "triplets.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1])[:-9])
    with pytest.raises(DataError, match="row 2, is not JSON"): load_dataset("custom", root, "train")
    (root / "triplets.jsonl").unlink()
    (root / "triplets.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="needs pyarrow: pip install dqe-cir|is no Parquet file"): load_dataset("custom", root, "train")
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    pq.write_table(pa.Table.from_pylist(rows), root / "triplets.parquet")
    assert [t.target for t in load_dataset("custom", root, "train").triplets] == [t.target for t in plain]


rows_of = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("abcdefgh"), st.sampled_from(["is red", "is long"])), min_size=1, max_size=12, unique=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows_of)
def test_a_hold_out_never_tears_pictures_apart(tmp_path, drawn):
    "Any table without splits is held out cleanly, alike every time, or refused in a line."
    rows = [[reference, text, target] for reference, target, text in drawn if reference != target]
    if not rows: return
    root = shop(tmp_path / "shop", rows, HEAD[:3])
    try:
        train, val = (load_dataset("custom", root, split) for split in ("train", "val"))
    except DataError as refused:
        assert "row 2: nothing can be held out" in str(refused) and "\n" not in str(refused)
        return
    pictures = [{name for t in found.triplets for name in (t.reference, t.target)} for found in (train, val)]
    assert not pictures[0] & pictures[1] and len(train.triplets) + len(val.triplets) == len(rows)
    assert 2 * len(val.triplets) <= len(rows) and load_dataset("custom", root, "val").triplets == val.triplets
    assert "held out as val (whole groups, seed 0)" in train.note


JUNK = ["", "a", "zzz", "../a", "a|b", "\0", "é\u2028", '"', "a,b", "x" * 300, "train", "val", "7", "/etc/passwd", "a\nb"]


@pytest.mark.parametrize("seed", range(60))
def test_any_table_is_read_or_refused_in_one_line(seed, tmp_path):
    rng = random.Random(seed)
    head = rng.sample([*HEAD, "text2", "category", "positives", "subset", "price"], rng.randint(3, 9))
    rows = [[rng.choice([*JUNK, *"abc"]) for _ in range(rng.randint(1, len(head) + 1))] for _ in range(rng.randint(0, 5))]
    root = shop(tmp_path / "shop", rows, head)
    content = bytearray((root / "triplets.csv").read_bytes())
    if rng.random() < 0.3: del content[rng.randrange(len(content)):]
    if rng.random() < 0.2: content[rng.randrange(len(content) + 1):] = b"\xff"
    (root / "triplets.csv").write_bytes(bytes(content))
    try: load_dataset("custom", root, "val")
    except DataError as refused: assert str(refused).isprintable() and "triplets.csv" in str(refused)


def test_categories_positives_and_subsets(tmp_path):
    rows = [["a", "is red", "b", "train", "coat", "", "c"], ["a", "is red", "c", "val", "coat", "d|e.png", "b|d"], ["f", "is long", "g", "val", "hat", "", "h"]]
    root = shop(tmp_path / "shop", rows, [*HEAD, "category", "positives", "subset"])
    val = load_dataset("custom", root, "val")
    assert val.galleries == {"coat": list("abcde"), "hat": list("fgh")}
    assert val.triplets[0].positives == {"c", "d", "e"} and val.triplets[0].subset == ("a", "c", "b", "d")
    hats = load_dataset("custom", root, "val", categories="hat")
    assert hats.title == "custom: shop (hat)" and len(hats.triplets) == 1
    with pytest.raises(DataError, match="no row of category 'shoe': choose of coat, hat"): load_dataset("custom", root, "val", categories="shoe")
    with pytest.raises(DataError, match=r"no row \(hat\) has split train"): load_dataset("custom", root, "train", categories="hat")


def test_two_captions_of_one_request_and_two_requests_for_one_pair(tmp_path):
    rows = [["a", "is red", "has dots", "b", "val"], ["a", "is crimson", "", "b", "val"]]
    first, second = load_dataset("custom", shop(tmp_path / "shop", rows, ["reference", "text", "text2", "target", "split"]), "val").triplets
    assert first.captions == ("is red", "has dots") and second.captions == ("is crimson",)


def test_own_categories_in_fashioniqs_layout(tmp_path):
    root = tmp_path / "boots"
    for split in ("train", "val"):
        for folder, name, content in (("captions", "cap", [dict(candidate="B1", target="B2", captions=["is blue", "is darker"])]), ("image_splits", "split", ["B1", "B2"])):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / f"{name}.boot.{split}.json").write_text(json.dumps(content))
    (root / "images" / "boot").mkdir(parents=True)
    for name in ("B1", "B2"): Image.new("RGB", (16, 16)).save(root / "images" / "boot" / f"{name}.png")
    found = load_dataset("fashioniq", root, "val")
    assert (found.name, found.data, found.title) == ("fashioniq", "custom", "custom: boots") and list(found.galleries) == ["boot"]
    with pytest.raises(DataError, match="has no category 'dress': choose of boot"): load_dataset("fashioniq", root, "val", categories="dress")
