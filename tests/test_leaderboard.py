"The leaderboard: equal budgets, rates read from a record, cells that equal a loop over the runs."
import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqe_cir.studies.ablation import outcome, run_study, study_record, values_of
from dqe_cir.studies.leaderboard import SMALL, at_the_edge, best_rates, chosen_rates, compare_jobs
from dqe_cir.studies.leaderboard import leaderboard_config, leaderboard_table, ordered, reading, search_jobs
from dqe_cir.studies.leaderboard import search_table
from dqe_cir.methods import METHODS
from dqe_cir.trainer import train_config

RATES = st.sampled_from((1e-4, 5e-4, 1e-3, 2e-3))


def search_record(tried):
    return dict(conditions={f"{m}-{lr:g}": dict(method=m, lr=lr) for m, lr in tried}, runs=[dict(condition=f"{m}-{lr:g}", seed=0, metrics={"mAP": v}) for (m, lr), v in tried.items()])


def board_of(values, **cost):
    runs = [dict(condition=name, seed=seed, metrics={"mAP": value}, **cost) for name, some in values.items() for seed, value in enumerate(some)]
    return dict(conditions={name: dict(method=name, lr=1e-3) for name in values}, runs=runs)


@given(st.dictionaries(st.tuples(st.sampled_from("abc"), RATES), st.integers(0, 100).map(float), min_size=1))
def test_the_best_rate_is_the_best(tried):
    for method, best in best_rates(search_record(tried)).items():
        rates = {lr: value for (name, lr), value in tried.items() if name == method}
        assert rates[best] == max(rates.values()) and all(rates[lr] < rates[best] for lr in rates if lr < best)
        assert (method in at_the_edge(search_record(tried))) == (best in (min(rates), max(rates)))
    assert sum(map(len, search_table(search_record(tried)).values())) == len(tried)


def test_every_method_gets_the_same_budget():
    jobs = search_jobs(leaderboard_config({"factors": "0.5,1"}))
    for name in METHODS:
        mine = [job for job in jobs if job.config.method == name]
        assert [job.config.lr for job in mine] == [train_config({"method": name}).lr * factor for factor in (0.5, 1)]
    assert len({(job.config.epochs, job.config.batch_size, job.config.seed, job.config.evaluate_on) for job in jobs}) == 1
    assert len({job.folder for job in jobs}) == len(jobs)


def test_lr_moves_the_start_of_the_search():
    jobs = search_jobs(leaderboard_config({"conditions": "cosmo", "lr": 1e-3}))
    assert [job.config.lr for job in jobs] == [2.5e-4, 5e-4, 1e-3, 1.5e-3]
    assert chosen_rates(leaderboard_config({"conditions": "cosmo", "lr": 1e-3, "rates": "preset"})) == {"cosmo": 1e-3}


def test_search_and_comparison_go_on_and_leave_records(tmp_path):
    config = leaderboard_config({**SMALL, "conditions": "info_nce", "seeds": "0,1", "factors": "0.5,1", "study": str(tmp_path), "rates": str(tmp_path / "rates.json")})
    with pytest.raises(ValueError, match="no learning rate for info_nce: run -p stage search first"): compare_jobs(config)
    searched = study_record(config, run_study(search_jobs(config), 1), "leaderboard")
    config.rates_path.write_text(json.dumps(searched))
    assert searched["split"] == "dev" and searched["command"].startswith("papermill nbs/leaderboard.ipynb out.ipynb -p conditions info_nce")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    board = study_record(config, run_study(compare_jobs(config), 1), "leaderboard")
    assert board["split"] == "val" and {run["seed"] for run in board["runs"]} == {0, 1}
    assert board["conditions"]["info_nce"]["lr"] == best_rates(searched)["info_nce"]
    assert study_record(config, run_study([*search_jobs(config), *compare_jobs(config)], 1))["runs"] == searched["runs"] + board["runs"]
    assert all(path.stat().st_mtime_ns == time for path, time in written.items()) and len(written) == 2
    for run in board["runs"]: assert run["cost"]["CPU seconds per epoch"] > 0 and run["cost"]["trained parameters"] > 100_000


@given(st.dictionaries(st.sampled_from(("info_nce", "cosmo", "sprc", "qure")), st.lists(st.floats(1, 99), min_size=3, max_size=3), min_size=1))
def test_rows_are_in_order_and_say_what_the_runs_say(values):
    board = board_of(values)
    rows, _ = leaderboard_table(board)
    assert list(rows) == ordered(board) and set(rows) == set(values)
    means = [statistics.mean(values[name]) for name in rows]
    assert means == sorted(means, reverse=True)
    for name, row in rows.items():
        assert row["mAP"] == f"{statistics.mean(values[name]):.1f} ± {statistics.stdev(values[name]):.1f}" and row["s per epoch"] is row["MiB"] is None
        assert (row["difference"] is None) == (name == "info_nce" or "info_nce" not in values)


def test_the_reading_calls_a_tie_a_tie():
    said = reading(board_of({"info_nce": (60.0, 61.0, 62.0), "cosmo": (60.5, 60.9, 62.4), "sprc": (70.0, 71.1, 72.2)})).data
    assert "`cosmo` **ties with** `info_nce`" in said and "`sprc` **is above** `info_nce`" in said
    assert "The highest mean is that of `sprc`. It is told apart from `cosmo`, `info_nce`." in said
    alone = reading(board_of({"cosmo": (50.0,), "info_nce": (60.0,)})).data
    assert "`cosmo` and `info_nce` share fewer than two seeds: no interval, no finding." in alone
    assert "It is told apart from none of the others" in alone


@given(st.floats(-9, 9), st.floats(0, 9))
def test_a_verdict_is_a_win_only_where_the_interval_leaves_out_0(mean, half):
    low, high = mean - half, mean + half
    assert outcome(mean, half) == ("is above" if low > 0 else "is below" if high < 0 else "ties with")


def test_costs_of_older_records_are_missing_and_not_zero():
    board = board_of({"info_nce": (60.0, 61.0)})
    assert values_of(board["runs"], "info_nce", "mAP") == {0: 60.0, 1: 61.0}
    assert leaderboard_table(board)[0]["info_nce"]["parameters"] is None
    assert leaderboard_table(board_of({"info_nce": (60.0, 61.0)}, cost={"trained parameters": 12345}))[0]["info_nce"]["parameters"] == "12,345"
