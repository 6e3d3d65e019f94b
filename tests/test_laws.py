"The laws that reference results check where they are at hand, kept here on figures and files made by the tests themselves."
import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import normalize
from torch.testing import assert_close

from dqe_cir.core import generator, write_json
from dqe_cir.data import CLIP_MEAN, CLIP_STD, as_rgb, caption_text, clean_caption, join_captions, load_circo
from dqe_cir.data import load_cirr, load_fashioniq, square_pad, target_pad
from dqe_cir.evaluator import cirr_submission, write_submission
from dqe_cir.methods.mgur import blurred
from dqe_cir.retrieval import similarity, top_k
from dqe_cir.sampler import ScoreDropBand

# ---- pictures (their reference results: tests/test_preprocess.py)

SIZE = 48
SHAPES = [(40, 40), (60, 40), (40, 49), (40, 51), (20, 90), (200, 64), (31, 33), (48, 48)]  # ratios on both sides of 1.25, odd sides, larger and smaller than SIZE


def drawn(width, height):
    "Soft shapes, so that resizing has something to blur, and a bright frame, so that padding shows."
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([127 + 120 * np.sin(x / 5), 127 + 120 * np.cos(y / 7), (x * 7 + y * 3) % 256], -1)
    pixels[[0, -1]] = pixels[:, [0, -1]] = 250
    return Image.fromarray(pixels.astype(np.uint8))


def naive_pad(image, ratio, size):
    "The rule of the field, on a canvas: pad the shorter side to longest / ratio, shorter side to `size`, middle square, CLIP's normalisation."
    image = image.convert("RGB")
    (width, height), wanted = image.size, max(image.size) / ratio
    if max(image.size) / min(image.size) >= ratio:
        across, down = max(int((wanted - width) / 2), 0), max(int((wanted - height) / 2), 0)
        canvas = Image.new("RGB", (width + 2 * across, height + 2 * down))
        canvas.paste(image, (across, down))
        image = canvas
    factor = size / min(image.size)
    image = image.resize([size if side == min(image.size) else int(factor * side) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = np.asarray(image)[top:top + size, left:left + size].astype(np.float64) / 255
    return torch.from_numpy(((pixels - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)).float()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_padding_is_the_naive_one(shape):
    image = drawn(*shape)
    for ratio in (1.25, 1.0, 2.0): assert_close(target_pad(image, ratio, SIZE), naive_pad(image, ratio, SIZE), atol=1e-5, rtol=0)
    assert_close(square_pad(image, SIZE), naive_pad(image, 1.0, SIZE), atol=1e-5, rtol=0)
    grey = image.convert("L")
    assert_close(target_pad(grey, 1.25, SIZE), naive_pad(grey, 1.25, SIZE), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "CMYK", "1"])
@pytest.mark.parametrize("shape", [(20, 90), (90, 20)], ids=str)
def test_conversion_comes_before_padding(mode, shape):
    "So the border is black whatever entry 0 of the palette, white ink or an opaque alpha would have made of it."
    image = drawn(*shape).quantize(16) if mode == "P" else drawn(*shape).convert(mode)
    pixels = square_pad(image, SIZE)
    assert torch.equal(pixels, square_pad(as_rgb(image), SIZE))
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    border = (pixels[:, 0], pixels[:, -1]) if shape[0] > shape[1] else (pixels[:, :, 0], pixels[:, :, -1])
    for line in border: assert_close(line, black[:, None].expand(3, SIZE), atol=1e-5, rtol=0)


# ---- captions

@pytest.mark.parametrize("first, second, joined, cleaned", [
    ("is red", "has dots", "Is red and has dots", "is red and has dots"),
    ("Is RED.", " longer sleeves?, ", "Is red and longer sleeves", "is red and longer sleeves"),
    ("is a v-neck, not round", "it's off-white!", "Is a v-neck, not round and it's off-white!", "is a v-neck, not round and it's off-white"),
    ("has (small) logo: \"A\"", "cut; low #2 * ~", "Has (small) logo: \"a\" and cut; low #2 * ~", "has small logo a and cut low 2"),
    ("", "is black", " and is black", "and is black"),
])
def test_captions_by_hand(first, second, joined, cleaned):
    assert join_captions(first, second) == joined and clean_caption(joined) == cleaned
    if first: assert caption_text((first, second)) == joined


@given(st.text(alphabet="aB .!\"()*#:;~,?-'\n\t2", max_size=60), st.integers(1, 8))
def test_cleaning_is_the_loop(text, words):
    signs = "".join(" " if letter in ".!\"()*#:;~" else letter for letter in text.lower())
    collapsed, run = "", ""
    for letter in signs + "\0":
        if letter.isspace(): run += letter
        else: collapsed, run = collapsed + (run if len(run) < 2 else " ") + letter, ""
    assert clean_caption(text, words) == " ".join((collapsed[:-1] + (run if len(run) < 2 else " ")).rstrip("\n").strip(" ").split(" ")[:words])


# ---- QuRe's band (its reference results: tests/test_sampler.py)

def naive_band(scores, target, threshold):
    "The rule in words: drops after the target, steepest first; the first neighbours in that list that lie far enough apart bound the band."
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    rest = order[order.index(target) + 1:]
    drops = sorted(range(len(rest) - 1), key=lambda i: scores[rest[i + 1]] - scores[rest[i]])
    for one, other in zip(drops, drops[1:]):
        if abs(one - other) > threshold: return set(rest[min(one, other) + 1:max(one, other) + 1])
    return set()


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=14, unique=True), st.data())
def test_qures_band_is_the_loop(values, data):
    "Squared, so that drops rarely tie; where two do, the rule depends on the order of equal drops."
    values = [value ** 2 for value in values]
    falling = sorted(values, reverse=True)
    drops = [a - b for a, b in zip(falling, falling[1:])]
    assume(len(set(drops)) == len(drops))
    target, threshold = data.draw(st.integers(0, len(values) - 1)), data.draw(st.integers(0, 3))
    scores = torch.tensor([values], dtype=torch.float64)
    zone = ScoreDropBand(threshold).zone(scores, torch.tensor([target]), torch.ones_like(scores, dtype=torch.bool))[0]
    assert set(zone.nonzero().flatten().tolist()) == naive_band(values, target, threshold)


