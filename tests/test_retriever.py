"The retriever and the page's session: files of every kind, a gate that is the formula, an index that is the pictures, and a way back."
import hashlib
import io
import json
import math
import os
import shutil
import sys
import types

import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

from dqe_cir.core import DataError
from dqe_cir.data import Triplet
from dqe_cir.encoder import cache_tokens, load_encoder
from dqe_cir.evaluator.scoring import encode_gallery, encode_queries
from dqe_cir.methods.info_nce import InfoNCE
from dqe_cir.retriever import Retriever
from dqe_cir.retriever.drawn import drawn_at_once
from dqe_cir.retriever.index import compared, digest_of, picture_files, stored_index
from dqe_cir.retriever.page import MOST, no_maps
from dqe_cir.retriever.search import ReadQuery, gate_by_hand, gate_shares, gated
from dqe_cir.retriever import SHIPPED, SearchPage, Session
from dqe_cir.trainer import build_method, smoke_run, train_config
from dqe_cir.trainer.runs import trained_state
from dqe_cir.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def gallery(): return drawn_at_once("garments", "val", "smoke")


@pytest.fixture
def folder(tmp_path, gallery):
    "Six garments, one of them in a subfolder with signs in its name."
    place = tmp_path / "pictures"
    (place / "ünter ☂").mkdir(parents=True)
    for number, name in enumerate(gallery.gallery[:6]):
        shutil.copy(gallery.files[name], place / ("ünter ☂" if number == 5 else ".") / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def retriever(): return Retriever.load("garments")


def by_id(retriever): return dict(zip(retriever.ids, retriever.embeddings))


def test_an_updated_index_is_a_fresh_one(folder, tmp_path, retriever):
    "Whatever happened to the folder in between."
    retriever.index(folder, tmp_path / "store")
    (folder / "0.png").unlink(); (folder / "1.png").rename(folder / "moved.png"); shutil.copy(folder / "2.png", folder / "3.png")
    report = retriever.index(folder, tmp_path / "store")
    assert (report.removed, report.renamed, report.changed) == (["0.png"], {"moved.png": "1.png"}, ["3.png"])
    updated = by_id(retriever)
    retriever.index(folder)
    assert list(updated) == ["2.png", "3.png", "4.png", "moved.png", "ünter ☂/5.png"]
    assert_close(updated, by_id(retriever), atol=1e-3, rtol=0)
    assert_close(updated["2.png"], updated["3.png"], atol=0, rtol=0)


def test_odd_files_are_listed_or_read(folder, retriever):
    Image.new("RGBA", (90, 40), (255, 0, 0, 90)).save(folder / "alpha.png")
    Image.new("I;16", (40, 40), 40000).save(folder / "deep.png")
    Image.new("CMYK", (50, 40)).save(folder / "print.jpg")
    Image.new("RGB", (4000, 9)).save(folder / "strip.png")
    (folder / "zero.jpg").touch(); (folder / "broken.webp").write_bytes(b"RIFF\x00\x00\x00\x00WEBPVP8 ")
    (folder / "gone.png").symlink_to(folder / "nowhere.png"); (folder / "movie.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42")
    os.mkfifo(folder / "pipe.png")
    assert "movie.mp4" not in picture_files(folder)[0]
    retriever.index(folder)
    assert {"alpha.png", "deep.png", "print.jpg", "strip.png"} <= set(retriever.ids)
    assert set(retriever.unreadable) == {"zero.jpg", "broken.webp", "gone.png", "pipe.png"}
    assert all(retriever.unreadable.values())


@pytest.fixture(scope="module")
def mixing(gallery):
    "An untrained model with sub-queries, as the paper has them."
    config = train_config({"dataset": "garments", "size": "smoke", "method": "dqe_cir", "recipe": "paper"})
    made = Retriever(build_method(config), config)
    made.index(gallery)
    return made


def test_a_gate_by_hand_is_the_formula(gallery, mixing):
    composed = mixing.ask(gallery.gallery[0], "is red and has long sleeves")
    weights = torch.tensor([0.2, 0.5, 0.3])
    mixed = 0.2 * composed.base[0] + 0.5 * composed.parts[0, 0] + 0.3 * composed.parts[0, 1]
    assert_close(gated(composed, (2, 5, 3))[0], mixed / mixed.norm())
    assert_close(gate_shares(composed, (2, 5, 3)), weights)
    assert_close(gated(composed, "off"), composed.base)
    for bad in ((0, 0, 0), (-1, 1, 1), (1, 1), (float("nan"), 1, 1), "none"):
        with pytest.raises(ValueError): gated(composed, bad)


# ---- readings

WORDS = Vocabulary({"yellow/grey/red": (("yellow",), ("grey", "gray"), ("red",), ("blue",)), "plain/striped": (("plain",), ("striped", "stripes"))})


@pytest.fixture(scope="module")
def reading(gallery):
    "An untrained model that reads two attributes as if they had been mined; one root is negative, as training may leave it."
    config = train_config({"dataset": "garments", "size": "smoke", "method": "dqe_cir", "readings": "mined"})
    method = build_method(config)
    method.read_with(WORDS)
    with torch.no_grad(): method.readings.root.copy_(torch.tensor([0.6, -0.3]))
    made = Retriever(method, config)
    made.index(gallery)
    return made


@pytest.mark.parametrize("gate", ["learned", "off", (1, 1), (0, 2.5), (3, 0), (0, 0)])
def test_a_score_is_the_plain_one_and_the_agreements(gallery, reading, gate):
    "q x + sum_a f_a lambda_a p_a(q) p_a(x), computed here from the readings themselves, part by part."
    factors = {"learned": (1, 1), "off": (0, 0)}.get(gate, gate)
    name, text = gallery.gallery[0], "is red and striped"
    asked = reading.ask(name, text)
    for result in reading.search(name, text, 5, gate):
        image = reading.embeddings[reading.ids.index(result.id), 0, :-6]
        parts = [asked.base[0] @ image]
        for factor, weight, said, shown in zip(factors, (0.36, 0.09), asked.readings[0].split((4, 2)), reading.method.readings(image).split((4, 2))):
            parts.append(factor * weight * (said @ shown))
        why = reading.explain(name, text, result.id, gate)
        assert_close(torch.tensor(why.contributions), torch.stack(parts).detach(), rtol=2e-3, atol=1e-4)
        assert abs(sum(why.contributions) - result.score) < 1e-5
        assert_close(torch.tensor(why.used), torch.tensor([1, 0.36 * factors[0], 0.09 * factors[1]]))


def test_a_learned_query_is_the_methods_own(gallery, reading):
    "To the last bit, so that the search ranks as the evaluation does; and the index is of the same length."
    tokens = reading.tokens_of(gallery.gallery[3])[1]
    with torch.no_grad(): own = reading.method.encode_query(tokens, ["is red"])
    assert torch.equal(reading.ask(gallery.gallery[3], "is red").query, own)
    assert reading.embeddings.shape[-1] == own.shape[-1]
    asked = reading.ask(gallery.gallery[3], "is red")
    assert isinstance(asked, ReadQuery) and gate_by_hand(asked) == [1, 1] and gate_by_hand(asked, "off") == [0, 0]
    for bad in ((-1, 1), (1, 1, 1), (float("nan"), 1), (float("inf"), 1), "none"):
        with pytest.raises(ValueError): gated(asked, bad)


def test_an_explanation_names_values(gallery, reading, monkeypatch):
    "Names of mined attributes, a reading per side, and which the text names; an attribute of weight 0 is read too."
    monkeypatch.setattr(reading.method.readings.root, "data", torch.tensor([0.6, 0.0]))
    why = reading.explain(gallery.gallery[0], "is gray", gallery.gallery[1])
    assert why.parts == ("plain query", "yellow / grey / red …", "plain / striped") and why.maps is None
    assert why.spoken == {"yellow / grey / red …": True, "plain / striped": False}
    colour, pattern = why.readings
    assert colour.values == ("yellow", "grey", "red", "blue") and pattern.weight == 0 == why.contributions[2]
    for side in ("reference", "query", "picture"):
        assert sum(getattr(pattern, side)) == pytest.approx(1) and pattern.said_of(side)[0] in pattern.values


def test_a_model_with_readings_is_saved_and_loaded(gallery, reading, mixing, tmp_path):
    "With its vocabulary and its index of longer vectors; the loaded one answers alike. Another model in its place leaves nothing of it."
    folder = reading.save(tmp_path / "model")
    again = Retriever.load(folder, device="cpu")
    assert again.method.vocabulary == WORDS and len(again) == len(reading) and again.weighed == reading.weighed
    found, same = (one.search(gallery.gallery[0], "is striped", 5, (2, 0.5)) for one in (reading, again))
    assert [(result.id, round(result.score, 5)) for result in found] == [(result.id, round(result.score, 5)) for result in same]
    mixing.save(folder)
    assert not (folder / "vocabulary.json").exists() and not Retriever.load(folder, device="cpu").reads


def do(page, action, *values, text="is red"):
    "What a browser would send to the search page; the page as plain values after it."
    page.heard(page.widget, {"do": action, "with": list(values), "text": text, "number": 1}, [])
    return page.widget.state


def test_the_page_weighs_attributes_and_says_what_was_read(reading):
    page = SearchPage(reading, size="smoke")
    page.open("garments")
    said = do(page, "search")
    assert said["parts"] == ["yellow / grey / red …", "plain / striped"] and said["most"] == MOST and said["weights"] == [1, 1]
    before = said["results"]
    assert do(page, "mode", "by hand")["results"] == before
    said = do(page, "weights", [0, 1])
    assert page.session.step.gate == (0, 1) and said["results"] != before
    why = do(page, "why", said["results"][0]["key"])["why"]
    assert why["html"].count("Read from ") == 3 and "The text speaks of yellow / grey / red …" in why["html"]
    assert why["maps"] is None and "dqe-share" in why["html"]


def test_maps_that_are_alike_are_not_shown(gallery, mixing):
    "An untrained model's sub-queries look at the same places: a sentence stands where two equal pictures would."
    page = SearchPage(mixing, size="smoke")
    page.open("garments")
    first = do(page, "search")["results"][0]
    told = do(page, "why", first["key"])["why"]
    why = mixing.explain(page.session.reference, "is red", first["name"])
    assert (no_maps(why) and no_maps(why) in told["html"] and told["maps"] is None) and why.readings == []


@pytest.mark.parametrize("method, options", [("covr", {}), ("bi_blip4cir", {}), ("dqe_cir", {"attribute_mode": "off"})])
def test_methods_without_parts_have_none(method, options):
    "Whatever their own functions are called, and with a gate that is switched off."
    config = train_config({"dataset": "garments", "method": method, **options})
    assert Retriever(build_method(config), config).parts == ()


def test_a_method_without_parts_searches_too(gallery):
    plain = Retriever(InfoNCE(load_encoder("mini", device="cpu")), type("Config", (), {"method": "info_nce", "dataset": "garments"}))
    plain.index(gallery)
    assert len(plain.search(gallery.gallery[0], "is red", 5)) == 5 and plain.parts == ()
    with pytest.raises(ValueError, match="no attribute gate"): plain.search(gallery.gallery[0], "is red", gate="off")
    with pytest.raises(ValueError, match="no attribute parts"): plain.explain(gallery.gallery[0], "is red", gallery.gallery[1])
    page = SearchPage(plain, size="smoke")
    page.open("garments")
    said = do(page, "search")
    assert len(said["results"]) == 10 and said["parts"] == said["weights"] == []
    assert "has no parts to explain" in do(page, "why", said["results"][0]["key"])["why"]["html"]


def test_drawn_on_demand_is_the_benchmark_bit_for_bit(tmp_path, monkeypatch, gallery):
    monkeypatch.setenv("DQE_CIR_DATA", str(tmp_path))
    lazy = drawn_at_once("garments", "val", "smoke")
    assert [t for t in lazy.triplets] == [t for t in gallery.triplets]
    assert lazy.files[lazy.gallery[7]].read_bytes() == gallery.files[gallery.gallery[7]].read_bytes()


def test_undo_goes_back_step_by_step(gallery, retriever):
    retriever.index(gallery)
    session, asked = Session(retriever, gallery), []
    for text in ("is red", "is striped", "has long sleeves"):
        asked.append(session.reference)
        session.choose(session.search(text).results[0].id)
    for reference in reversed(asked):
        for _ in ("the choice of a result", "the question"): session.undo()
        assert session.reference == reference
    assert session.undo() is None and not session.steps


def test_the_page_tells_errors_in_words(folder, tmp_path, retriever):
    page = SearchPage(retriever, size="smoke")
    page.open("garments")
    said = do(page, "folder", str(tmp_path / "nowhere"))
    assert "is not a folder" in said["status"] and said["bad"] and said["gallery"] == "garments"
    (tmp_path / "bare").mkdir()
    assert "no readable picture" in do(page, "folder", str(tmp_path / "bare"))["status"]
    assert len(do(page, "search")["results"]) == 10, "the old gallery is as usable as before"
    do(page, "folder", str(folder))
    assert page.session.dataset is None and len(page.retriever) == 6


def test_listings_are_compared_by_content():
    report = compared({"a": "1", "b": "1"}, {"c": "1", "d": "1"})
    assert len(report.renamed) == 1 and len(report.new) == 1 and len(report.removed) == 1


def test_a_missing_folder_is_named():
    with pytest.raises(DataError, match="nowhere is not a folder"): picture_files("nowhere")


# ---- the encoder's own transform

@pytest.fixture(scope="module", params=["cosmo", "mgur", "clip4cir"])
def native(request, gallery):
    "A system on a small random version of its own backbone, trained for an epoch; its retriever; the cached tokens of the gallery."
    run = smoke_run(method=request.param, form="native", epochs=1)
    retriever = Retriever.load(run, device="cpu")
    shutil.rmtree(run)
    return retriever, cache_tokens(retriever.method.encoder, gallery, progress=False)


def test_native_pictures_are_embedded_as_at_evaluation(native, gallery):
    "A gallery through the encoder's own transform; the index is that up to half precision."
    retriever, tokens = native
    names = gallery.gallery
    with torch.no_grad():
        pictures = [Image.open(gallery.files[name]) for name in names]
        own = retriever.method.encode_target(retriever.image_tokens(pictures))
    evaluated = encode_gallery(retriever.method, tokens, names)
    assert_close(own, evaluated, rtol=1e-5, atol=1e-6)
    retriever.index(gallery)
    assert_close(retriever.embeddings, evaluated, rtol=1e-3, atol=1e-5)
    assert torch.nn.functional.cosine_similarity(retriever.embeddings, evaluated, dim=-1).min() > 0.99999


def test_native_references_are_read_as_at_evaluation(native, gallery, tmp_path):
    "An id, a file and a picture have the tokens of the cache, and ask the query of the evaluation."
    retriever, tokens = native
    retriever.index(gallery)
    name = gallery.gallery[11]
    shutil.copy(gallery.files[name], tmp_path / "own.png")
    expected = encode_queries(retriever.method, tokens, [Triplet(name, None, ("is red",))])
    for reference in (name, tmp_path / "own.png", str(tmp_path / "own.png"), Image.open(gallery.files[name])):
        assert_close(retriever.tokens_of(reference)[1], tokens[[name]], rtol=1e-5, atol=1e-6)
        assert_close(retriever.ask(reference, "is red").query, expected, rtol=1e-5, atol=1e-6)
        assert len(retriever.search(reference, "is red", k=3)) == 3


def test_a_wide_picture_goes_through_the_encoders_transform(native, tmp_path):
    "Where padding and squeezing differ most."
    retriever, _ = native
    picture = Image.radial_gradient("L").resize((160, 60)).convert("RGB")
    picture.save(tmp_path / "wide.png")
    tokens = cache_tokens(retriever.method.encoder, {"wide": tmp_path / "wide.png"}, progress=False)
    assert_close(retriever.tokens_of(picture)[1], tokens[["wide"]], rtol=1e-5, atol=1e-6)


def test_indexes_that_padded_a_squeezed_picture_no_longer_fit(native):
    "Version 0.1 wrote indexes of CoSMo and MGUR under a key that did not know of its mistake; every other key stays."
    retriever, _ = native
    digest = hashlib.blake2b(retriever.method.encoder.tower_fingerprint().encode(), digest_size=8)
    for name, value in sorted(trained_state(retriever.method).items()):
        digest.update(name.encode() + (value.view(torch.uint8).numpy().tobytes() if value.dim() else b""))
    padded = retriever.method.encoder.transform_name.startswith("target_pad")
    assert (retriever.model_key() == digest.hexdigest()) == padded


def test_the_shipped_index_fits_and_is_what_would_be_made():
    "Of the model that ships nothing has moved: its key, and embeddings made anew."
    shipped = Retriever.load("garments", device="cpu")
    assert len(shipped) == 2100 and shipped.read_index(SHIPPED)
    names = shipped.ids[::150]
    kept = torch.stack([shipped.embeddings[shipped.ids.index(name)] for name in names])
    assert_close(shipped.encode_pictures([Image.open(shipped.files[name]) for name in names]), kept, rtol=0, atol=2e-3)


# ---- nothing lost, nothing served that is not what it says

@pytest.fixture
def bare(retriever): return Retriever(retriever.method, retriever.config)


def test_a_killed_index_goes_on(folder, tmp_path, bare, monkeypatch):
    "Killed after its first pictures: no index was written, and their embeddings are there."
    def killed(*_): raise SystemExit
    monkeypatch.setattr(Retriever, "write_index", killed)
    encoded = []
    with pytest.raises(SystemExit): bare.index(folder, tmp_path / "store")
    monkeypatch.undo()
    again = Retriever(bare.method, bare.config)
    assert not again.read_index(tmp_path / "store")
    again.index(folder, tmp_path / "store", lambda done, total: encoded.append(total))
    assert encoded == [] and torch.equal(again.embeddings, bare.embeddings) and again.ids == bare.ids
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["index.json", "index.safetensors"]


def test_a_store_that_needs_no_writing_is_only_read(folder, tmp_path, bare):
    bare.index(folder, tmp_path / "store")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    Retriever(bare.method, bare.config).index(folder, tmp_path / "store")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()} == written


