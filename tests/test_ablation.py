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

from safetensors.torch import load_file

from dqe_cir.studies.ablation import AFTER_WARM_UP, CONDITIONS, QUERIES, STUDENT, Job, against_table, condition_of, difference_table
from dqe_cir.studies.ablation import excluding_pairs, in_batch_false_negatives, interval, made_now, over_queries, paired, parameters, query_values, run_study
from dqe_cir.studies.ablation import seed_spread, share_above, study_config, study_jobs, study_record, values_of, walk, warm_up_key
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


CHANGES = dict(negatives="random", zone="meanstd", zone_low=0.1, zone_high=0.2, zone_guard=0.7, zone_on="target", batches="trns", refresh_every=9, negatives_per_query=3,
               pair_smoothing=0.1, preference_weight=2.0, ranking_weight=0.0, attribute_weight=0.0, contrastive_weight=1.0, mined_columns=True, attribute_negatives="own")


@pytest.mark.parametrize("warm_up", AFTER_WARM_UP)
def test_only_what_acts_after_the_warm_up_is_left_out_of_its_name(warm_up):
    "Under random negatives the pairwise terms act from the first step; how negatives are mined comes later in any case."
    config = dataclasses.replace(train_config(CONDITIONS["paper"]), warm_up=warm_up)
    later = AFTER_WARM_UP[warm_up]
    assert set(later) <= set(CHANGES) <= {field.name for field in dataclasses.fields(TrainConfig)}
    assert warm_up_key(dataclasses.replace(config, **{name: CHANGES[name] for name in later})) == warm_up_key(config)
    earlier = {name: value for name, value in CHANGES.items() if name not in later}
    for name, value in (earlier | dict(seed=1, lr=1e-4, epochs=20, batch_size=8, attribute_mode="off", aligned=True, warmup_epochs=4, label_smoothing=0.1, annotators="uneven")).items():
        assert warm_up_key(dataclasses.replace(config, **{name: value})) != warm_up_key(config), name


def test_every_kind_of_warm_up_has_a_rule(): assert warm_up_key(dataclasses.replace(train_config({}), warm_up="none")) is None


def test_a_warm_up_by_random_negatives_is_shared_exactly(tmp_path):
    common = dict(SMOKE, epochs=2, warmup_epochs=1, evaluate_every=0, batch_size=48)
    jobs = study_jobs(tmp_path, {name: CONDITIONS["paper"] | dict(negatives=name) for name in ("trns", "hardest")}, [0], common)
    assert jobs[0].config.warm_up == "random" and jobs[0].shared == jobs[1].shared is not None
    run_study(jobs, workers=1)
    alone = walk(jobs[1], tmp_path / "alone")[-1]
    one, other = (load_file(folder / "model.safetensors") for folder in (jobs[1].folder, alone.folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


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


@given(st.integers(1, 4), st.integers(2, 30), st.integers(0, 999))
def test_the_interval_over_queries_is_that_of_the_mean_over_seeds(seeds, queries, seed):
    draw = torch.Generator().manual_seed(seed)
    one, other = (100 * torch.rand(seeds, queries, generator=draw) for _ in range(2))
    mean, half, count = over_queries(one, other)
    draws = [statistics.mean((one - other)[:, q].tolist()) for q in range(queries)]
    assert count == queries and mean == pytest.approx(statistics.mean(draws), abs=1e-4)
    assert half == pytest.approx(1.96 * statistics.stdev(draws) / math.sqrt(queries), rel=1e-3, abs=1e-4)


def test_a_condition_may_be_changed_by_name():
    assert condition_of("paper+lr=0.001+zone_on=target") == CONDITIONS["paper"] | dict(lr=0.001, zone_on="target")
    assert study_config({"conditions": "trns,trns+lr=0.001"}).named["trns+lr=0.001"]["lr"] == 0.001
    with pytest.raises(ValueError, match="unknown condition 'nobody'"): study_config({"conditions": "nobody+lr=1"})


@pytest.mark.parametrize("change", ["start_from=garments", "processes=2"])
def test_runs_of_a_study_begin_from_nothing_and_train_alone(change):
    name = f"dqe_cir+{change}"
    with pytest.raises(ValueError, match=f"has {change}: the runs of a study begin from nothing and train alone"):
        study_jobs("runs/some", {name: condition_of(name)}, [0], {})


def test_a_study_of_some_categories_is_made_from_these(home):
    dress, every = (train_config(dict(method="info_nce", dataset="fashioniq", size="smoke", categories=some)) for some in ("dress", ""))
    assert made_now(dress)["annotations"] != made_now(every)["annotations"] and made_now(dress)["encoder"] == made_now(every)["encoder"]
    assert parameters(dress)["categories"] == "dress" and "start_from" not in parameters(dress)


@given(st.lists(st.lists(st.floats(10, 90), min_size=2, max_size=5), min_size=1, max_size=5), st.floats(-9, 9))
def test_a_repeated_study_is_judged_by_the_spread_of_the_record(values, moved):
    runs = [dict(condition=str(i), seed=seed, metrics={"mAP": value}) for i, some in enumerate(values) for seed, value in enumerate(some)]
    record = {"conditions": {str(i): {} for i in range(len(values))}, "runs": runs}
    spread = seed_spread(runs)
    assert spread**2 == pytest.approx(sum((len(some) - 1) * statistics.variance(some) for some in values) / sum(len(some) - 1 for some in values), abs=1e-6)
    ours = record | {"runs": [dict(run, metrics={"mAP": run["metrics"]["mAP"] + moved}) for run in runs if run["seed"] == 0]}
    rows, words = against_table(ours, record)
    *each, mean = rows.values()
    if abs(abs(moved) - 2 * spread) > 1e-6: assert all((row["verdict"] == "**differs**") == (abs(moved) > 2 * spread) for row in each)
    assert f"{2 * spread:.2f} points of mAP are tolerated" in words and len(each) == len(values) and "difference" in mean


def test_a_run_that_two_studies_ask_for_is_made_once(tmp_path):
    on_val = train_config({"method": "info_nce", **SMOKE, "epochs": 1, "evaluate_every": 0})
    on_dev = dataclasses.replace(on_val, evaluate_on="dev")
    first, = run_study([Job(str(tmp_path), "info_nce-common", on_dev)], 1)
    weights = tmp_path / "info_nce-common-seed0" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    second, other = run_study([Job(str(tmp_path), "info_nce", on_dev), Job(str(tmp_path), "val", on_val)], 1)
    assert second == first | {"condition": "info_nce"} and weights.stat().st_mtime_ns == written
    assert other["split"] == "val" and other["metrics"] != first["metrics"]
    assert (tmp_path / "info_nce-seed0" / QUERIES).read_bytes() == (tmp_path / "info_nce-common-seed0" / QUERIES).read_bytes()
    mean = query_values(tmp_path, "info_nce", [0]).mean().item()
    assert mean == pytest.approx(first["metrics"]["mAP"], abs=1e-3)


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
