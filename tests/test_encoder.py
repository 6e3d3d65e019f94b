"The encoder against the library's own forward pass, loading that must fail, and a token cache under attack."
import json
import os
import re
import runpy
import shutil
import string
import subprocess
import sys
import time
from unittest import mock

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
from dqe_cir.encoder.tokens import StoredRows, TokenStore, stores
from dqe_cir.encoder.tokens import main as tokens_main

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


# ---- the token store

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


def files(folder): return sorted(folder.rglob("*.tokens")), sorted(folder.rglob("*.json"))


def test_second_call_encodes_nothing(tiny, pictures, tmp_path):
    counting = Counting(tiny)
    first = cached(counting, pictures, tmp_path / "tokens")[list(pictures)]
    assert counting.images >= 7
    counting.images = 0
    assert torch.equal(cached(counting, pictures, tmp_path / "tokens")[list(pictures)], first)
    assert counting.images == 0
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
def test_a_file_of_the_wrong_length_is_made_whole(tiny, pictures, tmp_path, length):
    folder = tmp_path / "tokens"
    good = cached(tiny, pictures, folder)[list(pictures)]
    (data,), _ = files(folder)
    size = data.stat().st_size
    with data.open("r+b") as raw: raw.truncate(length if length >= 0 else size + 64)
    assert torch.equal(cached(tiny, pictures, folder)[list(pictures)], good)
    assert data.stat().st_size == size + 64 * (length < 0)


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


class Failing(Counting):
    "Stops, by whatever is raised, when so many images have passed."
    def __init__(self, encoder, after, problem): super().__init__(encoder); self.after, self.problem = after, problem
    def image_tokens(self, pixels):
        if self.images >= self.after: raise self.problem
        return super().image_tokens(pixels)


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), RuntimeError("out of memory")])
@pytest.mark.parametrize("after", [0, 3, 6])
def test_what_was_encoded_before_a_stop_is_kept(tiny, pictures, tmp_path, problem, after):
    folder, counting = tmp_path / "tokens", Counting(tiny)
    with pytest.raises(type(problem)): cached(Failing(tiny, after, problem), pictures, folder)
    again = cached(counting, pictures, folder)[list(pictures)]
    assert counting.images == 7 - after
    torch.testing.assert_close(again, torch.cat([tiny.image_tokens(read(path)) for path in pictures.values()]))


def test_a_picture_is_known_by_its_content(tiny, pictures, tmp_path):
    "Touched, renamed, copied, shared between splits, twice under two names: nothing is encoded again."
    folder, counting = tmp_path / "tokens", Counting(tiny)
    first = cached(counting, dict(list(pictures.items())[:5]), folder)
    second = cached(counting, pictures | {"twice": pictures["image 6"]}, folder)
    assert counting.images == 7 and torch.equal(second[["twice"]], second[["image 6"]])
    elsewhere = {f"copy of {name}": tmp_path / "elsewhere" / path.name for name, path in pictures.items()}
    (tmp_path / "elsewhere").mkdir()
    for name, path in pictures.items():
        shutil.copy(path, elsewhere[f"copy of {name}"])
        os.utime(path, (1, 1))
    assert torch.equal(cached(counting, elsewhere, folder)[list(elsewhere)], second[list(pictures)])
    assert torch.equal(cached(counting, pictures, folder)[["image 1"]], first[["image 1"]]) and counting.images == 7


