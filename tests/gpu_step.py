"""What a training step on a CUDA device waits for: `python tests/gpu_step.py FILE` writes seconds of a step, seconds that
the device was busy, and kernels, of ViT-g's Q-Former as it is and with every layer compiled. No test: it needs a card."""
import sys, time

import torch
from torch.profiler import ProfilerActivity, profile

from dqe_cir.core import environment
from dqe_cir.files import write_json
from dqe_cir.methods import METHODS
from dqe_cir.studies.bench_gpu import config_of, device_rate, encoder_of, random_batch, work_of
from dqe_cir.trainer.step import Stepper, training_step

CASES = ((128, False), (512, False), (128, True), (512, True))


def in_time(step, count):
    "Mean seconds of a step, after three that are not counted."
    for _ in range(3): step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count): step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


def on_the_device(step):
    "Seconds that the device works in a step."
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in seen.key_averages()) / 1e6


def case(batch_size, compiled, device, rate, work):
    "One row of the record."
    torch._dynamo.reset()
    encoder = encoder_of("vit_g", layers=1)
    method = METHODS["dqe_cir"].from_config(encoder, config_of("vit_g")).to(device).train()
    if compiled:
        for layer in encoder.qformer.encoder.layer: layer.compile()
    batch, stepper = random_batch(encoder, batch_size).to(device), Stepper(method, 1e-6)
    step = lambda: training_step(method, [(batch, 1.0)], stepper)
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    seconds = in_time(step, 2560 // batch_size)
    return {"batch": batch_size, "layers compiled": compiled, "first step": round(first, 1), "ms": round(1e3 * seconds, 1),
            "ms on the device": round(1e3 * on_the_device(step), 1), "MFU": round(batch_size * work / seconds / rate, 3)}


def main():
    device = torch.device("cuda")
    rate, work = device_rate(device, torch.bfloat16), work_of("vit_g").step
    rows = [case(batch_size, compiled, device, rate, work) for batch_size, compiled in CASES]
    card = {"name": torch.cuda.get_device_name(device), "bfloat16": rate}
    write_json(sys.argv[1], {"command": "python tests/gpu_step.py FILE", "card": card, "steps": rows, "environment": environment()})


if __name__ == "__main__": main()
