"Full-size BLIP-2. `pytest -m slow tests/test_full_size.py` builds and steps it; the default run looks at the committed record."
import json
import math

import pytest
from full_size import ROOT, TOWERS, alone

EXPECTED = {"vit_g": dict(tokens=[257, 1408], least=1.15e9), "vit_l": dict(tokens=[257, 1024], least=0.46e9)}


def check(tower, figures):
    "What any run at full size must show."
    assert figures["tokens"] == EXPECTED[tower]["tokens"]
    assert EXPECTED[tower]["least"] < sum(figures["parameters"].values()) < 1.05 * EXPECTED[tower]["least"]
    assert figures["peak_memory_GiB"]["in all"] < 12
    assert 0 < figures["loss"] < 20 and figures["trained_tensors"] == 336
    # info_nce reads no word states of the last layer: the two biases and the norm of its feed-forward for words get no gradient and no decay
    assert figures["trained_tensors_moved"] == figures["trained_tensors"] - 4
    assert len(figures["scores"]) == 2 and all(len(row) == 4 and all(math.isfinite(score) and abs(score) <= 1.001 for score in row) for row in figures["scores"])


@pytest.mark.slow
@pytest.mark.parametrize("tower", TOWERS)
def test_full_size_model_trains_and_answers(tower): check(tower, alone(tower))


@pytest.mark.parametrize("tower", TOWERS)
def test_record(tower):
    record = json.loads((ROOT / "data" / "results" / "full-size.json").read_text())
    assert record["command"] == "python tests/full_size.py" and {"torch", "transformers", "commit", "time"} <= set(record["environment"])
    check(tower, record["towers"][tower])
    assert all(seconds > 0 for seconds in record["towers"][tower]["seconds"].values())
