"Copies of the hub, on local repositories of their form, through the library `datasets` itself: what arrives is what `load_dataset` reads."
import io

import pytest
import torch
from PIL import Image

from dqe_cir.data import load_dataset
from dqe_cir.data.verify import main
from dqe_cir.files import DataError

datasets = pytest.importorskip("datasets", reason="pip install datasets")


def file_of(path):
    return {"bytes": path.read_bytes(), "path": path.name}


def write_repository(folder, subsets):
    "A repository as the hub has it: a Parquet file for each subset and split, and a card that says which is which. `subsets`: name to (split, features, columns)."
    head = ["---", "configs:"]
    for name, parts in subsets.items():
        head += [f"- config_name: {name}", "  data_files:"]
        for split, features, columns in parts:
            path = f"{name}-{split}-00000-of-00001.parquet"
            table = datasets.table.InMemoryTable.from_pydict(datasets.Features(features).encode_batch(columns), schema=datasets.Features(features).arrow_schema)
            folder.mkdir(parents=True, exist_ok=True)
            datasets.Dataset(table, info=datasets.DatasetInfo(features=datasets.Features(features)), fingerprint=path).to_parquet(str(folder / path))
            head += [f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*head, "---", ""]))
    return str(folder)


STRING, PICTURE = datasets.Value("string"), datasets.Image()
ASKED = {"id": STRING, "modality": STRING, "text": STRING, "image": PICTURE}


@pytest.fixture(scope="module")
def drawn(home):
    "The garments in FashionIQ's and in CIRR's layout, as they stand in for them."
    return {name: load_dataset(name, split="val", size="smoke") for name in ("fashioniq", "cirr")}


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pictures_copy(folder, data, split="val"):
    "As `royokong/fashioniq_val_imgs`: a row for each picture of a category; a picture of two categories stands there twice."
    rows = [(name, category) for category, names in data.galleries.items() for name in names]
    columns = {"id": [name for name, _ in rows], "img": [file_of(data.files[name]) for name, _ in rows], "category": [category for _, category in rows], "split": [split] * len(rows)}
    return write_repository(folder, {"default": [(split, {"id": STRING, "img": PICTURE, "category": STRING, "split": STRING}, columns)]})


@pytest.mark.parametrize("name, annotations", [("fashioniq", ("captions", "image_splits")), ("cirr", ("captions", "image_splits"))])
def test_pictures_come_below_the_annotations_bit_by_bit(drawn, tmp_path, capsys, name, annotations):
    data, root = drawn[name], tmp_path / name
    for folder in annotations:
        (root / folder).mkdir(parents=True)
        for path in (data.root / folder).iterdir(): (root / folder / path.name).write_bytes(path.read_bytes())
    copy = pictures_copy(tmp_path / "copy", data)
    with pytest.raises(DataError, match="pictures of .* are missing"): load_dataset(name, root, "val")
    assert main(["bring", "--dataset", name, "--root", str(root), "--copy", copy]) == 0
    assert f"{len(data.gallery):,} written" in capsys.readouterr().out
    found = load_dataset(name, root, "val")
    assert found.triplets == data.triplets and found.galleries == data.galleries and found.data == "real"
    for image in data.gallery: assert found.files[image].read_bytes() == data.files[image].read_bytes()
    assert main(["bring", "--dataset", name, "--root", str(root), "--copy", copy]) == 0
    assert "already there" in (said := capsys.readouterr().out) and "written" not in said and said.splitlines()[-1].startswith("python -m dqe_cir.data verify")


def mbeir_copy(folder, data):
    "As `mteb/mbeir_fashioniq_task7`: queries that bring their picture along, one corpus, and which pictures are right."
    number = {name: f"7:{i}" for i, name in enumerate(data.gallery)}
    asked = list(enumerate(data.triplets))
    queries = {"id": [f"7:{90_000 + i}" for i, _ in asked], "modality": ["image,text"] * len(asked), "text": [" and ".join(t.captions) for _, t in asked],
               "image": [file_of(data.files[t.reference]) for _, t in asked]}
    corpus = {"id": list(number.values()), "modality": ["image"] * len(number), "text": [None] * len(number), "image": [file_of(data.files[name]) for name in number]}
    right = {"query-id": queries["id"], "Q0": ["0"] * len(asked), "corpus-id": [number[t.target] for _, t in asked], "score": [1] * len(asked)}
    judged = {"query-id": STRING, "Q0": STRING, "corpus-id": STRING, "score": datasets.Value("int8")}
    return write_repository(folder, {"query": [("test", ASKED, queries)], "corpus": [("corpus", ASKED, corpus)], "qrels": [("test", judged, right)]})