def test_one_bit_or_an_exchanged_id_is_noticed(folder, tmp_path, bare):
    store = tmp_path / "store"
    bare.index(folder, store)
    whole = (store / "index.safetensors").read_bytes()
    for place in (-1, -len(whole) // 4):
        (store / "index.safetensors").write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place:][1:])
        with pytest.raises(DataError, match=r"index\.json and index\.safetensors do not fit together"): stored_index(store)
    (store / "index.safetensors").write_bytes(whole)
    about = json.loads((store / "index.json").read_text())
    for change in ({"ids": about["ids"][::-1]}, {"files": about["files"][::-1]}, {"files": ["/etc/passwd", *about["files"][1:]]}, {"root": "/"}):
        (store / "index.json").write_text(json.dumps(about | change))
        assert not bare.read_index(store)
    fresh, encoded = Retriever(bare.method, bare.config), []
    fresh.index(folder, store, lambda done, total: encoded.append(total))
    assert encoded == [] and torch.equal(fresh.embeddings, bare.embeddings), "the embeddings were whole"


def test_an_index_of_the_last_version_is_read(folder, tmp_path, bare):
    "Without hashes: its form is looked at, and a file outside its folder is not served."
    bare.index(folder, tmp_path)
    about = json.loads((tmp_path / "index.json").read_text())
    del about["vectors"]
    (tmp_path / "index.json").write_text(json.dumps(about))
    save_file({"embeddings": bare.embeddings.half()}, tmp_path / "index.safetensors", {"keys": digest_of(bare.keys)})
    again = Retriever(bare.method, bare.config)
    assert again.read_index(tmp_path) and again.ids == bare.ids
    for odd in ({"files": ["../../etc/passwd", *about["files"][1:]]}, {"ids": [about["ids"][0]] * 6}, {"ids": about["ids"][:-1]}):
        (tmp_path / "index.json").write_text(json.dumps(about | odd))
        assert not again.read_index(tmp_path)


