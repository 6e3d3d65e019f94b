"""CPU seconds of a training step of 16 queries on one thread, beside what its products take, at a size between the small encoder and BLIP-2:
pictures of 112 pixels, a tower of 6 layers 384 wide, a Q-Former of 4 layers 256 wide with BERT's vocabulary, 32 tokens of 256 numbers. Random weights.

python tests/step_seconds.py              writes data/results/step-seconds.json
python tests/step_seconds.py qure sprc    these cases; prints their figures
python tests/step_seconds.py --adamw      AdamW alone, in its usual form and in its fused one; the rows of the record stay

The floor of a step is its FLOP, counted by torch, at the rate of products of large square matrices, measured in turn with it. `products` are the very
products of the step, in their shapes and order, and nothing else: no step can take less with this library. `pictures in` computes tokens in every step."""
import json
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm
from transformers import Blip2Config

from helpers import ROOT

from dqe_cir.core import environment, generator
from dqe_cir.files import read_json, write_json
from dqe_cir.methods import METHODS
from dqe_cir.studies.bench import STEPS, TOWERS, FromPixels, Rows, count_flop, least_seconds, matrix_rate, random_encoder, toy_dataset
from dqe_cir.trainer.batches import TrainingSet
from dqe_cir.trainer.config import train_config
from dqe_cir.trainer.loop import train_epoch
from dqe_cir.trainer.step import Stepper

CASES, QUERIES, TRIES = ("info_nce", "qure", "sprc", "dqe_cir, paper"), 16, 3
QFORMER = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, vocab_size=30523, use_qformer_text_input=True)
TOWER = dict(hidden_size=384, intermediate_size=1536, num_attention_heads=6, num_hidden_layers=6, image_size=112, patch_size=14)
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default}


class Listed(TorchDispatchMode):
    "Lists every product that is asked for, with sizes and strides of what it multiplies."
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS: self.found.append((function, tuple((tuple(arg.shape), arg.stride()) for arg in args if isinstance(arg, torch.Tensor))))
        return function(*args, **(kwargs or {}))


def laid_out(shape, stride):
    "Random numbers, laid out like this."
    last = sum((size - 1) * step for size, step in zip(shape, stride))
    return torch.randn(last + 1).as_strided(shape, stride)


def products_of(work):
    "A call that takes all products of another one, and nothing else."
    with Listed() as listed: work()
    made = {operands: [laid_out(*operand) for operand in operands] for _, operands in listed.found}

    def again():
        for function, operands in listed.found: function(*made[operands])
    return again


def method_of(case):
    config = train_config({**STEPS[case], "device": "cpu", "batch_size": QUERIES, "dataset": "fashioniq", "encoder": "mini"})
    return METHODS[config.method].from_config(random_encoder("between", dtype=torch.float32), config), config


def step(case, pictures):
    "One step, as the trainer takes it."
    method, config = method_of(case)
    encoder, count, random = method.encoder, 4 * QUERIES, generator(0, "tokens")
    if pictures: tokens = FromPixels(encoder, torch.randn(count, 3, encoder.image_size, encoder.image_size, generator=random))
    else: tokens = Rows(torch.randn(count, *encoder.token_shape, generator=random))
    data = TrainingSet(toy_dataset("fashioniq", QUERIES, count), tokens, captions=config.captions)
    stepper, bar, epoch = Stepper(method.train(), 1e-4), tqdm(disable=True), config.warmup_epochs or 0
    return lambda: train_epoch(method, data, stepper, config, epoch, bar)


def figures(case, pictures):
    "Step, products and rate in turn, the least of some tries each."
    work = step(case, pictures)
    flop, products = count_flop(work), products_of(work)
    found = [(least_seconds(work, 1), least_seconds(products, 1), matrix_rate(repeats=2)) for _ in range(TRIES)]
    taken, alone, rates = zip(*found)
    floor = flop / max(rates)
    numbers = dict(seconds=min(taken), products=min(alone), floor=floor, ratio=min(taken) / floor, gigaflops=max(rates) / 1e9)
    return dict(flop=flop) | {name: float(f"{number:.4g}") for name, number in numbers.items()}


def adamw(case="dqe_cir, paper", tries=9):
    "CPU milliseconds of AdamW on a method's weights, in its usual form and fused, in turn; and the share of weights that differ after one step, by how much."
    method, _ = method_of(case)
    start = [weight.detach() for weight in method.parameters() if weight.requires_grad]
    random = generator(0, "gradients")
    gradients = [torch.randn(weight.shape, generator=random) / 100 for weight in start]

    def begun(fused):
        weights = [torch.nn.Parameter(weight.clone()) for weight in start]
        for weight, gradient in zip(weights, gradients): weight.grad = gradient
        return weights, torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.01, fused=fused)

    forms = [begun(fused) for fused in (False, True)]
    for _, optimizer in forms: optimizer.step()
    usual, fused = (torch.cat([weight.detach().flatten() for weight in weights]) for weights, _ in forms)
    taken = [[least_seconds(optimizer.step, 1) for _, optimizer in forms] for _ in range(tries)]
    one, other = map(min, zip(*taken))
    numbers = {"usual ms": 1000 * one, "fused ms": 1000 * other, "share that differs": (usual != fused).double().mean().item(),
               "largest difference": (usual - fused).abs().max().item()}
    return {"case": case, "weights": len(usual)} | {name: float(f"{number:.4g}") for name, number in numbers.items()}


def main(cases):
    torch.set_num_threads(1)
    torch.manual_seed(0)  # for dropout; this process does nothing else
    path = ROOT / "data" / "results" / "step-seconds.json"
    TOWERS["between"] = lambda layers=6: Blip2Config(qformer_config=QFORMER, vision_config=TOWER, num_query_tokens=32)
    if cases == ["--adamw"]: return write_json(path, read_json(path) | {"AdamW": adamw() | {"environment": environment()}})
    rows = []
    for case in cases or CASES:
        rows.append({"case": case, "cached": figures(case, False), "pictures in": figures(case, True)})
        print(json.dumps(rows[-1]), flush=True)
    if cases: return
    about = {"command": "python tests/step_seconds.py", "unit": f"CPU seconds of a step of {QUERIES} queries, one thread, float32, the least of {TRIES}"}
    write_json(path, {**about, "rows": rows, "AdamW": adamw(), "environment": environment()})


if __name__ == "__main__": main(sys.argv[1:])
