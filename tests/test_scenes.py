"The scenes: requests read by their meaning, right answers by plain loops, CIRR's layout read by CIRR's reader, the same bytes from any number of processes."
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import ROOT

from dqe_cir.data import load_cirr, load_dataset, load_scenes, make_scenes, sample_banner, uneven_targets
from dqe_cir.data.datasets import SPECS
from dqe_cir.data.scenes import benchmark, requests
from dqe_cir.data.scenes.benchmark import SIZES, family, fingerprint, kinds, make_world, question, right_answers, scene_place
from dqe_cir.data.scenes.draw import ATTRIBUTES, GROUPS, ORDERS, SHAPES, Scene, arranged, draw_scene, how_many, possible, present
from dqe_cir.data.scenes.requests import SCENE_WIDE, allowed_values, caption_corpus, caption_of, changes_between, codes, is_relevant, read_request
from dqe_cir.data.scenes.requests import relevant_rows, request_between, sentence

COUNTS = SIZES["smoke"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory): return make_scenes(tmp_path_factory.mktemp("scenes"), "smoke", progress=False)


@pytest.fixture(scope="module")
def world(): return make_world("smoke", 0)


@pytest.fixture(scope="module")
def full(): return make_world("full", 0)


def every_query(world):
    return [(query, world.pictures(split)) for split, queries in world.queries.items() for query in queries]


# ---- scenes and pictures

values = {name: st.sampled_from(known) for name, known in ATTRIBUTES.items()}
anything = st.fixed_dictionaries(values)


@given(anything)
def test_a_scene_is_possible_by_plain_rules(values):
    numbers = ["none", "one", "two", "three"]
    count = sum(numbers.index(values[f"{group}_number"]) for group in GROUPS)
    missing = [group for group in GROUPS if values[group] == "none"]
    whole = all(len({values[group + part] == "none" for part in ("", "_colour", "_number")}) == 1 for group in GROUPS)
    expected = whole and len(missing) < 2 and 3 <= count <= 6 and values["large"] not in missing
    assert (possible(values) is not None) == expected


def test_every_kind_has_a_shape_and_is_drawn_where_its_group_stands(world):
    assert len(SHAPES) == 15 and set(SHAPES) == {kind for kinds in GROUPS.values() for kind in kinds}
    for seed, scene in enumerate(list(world.images["val"].values())[:60]):
        objects = arranged(scene, np.random.default_rng(seed))
        assert Counter(thing.kind for thing in objects) == {getattr(scene, group): how_many(scene, group) for group in present(scene)}
        middle = {group: np.mean([thing.x for thing in objects if thing.kind == getattr(scene, group)]) for group in present(scene)}
        assert sorted(middle, key=middle.get) == present(scene), "from left to right as the order says"
        assert all(0 < thing.x < 1 and 0.4 < thing.y < 1 for thing in objects)


