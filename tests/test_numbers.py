"Every number of the README's results table is the mean of the records it names."
import itertools
import json
import re
import statistics

import pytest

from helpers import ROOT

from dqe_cir.studies.ablation import CONDITIONS, paired
from dqe_cir.studies.leaderboard import at_the_edge, leaderboard_config, leaderboard_table, rows_of

RESULTS = ROOT / "data" / "results"


def records(pattern):
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]
    assert found, f"no record fits {pattern}"
    return found


def rows():
    "Rows `| system | R@1 | ... | records |` of the README's results table, as (system, metric names, cells, record pattern)."
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| system |"))
    names = [cell.strip() for cell in lines[start].strip("|").split("|")]
    for line in lines[start + 2:]:
        if not line.startswith("|"): return
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        yield cells[0], names[1:-1], cells[1:-1], cells[-1].strip("`")


@pytest.mark.parametrize("system, names, cells, pattern", list(rows()), ids=lambda value: value if isinstance(value, str) else "")
def test_readme_figures_have_records(system, names, cells, pattern):
    found = records(pattern)
    assert all(record["data"] == "garments" and record["split"] == "val" for record in found)
    for name, cell in zip(names, cells, strict=True):
        values = [record["metrics"] if system == record["method"] else record["reference_points"][system] for record in found]
        values = [metrics[name] for metrics in values]
        mean = sum(values) / len(values)
        stated = re.match(r"([\d.]+)(?: ± ([\d.]+))?$", cell)
        assert float(stated[1]) == round(mean, 1), (system, name, mean)
        if stated[2]: assert float(stated[2]) == round((sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5, 1), (system, name)


def study(name):
    path = RESULTS / f"{name}.json"
    if not path.exists(): pytest.skip(f"{name} is not run with this code: README says so")
    return json.loads(path.read_text())


# ---- the records of the studies

@pytest.mark.parametrize("name", ["evidence", "leaderboard", "learning_rates", "uneven", "search"])
def test_a_study_is_of_committed_code(name):
    if not (RESULTS / f"{name}.json").exists(): pytest.skip(f"{name} was not run")
    commits = {run["commit"] for run in study(name)["runs"]}
    assert all(re.fullmatch(r"[0-9a-f]{12}", str(commit)) for commit in commits), commits


def test_every_condition_was_run_with_five_seeds_or_is_said_not_to_be():
    seeds, text = {}, (ROOT / "README.md").read_text()
    for run in study("evidence")["runs"]: seeds.setdefault(run["condition"], set()).add(run["seed"])
    assert seeds == dict.fromkeys(seeds, set(range(5))) and seeds.keys() <= CONDITIONS.keys()
    absent = [name for name in CONDITIONS if name not in seeds]
    if absent: assert f"{len(absent)} of {len(CONDITIONS)} conditions are not run" in text, absent


def test_every_row_of_the_leaderboard_was_run_with_five_seeds_at_a_rate_inside_its_range():
    board, search, seeds = study("leaderboard"), study("learning_rates"), {}
    for run in board["runs"]: seeds.setdefault(run["condition"], set()).add(run["seed"])
    assert seeds == dict.fromkeys(rows_of(leaderboard_config({})), set(range(5)))
    assert not at_the_edge(search)


@pytest.mark.parametrize("name", ["evidence", "leaderboard"])
def test_intervals_over_queries_belong_to_the_means_over_seeds(name):
    "One average precision per query, seed and condition, averaged in two orders."
    record, pairs = study(name), 0
    for baseline, row in record["over queries"].items():
        for condition, (mean, half) in row.items():
            assert mean == pytest.approx(paired(record["runs"], condition, baseline)[0], abs=0.01) and half > 0
            pairs += 1
    assert pairs >= len(record["conditions"]) - 1


# ---- what the README takes from them

def test_the_leaderboard_of_the_readme_is_the_record():
    "Columns of the table in the README are columns of the leaderboard, its rows all of it, in its order."
    board, lines = study("leaderboard"), (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| method | own recipe |"))
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")]
                        for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start:])]
    table, columns = leaderboard_table(board)
    assert set(header[1:]) <= set(columns) and {"common recipe", "recipe is worth"} <= set(header)
    assert rows == [[name, *(row.get(column) or "–" for column in header[1:])] for name, row in table.items()]


