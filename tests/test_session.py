"Sessions on galleries of every kind: without training, of one's own with a table, in an engine, in half precision."
import importlib.util
import shutil

import pytest
import torch
from PIL import Image

from dqe_cir.files import DataError
from dqe_cir.retriever import QdrantFolder, Retriever, SearchPage, Session
from dqe_cir.retriever.drawn import drawn_at_once
from dqe_cir.retriever.index import source_name
from dqe_cir.retriever.lessons import Lessons
from dqe_cir.retriever.session import dataset_of, index_store, open_gallery

embedded = pytest.mark.skipif(importlib.util.find_spec("qdrant_edge") is None, reason="qdrant-edge-py is not installed: pip install dqe-cir[qdrant], or make test-stores")


@pytest.fixture(scope="module")
def small(): return drawn_at_once("garments", "val", "smoke")


@pytest.fixture(scope="module")
def shipped(): return Retriever.load("garments", device="cpu")


@pytest.fixture
def retriever(shipped):
    "The shipped model without pictures."
    return Retriever(shipped.method, shipped.config)


@pytest.fixture
def own(tmp_path, monkeypatch):
    "Makes folders of three pictures and a table; indexes are kept below the same place."
    monkeypatch.setenv("DQE_CIR_DATA", str(tmp_path / "data"))
    def made(place, names="abc", splits="val,val", colours=("red", "green", "blue")):
        folder = tmp_path / place
        (folder / "images").mkdir(parents=True)
        for name, colour in zip(names, colours): Image.new("RGB", (40, 40), colour).save(folder / "images" / f"{name}.png")
        rows = [f"{name},is blue,{names[2]},{split}\n" for name, split in zip(names, splits.split(","))]
        (folder / "triplets.csv").write_text("reference,text,target,split\n" + "".join(rows))
        return folder
    return made


def test_a_session_without_training_answers(small, tmp_path):
    "It was trained on no data set: nothing is known of its requests, and nothing is said."
    for name in small.gallery[:4]: shutil.copy(small.files[name], tmp_path / f"{name}.png")
    retriever = Retriever.zero_shot("mini", device="cpu")
    retriever.index(tmp_path)
    session = Session(retriever)
    step = session.search("is red without a hood")
    assert len(step.results) == 3 and step.unheard == "" and session.phrases == []
    page = SearchPage(retriever, size="smoke")
    page.open(str(tmp_path))
    page.session.search("is red")
    page.explain(page.session.step.results[0].id)
    assert "No training negatives are kept" in page.why["lesson"]
    retriever.kept_lessons, retriever.lessons_read = Lessons(retriever.embeddings[:1, 0], [("a", "is blue", "b", ("c",))]), True
    page.explain(page.session.step.results[0].id)
    assert "is blue" in page.why["lesson"] and page.why["strip"] is None


def test_folders_of_one_name_have_indexes_of_their_own(own, retriever):
    first, second = own("a/shop"), own("b/shop", "xyz")
    assert index_store(retriever, dataset_of(str(first))) != index_store(retriever, dataset_of(str(second)))
    open_gallery(retriever, str(first))
    session, told = open_gallery(retriever, str(second))
    assert retriever.ids == ["x", "y", "z"] and "as shipped" not in told
    assert {result.id for result in session.search("is blue").results} == {"x", "y", "z"} - {session.reference}


def test_a_question_about_one_gallery_does_not_hinder_the_next(own, retriever):
    "While pictures are encoded the retriever is between two galleries; the page then asks it nothing."
    first, second = own("first"), own("second", "xyz", colours=("black", "white", "cyan"))
    page, moved = SearchPage(retriever, size="smoke"), []
    page.widget.observe(lambda change: moved.append(change["new"]["status"]), "state")
    page.open(str(second))  # its index is kept from now on
    page.open(str(first))
    page.session.search("is blue")
    Image.new("RGB", (40, 40), "yellow").save(second / "images" / "y.png")
    page.open(str(second))
    assert "encoding pictures: 1 of 1" in moved and ": 3 pictures: 2 kept, 1 changed in" in page.opened


def test_garments_are_not_encoded_again_after_a_folder(own, retriever, monkeypatch):
    folder = own("shop")
    page = SearchPage(retriever)
    page.open(str(folder))
    page.session.search("is blue")
    monkeypatch.undo()
    page.open("garments")
    assert ": 2,100 pictures, index as shipped" in page.opened


