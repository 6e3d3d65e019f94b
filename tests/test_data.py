"Readers against the real annotation files, against hand-made folders in every layout, and against folders that are broken."
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers import ROOT

from dqe_cir.core import DataError, write_json
from dqe_cir.data import SPECS, Triplet, as_rgb, caption_text, join_captions, load_circo, load_cirr, load_dataset
from dqe_cir.data import load_fashioniq, load_garments, load_hp_fashioniq, make_garments, open_image, sample_banner
from dqe_cir.data import verify_images
from dqe_cir.data.captions import random_captions
from dqe_cir.data.fashioniq import with_shared_answers
from dqe_cir.data.verify import count_report, main


def picture(path, size=(12, 16), colour="crimson"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def fashioniq(root, rows=None, ids=("B1", "B2", "B3"), split="val", category="dress"):
    "A FashionIQ of one category, without pictures."
    rows = [dict(candidate="B1", target="B2", captions=["is blue", "is darker"])] if rows is None else rows
    write_json(root / "captions" / f"cap.{category}.{split}.json", rows)
    write_json(root / "image_splits" / f"split.{category}.{split}.json", ids if isinstance(ids, dict) else list(ids))
    return root


def cirr(root, split="val", **changes):
    "A CIRR of one group of six, without pictures; `changes` go into its only entry, None removes a field."
    names = [f"dev-{i}-0-img0" for i in range(6)]
    row = dict(pairid=7, reference=names[0], target_hard=names[1], target_soft={names[1]: 1.0}, caption="two dogs", img_set=dict(id=1, members=names))
    row = {name: value for name, value in (row | changes).items() if value is not None}
    write_json(root / "captions" / f"cap.rc2.{split}.json", [row])
    write_json(root / "image_splits" / f"split.rc2.{split}.json", {name: f"./dev/{name}.png" for name in names})
    return root


def circo(root, split="val", numbers=(1, 2, 3)):
    row = dict(id=0, reference_img_id=1, target_img_id=2, gt_img_ids=[2, 3], relative_caption="has a child", shared_concept="a swing")
    if split == "test": row = {name: value for name, value in row.items() if name not in ("target_img_id", "gt_img_ids")}
    write_json(root / "annotations" / f"{split}.json", [row])
    return root


def read(root, split="val"): return load_fashioniq(root, split, ("dress",))


# ---- the real annotation files

@pytest.mark.parametrize("split, triplets, images, galleries", [
    ("train", dict(dress=5985, shirt=5988, toptee=6027), 45_429, (11_452, 19_036, 16_121)),
    ("val", dict(dress=2017, shirt=2038, toptee=1961), 15_415, (3_817, 6_346, 5_373)),
    ("test", dict(dress=2024, shirt=2038, toptee=2056), 15_417, (3_818, 6_346, 5_374)),
])
def test_fashioniq_counts(annotations, split, triplets, images, galleries):
    dataset = load_fashioniq(annotations("fashioniq"), split)
    assert Counter(t.category for t in dataset.triplets) == triplets and len(dataset.gallery) == images
    assert tuple(map(len, dataset.galleries.values())) == galleries and list(dataset.galleries) == ["dress", "shirt", "toptee"]
    assert dataset.gallery[0] == dataset.galleries["dress"][0] and dataset.data == "real"
    assert len({t.pair_id for t in dataset.triplets}) == len(dataset.triplets)
    assert all((t.target is None) == (split == "test") and (t.target in t.positives or split == "test") for t in dataset.triplets)
    assert all(t.reference not in t.positives and t.positives <= set(dataset.galleries[t.category]) for t in dataset.triplets[::50])


@pytest.mark.parametrize("split, groups, triplets", [("train", 89, 189), ("val", 9, 20)])
def test_identical_fashioniq_queries_share_their_answers(annotations, split, groups, triplets):
    "Counted from the files themselves, category by category."
    expected = {}
    for category in ("dress", "shirt", "toptee"):
        rows = json.loads((annotations("fashioniq") / "captions" / f"cap.{category}.{split}.json").read_text())
        of = {}
        for row in rows: of.setdefault(row["candidate"], []).append(row)
        for i, row in enumerate(rows):
            expected[f"{category}-{split}-{i}"] = {r["target"] for r in of[row["candidate"]] if r["captions"] == row["captions"]}
    dataset = load_fashioniq(annotations("fashioniq"), split)
    assert {t.pair_id: set(t.positives) for t in dataset.triplets} == expected
    several = [t for t in dataset.triplets if len(t.positives) > 1]
    assert len(several) == triplets and len({(t.category, t.reference, t.captions) for t in several}) == groups


def test_cirr_val_against_its_file(annotations):
    root = annotations("cirr")
    rows = json.loads((root / "captions" / "cap.rc2.val.json").read_text())
    dataset = load_cirr(root, "val")
    assert len(dataset.triplets) == len(rows) == 4_181 and len(dataset.gallery) == 2_297
    assert dataset.gallery == list(json.loads((root / "image_splits" / "split.rc2.val.json").read_text()))
    for triplet, row in zip(dataset.triplets, rows):
        soft = {name for name, value in row["target_soft"].items() if value > 0}
        assert {row["target_hard"]} | (soft - {row["reference"]}) <= triplet.positives
        assert triplet.pair_id == str(row["pairid"]) and triplet.captions == (row["caption"],) and triplet.target == row["target_hard"]
        assert triplet.subset == tuple(row["img_set"]["members"]) and len(triplet.subset) == 6
        assert triplet.reference not in triplet.positives and {triplet.reference, triplet.target} <= set(triplet.subset)
    further = sum(len(t.positives - {t.target}) for t in dataset.triplets)
    assert further >= 143 - 37  # entries above 0 that name neither the target nor the reference


def test_cirr_test1_has_every_query_the_server_asks_for(annotations):
    dataset = load_cirr(annotations("cirr"), "test1")
    assert len(dataset.triplets) == 4_148 and len(dataset.gallery) == 2_315
    assert all(t.target is None and t.positives == frozenset() and len(t.subset) == 6 for t in dataset.triplets)


def test_identical_cirr_queries_share_their_answers(annotations):
    "Six questions of the validation split were asked twice with different targets."
    dataset = load_cirr(annotations("cirr"), "val")
    groups = {}
    for triplet in dataset.triplets: groups.setdefault((triplet.reference, triplet.captions), []).append(triplet)
    twice = [group for group in groups.values() if len({t.target for t in group}) > 1]
    assert len(twice) == 6 and all({t.target for t in group} <= t.positives for group in twice for t in group)


def test_cirr_train_names_the_file_that_is_missing(annotations):
    paths = json.loads((annotations("cirr") / "image_splits" / "split.rc2.train.json").read_text())
    assert len(paths) == 16_939
    if (annotations("cirr") / "captions" / "cap.rc2.train.json").exists(): pytest.skip("the training captions are there")
    with pytest.raises(DataError, match=r"captions.cap\.rc2\.train\.json is missing.*data/README\.md"): load_cirr(annotations("cirr"), "train")


@pytest.mark.parametrize("split, queries", [("val", 220), ("test", 800)])
def test_circo_counts(annotations, split, queries):
    dataset = load_circo(annotations("circo"), split)
    assert len(dataset.triplets) == queries and [t.pair_id for t in dataset.triplets] == [str(i) for i in range(queries)]
    assert all((t.target in t.positives and t.reference not in t.positives) if split == "val" else t.target is None for t in dataset.triplets)
    if split == "val": assert round(np.mean([len(t.positives) for t in dataset.triplets]), 2) == 4.16


# ---- where pictures are found

@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".JPG"])
def test_fashioniq_pictures_are_found_by_name_whatever_the_extension(tmp_path, suffix):
    picture(fashioniq(tmp_path) / "images" / f"B2{suffix}")
    dataset = read(tmp_path)
    assert dataset.image_path("B2") == tmp_path / "images" / f"B2{suffix}"
    with pytest.raises(DataError, match="no picture of 'B3'"): dataset.image_path("B3")


