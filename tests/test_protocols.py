"The rules of each benchmark, driven through `evaluate` and `submissions` from end to end, against figures of the reference programs."
import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from helpers import unit

from dqe_cir.core import generator
from dqe_cir.data import CIRDataset, Triplet
from dqe_cir.evaluator import GalleryScores, PROTOCOLS, Protocol, evaluate, evaluate_scores, protocol_for
from dqe_cir.evaluator import submissions, write_submission
from dqe_cir.evaluator.protocols import named_protocols
from dqe_cir.methods import Method

CATEGORIES = ("dress", "shirt", "toptee")
FASHIONIQ_RULES = named_protocols("fashioniq")


class Stored(Method):
    "A method that knows the features of every image and every query by heart; a query is asked for by its pair id."
    def __init__(self, queries, reduce="max"):
        super().__init__(nn.Identity())
        self.queries, self.reduce, self.anchor, self.asked = queries, reduce, nn.Parameter(torch.zeros(1)), []

    def query_text(self, triplet):
        self.asked.append(triplet.captions)
        return triplet.pair_id

    def encode_query(self, reference, texts): return torch.stack([self.queries[text] for text in texts])
    def encode_target(self, tokens): return tokens


class Features:
    "Image features by id, in the place of a token cache."
    def __init__(self, of): self.of = of
    def __getitem__(self, names): return torch.stack([self.of[name] for name in names])


def names(array): return [name.decode() for name in array]
def load(golden, name): return np.load(golden(f"{name}.npz")), json.loads(golden(f"{name}.json").read_text())


# ---- FashionIQ

def fashioniq(arrays, categories=CATEGORIES, gallery="{}_gallery", query="{}_query", average=False):
    "The data set, a method and features from the stored arrays. An image in two categories has features in each, hence a prefix."
    triplets, galleries, queries, images = [], {}, {}, {}
    for category in categories:
        ids = [f"{category}/{name}" for name in names(arrays[f"{category}_names"])]
        galleries[category] = ids
        images |= zip(ids, unit(arrays[gallery.format(category)]))
        asked = unit(arrays[query.format(category)])
        if average: asked = asked.mean(1)  # of unit tokens, not normalised again
        for i, (reference, target) in enumerate(zip(arrays[f"{category}_ref"], arrays[f"{category}_target"])):
            queries[f"{category}-{i}"] = asked[i]
            triplets.append(Triplet(ids[reference], ids[target], (f"first {i}", f"second {i}"), category, pair_id=f"{category}-{i}"))
    images = {name: value if value.dim() == 2 else value[None] for name, value in images.items()}
    return CIRDataset("fashioniq", "val", triplets, galleries, Path(".")), queries, Features(images)


@pytest.mark.parametrize("name, rules", [("original_split", FASHIONIQ_RULES["sprc"]), ("original_split_without_reference", FASHIONIQ_RULES["covr"]),
                                         ("original_split_without_reference", FASHIONIQ_RULES["cosmo"]), ("union_split", protocol_for("fashioniq", gallery="val_union")),
                                         ("union_split_without_reference", FASHIONIQ_RULES["mgur"])])
@pytest.mark.parametrize("stored", ["fashioniq_dress", "fashioniq_metrics"])
def test_fashioniq_by_the_rules_of_each_system(golden, stored, name, rules):
    arrays, expected = load(golden, stored)
    categories = [category for category in CATEGORIES if category in expected]
    dataset, queries, images = fashioniq(arrays, categories)
    method = Stored(queries)
    result = evaluate(method, dataset, images, rules)
    times, first = 1 + (rules.caption_order == "both"), 0
    assert len(result.dataset.triplets) == len(result.top) == len(result.measures["rank"]) == times * len(dataset.triplets)
    assert {captions[0].split()[0] for captions in method.asked} == ({"first", "second"} if times == 2 else {"first"})
    for category in categories:
        wanted = expected[category][name]
        rows = torch.tensor([t.category == category for t in result.dataset.triplets])
        assert len(result.dataset.galleries[category]) == expected[category]["n_union" if rules.gallery == "val_union" else "n_gallery"]
        for k in (1, 10, 50):
            if f"recall_at{k}" not in wanted: continue
            hits = round(wanted[f"recall_at{k}"] / 100 * expected[category]["n_query"])
            assert int((result.measures["rank"][rows] <= k).sum()) == times * hits
            if k > 1: assert result.metrics[f"{category} R@{k}"] == pytest.approx(wanted[f"recall_at{k}"], abs=1e-4)
    if len(categories) == 3:
        average = expected["average"][name]
        found = [result.metrics[key] for key in ("R@10", "R@50", "mean")]
        assert found == pytest.approx([average["recall_at10"], average["recall_at50"], average["average_recall"]], abs=1e-4)
    assert ("removed" in result.protocol) == rules.exclude_reference and ("references and targets" in result.protocol) == (rules.gallery == "val_union")


