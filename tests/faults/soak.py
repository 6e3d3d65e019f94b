"A long training of tiny epochs: memory and open files must stay what they were after the first hundred."
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path

from dqe_cir.data import load_dataset
from dqe_cir.encoder import cache_tokens
from dqe_cir.trainer import build_method, fit, open_run, train_config, training_set


def resident() -> float:
    "MiB of memory that this process holds."
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def soak(epochs: int = 300) -> dict:
    "Train a mining method on sixteen triplets; memory and open files after a third of the epochs and at the end, and the slope."
    seen = []

    def look(method):
        seen.append((resident(), len(os.listdir("/proc/self/fd"))))
        return {"mAP": 1.0}

    with tempfile.TemporaryDirectory() as folder:
        options = dict(size="smoke", recipe="paper", epochs=epochs, batch_size=16, warmup_epochs=1, refresh_every=10, evaluate_every=1, device="cpu")
        config = train_config(options | {"run_dir": folder + "/run"})
        dataset, method = load_dataset("garments", split="train", size="smoke"), build_method(config)
        few = [triplet for triplet in dataset.triplets if triplet.category == dataset.triplets[0].category][:16]
        names = sorted({name for triplet in few for name in (triplet.reference, triplet.target)})
        dataset = replace(dataset, triplets=few, galleries={few[0].category: names})
        fit(method, training_set(config, dataset, cache_tokens(method.encoder, dataset, progress=False)), open_run(config), look)
    third = epochs // 3
    slope = (seen[-1][0] - seen[third][0]) / (epochs - third - 1)
    return {"epochs": epochs, "MiB per epoch": round(slope, 4), "MiB": [round(seen[third][0]), round(seen[-1][0])], "open files": [seen[third][1], seen[-1][1]]}
