"Full-size training steps on a GPU. Without one: the same steps on the small encoder."
import math
import statistics

import numpy as np
import pytest
import torch
from full_size import TOWERS, random_encoder
from gpu import STEPS, fixed_batch, measure, training

from dqe_cir.encoder import TokenCache, load_encoder
from dqe_cir.trainer import build_method, train_config
from dqe_cir.trainer.step import Stepper, plain_terms, training_step

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; `make test` on a machine that has one runs this")


def check(figures, on_gpu=True):
    "The loss of one fixed batch falls, with and without checkpointing; checkpointing needs less memory."
    for name in ("info_nce", "dqe_cir"):
        for run in figures[name]:
            losses = run["losses"]
            assert len(losses) == STEPS and all(map(math.isfinite, losses))
            assert losses[-1] < losses[0] and statistics.mean(losses[-5:]) < statistics.mean(losses[:5])
        plain, again = figures[name]
        assert (plain["checkpointing"], again["checkpointing"]) == (False, True)
        if on_gpu: assert again["peak_memory_MiB"] < plain["peak_memory_MiB"] and plain["precision"] in ("bfloat16", "float16")


@needs_gpu
@pytest.mark.parametrize("tower", TOWERS)
def test_full_size_model_learns_on_a_gpu(tower): check(measure(lambda: random_encoder(tower), "cuda"))


@needs_gpu
@pytest.mark.parametrize("budget", [0, 3_000, 10**6])
def test_every_place_hands_out_the_same_bits_on_a_gpu(budget):
    "From the GPU, from memory and from an array, read ahead on other streams or not."
    stored, names = np.random.default_rng(0).standard_normal((500, 5, 8)).astype(np.float16), [f"image {i}" for i in range(500)]
    batches = [[names[i] for i in np.random.default_rng(turn).integers(0, 500, 24)] for turn in range(60)]
    for place in ("device", "memory", "disk"):
        cache = TokenCache(names, stored, "cuda").move(place)
        for batch, _ in zip(batches, cache.ahead(batches, budget)):
            assert torch.equal(cache[batch].cpu(), torch.from_numpy(stored[[cache.row[name] for name in batch]]).float())


@needs_gpu
def test_a_step_on_a_gpu_waits_for_nothing():
    "PyTorch itself raises where the program would wait for the device."
    method = build_method(train_config({"method": "dqe_cir", "recipe": "paper", "device": "cuda"})).train()
    stepper, batch = Stepper(method, 1e-4), fixed_batch(method.encoder, "dqe_cir", 4)
    for _ in range(2): training_step(method, [(batch, 1.0)], stepper)
    torch.cuda.set_sync_debug_mode("error")
    try: terms = training_step(method, [(batch, 1.0)], stepper)
    finally: torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(plain_terms(terms)["total"])


def small(): return load_encoder("mini", device="cpu")


def test_the_script_itself_on_the_small_encoder():
    figures = measure(small, "cpu", count=4)
    check(figures, on_gpu=False)
    assert figures["info_nce"][0]["losses"] == figures["info_nce"][1]["losses"]  # checkpointing changes nothing


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_steps_learn(precision, monkeypatch):
    "What a GPU does under autocast, on a CPU: the loss falls, and float16 goes through the loss scale."
    monkeypatch.setattr("gpu.STEPS", 10)
    run = training(small, "dqe_cir", torch.device("cpu"), 4, checkpointing=False, precision=precision)
    exact = training(small, "dqe_cir", torch.device("cpu"), 4, checkpointing=False)
    assert run["precision"] == precision and run["losses"] != exact["losses"]
    assert statistics.mean(run["losses"][5:]) < statistics.mean(run["losses"][:5])
    assert run["losses"][0] == pytest.approx(exact["losses"][0], rel=0.05)
