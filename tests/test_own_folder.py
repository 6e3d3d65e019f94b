"A folder of one's own pictures, as untidy as such folders are: every file is searched, or listed with a reason."
import os
import shutil

import pytest
import torch
from PIL import Image

from dqe_cir.retriever import Retriever


@pytest.fixture(scope="module")
def shipped():
    return Retriever.load("garments", device="cpu")


@pytest.fixture
def retriever(shipped):
    "The shipped model without pictures."
    return Retriever(shipped.method, shipped.config)


def test_every_file_is_searched_or_listed(retriever, mixed_folder):
    folder, good, bad = mixed_folder
    report = retriever.index(folder)
    assert set(retriever.ids) == good and set(report.new) == good
    assert set(report.unreadable) == bad == set(retriever.unreadable)
    assert all(reason and str(folder) not in reason for reason in report.unreadable.values()), "a reason in words, without the path that the id already gives"
    assert "0 bytes" in report.unreadable["empty.jpg"] and "1 x 1" in report.unreadable["one pixel.png"] and "link" in report.unreadable["broken link.png"]
    found = retriever.search("été – 夏.png", "is red", k=100)
    assert {result.id for result in found} == good - {"été – 夏.png"} and all(result.path.is_file() for result in found)
    scores = torch.tensor([result.score for result in found])
    assert scores.isfinite().all() and (scores.diff() <= 0).all()


def test_the_first_frame_of_an_animation_counts(retriever, tmp_path):
    still = Image.new("RGB", (40, 40), "lime")
    still.save(tmp_path / "still.png")
    still.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (40, 40), "black")] * 3)
    retriever.index(tmp_path)
    one, other = (retriever.embeddings[retriever.ids.index(name)] for name in ("still.png", "moving.gif"))
    torch.testing.assert_close(one, other, atol=2e-2, rtol=0)


def test_a_folder_that_changes_is_indexed_by_content(retriever, mixed_folder, tmp_path):
    "Renamed, replaced, repaired, deleted and added files, with the index kept on disk in between."
    folder, good, bad = mixed_folder
    store = tmp_path / "store"
    retriever.index(folder, store)
    os.rename(folder / "plain.png", folder / "plain, renamed.png")
    shutil.copy(folder / "huge.jpg", folder / "cut off.jpg")
    Image.new("RGB", (50, 50), "gold").save(folder / "UPPER.JPG", "JPEG")
    (folder / "clear.png").unlink()
    Image.new("RGB", (50, 50), "silver").save(folder / "added.png")
    again = Retriever(retriever.method, retriever.config)
    encoded = []
    report = again.index(folder, store, lambda done, total: encoded.append(total))
    assert report.renamed == {"plain, renamed.png": "plain.png"} and report.changed == ["UPPER.JPG"] and report.removed == ["clear.png"]
    assert set(report.new) == {"added.png", "cut off.jpg"} and set(report.unreadable) == bad - {"cut off.jpg"}
    fresh = Retriever(retriever.method, retriever.config)
    fresh.index(folder)
    assert fresh.ids == again.ids
    torch.testing.assert_close(fresh.embeddings, again.embeddings, atol=2e-3, rtol=0)
    assert max(encoded) < len(good), "what was known is not encoded again"


def test_a_name_that_is_no_unicode(retriever, tmp_path):
    "File systems keep bytes: a name that no text encoding explains is searched like any other."
    try: Image.new("RGB", (40, 40), "red").save(open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb"), "PNG")
    except OSError: pytest.skip("this file system takes only names that are valid text")
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "other.png")
    retriever.index(tmp_path, tmp_path / "store")
    (found,) = retriever.search("other.png", "is red", k=5)
    assert os.fsencode(found.id) == b"caf\xe9.png"
    again = Retriever(retriever.method, retriever.config)
    assert again.read_index(tmp_path / "store") and again.ids == retriever.ids
