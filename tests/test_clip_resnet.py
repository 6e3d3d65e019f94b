"CLIP with a ResNet: against figures of open_clip and open_clip itself, torch's own attention, and a plain twin of the tower; every wrong file."
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close
from transformers import CLIPTokenizer

from dqe_cir.clip_resnet import AttentionPool, Bottleneck, clip_resnet, image_sizes, load_clip_resnet
from dqe_cir.core import DataError, generator
from dqe_cir.native import ClipResNetEncoder, load_clip

# ---- a recipe for weights: the published names with their shapes, filled in alphabetical order


def shapes_of(width, layers, side, vocabulary, length, text, blocks, space):
    "Names and shapes of a CLIP with a ResNet, as they are published."
    half, wide = width // 2, 32 * width
    norm = ("weight", "bias", "running_mean", "running_var")
    shapes = {"logit_scale": (), "text_projection": (text, space), "token_embedding.weight": (vocabulary, text), "positional_embedding": (length, text),
              "ln_final.weight": (text,), "ln_final.bias": (text,), "visual.attnpool.positional_embedding": (side ** 2 + 1, wide)}
    convolutions = {"conv1": ("bn1", half, 3, 3), "conv2": ("bn2", half, half, 3), "conv3": ("bn3", width, half, 3)}
    into = width
    for stage, count in enumerate(layers):
        inner = width * 2 ** stage
        for block in range(count):
            stem = f"layer{stage + 1}.{block}."
            convolutions |= {stem + "conv1": (stem + "bn1", inner, into, 1), stem + "conv2": (stem + "bn2", inner, inner, 3), stem + "conv3": (stem + "bn3", 4 * inner, inner, 1)}
            if block == 0: convolutions[stem + "downsample.0"] = (stem + "downsample.1", 4 * inner, into, 1)
            into = 4 * inner
    for name, (after, out, of, size) in convolutions.items():
        shapes[f"visual.{name}.weight"] = (out, of, size, size)
        shapes |= {f"visual.{after}.{part}": (out,) for part in norm}
    for name, out in (("q", wide), ("k", wide), ("v", wide), ("c", space)):
        shapes |= {f"visual.attnpool.{name}_proj.weight": (out, wide), f"visual.attnpool.{name}_proj.bias": (out,)}
    for number in range(blocks):
        stem = f"transformer.resblocks.{number}."
        for name, out, of in (("attn.in_proj_", 3 * text, text), ("attn.out_proj.", text, text), ("mlp.c_fc.", 4 * text, text), ("mlp.c_proj.", text, 4 * text)):
            shapes |= {f"{stem}{name}weight": (out, of), f"{stem}{name}bias": (out,)}
        shapes |= {f"{stem}{name}.{part}": (text,) for name in ("ln_1", "ln_2") for part in ("weight", "bias")}
    return shapes


def random_state(**sizes):
    "Random weights that keep activations in range; norms near 1, variances positive."
    state, random = {}, generator(0, "clip resnet")
    for name, shape in sorted(shapes_of(**sizes).items()):
        draw = torch.randn(shape, generator=random)
        is_norm = any(part in name for part in (".bn", ".ln_", "ln_final", "downsample.1"))
        if name.endswith("running_var"): state[name] = 0.5 + draw ** 2 / 4
        elif is_norm and name.endswith("weight"): state[name] = 1 + draw / 8
        elif len(shape) < 2 or "positional" in name: state[name] = draw / 8
        else: state[name] = draw / math.sqrt(math.prod(shape[1:]) if name != "text_projection" else shape[0])
        if name.endswith("running_var"): state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(3)
    return state


SMALL = dict(width=8, layers=(1, 2, 1, 1), side=2, vocabulary=50, length=12, text=64, blocks=2, space=8)
RN50X4 = dict(width=80, layers=(4, 6, 10, 6), side=9, vocabulary=49408, length=77, text=640, blocks=12, space=640)
IDS = torch.tensor([[48, 5, 9, 49, 0, 0], [48, 7, 49, 0, 0, 0], [48, 1, 2, 3, 30, 49]])


def pictures(side, count=2): return torch.randn(count, 3, 32 * side, 32 * side, generator=generator(1, "pictures"))


def outputs(model, ids, pixels):
    with torch.no_grad(): return model.visual(pixels), model.text(input_ids=ids).text_embeds


# ---- figures of open_clip

def test_equals_the_figures_of_open_clip():
    "open_clip 3.3.0 with the recipe's weights; `test_equals_open_clip` computes them again where it is installed."
    image, text = outputs(clip_resnet(random_state(**SMALL)), IDS, pictures(2))
    assert_close(image, torch.tensor(GOLDEN_IMAGE), rtol=1e-4, atol=1e-5)
    assert_close(text, torch.tensor(GOLDEN_TEXT), rtol=1e-4, atol=1e-5)


GOLDEN_IMAGE = [[-0.874617, -0.370873, -1.707676, 0.217084, -2.046928, 0.795591, 0.798483, 1.650199],
                [-0.75119, -0.330772, -1.68028, 0.135569, -1.845021, 0.726135, 0.783258, 1.606319]]
GOLDEN_TEXT = [[-0.853487, -0.794614, 0.262418, -0.050083, -0.279364, 0.87317, 0.796772, 0.01729],
               [-1.534333, -0.765788, 0.991603, -1.139786, 0.006512, 1.669599, 0.69552, -0.285274],
               [-0.50101, -2.175713, 1.193985, -2.097002, -0.780909, 0.196446, 1.77832, 0.254198]]


def open_clips_outputs(state, ids, pixels, quick_gelu=True):
    "The same weights and inputs through open_clip."
    found = pytest.importorskip("open_clip.model", exc_type=ImportError)
    size = image_sizes(state)
    vocabulary, text = state["token_embedding.weight"].shape
    blocks = len({name.split(".")[2] for name in state if name.startswith("transformer.")})
    model = found.CLIP(state["text_projection"].shape[1], dict(image_size=size["image_size"], layers=list(size["layers"]), width=size["width"], patch_size=None),
                       dict(context_length=len(state["positional_embedding"]), vocab_size=vocabulary, width=text, heads=text // 64, layers=blocks), quick_gelu=quick_gelu).eval()
    model.load_state_dict(state)
    padded = F.pad(ids, (0, len(state["positional_embedding"]) - ids.shape[1]))
    with torch.no_grad(): return model.encode_image(pixels), model.encode_text(padded)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_equals_open_clip(quick_gelu):
    state, pixels = random_state(**SMALL), pictures(2)
    theirs = open_clips_outputs(state, IDS, pixels, quick_gelu)
    for ours, other in zip(outputs(clip_resnet(state, quick_gelu), IDS, pixels), theirs): assert_close(ours, other, rtol=1e-5, atol=1e-5)
    if quick_gelu:
        for golden, other in zip((GOLDEN_IMAGE, GOLDEN_TEXT), theirs): assert_close(torch.tensor(golden), other, rtol=1e-4, atol=1e-5)


def test_equals_open_clip_at_the_size_of_rn50x4():
    "Twenty-six blocks of random weights make large numbers; the vectors differ by a millionth of their length."
    pytest.importorskip("open_clip.model", exc_type=ImportError)
    state, ids = random_state(**RN50X4), torch.where(IDS == 0, 0, IDS + 49408 - 50)
    theirs = open_clips_outputs(state, ids, pictures(9, 1))
    for ours, other in zip(outputs(clip_resnet(state), ids, pictures(9, 1)), theirs):
        assert ours.shape[1] == 640
        error = (ours - other).norm(dim=1) / other.norm(dim=1)
        assert error.max() < 1e-5