@pytest.mark.parametrize("place", ["", "img_raw", "images"])
def test_cirr_pictures_are_found_in_every_usual_place(tmp_path, place):
    picture(cirr(tmp_path) / place / "dev" / "dev-3-0-img0.jpg")
    assert load_cirr(tmp_path, "val").image_path("dev-3-0-img0") == tmp_path / place / "dev" / "dev-3-0-img0.jpg"


def test_cirr_annotations_in_a_folder_of_their_own(tmp_path):
    "The layout of CLIP4Cir and its successors: dev/ beside cirr/captions/."
    cirr(tmp_path / "cirr")
    picture(tmp_path / "dev" / "dev-3-0-img0.png")
    assert load_cirr(tmp_path, "val").image_path("dev-3-0-img0") == tmp_path / "dev" / "dev-3-0-img0.png"


@pytest.mark.parametrize("place", ["COCO2017_unlabeled/unlabeled2017", "unlabeled2017"])
def test_circo_ids_are_coco_numbers(tmp_path, place):
    picture(circo(tmp_path) / place / "000000000002.jpg")
    dataset = load_circo(tmp_path, "val")
    assert dataset.image_path("2").name == "000000000002.jpg" and dataset.triplets[0].positives == {"2", "3"}
    assert load_circo(circo(tmp_path, "test"), "test").triplets[0].target is None


