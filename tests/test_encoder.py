"The encoder against the library's own forward pass, loading that must fail, and a token cache under attack."
import json
import os
import shutil
import string

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import BertTokenizer, Blip2Config, Blip2ForImageTextRetrieval

from dqe_cir.core import DataError
from dqe_cir.encoder import MINI, cache_tokens, load_encoder
from dqe_cir.encoder.blip2 import encoder_size

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "red", "long", "has", "dots", *string.ascii_lowercase, *("##" + c for c in string.ascii_lowercase)]


def write_checkpoint(folder, change=lambda config: None, seed=0):
    "A tiny random BLIP-2 in the hub's format: 3 query tokens, 2 Q-Former layers of which one looks at the image, 5 image tokens."
    config = Blip2Config(
        vision_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, initializer_range=0.5),
        qformer_config=dict(vocab_size=len(WORDS), hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
                            encoder_hidden_size=16, use_qformer_text_input=True, max_position_embeddings=40, initializer_range=0.5),
        num_query_tokens=3, image_text_hidden_size=6)
    change(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Blip2ForImageTextRetrieval(config)
        model.query_tokens.data.normal_()
        model.vision_model.post_layernorm.weight.data.normal_(1, 0.3)
    model.save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory): return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(checkpoint): return load_encoder(str(checkpoint), device="cpu")


@pytest.fixture(scope="module")
def original(checkpoint): return Blip2ForImageTextRetrieval.from_pretrained(checkpoint).eval()


def pixels(count, size=16, seed=0): return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


TEXTS = ["is red", "has long dots", "zebra"]


# ---- the passes

@torch.no_grad()
def test_image_and_text_pass_give_the_librarys_contrastive_scores(tiny, original):
    images, (ids, mask) = pixels(3), tiny.tokenize(TEXTS)
    theirs = original(pixel_values=images, input_ids=ids, attention_mask=mask).logits_per_image
    ours = torch.einsum("itd,jd->itj", tiny.encode_target(tiny.image_tokens(images)), tiny.encode_text(ids, mask)).amax(1)
    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_joint_pass_gives_the_librarys_matching_scores(tiny, original):
    images, (ids, mask) = pixels(3), tiny.tokenize(TEXTS)
    theirs = original(pixel_values=images, input_ids=ids, attention_mask=mask, use_image_text_matching_head=True).logits_per_image
    fused, words = tiny.fuse(tiny.image_tokens(images), ids, mask)
    torch.testing.assert_close(original.itm_head(fused).mean(1), theirs)
    assert words.shape == (3, ids.shape[1], 12)


@torch.no_grad()
def test_image_tokens_end_before_the_last_norm(tiny, original):
    theirs = original.vision_model(pixel_values=pixels(2)).last_hidden_state
    ours = tiny.image_tokens(pixels(2))
    assert ours.shape == (2, 5, 16) and not ours.requires_grad
    torch.testing.assert_close(original.vision_model.post_layernorm(ours), theirs)
    assert (ours - theirs).abs().max() > 0.1


@torch.no_grad()
@given(order=st.permutations(range(3)), extra=st.lists(st.sampled_from(["has dots", "zebra zebra zebra", ""]), max_size=2))
def test_rows_do_not_see_each_other_and_padding_is_not_read(tiny, order, extra):
    tokens = tiny.image_tokens(pixels(3))
    alone = [tiny.fuse(tokens[i:i + 1], *tiny.tokenize([TEXTS[i]]))[0][0] for i in order]
    texts = [TEXTS[i] for i in order] + extra
    rows = [*order, *[0] * len(extra)]
    together, _ = tiny.fuse(tokens[rows], *tiny.tokenize(texts))
    torch.testing.assert_close(together[:3], torch.stack(alone), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tiny.encode_target(tokens)[list(order)], tiny.encode_target(tokens[list(order)]))


