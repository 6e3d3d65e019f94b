"Printed figures hold together, records of any kind are read or left out with a reason, and reproduced figures are judged by rule."
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import ROOT

from dqe_cir.core import DataError, write_json
from dqe_cir.files import read_json
from dqe_cir.methods import METHODS
from dqe_cir.methods.zoo import TRAIN_FREE
from dqe_cir.studies.tables import FIELDS, averages, benchmarks, by_system, disagreements, latest, method_name, needs
from dqe_cir.studies.tables import not_run, printed_cells, read_figures, read_runs, side_by_side, verdict
from dqe_cir.trainer import train_config

CATEGORIES, KS = ("dress", "shirt", "toptee"), (10, 50)


@pytest.fixture(scope="module")
def figures(): return read_figures(ROOT / "data" / "paper_tables.csv")


@pytest.fixture(scope="module")
def paper(figures): return by_system(figures, "dqe_cir_fashioniq")


# ---- printed figures

def test_the_papers_table_is_complete(figures, paper):
    columns = {f"{name} R@{k}" for name in CATEGORIES for k in KS} | {"R@10", "R@50", "mean"}
    assert {system: set(row) for system, row in paper.items()} == dict.fromkeys(paper, columns) and len(paper) == 8
    assert {method_name(system) for system in paper} <= METHODS.keys()
    keys = [tuple(row[name] for name in ("table", "system", "dataset", "split", "metric", "backbone")) for row in figures]
    assert len(set(keys)) == len(keys) and all(0 < row["value"] <= 100 for row in figures)
    assert all(row["source"] and row["backbone"] and row["protocol"] for row in figures)


def test_exactly_one_average_does_not_follow_from_its_columns(paper):
    "Every average again, from the columns as printed, in cents so that no rounding is left to chance."
    wrong = []
    for system, row in paper.items():
        cents = {metric: round(100 * value) for metric, value in row.items()}
        sums = {k: sum(cents[f"{name} R@{k}"] for name in CATEGORIES) for k in KS}
        wrong += [(system, f"R@{k}") for k in KS if abs(cents[f"R@{k}"] - sums[k] / 3) > 1]
        wrong += [(system, "mean")] if abs(cents["mean"] - (sums[10] + sums[50]) / 6) > 1 else []
    assert wrong == [("DQE-CIR", "R@50")]
    assert disagreements(paper) == [("DQE-CIR", "R@50", 75.94, 74.94)]


def test_the_slip_is_kept_as_printed_and_noted(figures):
    [row] = [row for row in figures if row["system"] == "DQE-CIR" and row["metric"] == "R@50"]
    assert row["value"] == 75.94 and row["status"] == "printed" and "74.94" in row["note"]
    assert [row["metric"] for row in figures if "= 74.94" in row["note"]] == ["R@50"]


def test_means_on_cirr_are_means(figures):
    tower = lambda name: {row["metric"]: row["value"] for row in figures if row["table"] == "sprc_cirr" and row["backbone"] == name}
    for name in ("BLIP-2 ViT-L", "BLIP-2 ViT-g"):
        row = tower(name)
        assert row["mean"] == pytest.approx((row["R@5"] + row["Rs@1"]) / 2, abs=0.0051)


@given(st.dictionaries(st.sampled_from([f"{name} R@{k}" for name in CATEGORIES for k in KS]), st.integers(0, 10_000), min_size=6))
def test_rounded_averages_always_agree(cents):
    row = {metric: value / 100 for metric, value in cents.items()}
    assert disagreements({"any": row | {metric: round(value, 2) for metric, value in averages(row).items()}}) == []
    assert len(disagreements({"any": row | averages(row) | {"R@10": averages(row)["R@10"] + 1}})) == 1


@pytest.mark.parametrize("line, message", [
    ("t,s,fashioniq,val,R@10,fast,somewhere,b,p,,printed", "line 2: value 'fast' is not a number"),
    ("t,s,fashioniq,val,R@10,50,somewhere,b,p,,guessed", "line 2: status 'guessed' is not one of printed"),
    ("t,s,fashioniq,val,R@10,50,,b,p,,printed", "line 2: source is missing"),
    ("t,s,fashioniq,val,R@10,50,somewhere,b,p", "line 2: note is missing"),
    ("t,s,fashioniq,val,R@10,50,somewhere,b,p,,printed,more", "line 2: too many cells"),
])
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "tables.csv").write_text(",".join(FIELDS) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message): read_figures(tmp_path / "tables.csv")


# ---- records

def run(method="sprc", seed=0, **changes):
    "A record as `train` writes it."
    return dict(dataset="fashioniq", data="real", split="val", protocol="reference kept", method=method, encoder="vit-g", seed=seed,
                metrics={"R@10": 50.0, "R@50": 72.0, "mean": 61.0 + seed}, environment={"time": "2026-05-01T00:00:00Z"}) | changes


