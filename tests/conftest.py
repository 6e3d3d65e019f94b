"Shared by all tests: where the yardsticks lie, one torch thread, the same hypothesis examples on every run."
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("house", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("house")

ROOT = Path(__file__).resolve().parent.parent


def yardstick(folder):
    "A function name -> path below `shared/<folder>` beside the checkout; it skips the test where that is absent."
    def find(name):
        path = ROOT.parent / "shared" / folder / name
        if not path.exists():
            pytest.skip(f"shared/{folder}/{name} is not beside this checkout")
        return path
    return find


@pytest.fixture(scope="session")
def golden():
    "golden('cirr_metrics.json') -> Path of a reference result."
    return yardstick("golden")


@pytest.fixture(scope="session")
def annotations():
    "annotations('cirr') -> Path of a data set's real annotation files (no images)."
    return yardstick("annotations")
