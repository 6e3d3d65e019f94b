"LAVIS checkpoints: towers and Q-Former against plain twins written from the tensors' names, against figures of the original code, and files that must be refused."
import json
import math
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dqe_cir.encoder.checkpoints import EPS, UNUSED, blank_model, convert, lavis_config, lavis_names, main
from dqe_cir.encoder.checkpoints import read_checkpoint, tower_kind, usual_heads, verify
from dqe_cir.core import DataError
from dqe_cir.encoder import from_lavis, load_encoder
from dqe_cir.losses import pairwise_kl

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "red", "long", "has", "dots", "and", "blue"]
KINDS = ("eva", "clip")


# ---- a small state dict with LAVIS' names

class Draw:
    "Random tensors under names; every one differs, so that no two can be exchanged unnoticed."
    def __init__(self, seed): self.state, self.random = {}, torch.Generator().manual_seed(seed)
    def __call__(self, name, *shape, scale=0.3, shift=0.0): self.state[name] = shift + scale * torch.randn(*shape, generator=self.random)
    def linear(self, name, out, into): self(f"{name}.weight", out, into, scale=into ** -0.5), self(f"{name}.bias", out)
    def norm(self, name, width): self(f"{name}.weight", width, shift=1.0), self(f"{name}.bias", width)


def eva_tower(draw, width, blocks, wide, positions):
    draw("visual_encoder.cls_token", 1, 1, width), draw("visual_encoder.pos_embed", 1, positions, width)
    draw("visual_encoder.patch_embed.proj.weight", width, 3, 7, 7, scale=0.1), draw("visual_encoder.patch_embed.proj.bias", width)
    for i in range(blocks):
        stem = f"visual_encoder.blocks.{i}."
        draw(stem + "attn.qkv.weight", 3 * width, width, scale=width ** -0.5), draw(stem + "attn.q_bias", width), draw(stem + "attn.v_bias", width)
        draw.linear(stem + "attn.proj", width, width), draw.linear(stem + "mlp.fc1", wide, width), draw.linear(stem + "mlp.fc2", width, wide)
        draw.norm(stem + "norm1", width), draw.norm(stem + "norm2", width)


def clip_tower(draw, width, blocks, wide, positions):
    draw("visual_encoder.class_embedding", width), draw("visual_encoder.positional_embedding", positions, width)
    draw("visual_encoder.conv1.weight", width, 3, 7, 7, scale=0.1), draw.norm("visual_encoder.ln_pre", width)
    for i in range(blocks):
        stem = f"visual_encoder.transformer.resblocks.{i}."
        draw(stem + "attn.in_proj_weight", 3 * width, width, scale=width ** -0.5), draw(stem + "attn.in_proj_bias", 3 * width)
        draw.linear(stem + "attn.out_proj", width, width), draw.linear(stem + "mlp.c_fc", wide, width), draw.linear(stem + "mlp.c_proj", width, wide)
        draw.norm(stem + "ln_1", width), draw.norm(stem + "ln_2", width)


def lavis_state(kind="eva", seed=0, width=None, hidden=128, layers=3, queries=3, embed=6, looks=2):
    "Two tower blocks on a 2x2 grid of 7-pixel patches, a Q-Former whose every `looks`-th layer looks at them."
    draw, width = Draw(seed), width or {"eva": 88, "clip": 64}[kind]
    {"eva": eva_tower, "clip": clip_tower}[kind](draw, width, 2, 20, 5)
    draw("query_tokens", 1, queries, hidden, scale=1), draw.norm("ln_vision", width)
    draw("Qformer.bert.embeddings.word_embeddings.weight", len(WORDS) + 1, hidden, scale=1), draw("Qformer.bert.embeddings.position_embeddings.weight", 40, hidden)
    draw.norm("Qformer.bert.embeddings.LayerNorm", hidden)
    for i in range(layers):
        stem = f"Qformer.bert.encoder.layer.{i}."
        for part, into in [("attention", hidden)] + [("crossattention", width)] * (i % looks == 0):
            for name, source in (("query", hidden), ("key", into), ("value", into)): draw.linear(f"{stem}{part}.self.{name}", hidden, source)
            draw.linear(f"{stem}{part}.output.dense", hidden, hidden), draw.norm(f"{stem}{part}.output.LayerNorm", hidden)
        for end in ("", "_query"):
            draw.linear(f"{stem}intermediate{end}.dense", 24, hidden), draw.linear(f"{stem}output{end}.dense", hidden, 24), draw.norm(f"{stem}output{end}.LayerNorm", hidden)
    for name, out in (("vision_proj", embed), ("text_proj", embed), ("itm_head", 2)): draw.linear(name, out, hidden)
    draw.linear("Qformer.cls.predictions.decoder", len(WORDS) + 1, hidden)
    draw.state["Qformer.bert.embeddings.position_ids"], draw.state["temp"] = torch.arange(40)[None], torch.tensor(0.0431)
    return draw.state


