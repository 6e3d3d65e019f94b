"The readers against the published annotation files, and against every way in which copies of the data sets break."
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dqe_cir.core import DataError
from dqe_cir.data import (load_cirr, load_circo, load_dataset, load_fashioniq, load_garments, main, open_image, sample_banner, stripped,
                          verify_images)
from dqe_cir.garments import make_garments

ROOT = Path(__file__).resolve().parent.parent


# ---- the published annotations

FASHIONIQ = {  # split: triplets of dress, shirt, toptee; gallery images of each; distinct images
    "train": ((5985, 5988, 6027), (11452, 19036, 16121), 45429),
    "val": ((2017, 2038, 1961), (3817, 6346, 5373), 15415),
    "test": ((2024, 2038, 2056), (3818, 6346, 5374), 15417),
}


@pytest.mark.parametrize("split", FASHIONIQ)
def test_fashioniq_counts(annotations, split):
    dataset, (triplets, images, distinct) = load_fashioniq(annotations("fashioniq"), split), FASHIONIQ[split]
    counts = Counter(triplet.category for triplet in dataset.triplets)
    assert tuple(counts[category] for category in ("dress", "shirt", "toptee")) == triplets
    assert tuple(len(dataset.galleries[category]) for category in ("dress", "shirt", "toptee")) == images
    assert len(dataset.gallery) == distinct and len({triplet.pair_id for triplet in dataset.triplets}) == sum(triplets)
    assert all(len(triplet.captions) == 2 for triplet in dataset.triplets)


@pytest.mark.parametrize("split", ["train", "val"])
def test_fashioniq_targets_occur_once_per_category(annotations, split):
    triplets = load_fashioniq(annotations("fashioniq"), split).triplets
    assert len({(triplet.category, triplet.target) for triplet in triplets}) == len(triplets)
    assert all(triplet.target in triplet.positives and triplet.reference not in triplet.positives for triplet in triplets)


def test_fashioniq_queries_asked_twice_share_their_targets(annotations):
    triplets = load_fashioniq(annotations("fashioniq"), "train").triplets
    groups = {}
    for triplet in triplets: groups.setdefault((triplet.category, triplet.reference, triplet.captions), []).append(triplet)
    repeated = [group for group in groups.values() if len(group) > 1]
    assert len(repeated) == 89 and sum(map(len, repeated)) == 189
    for group in groups.values():
        assert all(triplet.positives == {member.target for member in group} for triplet in group)


def test_fashioniq_test_split_knows_no_targets(annotations):
    triplets = load_fashioniq(annotations("fashioniq"), "test").triplets
    assert {triplet.target for triplet in triplets} == {None} and {triplet.positives for triplet in triplets} == {frozenset()}


def test_cirr_validation(annotations):
    dataset = load_cirr(annotations("cirr"), "val")
    assert len(dataset.triplets) == 4181 and len(dataset.gallery) == 2297 and dataset.galleries == {"all": dataset.gallery}
    for triplet in dataset.triplets:
        assert len(set(triplet.subset)) == 6 and {triplet.reference, triplet.target} <= set(triplet.subset)
        assert triplet.target in triplet.positives and triplet.reference not in triplet.positives
    assert len({triplet.target for triplet in dataset.triplets}) == 2206


def test_cirr_positives_are_the_target_and_what_is_rated_above_zero(annotations):
    rows = {str(row["pairid"]): row for row in json.loads((annotations("cirr") / "captions/cap.rc2.val.json").read_text())}
    further = 0
    for triplet in load_cirr(annotations("cirr"), "val").triplets:
        row = rows[triplet.pair_id]
        expected = {row["target_hard"]}
        for name, rating in row["target_soft"].items():
            if rating > 0 and name != row["reference"]: expected.add(name)
        assert triplet.positives == expected
        further += len(expected) - 1
    assert further == 143 - 37


def test_cirr_test_split(annotations):
    "One of its 4,148 captions is a single blank (pair 27098); a submission has to rank it all the same."
    dataset = load_cirr(annotations("cirr"), "test1")
    assert len(dataset.triplets) == 4148 and len(dataset.gallery) == 2315
    assert {triplet.target for triplet in dataset.triplets} == {None}
    assert [triplet.pair_id for triplet in dataset.triplets if not any(map(stripped, triplet.captions))] == ["27098"]


