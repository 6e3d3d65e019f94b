"Encoders and token stores met with faults: a seeded sample of the cases in faults/; all of them run in make test-faults."
import random

import pytest
from faults import encoders, tokens
from faults.frame import verdict

SLOW = ("full disk", "conversion", "pipe")  # want a process of their own, or time
FAST = [case for part in (encoders, tokens) for case in part.cases(0) if not any(word in (case.kind, case.name) or case.name.endswith(word) for word in SLOW)]
SAMPLE = random.Random(0).sample(FAST, 25)


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: f"{case.kind}: {case.name}")
def test_a_fault_is_named_or_borne(case, tmp_path):
    assert verdict(case, tmp_path) == "held"