def test_each_folder_is_listed_once(tmp_path, monkeypatch):
    picture(cirr(tmp_path) / "img_raw" / "dev" / "dev-0-0-img0.png")
    visits = Counter()
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: visits.update([str(folder)]) or scan(folder))
    assert load_cirr(tmp_path, "val").image_path("dev-0-0-img0").is_file()
    assert visits[str(tmp_path / "img_raw" / "dev")] == 1 and max(visits.values()) == 1


def test_a_missing_picture_is_named_with_the_path_tried(tmp_path):
    with pytest.raises(DataError, match="images.B2"): read(fashioniq(tmp_path)).image_path("B2")


# ---- what is refused

TWO = ["is blue", "is darker"]

@pytest.mark.parametrize("rows, ids, message", [
    ([dict(candidate="B9", target="B2", captions=TWO)], "B1 B2", r"cap\.dress\.val\.json, row 0 names the image 'B9'"),
    ([dict(candidate="B1", target="B9", captions=TWO)], "B1 B2", r"row 0 names the image 'B9'"),
    ([dict(candidate="B1", target="B2", captions=["", " ."])], "B1 B2", "row 0: every caption is empty"),
    ([], "B1 B2 B1", r"split\.dress\.val\.json names 'B1' twice"),
])
def test_fashioniq_refuses(tmp_path, rows, ids, message):
    with pytest.raises(DataError, match=message): read(fashioniq(tmp_path, rows, ids.split()))


@pytest.mark.parametrize("rows", [
    [dict(candidate="B1", target="B2")], [dict(target="B2", captions=TWO)], ["B1"], dict(candidate="B1"),
    [dict(candidate="B1", captions=TWO)], [dict(candidate="B1", target="B2", captions="red")],
    [dict(candidate="B1", target="B1", captions=TWO)],
], ids=["no captions", "no candidate", "not an object", "not a list", "no target", "captions are a text", "target is the reference"])
def test_fashioniq_refuses_entries_of_the_wrong_form(tmp_path, rows):
    with pytest.raises(DataError, match=r"cap\.dress\.val\.json"): read(fashioniq(tmp_path, rows))


@pytest.mark.parametrize("changes, message", [
    (dict(reference="dev-9-0-img0"), "'dev-9-0-img0'"),
    (dict(target_hard="dev-9-0-img0"), "'dev-9-0-img0'"),
    (dict(target_soft={"dev-9-0-img0": 0.5}), "'dev-9-0-img0'"),
    (dict(img_set=dict(members=["dev-0-0-img0", "dev-1-0-img0", "dev-9-0-img0"])), "'dev-9-0-img0'"),
])
def test_cirr_refuses_unknown_names(tmp_path, changes, message):
    with pytest.raises(DataError, match=message): load_cirr(cirr(tmp_path, **changes), "val")


def test_cirr_refuses_an_image_listed_under_two_paths(tmp_path):
    split = cirr(tmp_path) / "image_splits" / "split.rc2.val.json"
    split.write_text(split.read_text().replace("{", '{"dev-1-0-img0": "./dev/other.png",', 1))
    with pytest.raises(DataError, match="dev-1-0-img0"): load_cirr(tmp_path, "val")


def test_cirr_refuses_a_pair_given_twice(tmp_path):
    path = cirr(tmp_path) / "captions" / "cap.rc2.val.json"
    write_json(path, json.loads(path.read_text()) * 2)
    with pytest.raises(DataError, match=r"cap\.rc2\.val\.json names '7' twice"): load_cirr(tmp_path, "val")


