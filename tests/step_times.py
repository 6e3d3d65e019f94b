"""CPU seconds of one training step of several methods with the small encoder, one thread: what it saves that the Q-Former's last layer computes
only the states that are read.

python tests/step_times.py          writes data/results/step-times.json

Steps with and without the saving are taken in turn, and the least of 20 counts: other work on the machine makes CPU seconds longer too. Image tokens
are random numbers, since a step's time depends on shapes alone."""
import time

import torch

from helpers import ROOT

from dqe_cir.core import environment, generator, write_json
from dqe_cir.data import load_dataset
from dqe_cir.methods import Batch
from dqe_cir.trainer import build_method, train_config
from dqe_cir.trainer.step import Stepper, training_step

ROWS, REPEATS = 64, 20
CASES = {"info_nce": ("info_nce", 0), "dqe_cir, warm-up": ("dqe_cir", 0), "dqe_cir, pairs": ("dqe_cir", 1), "qure, pairs": ("qure", 1),
         "sprc": ("sprc", 0), "covr": ("covr", 0), "clip4cir": ("clip4cir", 0)}


def batch_of(method, triplets, negatives):
    "Real texts, random tokens in the cache's precision, no answer shared."
    random, shape = generator(0, "step times"), method.encoder.token_shape
    def tokens(*rows): return torch.randn(*rows, *shape, generator=random).half()
    texts = [method.query_text(triplet) for triplet in triplets]
    return Batch(tokens(ROWS), texts, tokens(ROWS), torch.arange(ROWS), tokens(ROWS, negatives) if negatives else None)


def compute_all(attention, args, options):
    "A hook that comes before the encoder's own and hides from it what is read: every state is computed."
    options.pop("read", None)


def seconds(method, batch, stepper, everything: bool) -> float:
    last = method.encoder.qformer.encoder.layer[-1].attention
    hooks = [last.register_forward_pre_hook(compute_all, prepend=True, with_kwargs=True)] if everything else []
    started = time.process_time()
    training_step(method, [(batch, 1.0)], stepper)
    taken = time.process_time() - started
    for hook in hooks: hook.remove()
    return taken


def case(name, negatives, triplets) -> dict[str, float]:
    "Milliseconds of a step in which the last layer computes all states, and of one in which it computes those that are read."
    method = build_method(train_config({"method": name, "device": "cpu"})).train()
    batch, stepper = batch_of(method, triplets, negatives), Stepper(method, 1e-4)
    for everything in (True, False): seconds(method, batch, stepper, everything)  # the first step makes the optimizer's memory
    turns = [(seconds(method, batch, stepper, True), seconds(method, batch, stepper, False)) for _ in range(REPEATS)]
    return {kind: round(1000 * min(taken), 1) for kind, taken in zip(("all states", "states that are read"), zip(*turns))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    triplets = load_dataset("garments", split="train", size="smoke").triplets[:ROWS]
    found = {name: case(*options, triplets) for name, options in CASES.items()}
    about = {"command": "python tests/step_times.py", "unit": f"CPU milliseconds of a step of {ROWS} queries, one thread, the least of {REPEATS}"}
    print(write_json(ROOT / "data" / "results" / "step-times.json", {**about, "steps": found, "environment": environment()}).read_text())
