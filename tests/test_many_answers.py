"i-CIR and PinPoint on made-up folders of their form: every figure against its definition in loops, and what is wrong in one line."

import random

import pytest
import torch
from PIL import Image

from dqe_cir.data import load_dataset
from dqe_cir.data.verify import main as verify
from dqe_cir.encoder import cache_tokens
from dqe_cir.evaluator import evaluate
from dqe_cir.files import DataError, read_json
from dqe_cir.retriever import Retriever
from helpers import papermill

COLOURS = ("red", "navy", "gold", "teal", "plum", "olive", "white", "black")


@pytest.fixture
def icir(tmp_path):
    "Two objects with galleries of eight; the mug has two right answers for one text and three for the other."
    root, texts = tmp_path / "icir", {"mug": ["red", "red", "blue", "blue", "blue", "", "none", "none"], "plate": ["red"] * 4 + ["blue"] * 4}
    database, queries = [], []
    for thing, said in texts.items():
        for folder in ("database", "query"): (root / folder / thing).mkdir(parents=True)
        for i, (text, colour) in enumerate(zip(said, COLOURS)):
            Image.new("RGB", (32 + 4 * i, 40), colour).save(root / "database" / thing / f"{i}.jpg")
            database.append(f"icir/database/{thing}/{i}.jpg,{text},{thing}")
        for i, text in enumerate(("red", "blue")):
            Image.new("RGB", (40, 32), COLOURS[i + 2]).save(root / "query" / thing / f"{i}.jpg")
            queries.append(f"icir/query/{thing}/{i}.jpg,{text},{thing}")
    (root / "database_files.csv").write_text("\n".join(database) + "\n")
    (root / "query_files.csv").write_text("\n".join(queries) + "\n")
    return root


def scores_of(method, data, tokens):
    "Query by query: the names of its gallery, best first, by the method's score of that query alone."
    ranked = []
    for triplet in data.triplets:
        gallery = data.galleries[triplet.category or "all"]
        with torch.no_grad():
            query = method.encode_query(tokens[[triplet.reference]], [method.query_text(triplet)])
            scores = method.score(query, method.encode_target(tokens[gallery]))[0]
        ranked.append([gallery[i] for i in scores.argsort(descending=True, stable=True)])
    return ranked


def precision_of(ranking, right, k=None):
    "Average precision of the first k in a loop; without k of the whole ranking."
    hits = total = 0
    for place, name in enumerate(ranking[:k], 1):
        if name in right:
            hits += 1
            total += hits / place
    return total / (min(len(right), k) if k else len(right))


@pytest.fixture(scope="module")
def method(): return Retriever.zero_shot("mini", device="cpu").method


def test_icir_is_measured_by_its_definition(icir, method):
    data = load_dataset("icir", icir, "val")
    tokens = cache_tokens(method.encoder, data, progress=False)
    found, ranked = evaluate(method, data, tokens).metrics, scores_of(method, data, tokens)
    each = [precision_of(ranking, t.positives) for ranking, t in zip(ranked, data.triplets)]
    assert found["mAP"] == pytest.approx(100 * sum(each) / 4, abs=1e-3)
    assert found["macro mAP"] == pytest.approx(100 * (sum(each[:2]) / 2 + sum(each[2:]) / 2) / 2, abs=1e-3)
    assert found["R@1"] == 25 * sum(ranking[0] in t.positives for ranking, t in zip(ranked, data.triplets))
    assert all(t.reference not in data.gallery for t in data.triplets) and len(tokens) == len(data.used) == 20


def test_icir_is_verified_with_its_query_pictures(icir, capsys):
    assert verify(["verify", "--dataset", "icir", "--root", str(icir)]) == 0
    assert "20 images checked: 0 missing" in capsys.readouterr().out
    (icir / "query" / "mug" / "0.jpg").unlink()
    assert verify(["verify", "--dataset", "icir", "--root", str(icir)]) == 1
    with pytest.raises(DataError, match="1 of 20 pictures of icir val are missing"): load_dataset("icir", icir, "val")


@pytest.mark.parametrize("listing, line, said", [
    ("query_files.csv", "icir/query/mug/0.jpg,red", "row 5 must hold a picture, a text and an object"),
    ("query_files.csv", "icir/query/mug/0.jpg,,mug", "row 5 has no text"),
    ("query_files.csv", "icir/query/mug/0.jpg,green,mug", "no picture of 'mug' shows 'green'"),
    ("query_files.csv", "../0.jpg,red,mug", "row 5"),
    ("database_files.csv", 'icir/database/mug/0.jpg,"red,mug', "row 17"),
])
def test_a_wrong_row_of_icir_is_one_line(icir, listing, line, said):
    with (icir / listing).open("a") as file: file.write(line + "\n")
    with pytest.raises(DataError, match=said) as told: load_dataset("icir", icir, "val")
    assert "\n" not in str(told.value) and listing in str(told.value)


@pytest.mark.parametrize("seed", range(4))
def test_any_list_of_icir_is_read_or_refused_in_one_line(icir, seed):
    "Bytes cut, doubled, swapped and put in at random: a data set or a sentence that names the file, never a foreign error."
    rng, sound = random.Random(seed), {name: (icir / name).read_bytes() for name in ("query_files.csv", "database_files.csv")}
    for _ in range(40):
        name = rng.choice(list(sound))
        text = bytearray(sound[name])
        for _ in range(rng.randrange(1, 4)):
            start = rng.randrange(len(text))
            text[start:start + rng.randrange(9)] = rng.choice([b"", b"\n", b",", b'"', b"\0", b"../", b"\xff", b"\r", b";", b"x" * 300, text[:rng.randrange(40)]])
        (icir / name).write_bytes(bytes(text))
        try: found = load_dataset("icir", icir, "val")
        except DataError as problem: assert "\n" not in str(problem) and str(icir) in str(problem)
        else: assert found.triplets and all(t.positives <= set(found.galleries[t.category]) for t in found.triplets)
        (icir / name).write_bytes(sound[name])