@pytest.mark.parametrize("value, positive", [(1.0, True), (0.5, True), (0.2, True), (0.0, False), (-1.0, False)])
def test_only_values_above_zero_make_further_positives(tmp_path, value, positive):
    soft = {"dev-0-0-img0": 1.0, "dev-4-0-img0": value}  # the first is the reference, the target is not named
    expected = {"dev-1-0-img0"} | ({"dev-4-0-img0"} if positive else set())
    assert load_cirr(cirr(tmp_path, target_soft=soft), "val").triplets[0].positives == expected


def test_cirr_test_split_has_no_answers(tmp_path):
    triplet = load_cirr(cirr(tmp_path, "test1", target_hard=None, target_soft=None), "test1").triplets[0]
    assert triplet.target is None and triplet.positives == frozenset() and len(triplet.subset) == 6


@pytest.mark.parametrize("make, load, message", [
    (cirr, load_fashioniq, "CIRR's layout, not FashionIQ's"),
    (fashioniq, load_cirr, "FashionIQ's layout, not CIRR's"),
    (fashioniq, load_circo, r"annotations.val\.json is missing"),
])
def test_a_folder_of_another_data_set_is_told_apart(tmp_path, make, load, message):
    with pytest.raises(DataError, match=message): load(make(tmp_path), "val")


@pytest.mark.parametrize("load", [load_fashioniq, load_cirr, load_circo, load_garments])
def test_an_absent_root_is_named(tmp_path, load):
    advice = "let make_garments.. draw it again" if load is load_garments else "the repository's data/README.md says"
    with pytest.raises(DataError, match=f"nowhere.*is missing: .*{advice}"): load(tmp_path / "nowhere", "val")


@pytest.mark.parametrize("text", ['[{"candidate": "B1", ', "", "not json", b"\xff\xfe\x00"], ids=["cut", "empty", "prose", "bytes"])
def test_malformed_json_names_the_file(tmp_path, text):
    path = fashioniq(tmp_path) / "captions" / "cap.dress.val.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=r"cap\.dress\.val\.json is (not valid JSON|empty|not text in UTF-16)"): read(tmp_path)


# ---- identical queries

names = st.sampled_from("abcd")
questions = st.lists(st.tuples(names, names, st.sampled_from([("x", "y"), ("y", "x"), ("x", "x")]), st.sampled_from(["dress", "shirt"])), max_size=12)

@given(questions)
def test_shared_answers_against_a_double_loop(rows):
    triplets = [Triplet(r, "t" + t, captions, category, positives=frozenset({"t" + t})) for r, t, captions, category in rows]
    for triplet, shared in zip(triplets, with_shared_answers(triplets), strict=True):
        same = [o for o in triplets if (o.reference, o.captions, o.category) == (triplet.reference, triplet.captions, triplet.category)]
        assert shared.positives == {o.target for o in same} and shared.target == triplet.target


# ---- captions: any number of them

texts = st.lists(st.text(st.sampled_from("aB .,?!"), max_size=6), max_size=5).map(tuple)


@given(texts)
def test_every_spoken_caption_is_in_the_text_of_a_query(captions):
    spoken = [text.strip(".?, ") for text in captions if text.strip(".?, ")]
    found = caption_text(captions)
    if len(captions) == 1: assert found == captions[0]
    elif spoken: assert found == " and ".join([spoken[0].capitalize(), *spoken[1:]])
    else: assert not found.strip(".?, ")


@given(texts, st.integers(0, 2**31))
def test_a_random_text_is_one_or_two_of_the_spoken_captions(captions, seed):
    "Written as two loops; fewer than two spoken captions leave the generator alone."
    spoken = [text for text in captions if text.strip(".?, ")]
    possible = [join_captions(one) for one in spoken]
    for i, one in enumerate(spoken): possible += [join_captions(one, other) for j, other in enumerate(spoken) if i != j]
    state = torch.Generator().manual_seed(seed)
    before = state.get_state()
    found = random_captions(captions, state)
    assert found in possible if len(spoken) > 1 else found == caption_text(captions)
    assert torch.equal(before, state.get_state()) == (len(spoken) < 2)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_random_text_is_equally_likely(count):
    captions, state = tuple(f"is {word}" for word in "abcde"[:count]), torch.Generator().manual_seed(0)
    drawn = Counter(random_captions(captions, state) for _ in range(200 * count**2))
    assert len(drawn) == count**2
    spread = sum((times - 200) ** 2 / 200 for times in drawn.values())  # chi-square of count**2 - 1 degrees of freedom
    assert spread < (count**2 - 1) + 4 * (2 * (count**2 - 1)) ** 0.5


