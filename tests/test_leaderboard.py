"The leaderboard: equal budgets, rates read from a record, cells that equal a loop over the runs."
import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqe_cir.studies.ablation import best_rates, kind_of, outcome, run_study, search_table, study_record, values_of
from dqe_cir.studies.leaderboard import BOARDS, FURTHER, SMALL, VERDICTS, at_the_edge, board_pairs, chosen_rates, compare_jobs, difference
from dqe_cir.studies.leaderboard import further_rates, leaderboard_config, leaderboard_table, on_board, ordered, reading, row_name, rows_of
from dqe_cir.studies.leaderboard import run_search, search_jobs, split_row, whose
from dqe_cir.methods import METHODS
from dqe_cir.trainer import train_config

RATES = st.sampled_from((1e-4, 5e-4, 1e-3, 2e-3))


def search_record(tried):
    named = {f"{row}-at-{lr:g}": (lr, value) for (row, lr), value in tried.items()}
    return dict(conditions={name: dict(lr=lr) for name, (lr, _) in named.items()}, runs=[dict(condition=name, seed=0, metrics={"mAP": v}) for name, (_, v) in named.items()])


def board_of(values, **cost):
    runs = [dict(condition=name, seed=seed, metrics={"mAP": value}, **cost) for name, some in values.items() for seed, value in enumerate(some)]
    return dict(conditions={name: dict(lr=1e-3) for name in values}, runs=runs)


@given(st.dictionaries(st.tuples(st.sampled_from(("a-own", "b-own", "b-common")), RATES), st.integers(0, 100).map(float), min_size=1))
def test_the_best_rate_is_the_best(tried):
    for row, best in best_rates(search_record(tried)).items():
        rates = {lr: value for (name, lr), value in tried.items() if name == row}
        assert rates[best] == max(rates.values()) and all(rates[lr] < rates[best] for lr in rates if lr < best)
        assert (row in at_the_edge(search_record(tried))) == (best in (min(rates), max(rates)))
    assert sum(map(len, search_table(search_record(tried)).values())) == len(tried)


@given(st.floats(-12, -4), st.floats(0, 3))
def test_the_search_goes_on_until_the_best_lies_inside(peak, noise):
    "A hill over the logarithm of the rate, wherever its top is."
    tried = {("a-own", 2e-3 * factor): None for factor in (0.5, 1, 1.5)}
    for _ in range(40):
        tried = {(row, lr): -abs(math.log(lr) - peak) for row, lr in tried}
        more = further_rates(search_record(tried), started=3)
        if not more: break
        tried |= dict.fromkeys(more)
    inside = not at_the_edge(search_record(tried))
    assert len(tried) <= 3 + FURTHER and (inside or len(tried) == 3 + FURTHER)
    assert inside or not math.log(2.5e-4) < peak < math.log(1e-2)


def test_every_row_gets_the_same_budget():
    config = leaderboard_config({"factors": "0.5,1"})
    jobs = search_jobs(config)
    assert {split_row(row)[0] for row in rows_of(config)} == {*METHODS, "readings"}
    for row, changes in rows_of(config).items():
        mine = [job for job in jobs if job.condition.startswith(f"{row}-at-")]
        assert [job.config.lr for job in mine] == [train_config(changes).lr * factor for factor in (0.5, 1)]
        assert all(kind_of(job.config) == row for job in mine)
    assert len({(job.config.epochs, job.config.batch_size, job.config.seed, job.config.evaluate_on) for job in jobs}) == 1
    assert len({job.folder for job in jobs}) == len(jobs)


def test_the_common_recipe_is_common():
    "On the common board a switch has one value, or the method does not read it; on the own board they differ."
    configs = {row: job.config for row, job in zip(rows_of(leaderboard_config({})), compare_jobs(leaderboard_config({"rates": "preset", "seeds": "0"})))}
    for board in BOARDS:
        rows = [config for row, config in configs.items() if split_row(row)[1] == board]
        captions = {config.captions for config in rows}
        assert (captions == {"both"}) == (board == "common")


def test_lr_moves_the_start_of_the_search():
    jobs = search_jobs(leaderboard_config({"conditions": "cosmo", "boards": "own", "lr": 1e-3}))
    assert [job.config.lr for job in jobs] == pytest.approx([5e-4, 1e-3, 1.5e-3])
    assert chosen_rates(leaderboard_config({"conditions": "cosmo", "lr": 1e-3, "rates": "preset"})) == {"cosmo-own": 1e-3, "cosmo-common": 1e-3}


