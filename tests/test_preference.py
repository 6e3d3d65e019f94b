"HP-FashionIQ: the reference program's count through our loader and our measurement, a bootstrap done by hand, and broken files."
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import unit
from test_protocols import Features, Stored

from dqe_cir.core import DataError, generator
from dqe_cir.data.datasets import complete
from dqe_cir.metrics import preference_agreement
from dqe_cir.data import load_hp_fashioniq
from dqe_cir.evaluator import evaluate_preferences
from dqe_cir.data.hp_fashioniq import LISTS, unmarked
from dqe_cir.evaluator.preference import agreement_interval


def written(path, rows, per_set=25):
    "`hpfiq.json` from rows (reference, target, sentence, five ids, five ids, choice): two question sets per user."
    users = {}
    for start in range(0, len(rows), per_set):
        number, part = start // per_set, rows[start:start + per_set]
        where = lambda name: f"/-/image_data/shirt/{name}.jpg"
        found = lambda i: [{"img_path": [where(name) for name in row[i]], "user_score": "3"} for row in part]
        columns = [where(r[0]) for r in part], [where(r[1]) for r in part], [r[2] for r in part], found(3), found(4), [str(r[5]) for r in part]
        users.setdefault(f"user_{number // 2 + 1}", {})[f"question_set_{number % 2 + 1}"] = dict(zip(LISTS, columns))
    path.write_text(json.dumps(users))
    return path


def test_the_reference_count_through_file_and_scores(golden, tmp_path):
    arrays, expected = np.load(golden("hp_fashioniq.npz")), json.loads(golden("hp_fashioniq.json").read_text())
    # a picture of both categories has features in each: the names of the test keep them apart
    ids = [f"{category.decode()}-{name.decode()}" for category, name in zip(arrays["image_category"], arrays["image_names"])]
    rows = [(ids[r], "target", f"words {i}dotmark", [ids[j] for j in one], [ids[j] for j in two], choice)
            for i, (r, one, two, choice) in enumerate(zip(arrays["ref"], arrays["set1"], arrays["set2"], arrays["user_choice"].tolist()))]
    dataset = load_hp_fashioniq(written(tmp_path / "hpfiq.json", rows))
    assert len(dataset.questions) == expected["n_question"] and len({q.user for q in dataset.questions}) == 61
    assert set(dataset.gallery) == set(ids) and dataset.triplets[7].captions == ("words 7.",)
    method = Stored(dict(zip((t.pair_id for t in dataset.triplets), unit(arrays["query"]))))
    result = evaluate_preferences(method, dataset, Features(dict(zip(ids, unit(arrays["target_tokens"])))), generator(0, "people"))
    one, two, choice = result.measures["score1"], result.measures["score2"], torch.tensor([q.choice for q in dataset.questions])
    torch.testing.assert_close(one, torch.from_numpy(arrays["score1"]), rtol=0, atol=1e-5)
    same = torch.tensor([set(q.set1) == set(q.set2) for q in dataset.questions])
    assert int(same.sum()) == expected["n_question_with_the_same_five_images_in_both_sets"] and torch.equal(one[same], two[same])
    assert int((one > two).sum()) == expected["n_model_prefers_set1_without_those"]
    assert int((choice[one > two] == 1).sum()) == expected["n_of_those_user_prefers_set1"]
    assert result.metrics["preference ratio"] / 100 == pytest.approx(expected["preference_ratio_without_those"], abs=1e-12)
    assert result.metrics["people choose set 1"] == pytest.approx(100 * expected["n_user_prefers_set1"] / 3050)
    assert result.metrics["agreement"] / 100 == pytest.approx(expected["symmetric_agreement_for_information"], abs=11 / 3050)
    low, high = result.metrics["agreement low"], result.metrics["agreement high"]
    assert low < result.metrics["agreement"] < high and 2 < high - low < 6


def test_made_up_annotations(golden, tmp_path):
    "One-dimensional images whose similarity is the stored score; fifteen questions tie."
    made = json.loads(golden("preference_synthetic.json").read_text())
    name = lambda which, i: [f"{which}-{i}-{k}" for k in range(5)]
    rows = [("reference", "target", "words", name("a", i), name("b", i), choice) for i, choice in enumerate(made["user_choice"])]
    dataset = load_hp_fashioniq(written(tmp_path / "hpfiq.json", rows))
    value = {image: torch.tensor([[score]]) for which, scores in (("a", made["score1"]), ("b", made["score2"])) for i, score in enumerate(scores) for image in name(which, i)}
    method = Stored({t.pair_id: torch.ones(1) for t in dataset.triplets})
    result = evaluate_preferences(method, dataset, Features({**value, "reference": torch.zeros(1, 1)}), generator(0, "people"))
    assert result.metrics["preference ratio"] / 100 == pytest.approx(made["expected"], abs=1e-12)
    assert (result.measures["score1"] == result.measures["score2"])[:15].all()


def test_the_interval_is_a_bootstrap_over_people():
    g = generator(3, "answers")
    one, two, choice = torch.rand(90, generator=g), torch.rand(90, generator=g), torch.randint(1, 3, (90,), generator=g)
    users = [f"user {i}" for i in (torch.rand(90, generator=g).square() * 12).long().tolist()]  # of unequal diligence
    people = list(dict.fromkeys(users))
    drawn = torch.randint(len(people), (400, len(people)), generator=generator(0, "people")).tolist()
    shares = []
    for draw in drawn:
        rows = [i for person in draw for i in range(90) if users[i] == people[person]]
        shares.append(100 * preference_agreement(one[rows], two[rows], choice[rows]))
    expected = torch.tensor(shares, dtype=torch.float64).quantile(torch.tensor([.05, .95], dtype=torch.float64)).tolist()
    assert agreement_interval(one, two, choice, users, generator(0, "people"), draws=400, level=90.0) == pytest.approx(expected)
    assert min(shares) <= expected[0] <= statistics.median(shares) <= expected[1] <= max(shares)


@pytest.mark.parametrize("text, clean", [("is greydotmark  and is long", "is grey. and is long"), ("dots andmark stripesquestionmark", "dots & stripes?"),
                                         ("five starmark", "five *"), ("a dot mark", "a dot mark")])
def test_signs_come_back(text, clean): assert unmarked(text) == clean


def test_broken_files_are_named(tmp_path):
    row = ("r", "t", "words", list("abcde"), list("fghij"), 1)
    for change, message in [((*row[:3], list("abcd"), *row[4:]), "user_1-question_set_1-0: set 1 has 4 images instead of five"), ((*row[:5], 3), "the preferred set is '3'")]:
        with pytest.raises(DataError, match=message): load_hp_fashioniq(written(tmp_path / "hpfiq.json", [change]))
    (tmp_path / "hpfiq.json").write_text("{}")
    with pytest.raises(DataError, match="holds no questions"): load_hp_fashioniq(tmp_path)
    (tmp_path / "hpfiq.json").write_text("{")
    with pytest.raises(DataError, match="hpfiq.json is not valid JSON"): load_hp_fashioniq(tmp_path)
    with pytest.raises(DataError, match="hpfiq.json is missing: the repository's data/README.md"): load_hp_fashioniq(tmp_path / "no" / "hpfiq.json")
    dataset = load_hp_fashioniq(written(tmp_path / "hpfiq.json", [row]), images=Path(tmp_path) / "images")
    with pytest.raises(DataError, match="11 of 11 pictures of hp_fashioniq val are missing"): complete(dataset)