def test_qures_band_between_two_cliffs():
    "Ranks 0 to 9; the target is first, the cliffs lie before ranks 4 and 8."
    scores = torch.tensor([[1.0, 0.99, 0.985, 0.97, 0.70, 0.69, 0.66, 0.655, 0.30, 0.26]])
    zone = ScoreDropBand().zone(scores, torch.tensor([0]), torch.ones_like(scores, dtype=torch.bool))[0]
    assert zone.nonzero().flatten().tolist() == [4, 5, 6, 7] and naive_band(scores[0].tolist(), 0, 1) == {4, 5, 6, 7}


# ---- MGUR's blurred targets (their reference results: tests/test_method_losses.py)

def test_blurring_is_the_loop():
    features, scale, shift = (torch.randn(3, 7, generator=generator(0, name)) for name in ("features", "scale", "shift"))
    found = blurred(features, scale, shift)
    for row in range(3):
        values = features[row].tolist()
        mean = sum(values) / 7
        deviation = (sum((value - mean) ** 2 for value in values) / 7 + 1e-5) ** 0.5
        expected = [s * (value - mean) / deviation + b for value, s, b in zip(values, scale[row].tolist(), shift[row].tolist())]
        assert_close(found[row], torch.tensor(expected))


# ---- files for CIRR's server (their reference results: tests/test_submission.py)

QUERIES, GALLERY = 40, 66


