"""Every method's first steps, number by number, as they were recorded in `tests/golden/losses.json`.

Moving code, renaming it or breaking its lines must not move a number. Where a number is meant to move, write the record again, read
its diff (one step a line) and say in the commit what moved it:

    python tests/test_golden_losses.py --write

The test allows for other processors. On the one that wrote the record, writing it again must change no byte of it.
"""
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from helpers import PAIRWISE

from dqe_cir.data import load_dataset
from dqe_cir.encoder import cache_tokens
from dqe_cir.evaluator import evaluate, score_dataset
from dqe_cir.methods import METHODS
from dqe_cir.trainer import build_method, fit, open_run, train_config, training_set
from dqe_cir.trainer.config import form_of

RECORD = Path(__file__).resolve().parent / "golden" / "losses.json"
CLOSE = 1e-4  # relative: another processor adds in another order; the one that wrote the record repeats it to the last digit
NEIGHBOURS = 1e-2  # relative, of mAP: two neighbours in one ranking may change places where their scores agree to the last digits

# Nine batches of 16 an epoch: 27 steps. Methods with mined negatives warm up for one epoch and mine before the others.
# The learning rate is a tenth of the preset's: at the preset's, two processors that differ in the seventh digit of the first loss
# differ in the second digit of the last. The random ResNets of the native forms are wilder still.
SMALL = {"size": "smoke", "batch_size": 16, "epochs": 3, "lr": 2e-4, "device": "cpu"}
MINES = {"warmup_epochs": 1, "refresh_every": 1}
RECIPES = {
    "dqe_cir by score drops": {"method": "dqe_cir", "negatives": "qure", "aligned": False, **MINES},
    "dqe_cir, own negatives": {"method": "dqe_cir", "attribute_negatives": "own", "negatives_per_query": 9, **MINES},  # more than a pool holds: it goes round
    "dqe_cir, mined columns": {"method": "dqe_cir", "mined_columns": True, "contrastive_weight": 0.5, "pair_smoothing": 0.1, **MINES},
    "dqe_cir, in-batch negatives": {"method": "dqe_cir", "negatives": "in_batch", "attribute_mode": "gate_only", "warmup_epochs": 1},
    "info_nce, soft labels": {"method": "info_nce", "soft_labels": "target", "aligned": False, "accumulate": 2, "category_batches": False},
    "info_nce, uneven annotators": {"method": "info_nce", "annotators": "uneven", "label_smoothing": 0.0, "head_rate": 3.0},
}
# Recorded before there were recipes: every text by the method's own rule, `dqe_cir` from a temperature of 0.07, published systems without switches.
BEFORE = {"info_nce": {"captions": "own"}, "dqe_cir": {**PAIRWISE, "captions": "own", "temperature": 0.07}}
COMMON = {f"{name}, common recipe": {"method": name} for name in ("info_nce", "sprc", "qure", "dqe_cir")}
READ = {"readings": "hand"}  # on the small set nothing can be mined
COMMON |= {"info_nce, readings": {"method": "info_nce", **READ}, "dqe_cir, readings": {"method": "dqe_cir", **READ}, "dqe_cir, paper recipe": {"method": "dqe_cir", "recipe": "paper"}}
RUNS = {name: {"method": name, **(MINES if method.uses_negatives else {})} for name, method in METHODS.items()}
RUNS |= {f"{name}, native": {"method": name, "form": "native", "epochs": 1, "lr": 1e-6} for name, method in METHODS.items() if method.native}
RUNS |= {name: {"epochs": 2, **options} for name, options in RECIPES.items()}
RUNS = {name: {**BEFORE.get(options["method"], {"recipe": "paper"}), **options} for name, options in RUNS.items()}
RUNS |= {name: {"epochs": 2, **options, **(MINES if METHODS[options["method"]].uses_negatives else {})} for name, options in COMMON.items()}


class Setting:
    "The garments' smoke splits, and their image tokens by encoder: computed anew, but once for all runs that share the encoder."

    def __init__(self, folder: Path):
        self.folder, self.tokens = Path(folder), {}
        self.train, self.val = (load_dataset("garments", split=split, size="smoke") for split in ("train", "val"))

    def tokens_of(self, encoder):
        key = encoder.tower_fingerprint()
        if key not in self.tokens:
            self.tokens[key] = cache_tokens(encoder, [self.train, self.val], folder=self.folder / "tokens", progress=False)
        return self.tokens[key]


