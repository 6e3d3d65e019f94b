"Pictures and captions against reference results of the field's common preprocessing, and what holds where we differ from it on purpose."
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from dqe_cir.core import generator
from dqe_cir.data import CLIP_MEAN, CLIP_STD, as_rgb, caption_text, clean_caption, join_captions, square_pad
from dqe_cir.data import target_pad
from dqe_cir.data.captions import random_captions

SIZE = 64
TRANSFORMS = {
    "targetpad_1.25": lambda picture: target_pad(picture, 1.25, SIZE),
    "targetpad_1.0": lambda picture: target_pad(picture, 1.0, SIZE),
    "squarepad": lambda picture: square_pad(picture, SIZE),
}
BLACK = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)


@pytest.fixture(scope="module", params=["preprocess_part", "preprocess"])
def stored(request): return request.param


def read_pixels(array):
    "(3,S,S) as the model takes it; the part holds the eight bits that it was made of."
    if array.dtype != np.uint8: return torch.from_numpy(array)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (torch.from_numpy(array) / 255 - mean) / std


@pytest.fixture(scope="module")
def pictures(golden, stored):
    "The reference pictures as Pillow images, and what the references made of them."
    facts = json.loads(golden(f"{stored}.json").read_text())["images"]
    arrays = np.load(golden(f"{stored}.npz"))
    images = []
    for fact in facts:
        i, pixels = fact["index"], arrays[f"img{fact['index']}_pixels"]
        image = Image.frombytes(fact["mode"], (fact["width"], fact["height"]), pixels.tobytes())
        if fact["mode"] == "P": image.putpalette(arrays[f"img{i}_palette"].tobytes())
        images.append((image, {name: read_pixels(arrays[f"img{i}_{name}"]) for name in TRANSFORMS}))
    return images


def of_mode(pictures, *modes): return [(image, expected) for image, expected in pictures if image.mode in modes]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_rgb_and_grey_pictures_equal_the_references(pictures, name):
    chosen = of_mode(pictures, "RGB", "L")
    assert len(chosen) >= 5
    for image, expected in chosen: assert_close(TRANSFORMS[name](image), expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_any_picture_equals_its_rgb_version(pictures, name):
    others = of_mode(pictures, "P", "RGBA", "CMYK")
    assert len(others) == 3
    for image, _ in others: assert torch.equal(TRANSFORMS[name](image), TRANSFORMS[name](as_rgb(image)))


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_padding_is_black_whatever_the_palette_or_alpha(pictures, mode):
    "The references pad before the conversion: a palette picture's border gets the colour of entry 0 there."
    [(image, expected)] = of_mode(pictures, mode)
    ours = square_pad(image, SIZE)
    lines = lambda pixels: (pixels[:, 0], pixels[:, -1]) if image.width > image.height else (pixels[:, :, 0], pixels[:, :, -1])
    for line in lines(ours): assert_close(line, BLACK[:, None].expand(3, SIZE), atol=1e-5, rtol=0)
    reference_is_black = all(torch.allclose(line, BLACK[:, None], atol=1e-5) for line in lines(expected["squarepad"]))
    assert reference_is_black == (mode == "RGBA")


def test_opaque_alpha_changes_nothing_and_zero_alpha_is_black(pictures):
    for image, expected in of_mode(pictures, "RGB"):
        opaque, clear = image.convert("RGBA"), image.convert("RGBA")
        clear.putalpha(0)
        assert_close(target_pad(opaque, 1.25, SIZE), expected["targetpad_1.25"], atol=1e-5, rtol=0)
        assert_close(target_pad(clear, 1.25, SIZE), BLACK[:, None, None].expand(3, SIZE, SIZE), atol=1e-5, rtol=0)


def test_ink_differs_from_the_references_by_rounding_only(pictures):
    "They resize four colours and convert last; no padding is involved at this shape."
    [(image, expected)] = of_mode(pictures, "CMYK")
    shade = 1 / 255 / min(CLIP_STD)
    assert (target_pad(image, 1.25, SIZE) - expected["targetpad_1.25"]).abs().max() < 6 * shade


def drawn(width, height):
    values = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(sorted(TRANSFORMS)))
def test_every_shape_becomes_a_square_of_finite_numbers(width, height, name):
    pixels = TRANSFORMS[name](drawn(width, height))
    assert pixels.shape == (3, SIZE, SIZE) and pixels.dtype == torch.float32 and pixels.isfinite().all()


@given(st.integers(1, 90), st.integers(1, 90))
def test_padding_to_ratio_one_is_padding_to_a_square(width, height):
    assert torch.equal(target_pad(drawn(width, height), 1.0, SIZE), square_pad(drawn(width, height), SIZE))


@given(st.integers(20, 90), st.floats(1.0, 1.24))
def test_below_the_ratio_nothing_is_padded(short, stretch):
    white = Image.new("RGB", (math.floor(short * stretch), short), "white")
    assert target_pad(white, 1.25, SIZE)[0].min() > 1.9


# ---- captions