def test_a_picture_that_changed_and_kept_its_size_and_time_is_another(tiny, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("dqe_cir.encoder.tokens.QUIET", 0)  # as if the files were old
    folder, path = tmp_path / "tokens", pictures["image 3"]
    for one in ("image 3", "image 4"): Image.new("RGB", (16, 16), "red" if one == "image 3" else "teal").save(pictures[one], format="BMP")
    before, was = cached(tiny, pictures, folder), path.stat()
    (folder / "content_keys.txt").read_text()
    path.write_bytes(pictures["image 4"].read_bytes())
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
    after = cached(tiny, pictures, folder)
    assert torch.equal(after[["image 3"]], after[["image 4"]]) and not torch.equal(after[["image 3"]], before[["image 3"]])


def test_unchanged_pictures_are_not_read_again(tiny, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("dqe_cir.encoder.tokens.QUIET", 0)
    good = cached(tiny, pictures, tmp_path / "tokens")[list(pictures)]
    monkeypatch.setattr("dqe_cir.encoder.tokens.content_key", lambda path: pytest.fail(f"{path} was read again"))
    assert torch.equal(cached(tiny, pictures, tmp_path / "tokens")[list(pictures)], good)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_notes_with_any_changed_byte_hand_out_nothing_wrong(tiny, pictures, tmp_path, place, flip):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("dqe_cir.encoder.tokens.QUIET", 0)
        good = cached(tiny, pictures, tmp_path / "tokens")[list(pictures)]
        notes = tmp_path / "tokens" / "content_keys.txt"
        raw = bytearray(notes.read_bytes())
        raw[int(place * len(raw))] ^= flip
        notes.write_bytes(raw)
        assert torch.equal(cached(tiny, pictures, tmp_path / "tokens")[list(pictures)], good)


def test_a_stored_and_read_only_folder_is_enough(tiny, pictures, tmp_path):
    folder = tmp_path / "tokens"
    good = cached(tiny, pictures, folder)[list(pictures)]
    places = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    try:
        for path in places: path.chmod(0o555)
        assert torch.equal(cached(tiny, pictures, folder)[list(pictures)], good)
    finally:
        for path in places: path.chmod(0o755)


def test_many_broken_pictures_are_one_message(tiny, pictures, tmp_path):
    folder, counting = tmp_path / "tokens", Counting(tiny)
    kept = pictures["image 0"].read_bytes()
    for i, content in ((0, b""), (2, b"no picture"), (3, pictures["image 3"].read_bytes()[:60])): pictures[f"image {i}"].write_bytes(content)
    pictures["image 5"].unlink()
    with pytest.raises(DataError, match=r"^4 of 7 pictures have no tokens: .*5\.png does not exist.*0\.png.*2\.png.*; \.\.\.\. The others are stored") as caught: cached(counting, pictures, folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000 and counting.images == 3
    pictures["image 0"].write_bytes(kept)
    with pytest.raises(DataError, match="^3 of 7"): cached(counting, pictures, folder)
    assert counting.images == 4


class Overflowing(Counting):
    "An encoder whose tower fails for reddish pictures, or for all."
    def __init__(self, encoder, limit): super().__init__(encoder); self.limit = limit
    def image_tokens(self, pixels):
        tokens = super().image_tokens(pixels)
        tokens[pixels[:, 0].mean((1, 2)) > self.limit, 1, 2] = torch.nan
        return tokens


def test_tokens_that_are_not_finite_are_neither_stored_nor_handed_out(tiny, pictures, tmp_path):
    folder = tmp_path / "tokens"
    Image.new("RGB", (16, 16), "red").save(pictures["image 4"])
    with pytest.raises(DataError, match=r"^1 of 7 pictures have no tokens: .*4\.png has tokens that are not finite"): cached(Overflowing(tiny, 1.5), pictures, folder)
    counting = Counting(tiny)
    assert cached(counting, pictures, folder)[list(pictures)].isfinite().all() and counting.images == 1
    with pytest.raises(DataError, match="not finite for .*0.png, nor for any picture of the first batch"): cached(Overflowing(tiny, -9), pictures, tmp_path / "others")
    assert not list((tmp_path / "others").rglob("*.tokens"))


def test_half_precision_overflow_is_not_finite_either(pictures, tmp_path):
    "70,000 is a number in float32, and none in the type that large tokens are stored in."
    class Large:
        transform_name, image_size, token_shape, device = "large", 16, (3, 200, 200), torch.device("cpu")
        vision_tower, tower_fingerprint = torch.nn.Identity(), lambda self: "0" * 16
        def transform(self, picture): return torch.zeros(3, 200, 200)
        def image_tokens(self, pixels): return pixels + torch.tensor([7e4] + [0] * (len(pixels) - 1))[:, None, None, None]
    with pytest.raises(DataError, match=r"^3 of 7 pictures have no tokens: .*0\.png has tokens that are not finite in float16"): cached(Large(), pictures, tmp_path / "tokens")


def test_a_full_disk_keeps_what_was_written(tiny, pictures, tmp_path):
    "The size of files is limited, in another process, to three records and a half."
    script = f"""
import resource, sys
from pathlib import Path
from dqe_cir.encoder import cache_tokens, load_encoder
encoder = load_encoder(sys.argv[1], device="cpu")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(3.5 * 384),) * 2)
try: cache_tokens(encoder, dict((name, Path(name)) for name in sys.argv[3:]), sys.argv[2], batch_size=2, progress=False)
except ValueError as problem: sys.exit(str(problem))
"""
    folder = tmp_path / "tokens"
    encoder = write_checkpoint(tmp_path / "encoder")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, encoder, folder, *pictures.values()], capture_output=True, text=True)
    assert done.returncode == 1 and "0000.tokens could not be written (File too large); what was encoded before is kept" in done.stderr, done
    counting = Counting(load_encoder(str(encoder), device="cpu"))
    assert cached(counting, pictures, folder)[list(pictures)].isfinite().all() and counting.images == 4


def test_two_processes_fill_one_store(checkpoint, pictures, tmp_path):
    script = """
import sys
from pathlib import Path
from dqe_cir.encoder import cache_tokens, load_encoder
cache = cache_tokens(load_encoder(sys.argv[1], device="cpu"), dict((name, Path(name)) for name in sys.argv[3:]), sys.argv[2], batch_size=1, progress=False)
print(cache[sys.argv[3:]].double().sum().item())
"""
    jobs = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", script, checkpoint, tmp_path / "tokens", *pictures.values()],
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(2)]
    said = [job.communicate()[0] for job in jobs]
    assert said[0] == said[1] != "" and not any(job.returncode for job in jobs)
    (data,), _ = files(tmp_path / "tokens")
    assert data.stat().st_size == 7 * 384


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