def test_the_hubs_layout_of_icir_is_read(icir):
    (icir / "annotations").mkdir()
    for path in list(icir.glob("*.csv")): path.rename(icir / "annotations" / path.name)
    assert len(load_dataset("icir", icir, "val").triplets) == 4


ROW = {"query_image_signature2": "None", "query_category": "Swap"}


def pinpoint_rows():
    "Two questions, one in three wordings, and a query with two pictures; lists as the published file has them: repeats, an empty entry, a wrong picture that no index has."
    first = ROW | {"query_image_signature": "p0", "positive_candidates": ["p2", "p3", "p2"], "negative_candidates": ["p4", "p5", None, "gone"]}
    rows = [first | {"query_id": f"query_0000{i}", "instruction": text} for i, text in enumerate(("is blue", "make it blue, with dots", "the same in navy, please"))]
    rows.append(ROW | {"query_id": "query_00003", "query_image_signature": "p1", "instruction": "is red", "positive_candidates": ["p6"], "negative_candidates": ["p7"], "query_category": "Negation"})
    return rows + [first | {"query_id": "query_00004", "query_image_signature2": "p7", "instruction": "like <img1> and <img2>"}]


@pytest.fixture
def pinpoint(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow", reason="pip install dqe-cir[parquet]"), pytest.importorskip("pyarrow.parquet")
    root = tmp_path / "pinpoint"
    (root / "images").mkdir(parents=True)
    parquet.write_table(arrow.Table.from_pylist(pinpoint_rows()), root / "pinpoint_licensed.parquet")
    names = [f"p{i}" for i in range(30)]
    generator = torch.Generator().manual_seed(0)
    for i, name in enumerate(names):
        noise = torch.randint(0, 256, (24, 24, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(root / "images" / f"{name}.jpg")
    (root / "index_signatures.txt").write_text("\n".join(names) + "\n")
    return root


def test_pinpoint_is_measured_by_its_definitions(pinpoint, method):
    data = load_dataset("pinpoint", pinpoint, "val")
    assert data.note == "1 of 5 queries have two pictures and are left out" and len(data.triplets) == 4
    tokens = cache_tokens(method.encoder, data, progress=False)
    found, ranked = evaluate(method, data, tokens).metrics, scores_of(method, data, tokens)
    both = list(zip(ranked, data.triplets))
    for k in (1, 5, 10): assert found[f"mAP@{k}"] == pytest.approx(25 * sum(precision_of(ranking, t.positives, k) for ranking, t in both), abs=1e-3)
    traps = [sum(name in t.negatives for name in ranking[:10]) / min(10, len(t.negatives)) for ranking, t in both]
    assert found["negatives@10"] == pytest.approx(25 * sum(traps), abs=1e-3) and 0 < sum(traps)
    clean = [precision_of([name for name in ranking if name not in t.negatives], t.positives, 10) for ranking, t in both]
    assert found["no-negatives mAP@10"] == pytest.approx(25 * sum(clean), abs=1e-3)
    hits = [sum(name in t.positives for name in ranking[:10]) / 10 for ranking, t in both[:3]]
    assert found["wording spread"] == pytest.approx(100 * (max(hits) - min(hits)), abs=1e-3), "the other question has one wording"
    assert found["Swap mAP@10"] == pytest.approx(100 * sum(precision_of(ranking, t.positives, 10) for ranking, t in both[:3]) / 3, abs=1e-3)


@pytest.mark.parametrize("change, said", [
    ({"instruction": ""}, "row 6 has no instruction"), ({"positive_candidates": []}, "row 6 has no right answer"),
    ({"positive_candidates": ["p99"]}, "lists 30 pictures without 1 that the queries need"), ({"query_image_signature": "a/b"}, "row 6 names 'a/b'"),
    ({"query_id": "query_00000"}, "names 'query_00000' twice")])
def test_a_wrong_row_of_pinpoint_is_one_line(pinpoint, change, said):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*pinpoint_rows(), pinpoint_rows()[3] | {"query_id": "query_00009"} | change]), pinpoint / "pinpoint_licensed.parquet")
    with pytest.raises(DataError, match=said) as told: load_dataset("pinpoint", pinpoint, "val")
    assert "\n" not in str(told.value)


def test_what_is_no_parquet_file_and_what_is_not_there_is_one_line(pinpoint):
    (pinpoint / "index_signatures.txt").unlink()
    with pytest.raises(DataError, match="index_signatures.txt is missing"): load_dataset("pinpoint", pinpoint, "val")
    (pinpoint / "pinpoint_licensed.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="is no Parquet file"): load_dataset("pinpoint", pinpoint, "val")
    (pinpoint / "pinpoint_licensed.parquet").unlink()
    with pytest.raises(DataError, match="pinpoint_licensed.parquet is missing"): load_dataset("pinpoint", pinpoint, "val")


def test_the_evaluation_notebook_takes_icir(icir, tmp_path, home):
    done = papermill("nbs/evaluate.ipynb", tmp_path / "out.ipynb", ("method", "zero_shot"), ("dataset", "icir"), ("data_root", icir), ("run_dir", tmp_path / "bare"), DQE_CIR_DATA=str(home))
    assert done.returncode == 0, done.stderr[-2000:]
    record = read_json(tmp_path / "bare" / "evaluation-icir-val.json")
    assert record["data"] == "real" and {"mAP", "macro mAP"} <= record["metrics"].keys() and record["protocol"] == "gallery of the query's object, reference kept"
