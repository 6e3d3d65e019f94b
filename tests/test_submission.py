"Files for the test servers of CIRR and CIRCO: the very bytes of a reference program, and everything a server would refuse."
import hashlib
import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from dqe_cir.core import generator
from dqe_cir.evaluator import circo_submission, cirr_submission, write_submission
from dqe_cir.retrieval import similarity, top_k


def ranked(names, pair_ids, query, gallery, reference, group):
    "What a submission takes, with rankings made by our own retrieval. Vectors (Q,D), (N,D); positions (Q,), (Q,6)."
    best = top_k(query, gallery, 50, exclude=reference)[1]
    within = similarity(query, gallery).scatter(1, reference[:, None], -torch.inf).gather(1, group).topk(3).indices
    named = lambda table: [[names[i] for i in row] for row in table.tolist()]
    return {"pair_ids": pair_ids, "references": [names[i] for i in reference.tolist()], "groups": named(group),
            "recall": named(best), "recall_subset": named(group.gather(1, within)), "gallery": set(names)}


@pytest.fixture(scope="module")
def published(golden):
    "CIRR's test1 split with the stored features."
    arrays = np.load(golden("cirr_metrics.npz"))
    query, gallery = (normalize(torch.from_numpy(arrays[f"test1_{side}"]).float(), dim=1) for side in ("query", "gallery"))
    reference, group = (torch.from_numpy(arrays[f"test1_{what}"]).long() for what in ("reference", "group"))
    names = [name.decode() for name in arrays["test1_names"]]
    return ranked(names, arrays["test1_pairid"].tolist(), query, gallery, reference, group)


@pytest.fixture(scope="module")
def cirr():
    "A made-up split of the same size: 300 images, and 4,148 queries whose set of six begins with the reference."
    g = generator(0, "test1")
    query, gallery = (normalize(torch.randn(count, 8, generator=g), dim=1) for count in (4148, 300))
    group = torch.rand(4148, 300, generator=g).topk(6).indices
    return ranked([f"test1-{i}-0-img0" for i in range(300)], list(range(12063, 12063 + 4148)), query, gallery, group[:, 0], group)


def allowed(cirr, metric): return cirr["groups"] if metric == "recall_subset" else [cirr["gallery"]] * len(cirr["pair_ids"])


@pytest.mark.parametrize("metric", ["recall", "recall_subset"])
def test_cirr_files_are_the_reference_files(golden, published, metric, tmp_path):
    expected = json.loads(golden("cirr_metrics.json").read_text())["test1"][metric]
    submission = cirr_submission(published["pair_ids"], published[metric], metric, published["references"], allowed(published, metric))
    written = write_submission(tmp_path / f"{metric}.json", submission).read_bytes()
    assert len(submission) == expected["n_keys"] and len(written) == expected["bytes"]
    assert hashlib.sha256(written).hexdigest() == expected["sha256"]


@pytest.mark.parametrize("metric", ["recall", "recall_subset"])
def test_cirr_files_are_plain_json_with_two_keys_more(cirr, metric, tmp_path):
    submission = cirr_submission(cirr["pair_ids"], cirr[metric], metric, cirr["references"], allowed(cirr, metric))
    written = write_submission(tmp_path / f"{metric}.json", submission).read_bytes()
    assert written == json.dumps(submission, sort_keys=True).encode() and len(submission) == 4148 + 2
    assert cirr_submission(cirr["pair_ids"], cirr[metric], metric) == submission  # what is not known is not checked
    assert cirr_submission(np.array(cirr["pair_ids"]), np.array(cirr[metric]), metric) == submission  # numpy in, plain JSON out
    assert [path.name for path in tmp_path.iterdir()] == [f"{metric}.json"]


@pytest.mark.parametrize("row", [0, 4147])
@pytest.mark.parametrize("metric", ["recall", "recall_subset"])
@pytest.mark.parametrize("accident, message", [
    ("reference", "its own reference"), ("stranger", "which is not among its candidates"), ("repetition", "an image twice"),
    ("short", "images; the server wants exactly"), ("folder", "without folder and extension")])
def test_cirr_refuses_any_bad_row(cirr, metric, row, accident, message):
    rankings = list(cirr[metric])
    first, *rest = rankings[row]
    rankings[row] = {"reference": [cirr["references"][row], *rest], "stranger": ["test1-0-0-nobody", *rest], "repetition": [rest[0], *rest],
                     "short": rest, "folder": [f"./test1/{first}.png", *rest]}[accident]
    with pytest.raises(ValueError, match=f"query {cirr['pair_ids'][row]} names .*{message}"):
        cirr_submission(cirr["pair_ids"], rankings, metric, cirr["references"], allowed(cirr, metric))


def test_cirr_wants_every_query_once(cirr):
    ids, rankings = cirr["pair_ids"], cirr["recall_subset"]
    for pair_ids, lists, message in [(ids[:-1], rankings[:-1], "4147 queries; the test split has 4148"), (ids, rankings[:-1], "4147 rankings for 4148 queries"),
                                     ([ids[1], *ids[1:]], rankings, f"query {ids[1]} comes twice"), (["version", *ids[1:]], rankings, "'version' is not a number")]:
        with pytest.raises(ValueError, match=message): cirr_submission(pair_ids, lists, "recall_subset")
    with pytest.raises(ValueError, match="1 members for 4148 queries"): cirr_submission(ids, rankings, "recall_subset", members=cirr["groups"][:1])
    with pytest.raises(ValueError, match="metric='Recall' must be"): cirr_submission(ids, rankings, "Recall")


def circo_rows(): return [list(range(10 * row, 10 * row + 50)) for row in range(800)]


def test_circo_takes_integers_of_any_kind_and_writes_plain_ones(tmp_path):
    expected = {str(row): ranking for row, ranking in enumerate(circo_rows())}
    table = np.array(circo_rows(), dtype=np.int32)
    for ids, rankings in [(range(800), circo_rows()), (np.arange(800), table), (torch.arange(800), torch.from_numpy(table)),
                          ([str(i) for i in range(800)], [[f"{image:012d}" for image in row] for row in circo_rows()])]:
        submission = circo_submission(ids, rankings)
        assert submission == expected
        assert json.loads(write_submission(tmp_path / "circo.json", submission).read_text()) == expected


@pytest.mark.parametrize("ids", [range(799), range(1, 801), [0, *range(799)]])
def test_circo_wants_every_query_once(ids):
    with pytest.raises(ValueError, match="every number from 0 to 799 once"): circo_submission(ids, circo_rows()[:len(ids)])


@pytest.mark.parametrize("change, message", [
    (lambda row: row[:-1], "query 3 names 49 images; the server wants exactly 50"), (lambda row: [*row, 9999], "query 3 names 51 images"),
    (lambda row: [row[1], *row[1:]], "query 3 names an image twice"), (lambda row: [5000, *row[1:]], "query 3 names its own reference 5000"),
    (lambda row: [60000, *row[1:]], "query 3 names 60000, which is not among its candidates"), (lambda row: [1.5, *row[1:]], "1.5 is not an image number"),
    (lambda row: [f"{row[1]:012d}", *row[1:]], "query 3 names an image twice")])
def test_circo_refuses_a_bad_row(change, message):
    rankings = circo_rows()
    rankings[3] = change(rankings[3])
    with pytest.raises(ValueError, match=message):
        circo_submission(range(800), rankings, references=["5000"] * 800, members=[range(50000)] * 800)


def test_a_file_too_large_for_the_server_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="the server takes at most 5 MB"): write_submission(tmp_path / "x.json", {"1": "x" * 5_000_001})
    assert not list(tmp_path.iterdir())