@pytest.mark.parametrize("stored, category", [("fashioniq_dress", "dress"), ("fashioniq_metrics", "toptee")])
def test_qure_scores_an_image_by_its_best_token(golden, stored, category):
    arrays, expected = load(golden, stored)
    dataset, queries, images = fashioniq(arrays, [category], "{}_gallery_tokens", "{}_query_single")
    result = evaluate(Stored(queries), dataset, images, protocol_for("fashioniq", "qure"))
    for k in (10, 50):
        wanted = expected[category]["qure_max_over_tokens"][f"recall_at{k}"]
        assert int((result.measures["rank"] <= k).sum()) == round(wanted / 100 * expected[category]["n_query"])
        assert result.metrics[f"{category} R@{k}"] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("category", ["dress", "toptee"])
def test_covr_scores_an_image_by_the_mean_of_its_tokens(golden, category):
    arrays, expected = load(golden, "fashioniq_metrics")
    dataset, queries, images = fashioniq(arrays, [category], "{}_gallery_tokens", "{}_query_tokens", average=True)
    metrics = evaluate(Stored(queries, reduce="mean"), dataset, images, protocol_for("fashioniq", "covr")).metrics
    wanted = expected[category]["covr_mean_tokens_without_reference"]
    assert {f"R{k}": round(metrics[f"R@{k}"], 2) for k in (1, 5, 10, 50)} == {k: v for k, v in wanted.items() if k[0] == "R"}


@pytest.mark.parametrize("gallery", ["original", "val_union"])
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("order", ["fixed", "both"])
def test_fashioniq_is_the_loop(gallery, exclude, order):
    "Two categories of random features, ranked by sorting names; here the second order of the captions has a feature of its own."
    g = generator(0, "loop")
    direction = lambda: normalize(torch.randn(4, generator=g), dim=0)
    ids = {"dress": [f"d{i}" for i in range(30)], "shirt": [f"s{i}" for i in range(20)]}
    images = {name: direction() for some in ids.values() for name in some}
    triplets = [Triplet(some[i], some[i + 6], (f"first {c}{i}", "second"), c, pair_id=f"{c}{i}") for c, some in ids.items() for i in range(6)]
    queries = {captions: direction() for t in triplets for captions in (t.captions, t.captions[::-1])}
    method = Stored(queries)
    method.query_text = lambda triplet: triplet.captions
    rules = protocol_for("fashioniq", gallery=gallery, exclude_reference=exclude, caption_order=order)
    result = evaluate(method, CIRDataset("fashioniq", "val", triplets, ids, Path(".")), Features({n: v[None] for n, v in images.items()}), rules)
    by_category = {}
    for turn in (1, -1)[:1 + (order == "both")]:
        for t in triplets:
            searched = [n for n in ids[t.category] if gallery == "original" or int(n[1:]) < 12]
            scores = {n: float(queries[t.captions[::turn]] @ images[n]) for n in searched if not (exclude and n == t.reference)}
            by_category.setdefault(t.category, []).append(sorted(scores, key=scores.get, reverse=True).index(t.target) + 1)
    for category, found in by_category.items():
        assert result.metrics[f"{category} R@10"] == pytest.approx(100 * sum(rank <= 10 for rank in found) / len(found))
    assert sorted(result.measures["rank"].tolist()) == sorted(rank for found in by_category.values() for rank in found)


# ---- CIRR

def cirr(arrays, split):
    "The val or test1 split of the stored arrays."
    ids, side = names(arrays[f"{split}_names"]), lambda what: arrays[f"{split}_{what}"]
    pairs, queries = [str(pair) for pair in side("pairid")], unit(side("query"))
    targets = [ids[i] for i in side("target")] if split == "val" else [None] * len(pairs)
    triplets = [Triplet(ids[r], t, ("words",), subset=tuple(ids[i] for i in group), pair_id=pair)
                for r, t, group, pair in zip(side("reference"), targets, side("group"), pairs)]
    images = Features({name: value[None] for name, value in zip(ids, unit(side("gallery")))})
    return CIRDataset("cirr", split, triplets, {"all": ids}, Path(".")), Stored(dict(zip(pairs, queries))), images