@pytest.fixture(scope="module")
def sentences(golden, stored): return json.loads(golden(f"{stored}.json").read_text())["captions"]["rows"]


def both_said(row): return all(caption.strip(".?, ") for caption in row["captions"])


def test_joined_captions_equal_the_references(sentences):
    assert len(sentences) >= 10
    for row in sentences: assert join_captions(*row["captions"]) == row["joined"]
    for row in filter(both_said, sentences): assert caption_text(tuple(row["captions"])) == row["joined"]


def test_an_empty_caption_leaves_no_dangling_and(sentences):
    "The references write ' and is black' for an empty first caption; a query's text leaves the empty part out."
    partial = [row for row in sentences if not both_said(row)]
    assert len(partial) == 3
    for row in partial:
        ours = caption_text(tuple(row["captions"]))
        assert ours.lower() == row["joined"].strip().removeprefix("and ").removesuffix(" and").lower() and ours[0].isupper()


def test_cleaning_equals_the_references(sentences):
    for row in sentences: assert clean_caption(row["joined"]) == row["lavis_eval"]
    for row in sentences: assert clean_caption(join_captions(*row["captions"])) == row["lavis_eval"]


def test_the_references_random_captions_are_among_ours(sentences):
    chosen = [row for row in sentences if both_said(row)]
    for row in chosen:
        draws = {random_captions(tuple(row["captions"]), generator(0, i)) for i in range(60)}
        assert row["randomized"] in draws and len(draws) == 4


def test_random_captions_are_fair():
    draws = [random_captions(("is red", "has dots"), generator(1, i)) for i in range(2000)]
    shares = np.array([draws.count(text) for text in sorted(set(draws))])
    assert len(shares) == 4 and ((shares - 500) ** 2 / 500).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


captions = st.text(st.sampled_from("aB .,?!é\t#"), max_size=12)


@given(captions, captions)
def test_random_captions_say_something_where_anything_was_said(first, second):
    said = bool(first.strip(".?, ") or second.strip(".?, "))
    for i in range(12): assert bool(random_captions((first, second), generator(0, i)).strip(".?, ")) == said


@given(captions)
def test_a_single_caption_is_left_as_it_is(caption):
    assert caption_text((caption,)) == random_captions((caption,), generator(0)) == caption


@given(captions, captions)
def test_joining_is_stripping_capitalising_and_a_conjunction(first, second):
    one, other = first.strip(".?, "), second.strip(".?, ")
    assert join_captions(first, second) == one.capitalize() + " and " + other


@given(st.text(max_size=80))
def test_cleaning_twice_changes_nothing_more(text):
    once = clean_caption(text)
    assert clean_caption(once) == once and not set(once) & set('.!"()*#:;~')


# ---- what stands beside a picture, and what it is counted in

def test_a_picture_is_turned_once_and_keeps_no_note():
    "Reading it a second time must not turn it a second time, whatever says how: camera notes or XMP."
    lying = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 14, 3), dtype=np.uint8))
    for note in ({"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}, {"xmp": b'<x tiff:Orientation="6"/>'}):
        picture = lying.copy()
        picture.info |= note
        upright = as_rgb(picture)
        assert upright.info == {} and upright.tobytes() == lying.transpose(Image.Transpose.ROTATE_270).tobytes() == as_rgb(upright).tobytes()


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_numbers_of_any_range_keep_their_order(low, span):
    "A grey picture of floating point numbers has its darkest and its brightest place where the numbers say, and they differ."
    values = np.linspace(low, low + span, 64, dtype=np.float32).reshape(8, 8)
    if np.unique(values).size < 64: return  # too fine a step for these numbers
    grey = np.asarray(as_rgb(Image.fromarray(values)))[..., 0].astype(int).flatten()
    assert (np.diff(grey) >= 0).all() and grey[-1] - grey[0] > 60


@given(st.integers(0, 4095), st.integers(1, 4095))
def test_sixteen_bits_are_divided_by_257(first, step):
    values = np.array([[first, min(first + step, 65535)]], dtype=np.uint16)
    assert np.array_equal(np.asarray(as_rgb(Image.fromarray(values)))[..., 0], values // 257)


@pytest.mark.parametrize("size", [(40_000, 8), (8, 40_000), (300_000, 1)])
def test_a_strip_needs_no_memory_of_a_square(size):
    from dqe_cir.data.pictures import LARGE, padded, within
    picture = within(Image.new("RGB", size, "white"), 1.25)
    assert math.prod(padded(picture, 1.25).size) <= 1.01 * LARGE
    assert target_pad(Image.new("RGB", size, "white"), size=SIZE).isfinite().all()


def test_ordinary_pictures_are_left_as_they_are():
    "What cameras and benchmarks make goes to the encoder bit by bit as before: 12 million pixels, and strips of an ordinary length."
    from dqe_cir.data.pictures import divided_by, within
    for size in ((4032, 3024), (3024, 4032), (5000, 4000), (6000, 500), (640, 480), (2, 3000)):
        picture = Image.new("L", size)
        assert within(picture, 1.25) is picture and divided_by(size) == 1