def test_two_captions_draw_what_they_always_drew():
    "One number below four: both in order, both turned round, the first, the second."
    expected = ["Is red and has dots", "Has dots and is red", "Is red", "Has dots"]
    for seed in range(40):
        number = torch.randint(4, (1,), generator=torch.Generator().manual_seed(seed)).item()
        assert random_captions(("is red", "has dots."), torch.Generator().manual_seed(seed)) == expected[number]


# ---- garments and load_dataset

@pytest.fixture(scope="module")
def garments(tmp_path_factory): return make_garments(tmp_path_factory.mktemp("data"), "smoke", progress=False)


@pytest.fixture
def data_home(garments, monkeypatch):
    "The data folder holds nothing but the small garments."
    monkeypatch.setenv("DQE_CIR_DATA", str(garments.parent))
    return garments.parent


@pytest.mark.parametrize("split", ["train", "dev", "val"])
def test_garments_know_what_every_picture_shows(garments, split):
    truth = json.loads((garments / "garments.json").read_text())
    dataset = load_garments(garments, split)
    assert dataset.name == dataset.data == "garments" and set(dataset.gallery) <= set(dataset.attributes)
    for triplet in dataset.triplets:
        right = set(truth["relevant"][split][triplet.pair_id])
        assert triplet.target in right and triplet.target in triplet.positives <= right and dataset.relevant[triplet.pair_id] == right
        assert all(dataset.attributes[name]["category"] == triplet.category for name in right)


@pytest.mark.parametrize("name, splits", [("fashioniq", ["train", "dev", "val"]), ("cirr", ["train", "val", "test1"])])
def test_garments_stand_in_where_nothing_else_is(data_home, name, splits):
    for split in splits:
        dataset = load_dataset(name, split=split, size="smoke")
        assert (dataset.name, dataset.data, dataset.split) == (name, "sample", split) and dataset.attributes == {}
        assert all(dataset.image_path(image).is_file() for image in dataset.gallery)
        assert f"data/{name} is not there" in sample_banner(dataset)
    assert sample_banner(load_dataset("garments", split="val", size="smoke")) == ""


def test_real_data_in_the_data_folder_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv("DQE_CIR_DATA", str(tmp_path))
    for i in range(6): picture(cirr(tmp_path / "cirr") / "img_raw" / "dev" / f"dev-{i}-0-img0.png")
    dataset = load_dataset("cirr", split="val")
    assert dataset.data == "real" and sample_banner(dataset) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cirr"], "garments were drawn for nothing"


@pytest.mark.parametrize("explicit", [True, False])
def test_incomplete_data_are_never_replaced_by_the_sample(tmp_path, monkeypatch, explicit):
    monkeypatch.setenv("DQE_CIR_DATA", str(tmp_path))
    picture(cirr(tmp_path / "cirr") / "dev" / "dev-0-0-img0.png")
    with pytest.raises(DataError, match=r"5 of 6 pictures of cirr val are missing \(dev-1-0-img0.*data/README\.md"):
        load_dataset("cirr", tmp_path / "cirr" if explicit else None, "val")


def test_a_root_that_is_not_there_is_never_replaced_by_the_sample(data_home):
    with pytest.raises(DataError, match="nowhere"): load_dataset("fashioniq", data_home / "nowhere", "val")


def test_circo_has_no_stand_in_and_unknown_names_are_refused(data_home):
    with pytest.raises(DataError, match="circo is missing and has no stand-in"): load_dataset("circo", split="val")
    with pytest.raises(ValueError, match="unknown data set 'cirrr'; known: .*cirr"): load_dataset("cirrr")


@pytest.mark.parametrize("name", ["fashioniq", "cirr"])
def test_the_sample_is_never_called_real(garments, name):
    assert load_dataset(name, garments / name, "val").data == "sample"


def test_incomplete_garments_are_refused(garments, tmp_path):
    root = shutil.copytree(garments, tmp_path / "garments")
    (root / "fashioniq" / "images" / "dress-val-0003.png").unlink()
    with pytest.raises(DataError, match="dress-val-0003"): load_dataset("garments", root, "val")


