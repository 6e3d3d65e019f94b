"What a model was taught: the nearest lessons against a loop, the shipped files, and what is refused."
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dqe_cir.core import DataError, generator
from dqe_cir.retriever.lessons import Lessons, ROWS, TAUGHT, VECTORS, read_lessons, write_lessons
from dqe_cir.retriever import Retriever, SHIPPED
from dqe_cir.retriever.drawn import drawn_at_once
from dqe_cir.retriever.commands import main
from dqe_cir.trainer import smoke_run


@given(size=st.integers(1, 12), seed=st.integers(0, 99), count=st.integers(1, 15))
@settings(max_examples=25, deadline=None)
def test_the_nearest_are_those_of_a_loop(size, seed, count):
    queries, question = torch.randn(size, 5, generator=generator(seed)), torch.randn(5, generator=generator(seed, "question"))
    found = Lessons(queries, [(f"r{i}", "words", f"t{i}", ()) for i in range(size)]).nearest(question, count)
    cosine = {f"r{i}": torch.nn.functional.cosine_similarity(query, question, dim=0).item() for i, query in enumerate(queries)}
    assert [lesson.reference for lesson in found] == sorted(cosine, key=lambda name: -cosine[name])[:count]
    assert all(abs(lesson.likeness - cosine[lesson.reference]) < 1e-5 for lesson in found)


@pytest.fixture(scope="module")
def shipped(): return Retriever.load("garments", device="cpu")


def test_the_shipped_model_tells_what_it_was_taught(shipped):
    train, val = drawn_at_once("garments", "train"), drawn_at_once("garments", "val")
    assert len(shipped.lessons) == len(train.triplets)
    triplet = val.triplets[7]
    lesson = shipped.nearest_lessons(triplet.reference, "is red", count=2)[0]
    assert {lesson.reference, lesson.target, *lesson.negatives} <= set(train.gallery)
    assert lesson.negatives and lesson.target not in lesson.negatives
    assert shipped.taught_picture(lesson.target).size == shipped.taught_picture(lesson.negatives[0]).size


def test_a_training_query_asked_again_is_its_own_nearest(shipped):
    "Half precision and all: five training queries, each of another part of the file."
    train = drawn_at_once("garments", "train").triplets
    shipped.seen.clear()
    for t in train[::len(train) // 5 + 1]:
        words = next(text for reference, text, target, _ in shipped.lessons.taught if (reference, target) == (t.reference, t.target))
        lesson = shipped.nearest_lessons(shipped.taught_picture(t.reference), words)[0]
        assert lesson.likeness > 0.99 and lesson.text == words


def test_a_model_that_kept_nothing_has_no_lessons(tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(SHIPPED, folder)
    for name in (ROWS, VECTORS): (folder / name).unlink()
    bare = Retriever.load(folder, device="cpu")
    assert bare.lessons is None and bare.nearest_lessons(bare.ids[0], "is red") == []
    assert not (bare.save(tmp_path / "again") / ROWS).exists()


def test_what_was_taught_is_looked_for_once(tmp_path, monkeypatch):
    "Also when nothing is found: making lessons embeds every training query."
    looked = []
    monkeypatch.setattr("dqe_cir.retriever.explain.lessons_of_run", lambda *about: looked.append(about))
    shutil.copytree(SHIPPED, tmp_path / "bare", ignore=shutil.ignore_patterns(ROWS, VECTORS))
    bare = Retriever.load(tmp_path / "bare", device="cpu")
    assert looked == [] and bare.lessons is None and bare.lessons is None and len(looked) == 1
    monkeypatch.setattr("dqe_cir.retriever.explain.read_lessons", lambda folder: looked.append(folder))
    assert bare.lessons is None and len(looked) == 1
    assert Retriever(bare.method, bare.config).lessons is None and len(looked) == 1, "it was loaded from nowhere"


def test_saved_lessons_are_loaded_again(shipped, tmp_path):
    again = Retriever.load(shipped.save(tmp_path / "copy"), device="cpu")
    assert again.lessons.taught == shipped.lessons.taught
    torch.testing.assert_close(again.lessons.queries, shipped.lessons.queries, rtol=0, atol=1e-3)


def test_a_run_whose_training_data_are_gone_is_exported_without(tmp_path, capsys):
    "Said on the way, and no other data stand in for them."
    run = smoke_run(method="dqe_cir", warmup_epochs=1)
    told = json.loads((run / TAUGHT).read_text())
    told[0]["reference"] = "dress-train-of-another-machine"
    (run / TAUGHT).write_text(json.dumps(told))
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "the training data are not at hand" in capsys.readouterr().err and not (tmp_path / "out" / ROWS).exists()


@pytest.mark.parametrize("damage", ["vectors gone", "one row less", "a number too large", "not JSON", "other vectors"])
def test_damaged_lessons_are_named(tmp_path, damage):
    write_lessons(Lessons(torch.eye(3), [("a", "x", "b", ("c",)), ("d", "y", "e", ()), ("a", "z", "e", ("b", "c"))]), tmp_path)
    assert read_lessons(tmp_path).taught[2] == ("a", "z", "e", ("b", "c"))
    rows = json.loads((tmp_path / ROWS).read_text())
    if damage == "vectors gone": (tmp_path / VECTORS).unlink()
    elif damage == "one row less": (tmp_path / ROWS).write_text(json.dumps(rows | {"rows": rows["rows"][1:]}))
    elif damage == "a number too large": (tmp_path / ROWS).write_text(json.dumps(rows | {"rows": [[0, 99], *rows["rows"][1:]]}))
    elif damage == "not JSON": (tmp_path / ROWS).write_text("{")
    else: save_file({"queries": torch.eye(2)}, tmp_path / VECTORS)
    with pytest.raises(DataError, match="lessons.json and lessons.safetensors do not fit together.*export the run again"): read_lessons(tmp_path)