@pytest.mark.parametrize("layers, looks", [(2, 2), (3, 2), (4, 2), (3, 1), (1, 1)])
def test_what_is_read_does_not_depend_on_what_else_is_computed(tmp_path, layers, looks):
    "The library's whole pass against the one that leaves out, in the last layer, what nobody reads: states and gradients."
    def change(config): config.qformer_config.num_hidden_layers, config.qformer_config.cross_attention_frequency = layers, looks
    encoder = load_encoder(str(write_checkpoint(tmp_path, change)), device="cpu")
    tokens, last = encoder.image_tokens(pixels(3)), encoder.qformer.encoder.layer[-1]

    def found(words, texts):
        encoder.zero_grad()
        fused, said = encoder.fuse(tokens, *encoder.tokenize(texts), words=words)
        (encoder.text_projection(fused).sin().sum() + said[:, :words or 1].sin().sum()).backward()
        return fused.detach(), said.detach(), {name: value.grad for name, value in encoder.named_parameters() if value.grad is not None}

    for texts in (TEXTS, ["is red"] * 3):  # padded, and with nothing to mask
        whole, part = found(None, texts), found(1, texts)
        torch.testing.assert_close(part[0], whole[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(part[1], whole[1][:, :1], atol=1e-5, rtol=1e-4)
        assert part[2].keys() == whole[2].keys()
        for name, value in whole[2].items(): torch.testing.assert_close(part[2][name], value, atol=1e-4, rtol=1e-3, msg=name)
        fused, none = found(0, texts)[:2]
        torch.testing.assert_close(fused, whole[0], atol=1e-5, rtol=1e-4)
        assert none.shape[1] == 0 and all(value.grad is None for value in last.intermediate.parameters())
        ids, mask = encoder.tokenize(texts)
        with torch.no_grad():
            states = encoder.qformer(query_embeds=encoder.embeddings(input_ids=ids), query_length=0, attention_mask=mask).last_hidden_state
            expected = torch.nn.functional.normalize(encoder.text_projection(states[:, 0]), dim=-1)
            torch.testing.assert_close(encoder.encode_text(ids, mask), expected, atol=1e-5, rtol=1e-4)


def test_long_texts_are_cut_at_32_pieces(tiny):
    ids, mask = tiny.tokenize(["zebra " * 40, "is red"])
    assert ids.shape == mask.shape == (2, 32) and mask.sum(1).tolist() == [32, 4]


def test_gradients_stop_at_the_tower(tiny):
    encoder = tiny.train()
    try:
        assert not encoder.vision_tower.training and encoder.qformer.training
        fused, _ = encoder.fuse(encoder.image_tokens(pixels(3)), *encoder.tokenize(TEXTS))
        loss = encoder.text_projection(fused).sum() + encoder.encode_target(encoder.image_tokens(pixels(3))).sum()
        loss.backward()
    finally: encoder.eval()
    assert all(parameter.grad is None for parameter in encoder.vision_tower.parameters())
    assert encoder.ln_vision.weight.grad is not None and encoder.query_tokens.grad is not None
    encoder.zero_grad()


# ---- loading

def test_loading_leaves_global_chance_alone(checkpoint):
    before = torch.random.get_rng_state()
    load_encoder(str(checkpoint), device="cpu")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_plain_word_list_is_enough(tmp_path):
    "Older checkpoints have vocab.txt alone. The library's guess from the model type would be an opt tokenizer without one BERT word."
    folder = write_checkpoint(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"): (folder / name).unlink()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    assert load_encoder(str(folder), device="cpu").tokenize(["is red"])[0].tolist() == [[2, 5, 6, 3]]


def test_checkpoint_without_words_is_refused(tmp_path):
    "The library would give back a tokenizer that reads every word as unknown, without a sound."
    folder = write_checkpoint(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"): (folder / name).unlink()
    with pytest.raises(DataError, match="no vocabulary for"): load_encoder(str(folder), device="cpu")


def test_checkpoint_without_text_layers_is_refused(tmp_path):
    def change(config): config.qformer_config.use_qformer_text_input = False
    with pytest.raises(DataError, match="use_qformer_text_input"): load_encoder(str(write_checkpoint(tmp_path, change)), device="cpu")


def test_checkpoint_that_lacks_weights_is_refused(tmp_path):
    "Missing weights would be filled with noise, and nothing would look wrong."
    from safetensors.torch import load_file, save_file
    file = write_checkpoint(tmp_path) / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if not name.startswith("text_projection")}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match="text_projection"): load_encoder(str(tmp_path), device="cpu")


def test_checkpoint_of_zeros_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    file = write_checkpoint(tmp_path) / "model.safetensors"
    save_file(load_file(file) | {"query_tokens": torch.zeros(1, 3, 12)}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match="query tokens"): load_encoder(str(tmp_path), device="cpu")


@pytest.mark.parametrize("name", ["no/such/folder/here", "nofolder_and_no_hub_id_at_all!", "missing.pth"])
def test_unknown_encoders_give_one_clear_line(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the environment variable is read at import only
    with pytest.raises(DataError) as caught: load_encoder(name, device="cpu")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_impossible_dtype_is_refused(checkpoint):
    with pytest.raises(ValueError, match="float31"): load_encoder(str(checkpoint), device="cpu", dtype="float31")


@torch.no_grad()
def test_half_precision_reaches_the_tower_only(checkpoint, tiny):
    half = load_encoder(str(checkpoint), device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in half.vision_tower.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in half.parameters() if parameter.requires_grad} == {torch.float32}
    target = half.encode_target(half.image_tokens(pixels(3)))
    assert target.dtype == torch.float32
    assert (target * tiny.encode_target(tiny.image_tokens(pixels(3)))).sum(-1).min() > 0.9
    assert half.tower_fingerprint() != tiny.tower_fingerprint()


def test_fingerprint_follows_the_tower_and_nothing_else(checkpoint):
    encoder = load_encoder(str(checkpoint), device="cpu")
    before = encoder.tower_fingerprint()
    with torch.no_grad(): encoder.query_tokens.add_(1); encoder.ln_vision.weight.add_(1)
    assert encoder.tower_fingerprint() == before
    with torch.no_grad(): next(encoder.vision_tower.parameters()).view(-1)[0].add_(1e-3)
    assert encoder.tower_fingerprint() != before


# ---- the token cache

@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    paths = {f"image {i}": tmp_path / f"{i}.png" for i in range(7)}
    for path in paths.values(): Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return paths


def cached(encoder, pictures, folder): return cache_tokens(encoder, pictures, folder, batch_size=3, progress=False)


class Counting:
    "The encoder, counting how many images pass through its tower."
    def __init__(self, encoder): self.encoder, self.images = encoder, 0
    def __getattr__(self, name): return getattr(self.encoder, name)
    def image_tokens(self, pixels):
        self.images += len(pixels)
        return self.encoder.image_tokens(pixels)


def files(folder): return sorted(path for path in folder.iterdir() if path.suffix != ".json"), sorted(folder.glob("*.json"))


def test_second_call_encodes_nothing(tiny, pictures, tmp_path):
    counting = Counting(tiny)
    first = cached(counting, pictures, tmp_path / "tokens")[list(pictures)]
    assert counting.images >= 7
    counting.images = 0
    assert torch.equal(cached(counting, pictures, tmp_path / "tokens")[list(pictures)], first)
    assert counting.images <= 1  # one blank image may be used to learn the shape
    assert first.shape == (7, 5, 16) and first.dtype == torch.float32


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), which=st.booleans())
def test_any_changed_byte_is_noticed(tiny, pictures, tmp_path, place, flip, which):
    "In the tokens or in their description; a change of white space alone may be harmless, wrong tokens never are."
    folder = tmp_path / "tokens"
    good = cached(tiny, pictures, folder)[list(pictures)]
    (data,), (description,) = files(folder)
    victim = description if which else data
    raw = bytearray(victim.read_bytes())
    raw[int(place * len(raw))] ^= flip
    victim.write_bytes(raw)
    assert torch.equal(cached(tiny, pictures, folder)[list(pictures)], good)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe\x00", b'{"shape": 3}'])
def test_a_spoiled_description_is_not_trusted(tiny, pictures, tmp_path, content):
    folder = tmp_path / "tokens"
    good = cached(tiny, pictures, folder)[list(pictures)]
    _, (description,) = files(folder)
    description.write_bytes(content)
    assert torch.equal(cached(tiny, pictures, folder)[list(pictures)], good)


@pytest.mark.parametrize("length", [0, 1, 400, -1])
def test_a_file_of_the_wrong_length_is_rebuilt(tiny, pictures, tmp_path, length):
    folder = tmp_path / "tokens"
    good = cached(tiny, pictures, folder)[list(pictures)]
    (data,), _ = files(folder)
    size = data.stat().st_size
    with data.open("r+b") as raw: raw.truncate(length if length >= 0 else size + 64)
    assert torch.equal(cached(tiny, pictures, folder)[list(pictures)], good)
    assert data.stat().st_size == size


def test_a_changed_picture_and_a_changed_tower_are_noticed(tiny, checkpoint, pictures, tmp_path):
    folder = tmp_path / "tokens"
    good = cached(tiny, pictures, folder)[list(pictures)]
    path = pictures["image 2"]
    Image.new("RGB", (16, 16), "red").save(path)
    os.utime(path, ns=(1, 1))
    changed = cached(tiny, pictures, folder)[list(pictures)]
    same = (changed == good).flatten(1).all(1)
    assert same.tolist() == [True, True, False, True, True, True, True]
    other = load_encoder(str(checkpoint), device="cpu")
    with torch.no_grad(): next(other.vision_tower.parameters()).add_(0.5)
    assert (cached(other, pictures, folder)[list(pictures)] - changed).abs().max() > 1e-3


def test_an_interrupted_build_leaves_nothing_to_trust(tiny, pictures, tmp_path):
    class Failing(Counting):
        def image_tokens(self, pixels):
            if self.images >= 4: raise KeyboardInterrupt
            return super().image_tokens(pixels)
    folder = tmp_path / "tokens"
    with pytest.raises(KeyboardInterrupt): cached(Failing(tiny), pictures, folder)
    assert not [path.name for path in folder.iterdir()]
    direct = torch.cat([tiny.image_tokens(read(path)) for path in pictures.values()])
    torch.testing.assert_close(cached(tiny, pictures, folder)[list(pictures)], direct)


def read(path):
    "The mini transform at its plainest: a square picture of the right size, scaled and normalised."
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return (((torch.from_numpy(np.array(Image.open(path))) / 255) - mean) / std).permute(2, 0, 1)[None]


def test_rows_come_in_the_order_asked_for(tiny, pictures, tmp_path):
    cache = cached(tiny, pictures, tmp_path / "tokens")
    asked = ["image 5", "image 0", "image 5"]
    torch.testing.assert_close(cache[asked], torch.cat([tiny.image_tokens(read(pictures[name])) for name in asked]))


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"not an image"), lambda path: path.write_bytes(path.read_bytes()[:60])])
def test_a_missing_or_broken_picture_is_named(tiny, pictures, tmp_path, spoil):
    spoil(pictures["image 4"])
    with pytest.raises(DataError, match="4.png"): cached(tiny, pictures, tmp_path / "tokens")