def encoder_of(state, **extra): return from_lavis(state, **usual_heads(state), **extra)


# ---- the twin: LAVIS' three passes, spelled out from the names

def attend(query, key, value, heads, mask=None):
    "One head after the other."
    out, size = [], query.shape[-1] // heads
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(size)
        if mask is not None: scores = scores.masked_fill(mask[:, None, :] == 0, -torch.inf)
        out.append(scores.softmax(-1) @ value[..., part])
    return torch.cat(out, -1)


class Twin:
    def __init__(self, state, heads, vision_heads): self.state, self.heads, self.vision_heads = state, heads, vision_heads
    def linear(self, name, x): return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]
    def norm(self, name, x, eps): return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def tower(self, pixels):
        s, eva = self.state, "visual_encoder.pos_embed" in self.state
        weight, bias = (s["visual_encoder.patch_embed.proj.weight"], s["visual_encoder.patch_embed.proj.bias"]) if eva else (s["visual_encoder.conv1.weight"], None)
        patches = F.conv2d(pixels, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
        first = (s["visual_encoder.cls_token"] if eva else s["visual_encoder.class_embedding"]).view(1, 1, -1)
        x = torch.cat([first.expand(len(pixels), -1, -1), patches], 1) + s["visual_encoder.pos_embed" if eva else "visual_encoder.positional_embedding"]
        if not eva: x = self.norm("visual_encoder.ln_pre", x, 1e-5)
        for i in range(2): x = self.eva_block(f"visual_encoder.blocks.{i}.", x) if eva else self.clip_block(f"visual_encoder.transformer.resblocks.{i}.", x)
        return x

    def eva_block(self, stem, x):
        s, y = self.state, self.norm(stem + "norm1", x, 1e-6)
        query, key, value = (y @ s[stem + "attn.qkv.weight"].T).chunk(3, -1)
        x = x + self.linear(stem + "attn.proj", attend(query + s[stem + "attn.q_bias"], key, value + s[stem + "attn.v_bias"], self.vision_heads))
        return x + self.linear(stem + "mlp.fc2", F.gelu(self.linear(stem + "mlp.fc1", self.norm(stem + "norm2", x, 1e-6))))

    def clip_block(self, stem, x):
        y = self.norm(stem + "ln_1", x, 1e-5) @ self.state[stem + "attn.in_proj_weight"].T + self.state[stem + "attn.in_proj_bias"]
        x = x + self.linear(stem + "attn.out_proj", attend(*y.chunk(3, -1), self.vision_heads))
        y = self.linear(stem + "mlp.c_fc", self.norm(stem + "ln_2", x, 1e-5))
        return x + self.linear(stem + "mlp.c_proj", y * torch.sigmoid(1.702 * y))

    def attention(self, stem, x, source, mask=None):
        query, key, value = self.linear(stem + "self.query", x), self.linear(stem + "self.key", source), self.linear(stem + "self.value", source)
        return self.norm(stem + "output.LayerNorm", self.linear(stem + "output.dense", attend(query, key, value, self.heads, mask)) + x, 1e-12)

    def feed(self, stem, x, end):
        y = self.linear(f"{stem}output{end}.dense", F.gelu(self.linear(f"{stem}intermediate{end}.dense", x)))
        return self.norm(f"{stem}output{end}.LayerNorm", y + x, 1e-12)

    def qformer(self, image=None, ids=None, mask=None):
        "Queries (none without an image), then words."
        s, parts, count = self.state, [], 0
        if image is not None: parts, count = [s["query_tokens"].expand(len(image), -1, -1)], s["query_tokens"].shape[1]
        if ids is not None:
            embeddings = "Qformer.bert.embeddings."
            parts.append(F.embedding(ids, s[embeddings + "word_embeddings.weight"], padding_idx=0) + s[embeddings + "position_embeddings.weight"][:ids.shape[1]])
        x = self.norm("Qformer.bert.embeddings.LayerNorm", torch.cat(parts, 1), 1e-12)
        if mask is not None: mask = torch.cat([torch.ones(len(x), count, dtype=mask.dtype), mask], 1)
        for i in range(1 + max(int(m[1]) for name in s if (m := re.match(r"Qformer\.bert\.encoder\.layer\.(\d+)", name)))):
            stem = f"Qformer.bert.encoder.layer.{i}."
            x = self.attention(stem + "attention.", x, x, mask)
            queries, words = x[:, :count], x[:, count:]
            if count and stem + "crossattention.self.query.weight" in s:
                queries = self.attention(stem + "crossattention.", queries, self.norm("ln_vision", image, 1e-5))
            x = torch.cat([self.feed(stem, queries, "_query")] * (count > 0) + [self.feed(stem, words, "")] * (ids is not None), 1)
        return x


@pytest.fixture(scope="module", params=KINDS)
def both(request):
    "An encoder, its twin, and inputs."
    state, random = lavis_state(request.param), torch.Generator().manual_seed(9)
    sizes = usual_heads(state)
    ids = torch.randint(0, len(WORDS), (4, 9), generator=random)
    mask = (torch.arange(9) < torch.tensor([9, 1, 5, 3])[:, None]).long()
    return from_lavis(state, **sizes), Twin(state, sizes["heads"], sizes["vision_heads"]), torch.randn(4, 3, 14, 14, generator=random), ids, mask


def close(ours, theirs): torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tower_ends_where_the_twin_does(both):
    encoder, twin, pixels, _, _ = both
    close(encoder.image_tokens(pixels), twin.tower(pixels))


@torch.no_grad()
def test_three_passes_agree_with_the_twin(both):
    encoder, twin, pixels, ids, mask = both
    image = twin.tower(pixels)
    close(encoder.encode_target(image), F.normalize(twin.linear("vision_proj", twin.qformer(image)), dim=-1))
    theirs = twin.qformer(image, ids, mask)
    queries, words = encoder.fuse(image, ids, mask)
    close(queries, theirs[:, :3])
    close(words[mask.bool()], theirs[:, 3:][mask.bool()])
    close(encoder.encode_text(ids, mask), F.normalize(twin.linear("text_proj", twin.qformer(None, ids, mask)[:, 0]), dim=-1))


def test_gradients_agree_with_the_twin(both):
    "Of every trained tensor: a weight in the wrong place may still give the right value once, but not the right gradient."
    encoder, twin, pixels, ids, mask = both
    kind, image = tower_kind(twin.state), twin.tower(pixels)
    leaves = {name: value.clone().requires_grad_() for name, value in twin.state.items() if value.is_floating_point() and not name.startswith("visual_encoder.")}
    other, weights = Twin(twin.state | leaves, twin.heads, twin.vision_heads), torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))
    target, fused = F.normalize(other.linear("vision_proj", other.qformer(image)), dim=-1), other.linear("text_proj", other.qformer(image, ids, mask)[:, :3])
    ((weights * target).sum() + fused.square().mean()).backward()
    ((weights * encoder.encode_target(image)).sum() + encoder.text_projection(encoder.fuse(image, ids, mask)[0]).square().mean()).backward()
    compared = 0
    for name, gradient in trained_gradients(encoder, kind).items():
        torch.testing.assert_close(gradient, leaves[name].grad, atol=1e-5, rtol=1e-4)
        compared += gradient.abs().max() > 1e-6
    encoder.zero_grad()
    assert compared > 40