def test_an_unplugged_disk_takes_no_index_with_it(folder, tmp_path, bare):
    bare.index(folder, tmp_path / "store")
    shutil.rmtree(folder)
    folder.mkdir()
    for _ in range(2):
        with pytest.raises(DataError, match="holds no readable picture, and its index knows 6"): bare.index(folder, tmp_path / "store")
    assert Retriever(bare.method, bare.config).read_index(tmp_path / "store") and len(bare) == 6


def test_a_reference_is_left_out_however_it_is_spelled(folder, tmp_path, bare, monkeypatch):
    bare.index(folder)
    monkeypatch.chdir(folder)
    (tmp_path / "link").symlink_to(folder)
    shutil.copy(folder / "2.png", tmp_path / "mine.png")
    for reference in ("2.png", folder / "2.png", str(folder / "2.png"), "./2.png", tmp_path / "link" / "2.png", tmp_path / "mine.png", Image.open("2.png")):
        assert {result.id for result in bare.search(reference, "is red")} == set(bare.ids) - {"2.png"}
    session = Session(bare)
    session.upload("another name.png", (tmp_path / "mine.png").read_bytes())
    assert "2.png" not in {result.id for result in session.search("is red").results}


def test_an_upload_of_a_drawn_picture_is_not_its_own_answer(gallery, retriever):
    "Whose keys are names: here the bytes of what was found are looked at."
    retriever.index(gallery)
    session, name = Session(retriever, gallery, k=179), gallery.gallery[5]
    session.upload("mine.png", gallery.files[name].read_bytes())
    found = [result.id for result in session.search("is red").results]
    assert len(found) == 179 and name not in found


