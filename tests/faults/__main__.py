"""`make test-faults`: every malformed input, every kill, a full disk and a soak. Ends non-zero on any failure; `--record FILE` writes the counts.

    python -m faults --seeds 0,1 --record data/results/faults.json        (with tests/ on the path)"""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads of its own cannot be forked

import argparse
import collections
import contextlib
import importlib
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from dqe_cir.core import environment
from dqe_cir.files import write_json

from . import disk, kills, runs, soak
from .frame import check

PARTS = [path.stem for path in sorted(Path(__file__).parent.glob("*.py")) if "\ndef cases(" in path.read_text()]


def inputs(seeds) -> tuple[dict, list]:
    "Verdicts by kind, and what did not hold."
    counts, failures = collections.defaultdict(collections.Counter), []
    for part in PARTS:
        for seed in seeds:
            for case in importlib.import_module(f"faults.{part}").cases(seed):
                with tempfile.TemporaryDirectory(prefix="fault-", ignore_cleanup_errors=True) as folder:
                    verdict = check(case, Path(folder))
                counts[case.kind][verdict.split(":")[0]] += 1
                if verdict != "held": failures.append(f"{case.kind} | {case.name} | {verdict}")
        print(f"{part}: {sum(sum(c.values()) for c in counts.values())} inputs so far, {len(failures)} failures", flush=True)
    return {kind: dict(count) for kind, count in counts.items()}, failures


def full_disks() -> tuple[dict, list]:
    "What every writer says without room, and whether nothing was lost."
    runs.parts(True)
    told, failures = {}, []
    for name in disk.PLACES:
        with tempfile.TemporaryDirectory(prefix="fault-", ignore_cleanup_errors=True) as folder:
            said, again, intact = disk.full(name, Path(folder))
        told[name] = {"refused by name": said.startswith("DataError"), "intact": intact, "goes on": again == "done"}
        if not all(told[name].values()): failures.append(f"full disk | {name} | {said} | {again} | intact: {intact}")
    return told, failures


def main():
    parser = argparse.ArgumentParser(description="everything that can go wrong, on purpose")
    parser.add_argument("--seeds", default="0", help="of the malformed inputs")
    parser.add_argument("--every", type=int, default=1, help="kill at every so many writes")
    parser.add_argument("--epochs", type=int, default=300, help="of the soak")
    parser.add_argument("--record", default="", help="file for the counts")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.setdefault("TQDM_DISABLE", "1")
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    found, failures = inputs(seeds)
    disks, more = full_disks()
    failures += more
    rounds = list(kills.rounds(asked.every))
    failures += [f"kill | write {at} {moment} | {said}" for at, moment, same, said in rounds if not same]
    long = soak.soak(asked.epochs)
    if long["MiB per epoch"] > 0.1 or long["open files"][1] > long["open files"][0]: failures.append(f"soak | {long}")
    total = sum((collections.Counter(count) for count in found.values()), collections.Counter())
    record = {"command": "make test-faults", "inputs": found, "total": dict(total), "kills": {"tried": len(rounds), "bit-equal": sum(same for _, _, same, _ in rounds)},
              "full disk": disks, "soak": long, "environment": environment()}
    if asked.record: write_json(asked.record, record)
    print(f"inputs {dict(total)}, kills {record['kills']}, soak {long}")
    for failure in failures: print("FAILED", failure[:400])
    sys.exit(f"make test-faults FAILED: {len(failures)}" if failures else 0)


if __name__ == "__main__": main()
