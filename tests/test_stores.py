"Galleries in an engine: the exact scorer's pictures, filters, changes, a kill, a server that is played, and refusals in one line."
import importlib.util
import random
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
from torch.nn.functional import normalize

import search_times
from helpers import ROOT

from dqe_cir.core import generator
from dqe_cir.files import DataError
from dqe_cir.retrieval import top_k
from dqe_cir.retriever import QdrantFolder, QdrantServer, Retriever
from dqe_cir.retriever.beyond_memory import StoredPictures
from dqe_cir.retriever.drawn import drawn_at_once
from dqe_cir.retriever.index import stored_index

embedded = pytest.mark.skipif(importlib.util.find_spec("qdrant_edge") is None, reason="qdrant-edge-py is not installed: pip install dqe-cir[qdrant], or make test-stores")


# ---- a server of a few calls, and the requests that it understands

def plain(name): return type(name, (types.SimpleNamespace,), {})


class Played:
    "Answers the calls of `qdrant-client` that are used, and no other, from lists in this process."
    collections = {}

    def __init__(self, url, api_key=None, timeout=None):
        if not re.match("https?://", url): raise ValueError(f"Unknown scheme: {url}")
        self.url = url

    def of(self, collection_name):
        if "unreachable" in self.url: raise ConnectionError("[Errno 111]\nConnection refused")
        return self.collections[collection_name]

    def collection_exists(self, collection_name):
        if "unreachable" in self.url: self.of(collection_name)
        return collection_name in self.collections

    def create_collection(self, collection_name, vectors_config, metadata, shard_number=1):
        self.collections[collection_name] = types.SimpleNamespace(points={}, config=types.SimpleNamespace(metadata=dict(metadata)), vectors=vectors_config, shards=shard_number)

    def create_payload_index(self, collection_name, field_name, field_schema, wait): assert wait and field_schema in ("integer", "keyword")
    def get_collection(self, collection_name): return self.of(collection_name)
    def update_collection(self, collection_name, metadata): self.of(collection_name).config.metadata |= metadata

    def upsert(self, collection_name, points, wait):
        assert wait and len(points) <= 1000 and all(len(point.vector) == self.of(collection_name).vectors.size for point in points)
        self.of(collection_name).points |= {point.id: point for point in points}

    def delete(self, collection_name, points_selector, wait):
        for number in points_selector.points: self.of(collection_name).points.pop(number, None)

    def retrieve(self, collection_name, ids, with_payload, with_vectors): return [self.of(collection_name).points[number] for number in ids if number in self.of(collection_name).points]

    def fits(self, point, wanted):
        def holds(condition):
            values = point.payload.get(condition.key)
            values = values if isinstance(values, list) else [values]
            return bool(set(values) & set(condition.match.any)) if hasattr(condition.match, "any") else condition.match.value in values
        return all(map(holds, wanted.must or [])) and all(point.id not in condition.has_id for condition in getattr(wanted, "must_not", None) or [])

    def scroll(self, collection_name, scroll_filter, limit, offset, with_payload, with_vectors):
        found = [point for point in self.of(collection_name).points.values() if self.fits(point, scroll_filter)]
        start, size = offset or 0, 7  # a server may give fewer than asked
        return found[start:start + size], start + size if len(found) > start + size else None

    def count(self, collection_name, exact):
        assert exact
        return types.SimpleNamespace(count=len(self.of(collection_name).points))

    def query_points(self, collection_name, query, limit, query_filter, with_payload, search_params):
        assert search_params.exact
        found = [point for point in self.of(collection_name).points.values() if self.fits(point, query_filter)]
        scored = [types.SimpleNamespace(payload=point.payload, score=(torch.tensor(point.vector) @ torch.tensor(query)).item()) for point in found]
        return types.SimpleNamespace(points=sorted(scored, key=lambda point: -point.score)[:limit])


@pytest.fixture
def played(monkeypatch):
    "`qdrant_client` as this module has it, with no collections."
    names = "Filter FieldCondition MatchAny MatchValue HasIdCondition SearchParams PointStruct PointIdsList VectorParams".split()
    models = types.SimpleNamespace(**{name: plain(name) for name in names}, Distance=types.SimpleNamespace(DOT="Dot"), Datatype=types.SimpleNamespace(FLOAT16="float16", FLOAT32="float32"))
    monkeypatch.setitem(sys.modules, "qdrant_client", types.SimpleNamespace(QdrantClient=Played, models=models))
    monkeypatch.setattr(Played, "collections", {})


class InFolder:
    def __init__(self, place): self.place, self.engine = place / "engine", None

    def opened(self):
        if self.engine: self.engine.close()
        self.engine = QdrantFolder(self.place)
        return self.engine


class AtAddress:
    def __init__(self, place): pass
    def opened(self): return QdrantServer("http://localhost:6333")


@pytest.fixture(params=[pytest.param(InFolder, marks=embedded), AtAddress], ids=["folder", "server"])
def place(request, tmp_path, played): return request.param(tmp_path)