# ---- what ships

def test_shipped_model_is_small_and_plain():
    names = {path.name for path in MINI.iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert (MINI / "model.safetensors").stat().st_size <= 8_000_000
    assert 0.01 < json.loads((MINI / "config.json").read_text())["itc_temperature"] < 0.5


def test_shipped_vocabulary_spells_real_requests(annotations):
    "No caption of FashionIQ's validation split holds an unknown word piece, once accents are stripped."
    encoder = load_encoder("mini", device="cpu")
    texts = [text for part in ("dress", "shirt", "toptee")
             for row in json.loads((annotations("fashioniq") / "captions" / f"cap.{part}.val.json").read_text()) for text in row["captions"]]
    plain = [text for text in texts if text.isascii()]
    assert len(plain) > 0.99 * len(texts)
    ids = torch.cat([encoder.tokenize(plain[i:i + 512])[0].flatten() for i in range(0, len(plain), 512)])
    assert not (ids == encoder.tokenizer.unk_token_id).any()


def test_a_cache_that_cannot_be_read_back_is_said_to_be_so(tiny, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("dqe_cir.encoder.tokens.read_tokens", lambda stem, count: None)
    with pytest.raises(DataError, match=r"\.tokens is not what was written to it"): cached(tiny, pictures, tmp_path / "tokens")


def test_pictures_go_through_the_encoders_own_transform(tiny, pictures, tmp_path):
    class Flipped(Counting):
        transform_name = "flipped"
        tower_fingerprint = type(tiny).tower_fingerprint
        def transform(self, image): return tiny.transform(image).flip(-1)
    ours, theirs = (cached(encoder, pictures, tmp_path / "tokens")[list(pictures)] for encoder in (tiny, Flipped(tiny)))
    direct = torch.cat([tiny.image_tokens(read(path).flip(-1)) for path in pictures.values()])
    torch.testing.assert_close(theirs, direct)
    assert (ours - theirs).abs().max() > 1e-3


# ---- how large it is, before any weights are read

def config_of(folder, config):
    "A folder that holds nothing but a configuration."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(folder)


BLIP2_VIT_G = {"model_type": "blip-2", "num_query_tokens": 32, "image_text_hidden_size": 256,
               "vision_config": {"model_type": "blip_2_vision_model", "hidden_size": 1408, "intermediate_size": 6144,
                                 "num_hidden_layers": 39, "num_attention_heads": 16, "image_size": 224, "patch_size": 14},
               "qformer_config": {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 30523}}


def test_mini_and_a_copy_of_it_are_small(tmp_path):
    shutil.copytree(MINI, tmp_path / "runs" / "mini")
    assert encoder_size("mini") == encoder_size(str(MINI)) == encoder_size(str(tmp_path / "runs" / "mini")) == "small"


def test_what_save_pretrained_writes_is_read(checkpoint): assert encoder_size(str(checkpoint)) == "small"


@pytest.mark.parametrize("left_out", [(), ("hidden_size",), ("vision_config",)])
def test_a_folder_of_blip2_sizes_is_full(tmp_path, left_out):
    "Also where the hub's configuration leaves out what equals the library's default."
    config = {**BLIP2_VIT_G, "vision_config": {k: v for k, v in BLIP2_VIT_G["vision_config"].items() if k not in left_out}}
    assert encoder_size(config_of(tmp_path, {k: v for k, v in config.items() if k not in left_out})) == "full"


def test_names_without_a_folder_are_full(tmp_path):
    (tmp_path / "blip2.pth").write_bytes(b"weights")
    for name in ("Salesforce/blip2-itm-vit-g", str(tmp_path / "blip2.pth"), str(tmp_path / "absent"), str(tmp_path), ""):
        assert encoder_size(name) == "full", name


@pytest.mark.parametrize("config", ["", "{", "[]", "null", '{"vision_config": 3}', '{"model_cfg": []}', '{"vision_config": {"hidden_size": null}}'])
def test_a_folder_without_a_readable_configuration_is_full_and_refused_when_loaded(tmp_path, config):
    assert encoder_size(config_of(tmp_path, config)) == "full"
    with pytest.raises(DataError, match="could not be loaded"): load_encoder(str(tmp_path), device="cpu")


@pytest.mark.parametrize("config, small", [
    ({"model_type": "clip", "vision_config": {"hidden_size": 768}}, False), ({"model_type": "clip", "vision_config": {"hidden_size": 32}}, True),
    ({"model_type": "blip", "vision_config": {"hidden_size": 1024}}, False), ({"model_type": "blip", "vision_config": {"hidden_size": 64}}, True),
    ({"model_type": "resnet", "hidden_sizes": [256, 512, 1024, 2048]}, False), ({"model_type": "resnet", "hidden_sizes": [32, 48, 64, 96]}, True),
    ({"model_type": "resnet"}, False)])
def test_native_encoders_are_measured_by_their_own_layout(tmp_path, config, small):
    name = config_of(tmp_path / "a", config)
    assert encoder_size(name) == ("small" if small else "full")
    if config["model_type"] == "resnet": assert encoder_size(f"{name}+FacebookAI/roberta-base") == encoder_size(name)


@pytest.mark.parametrize("width, size", [(80, "full"), (8, "small")])
def test_a_clip_with_a_resnet_is_measured_by_open_clips_layout(tmp_path, width, size):
    "timm's folders hold both files, and the width is in OpenCLIP's."
    name = config_of(tmp_path, {"architecture": "resnet50x4_clip", "num_features": 640})
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": {"layers": [4, 6, 10, 6], "width": width}}}))
    assert encoder_size(name) == size