def test_circo_gallery_is_cocos_list_and_not_what_happens_to_be_there(tmp_path):
    images = [dict(id=i, file_name=f"{i:012d}.jpg") for i in (1, 2, 3, 4)]
    write_json(circo(tmp_path) / "COCO2017_unlabeled" / "annotations" / "image_info_unlabeled2017.json", dict(images=images))
    for i in (1, 2, 3): picture(tmp_path / "COCO2017_unlabeled" / "unlabeled2017" / f"{i:012d}.jpg")
    assert len(load_circo(tmp_path, "val").gallery) == 4


def test_training_images_that_no_triplet_names_may_be_missing(garments, tmp_path):
    "Of FashionIQ's training split; in a gallery that is searched every image counts."
    root = shutil.copytree(garments / "fashioniq", tmp_path / "fashioniq")
    train = load_fashioniq(root, "train")
    named = {name for t in train.triplets for name in (t.reference, t.target)}
    assert set(train.used) == named < set(train.gallery)
    for name in set(train.gallery) - named: (root / "images" / f"{name}.png").unlink()
    assert load_dataset("fashioniq", root, "train").used == train.used
    with pytest.raises(DataError, match="pictures of fashioniq dev are missing"): load_dataset("fashioniq", root, "dev")
    (root / "images" / f"{train.used[0]}.png").unlink()
    with pytest.raises(DataError, match=f"1 of {len(named)} pictures of fashioniq train are missing .{train.used[0]}"):
        load_dataset("fashioniq", root, "train")


# ---- HP-FashionIQ: JSON of another form

FIVE = {"img_path": [f"x/shirt/B{i}.jpg" for i in range(5)]}
ASKED = {"ref_img_paths": ["x/shirt/B1.jpg"], "targ_img_paths": ["x/shirt/B2.jpg"], "sentences": ["is red"],
         "retrieved_set1": [FIVE], "retrieved_set2": [FIVE], "preferred set": ["1"]}


@pytest.mark.parametrize("content", [[], [ASKED], 3, None, "text", {"user_1": []}, {"user_1": {"set_1": 3}}, {"user_1": {"set_1": []}},
                                     *({"user_1": {"set_1": ASKED | {name: value}}} for name in ASKED for value in (None, [None], [3], [[]], "x"))], ids=str)
def test_questions_of_another_form_are_refused_by_file_name(tmp_path, content):
    write_json(tmp_path / "hpfiq.json", content)
    with pytest.raises(DataError, match=r"hpfiq\.json.*get the file again"): load_hp_fashioniq(tmp_path)


# ---- broken pictures

@pytest.fixture
def damaged(tmp_path):
    rows = [dict(candidate="good", target="cut", captions=["is blue", "is darker"])]
    fashioniq(tmp_path, ids=("good", "cut", "nothing", "page", "absent"), rows=rows)
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for name in ("good.png", "cut.jpg"):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "images" / name)
    (tmp_path / "images" / "cut.jpg").write_bytes((tmp_path / "images" / "cut.jpg").read_bytes()[:600])
    (tmp_path / "images" / "nothing.jpg").write_bytes(b"")
    (tmp_path / "images" / "page.jpg").write_text("<html>404 Not Found</html>")
    return tmp_path


def test_everything_wrong_is_reported_at_once(damaged):
    report = verify_images(read(damaged), progress=False)
    assert report.checked == 5 and report.missing == ["absent"] and list(report.unreadable) == ["cut", "nothing", "page"] and not report.ok
    text = str(report)
    assert all(name in text for name in ("absent", "cut.jpg", "nothing.jpg", "page.jpg")) and "good.png" not in text


@pytest.mark.parametrize("name", ["cut.jpg", "nothing.jpg", "page.jpg", "absent.jpg"])
def test_a_bad_file_is_named_when_opened(damaged, name):
    with pytest.raises(DataError, match=name): open_image(damaged / "images" / name)


def test_a_placeholder_of_one_pixel_is_not_a_picture(damaged):
    picture(damaged / "images" / "absent.png", size=(1, 1))
    assert "absent" in verify_images(read(damaged), progress=False).unreadable


def command(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "dqe_cir.data", "verify", *map(str, words)], capture_output=True, text=True, env=environment, timeout=120)


def test_the_command_verifies_and_says_so_in_its_exit_code(garments):
    "On garments in CIRR's layout, which have no published counts: what counts is the pictures."
    words = ("--dataset", "cirr", "--root", garments / "cirr", "--split", "val")
    healthy = command(*words)
    assert healthy.returncode == 0 and "90 images checked: 0 missing, 0 unreadable" in healthy.stdout
    lost = command("--dataset", "cirr", "--root", garments / "nowhere")
    assert lost.returncode != 0 and "nowhere" in lost.stdout + lost.stderr and "Traceback" not in lost.stderr