def test_what_a_session_keeps_of_uploads_is_bounded(bare, folder):
    bare.index(folder)
    session, packed = Session(bare), io.BytesIO()
    Image.effect_noise((2600, 2000), 30).save(packed, "JPEG")
    for i in range(40): session.upload(f"{i % 5}.jpg", packed.getvalue() + bytes([i]))
    kept = sum(math.prod(picture.size) for picture in session.uploads.values())
    assert len(session.uploads) == 32 and kept <= 32 * 2**21 and len(session.shown) == 40, "each of its own name"


def test_two_cannot_write_into_one_store(folder, tmp_path, bare):
    (tmp_path / "store").mkdir()
    with FileLock(tmp_path / "store" / ".lock"), pytest.raises(DataError, match="is being written to by"): bare.index(folder, tmp_path / "store")


def test_a_reader_of_heic_is_used_where_it_is_installed(folder, bare, monkeypatch):
    "Stood in for by one that reads every such file as a red square."
    (folder / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    bare.index(folder)
    assert "pip install pillow-heif" in bare.unreadable["IMG_0001.HEIC"]

    def register():
        monkeypatch.setitem(Image.OPEN, "HEIF", (lambda file, name: Image.new("RGB", (40, 40), "red"), lambda start: start[4:8] == b"ftyp"))
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    bare.index(folder)
    assert "IMG_0001.HEIC" in bare.ids
