"Every number of the README's results table is the mean of the records it names."
import itertools
import json
import re

import pytest

from helpers import ROOT

from dqe_cir.studies.ablation import paired, values_of
from dqe_cir.studies.leaderboard import leaderboard_table
from dqe_cir.methods import METHODS

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


def test_the_leaderboard_of_the_readme_is_the_record():
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| method | mAP |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2:])
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]
    table, _ = leaderboard_table(json.loads((RESULTS / "leaderboard.json").read_text()))
    columns = ("mAP", "R@10", "R@50", "top-1 valid", "difference", "rate", "s per epoch")
    assert shown == [[name, *(row[column] or "–" for column in columns)] for name, row in table.items()]
    assert len(shown) >= 9 and {row[0] for row in shown} <= set(METHODS)


def test_the_evidence_in_the_readme_is_the_record():
    text, runs = (ROOT / "README.md").read_text(), json.loads((RESULTS / "evidence.json").read_text())["runs"]
    for one, other in (("trns", "random"), ("dqe_cir", "without_trns"), ("trns", "qure"), ("trns", "hardest"), ("dqe_cir", "info_nce"), ("dqe_cir", "info_nce_longer")):
        mean, half, seeds = paired(runs, one, other)
        assert seeds == 5 and abs(mean) > half and f"{mean:+.1f} ± {half:.1f}" in text, (one, other, mean, half)
    assert paired(runs, "dqe_cir", "without_refresh")[0] > paired(runs, "dqe_cir", "without_refresh")[1]
    for one, other in (*((f"without_{part}", "dqe_cir") for part in ("attribute_weights", "margins", "kl")), ("info_nce_and_dqe", "info_nce")):
        mean, half, _ = paired(runs, one, other)
        assert abs(mean) <= half, (one, other)
    hardest = list(values_of(runs, "hardest", "false negatives").values())
    assert f"{sum(hardest) / 5:.0f} % are in truth right answers" in text


def test_what_make_train_ends_at():
    record = json.loads((RESULTS / "garments-dqe_cir-seed0.json").read_text())
    found = record["metrics"]
    assert f"mAP {found['mAP']:.1f} and R@10 {found['R@10']:.1f} (seed 0, two threads" in (ROOT / "README.md").read_text()
    assert record["method"] == "dqe_cir" and found["mAP"] >= 55 and found["R@10"] >= 70
    runs = json.loads((RESULTS / "leaderboard.json").read_text())["runs"]
    one = next(run["metrics"] for run in runs if run["condition"] == "dqe_cir" and run["seed"] == 0)
    assert f"ends at {one['mAP']:.1f} and {one['R@10']:.1f}" in (ROOT / "README.md").read_text()


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