def test_search_and_comparison_go_on_and_leave_records(tmp_path):
    config = leaderboard_config({**SMALL, "conditions": "info_nce", "boards": "common", "seeds": "0,1", "study": str(tmp_path), "rates": str(tmp_path / "rates.json")})
    with pytest.raises(ValueError, match="no learning rate for info_nce-common: run -p stage search first"): compare_jobs(config)
    searched = study_record(config, run_search(config), "leaderboard", pairs=[])
    config.rates_path.write_text(json.dumps(searched))
    assert searched["split"] == "dev" and searched["command"].startswith("papermill nbs/leaderboard.ipynb out.ipynb -p conditions info_nce")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    board = study_record(config, run_study(compare_jobs(config), 1), "leaderboard", board_pairs(config))
    assert board["split"] == "val" and {run["seed"] for run in board["runs"]} == {0, 1}
    assert board["conditions"]["info_nce-common"]["lr"] == best_rates(searched)["info_nce-common"]
    assert all(path.stat().st_mtime_ns == time for path, time in written.items()) and len(written) == 2  # the only rate, with both seeds
    for run in board["runs"]: assert run["cost"]["CPU seconds per epoch"] > 0 and run["cost"]["trained parameters"] > 100_000


ROWS = st.sampled_from([row_name(name, board) for name in ("info_nce", "cosmo", "sprc", "qure") for board in BOARDS])


@given(st.dictionaries(ROWS, st.lists(st.floats(1, 99), min_size=3, max_size=3), min_size=1))
def test_rows_are_in_order_and_say_what_the_runs_say(values):
    board = board_of(values)
    rows, columns = leaderboard_table(board)
    assert list(rows) == ordered(board) and set(rows) == {split_row(row)[0] for row in values}
    for which in BOARDS:
        means = [statistics.mean(values[row]) for row in on_board(board, which).values()]
        assert means == sorted(means, reverse=True)
    for name, row in rows.items():
        assert row["s per epoch"] is row["MiB"] is None
        for which in BOARDS:
            mine = values.get(row_name(name, which))
            if mine is None: assert f"{which} recipe" not in row; continue
            assert row[f"{which} recipe"].strip("*") == f"{statistics.mean(mine):.1f} ± {statistics.stdev(mine):.1f}"
            assert (row[f"{which} difference"] is None) == (name == "info_nce" or row_name("info_nce", which) not in values)
        assert (row["recipe is worth"] is None) == (len({*values} & {row_name(name, which) for which in BOARDS}) < 2)


@given(st.dictionaries(ROWS, st.lists(st.floats(1, 99), min_size=3, max_size=3), min_size=8))
def test_whose_a_difference_is_follows_from_both_intervals(values):
    board = board_of(values)
    for name in ("cosmo", "sprc", "qure"):
        verbs = tuple(outcome(*difference(board, row_name(name, which), row_name("info_nce", which))) for which in BOARDS)
        assert VERDICTS[verbs] in whose(board, name)
        assert ("method's" in whose(board, name)) == (verbs[0] == verbs[1] != "ties with")


def test_the_reading_calls_a_tie_a_tie():
    said = reading(board_of({"info_nce-own": (60.0, 61.0, 62.0), "info_nce-common": (60.0, 61.0, 62.0), "cosmo-own": (50.5, 50.9, 52.4), "cosmo-common": (60.5, 60.9, 62.4),
                             "sprc-own": (70.0, 71.1, 72.2), "sprc-common": (70.0, 71.1, 72.2)})).data
    assert "`cosmo`: **the recipe's**: below with its own recipe, a tie with the common one" in said and "`sprc`: **the method's**: above on both boards" in said
    assert "With the common recipe the highest mean is that of `sprc`. It is told apart from `cosmo`, `info_nce`." in said
    assert "The common recipe helps `cosmo`; makes no difference that can be told to `sprc`, `info_nce`." in said
    alone = reading(board_of({"cosmo-own": (50.0,), "info_nce-own": (60.0,)})).data
    assert "`cosmo`: no interval, no finding." in alone and "It is told apart from none of the others" in alone


@given(st.floats(-9, 9), st.floats(0, 9))
def test_a_verdict_is_a_win_only_where_the_interval_leaves_out_0(mean, half):
    low, high = mean - half, mean + half
    assert outcome(mean, half) == ("is above" if low > 0 else "is below" if high < 0 else "ties with")


def test_costs_of_older_records_are_missing_and_not_zero():
    board = board_of({"info_nce-common": (60.0, 61.0)})
    assert values_of(board["runs"], "info_nce-common", "mAP") == {0: 60.0, 1: 61.0}
    assert leaderboard_table(board)[0]["info_nce"]["parameters"] is None
    assert leaderboard_table(board_of({"info_nce-common": (60.0, 61.0)}, cost={"trained parameters": 12345}))[0]["info_nce"]["parameters"] == "12,345"
