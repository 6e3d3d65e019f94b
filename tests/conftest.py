"Shared by all tests: where the yardsticks lie, one torch thread, the same hypothesis examples on every run."
import os

import pytest
import torch
from hypothesis import settings
from PIL import Image

from helpers import ROOT, data_in

torch.set_num_threads(1)
settings.register_profile("house", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("house")


REFERENCE = ROOT / "tests" / "golden" / "reference"  # the figures of other programs that are small enough to come along


def beside(folder, name):
    "The path of `shared/<folder>/<name>` beside the checkout; skips the test where that is absent."
    path = ROOT.parent / "shared" / folder / name
    if not path.exists(): pytest.skip(f"shared/{folder}/{name} is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def golden():
    "golden('losses.json') -> Path of a reference result, in tests/golden/reference or beside the checkout."
    return lambda name: REFERENCE / name if (REFERENCE / name).exists() else beside("golden", name)


@pytest.fixture(scope="session")
def annotations():
    "annotations('cirr') -> Path of a data set's real annotation files (no images)."
    return lambda name: beside("annotations", name)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A data folder without any real data set, for all tests of a file after the first that asks for it."
    with data_in(tmp_path_factory.mktemp("data")) as folder: yield folder


@pytest.fixture
def mixed_folder(tmp_path):
    "A folder as people have them. Returns it, the ids that can be searched, and the ids that cannot."
    folder = tmp_path / "my pictures"
    good = {"plain.png": "red", "with spaces & 100%.jpg": "blue", "été – 夏.png": "green", "UPPER.JPG": "orange", "no_extension": "purple", "summer/beach/#1.webp": "cyan",
            "<b>bold</b>.png": "yellow", "an 'odd' \"name\".png": "brown", "-p.bmp": "pink", "emoji 👗.png": "white"}
    for name, colour in good.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 64), colour).save(path, {".jpg": "JPEG"}.get(path.suffix.lower()) or (None if path.suffix else "PNG"))
    Image.new("RGB", (5000, 4000), "navy").save(folder / "huge.jpg", quality=30)
    Image.new("RGB", (2000, 9), "teal").save(folder / "very wide.png")
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(folder / "clear.png")
    Image.new("I;16", (40, 40), 40_000).save(folder / "sixteen bits.png")
    Image.new("RGB", (40, 40), "lime").save(folder / "animated.gif", save_all=True, append_images=[Image.new("RGB", (40, 40), "black")] * 3)
    more = {"huge.jpg", "very wide.png", "clear.png", "sixteen bits.png", "animated.gif"}
    (folder / "empty.jpg").touch()
    (folder / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (folder / "cut off.jpg").write_bytes((folder / "huge.jpg").read_bytes()[:2000])
    (folder / "text.jpeg").write_text("not a picture at all")
    Image.new("RGB", (1, 1)).save(folder / "one pixel.png")
    os.symlink(folder / "gone.png", folder / "broken link.png")
    Image.new("1", (30_000, 10_000)).save(folder / "bomb.png")  # a few kilobytes that unpack to more pixels than anybody opens
    (folder / "notes.txt").write_text("buy milk")
    (folder / ".hidden.png").write_bytes((folder / "plain.png").read_bytes())
    (folder / "empty folder").mkdir()
    return folder, {*good, *more}, {"empty.jpg", "corrupt.png", "cut off.jpg", "text.jpeg", "one pixel.png", "broken link.png", "bomb.png"}
