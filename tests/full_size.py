"""BLIP-2 at full size with random weights: one training step and one evaluation batch on the CPU, each tower in a process of its own.

python tests/full_size.py            both towers; writes data/results/full-size.json
python tests/full_size.py vit_g      one tower; prints its figures as JSON

Nothing is downloaded. It shows that the real sizes fit, in memory and in shape; random weights say nothing about retrieval."""
import json
import os
import subprocess
import sys
import time

import torch

from helpers import ROOT

from dqe_cir.core import environment, generator, write_json
from dqe_cir.methods import Batch
from dqe_cir.methods.base import parameter_groups
from dqe_cir.methods.info_nce import InfoNCE
from dqe_cir.studies.bench import TOWERS, peak_bytes, random_encoder

TEXTS = ["is red and has longer sleeves", "is blue with a collar"]


def peak(): return round(peak_bytes() / 2**30, 2)


def timed(work):
    started = time.perf_counter()
    return work(), round(time.perf_counter() - started, 1)


def energy(value): return float(value.detach().double().square().sum())


def training_step(method, batch):
    "Loss, backward and AdamW, as the trainer does it. Returns the loss and the number of trained tensors that moved."
    optimizer = torch.optim.AdamW(parameter_groups(method.train(), 5e-6, 0.05))
    before = {name: energy(value) for name, value in method.named_parameters() if value.requires_grad}
    loss = method.losses(batch)["info_nce"].mean()
    loss.backward()
    optimizer.step()
    moved = sum(energy(value) != before[name] for name, value in method.named_parameters() if name in before)
    return float(loss.detach()), moved


@torch.no_grad()
def evaluation_batch(method, tokens):
    method.eval()
    return method.score(method.encode_query(tokens[:2], TEXTS), method.encode_target(tokens))


def measure(tower):
    torch.manual_seed(0)  # for dropout; this process does nothing else
    encoder, building = timed(lambda: random_encoder(tower))
    built, count = peak(), lambda parts: sum(p.numel() for p in parts)
    tokens, encoding = timed(lambda: encoder.image_tokens(torch.randn(4, 3, 224, 224, generator=generator(0, "pixels"))).float())
    method = InfoNCE(encoder)
    (loss, moved), training = timed(lambda: training_step(method, Batch(tokens[:2], TEXTS, tokens[2:], torch.arange(2))))
    scores, evaluating = timed(lambda: evaluation_batch(method, tokens))
    trained = [p for p in method.parameters() if p.requires_grad]
    return {"parameters": {"tower": count(encoder.vision_tower.parameters()), "trained": count(trained)},
            "tower_dtype": "bfloat16", "tokens": list(tokens.shape[1:]), "loss": loss, "trained_tensors_moved": moved, "trained_tensors": len(trained),
            "scores": scores.tolist(), "seconds": {"building": building, "tower, 4 images": encoding, "training step, batch 2": training,
                        "evaluation, 2 queries x 4 images": evaluating},
            "peak_memory_GiB": {"after building": built, "in all": peak()}, "threads": torch.get_num_threads()}


def alone(tower):
    "The figures of one tower, measured in a new process so that peak memory is its own."
    done = subprocess.run([sys.executable, __file__, tower], cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return json.loads(done.stdout.splitlines()[-1])


def main():
    if len(sys.argv) > 1: return print(json.dumps(measure(sys.argv[1])))
    what = "BLIP-2 at full size, random weights, on a CPU: one training step of info_nce and one evaluation batch. Says nothing about retrieval."
    record = {"what": what, "command": "python tests/full_size.py", "towers": {tower: alone(tower) for tower in TOWERS}, "environment": environment()}
    print(write_json(ROOT / "data" / "results" / "full-size.json", record))


if __name__ == "__main__": main()
