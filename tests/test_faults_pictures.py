"A seeded sample of malformed and odd pictures, folders and indexes; all of them: make test-faults."
import random

import pytest

from faults import index, pictures
from faults.frame import verdict

SLOW = {"strip", "promises too much"}


def sample(cases, count, seed):
    "Some cases of every kind, the same for a seed."
    rng = random.Random(seed)
    chosen = [case for case in cases if case.kind not in SLOW]
    return rng.sample(chosen, count)


CASES = sample(pictures.cases(0), 16, 1) + sample(index.cases(0), 9, 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_is_refused_by_name_or_read(case, tmp_path):
    assert verdict(case, tmp_path) == "held"