def test_a_store_that_cannot_be_read_back_is_said_to_be_so(tiny, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("dqe_cir.encoder.tokens.TokenStore.find", lambda store, keys, check=True: {})
    with pytest.raises(DataError, match=r"is not what was written to it, for .*0\.png: is the disk damaged"): cached(tiny, pictures, tmp_path / "tokens")


# ---- where tokens are kept

PLACES = ("device", "memory", "disk")


def kept(encoder, pictures, folder, on): return cache_tokens(encoder, pictures, folder, batch_size=3, progress=False, on=on)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lists=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), max_size=12), budget=st.integers(0, 4000), extra=st.lists(st.integers(0, 6), max_size=4))
def test_every_place_hands_out_the_same_bits_read_ahead_or_not(tiny, pictures, tmp_path, lists, budget, extra):
    "Batches in any order, with repetitions, with whatever else is asked for in between, within any budget."
    plain = cached(tiny, pictures, tmp_path / "tokens")[list(pictures)]
    def named(rows): return [f"image {row}" for row in rows]
    for place in PLACES:
        cache = kept(tiny, pictures, tmp_path / "tokens", place)
        at_hand = cache.ahead([named(rows) for rows in lists], budget)
        for rows in lists:
            next(at_hand)
            for asked in (rows, extra, rows[::-1]): assert torch.equal(cache[named(asked)], plain[asked])
        at_hand.close()
        assert torch.equal(cache[named(extra)], plain[extra])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_changed_byte_on_disk_is_noticed_when_it_is_read(tiny, pictures, tmp_path, place, flip):
    "At most one picture is lost by it, and only until the next start."
    folder = tmp_path / "tokens"
    good = cached(tiny, pictures, folder)[list(pictures)]
    (data,), _ = files(folder)
    raw = bytearray(data.read_bytes())
    raw[int(place * len(raw))] ^= flip
    data.write_bytes(raw)
    cache, lost = kept(tiny, pictures, folder, "disk"), 0
    for row, name in enumerate(pictures):
        try: assert torch.equal(cache[[name]][0], good[row])
        except DataError as problem:
            assert re.fullmatch(r".*0000\.tokens is damaged in record \d: run it again, and its picture is encoded anew", str(problem))
            lost += 1
    counting = Counting(tiny)
    assert lost <= 1 and torch.equal(kept(counting, pictures, folder, "disk")[list(pictures)], good)
    assert counting.images <= 1


def test_on_disk_nothing_is_checked_at_the_start_and_everything_once(tiny, pictures, tmp_path, monkeypatch):
    cached(tiny, pictures, tmp_path / "tokens")
    checked, plain = [], TokenStore.checksum
    monkeypatch.setattr(TokenStore, "checksum", lambda store, key, tokens: checked.append(key) or plain(store, key, tokens))
    cache = kept(tiny, pictures, tmp_path / "tokens", "disk")
    assert not checked
    for _ in range(2): cache[list(pictures)]
    assert len(checked) == len(set(checked)) == 7