def test_all_chance_comes_from_the_generator(world):
    scene = world.images["val"]["dev-0-0-img0"]
    one, again, other = (np.asarray(draw_scene(scene, np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert one.shape == (64, 64, 3) and (one == again).all() and (one != other).any()


# ---- requests

def meant(change, scene):
    "What a change makes of a scene's values, where it leaves no choice."
    exact = {name: next(iter(allowed)) for name, allowed in change.asks.items() if len(allowed) == 1}
    return {**asdict(scene), **exact}


def test_applied_to_the_reference_a_request_describes_the_target(full):
    "The law of the world: whatever is asked for exactly makes of the reference what the target shows, but for what may drift."
    free = {*SCENE_WIDE, "order"}
    for query, images in every_query(full)[::7]:
        reference, target = images[query.reference], asdict(images[query.target])
        described, asked = asdict(reference), set()
        for change in query.changes:
            for name, allowed in change.asks.items():
                assert target[name] in allowed, query.caption
                described[name] = next(iter(allowed)) if len(allowed) == 1 else target[name]  # what was left open
                asked.add(name)
        wrong = [name for name in ATTRIBUTES if described[name] != target[name] and name != "order"]
        assert len(wrong) <= 1 and set(wrong) <= free - asked, query.caption
        assert any(asdict(reference)[name] not in allowed for change in query.changes for name, allowed in change.asks.items())


def right_by_hand(query, images):
    "Right answers by loops over names and values, without codes."
    reference, asked = asdict(images[query.reference]), {}
    for change in query.changes:
        for name, allowed in change.asks.items(): asked[name] = [value for value in asked.get(name, ATTRIBUTES[name]) if value in allowed]
    right = []
    for name, scene in images.items():
        shows, drifted = asdict(scene), 0
        for attribute, value in shows.items():
            if attribute in asked: drifted += 0 if value in asked[attribute] else 99
            elif attribute == "order": continue
            elif value != reference[attribute]: drifted += 1 if attribute in ("large", "ground", "view", "light") else 99
        if drifted <= 1 and name != query.reference: right.append(name)
    return right


def test_right_answers_are_those_of_plain_loops(world):
    for query, images in every_query(world):
        table = codes(list(images.values()))
        found = right_answers(query, images, table)
        assert found == right_by_hand(query, images) and query.target in found
        assert found == [name for name, scene in images.items() if name != query.reference and is_relevant(scene, list(query.changes), images[query.reference])]


def test_captions_are_read_back_as_what_was_drawn(world):
    for query, images in every_query(world)[::6]:
        reference = images[query.reference]
        understood = read_request(query.caption, reference)
        assert understood, query.caption
        assert allowed_values(understood, reference) == allowed_values(list(query.changes), reference), query.caption


@settings(max_examples=30)
@given(st.text(max_size=30))
def test_what_is_not_understood_is_not_guessed(text):
    scene = Scene("cup", "red", "two", "book", "blue", "one", "duck", "yellow", "one", "thing dish toy", "none", "wood", "near", "day")
    assert read_request(text, scene) is None


def test_no_word_is_outside_the_corpus(full):
    words = {word for text in caption_corpus() for word in re.findall(r"[a-z]+", re.sub(r"\{\w+\}", "", text))}
    rng = np.random.default_rng(0)
    said = [query.caption for queries in full.queries.values() for query in queries]
    said += [caption_of(scene, rng) for scene in list(full.images["train"].values())[:300]]
    assert {word for text in said for word in re.findall(r"[a-z]+", text.lower())} <= words
    assert not any(re.search(r"[{}|]", text) for text in said) and not any(re.search(r"\ba [aeio]", text) for text in said)


def test_all_kinds_of_change_are_asked_for_alone_and_together(full):
    asked, together = Counter(), Counter()
    for query, images in every_query(full):
        together[len(query.changes)] += 1
        asked.update(name for change in query.changes for name in change.asks)
    assert min(together[n] for n in (1, 2, 3)) > 0.15 * sum(together.values())
    assert set(asked) == set(ATTRIBUTES) and min(asked.values()) > 60, asked
    starts = Counter(query.caption.lower().split()[0] for query, _ in every_query(full))
    assert {"add", "remove", "replace", "make", "put", "zoom", "there", "same"} <= set(starts)


# ---- the world

def test_families_vary_in_few_things_and_held_out_kinds_are_not_trained_on(full):
    for seed in range(20):
        scenes = family(np.random.default_rng(seed))
        varying = {name.split("_")[0] for name in ATTRIBUTES if len({getattr(scene, name) for scene in scenes}) > 1}
        assert len(varying) <= 6 and len(set(scenes)) == len(scenes)
    assert not any(kinds(scene) in full.held_out for split in ("train", "test1") for scene in full.images[split].values())
    share = np.mean([kinds(full.images["val"][query.target]) in full.held_out for query in full.queries["val"]])
    assert 0.15 < share < 0.5


def test_dev_asks_the_training_pictures_and_nothing_twice(full):
    assert full.pictures("dev") is full.pictures("train")
    for split, queries in full.queries.items(): assert len({query.target for query in queries}) == len(queries) == SIZES["full"]["queries"][split]
    train, dev = full.queries["train"], full.queries["dev"]
    assert not {query.target for query in train} & {query.target for query in dev} and not set(map(question, train)) & set(map(question, dev))


def test_what_chance_and_perfect_knowledge_reach(full):
    "The corridor: R@10 of whoever knows everything lies between 70 and 90, and the group is told apart nearly always."
    images, queries = full.pictures("val"), full.queries["val"]
    table, names = codes(list(images.values())), list(images)
    right = [set(right_answers(query, images, table)) for query in queries]
    knowing = 100 * np.mean([min(1, 10 / len(some)) for some in right])
    assert 70 < knowing < 90 and len(names) == 2700
    in_group = np.mean([1 / len(some & set(query.members)) for some, query in zip(right, queries)])
    assert in_group > 0.85, "of five others chance finds the target in 20 of 100"


@pytest.mark.parametrize("point, most", [("picture", 12), ("words", 25)])
def test_half_a_question_does_not_find_it(full, point, most):
    "With perfect eyes: whoever returns what is most like the reference, or all that shows what was asked for, has a low mAP."
    images, queries = full.pictures("val"), full.queries["val"]
    table, names = codes(list(images.values())), list(images)
    luck, found = np.random.default_rng(0), []
    for query in queries:
        changes, row = list(query.changes), names.index(query.reference)
        right = relevant_rows(table, changes, images[query.reference])
        scores = (table == table[row]).mean(1)
        if point == "words":
            allowed, asked = allowed_values(changes, images[query.reference])
            scores = np.mean([np.isin(table[:, i], [known.index(value) for value in allowed[name]])
                              for i, (name, known) in enumerate(ATTRIBUTES.items()) if name in asked], axis=0)
        scores = scores + luck.uniform(0, 1e-3, len(scores))
        scores[row], right[row] = -1, False
        hits = right[np.argsort(-scores)]
        found.append((hits.cumsum() / np.arange(1, len(hits) + 1))[hits].mean())
    assert 2 < 100 * np.mean(found) < most


# ---- on disk

def test_cirrs_reader_reads_it(smoke, world):
    truth = json.loads((smoke / "scenes.json").read_text())
    for split, count in COUNTS["queries"].items():
        dataset = load_cirr(smoke / "cirr", split)
        assert dataset.data == "sample" and len(dataset.triplets) == count and set(dataset.gallery) == set(world.pictures(split))
        for t, query in zip(dataset.triplets, world.queries[split], strict=True):
            assert (t.reference, t.captions, t.subset) == (query.reference, (query.caption,), query.members)
            assert t.target == (None if split == "test1" else query.target)
            right = set(truth["relevant"][split][t.pair_id])
            assert t.target is None or {t.target} <= t.positives and t.positives & set(t.subset) == right & set(t.subset)
        with Image.open(dataset.image_path(dataset.gallery[0])) as picture: assert (picture.size, picture.mode) == ((64, 64), "RGB")


def test_fields_are_those_of_the_real_files(smoke, annotations):
    for split in ("val", "test1"):
        real, ours = (json.loads((folder / f"captions/cap.rc2.{split}.json").read_text())[0] for folder in (annotations("cirr"), smoke / "cirr"))
        assert set(ours) == set(real) and set(ours["img_set"]) <= set(real["img_set"])
        path, mine = (next(iter(json.loads((folder / f"image_splits/split.rc2.{split}.json").read_text()).values())) for folder in (annotations("cirr"), smoke / "cirr"))
        assert re.sub(r"\d+", "0", path) == re.sub(r"\d+", "0", mine)


@pytest.mark.parametrize("split", ["train", "dev", "val"])
def test_the_data_set_knows_what_garments_know(smoke, split):
    dataset = load_scenes(smoke, split)
    assert dataset.name == dataset.title == dataset.data == "scenes" and list(dataset.galleries) == ["all"]
    for t in dataset.triplets:
        assert t.category == "all" and t.target in t.positives <= dataset.relevant[t.pair_id]
        assert split == "train" or t.positives == dataset.relevant[t.pair_id]
        for name, allowed in dataset.mentions[t.pair_id].items():
            assert all(dataset.attributes[right][name] in allowed for right in dataset.relevant[t.pair_id])
    assert all(set(shown) == {"category", "held_out", *ATTRIBUTES} for shown in dataset.attributes.values())


def test_uneven_annotators_have_favourites(smoke):
    train = load_scenes(smoke, "train")
    uneven = uneven_targets(train)
    assert len({t.target for t in uneven.triplets}) < len({t.target for t in train.triplets}) == len(train.triplets)
    assert all(t.target in train.relevant[t.pair_id] for t in uneven.triplets)


def test_scenes_stand_in_for_cirr(smoke, monkeypatch):
    monkeypatch.setenv("DQE_CIR_DATA", str(smoke.parent))
    for split in ("train", "val", "test1"):
        dataset = load_dataset("cirr", split=split, size="smoke")
        assert (dataset.name, dataset.data, dataset.attributes) == ("cirr", "sample", {})
        assert "DRAWN SCENES in cirr's file layout" in sample_banner(dataset)
    scenes = load_dataset("scenes", split="val", size="smoke")
    assert scenes.root == smoke / "cirr" and sample_banner(scenes) == "" and SPECS["scenes"].drawn and SPECS["cirr"].stand_in == "scenes"


# ---- made once, and whole

def digests(folder): return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_bytes_from_any_process(smoke, tmp_path):
    "Two worker processes, another hash seed, another folder."
    command = f"from dqe_cir.data import make_scenes; make_scenes({str(tmp_path)!r}, 'smoke', workers=2, progress=False)"
    subprocess.run([sys.executable, "-c", command], check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert digests(tmp_path / smoke.name) == digests(smoke)


def test_size_and_seed_decide_the_folder():
    assert len({fingerprint(size, seed) for size in SIZES for seed in range(3)}) == 6
    assert make_world("smoke", 0).images != make_world("smoke", 1).images


def test_a_failure_while_drawing_leaves_nothing(tmp_path, monkeypatch):
    drawn = []
    def tired(*arguments):
        drawn.append(arguments)
        if len(drawn) > 100: raise MemoryError("no more ink")
        return draw_scene(*arguments)
    monkeypatch.setattr(benchmark, "draw_scene", tired)
    with pytest.raises(MemoryError, match="no more ink"): make_scenes(tmp_path, "smoke", workers=1, progress=False)
    assert len(drawn) == 101 and list(tmp_path.iterdir()) == []