def test_cirr_val(golden):
    arrays, expected = load(golden, "cirr_val")
    dataset, method, images = cirr(arrays, "val")
    result = evaluate(method, dataset, images)
    count = lambda measure, k: int((result.measures[measure] <= k).sum())
    assert {f"recall_at{k}": count("rank", k) for k in (1, 5, 10, 50)} | {f"group_recall_at{k}": count("subset_rank", k) for k in (1, 2, 3)} == expected["val"]["hits"]
    assert result.metrics["mean"] == pytest.approx(expected["val"]["mean_r5_rsub1"], abs=1e-4)
    assert result.protocol == "all images of the split as gallery, reference removed"


def test_cirr_test_files_are_the_reference_files(golden, tmp_path):
    arrays, expected = load(golden, "cirr_metrics")
    dataset, method, images = cirr(arrays, "test1")
    files = submissions(method, dataset, images)
    assert set(files) == {f"submission-cirr-test1-{metric}.json" for metric in ("recall", "recall_subset")}
    for metric in ("recall", "recall_subset"):
        written = write_submission(tmp_path / metric, files[f"submission-cirr-test1-{metric}.json"]).read_bytes()
        assert hashlib.sha256(written).hexdigest() == expected["test1"][metric]["sha256"] and len(written) < 5_000_000
    with pytest.raises(ValueError, match="the test1 split of cirr has no targets: it can be submitted, not evaluated"): evaluate(method, dataset, images)


def test_a_test_split_that_lacks_queries_is_not_submitted(golden):
    dataset, method, images = cirr(load(golden, "cirr_val")[0], "val")
    hidden = [dataclasses.replace(triplet, target=None) for triplet in dataset.triplets[:9]]
    dataset = dataclasses.replace(dataset, split="test1", triplets=hidden)
    with pytest.raises(ValueError, match="9 queries; the test split has 4148"): submissions(method, dataset, images)
    with pytest.raises(ValueError, match="the test1 split of cirr has no targets: it can be submitted, not evaluated"): evaluate(method, dataset, images)


# ---- CIRCO

def circo(predictions, relevant, target, aspects):
    "A data set whose only scores say what was predicted; the references are images of their own."
    ids = sorted({str(i) for row in predictions for i in row} | {str(i) for right in relevant for i in right}, key=int) + ["reference"]
    place = {name: i for i, name in enumerate(ids)}
    triplets = [Triplet("reference", str(t), ("words",), pair_id=str(i), positives=frozenset(map(str, right)), aspects=tuple(kinds))
                for i, (right, t, kinds) in enumerate(zip(relevant, target, aspects))]
    scores = torch.zeros(len(triplets), len(ids))
    for i, row in enumerate(predictions): scores[i, [place[str(image)] for image in row]] = torch.arange(len(row), 0, -1).float()
    scores[:, -1] = 1000.0  # the reference would come first
    dataset = CIRDataset("circo", "val", triplets, {"all": ids}, Path("."))
    return dataset, [GalleryScores(list(range(len(triplets))), ids, scores)]


def check_circo(metrics, expected):
    for k in (5, 10, 25, 50):
        assert metrics[f"mAP@{k}"] / 100 == pytest.approx(expected["map_at"][str(k)], abs=1e-9)
        assert metrics[f"R@{k}"] / 100 == pytest.approx(expected["recall_at"][str(k)], abs=1e-9)
    assert {name: metrics[f"{name} mAP@10"] / 100 for name in expected["semantic_map_at10"]} == pytest.approx(expected["semantic_map_at10"], abs=1e-9)