def trained_gradients(encoder, kind):
    "Gradients under LAVIS' names, of what has one."
    named = {re.sub(r"^ln_vision\.", "vision_model.post_layernorm.", name): parameter for name, parameter in encoder.named_parameters() if not name.startswith("vision_tower.")}
    return {lavis_names(name, kind)[0]: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


# ---- what is read off the tensors

@given(kind=st.sampled_from(KINDS), heads=st.integers(1, 2), vision_heads=st.integers(1, 2), layers=st.integers(1, 4), queries=st.integers(1, 5), embed=st.integers(2, 9),
       looks=st.integers(1, 3))
def test_sizes_are_read_off_the_tensors(kind, heads, vision_heads, layers, queries, embed, looks):
    state = lavis_state(kind, width=vision_heads * {"eva": 88, "clip": 64}[kind], hidden=64 * heads, layers=layers, queries=queries, embed=embed, looks=looks)
    assert usual_heads(state) == dict(heads=heads, vision_heads=vision_heads, image_size=14)
    encoder = encoder_of(state)
    assert encoder.query_tokens.shape == (1, queries, 64 * heads) and encoder.vision_projection.out_features == embed and len(encoder.qformer.encoder.layer) == layers
    assert [layer.has_cross_attention for layer in encoder.qformer.encoder.layer] == [i % looks == 0 for i in range(layers)]
    assert encoder.image_size == 14 and len(encoder.vision_tower.encoder.layers) == 2
    assert encoder.temperature == float(state["temp"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_used_once_and_none_is_invented(kind):
    state = lavis_state(kind)
    used = [name for target in blank_model(lavis_config(state, **usual_heads(state))).state_dict() for name in lavis_names(target, kind)]
    assert set(used) | {"temp"} == {name for name in state if not UNUSED.match(name)}
    twice = {name for name in used if used.count(name) > 1}
    assert all(re.search(r"in_proj_(weight|bias)$", name) and used.count(name) == 3 for name in twice) and (kind == "clip") == bool(twice)


@pytest.mark.parametrize("part, value", [("Q-Former", 0.5), ("ln_vision", 0.5), ("EVA blocks", 0.5)])
@torch.no_grad()
def test_each_eps_reaches_its_norms(part, value):
    state, pixels = lavis_state("eva"), torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    usual, changed = encoder_of(state), encoder_of(state, eps={part: value})
    moved = lambda ours, theirs: bool((ours - theirs).abs().max() > 1e-3)
    assert moved(changed.image_tokens(pixels), usual.image_tokens(pixels)) == (part == "EVA blocks")
    tokens = usual.image_tokens(pixels)
    assert moved(changed.ln_vision(tokens), usual.ln_vision(tokens)) == (part == "ln_vision")
    assert moved(changed.encode_target(tokens), usual.encode_target(tokens)) == (part != "EVA blocks")


def test_training_leaves_the_state_dict_alone():
    state = lavis_state()
    before = {name: value.clone() for name, value in state.items()}
    encoder = encoder_of(state)
    with torch.no_grad(): [parameter.add_(1) for parameter in encoder.parameters()]
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert not any(parameter.requires_grad for parameter in encoder.vision_tower.parameters()) and encoder.query_tokens.requires_grad


def test_building_leaves_global_chance_alone():
    before = torch.random.get_rng_state()
    encoder_of(lavis_state("clip"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_mixed_precision_files_become_one_precision():
    "LAVIS halves linear layers and leaves norms, biases of queries and positions alone."
    state = {name: value.half() if re.search(r"visual_encoder.*(qkv|proj|fc\d)\.(weight|bias)$", name) else value for name, value in lavis_state().items()}
    assert {value.dtype for value in state.values()} == {torch.float16, torch.float32, torch.int64}
    assert {parameter.dtype for parameter in encoder_of(state).parameters()} == {torch.float32}


def test_an_encoder_without_tokenizer_says_so():
    with pytest.raises(ValueError, match="no tokenizer"): encoder_of(lavis_state()).tokenize(["is red"])


# ---- files

@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    "A folder with a vocabulary and one checkpoint of each kind."
    folder = tmp_path_factory.mktemp("lavis")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    for kind in KINDS: torch.save({"model": lavis_state(kind), "epoch": 3}, folder / f"{kind}.pth")
    save_file(lavis_state("clip"), folder / "clip.safetensors")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", ["eva.pth", "clip.pth", "clip.safetensors"])
def test_file_and_converted_folder_are_one_encoder(shelf, tmp_path, name):
    direct, folder = load_encoder(str(shelf / name), device="cpu"), convert(shelf / name, tmp_path / "folder")
    again = load_encoder(str(folder), device="cpu")
    pixels, texts = torch.randn(3, 3, 14, 14, generator=torch.Generator().manual_seed(0)), ["is red", "has long dots", "is blue and long"]
    assert again.temperature == direct.temperature == float(torch.tensor(0.0431)) and again.ln_vision.eps == direct.ln_vision.eps == 1e-5
    assert torch.equal(again.image_tokens(pixels), direct.image_tokens(pixels)) and again.tower_fingerprint() == direct.tower_fingerprint()
    for ours, theirs in zip(again.fuse(again.image_tokens(pixels), *again.tokenize(texts)), direct.fuse(direct.image_tokens(pixels), *direct.tokenize(texts))):
        assert torch.equal(ours, theirs)
    assert direct.tokenizer.bos_token == again.tokenizer.bos_token == "[DEC]" and len(again.tokenizer) == len(WORDS) + 1
    half = load_encoder(str(shelf / name), device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in half.vision_tower.parameters()} == {torch.bfloat16} and half.query_tokens.dtype == torch.float32


def test_conversion_keeps_every_bit_of_a_halved_tower(shelf, tmp_path):
    state = {name: value.half() if name.endswith("attn.qkv.weight") else value for name, value in lavis_state().items()}
    state["vision_proj.bias"][0] = -0.0
    torch.save(state, tmp_path / "half.pth")
    (tmp_path / "vocab.txt").write_text((shelf / "vocab.txt").read_text())
    stored = load_file(convert(tmp_path / "half.pth", tmp_path / "out") / "model.safetensors")
    key = "vision_model.encoder.layers.0.self_attn.qkv.weight"
    assert stored[key].dtype == torch.float16 and torch.equal(stored[key], state["visual_encoder.blocks.0.attn.qkv.weight"])
    assert verify(tmp_path / "half.pth", tmp_path / "out") == len(stored)
    stored["vision_projection.bias"][0] = 0.0  # equal, but not in every bit
    save_file(stored, tmp_path / "out" / "model.safetensors")
    with pytest.raises(DataError, match="vision_projection.bias"): verify(tmp_path / "half.pth", tmp_path / "out")


@given(which=st.integers(0, 10 ** 6), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 31))
def test_verify_finds_any_flipped_bit(converted, which, place, bit):
    source, folder, stored = converted
    name = sorted(stored)[which % len(stored)]
    changed = {key: value.clone() for key, value in stored.items()}
    changed[name].view(torch.int32).view(-1)[int(place * changed[name].numel())] ^= (1 << bit) - (1 << 32) * (bit == 31)
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(DataError, match=re.escape(name)): verify(source, folder)


@pytest.fixture(scope="module")
def converted(shelf, tmp_path_factory):
    folder = convert(shelf / "clip.pth", tmp_path_factory.mktemp("converted") / "clip")
    return shelf / "clip.pth", folder, load_file(folder / "model.safetensors")


def test_verify_compares_the_temperature(shelf, tmp_path):
    folder = convert(shelf / "eva.pth", tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"itc_temperature": 0.07}))
    with pytest.raises(DataError, match="itc_temperature is 0.07, not 0.043"): verify(shelf / "eva.pth", folder)


def test_a_conversion_that_fails_leaves_nothing(shelf, tmp_path, monkeypatch):
    def full(*_, **__): raise OSError("no space left")
    monkeypatch.setattr("dqe_cir.encoder.checkpoints.save_file", full)
    with pytest.raises(OSError, match="no space"): convert(shelf / "eva.pth", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_never_overwritten(shelf, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out exists already"): convert(shelf / "eva.pth", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_command_line(shelf, tmp_path, capsys):
    assert main(["convert", str(shelf / "eva.pth"), str(tmp_path / "out")]) == 0
    assert main(["verify", str(shelf / "eva.pth"), str(tmp_path / "out")]) == 0
    assert "tensors equal those of" in capsys.readouterr().out
    assert main(["verify", str(shelf / "clip.pth"), str(tmp_path / "out")]) == 1
    assert "differs" in capsys.readouterr().out


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state}, lambda state: {"epoch": 7, "Blip2QformerCirAlignPrompt": state}])
def test_wrappings(tmp_path, wrap):
    state = lavis_state()
    torch.save(wrap(state), tmp_path / "a.pt")
    assert all(torch.equal(value, state[name]) for name, value in read_checkpoint(tmp_path / "a.pt").items())


@pytest.mark.parametrize("kind, name, width, blocks", [("eva", "eva_vit_g.pth", 1408, 40), ("clip", "clip_vit_L.pth", 1024, 24)])
def test_a_frozen_tower_is_found_beside_the_checkpoint(tmp_path, kind, name, width, blocks):
    "Without the last block and the heads that BLIP-2 leaves out; names alone count here, so the tensors are tiny."
    rest = {key: value for key, value in lavis_state(kind).items() if not key.startswith("visual_encoder.")} | {"ln_vision.weight": torch.ones(width)}
    torch.save({"model": rest}, tmp_path / "first-stage.pth")
    with pytest.raises(DataError, match=f"put {name} beside it"): read_checkpoint(tmp_path / "first-stage.pth")
    one = {key.removeprefix("visual_encoder."): torch.zeros(1) for key in lavis_state(kind) if key.startswith("visual_encoder.")}
    tower = {re.sub(r"blocks\.0", f"blocks.{i}", key): value for i in range(blocks) for key, value in one.items() if "blocks.1." not in key}
    torch.save(tower | {"head.weight": torch.zeros(1), "norm.weight": torch.zeros(1), "ln_post.weight": torch.zeros(1), "proj": torch.zeros(1)}, tmp_path / name)
    found = {key for key in read_checkpoint(tmp_path / "first-stage.pth") if key.startswith("visual_encoder.")}
    assert {int(match[1]) for key in found if (match := re.search(r"blocks\.(\d+)\.", key))} == set(range(blocks - 1))
    assert {re.sub(r"blocks\.\d+", "blocks.0", key) for key in found} == {key for key in lavis_state(kind) if key.startswith("visual_encoder.") and "blocks.1." not in key}


class Danger:
    def __reduce__(self): return (print, ("code was run",))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_file_cut_anywhere_is_refused(tmp_path, suffix, share):
    file = tmp_path / f"cut{suffix}"
    torch.save(lavis_state(), file) if suffix == ".pth" else save_file(lavis_state(), file)
    raw = file.read_bytes()
    file.write_bytes(raw[:int(share * len(raw))])
    with pytest.raises(DataError, match=f"cut{suffix}.*(empty|cut off|damaged)"): load_encoder(str(file), device="cpu")


def test_a_pickle_that_runs_code_is_refused(tmp_path, capfd):
    torch.save({"model": lavis_state(), "config": Danger()}, tmp_path / "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"model": Danger()}, protocol=2))
    for name in ("new.pth", "old.pth"):
        with pytest.raises(DataError, match=f"{name} holds more than tensors"): load_encoder(str(tmp_path / name), device="cpu")
    assert "code was run" not in capfd.readouterr().out


def test_old_style_torch_files_are_read(tmp_path):
    torch.save(lavis_state(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "old.pth")["temp"], torch.tensor(0.0431))


WRONG = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 99\n", "Git LFS pointer"),
    "page": (b"\n<!DOCTYPE html><title>Not found</title>", "web page"),
    "noise": (b"this is no pickle at all", "damaged"),
    "another pickle": (b"\x80\x02]q\x00.", "damaged|more than tensors"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_no_checkpoints(tmp_path, name):
    (tmp_path / "file.pth").write_bytes(WRONG[name][0])
    with pytest.raises(DataError, match=f"file.pth.*({WRONG[name][1]})"): load_encoder(str(tmp_path / "file.pth"), device="cpu")


def drop(pattern): return lambda state: {name: value for name, value in state.items() if not re.search(pattern, name)}
def put(**values): return lambda state: state | {name.replace("__", "."): value for name, value in values.items()}


SPOILED = {
    "another model": (lambda state: {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, "no query_tokens among conv1.weight, fc.bias"),
    "a list": (lambda state: [1, 2], "holds a list"),
    "no tower": (drop("visual_encoder"), "put eva_vit_g.pth beside it"),
    "no positions": (drop("pos_embed"), "no image tower"),
    "no text layers": (drop(r"layer\.\d\.(intermediate|output)\."), "use_qformer_text_input would be false"),
    "no words": (drop("word_embeddings"), "use_qformer_text_input would be false"),
    "one missing": (drop(r"layer\.1\.attention\.self\.key\.bias"), r"missing tensors: 1 \(Qformer.bert.encoder.layer.1.attention.self.key.bias\)"),
    "a block missing": (drop(r"blocks\.0\."), "mlp.fc1.weight"),
    "a bias missing": (drop(r"blocks\.1\.attn\.v_bias"), r"missing tensors: 1 \(visual_encoder.blocks.1.attn.v_bias\)"),
    "no temperature": (drop("^temp$"), "it lacks temp"),
    "a surplus": (put(opt_proj__weight=torch.zeros(2), opt_proj__bias=torch.zeros(2)), r"surplus tensors: 2 \(opt_proj.bias, opt_proj.weight\)"),
    "a shape": (put(vision_proj__bias=torch.zeros(7)), r"vision_proj.bias: shape \(7,\) where the other tensors call for \(6,\)"),
    "a width": (put(ln_vision__weight=torch.zeros(9)), r"ln_vision.weight: shape \(9,\) where the other tensors call for \(88,\)"),
    "not square": (put(visual_encoder__pos_embed=torch.zeros(1, 7, 88)), "not one more than a square grid"),
    "zero queries": (put(query_tokens=torch.zeros(1, 3, 128)), "all-zero query tokens"),
    "a negative temperature": (put(temp=torch.tensor(-0.1)), "a temperature is positive"),
    "more words than rows": (put(Qformer__bert__embeddings__word_embeddings__weight=torch.ones(4, 128)), "embeddings for 4 only"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_state_dicts_are_refused_by_name(shelf, tmp_path, name):
    change, message = SPOILED[name]
    (tmp_path / "vocab.txt").write_text((shelf / "vocab.txt").read_text())
    torch.save(change(lavis_state()), tmp_path / "spoiled.pth")
    with pytest.raises(DataError, match=message) as caught: load_encoder(str(tmp_path / "spoiled.pth"), device="cpu")
    assert "spoiled.pth" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match=message): convert(tmp_path / "spoiled.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_widths_outside_the_families_want_the_number_of_heads(tmp_path):
    torch.save(lavis_state(hidden=60), tmp_path / "odd.pth")
    with pytest.raises(DataError, match="60 wide, which heads of 64 do not divide"): load_encoder(str(tmp_path / "odd.pth"), device="cpu")
    assert from_lavis(lavis_state(hidden=60), heads=5, vision_heads=4, image_size=14).query_tokens.shape == (1, 3, 60)


def test_no_vocabulary_and_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.save(lavis_state(), tmp_path / "a.pth")
    with pytest.raises(DataError, match="no vocabulary for.*put the vocab.txt"): load_encoder(str(tmp_path / "a.pth"), device="cpu")


# ---- figures of the original code

MODELS = ("qure_clip_vit", "qure_eva_vit", "sprc_eva_vit")


@pytest.fixture(scope="module")
def parity(golden): return json.loads(golden("blip2_parity.json").read_text())


@pytest.fixture(scope="module", params=MODELS)
def reference(request, golden, parity):
    "The name, the encoder and the arrays of one of the reference models."
    return request.param, golden_encoder(golden, parity, request.param), arrays(golden, request.param)


def golden_encoder(golden, parity, name):
    sizes, state = parity["config"], load_file(golden(f"blip2_{name}.safetensors"))
    return from_lavis(state, heads=sizes["heads"], vision_heads=sizes["vis_heads"], image_size=sizes["img_size"])


def arrays(golden, name):
    found = {key: torch.from_numpy(value) for key, value in np.load(golden(f"blip2_{name}.npz")).items()}
    return found | {key: found[key].long() for key in ("input_ids", "attention_mask")}


def meets(ours, theirs): torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_eps_are_those_of_the_original_code(parity): assert parity["layer_norm_eps"] == EPS


def test_temperature_is_the_checkpoints(reference, golden):
    name, encoder, _ = reference
    assert encoder.temperature == float(load_file(golden(f"blip2_{name}.safetensors"))["temp"])


@torch.no_grad()
def test_reference_features(reference):
    name, encoder, figures = reference
    read, compared = figures["attention_mask"].bool(), 0
    tokens = encoder.image_tokens(figures["reference_pixels"])
    joint, words = encoder.fuse(tokens, figures["input_ids"], figures["attention_mask"])
    both = torch.cat([joint, words], 1)
    queries = encoder.qformer(query_embeds=encoder.query_tokens.expand(len(tokens), -1, -1), encoder_hidden_states=encoder.ln_vision(tokens)).last_hidden_state
    text = encoder.qformer(query_embeds=encoder.embeddings(input_ids=figures["input_ids"]), query_length=0, attention_mask=figures["attention_mask"]).last_hidden_state
    ours = dict(vision_ln=encoder.ln_vision(tokens), reference_frozen=encoder.ln_vision(tokens), image_queries=queries, image_proj=encoder.encode_target(tokens),
                joint_queries=joint, joint_text=words[read], fusion_hidden=both, text_hidden=text[read],
                text_proj_cls=encoder.encode_text(figures["input_ids"], figures["attention_mask"]))
    for key, value in ours.items():
        if key in figures:
            meets(value, figures[key][read] if key in ("joint_text", "text_hidden") else figures[key])
            compared += 1
    assert compared == (2 if name.startswith("sprc") else 7)


@torch.no_grad()
def test_reference_targets_and_scores(reference):
    name, encoder, figures = reference
    pictures = torch.cat([figures[key] for key in ("target_pixels", "negative_pixels") if key in figures])
    target, tokens = encoder.encode_target(encoder.image_tokens(pictures)), encoder.image_tokens(figures["reference_pixels"])
    meets(target, figures["target_features"])
    fused, words = encoder.fuse(tokens, figures["input_ids"], figures["attention_mask"])
    if name.startswith("qure"): query, expected = F.normalize(encoder.text_projection(fused).mean(1), dim=-1), figures["query_feature"]
    else:  # the fused states are read once more, as words, without the picture
        sequence = encoder.embeddings(input_ids=figures["input_ids"], query_embeds=fused)
        mask = F.pad(figures["attention_mask"], (fused.shape[1], 0), value=1)
        second = encoder.qformer(query_embeds=sequence, query_length=0, attention_mask=mask).last_hidden_state
        meets(second[mask.bool()], figures["second_pass_hidden"][mask.bool()])
        query, expected = F.normalize(encoder.text_projection(second[:, fused.shape[1]]), dim=-1), figures["fusion_feature"]
    meets(query, expected)
    meets(torch.einsum("qd,ntd->qnt", query, target).amax(-1), figures["retrieval_scores"])


def qure_scores(encoder, figures):
    "Each query against its target and its negative (B,2)."
    fused, _ = encoder.fuse(encoder.image_tokens(figures["reference_pixels"]), figures["input_ids"], figures["attention_mask"])
    query = F.normalize(encoder.text_projection(fused).mean(1), dim=-1)
    pictures = (encoder.encode_target(encoder.image_tokens(figures[key])) for key in ("target_pixels", "negative_pixels"))
    return torch.stack([torch.einsum("qd,qtd->qt", query, picture).amax(-1) for picture in pictures], 1)


@pytest.mark.parametrize("name", MODELS[:2])
def test_reference_loss_gradients_and_steps(golden, parity, name):
    encoder, figures, expected = golden_encoder(golden, parity, name), arrays(golden, name), parity[name]
    temperature = torch.nn.Parameter(torch.tensor(encoder.temperature))
    meets(qure_scores(encoder, figures).detach(), figures["scores_without_temp"])
    meets((qure_scores(encoder, figures) / temperature).detach(), figures["scores_with_temp"])
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad] + [temperature]
    optimizer, losses, norms = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05), [], None
    for _ in range(5):
        optimizer.zero_grad()
        scores = qure_scores(encoder, figures) / temperature
        loss = pairwise_kl(scores[:, 0], scores[:, 1]).mean()
        loss.backward()
        norms = norms or {key: float(value.norm()) for key, value in (trained_gradients(encoder, tower_kind_of(name)) | {"temp": temperature.grad}).items()}
        losses.append(float(loss.detach()))
        optimizer.step()
    assert math.isclose(losses[0], expected["kl_loss"], abs_tol=1e-4)
    np.testing.assert_allclose(losses, expected["loss_over_5_adamw_steps_lr1e-4_wd0.05_eval_mode"], atol=1e-4)
    assert set(expected["grad_norm"]) <= set(norms) and len(expected["grad_norm"]) > 60
    for key, value in expected["grad_norm"].items(): assert math.isclose(norms[key], value, rel_tol=1e-4, abs_tol=1e-4), key


def tower_kind_of(name): return "clip" if "clip" in name else "eva"