def study(time="2026-06-01T00:00:00Z", **changes):
    "A record as `ablate` writes it: one condition that is a system, one that only bears a system's name."
    conditions = {"sprc": {"method": "sprc", "dataset": "garments", "encoder": "mini", "size": "full"}, "qure": {"method": "dqe_cir", "dataset": "garments", "negatives": "qure"}}
    runs = [dict(condition=name, seed=seed, cpu_seconds=9, metrics={"mAP": 60.0 + seed, "R@10": None}) for seed in (0, 1) for name in conditions]
    return dict(command="papermill", data="garments", split="val", environment={"time": time}, conditions=conditions, runs=runs) | changes


def folder(path, **records):
    for name, record in records.items(): write_json(path / f"{name}.json", record)
    return read_runs(path)


@pytest.mark.parametrize("mean, expected", [(62.13, "OK"), (62.6, "OK"), (61.0, "near"), (63.5, "near"), (60.0, "FAIL"), (70.0, "FAIL")])
def test_a_reproduced_figure_is_judged(tmp_path, paper, mean, expected):
    runs, left_out = folder(tmp_path, one=run(metrics={"R@10": 50.0, "R@50": 72.0, "mean": mean}))
    cells = side_by_side(paper, runs)["sprc"]
    assert cells["reproduced status"] == f"reproduced, 1 seed: {expected}" == f"reproduced, 1 seed: {verdict(62.13, mean)}" and not left_out
    assert cells["reproduced mean"] == f"{mean:.1f}" and cells["paper mean"] == "62.13" and cells["garments status"] == "not run"


def test_dqe_cir_is_judged_by_what_its_columns_give(tmp_path, paper):
    "65.27 would follow from the slip; 64.77 is right."
    runs, _ = folder(tmp_path, one=run("dqe_cir", metrics={"mean": 64.77}), two=run("info_nce", metrics={"mean": 1.0}))
    table = side_by_side(paper, runs)
    assert table["dqe_cir"]["reproduced status"].endswith(": OK") and table["info_nce"]["reproduced status"] == "reproduced, 1 seed"
    assert printed_cells(paper)["DQE-CIR"]["R@50"] == table["dqe_cir"]["paper R@50"] == "75.94 (columns: 74.94)"


def test_seeds_of_one_system_are_one_cell(tmp_path, paper):
    runs, _ = folder(tmp_path, **{f"fashioniq-sprc-seed{seed}": run(seed=seed) for seed in (0, 1, 2)})
    assert side_by_side(paper, runs)["sprc"]["reproduced mean"] == "62.0 ± 1.0" and {r["record"] for r in runs} == {"fashioniq-sprc-seed*.json"}


def test_a_study_fills_garments_and_a_condition_is_no_system_for_its_name(tmp_path, paper):
    runs, _ = folder(tmp_path, study=study())
    table = side_by_side(paper, runs)
    assert table["sprc"]["garments mAP"] == "60.5 ± 0.7" and table["sprc"]["garments R@10"] == "–" and table["sprc"]["garments status"] == "garments benchmark, 2 seeds"
    assert table["qure"]["garments status"] == "not run" and table["sprc"]["reproduced status"] == "not run"


def test_the_latest_record_is_shown_and_the_others_are_kept(tmp_path):
    old, new = study("2026-06-01T00:00:00Z"), study("2026-07-01T00:00:00Z")
    for r in new["runs"]: r["metrics"]["mAP"] += 5
    runs, _ = folder(tmp_path, a_new=new, b_old=old)
    assert {r["record"] for r in latest(runs, "sprc", "garments")} == {"a_new.json"} and len(runs) == 8


def test_a_single_run_does_not_stand_for_a_system():
    "Nor does a study with uneven annotators, however new."
    base = dict(condition="sprc", method="sprc", dataset="garments", trained_on="garments", split="val", annotators="even")
    study = [base | dict(record="study.json", time="2026-01", seed=seed) for seed in range(3)]
    newer = [base | dict(record="one.json", time="2026-02", seed=0)]
    uneven = [base | dict(record="uneven.json", time="2026-03", seed=seed, annotators="uneven") for seed in range(3)]
    assert latest(study + newer + uneven, "sprc", "garments") == study and latest(newer + uneven, "sprc", "garments") == newer


def test_zero_shot_transfer_counts_on_circo_only(tmp_path):
    "A CIRR model tested on FashionIQ is not FashionIQ's row; CIRCO has no training split, so there it is."
    runs, _ = folder(tmp_path, one=run(trained_on="cirr"), two=run(dataset="circo", trained_on="cirr"), three=run(dataset="circo", trained_on="fashioniq", split="test"))
    assert not latest(runs, "sprc", "fashioniq") and len(latest(runs, "sprc", "circo")) == 1


