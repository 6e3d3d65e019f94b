"Studies: what is shared, what is measured, and the arithmetic of a comparison."
import dataclasses
import json
import math
import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqe_cir.studies.ablation import AFTER_WARM_UP, CONDITIONS, STUDENT, difference_table, excluding_pairs
from dqe_cir.studies.ablation import in_batch_false_negatives, interval, paired, run_study, share_above
from dqe_cir.studies.ablation import study_config, study_jobs, study_record, values_of, warm_up_key
from dqe_cir.data import load_dataset
from dqe_cir.trainer import TrainConfig, train_config
from dqe_cir.trainer.batches import answer_groups
from dqe_cir.trainer.loop import SMOKE


@pytest.fixture(scope="module")
def val(): return load_dataset("garments", split="val", size="smoke")


@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 999))
def test_share_above_is_the_double_loop(queries, images, seed):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randperm(queries * images, generator=draw).reshape(queries, images).float()
    kind = torch.randint(3, (queries, images), generator=draw)
    valid, wrong = kind == 0, kind == 1
    for row, value in enumerate(share_above(scores, valid, wrong).tolist()):
        pairs = [scores[row, w] > scores[row, v] for v in range(images) if valid[row, v] for w in range(images) if wrong[row, w]]
        assert math.isnan(value) if not pairs else value == pytest.approx(sum(map(bool, pairs)) / len(pairs))


def test_excluding_requests_exclude_each_other(val):
    pairs = excluding_pairs(val)
    assert len(pairs) > len(val.triplets) / 2 and len({i for i, _ in pairs}) == len(pairs)
    for i, j in pairs:
        one, other = (val.mentions[val.triplets[row].pair_id] for row in (i, j))
        assert val.triplets[i].category == val.triplets[j].category
        assert any(not set(one[name]) & set(other[name]) for name in one.keys() & other.keys())


def test_in_batch_false_negatives_are_counted():
    train = load_dataset("garments", split="train", size="smoke")
    config = train_config({"method": "info_nce", "size": "smoke", "batch_size": len(train.triplets), "category_batches": False})
    groups = torch.tensor(answer_groups(train.triplets))
    wrong = [other.target in train.relevant[one.pair_id] for i, one in enumerate(train.triplets) for j, other in enumerate(train.triplets) if groups[i] != groups[j]]
    assert in_batch_false_negatives(config, train, groups) == pytest.approx(100 * sum(wrong) / len(wrong))


def test_only_what_acts_after_the_warm_up_is_left_out_of_its_name():
    config = train_config({"method": "dqe_cir"})
    assert set(AFTER_WARM_UP) <= {field.name for field in dataclasses.fields(TrainConfig)}
    other = dict(negatives="random", zone="absolute", zone_low=0.1, zone_high=0.2, zone_guard=0.7, zone_on="target", batches="trns", negatives_per_query=3, refresh_every=9, pair_smoothing=0.1,
                 preference_weight=2.0, ranking_weight=0.0, attribute_weight=0.0, contrastive_weight=1.0, mined_columns=True, attribute_negatives="own")
    assert set(other) == set(AFTER_WARM_UP)
    assert warm_up_key(dataclasses.replace(config, **other)) == warm_up_key(config)
    for name, value in dict(seed=1, lr=1e-4, epochs=20, batch_size=8, attribute_mode="off", aligned=False, warmup_epochs=4, label_smoothing=0.0, annotators="uneven").items():
        assert warm_up_key(dataclasses.replace(config, **{name: value})) != warm_up_key(config), name


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=16))
def test_the_interval_is_students(differences):
    mean, half = interval(differences)
    assert mean == pytest.approx(statistics.mean(differences)) and half == pytest.approx(STUDENT[len(differences) - 2] * statistics.stdev(differences) / math.sqrt(len(differences)))


def test_the_interval_covers_as_often_as_it_says():
    draw = random.Random(0)
    covered = sum(abs(mean) <= half for mean, half in (interval([draw.gauss(0, 2) for _ in range(5)]) for _ in range(4000)))
    assert 0.935 < covered / 4000 < 0.965


def test_pairs_are_by_seed_and_missing_seeds_are_left_out():
    run = lambda condition, seed, value: dict(condition=condition, seed=seed, metrics={"mAP": value})
    records = [run("a", 2, 12.0), run("a", 0, 10.0), run("a", 1, 11.0), run("b", 0, 11.0), run("b", 2, 15.0), run("b", 7, 90.0)]
    mean, half, pairs = paired(records, "b", "a")
    assert (mean, pairs) == (2.0, 2) and half == pytest.approx(12.706 * statistics.stdev([1, 3]) / math.sqrt(2))
    assert values_of(records, "a", "mAP") == {0: 10.0, 1: 11.0, 2: 12.0} and values_of(records, "a", "R@10") == {}
    assert difference_table(records[:4], "a", ["mAP"]) == {"b": {}}
    with pytest.raises(ValueError, match="2 to 16 seeds"): paired(records[:4], "b", "a")


def test_a_study_goes_on_where_it_was_stopped(tmp_path):
    common = dict(SMOKE, warmup_epochs=1, evaluate_every=0, evaluate_on="dev")
    first = run_study(study_jobs(tmp_path, {"trns": CONDITIONS["trns"]}, [0], common), workers=1)
    weights = (tmp_path / "trns-seed0" / "model.safetensors").stat().st_mtime_ns
    both = run_study(study_jobs(tmp_path, {name: CONDITIONS[name] for name in ("trns", "info_nce")}, [0], common), workers=2)
    assert both[0] == first[0] and (tmp_path / "trns-seed0" / "model.safetensors").stat().st_mtime_ns == weights
    assert [record["condition"] for record in both] == ["trns", "info_nce"] and both[0]["split"] == "dev"
    assert both[1]["metrics"]["suppressed after warm-up"] is None and "negatives" not in both[1]["parameters"]
    record = study_record(study_config({"conditions": "trns,info_nce", "seeds": "0", "size": "smoke"}), both)
    assert record["command"] == "papermill nbs/ablate.ipynb out.ipynb -p conditions trns,info_nce -p seeds 0 -p size smoke"
    assert json.loads(json.dumps(record)) == record
