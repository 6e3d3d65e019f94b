"The two benches at tiny size: everything runs, the record is whole, and the guard notices what became worse. Nothing is asserted of time."
import copy
import json
import os

import pytest
import torch

from helpers import ROOT
from step_seconds import CASES, Listed, products_of

from dqe_cir.studies import bench, bench_gpu

ABOUT = {"torch", "commit", "time"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    "The record of `make bench ARGS=--quick`, measured once."
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    assert bench_gpu.main(["bench", "--quick", "--record", str(path)]) == 0
    return path


def test_every_part_is_measured(quick):
    record = json.loads(quick.read_text())
    assert {row["part"] for row in record["rows"]} == set(bench.PARTS) and record["command"] == 'make bench ARGS="--quick"'
    assert all(row["seconds"] > 0 and row["floor"] > 0 and row["GiB"] >= 0 for row in record["rows"])
    assert ABOUT | {"cores", "load"} <= set(record["environment"])
    assert [found["case"] for found in record["growth"]] == ["TRNS"]


def changed(path, folder, factor):
    "The same record with every ratio multiplied, as a file."
    record = json.loads(path.read_text())
    for row in record["rows"]: row.update(ratio=row["ratio"] * factor, seconds=1.0)
    other = folder / f"times {factor}.json"
    other.write_text(json.dumps(record))
    return other


def test_the_guard_names_what_became_worse(quick, tmp_path, monkeypatch, capsys):
    rows = json.loads(quick.read_text())["rows"]
    slow = copy.deepcopy(rows)
    slow[-1] |= {"ratio": 2 * slow[-1]["ratio"], "seconds": 1.0}
    monkeypatch.setattr(bench, "measure", lambda plan, progress: slow)
    assert bench_gpu.main(["bench", "--quick", "--against", str(quick)]) == 1
    *_, last = capsys.readouterr().out.strip().splitlines()
    assert last.startswith("worse: search: one at a time, N=100 T=1: ") and "of its floor, was" in last
    assert bench_gpu.main(["bench", "--quick", "--against", str(quick), "--tolerance", "1.5"]) == 0
    assert bench_gpu.main(["bench", "--quick", "--against", str(changed(quick, tmp_path, 3))]) == 0


@pytest.mark.parametrize("content", ["{}", "[]", '{"rows": [{"part": "step"}]}', "{"])
def test_another_file_is_no_record(content, tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert bench_gpu.main(["bench", "--against", str(path)]) == 1
    said = capsys.readouterr().err
    assert "other.json" in said and "--record FILE" in said and said.count("\n") == 1


def ended(*row): os._exit(1)


def test_a_row_whose_process_is_ended_is_named(monkeypatch):
    "As the system ends one that wants too much memory."
    monkeypatch.setattr(bench, "in_process", ended)
    row = bench.Row("search", "one at a time", {"N": 100, "T": 1})
    with pytest.raises(RuntimeError, match="^search: one at a time, N=100 T=1: its process was ended"): bench.measure([row], progress=False)


def test_projection_of_the_small_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "gpu.json"
    assert bench_gpu.main(["bench-gpu", "--encoders", "mini", "--record", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["projected"] is True and record["command"] == 'make bench-gpu ARGS="--encoders mini"' and ABOUT <= set(record["environment"])
    assert set(record["towers"]["mini"]["run"]["seconds"]) == {"encoding", "steps", "refreshes", "evaluations"}
    assert bench_gpu.main(["bench-gpu", "--encoders", "vit_x"]) == 1


def test_measurement_on_a_device_at_tiny_size():
    "What runs where there is a card, here on the CPU."
    found = bench_gpu.measurement(("mini",), torch.device("cpu"), share=0.0005, steps=2, size=64, batches=(4,))
    tower = found["towers"]["mini"]
    assert found["projected"] is False and [pace["batch"] for pace in tower["steps"]] == [4]
    assert set(tower["run"]["seconds"]) == {"loading", "encoding", "steps", "refreshes", "evaluations"}
    assert all(set(spent) == {"seconds", "CPU seconds", "GiB"} for spent in tower["rehearsal"].values())
    assert "measured" in bench_gpu.run_table(found).data and "PROJECTED" not in bench_gpu.run_table(found).data


def test_committed_records():
    record = bench.read_bench(ROOT / "data" / "results" / "bench.json")
    assert {row["part"] for row in record["rows"]} == set(bench.PARTS) and ABOUT <= set(record["environment"])
    for name, projected in (("bench-gpu", False), ("bench-gpu-projected", True)):
        found = json.loads((ROOT / "data" / "results" / f"{name}.json").read_text())
        assert set(found["towers"]) == {"mini", "vit_l", "vit_g"} and found["projected"] is projected


def test_a_whole_run_at_real_size_was_measured_on_a_processor():
    found = json.loads((ROOT / "data" / "results" / "rehearsal.json").read_text())
    assert found["command"] == 'make bench-gpu ARGS="--encoders mini --device cpu"' and not found["projected"] and found["share"] == 1
    told = found["towers"]["mini"]["rehearsal"]
    assert set(told) == {"writing", "loading", "encoding", "steps", "refreshes", "evaluations"}
    assert max(spent["GiB"] for spent in told.values()) < 6 and ABOUT <= set(found["environment"])


def test_steps_were_measured_beside_their_products():
    found = json.loads((ROOT / "data" / "results" / "step-seconds.json").read_text())
    assert [row["case"] for row in found["rows"]] == [*CASES] and ABOUT <= set(found["environment"])
    for row in found["rows"]:
        for kind in ("cached", "pictures in"): assert row[kind]["floor"] < row[kind]["products"] < row[kind]["seconds"]
        assert row["cached"]["flop"] < row["pictures in"]["flop"]


def test_adamw_was_measured_by_itself_in_both_forms():
    found = json.loads((ROOT / "data" / "results" / "step-seconds.json").read_text())["AdamW"]
    assert found["case"] in CASES and 0 < found["share that differs"] < 1e-3 and found["weights"] > 10**7
    assert found["fused ms"] < found["usual ms"]


def test_searches_beyond_memory_were_measured_and_are_told():
    found = json.loads((ROOT / "data" / "results" / "search-times.json").read_text())
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert ABOUT <= set(found["environment"]) and len(found["rows"]) == 4
    for row in found["rows"]:
        assert row["same ten pictures"] and len({row[way].get("answers") for way in ("in memory", "in its file", "qdrant")}) == 1
        if row["pictures"] < 10**6: continue
        for way, stored in (("in memory", "written"), ("in its file", "written"), ("qdrant", "qdrant")):
            told, kept = row[way], row[stored]
            highest = max(told["peak GiB"], told.get("peak GiB while writing", 0))
            line = f"| {row['pictures']:,} x {row['vectors']} x {row['numbers']} | {way} | {told['query ms']:.0f} | {kept['MB']:,.0f} | {kept['write s']:.0f} | {highest:.1f} |"
            assert line in text, line
        assert f"{row['added']['add 1,000 s']:.0f} s ({row['added']['its embeddings s']:.1f} s" in text
    assert found["rows"][-1]["qdrant"]["answers"], "of the largest gallery all twenty queries are known"


def test_products_are_taken_again_in_their_shapes():
    one, other = torch.randn(3, 4), torch.randn(5, 4)
    work = lambda: torch.addmm(torch.zeros(5), one @ torch.eye(4), other.T)
    again = products_of(work)
    with Listed() as listed: again()
    assert [[shape for shape, _ in operands] for _, operands in listed.found] == [[(3, 4), (4, 4)], [(5,), (3, 4), (4, 5)]]
    assert bench.count_flop(again) == bench.count_flop(work) == 2 * 3 * 4 * 4 + 2 * 3 * 4 * 5


def test_figures_of_the_performance_page_are_those_of_the_records():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    now, then = (bench.read_bench(ROOT / "data" / "results" / name)["rows"] for name in ("bench.json", "tried/bench-before.json"))
    was = {bench.name_of(row): row for row in then}
    shown = 0
    for row in now:
        old, sizes = was[bench.name_of(row)], ", ".join(f"{letter} {number:,}" for letter, number in row["sizes"].items())
        shown += (f"| {row['part']}: {row['case']}, {sizes} | {old['seconds']:.4g} | {row['seconds']:.4g} | {old['ratio']:.1f} | {row['ratio']:.1f} |") in text
        if row["part"] != "step" or row["sizes"] != {"B": 64}: continue
        method, *more = row["case"].split(", ")
        assert f"| {', '.join([f'`{method}`', *more])} | {1000 * row['seconds']:.0f} | {row['ratio']:.1f} |" in text
    assert shown == text.count("| refresh: ") + text.count("| search: ") > 0