def test_a_picture_that_was_replaced_is_seen(own, retriever):
    "Also where the data set is open already, and as many pictures are there."
    folder = own("shop")
    open_gallery(retriever, str(folder))
    before = retriever.embedding_of("b")
    assert ": 3 pictures: 3 kept in" in open_gallery(retriever, str(folder))[1]
    Image.new("RGB", (40, 40), "yellow").save(folder / "images" / "b.png")
    assert ": 3 pictures: 2 kept, 1 changed in" in open_gallery(retriever, str(folder))[1]
    assert not torch.equal(retriever.embedding_of("b"), before)


def test_drawn_data_keep_their_names(small, shipped):
    "Wherever they lie: an index that ships or was kept before is found."
    assert source_name(small) == f"{small.root.name} val" and "/" not in source_name(small)
    assert "index as shipped" in open_gallery(shipped, "garments")[1]


@embedded
def test_a_gallery_in_an_engine_is_opened(own, small, tmp_path, monkeypatch):
    "A folder, a table and drawn pictures; the engine keeps them, and no index is written beside it."
    folder = own("shop")
    retriever = Retriever.load("garments", device="cpu", store=QdrantFolder(tmp_path / "engine"))
    page = SearchPage(retriever, size="smoke")
    for place, count in ((folder / "images", 3), (folder, 3)):
        page.open(str(place))
        assert f": {count} pictures: " in page.opened and len(page.session.search("is blue").results) == count - 1
    monkeypatch.undo()
    session, told = open_gallery(retriever, "garments", "smoke")
    assert ": 180 pictures: 180 new in" in told and len(session.search("is red").results) == 10
    assert "180 pictures, index as shipped" in open_gallery(retriever, "garments", "smoke")[1]
    assert not (tmp_path / "data" / "indexes").exists() and len(retriever.embeddings) == 0


def test_weights_are_those_of_the_numbers_in_half_precision(small, retriever):
    "Of an index too large for float32: the picture, the words, an upload, a refused picture."
    retriever.index(small)
    session, halved = Session(retriever, small), Retriever(retriever.method, retriever.config)
    vars(halved).update({name: value for name, value in vars(retriever).items() if name != "lookups"})
    halved.embeddings = retriever.embeddings.half()
    other, name = Session(halved, small), small.gallery[3]
    exact, found = session.likeness(name), other.likeness(name)
    assert found.dtype == torch.float32 and found.argmax() == small.gallery.index(name)
    torch.testing.assert_close(found, exact, atol=0, rtol=0)  # they were numbers of half precision before
    torch.testing.assert_close(other.agreement("is red"), session.agreement("is red"), atol=0, rtol=0)
    for asked in (session, other):
        asked.upload("mine.png", small.files[name].read_bytes())
        asked.search("is red")
        for balance in (-0.5, 0.5): asked.set_balance(balance)
        asked.avoid(asked.step.results[0].id)
    assert [result.id for result in other.step.results] == [result.id for result in session.step.results]


@pytest.mark.parametrize("splits, split, queries", [("train,test", "test", 1), ("train,train", "train", 2), ("train,val", "val", 1)])
def test_a_table_without_val_rows_is_searched(own, retriever, splits, split, queries):
    "All pictures of the folder, also those that no row names."
    folder = own("shop", splits=splits)
    Image.new("RGB", (40, 40), "white").save(folder / "images" / "unnamed.png")
    session, told = open_gallery(retriever, str(folder))
    assert told.startswith(f"custom: shop {split}") and len(session.dataset.triplets) == queries
    assert {result.id for result in session.search("is blue").results} | {session.reference} == {"a", "b", "c", "unnamed"}
    assert "target" in session.step.marks


def test_a_faulty_table_leaves_a_folder_of_pictures(own, retriever):
    folder = own("shop")
    table = folder / "triplets.csv"
    table.write_text(table.read_text() + "nowhere,is red,a,val\n")
    with pytest.raises(DataError, match="row 4 names 'nowhere'"): dataset_of(str(folder))
    session, told = open_gallery(retriever, str(folder))
    assert session.dataset is None and retriever.ids == [f"images/{name}.png" for name in "abc"]
    assert f"searched without its table: {table}, row 4 names 'nowhere'" in told and "\n" not in told
    assert len(session.search("is blue").results) == 2
