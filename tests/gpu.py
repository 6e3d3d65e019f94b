"""BLIP-2 at full size with random weights on a GPU: 20 training steps on one fixed random batch, as the trainer takes them.

python tests/gpu.py            both towers; writes data/results/gpu.json
python tests/gpu.py vit_g      one tower; prints its figures as JSON

Nothing is downloaded. It shows that the loss falls under autocast, how fast steps are and what they hold in memory; random weights say nothing about retrieval."""
import json
import sys
import time

import torch
from full_size import ROOT, TOWERS, random_encoder

from dqe_cir.core import environment, generator, write_json
from dqe_cir.methods import METHODS
from dqe_cir.methods import Batch
from dqe_cir.trainer import train_config
from dqe_cir.trainer.loop import tower_aside
from dqe_cir.trainer.step import Stepper, checkpoint_layers, training_step

STEPS, RATE, RISE = 20, 5e-5, 5  # random weights have further to go than pretrained ones
WORDS = ("red", "blue", "longer", "shorter", "striped", "plain", "with a collar", "without sleeves")


def wait(device):
    if device.type == "cuda": torch.cuda.synchronize(device)


def peak(device):
    "GiB that tensors have held at most since the last reset; None without a GPU."
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else None


def reset(device):
    if device.type == "cuda": torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats(device)


def fixed_batch(encoder, name, count):
    "Random tokens of references, targets and negatives in the encoder's shape, each image about a centre of its own, and texts."
    places = (encoder.config.vision_config.image_size // encoder.config.vision_config.patch_size) ** 2 + 1
    random = generator(0, "gpu", name)
    normal = lambda *size: torch.randn(*size, encoder.ln_vision.weight.shape[0], generator=random)
    draw = lambda *size: normal(*size, 1) + 0.5 * normal(*size, places)
    texts = [f"is {WORDS[i % 8]} and {WORDS[i // 8 % 8]}" for i in range(count)]
    return Batch(draw(count), texts, draw(count), torch.arange(count), draw(count, 1) if METHODS[name].uses_negatives else None)


def encoding(encoder, device, count=64):
    "Images per second through the frozen tower, and the peak memory of it."
    pixels = torch.randn(count, 3, encoder.image_size, encoder.image_size, generator=generator(0, "pixels"))
    reset(device)
    encoder.image_tokens(pixels), wait(device)
    started = time.perf_counter()
    encoder.image_tokens(pixels), wait(device)
    return {"batch": count, "images_per_second": round(count / (time.perf_counter() - started), 1), "peak_memory_GiB": peak(device)}


def training(make_encoder, name, device, count, checkpointing, precision="auto"):
    "Losses of the steps, their pace after the rise of the learning rate, and the peak memory, with the tower aside."
    torch.manual_seed(0)
    encoder = make_encoder()
    config = train_config({"method": name, "dataset": "fashioniq", "encoder": "full size, random", "device": "cpu"})
    method = METHODS[name].from_config(encoder, config).to(device).train()
    if checkpointing: checkpoint_layers(encoder)
    stepper, batch, losses = Stepper(method, RATE, precision=precision), fixed_batch(encoder, name, count), []
    with tower_aside(method):
        reset(device)
        for step in range(STEPS):
            if step == RISE: wait(device); started = time.perf_counter()
            stepper.set_rate(min(1.0, (step + 1) / RISE))
            losses.append(training_step(method, [(batch, 1.0)], stepper)["total"])
        wait(device)
    return {"batch": count, "precision": str(stepper.dtype).removeprefix("torch."), "checkpointing": checkpointing, "losses": [round(loss, 4) for loss in losses],
            "steps_per_second": round((STEPS - RISE) / (time.perf_counter() - started), 2), "peak_memory_GiB": peak(device)}


def measure(make_encoder, device, count=32):
    device = torch.device(device)
    made = {"encoding": encoding(make_encoder().to(device), device)}
    return made | {name: [training(make_encoder, name, device, count, checkpointing) for checkpointing in (False, True)] for name in ("info_nce", "dqe_cir")}


def main():
    if not torch.cuda.is_available(): sys.exit("no CUDA device here: python tests/gpu.py measures one")
    if len(sys.argv) > 1: return print(json.dumps(measure(lambda: random_encoder(sys.argv[1]), "cuda")))
    what = f"BLIP-2 at full size, random weights, on a GPU: {STEPS} training steps on one fixed random batch. Says nothing about retrieval."
    record = {"what": what, "command": "python tests/gpu.py", "device": torch.cuda.get_device_name(),
              "towers": {tower: measure(lambda: random_encoder(tower), "cuda") for tower in TOWERS}, "environment": environment()}
    print(write_json(ROOT / "data" / "results" / "gpu.json", record))


if __name__ == "__main__": main()
