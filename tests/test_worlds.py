"Both drawn worlds side by side: claims, verdicts and the page, on small records that are made here."
import ast
import json
import math
import re

import pytest
from hypothesis import given, strategies as st

from helpers import ROOT

from dqe_cir.data.datasets import SPECS
from dqe_cir.studies.ablation import CONDITIONS, difference_of, interval, read_study
from dqe_cir.studies.tables import CLAIMS, claims_figure, claims_table, differences_by_world, evidence_command, evidence_name, evidences, hardness
from dqe_cir.studies.tables import parting, partings, points_of, points_table, subset_table, where_it_holds, worlds

MEANS = {"garments": dict(info_nce=70, dqe_cir=80, paper=50, trns=66, random=64, hardest=66, qure=58, hand_lists=80, sprc=71),
         "scenes": dict(info_nce=40, dqe_cir=46, paper=44, trns=30, random=30, hardest=33, qure=29, hand_lists=46, sprc=44)}
POINTS = {name: {"mAP": value, "R@10": value / 2, "Rs@1": 20 + value} for name, value in
          {"image only": 6, "text only": 9, "late fusion": 17, "joint, untrained": 4, "oracle": 100, "chance": 1}.items()}


def record(world, seeds=5, points=True, **means):
    "A record of evidence as `ablate` writes it; the seeds of a condition wobble by its place in the list."
    runs = [dict(condition=name, seed=seed, commit="abc", metrics={"mAP": mean + wobble(place, seed), "R@10": mean / 2, "Rs@1": 50 + mean / 10 + wobble(place, seed),
                                                                   "Rs@2": 70.0, "Rs@3": 80.0, "confused": None})
            for place, (name, mean) in enumerate((means or MEANS[world]).items()) for seed in range(seeds)]
    made = dict(command=f"papermill nbs/ablate.ipynb out.ipynb -p dataset {world}", data=world, split="val", environment={"commit": "abc", "time": "2026"},
                conditions={name: CONDITIONS[name] for name in means or MEANS[world]}, runs=runs)
    return made | ({"reference points": POINTS} if points else {})


def wobble(place, seed): return 0.3 * ((3 * place + 7 * seed) % 5 - 2)


@pytest.fixture
def results(tmp_path, monkeypatch):
    "A checkout with nothing but a folder for records."
    folder = tmp_path / "data" / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr("dqe_cir.studies.ablation.checkout", lambda: tmp_path)
    return folder


def keep(folder, name, made): (folder / f"{name}.json").write_text(json.dumps(made))


def page():
    "Execute the code cells of nbs/worlds.ipynb here; what they show, as text."
    cells = json.loads((ROOT / "nbs" / "worlds.ipynb").read_text())["cells"]
    space, told = {}, []
    for source in ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]:
        tree = ast.parse(re.sub(r"^#\|.*$", "", source, flags=re.M))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), space)
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), space) if last else None
        if value is not None: told.append(value.data if isinstance(getattr(value, "data", None), str) else value.to_json())
    return "\n\n".join(told)


# ---- verdicts

@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(0.1, 5)), min_size=2, max_size=2))
def test_a_verdict_is_what_the_two_intervals_say(pairs):
    "A twin in four lines: where the interval lies above 0, where below it."
    found = dict(zip(("garments", "scenes"), pairs))
    up, down = ([name for name, (mean, half) in found.items() if sign * mean - half > 0] for sign in (1, -1))
    expected = "**opposite**" if up and down else "holds on both" if len(up) == 2 else f"on {up[0]} only" if up else "on neither"
    assert where_it_holds(found).removesuffix(", and below on both") == expected
    assert where_it_holds(found).endswith("below on both") == (len(down) == 2)


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(0.1, 5)), min_size=2, max_size=2))
def test_worlds_part_in_the_verdict_or_by_more_than_both_intervals(pairs):
    found = dict(zip(("garments", "scenes"), pairs))
    (a, p), (b, q) = pairs
    verdicts = [(mean > half) - (mean < -half) for mean, half in pairs]
    far = abs(a - b) > math.hypot(p, q)
    said = parting(("x", "y"), found)
    assert bool(said) == (far or verdicts[0] != verdicts[1])
    assert ("more than both intervals explain" in said) == far and ("cannot be told apart" in said) == (bool(said) and not far)
    assert parting(("x", "y"), dict(reversed(found.items()))) != "" if said else True, "the order of the worlds does not matter"


