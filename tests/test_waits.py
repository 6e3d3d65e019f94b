"A training step asks the device for nothing: on a GPU a question is a wait. Seen here on a CPU, where every such question passes through PyTorch's dispatcher."
import collections
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dqe_cir.core import generator
from dqe_cir.methods import METHODS, Batch
from dqe_cir.trainer import build_method, train_config
from dqe_cir.trainer.step import Stepper, training_step

QUESTIONS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount", "repeat_interleave"}
NOT_ON_A_GPU = {  # file and line: why it asks nothing there
    ("masking_utils.py", "and (padding_mask is None or padding_mask.all())"): "on a GPU the mask is spread before it gets there",
    ("attributes.py", "return F.one_hot(plain, count).to(text.dtype)"): "PyTorch checks the range of one_hot on a CPU alone",
}


class Questions(TorchDispatchMode):
    "Counts the operations whose result the program needs before it can go on, by file and line."
    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        name = operation.overloadpacket.__name__
        by_mask = name.startswith("index") and len(arguments) > 1 and isinstance(arguments[1], (list, tuple)) and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in arguments[1])
        if name in QUESTIONS or by_mask:
            frames = [frame for frame in traceback.extract_stack() if "dqe_cir/" in frame.filename or "transformers" in frame.filename or "/optim/" in frame.filename]
            self.found[frames[-1].filename.split("/")[-1], frames[-1].line] += 1
        return operation(*arguments, **(options or {}))


def questions(name, waits, negatives, **options):
    "What the second step of a method asks, and its total."
    method = build_method(train_config({"method": name, "device": "cpu", **options})).train()
    random, shape, count = generator(0, "waits"), method.encoder.token_shape, 6
    def tokens(*rows): return torch.randn(*rows, *shape, generator=random)
    texts = [f"is {colour} and has long sleeves" for colour in ("red", "blue", "plain", "striped", "green", "very dark")]
    batch = Batch(tokens(count), texts, tokens(count), torch.arange(count), tokens(count, 1) if negatives else None, 0.9, None, texts if method.draws_twice else None)
    stepper = Stepper(method, 1e-4, waits=waits)
    training_step(method, [(batch, 1.0)], stepper)
    with Questions() as asked: training_step(method, [(batch, 1.0)], stepper)
    return set(asked.found)


CASES = {name: (name, METHODS[name].uses_negatives, {}) for name in METHODS}
CASES |= {"dqe_cir, warm-up": ("dqe_cir", False, {}), "dqe_cir, paper": ("dqe_cir", True, {"recipe": "paper"})}


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_does_not_wait_asks_nothing(case):
    name, negatives, options = CASES[case]
    assert questions(name, False, negatives, **options) <= set(NOT_ON_A_GPU)


def test_the_test_sees_a_question():
    "A step that looks at its figures before it moves asks for them; and the exceptions are still asked somewhere."
    asked = questions("dqe_cir", True, False)
    assert {file for file, _ in asked} >= {"step.py"} and set(NOT_ON_A_GPU) <= asked


def test_a_bad_step_is_the_last_that_counts(monkeypatch):
    "Weights, moments and AdamW's count of steps stay where the last sound step left them; in float16 the scaler's own skips are no error."
    for precision in ("float32", "float16"):
        method = build_method(train_config({"method": "info_nce", "device": "cpu"})).eval()
        stepper, losses, random = Stepper(method, 1e-3, precision=precision, waits=False), method.losses, generator(0, "bad")
        tokens = torch.randn(2, 4, *method.encoder.token_shape, generator=random)
        batch = Batch(tokens[0], ["is red"] * 4, tokens[1], torch.arange(4))
        def state(): return [value.clone() for kept in stepper.optimizer.state.values() for value in kept.values()] + [p.detach().clone() for p in method.parameters()]
        for _ in range(3): sound = training_step(method, [(batch, 1.0)], stepper)
        before = state()
        monkeypatch.setattr(method, "losses", lambda batch: {"info_nce": losses(batch)["info_nce"] / 0})
        bad = training_step(method, [(batch, 1.0)], stepper)
        assert sound["total"].isfinite() and not bad["total"].isfinite()
        assert all(torch.equal(now, then) for now, then in zip(state(), before, strict=True))
