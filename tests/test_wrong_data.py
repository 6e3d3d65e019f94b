"Wrong data of every kind gives one clear message or the right picture: what tests/test_data.py and tests/test_checkpoints.py leave out."
import errno
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from dqe_cir.encoder.checkpoints import convert
from dqe_cir.core import DataError, append_jsonl, writable, write_json
from dqe_cir.data import load_circo, load_cirr, load_fashioniq, open_image
from dqe_cir.encoder import cache_tokens, load_encoder
from dqe_cir.data import make_garments
from dqe_cir.trainer import open_run, train_config

NAMES = [f"dev-{i}-0-img0" for i in range(6)]


# ---- pictures: four quarters of flat colour, stored in every way that copies of the data sets are

COLOURS = np.array([[[220, 30, 40], [40, 180, 60]], [[30, 60, 200], [240, 220, 90]]], dtype=np.uint8)


def chart(): return Image.fromarray(COLOURS.repeat(24, 0).repeat(16, 1))


def corners(image): return np.stack([[np.asarray(image)[y, x].astype(int) for x in (6, -7)] for y in (6, -7)])


STORED = {
    "grey.png": lambda image: image.convert("L"), "palette.png": lambda image: image.quantize(8), "palette.gif.png": lambda image: image.quantize(8),
    "alpha.png": lambda image: image.convert("RGBA"), "palette with transparency.png": lambda image: image.convert("RGBA").quantize(8),
    "ink.jpg": lambda image: image.convert("CMYK"), "ycc.jpg": lambda image: image.convert("YCbCr"), "one bit.png": lambda image: image.convert("1", dither=0),
    "sixteen bits.png": lambda image: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "plain.bmp": lambda image: image,
    "plain.webp": lambda image: image, "progressive.jpg": lambda image: image,
}


@pytest.mark.parametrize("name", STORED)
def test_every_way_of_storing_a_picture_gives_the_picture(tmp_path, name):
    if name.endswith("webp") and not features.check("webp"): pytest.skip("this Pillow has no WebP")
    stored = STORED[name](chart())
    stored.save(tmp_path / name, **({"quality": 95} if name.endswith(("jpg", "webp")) else {}))
    found = open_image(tmp_path / name)
    expected = chart().convert("1", dither=0).convert("RGB") if "one bit" in name else chart().convert("L").convert("RGB") if name[0] in "gs" else chart()
    assert found.mode == "RGB" and found.size == (32, 48)
    assert abs(corners(found) - corners(expected)).max() <= (12 if name.endswith(("jpg", "webp")) else 1), name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_note_is_obeyed(tmp_path, orientation):
    "The chart is stored the way a camera would that writes this note; opened, it must stand upright."
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    stored = chart().transpose(undo[orientation]) if orientation > 1 else chart()
    note = Image.Exif()
    note[0x0112] = orientation
    stored.save(tmp_path / "turned.jpg", quality=95, exif=note)
    found = open_image(tmp_path / "turned.jpg")
    assert found.size == (32, 48) and abs(corners(found) - COLOURS.astype(int)).max() <= 12


def test_transparent_parts_are_black_in_files_too(tmp_path):
    clear = chart().convert("RGBA")
    clear.putalpha(Image.fromarray(np.repeat([[0], [255]], 24, 0).astype(np.uint8).repeat(32, 1)))
    clear.save(tmp_path / "half.png")
    found = corners(open_image(tmp_path / "half.png"))
    assert not found[0].any() and (found[1] == COLOURS[1]).all()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_picture_cut_anywhere_is_refused_by_name(tmp_path, suffix, share):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=rf"cut\.{suffix} is not a readable picture .*get the file again"): open_image(path)


# ---- annotations: valid JSON of a wrong form, row by row

def fashioniq(root):
    write_json(root / "captions/cap.dress.val.json", [dict(candidate="B1", target="B2", captions=["is blue", "is darker"])])
    write_json(root / "image_splits/split.dress.val.json", ["B1", "B2"])