def watch(method) -> list[dict]:
    "A list that gets one entry per call of `method.losses`: negatives per query, the mean of every term, and their weighted total."
    steps, losses = [], method.losses

    def watched(batch):
        terms = losses(batch)
        means = {name: values.detach().float().mean() for name, values in terms.items()}
        total = sum(method.weights.get(name, 1.0) * value for name, value in means.items())
        mined = 0 if batch.negative is None else batch.negative.shape[1]
        steps.append({"negatives": mined, "total": total.item(), **{name: value.item() for name, value in means.items()}})
        return terms

    method.losses = watched
    return steps


def figures(setting: Setting, name: str) -> dict:
    "The steps of a run, the means its log states, and what its trained weights make of the validation queries."
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        run = open_run(train_config({**SMALL, **RUNS[name], "run_dir": folder}))
        method = build_method(run.config)
        tokens = setting.tokens_of(method.encoder)
        steps = watch(method)
        events = fit(method, training_set(run.config, setting.train, tokens), run)
    scores = torch.cat([part.scores.flatten() for part in score_dataset(method, setting.val, tokens)]).double()
    end = {"mAP": evaluate(method, setting.val, tokens).metrics["mAP"],
           "score sum": scores.sum().item(), "score mean": scores.mean().item(), "score deviation": scores.std().item()}
    return {"steps": steps, "logged": [event["loss"]["total"] for event in events if event["kind"] == "epoch"], "end": end}


def draws() -> dict:
    "A few random numbers. Builds of torch draw dropout masks differently, and then the figures cannot be compared."
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        kept = torch.nn.functional.dropout(torch.ones(32), 0.5).bool().int().tolist()
        return {"dropout": "".join(map(str, kept)), "order": torch.randperm(16).tolist()}


@pytest.fixture(scope="module")
def record():
    stored = json.loads(RECORD.read_text())
    if draws() != stored["draws"]: pytest.skip(f"this build of torch draws other random numbers than the one that wrote {RECORD.name}")
    return stored


@pytest.fixture(scope="module")
def setting(tmp_path_factory): return Setting(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", RUNS)
def test_every_step_has_the_recorded_losses(record, setting, name):
    found, stored = figures(setting, name), record["runs"][name]
    assert len(found["steps"]) == len(stored["steps"])
    for number, (step, expected) in enumerate(zip(found["steps"], stored["steps"])): assert step == pytest.approx(expected, rel=CLOSE), f"step {number}"
    assert found["logged"] == pytest.approx(stored["logged"], rel=CLOSE)
    assert found["end"].pop("mAP") == pytest.approx(stored["end"].pop("mAP"), rel=NEIGHBOURS)
    assert found["end"] == pytest.approx(stored["end"], rel=CLOSE)


def learns_from_pairs(name):
    config = train_config(RUNS[name])
    return form_of(config).wants_negatives(config)


@pytest.mark.parametrize("name", [name for name in RUNS if learns_from_pairs(name)])
def test_the_record_covers_warm_up_and_pairs(record, name):
    steps = record["runs"][name]["steps"]
    pairs_at_once = train_config(RUNS[name]).warm_up == "random"
    assert [step["negatives"] > 0 for step in steps] == [pairs_at_once or number >= 9 for number in range(len(steps))] and len(steps) > 9


def test_the_record_names_the_runs_of_this_page(record):
    assert list(record["runs"]) == list(RUNS), "a new method: python tests/test_golden_losses.py --write NAME"


def as_text(record: dict) -> str:
    "JSON with one step a line."
    parts = [f'"draws": {json.dumps(record["draws"])}']
    runs = []
    for name, run in record["runs"].items():
        steps = ",\n".join(f"   {json.dumps(step)}" for step in run["steps"])
        runs.append(f' {json.dumps(name)}: {{\n  "steps": [\n{steps}],\n  "logged": {json.dumps(run["logged"])},\n  "end": {json.dumps(run["end"])}}}')
    return "{\n" + ",\n".join([*parts, '"runs": {\n' + ",\n".join(runs) + "}"]) + "}\n"


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"] or set(sys.argv[2:]) - set(RUNS): raise SystemExit("usage: python tests/test_golden_losses.py --write [RUN ...]; without names, all runs")
    torch.set_num_threads(1)
    kept, anew = json.loads(RECORD.read_text()), sys.argv[2:] or RUNS
    if draws() != kept["draws"] and set(anew) != set(RUNS): raise SystemExit("this build of torch draws other random numbers than the record's: write all runs")
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder))
        runs = {name: figures(setting, name) if name in anew else kept["runs"][name] for name in RUNS}
    RECORD.write_text(as_text({"draws": draws(), "runs": runs}))
    print(f"{RECORD} written: {len(anew)} of {len(runs)} runs")
