"Malformed data sets of every kind are refused in one line that says where, harmless ones are read as before, and nothing hangs. `-m slow` tries all cases, here it is a sample."
import random
from collections import Counter

import pytest

from faults import tables
from faults.datasets import cases
from faults.frame import check, verdict

LIGHT = list(cases(0, ("fashioniq", "cirr", "circo", "hp_fashioniq")))  # drawing the garments takes longer than all else


def test_there_are_enough_cases_of_each_kind():
    counts = Counter(case.kind for case in LIGHT)
    assert min(counts.values()) >= 20 and len(counts) == 5 and len({case.name for case in LIGHT}) == len(LIGHT)


@pytest.mark.parametrize("case", random.Random(0).sample(LIGHT, 25), ids=lambda case: case.name)
def test_a_sample(case, tmp_path): assert check(case, tmp_path) == "held"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_every_case(seed, tmp_path):
    found = {}
    for i, case in enumerate(cases(seed)):
        (tmp_path / str(i)).mkdir()
        found[case.name] = check(case, tmp_path / str(i))
    assert not {name: verdict for name, verdict in found.items() if verdict != "held"}


TABLES = list(tables.cases(0))


def test_there_are_enough_tables():
    assert len(TABLES) >= 60 and len({case.name for case in TABLES}) == len(TABLES)


@pytest.mark.parametrize("case", random.Random(0).sample(TABLES, 20), ids=lambda case: case.name)
def test_a_table(case, tmp_path): assert verdict(case, tmp_path) == "held"