# ---- counts

@pytest.mark.parametrize("name, load, splits", [("fashioniq", load_fashioniq, ["train", "val", "test"]), ("cirr", load_cirr, ["val", "test1"])])
def test_the_real_annotation_files_hold_what_was_published(annotations, name, load, splits):
    for split in splits:
        told, wrong = count_report(load(annotations(name), split))
        assert told.endswith(", as published") and not wrong
    assert "dress 2,017 triplets and 3,817 images" in count_report(load_fashioniq(annotations("fashioniq"), "val"))[0]


def test_circo_without_its_pictures_has_its_queries_and_not_its_gallery(annotations):
    for split in ("val", "test"):
        [sentence] = count_report(load_circo(annotations("circo"), split))[1]
        assert "images instead of 123,403" in sentence and "COCO 2017 unlabeled" in sentence


@pytest.mark.parametrize("lose", ["a triplet", "an image"])
def test_a_real_file_that_was_cut_short_is_noticed(annotations, tmp_path, lose):
    "One entry less is still valid JSON, and nothing else would notice it."
    for folder in ("captions", "image_splits"): shutil.copytree(annotations("fashioniq") / folder, tmp_path / folder)
    path = tmp_path / ("captions/cap.shirt.val.json" if lose == "a triplet" else "image_splits/split.shirt.val.json")
    entries = json.loads(path.read_text())
    used = {row[side] for row in json.loads((tmp_path / "captions/cap.shirt.val.json").read_text()) for side in ("candidate", "target")}
    entries.remove(entries[-1] if lose == "a triplet" else next(name for name in entries if name not in used))
    write_json(path, entries)
    told, wrong = count_report(load_fashioniq(tmp_path, "val"))
    expected = "shirt has 2,037 triplets instead of 2,038" if lose == "a triplet" else "shirt has 6,345 images instead of 6,346"
    assert len(wrong) == 1 and wrong[0].startswith(expected) and "as published" not in told


def test_counts_and_pictures_are_reported_together(tmp_path, monkeypatch, capsys):
    counted = {"val": {"all": (1, 6)}, "test1": {"all": (4, 6)}}
    monkeypatch.setitem(SPECS, "cirr", dataclasses.replace(SPECS["cirr"], published=counted))
    for split in ("val", "test1"): cirr(tmp_path, split)
    for i in range(6): picture(tmp_path / "img_raw" / "dev" / f"dev-{i}-0-img0.png")
    words = ["verify", "--dataset", "cirr", "--root", str(tmp_path), "--split"]
    assert main([*words, "val"]) == 0
    assert "cirr val: all 1 triplets and 6 images, as published" in capsys.readouterr().out
    assert main([*words, "test1"]) == 1
    told = capsys.readouterr().out
    assert "cirr test1: all has 1 triplets instead of 4" in told and "0 missing, 0 unreadable" in told
    (tmp_path / "img_raw" / "dev" / "dev-4-0-img0.png").unlink()
    (tmp_path / "img_raw" / "dev" / "dev-5-0-img0.png").write_bytes(b"")
    assert main([*words, "train", "val"]) == 1
    told = capsys.readouterr().out
    assert "cap.rc2.train.json" in told or "split.rc2.train.json is missing" in told
    assert "missing: dev-4-0-img0" in told and "dev-5-0-img0.png is not a readable picture" in told


# ---- sixteen bits

@pytest.mark.parametrize("scale", [257, 256], ids=["replicated", "shifted"])
def test_sixteen_bit_greys_keep_their_order_and_range(scale):
    "Eight bits are stored in sixteen by repeating them or by shifting them; both come back within one level."
    grey = np.arange(256, dtype=np.uint16)[None].repeat(4, 0)
    found = np.asarray(as_rgb(Image.fromarray(grey * scale)))[0, :, 0].astype(int)
    assert abs(found - np.arange(256)).max() <= 1 and (np.diff(found) >= 0).all()


def test_a_nearly_black_sixteen_bit_picture_stays_black():
    assert np.asarray(as_rgb(Image.fromarray(np.full((4, 4), 200, dtype=np.uint16)))).max() <= 1