@pytest.mark.parametrize("record, reason", [
    ([1, 2], "not a record of retrieval figures"), ({"figures": {}}, "not a record of retrieval figures"), (run(data="sample"), "data: sample"),
    (run(split="dev"), "split: dev"), (study(split="dev"), "split: dev"), (study(runs=[]), "no finished run"), (study(conditions={}), "no finished run"),
    (study(conditions={"sprc": {"method": "sprc", "dataset": "garments", "size": "smoke"}}), "no finished run of full size"),
])
def test_what_is_no_result_is_left_out_with_a_reason(tmp_path, record, reason):
    runs, left_out = folder(tmp_path, odd=record, good=run())
    assert [r["record"] for r in runs] == ["good.json"] and left_out["odd.json"].startswith(reason)


def test_uneven_annotators_are_another_benchmark(tmp_path):
    conditions = {"sprc": {"method": "sprc", "dataset": "garments", "annotators": "uneven"}}
    runs, left_out = folder(tmp_path, uneven=study(conditions=conditions))
    assert len(runs) == 2 and not left_out and not latest(runs, "sprc", "garments")


@pytest.mark.parametrize("query, point", [("image", "image only"), ("text", "text only"), ("sum", "late fusion")])
def test_zero_shot_records_are_the_reference_points_of_a_run(query, point):
    "Two ways to the same figures: an encoder as it is, evaluated for itself, and the reference points that a training run keeps."
    alone = read_json(ROOT / "data/results" / f"garments-zero_shot-{query}.json")
    beside = read_json(ROOT / "data/results/garments-info_nce-seed0.json")["reference_points"][point]
    for name in ("R@1", "R@10", "R@50", "mAP", "top-1 valid"): assert alone["metrics"][name] == pytest.approx(beside[name], abs=1e-3)
    assert alone["encoder"] == "mini" and alone["query"] == query and len(alone["environment"]["commit"]) == 12, "made from a clean commit"


def test_every_committed_record_is_read():
    runs, left_out = read_runs(ROOT / "data" / "results")
    known = {path.name for path in (ROOT / "data" / "results").glob("*.json")}
    assert left_out.keys() < known and {r["method"] for r in runs} <= {*METHODS, *TRAIN_FREE} and all(math.isfinite(r["metrics"]["R@10"]) for r in runs)
    assert latest(runs, "info_nce", "garments")


# ---- what is not run

def test_every_empty_cell_has_a_command_and_a_price(tmp_path):
    runs, _ = folder(tmp_path, one=run(), two=study())
    lines = not_run(runs)
    missing = {(dataset, method) for dataset in benchmarks() for method in METHODS} - {("fashioniq", "sprc"), ("garments", "sprc")}
    assert {(line.split(": ")[0], method) for line in lines for method in line.split(": ")[1].split(", ")} == missing
    assert all(row["command"].startswith("`papermill nbs/") and "NAME" in row["command"] and all(row.values()) for row in lines.values())


@pytest.mark.parametrize("dataset, gigabytes", [("fashioniq", 44.0), ("cirr", 13.9)])
def test_prices_follow_from_sizes(dataset, gigabytes):
    "Disk by hand: pictures x 257 x 1408 x 2 bytes. More epochs, a larger batch and negatives cost more, the small tower costs less."
    plan = lambda tower="vit_g", **changes: needs(dataset, train_config({"dataset": dataset, "encoder": "full", "method": "sprc", "batch_size": 32, **changes}), tower)
    usual = plan()
    assert usual["GB"] == pytest.approx(gigabytes, abs=0.05) and 0.3 < usual["hours"] < 2 and 10 < usual["GiB"] < 16
    assert plan(epochs=100)["hours"] > usual["hours"] and plan(batch_size=64)["GiB"] > usual["GiB"] + 3
    assert all(plan("vit_l")[name] < usual[name] for name in usual)
    small = plan(checkpointing=True)
    assert small["GiB"] < usual["GiB"] - 4 and small["hours"] > usual["hours"] and small["GB"] == usual["GB"]
    alone = needs(dataset)
    assert alone["hours"] < usual["hours"] and alone["GB"] == usual["GB"] and needs("hp_fashioniq")["hours"] < 0.05
    assert plan(method="dqe_cir")["hours"] > usual["hours"]


def test_the_page_is_executed_and_types_no_figure():
    "Every table of the committed page has its output, and no cell holds a number with decimals."
    cells = [cell for cell in json.loads((ROOT / "nbs" / "results.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells)
    digits = [token for cell in cells for token in "".join(cell["source"]).replace("(", " ").split() if token.replace(".", "", 1).isdigit() and "." in token]
    assert not digits
