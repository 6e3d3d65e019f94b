"""Twenty training steps on one fixed random batch, as the trainer takes them: the loss falls under autocast, and checkpointing needs less memory. `make bench-gpu` says how fast steps are."""
import torch

from dqe_cir.core import generator
from dqe_cir.methods import METHODS, Batch
from dqe_cir.studies.ablation import peak_memory
from dqe_cir.trainer import train_config
from dqe_cir.trainer.loop import tower_aside
from dqe_cir.trainer.step import Stepper, checkpoint_layers, plain_terms, training_step

STEPS, RATE, RISE = 20, 5e-5, 5  # random weights have further to go than pretrained ones
WORDS = ("red", "blue", "longer", "shorter", "striped", "plain", "with a collar", "without sleeves")


def fixed_batch(encoder, name, count):
    "Random tokens of references, targets and negatives in the encoder's shape, each image about a centre of its own, and texts."
    places = (encoder.config.vision_config.image_size // encoder.config.vision_config.patch_size) ** 2 + 1
    random = generator(0, "gpu", name)
    normal = lambda *size: torch.randn(*size, encoder.ln_vision.weight.shape[0], generator=random)
    draw = lambda *size: normal(*size, 1) + 0.5 * normal(*size, places)
    texts = [f"is {WORDS[i % 8]} and {WORDS[i // 8 % 8]}" for i in range(count)]
    return Batch(draw(count), texts, draw(count), torch.arange(count), draw(count, 1) if METHODS[name].uses_negatives else None)


def training(make_encoder, name, device, count, checkpointing, precision="auto"):
    "Losses of the steps and their peak memory, with the tower aside."
    torch.manual_seed(0)
    encoder = make_encoder()
    config = train_config({"method": name, "dataset": "fashioniq", "encoder": "full size, random", "device": "cpu"})
    method = METHODS[name].from_config(encoder, config).to(device).train()
    if checkpointing: checkpoint_layers(encoder)
    stepper, batch, losses = Stepper(method, RATE, precision=precision), fixed_batch(encoder, name, count), []
    with tower_aside(method):
        peak_memory(device, restart=True)
        for step in range(STEPS):
            stepper.set_rate(min(1.0, (step + 1) / RISE))
            losses.append(plain_terms(training_step(method, [(batch, 1.0)], stepper))["total"])
    return {"batch": count, "precision": str(stepper.dtype).removeprefix("torch."), "checkpointing": checkpointing, "losses": [round(loss, 4) for loss in losses],
            "peak_memory_MiB": peak_memory(device)}


def measure(make_encoder, device, count=32):
    device = torch.device(device)
    return {name: [training(make_encoder, name, device, count, checkpointing) for checkpointing in (False, True)] for name in ("info_nce", "dqe_cir")}