def test_a_claim_is_about_conditions_and_every_world_can_run_them():
    assert {name for pair in CLAIMS for name in pair} <= set(CONDITIONS)
    assert len({evidence_name(world) for world in worlds()}) == len(worlds()), "a record for each"
    for world in worlds():
        assert SPECS[world].word_lists, f"hand_lists cannot be run on {world}"
        words = evidence_command(world).split()
        named = words[words.index("conditions") + 1].split(",")
        assert set(named) == {name for pair in CLAIMS for name in pair} and named[0] == "info_nce" and f"data/results/{evidence_name(world)}.json" in words


def test_differences_are_paired_by_seed():
    study = record("scenes")
    runs = {(run["condition"], run["seed"]): run["metrics"]["mAP"] for run in study["runs"]}
    for pair, found in differences_by_world({"scenes": study}).items():
        assert found["scenes"] == pytest.approx(interval([runs[pair[0], seed] - runs[pair[1], seed] for seed in range(5)]))
    alone = [run for run in study["runs"] if run["seed"] == 0]
    assert difference_of(alone, "trns", "random") is None and difference_of([], "trns", "random") is None
    assert not any(differences_by_world({"scenes": None})[pair]["scenes"] for pair in CLAIMS)


def test_one_world_alone_never_holds_on_both():
    told = claims_table({"scenes": record("scenes")}).data
    assert "holds on scenes" in told and "undecided on scenes" in told and "both" not in told and "neither" not in told


# ---- the page

def test_the_page_on_two_small_records(results):
    for world in MEANS: keep(results, evidence_name(world), record(world))
    studies, told = evidences(), page()
    assert all(studies.values()) and "ot run" not in told
    verdicts = dict(re.findall(r"^\| [^|]+: (`\w+` above `\w+`) \|.*\| ([^|]+) \|$", claims_table(studies).data, re.M))
    assert verdicts["`dqe_cir` above `info_nce`"] == "holds on both" and verdicts["`paper` above `info_nce`"] == "**opposite**"
    assert verdicts["`trns` above `random`"] == "on garments only" and verdicts["`sprc` above `info_nce`"] == "holds on both"
    assert verdicts["`hand_lists` above `dqe_cir`"] == "on neither" and verdicts["`trns` above `qure`"] == "holds on both"
    points = {world: points_of(world, study) for world, study in studies.items()}
    for part in (claims_table(studies), partings(studies), points_table(studies, points), hardness(studies, points), subset_table(studies["scenes"])): assert part.data in told
    assert "| image only | 6.0 | 3.0 | 6.0 | 3.0 | 26.0 |" in told and f"8 of 8 claims were run on both; *holds on both*: {[*verdicts.values()].count('holds on both')}." in told
    assert len(claims_figure(studies).data) == 2 * len(CLAIMS) and told.count("Rs@1") > 3


def test_the_page_without_any_record_says_how_to_make_them(results):
    told = page()
    for world in worlds(): assert f"**Not run**: `{evidence_command(world)}`" in told
    assert told.count("not run on garments and scenes") == len(CLAIMS) and "0 of 8 claims were run on both" in told
    assert "garments: **not run**" in told and "no world with groups has a record" in told


def test_the_page_with_one_record_says_what_is_missing(results):
    keep(results, "evidence", record("garments", points=False))
    keep(results, "a-run", dict(data="garments", split="val", method="info_nce", encoder="mini", reference_points={"late fusion": {"mAP": 17.8, "R@10": 25.0}}, environment={"time": "2026"}))
    told = page()
    assert "holds on garments, not run on scenes" in told and "reversed on garments, not run on scenes" in told and "undecided on garments" in told
    assert evidence_command("scenes") in told and "| late fusion | 17.8 | 25.0 | – | – | – |" in told
    assert 0.5 < points_of("garments", None)["chance"]["mAP"] < 5, "lots are drawn where the record has none"


def test_the_pages_own_records_are_those_of_the_repository():
    "What is committed is what the records say now."
    cells = json.loads((ROOT / "nbs" / "worlds.ipynb").read_text())["cells"]
    shown = "".join("".join(output.get("data", {}).get("text/markdown", "")) for cell in cells for output in cell.get("outputs", []))
    assert claims_table(evidences()).data in shown and partings(evidences()).data in shown, "execute nbs/worlds.ipynb again"
    if read_study("evidence_scenes"): assert read_study("evidence_scenes")["data"] == "scenes"


def test_the_claims_in_the_readme_are_the_records():
    studies, text = evidences(), (ROOT / "README.md").read_text()
    if not all(studies.values()): pytest.skip("a world has no record: README says so")
    told = [line for line in claims_table(studies).data.splitlines() if line.startswith("|")]
    assert len(told) == len(CLAIMS) + 2 and all(line in text for line in told)
    reached = [run["metrics"]["mAP"] for run in studies["scenes"]["runs"] if run["condition"] == "info_nce"]
    assert f"`info_nce` {sum(reached) / len(reached):.1f} ± " in text