def cirr(root):
    row = dict(pairid=7, reference=NAMES[0], target_hard=NAMES[1], target_soft={NAMES[1]: 1.0}, caption="two dogs", img_set=dict(id=1, members=NAMES))
    write_json(root / "captions/cap.rc2.val.json", [row])
    write_json(root / "image_splits/split.rc2.val.json", {name: f"./dev/{name}.png" for name in NAMES})


def circo(root):
    row = dict(id=0, reference_img_id=1, target_img_id=2, gt_img_ids=[2, 3], relative_caption="has a child", shared_concept="a swing")
    write_json(root / "annotations/val.json", [row])
    write_json(root / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", dict(images=[dict(id=i) for i in (1, 2, 3)]))


SETS = {"fashioniq": (fashioniq, lambda root: load_fashioniq(root, "val", ("dress",)), "captions/cap.dress.val.json", "image_splits/split.dress.val.json"),
        "cirr": (cirr, lambda root: load_cirr(root, "val"), "captions/cap.rc2.val.json", "image_splits/split.rc2.val.json"),
        "circo": (circo, lambda root: load_circo(root, "val"), "annotations/val.json", "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json")}


def refusal(root, name):
    "The one line that the reader of a data set says; it never lets another kind of error through."
    with pytest.raises(DataError) as caught: SETS[name][1](root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", SETS)
def test_the_folders_of_these_tests_are_sound(tmp_path, name):
    SETS[name][0](tmp_path)
    assert len(SETS[name][1](tmp_path).triplets) == 1


@pytest.mark.parametrize("content", [{}, {"data": []}, 3, None, "text", [1], ["text"], [None], [[]]], ids=json.dumps)
@pytest.mark.parametrize("which", [2, 3], ids=["captions", "images"])
@pytest.mark.parametrize("name", SETS)
def test_json_of_another_form_is_refused_by_file_name(tmp_path, name, which, content):
    SETS[name][0](tmp_path)
    path = tmp_path / SETS[name][which]
    write_json(path, content)
    if name == "cirr" and which == 3 and content == {}: assert "dev-0-0-img0" in refusal(tmp_path, name)  # a right form, with no image in it
    elif name == "fashioniq" and which == 3 and content == ["text"]: assert "'B1'" in refusal(tmp_path, name)
    else: assert re.search(rf"{re.escape(path.name)}.*get the file again", refusal(tmp_path, name))


@pytest.mark.parametrize("value", [None, 3.5, [], {}, ["B1"]], ids=repr)
@pytest.mark.parametrize("name, field", [("fashioniq", "candidate"), ("fashioniq", "target"), ("cirr", "pairid"), ("cirr", "reference"), ("cirr", "caption"),
                                         ("cirr", "img_set"), ("cirr", "target_hard"), ("circo", "id"), ("circo", "reference_img_id"), ("circo", "target_img_id"),
                                         ("circo", "relative_caption")])
def test_a_field_of_the_wrong_kind_is_refused_by_file_name(tmp_path, name, field, value):
    SETS[name][0](tmp_path)
    path = tmp_path / SETS[name][2]
    [row] = json.loads(path.read_text())
    for changed in (row | {field: value}, {key: kept for key, kept in row.items() if key != field}):
        write_json(path, [changed])
        assert path.name in refusal(tmp_path, name)


@pytest.mark.parametrize("text", ["", "  ", ".", "?,"], ids=repr)
@pytest.mark.parametrize("name, field", [("fashioniq", "captions"), ("cirr", "caption"), ("circo", "relative_caption")])
def test_empty_captions_are_refused_by_file_name(tmp_path, name, field, text):
    SETS[name][0](tmp_path)
    path = tmp_path / SETS[name][2]
    [row] = json.loads(path.read_text())
    write_json(path, [row | {field: [text, text] if field == "captions" else text}])
    assert re.search(rf"{re.escape(path.name)}.* is empty", refusal(tmp_path, name))


@pytest.mark.parametrize("name, message", [("cirr", "names '7' twice"), ("circo", "names '0' twice")])
def test_a_query_given_twice_is_refused(tmp_path, name, message):
    SETS[name][0](tmp_path)
    path = tmp_path / SETS[name][2]
    write_json(path, json.loads(path.read_text()) * 2)
    assert message in refusal(tmp_path, name)


def test_a_key_given_twice_in_one_object_is_refused(tmp_path):
    "Python's reader would keep the last and say nothing."
    fashioniq(tmp_path)
    path = tmp_path / SETS["fashioniq"][2]
    path.write_text(path.read_text().replace('"target"', '"target": "B1", "target"', 1))
    assert "the name 'target' occurs twice" in refusal(tmp_path, "fashioniq")


@pytest.mark.parametrize("place", ["", "cirr"])
def test_cirr_given_as_fashioniq_is_told_apart_in_both_layouts(tmp_path, place):
    cirr(tmp_path / place)
    assert "is in CIRR's layout, not FashionIQ's: use dataset cirr" in refusal(tmp_path, "fashioniq")


# ---- folders that cannot be written to

@pytest.fixture
def read_only():
    "A folder that this process really cannot write to. Permission bits do not bind root, so root takes another user's rights meanwhile."
    folder = Path(tempfile.mkdtemp(prefix="dqe-cir-read-only-"))
    (folder / "inside").mkdir()
    for path in (folder / "inside", folder): path.chmod(0o555)
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    try:
        if root: os.seteuid(65534)
        if os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids): pytest.skip("nothing is read-only for this user")
        yield folder
    finally:
        if root: os.seteuid(0)
        for path in (folder, folder / "inside"): path.chmod(0o755)
        shutil.rmtree(folder)


WRITERS = {
    "write_json": lambda folder: write_json(folder / "results.json", {}), "in a folder that must be made": lambda folder: write_json(folder / "run" / "results.json", {}),
    "append_jsonl": lambda folder: append_jsonl(folder / "metrics.jsonl", step=1), "open_run": lambda folder: open_run(train_config({"run_dir": str(folder / "run")})),
    "make_garments": lambda folder: make_garments(folder, "smoke", progress=False), "one level deeper": lambda folder: writable(folder / "inside" / "run"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_folder_is_named(read_only, name):
    with pytest.raises(DataError, match=rf"{read_only.name}.* cannot be written to \(Permission denied\): make it writable, or name another folder"): WRITERS[name](read_only)
    assert [path.name for path in read_only.rglob("*")] == ["inside"]


@pytest.fixture(scope="module")
def encoder(): return load_encoder("mini", device="cpu")


def test_tokens_for_a_read_only_folder_are_not_computed(encoder, read_only, monkeypatch):
    "The message comes before the pictures pass through the tower, not after."
    monkeypatch.setattr(type(encoder), "image_tokens", lambda *_: pytest.fail("the tower was run for nothing"))
    with tempfile.NamedTemporaryFile(suffix=".png") as picture:
        chart().save(picture.name)
        with pytest.raises(DataError, match="cannot be written to"): cache_tokens(encoder, {"one": Path(picture.name)}, read_only / "tokens", progress=False)


@pytest.mark.parametrize("code, words", [(errno.EROFS, "Read-only file system"), (errno.ENOSPC, "No space left on device"), (errno.EACCES, "Permission denied")])
def test_whatever_the_system_says_becomes_one_line(tmp_path, monkeypatch, code, words):
    "A read-only mount cannot be made here, so the system's answer is put in its mouth."
    def refuse(*_, **__): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(DataError, match=rf"{tmp_path.name} cannot be written to \({words}\)"): write_json(tmp_path / "results.json", {})


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(DataError, match="run cannot be written to"): open_run(train_config({"run_dir": str(tmp_path / "run")}))


def test_conversion_asks_before_it_reads(tmp_path):
    "A checkpoint has gigabytes: where it goes is looked at first."
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file cannot be written to"): convert(tmp_path / "no such checkpoint.pth", tmp_path / "file" / "out")
