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

from dqe_cir.encoder.native.clip_resnet import AttentionPool, Bottleneck, clip_resnet, image_sizes
from dqe_cir.encoder.native.clip_resnet import load_clip_resnet
from dqe_cir.core import DataError, generator
from dqe_cir.encoder.native.clip import ClipResNetEncoder, load_clip

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


# ---- plain twins

@pytest.mark.parametrize("side, width", [(1, 64), (2, 128), (3, 192)])
def test_the_pool_is_torchs_attention(side, width):
    "Queries, keys and values of torch's own multi-head attention, asked for every place, of which the first is read."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(side)
        pool, layer = AttentionPool(side, width, 10), nn.MultiheadAttention(width, width // 64, batch_first=True)
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.cat([pool.q_proj.weight, pool.k_proj.weight, pool.v_proj.weight]))
        layer.in_proj_bias.copy_(torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]))
        layer.out_proj.weight.copy_(torch.eye(width)); layer.out_proj.bias.zero_()
        maps = torch.randn(3, width, side, side, generator=generator(side)) * 3
        places = torch.stack([maps.mean((2, 3)), *(maps[:, :, y, x] for y in range(side) for x in range(side))], 1) + pool.positional_embedding
        assert_close(pool(maps), pool.c_proj(layer(places, places, places)[0][:, 0]), rtol=1e-4, atol=1e-5)


def twin_tower(state, pixels):
    "The tower from the names of its tensors alone, batch norm written out."
    def convolve(maps, name, after, stride=1):
        weight, norm = state[f"visual.{name}.weight"], [state[f"visual.{after}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")]
        maps = F.conv2d(maps, weight, stride=stride, padding=weight.shape[-1] // 2)
        return (maps - norm[0]) / (norm[1] + 1e-5).sqrt() * norm[2] + norm[3]
    def halve(maps): return (maps[..., ::2, ::2] + maps[..., 1::2, ::2] + maps[..., ::2, 1::2] + maps[..., 1::2, 1::2]) / 4
    maps = convolve(pixels, "conv1", "bn1", stride=2).relu()
    maps = halve(convolve(convolve(maps, "conv2", "bn2").relu(), "conv3", "bn3").relu())
    for stage in (1, 2, 3, 4):
        for block in range(sum(f"visual.layer{stage}.{number}.conv1.weight" in state for number in range(20))):
            stem, halves = f"layer{stage}.{block}.", stage > 1 and block == 0
            inner = convolve(convolve(maps, stem + "conv1", stem + "bn1").relu(), stem + "conv2", stem + "bn2").relu()
            inner = convolve(halve(inner) if halves else inner, stem + "conv3", stem + "bn3")
            if block == 0: maps = convolve(halve(maps) if halves else maps, stem + "downsample.0", stem + "downsample.1")
            maps = (maps + inner).relu()
    return maps


@pytest.mark.parametrize("layers", [(1, 1, 1, 1), (2, 1, 3, 2)])
def test_the_tower_is_its_twin(layers):
    state = random_state(**SMALL | dict(layers=layers, side=3))
    model = clip_resnet(state)
    assert image_sizes(state) == dict(width=8, layers=layers, image_size=96)
    with torch.no_grad(): assert_close(model.visual(pictures(3)), model.visual.attnpool(twin_tower(state, pictures(3))), rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.sampled_from([1, 2]))
def test_a_block_keeps_or_halves(width, side, stride):
    block = Bottleneck(4, width, stride).eval()
    assert block(torch.ones(1, 4, 2 * side, 2 * side)).shape == (1, 4 * width, 2 * side // stride, 2 * side // stride)


# ---- files, through the run's own door

def write_folder(folder, state, **about):
    "The hub's layout, with `timm`'s config.json beside it."
    folder.mkdir()
    save_file({name: value.half() if value.is_floating_point() else value for name, value in state.items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 8, "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8} | about, "quick_gelu": True}}))
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet50x4_clip", "pretrained_cfg": {"tag": "openai"}}))
    letters = {f"{letter}{end}": 26 * i + ord(letter) - 97 for i, end in enumerate(("", "</w>")) for letter in "abcdefghijklmnopqrstuvwx"[:24]}
    vocabulary = {word: i for i, word in enumerate(sorted(letters))}
    CLIPTokenizer(vocab=vocabulary | {"<|startoftext|>": 48, "<|endoftext|>": 49}, merges=[]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return write_folder(tmp_path_factory.mktemp("hub") / "rn", random_state(**SMALL))


def test_a_run_names_a_folder(folder):
    encoder = load_clip(str(folder), device="cpu")
    assert type(encoder) is ClipResNetEncoder and encoder.token_shape == (3, 64, 64) and encoder.text_projection.out_features == 8
    assert {value.dtype for value in encoder.parameters()} == {torch.float32} and not encoder.train().training
    ids, mask = encoder.tokenize(["ab", "a b c d e f g h i j k l m"])
    assert ids[0, 0] == 48 and ids[0, 3] == 49 and mask.sum(1).tolist() == [4, 12] and ids[1, -1] == 49  # cut to twelve, with its mark
    with torch.no_grad(): assert_close(encoder.text_vector(ids, mask)[0], encoder.text_vector(*encoder.tokenize(["ab"]))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_a_run_names_a_file(folder, suffix):
    state, file = random_state(**SMALL), folder / f"tuned{suffix}"
    if suffix == ".safetensors": save_file(state, file)
    else: torch.save({"epoch": 7, "CLIP": state}, file)
    encoder = load_clip(str(file), device="cpu")
    assert_close(encoder.model.visual.attnpool.k_proj.weight, state["visual.attnpool.k_proj.weight"], rtol=0, atol=0)
    assert_close(encoder.text_projection.weight, state["text_projection"].T, rtol=0, atol=0)


class Surprise:
    "What a pickle must not bring to life."


def test_wrong_files_are_refused(folder, tmp_path):
    state = random_state(**SMALL)
    torch.save({"CLIP": state, "arguments": Surprise()}, tmp_path / "code.pt")
    torch.save([1.0], tmp_path / "list.pt")
    torch.save({"CLIP": {name: value for name, value in state.items() if name != "visual.layer2.1.bn3.bias"}}, tmp_path / "less.pt")
    torch.save({"CLIP": state | {"visual.class_embedding": torch.zeros(8)}}, tmp_path / "more.pt")
    torch.save({"CLIP": state | {"ln_final.weight": torch.zeros(65)}}, tmp_path / "wide.pt")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    for name, message in {"code": "more than tensors", "list": "is not a CLIP with a ResNet: .* among list", "less": r"missing tensors: 1 \(visual.layer2.1.bn3.bias\)",
                          "more": r"surplus tensors: 1 \(visual.class_embedding\)", "wide": r"ln_final.weight: shape \(65,\)", "pointer": "Git LFS pointer", "absent": "does not exist"}.items():
        with pytest.raises(DataError, match=message): load_clip(str(tmp_path / f"{name}.pt"), device="cpu")
    with pytest.raises(DataError, match="could not be loaded"): load_clip(str(tmp_path / "nothing"), device="cpu")


def test_a_file_alone_asks_the_hub_for_words(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.save({"CLIP": random_state(**SMALL)}, tmp_path / "tuned.pt")
    with pytest.raises(DataError, match="tokenizer.* timm/resnet50x4_clip.openai"): load_clip_resnet(str(tmp_path / "tuned.pt"))