@pytest.mark.parametrize("run, predicted", [("seeded", "predictions"), ("shipped_submission_val", "shipped_predictions")])
def test_circo(golden, run, predicted):
    arrays, expected = load(golden, "circo_metrics")
    relevant = [part.tolist() for part in np.split(arrays["gt_flat"], arrays["gt_count"].cumsum()[:-1])]
    aspects = [[str(name) for name, has in zip(arrays["aspect_names"], row) if has] for row in arrays["aspects"]]
    dataset, scored = circo(arrays[predicted].tolist(), relevant, arrays["target"].tolist(), aspects)
    result = evaluate_scores(dataset, scored)
    check_circo(result.metrics, expected[run])
    assert result.top[0] == [str(i) for i in arrays[predicted][0]] and result.protocol == f"gallery of {len(dataset.gallery):,} images, reference removed"
    assert evaluate_scores(dataset, scored, Protocol("circo")).metrics["mAP@5"] < result.metrics["mAP@5"]


def test_circo_synthetic(golden):
    made = json.loads(golden("circo_synthetic.json").read_text())
    queries = made["annotations"]
    dataset, scored = circo([made["predictions"][str(q["id"])] for q in queries], [q["gt_img_ids"] for q in queries],
                            [q["target_img_id"] for q in queries], [q["semantic_aspects"] for q in queries])
    check_circo(evaluate_scores(dataset, scored).metrics, made["expected"])


def small_circo(queries=800, images=60):
    ids = [str(100 + i) for i in range(images)]
    triplets = [Triplet(ids[i % images], None, ("is red",), pair_id=str(i)) for i in range(queries)]
    direction = lambda seed: normalize(torch.randn(8, generator=torch.Generator().manual_seed(seed)), dim=0)
    features = {name: direction(int(name)) for name in ids}
    queries = {t.pair_id: features[t.reference] for t in triplets}  # a query like its reference: the reference scores highest
    return CIRDataset("circo", "test", triplets, {"all": ids}, Path(".")), Stored(queries), Features({name: value[None] for name, value in features.items()})


def test_circo_submission_removes_the_reference_or_keeps_it():
    dataset, method, images = small_circo()
    removed, = submissions(method, dataset, images).values()
    kept, = submissions(method, dataset, images, Protocol("circo")).values()
    assert list(removed) == [str(i) for i in range(800)] and all(len(row) == 50 for row in removed.values())
    for i, triplet in enumerate(dataset.triplets):
        assert kept[str(i)][0] == int(triplet.reference) and removed[str(i)][:49] == kept[str(i)][1:]
    assert list(submissions(method, dataset, images, named_protocols("circo")["qure"])) == ["submission-circo-test-kept-a_photo_of_that_caption.json"]
    assert set(method.asked) == {("is red",), ("a photo of $ that is red",)}


# ---- rules in words, and refusals

def test_every_protocol_has_its_own_sentence_and_label():
    rules = {r for name in PROTOCOLS for r in named_protocols(name).values()} | set(PROTOCOLS.values())
    assert len({(r.dataset, r.sentence(9)) for r in rules}) == len({(r.dataset, r.label()) for r in rules}) == len(rules) > len(PROTOCOLS)
    assert PROTOCOLS["fashioniq"].sentence(9) == "original split as gallery, by category, reference kept, both captions joined"


@pytest.mark.parametrize("dataset, options, message", [
    ("imagenet", {}, "unknown dataset 'imagenet'; choose one of fashioniq, cirr, circo, hp_fashioniq, garments"),
    ("fashioniq", {"preset": "blip"}, "fashioniq has no protocol 'blip'; choose one of clip4cir"), ("cirr", {"preset": "qure"}, "cirr has no protocol 'qure'; leave it empty"),
    ("circo", {"gallery": "val_union"}, "circo has no choice of gallery; it has exclude_reference, prompt"),
    ("garments", {"exclude_reference": True}, "garments has no choice of exclude_reference; it has one protocol"),
    ("fashioniq", {"caption_order": "twice"}, "unknown caption_order 'twice'; choose one of fixed, both"), ("circo", {"prompt": "a photo"}, "must say where the request goes")])
def test_rules_that_do_not_exist_are_refused(dataset, options, message):
    with pytest.raises(ValueError, match=message): protocol_for(dataset, **options)


def test_fashioniq_test_has_no_answers():
    hidden = CIRDataset("fashioniq", "test", [Triplet("a", None, ("x", "y"), "dress")], {"dress": ["a", "b"]}, Path("."))
    with pytest.raises(ValueError, match="the test split of fashioniq has no targets, and there is no server that has them: evaluate on val"): evaluate(None, hidden, None)
    with pytest.raises(ValueError, match="has no test server: evaluate on val"): submissions(None, hidden, None)