@pytest.fixture(scope="module")
def test1():
    "A test split in small: names like CIRR's, groups of six that hold the reference, rankings by our own retrieval."
    names = [f"test1-{i // 6}-{i % 6 // 2}-img{i % 2}" for i in range(GALLERY)]
    query, gallery = (normalize(torch.randn(count, 8, generator=generator(1, count)), dim=1) for count in (QUERIES, GALLERY))
    reference = torch.randint(GALLERY, (QUERIES,), generator=generator(2))
    group = (reference // 6 * 6)[:, None] + torch.arange(6)
    best = top_k(query, gallery, 50, exclude=reference)[1]
    scores = similarity(query, gallery).scatter(1, reference[:, None], -torch.inf)
    named = lambda table: [[names[i] for i in row] for row in table.tolist()]
    return {"pair_ids": [str(12_000 + 7 * i) for i in range(QUERIES)], "references": [names[i] for i in reference.tolist()], "groups": named(group), "gallery": set(names),
            "recall": named(best), "recall_subset": named(group.gather(1, scores.gather(1, group).topk(3).indices)), "scores": scores, "names": names}


def allowed(test1, metric): return test1["groups"] if metric == "recall_subset" else [test1["gallery"]] * QUERIES


@pytest.mark.parametrize("metric, length", [("recall", 50), ("recall_subset", 3)])
def test_a_submission_byte_by_byte(test1, metric, length, tmp_path):
    "The file written by hand: sorted keys, default separators, no newline; the lists found by sorting each row in Python."
    rows = []
    for row, reference in enumerate(test1["references"]):
        pool = test1["groups"][row] if metric == "recall_subset" else test1["names"]
        rows.append(sorted((name for name in pool if name != reference), key=lambda name: -test1["scores"][row, test1["names"].index(name)].item())[:length])
    parts = [f'"{pair}": [' + ", ".join(f'"{name}"' for name in names) + "]" for pair, names in zip(test1["pair_ids"], rows)]
    expected = "{" + ", ".join(sorted([*parts, f'"metric": "{metric}"', '"version": "rc2"'], key=lambda part: part.split('"')[1])) + "}"
    submission = cirr_submission(test1["pair_ids"], test1[metric], metric, test1["references"], allowed(test1, metric), queries=None)
    written = write_submission(tmp_path / "file.json", submission).read_bytes()
    assert hashlib.sha256(written).hexdigest() == hashlib.sha256(expected.encode()).hexdigest() and len(json.loads(written)) == QUERIES + 2


@pytest.mark.parametrize("row", [0, QUERIES - 1])
@pytest.mark.parametrize("metric", ["recall", "recall_subset"])
@pytest.mark.parametrize("accident, message", [
    ("reference", "its own reference"), ("stranger", "which is not among its candidates"), ("repetition", "an image twice"),
    ("short", "images; the server wants exactly"), ("folder", "without folder and extension")])
def test_any_bad_row_is_refused(test1, metric, row, accident, message):
    rankings = list(test1[metric])
    first, *rest = rankings[row]
    rankings[row] = {"reference": [test1["references"][row], *rest], "stranger": ["test1-0-0-nobody", *rest], "repetition": [rest[0], *rest],
                     "short": rest, "folder": [f"./test1/{first}.png", *rest]}[accident]
    with pytest.raises(ValueError, match=f"query {test1['pair_ids'][row]} names .*{message}"):
        cirr_submission(test1["pair_ids"], rankings, metric, test1["references"], allowed(test1, metric), queries=None)


# ---- readers (against the owners' files: tests/test_data.py)

@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    "Three data sets of a few entries each, in their owners' layouts and with their peculiarities."
    root = tmp_path_factory.mktemp("annotations")
    for c, category in enumerate(("dress", "shirt", "toptee")):
        for split in ("train", "val", "test"):
            ids = [f"B{c}{split}{i}" for i in range(5 + c)] + ["Bshared"]
            rows = [dict(target=ids[i], candidate=ids[0], captions=["is blue", f"has {max(i, 2)} pockets"]) for i in range(1, 4 + c)]  # the first two ask the same
            if split == "train": rows[-1]["captions"][0] = ""
            for row in rows if split == "test" else []: del row["target"]
            write_json(root / f"fashioniq/captions/cap.{category}.{split}.json", rows)
            write_json(root / f"fashioniq/image_splits/split.{category}.{split}.json", ids)
    for split, folder in (("val", "dev"), ("test1", "test1")):
        names = [f"{folder}-{i}-0-img0" for i in range(12)]
        rows = [dict(pairid=40 - i, reference=names[i], target_hard=names[i + 1], caption=f"shows {i} dogs", img_set=dict(id=i // 3, members=names[i // 6 * 6:][:6]),
                     target_soft={names[i + 1]: 1.0, names[i + 2]: 0.5, names[i + 3]: -1.0, names[i]: 1.0}) for i in range(3)]
        if split == "test1":
            for row in rows: del row["target_hard"], row["target_soft"]
            rows[1]["caption"] = " "
        write_json(root / f"cirr/captions/cap.rc2.{split}.json", rows)
        write_json(root / f"cirr/image_splits/split.rc2.{split}.json", {name: f"./{folder}/{name}.png" for name in reversed(names)})
    rows = [dict(id=i, reference_img_id=30 + i, target_img_id=200 - i, gt_img_ids=[200 - i, 7], relative_caption="has a child", shared_concept="a swing") for i in range(3)]
    write_json(root / "circo/annotations/val.json", rows)
    write_json(root / "circo/annotations/test.json", [{key: value for key, value in row.items() if key not in ("target_img_id", "gt_img_ids")} for row in rows])
    return root


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_fashioniq_in_small(annotations, split):
    dataset = load_fashioniq(annotations / "fashioniq", split)
    assert [t.category for t in dataset.triplets] == ["dress"] * 3 + ["shirt"] * 4 + ["toptee"] * 5 and list(dataset.galleries) == ["dress", "shirt", "toptee"]
    assert [len(ids) for ids in dataset.galleries.values()] == [6, 7, 8]
    assert len(dataset.gallery) == 6 + 7 + 8 - 2 and dataset.gallery.count("Bshared") == 1 and dataset.gallery[:2] == [f"B0{split}0", f"B0{split}1"]
    assert [t.pair_id for t in dataset.triplets][:4] == [f"dress-{split}-0", f"dress-{split}-1", f"dress-{split}-2", f"shirt-{split}-0"]
    assert all(t.captions[1].startswith("has") and (t.target is None) == (split == "test") for t in dataset.triplets)
    together = [t for t in dataset.triplets if len(t.positives) > 1]
    expected = [] if split == "test" else [{f"B{c}{split}1", f"B{c}{split}2"} for c in (0, 1, 2) for _ in (1, 2)]
    assert [set(t.positives) for t in together] == expected  # the same question of the same reference, within a category
    if split == "train": assert [t.captions[0] for t in dataset.triplets if t.pair_id.endswith(("dress-train-2", "shirt-train-3"))] == ["", ""]


def test_cirr_in_small(annotations):
    dataset = load_cirr(annotations / "cirr", "val")
    assert dataset.gallery == [f"dev-{i}-0-img0" for i in reversed(range(12))]  # in the order of the file
    for i, triplet in enumerate(dataset.triplets):
        assert (triplet.pair_id, triplet.target) == (str(40 - i), f"dev-{i + 1}-0-img0")
        assert triplet.positives == {f"dev-{i + 1}-0-img0", f"dev-{i + 2}-0-img0"}  # not what is rated -1, and not the reference
        assert len(triplet.subset) == 6 and {triplet.reference, triplet.target} <= set(triplet.subset)
    hidden = load_cirr(annotations / "cirr", "test1").triplets
    assert [t.captions for t in hidden] == [("shows 0 dogs",), (" ",), ("shows 2 dogs",)] and not any(t.target or t.positives for t in hidden)


def test_circo_in_small(annotations):
    dataset = load_circo(annotations / "circo", "val")
    assert dataset.gallery == ["7", "30", "31", "32", "198", "199", "200"]  # numbers in their order, not letters in theirs
    assert all(t.target == str(200 - i) and t.positives == {t.target, "7"} and t.pair_id == str(i) for i, t in enumerate(dataset.triplets))
    assert not any(t.target or t.positives for t in load_circo(annotations / "circo", "test").triplets)