def test_a_damaged_record_that_cannot_be_struck_out_is_to_be_deleted(tiny, pictures, tmp_path, monkeypatch):
    folder = tmp_path / "tokens"
    cached(tiny, pictures, folder)
    (data,), _ = files(folder)
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    cache = kept(tiny, pictures, folder, "disk")
    monkeypatch.setattr("dqe_cir.encoder.tokens.owned", mock.Mock(side_effect=DataError("not here")))
    with pytest.raises(DataError, match=r"0000\.tokens is damaged in record 7: delete it, and run it again"): cache[list(pictures)]


@pytest.mark.parametrize("on, said", [("device", "do not fit"), ("memory", "do not fit"), ("tape", "no place 'tape'")])
def test_a_place_that_is_too_small_is_refused_before_anything_is_encoded(tiny, pictures, tmp_path, monkeypatch, on, said):
    monkeypatch.setattr("dqe_cir.encoder.tokens.free_bytes", lambda device: {"memory": 2000})
    with pytest.raises(ValueError, match=said): kept(tiny, pictures, tmp_path / "tokens", on)
    assert not (tmp_path / "tokens").exists() or not files(tmp_path / "tokens")[0]
    assert isinstance(kept(tiny, pictures, tmp_path / "tokens", "auto").tokens, StoredRows), "7 records of 384 bytes are more than half of 2,000"


def test_one_line_says_where_tokens_are_kept_and_why(tiny, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dqe_cir.encoder.tokens.free_bytes", lambda device: {"memory": 8 * 10**9})
    cache_tokens(tiny, pictures, tmp_path / "tokens")
    assert "0.0 MB of tokens stay in memory (auto takes at most half of what is free: 8.0 GB in memory)\n" in capsys.readouterr().out


def test_auto_counts_on_a_share_of_the_memory_where_several_processes_keep_tokens(tiny, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("dqe_cir.encoder.tokens.free_bytes", lambda device: {"memory": 8000})
    def place(**asked): return cache_tokens(tiny, pictures, tmp_path / "tokens", progress=False, **asked).tokens
    assert not isinstance(place(), StoredRows) and isinstance(place(processes=2), StoredRows)
    assert not isinstance(place(processes=2, on="memory"), StoredRows), "as asked"


def test_a_store_is_not_removed_while_another_process_reads_it(checkpoint, tiny, pictures, tmp_path, capsys):
    script = """
import sys
from pathlib import Path
from dqe_cir.encoder import cache_tokens, load_encoder
cache = cache_tokens(load_encoder(sys.argv[1], device="cpu"), dict((name, Path(name)) for name in sys.argv[3:]), sys.argv[2], progress=False, on="disk")
print("reads", flush=True)
sys.stdin.readline()
print(cache[sys.argv[3:]].isfinite().all().item())
"""
    folder = tmp_path / "tokens"
    job = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script, checkpoint, folder, *pictures.values()], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL, text=True)
    assert job.stdout.readline() == "reads\n"
    (store,) = stores(folder)
    remove = ["tokens", "--folder", str(folder), "--remove", store["path"].name]
    with mock.patch.object(sys, "argv", ["encoder", *remove]), pytest.raises(SystemExit) as ended: runpy.run_module("dqe_cir.encoder", run_name="__main__")
    assert ended.value.code == 1 and "is being read, by a training, say: wait for it" in capsys.readouterr().out
    assert job.communicate("\n")[0] == "True\n"
    assert tokens_main(remove[1:]) == 0 and not stores(folder)
    assert cached(tiny, pictures, folder)[list(pictures)].isfinite().all()


def test_stores_are_removed_by_age(tiny, pictures, tmp_path):
    folder = tmp_path / "tokens"
    cached(tiny, pictures, folder)
    (store,) = stores(folder)
    for days, stays in ((29, True), (31, False)):
        for file in store["path"].iterdir(): os.utime(file, (time.time() - days * 86400,) * 2)
        assert tokens_main(["--folder", str(folder), "--unused-since", "30"]) == 0
        assert store["path"].exists() == stays


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