TOLD = (("dqe_cir", "info_nce"), ("dqe_cir", "info_nce_watching"), ("dqe_cir", "plain_batches"), ("hand_lists", "info_nce"),
        ("two_attributes", "info_nce"), ("paper", "info_nce"), ("trns", "random"), ("trns", "in_batch"), ("trns", "hardest"), ("trns", "qure"),
        ("trns", "qure_window"))  # the pairs that the README tells


@pytest.mark.parametrize("one, other", TOLD)
def test_the_evidence_in_the_readme_is_the_record(one, other):
    record = study("evidence")
    if not {one, other} <= record["conditions"].keys(): pytest.skip(f"{one} or {other} is not run")
    mean, half, seeds = paired(record["runs"], one, other)
    assert seeds == 5 and f"{mean:+.1f} ± {half:.1f}" in (ROOT / "README.md").read_text().replace("−", "-"), (one, other, mean, half)


def test_the_baseline_at_its_other_rate_is_what_the_readme_says():
    "The rate that has the baseline's highest mean on dev, and was not chosen: the readings are above it there too."
    tried = json.loads((RESULTS / "tried" / "baseline_at_003.json").read_text())
    ours = [run for run in study("evidence")["runs"] if run["condition"] == "dqe_cir"]
    mean, half, seeds = paired(ours + tried["runs"], "dqe_cir", "info_nce")
    reached = statistics.mean(run["metrics"]["mAP"] for run in tried["runs"])
    assert seeds == 5 and {run["commit"] for run in ours + tried["runs"]} == {"7c1e7d81a736"}
    told = (ROOT / "README.md").read_text()
    assert f"reaches {reached:.1f} ± " in told and f"above that too: {mean:+.1f} ± {half:.1f}" in told


def test_what_make_train_ends_at():
    found = {record["seed"]: record for record in records("garments-dqe_cir-seed*.json")}
    assert {0, 1, 2} <= set(found)
    for seed, record in found.items():
        assert record["method"] == "dqe_cir" and record["metrics"]["mAP"] >= 66 and record["metrics"]["R@10"] >= 73, seed
    text, first = (ROOT / "README.md").read_text(), found[0]["metrics"]
    assert f"mAP {first['mAP']:.1f} and R@10 {first['R@10']:.1f} (seed 0, two threads" in text
    one = next(run["metrics"] for run in study("evidence")["runs"] if (run["condition"], run["seed"]) == ("dqe_cir", 0))
    assert f"ends at {one['mAP']:.1f} and {one['R@10']:.1f}" in text


def test_every_record_says_what_it_is():
    for record in records("garments-*.json"):
        assert {"dataset", "data", "split", "protocol", "method", "encoder", "seed", "metrics", "environment"} <= set(record)


def test_the_baseline_is_as_strong_and_the_benchmark_as_hard_as_stated():
    found = records("garments-info_nce-seed*.json")
    assert len(found) >= 3 and len({record["seed"] for record in found}) == len(found)
    mean = lambda pick: sum(pick(record) for record in found) / len(found)
    assert mean(lambda r: r["metrics"]["mAP"]) >= 55 and mean(lambda r: r["metrics"]["R@10"]) >= 70
    bars = {"image only": 10, "text only": 25, "late fusion": 30, "joint, untrained": 12}
    for name, bar in bars.items(): assert mean(lambda r: r["reference_points"][name]["mAP"]) < bar, name


# ---- faults

def test_the_readme_counts_the_faults_that_were_tried():
    record, text = json.loads((RESULTS / "faults.json").read_text()), (ROOT / "README.md").read_text()
    assert set(record["total"]) == {"held"} and record["kills"]["tried"] == record["kills"]["bit-equal"]
    assert f"tries {record['total']['held']:,} malformed" in text and f"killed {record['kills']['tried']} times" in text
    assert all(all(told.values()) for told in record["full disk"].values())
    assert re.fullmatch(r"[0-9a-f]{12}", record["environment"]["commit"])