def test_mbeir_becomes_a_folder_with_the_same_figures(drawn, tmp_path, capsys):
    "Its recall is that of the data set it was made from, searched as one corpus with the reference left in."
    import dataclasses
    from dqe_cir.encoder import cache_tokens
    from dqe_cir.evaluator import evaluate
    from dqe_cir.evaluator.protocols import protocol_for
    from dqe_cir.retriever import Retriever
    data = drawn["fashioniq"]
    assert main(["bring", "--dataset", "custom", "--root", str(tmp_path / "mbeir"), "--copy", mbeir_copy(tmp_path / "copy", data)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"python -m dqe_cir.data verify --dataset custom --root {tmp_path / 'mbeir'} --split val"
    found = load_dataset("custom", tmp_path / "mbeir", "val")
    assert (found.title, found.data, len(found.triplets), len(found.gallery)) == ("custom: mbeir", "custom", len(data.triplets), len(data.gallery))
    method = Retriever.zero_shot("mini", device="cpu").method
    one = dataclasses.replace(data, galleries={"all": data.gallery}, triplets=[dataclasses.replace(t, category=None, captions=(" and ".join(t.captions),)) for t in data.triplets])
    ours = evaluate(method, one, cache_tokens(method.encoder, one, progress=False))
    theirs = evaluate(method, found, cache_tokens(method.encoder, found, progress=False), protocol_for("custom", exclude_reference=False))
    assert torch.equal(ours.measures["rank"], theirs.measures["rank"]) and len(set(ours.measures["rank"].tolist())) > 10


def cut(folder):
    path = next(folder.glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:200])


WRONG = {
    "nothing there": (lambda folder, data: None, "cannot be read"),
    "a cut file": (lambda folder, data: (pictures_copy(folder, data), cut(folder)), "cannot be read"),
    "no id": (lambda folder, data: write_repository(folder, {"default": [("val", {"name": STRING, "img": PICTURE}, {"name": ["a"], "img": [file_of(data.files[data.gallery[0]])]})]}), "not one of pictures beside id"),
    "a name that leaves the root": (lambda folder, data: write_repository(folder, {"default": [("val", {"id": STRING, "img": PICTURE}, {"id": ["../a"], "img": [file_of(data.files[data.gallery[0]])]})]}), "row 1 names '../a'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_copy_is_one_line_and_leaves_nothing(drawn, tmp_path, capsys, name):
    make, said = WRONG[name]
    make(tmp_path / "copy", drawn["fashioniq"])
    assert main(["bring", "--dataset", "fashioniq", "--root", str(tmp_path / "fashioniq"), "--copy", str(tmp_path / "copy")]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in told and not list((tmp_path / "fashioniq").rglob("*.*"))


def test_pictures_for_a_table_and_a_table_for_pictures_are_refused(drawn, tmp_path, capsys):
    pictures, three = pictures_copy(tmp_path / "pictures", drawn["cirr"]), mbeir_copy(tmp_path / "three", drawn["cirr"])
    assert main(["bring", "--dataset", "custom", "--root", str(tmp_path / "a"), "--copy", pictures]) == 1
    assert "none of query" in capsys.readouterr().err
    assert main(["bring", "--dataset", "fashioniq", "--root", str(tmp_path / "b"), "--copy", three]) == 1
    assert "not one of pictures beside id" in capsys.readouterr().err


def test_what_is_no_picture_is_left_out_and_counted(drawn, tmp_path, capsys):
    data = drawn["fashioniq"]
    cells = [file_of(data.files[data.gallery[0]]), {"bytes": b"<html>gone</html>", "path": "x.jpg"}]
    copy = write_repository(tmp_path / "copy", {"default": [("val", {"id": STRING, "img": PICTURE}, {"id": ["a", "b"], "img": cells})]})
    assert main(["bring", "--dataset", "fashioniq", "--root", str(tmp_path / "root"), "--copy", copy]) == 0
    assert "1 written, 1 no picture" in capsys.readouterr().out


def test_a_jpeg_keeps_its_bytes_and_gets_its_ending(tmp_path):
    Image.new("RGB", (20, 20), "red").save(packed := io.BytesIO(), "JPEG", quality=70)
    copy = write_repository(tmp_path / "copy", {"default": [("test", {"id": STRING, "img": PICTURE}, {"id": ["test1-0-0-img0"], "img": [{"bytes": packed.getvalue(), "path": "test1-0-0-img0.png"}]})]})
    assert main(["bring", "--dataset", "cirr", "--root", str(tmp_path / "cirr"), "--copy", copy]) == 0
    assert (tmp_path / "cirr/img_raw/test1/test1-0-0-img0.jpg").read_bytes() == packed.getvalue()