def test_cirr_training_captions_are_missing(annotations):
    if (annotations("cirr") / "captions/cap.rc2.train.json").exists(): pytest.skip("the training captions are there")
    with pytest.raises(DataError, match=r"cap\.rc2\.train\.json is missing"): load_cirr(annotations("cirr"), "train")


@pytest.mark.parametrize("split, queries", [("val", 220), ("test", 800)])
def test_circo_counts(annotations, split, queries):
    dataset = load_circo(annotations("circo"), split)
    assert [triplet.pair_id for triplet in dataset.triplets] == [str(i) for i in range(queries)]
    truths = [len(triplet.positives) for triplet in dataset.triplets]
    if split == "test": assert set(truths) == {0} and {triplet.target for triplet in dataset.triplets} == {None}
    else:
        assert max(truths) == 14 and round(sum(truths) / queries, 2) == 4.16
        assert all(triplet.target in triplet.positives and triplet.reference not in triplet.positives for triplet in dataset.triplets)


# ---- small data sets, whole and broken

def paint(path, colour=(90, 20, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


FIQ_ROW = dict(candidate="a", target="b", captions=["is red", "has dots"])
CIRR_ROW = dict(pairid=7, reference="a", target_hard="b", target_soft={"b": 1.0}, caption="two dogs", img_set=dict(id=1, members=list("abcdef")))
CIRCO_ROW = dict(id=0, reference_img_id=5, target_img_id=7, gt_img_ids=[7, 9], relative_caption="two dogs", shared_concept="dogs")


def fashioniq(root, rows=(FIQ_ROW,), listing=("a", "b"), suffix=".png"):
    dump(root / "captions/cap.dress.val.json", list(rows) if not isinstance(rows, str) else rows)
    dump(root / "image_splits/split.dress.val.json", listing if isinstance(listing, dict) else list(listing))
    for name in listing: paint(root / "images" / f"{name}{suffix}")
    return root


def read_fashioniq(root): return load_fashioniq(root, "val", ("dress",))


def cirr(root, rows=(CIRR_ROW,), pictures=None, annotations="."):
    paths = {name: f"./dev/{name}.png" for name in "abcdefg"}
    dump(root / annotations / "captions/cap.rc2.val.json", list(rows))
    dump(root / annotations / "image_splits/split.rc2.val.json", paths)
    for relative in paths.values(): paint((pictures or root / "img_raw") / relative)
    return root


def circo(root, rows=(CIRCO_ROW,), names=("000000000005.jpg", "000000000007.jpg", "000000000009.jpg", "000000000011.jpg"), folder="COCO2017_unlabeled/unlabeled2017"):
    dump(root / "annotations/val.json", list(rows))
    for name in names: paint(root / folder / name)
    return root


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPG", ".jpeg", ".webp"])
def test_any_extension_will_do(tmp_path, suffix):
    dataset = read_fashioniq(fashioniq(tmp_path, suffix=suffix))
    assert dataset.image_path("b").name == f"b{suffix}" and verify_images(dataset, progress=False).ok


@pytest.mark.parametrize("annotations, pictures", [(".", "img_raw"), (".", "."), (".", "images"), ("cirr", "."), ("cirr", "img_raw"), ("cirr", "cirr/img_raw")])
def test_cirr_is_found_in_the_layouts_people_use(tmp_path, annotations, pictures):
    dataset = load_cirr(cirr(tmp_path, pictures=tmp_path / pictures, annotations=annotations), "val")
    assert dataset.gallery == list("abcdefg") and set(dataset.files) == set("abcdefg")
    assert dataset.triplets[0].positives == {"b"} and dataset.triplets[0].subset == tuple("abcdef")


@pytest.mark.parametrize("folder", ["COCO2017_unlabeled/unlabeled2017", "unlabeled2017"])
def test_circo_images_are_named_by_number(tmp_path, folder):
    dataset = load_circo(circo(tmp_path, folder=folder), "val")
    assert dataset.gallery == ["5", "7", "9", "11"] and dataset.image_path("7").name == "000000000007.jpg"
    assert dataset.triplets[0].positives == {"7", "9"}


@pytest.mark.parametrize("changes, message", [
    (dict(rows=[FIQ_ROW | dict(candidate="z")]), "row 0 names the image 'z'"),
    (dict(rows=[FIQ_ROW, FIQ_ROW | dict(target="z")]), "row 1 names the image 'z'"),
    (dict(rows=[FIQ_ROW | dict(captions=[" ", "."])]), "row 0: every caption is empty"),
    (dict(rows='[{"candidate": '), "cap.dress.val.json is not valid JSON"),
    (dict(rows="\x00"), "cap.dress.val.json is not valid JSON"),
    (dict(listing=["a", "b", "a"]), "split.dress.val.json names 'a' twice"),
])
def test_a_broken_fashioniq_is_refused(tmp_path, changes, message):
    with pytest.raises(DataError) as error: read_fashioniq(fashioniq(tmp_path, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("rows, message", [
    ([CIRR_ROW, CIRR_ROW], "names '7' twice"),
    ([CIRR_ROW | dict(reference="z")], "pairid 7 names the image 'z'"),
    ([CIRR_ROW | dict(target_hard="z")], "pairid 7 names the image 'z'"),
    ([CIRR_ROW | dict(target_soft={"b": 1.0, "z": 0.5})], "pairid 7 names the image 'z'"),
    ([CIRR_ROW | dict(img_set=dict(id=1, members=list("abcdez")))], "pairid 7 names the image 'z'"),
    ([CIRR_ROW | dict(caption=" ")], "pairid 7: the caption is empty"),
])
def test_a_broken_cirr_is_refused(tmp_path, rows, message):
    with pytest.raises(DataError) as error: load_cirr(cirr(tmp_path, rows), "val")
    assert message in str(error.value) and "cap.rc2.val.json" in str(error.value)


def test_the_reference_is_never_its_own_answer(tmp_path):
    row = CIRR_ROW | dict(target_soft={"a": 1.0, "b": 1.0, "c": 0.5, "d": -1.0})
    assert load_cirr(cirr(tmp_path, [row]), "val").triplets[0].positives == {"b", "c"}


def test_circo_queries_are_unique(tmp_path):
    with pytest.raises(DataError, match="val.json names '0' twice"): load_circo(circo(tmp_path, [CIRCO_ROW, CIRCO_ROW]), "val")


def test_a_missing_ground_truth_picture_is_noticed(tmp_path):
    circo(tmp_path, names=("000000000005.jpg", "000000000007.jpg"))
    with pytest.raises(DataError, match=r"1 of 3 pictures of circo val are missing \(9"): load_dataset("circo", tmp_path, "val")


def test_each_layout_is_told_from_the_other(tmp_path):
    fashioniq(tmp_path / "one"), cirr(tmp_path / "two")
    with pytest.raises(DataError, match="is in FashionIQ's layout, not CIRR's"): load_cirr(tmp_path / "one", "val")
    with pytest.raises(DataError, match="is in CIRR's layout, not FashionIQ's"): read_fashioniq(tmp_path / "two")
    for name in ("fashioniq", "cirr", "circo", "garments"):
        with pytest.raises(DataError, match="is missing"): load_dataset(name, tmp_path / "three", "val")


incomplete_rows = [
    (fashioniq, read_fashioniq, [{k: v for k, v in FIQ_ROW.items() if k != "captions"}]),
    (fashioniq, read_fashioniq, [FIQ_ROW | dict(captions="is red")]),
    (fashioniq, read_fashioniq, [FIQ_ROW | dict(captions=["is red", "has dots", "is long"])]),
    (fashioniq, read_fashioniq, [FIQ_ROW | dict(captions=[None, "has dots"])]),
    (fashioniq, read_fashioniq, [{k: v for k, v in FIQ_ROW.items() if k != "target"}]),
    (fashioniq, read_fashioniq, []),
    (cirr, lambda root: load_cirr(root, "val"), [{k: v for k, v in CIRR_ROW.items() if k != "img_set"}]),
    (cirr, lambda root: load_cirr(root, "val"), [{k: v for k, v in CIRR_ROW.items() if k != "target_hard"}]),
    (circo, lambda root: load_circo(root, "val"), [{k: v for k, v in CIRCO_ROW.items() if k != "relative_caption"}]),
    (circo, lambda root: load_circo(root, "val"), [CIRCO_ROW | dict(relative_caption=" ")]),
]


@pytest.mark.parametrize("write, read, rows", incomplete_rows)
def test_a_row_of_another_form_is_refused(tmp_path, write, read, rows):
    with pytest.raises(DataError, match="json"): read(write(tmp_path, rows))


# ---- pictures

COLOUR = (200, 30, 40)


def stored(folder, kind):
    "A file of one kind that shows COLOUR everywhere."
    plain, path = Image.new("RGB", (6, 4), COLOUR), folder / f"{kind}.png"
    if kind == "cmyk": plain.convert("CMYK").save(path := folder / "cmyk.jpg", quality=100, subsampling=0)
    elif kind == "palette": plain.quantize(4).save(path)
    elif kind == "palette with a transparent entry": plain.quantize(4).save(path, transparency=3)
    elif kind == "alpha": plain.convert("RGBA").save(path)
    elif kind == "wrong extension": plain.save(path, "JPEG", quality=100, subsampling=0)
    else: plain.save(path)
    return path


@pytest.mark.parametrize("kind", ["plain", "cmyk", "palette", "palette with a transparent entry", "alpha", "wrong extension"])
def test_one_colour_is_that_colour_however_stored(tmp_path, kind):
    picture = open_image(stored(tmp_path, kind))
    assert picture.mode == "RGB" and picture.size == (6, 4)
    assert np.abs(np.asarray(picture, dtype=int) - COLOUR).max() <= 3


@pytest.mark.parametrize("bright", [65535, 40000, 700])
def test_sixteen_bits_become_eight(tmp_path, bright):
    "A grey ramp from black to `bright` keeps its order and its scale."
    deep = np.linspace(0, bright, 24).astype(np.uint16).reshape(4, 6)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    values = np.asarray(open_image(tmp_path / "deep.png"), dtype=int)
    assert np.abs(values - (deep / 257)[..., None]).max() <= 1


def test_a_dark_sixteen_bit_picture_stays_dark(tmp_path):
    Image.fromarray(np.full((4, 6), 200, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert np.asarray(open_image(tmp_path / "dark.png")).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, orientation):
    "A file whose EXIF note says how it lies is read as it should stand."
    marked = np.zeros((40, 60, 3), dtype=np.uint8)
    marked[:20, :30] = 255  # white in the upper left
    turns = {1: marked, 2: marked[:, ::-1], 3: marked[::-1, ::-1], 4: marked[::-1], 5: marked.swapaxes(0, 1), 6: np.rot90(marked, 1),
             7: np.rot90(marked, 2).swapaxes(0, 1), 8: np.rot90(marked, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(turns[orientation])).save(tmp_path / "turned.png", exif=exif)
    assert (np.asarray(open_image(tmp_path / "turned.png")) == marked).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_a_truncated_picture_names_its_file(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = tmp_path / f"half{suffix}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for kept in (0, 1, 20, len(whole) // 2):
        path.write_bytes(whole[:kept])
        with pytest.raises(DataError, match=f"half{suffix} is not a readable picture"): open_image(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_damaged_bytes_raise_nothing_else(tmp_path, suffix):
    rng, path = np.random.default_rng(1), tmp_path / f"damaged{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path, exif=exif)
    whole, refused = path.read_bytes(), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 300), 4): damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try: assert open_image(path).mode == "RGB"
        except DataError: refused += 1
    assert refused > 30


def test_no_picture_there(tmp_path):
    with pytest.raises(DataError, match="none.png does not exist"): open_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="is not a readable picture"): open_image(tmp_path)


# ---- verify, and which data set is loaded

def command(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "dqe_cir.data", "verify", *map(str, arguments)], env=environment, capture_output=True, text=True)


def test_the_verify_command_tells_by_its_exit_code(tmp_path):
    cirr(tmp_path)
    healthy = command("--dataset", "cirr", "--root", tmp_path, "--split", "val")
    assert healthy.returncode == 0 and "cirr val: 7 images checked: 0 missing, 0 unreadable" in healthy.stdout
    (tmp_path / "img_raw/dev/c.png").unlink()
    (tmp_path / "img_raw/dev/d.png").write_bytes(b"<html>not found</html>")
    broken = command("--dataset", "cirr", "--root", tmp_path, "--split", "val")
    assert broken.returncode == 1 and "1 missing, 1 unreadable" in broken.stdout
    assert "missing: c" in broken.stdout and "d.png is not a readable picture" in broken.stdout and "Traceback" not in broken.stderr


def test_verify_goes_on_after_a_missing_split(tmp_path, capsys):
    cirr(tmp_path)
    assert main(["verify", "--dataset", "cirr", "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "split.rc2.train.json is missing" in said and "cirr val: 7 images checked" in said


def test_verify_refuses_unknown_data_sets(capsys):
    with pytest.raises(SystemExit) as stop: main(["verify", "--dataset", "cifar", "--root", "."])
    assert stop.value.code == 2 and "invalid choice: 'cifar'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "A data folder that holds nothing but the small garments."
    folder = tmp_path_factory.mktemp("data")
    make_garments(folder, "smoke", progress=False)
    return folder


@pytest.mark.parametrize("name, split", [("fashioniq", "train"), ("fashioniq", "val"), ("cirr", "train"), ("cirr", "val"), ("cirr", "test1")])
def test_garments_stand_in_and_say_so(drawn, monkeypatch, name, split):
    monkeypatch.setenv("DQE_CIR_DATA", str(drawn))
    dataset = load_dataset(name, split=split, size="smoke")
    assert dataset.data == "sample" and dataset.name == name and dataset.root.is_relative_to(drawn)
    assert f"data/{name} is not there" in sample_banner(dataset) and "DRAWN GARMENTS" in sample_banner(dataset)
    assert set(dataset.gallery) == set(dataset.files) and dataset.attributes == {}


def test_nothing_stands_in_for_circo(drawn, monkeypatch):
    monkeypatch.setenv("DQE_CIR_DATA", str(drawn))
    with pytest.raises(DataError, match="circo is missing and has no stand-in"): load_dataset("circo", split="val", size="smoke")


def test_a_folder_that_is_there_is_used_or_refused(tmp_path, monkeypatch):
    "A run never trains on something else than it was told."
    monkeypatch.setenv("DQE_CIR_DATA", str(tmp_path))
    cirr(tmp_path / "cirr")
    dataset = load_dataset("cirr", split="val")
    assert dataset.data == "real" and sample_banner(dataset) == ""
    (tmp_path / "cirr/img_raw/dev/g.png").unlink()
    with pytest.raises(DataError, match=r"1 of 7 pictures of cirr val are missing \(g"): load_dataset("cirr", split="val")
    (tmp_path / "fashioniq").mkdir()
    with pytest.raises(DataError, match="captions is missing"): load_dataset("fashioniq", split="val")
    assert not list(tmp_path.glob("garments-*"))


@pytest.mark.parametrize("split, triplets, images", [("train", 144, 360), ("dev", 48, 360), ("val", 72, 180)])
def test_garments_carry_their_truth(drawn, monkeypatch, split, triplets, images):
    monkeypatch.setenv("DQE_CIR_DATA", str(drawn))
    dataset = load_dataset("garments", split=split, size="smoke")
    assert (len(dataset.triplets), len(dataset.gallery), dataset.data) == (triplets, images, "garments")
    for triplet in dataset.triplets:
        right = dataset.relevant[triplet.pair_id]
        assert triplet.target in right and triplet.reference not in right and right <= set(dataset.galleries[triplet.category])
        assert triplet.positives == (right if split != "train" else {triplet.target})
        assert all(dataset.attributes[triplet.target][name] in values for name, values in dataset.mentions[triplet.pair_id].items())


def test_an_unknown_split_of_the_garments(drawn):
    with pytest.raises(DataError, match=r"split\.dress\.test\.json is missing"): load_garments(next(drawn.glob("garments-*")), "test")