def gallery_of(images, tokens, size, seed):
    drawn = generator(seed, "stores")
    return normalize(torch.randn(images, tokens, size, generator=drawn), dim=-1).half(), normalize(torch.randn(12, size, generator=drawn), dim=1)


def named(number): return f"{number:04}"


# ---- the exact scorer's pictures

@pytest.mark.parametrize("tokens", [1, 5])
def test_same_ids_whatever_was_added_removed_and_changed(place, tokens):
    gallery, queries = gallery_of(120, tokens, 16, tokens)
    vectors, rng = {}, random.Random(tokens)
    of = {named(i): [kind for kind, every in (("second", 2), ("third", 3)) if i % every == 0] for i in range(120)}
    for turn in range(4):
        stored = StoredPictures(place.opened(), "a model")
        new = {named(rng.randrange(120)): gallery[rng.randrange(120)] for _ in range(50)}
        gone = rng.sample(sorted(vectors), len(vectors) // 3)
        stored.write([(name, embedding, f"key {turn}", f"/pictures/{name}", of[name]) for name, embedding in new.items()])
        stored.remove(gone)
        vectors = {name: embedding for name, embedding in (vectors | new).items() if name not in gone}
        assert set(stored.listing()) == set(vectors) and len(stored) == len(vectors)
        names = sorted(vectors)
        for query in queries:
            left_out, k = rng.choice(names), rng.randrange(1, 15)
            for among in (None, "third", names[::4]):
                within = [name for name in names if name != left_out and (among is None or (name in among if isinstance(among, list) else among in of[name]))]
                found = stored.best(query, k, among, [left_out])
                if not within:
                    assert found == []
                    continue
                scores, _ = top_k(query[None], torch.stack([vectors[name] for name in within]), min(k, len(within)))
                torch.testing.assert_close(torch.tensor([score for _, score in found]), scores[0])
                by_name = {name: (vectors[name].float() @ query).max().item() for name in within}
                assert len({name for name, _ in found}) == len(found) and all(abs(by_name[name] - score) < 1e-5 for name, score in found)


def test_a_retriever_answers_alike(place, tmp_path):
    "Indexing, a category, a copy, a file renamed, one removed, one changed, one broken; loaded again."
    small, folder = drawn_at_once("garments", "val", "smoke"), tmp_path / "pictures"
    folder.mkdir()
    for i in range(8): shutil.copy(small.files[small.gallery[i]], folder / f"{i}.png")
    shutil.copy(folder / "0.png", folder / "copy.png")
    (folder / "torn.png").write_bytes(b"no picture")
    retriever, exact = Retriever.load("garments", device="cpu", store=place.opened()), Retriever.load("garments", device="cpu")

    def same():
        exact.index(folder)
        for reference in ("2.png", folder / "2.png", small.files[small.gallery[20]]):
            found, expected = (one.search(reference, "is red and has long sleeves") for one in (retriever, exact))
            assert [result.id for result in found] == [result.id for result in expected]
            assert [result.path for result in found] == [result.path for result in expected]
            torch.testing.assert_close([result.score for result in found], [result.score for result in expected], rtol=1e-5, atol=1e-5)
        why, expected = (one.explain("2.png", "is red", "3.png").contributions for one in (retriever, exact))
        torch.testing.assert_close(why, expected, rtol=1e-4, atol=1e-5)

    report = retriever.index(folder)
    assert len(report.new) == 9 and set(report.unreadable) == {"torn.png"}
    same()
    (folder / "1.png").rename(folder / "moved.png")
    (folder / "4.png").unlink()
    shutil.copy(small.files[small.gallery[30]], folder / "5.png")
    retriever = Retriever.load("garments", device="cpu", store=place.opened())
    encoded = []
    report = retriever.index(folder, progress=lambda done, total: encoded.append(total))
    assert (report.renamed, report.removed, report.changed) == ({"moved.png": "1.png"}, ["4.png"], ["5.png"])
    assert encoded == [2], "the new content, and the broken file is tried again"
    same()
    retriever.index(small)
    exact.index(small)
    question = small.gallery[3], "is red and has long sleeves", 7
    for among in (None, "dress", small.galleries["shirt"]):
        found, expected = (one.search(*question, among=among) for one in (retriever, exact))
        assert [result.id for result in found] == [result.id for result in expected]
    assert retriever.itself(str(small.files[question[0]]))[0] == {question[0]} and len(retriever) == 180


WORK = """
import sys
from dqe_cir.retriever import QdrantFolder, Retriever
retriever = Retriever.load("garments", device="cpu", store=QdrantFolder(sys.argv[2]))
retriever.index(sys.argv[1], progress=lambda done, total: print("stored", done, flush=True))
print("ended", len(retriever), flush=True)
"""


@embedded
def test_what_was_reported_as_stored_is_there_after_a_kill(tmp_path):
    small, folder, store = drawn_at_once("garments", "val", "smoke"), tmp_path / "pictures", tmp_path / "engine"
    folder.mkdir()
    for i in range(60): shutil.copy(small.files[small.gallery[i]], folder / f"{i:02}.png")
    work = subprocess.Popen([sys.executable, "-W", "ignore", "-c", WORK, str(folder), str(store)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    for line in work.stdout:
        if line == "stored 32\n": break
    work.kill()
    work.wait()
    retriever, encoded = Retriever.load("garments", device="cpu", store=QdrantFolder(store)), []
    kept = len(retriever)
    assert kept >= 32
    retriever.index(folder, progress=lambda done, total: encoded.append(total))
    assert len(retriever) == 60 and set(encoded) == ({60 - kept} if kept < 60 else set())
    exact = Retriever.load("garments", device="cpu")
    exact.index(folder)
    assert all(torch.equal(retriever.embedding_of(name), exact.embedding_of(name)) for name in exact.ids)


# ---- refusals

def one_line(act):
    with pytest.raises(ValueError) as caught: act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    for name in ("qdrant_edge", "qdrant_client"): monkeypatch.setitem(sys.modules, name, None)
    for act in (lambda: QdrantFolder(tmp_path / "engine"), lambda: QdrantServer("http://localhost:6333")):
        assert re.fullmatch(r"qdrant_\w+ is not installed: pip install dqe-cir\[qdrant\]", one_line(act))


def test_an_address_that_does_not_answer_is_named(played):
    assert "dqe_cir at http://unreachable:6333 does not answer" in one_line(lambda: QdrantServer("http://unreachable:6333"))
    assert "'my server' is no address" in one_line(lambda: QdrantServer("my server"))


def test_another_model_and_another_size_are_refused(place):
    stored = StoredPictures(place.opened(), "a model")
    gallery, queries = gallery_of(3, 2, 8, 0)
    stored.write([(named(i), gallery[i], "", None, []) for i in range(3)])
    again = place.opened()
    assert "another model (a model, and this is another): name another place" in one_line(lambda: StoredPictures(again, "another"))
    with pytest.raises(DataError, match="another model"): Retriever.load("garments", device="cpu", store=again)
    stored = StoredPictures(again, "a model")
    for shape in ((2, 9), (3, 8)): assert "holds 2 x 8 numbers a picture, and these are" in one_line(lambda: stored.write([("x", torch.ones(shape), "", None, [])]))
    assert "holds vectors of 8 numbers, not 5" in one_line(lambda: stored.best(queries[0, :5], 3))


@embedded
@pytest.mark.parametrize("vectors", [1, 8])
def test_every_way_of_the_search_times_finds_the_same_ten_pictures(vectors, tmp_path):
    "The record's own measurement, small: twenty queries of an index in memory, one in its file, and the engine opened again; then a thousand pictures more."
    shape = 1500, vectors, 16
    assert search_times.written(shape, tmp_path)["MB"] > 0
    found = [ask(shape, tmp_path)["answers"] for ask in (search_times.in_memory, search_times.in_its_file)]
    assert search_times.written_to_qdrant(shape, tmp_path)["MB"] > 0
    assert {*found, search_times.asked_of_qdrant(shape, tmp_path)["answers"]} == {found[0]}
    assert search_times.added(shape, tmp_path)["add 1,000 s"] > 0 and len(stored_index(tmp_path)[1]) == 2500


@embedded
def test_a_folder_in_use_or_damaged_is_refused(tmp_path):
    engine = QdrantFolder(tmp_path / "engine")
    StoredPictures(engine, "a model").write([("a", torch.ones(1, 4), "", None, [])])
    assert "is in use by another process" in one_line(lambda: QdrantFolder(tmp_path / "engine"))
    engine.close()
    (tmp_path / "engine" / "points" / "edge_config.json").write_text("{")
    assert "cannot be opened" in one_line(lambda: QdrantFolder(tmp_path / "engine"))
    (tmp_path / "engine" / "about.json").write_text("[]")
    shutil.rmtree(tmp_path / "engine" / "points")
    assert "about.json must hold an object" in one_line(lambda: StoredPictures(QdrantFolder(tmp_path / "engine"), "a model"))


def test_a_method_with_a_score_of_its_own_is_refused(played, monkeypatch):
    retriever = Retriever.load("garments", device="cpu")
    monkeypatch.setattr(type(retriever.method), "score", lambda self, query, target: query @ target[:, 0].T)
    assert "scores in a way of its own" in one_line(lambda: retriever.search_in(QdrantServer("http://localhost:6333")))


def test_what_a_collection_is_made_with_is_handed_on(played):
    StoredPictures(QdrantServer("http://localhost:6333", half=True, shard_number=6), "a model").write([("a", torch.ones(1, 4), "", None, [])])
    made = Played.collections["dqe_cir"]
    assert (made.shards, made.vectors.datatype, made.vectors.distance, made.config.metadata["model"]) == (6, "float16", "Dot", "a model")
