"The systems on the backbones they were published with: conformance, runs, folders of weights, and what their encoders do to pictures and words."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import BlipConfig, BlipForImageTextRetrieval, CLIPConfig, CLIPModel

from dqe_cir.encoder.native.base import random_model
from dqe_cir.core import DataError, generator
from dqe_cir.data import load_dataset
from dqe_cir.encoder import cache_tokens
from dqe_cir.evaluator import evaluate, reference_points
from dqe_cir.methods import METHODS
from dqe_cir.trainer import check_method
from dqe_cir.encoder.native.blip import load_blip
from dqe_cir.encoder.native.clip import load_clip
from dqe_cir.encoder.native.resnet import Words, load_resnet, random_crops, squash
from dqe_cir.trainer import build_method, fit, load_run, open_run, train_config, training_set
from dqe_cir.trainer.loop import SMOKE

NATIVE = [name for name, method in METHODS.items() if method.native]


def test_the_five_systems_have_one():
    assert set(NATIVE) == {"cosmo", "mgur", "clip4cir", "bi_blip4cir", "covr"}


@pytest.mark.parametrize("name", NATIVE)
def test_is_a_method(name): check_method(METHODS[name].native, method=name, form="native")


# ---- runs

def run_of(folder, method, until=None, **options):
    "Two smoke epochs, the second after a pause if `until` is 1; the model as it is read back, and its metrics."
    run = open_run(train_config({**SMOKE, "method": method, "form": "native", "run_dir": str(folder), "device": "cpu", **options}))
    train, val = (load_dataset("garments", split=split, size="smoke") for split in ("train", "val"))
    model = build_method(run.config)
    tokens = cache_tokens(model.encoder, [train, val], progress=False)
    points = reference_points(model.encoder, val, tokens, untrained=model)
    if until:
        fit(model, training_set(run.config, train, tokens), run, until=until)
        model = build_method(run.config)
    events = fit(model, training_set(run.config, train, tokens), run)
    model, config = load_run(folder, "cpu")
    assert config.form == "native" and type(model) is METHODS[method].native
    return model.state_dict(), evaluate(model, val, tokens).metrics, events, points


@pytest.mark.parametrize("name", NATIVE)
def test_trains_resumes_and_is_read_back(home, tmp_path, name):
    state, metrics, events, points = run_of(tmp_path / "whole", name)
    again, same, *_ = run_of(tmp_path / "paused", name, until=1)
    assert metrics == same and all(torch.equal(state[key], again[key]) for key in state)
    assert len(events) == 2 and all(math.isfinite(value) for event in events for value in event["loss"].values())
    assert set(points) - {"oracle", "joint, untrained"} == (set() if name in ("cosmo", "mgur") else {"image only", "text only", "late fusion"})


def test_the_form_is_checked_and_names_the_run(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="unknown form 'own'; choose one of shared, native"): train_config({"form": "own"})
    monkeypatch.setattr("dqe_cir.trainer.runs.checkout", lambda: tmp_path)
    assert open_run(train_config({"method": "covr", "form": "native"})).folder.name == "garments-covr-native-seed0"


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(NATIVE)))
def test_a_system_made_for_blip2_is_native_already(name):
    assert type(build_method(train_config({"method": name, "form": "native", "device": "cpu"}))) is METHODS[name]


# ---- folders of weights

FOLDERS = {"clip4cir": "clip", "bi_blip4cir": "blip", "covr": "blip", "cosmo": "resnet", "mgur": "resnet+roberta"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Small models as `save_pretrained` writes them, with weights that are not those of `mini`."
    home = tmp_path_factory.mktemp("models")
    reader = load_resnet(device="cpu", reads="roberta").reader
    models = {"clip": random_model(CLIPModel, clip_config(len(reader.tokenizer), reader.tokenizer.sep_token_id)), "resnet": load_resnet(device="cpu").image_tower, "roberta": reader.model,
              "blip": BlipForImageTextRetrieval(random_model(BlipForImageTextRetrieval, blip_config()).config)}
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters(): parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator(0, name)))
        model.save_pretrained(home / name)
        if name != "resnet": reader.tokenizer.save_pretrained(home / name)
    return home, models


def clip_config(words, end):
    layers = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    return CLIPConfig(projection_dim=24, vision_config=layers | dict(image_size=48, patch_size=16), text_config=layers | dict(vocab_size=words, eos_token_id=end))


def blip_config():
    layers = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    return BlipConfig(image_text_hidden_size=24, vision_config=layers | dict(image_size=48, patch_size=16, initializer_range=0.2),
                             text_config=layers | dict(vocab_size=224, encoder_hidden_size=32, max_position_embeddings=90, bos_token_id=222))


@pytest.mark.parametrize("name", NATIVE)
def test_a_local_folder_is_read(folders, name):
    "Through the run's own door, and what comes out is the saved model's."
    home, models = folders
    place = "+".join(str(home / part) for part in FOLDERS[name].split("+"))
    method = build_method(train_config({"method": name, "form": "native", "encoder": place, "device": "cpu"})).eval()
    stored = load_file(home / FOLDERS[name].split("+")[0] / "model.safetensors")
    ours = method.encoder.state_dict()
    prefix = {"clip": "model.", "blip": "", "resnet": "image_tower."}[FOLDERS[name].split("+")[0]]
    renamed = {"vision_model": "vision_tower", "vision_proj": "vision_projection", "text_proj": "text_projection"} if prefix == "" else {}
    compared = 0
    for key, value in stored.items():
        top, _, rest = key.partition(".")
        if top == "itm_head": continue
        assert_close(ours[f"{prefix}{renamed.get(top, top)}.{rest}" if rest else prefix + key], value, rtol=0, atol=0)
        compared += 1
    assert compared > 20


def test_incomplete_and_foreign_weights_are_refused(folders, tmp_path):
    home, _ = folders
    stored = load_file(home / "clip" / "model.safetensors")
    for file in (home / "clip").iterdir(): (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({key: value for key, value in stored.items() if "text_projection" not in key}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 weights, such as text_projection.weight"): load_clip(str(tmp_path), device="cpu")
    with pytest.raises(DataError, match="is a model of type blip, not clip"): load_clip(str(home / "blip"), device="cpu")
    with pytest.raises(ValueError, match="give a ResNet alone"): load_resnet(str(home / "resnet") + "+x", device="cpu")
    (tmp_path / "model.safetensors").unlink()
    torch.save(stored, tmp_path / "pytorch_model.bin")  # never unpickled
    with pytest.raises(DataError, match="could not be loaded"): load_clip(str(tmp_path), device="cpu")


# ---- pictures

def test_what_is_cached(home, tmp_path):
    "Pixels where the image tower is trained, tokens where it is frozen; a name of its own for each."
    paths = {}
    for i, size in enumerate(((40, 70), (64, 64))):
        paths[str(i)] = tmp_path / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[str(i)])
    encoders = [load_clip(device="cpu"), load_blip(device="cpu"), load_blip(device="cpu", places=1), load_resnet(device="cpu")]
    assert len({encoder.tower_fingerprint() for encoder in encoders}) == 4
    for encoder in encoders:
        tokens = cache_tokens(encoder, paths, tmp_path / "tokens", progress=False)[["1", "0"]]
        assert tokens.shape == (2, *encoder.token_shape)
        assert_close(tokens, encoder.image_tokens(torch.stack([encoder.transform(Image.open(paths[name])) for name in ("1", "0")])), rtol=1e-4, atol=1e-5)
    assert_close(encoders[-1].image_tokens(tokens), tokens)


def test_squash_is_pillows_resize_with_imagenets_statistics():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    small = np.asarray(picture.resize((16, 16), Image.Resampling.BILINEAR)) / 255
    expected = (small - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert_close(squash(picture, 16), torch.tensor(expected).permute(2, 0, 1).float(), rtol=1e-4, atol=1e-5)


def loop_crops(pixels):
    "One image at a time, one try after another, one pixel after another."
    count, side = len(pixels), pixels.shape[-1]
    area = torch.empty(count, 10).uniform_(0.75, 1.33)
    ratio = torch.empty(count, 10).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    spot, flips = torch.rand(count, 2), torch.rand(count)
    out = torch.zeros_like(pixels)
    for i in range(count):
        width = height = 1.0
        for a, r in zip(area[i].tolist(), ratio[i].tolist()):
            if math.sqrt(a * r) <= 1 and math.sqrt(a / r) <= 1:
                width, height = math.sqrt(a * r), math.sqrt(a / r)
                break
        left, top = ((1 - extent) * share.item() * side for extent, share in zip((width, height), spot[i]))
        for y in range(side):
            for x in range(side):
                column = side - 1 - x if flips[i] < 0.5 else x
                u, v = left + (column + 0.5) * width - 0.5, top + (y + 0.5) * height - 0.5
                u, v = (min(max(place, 0.0), side - 1.0) for place in (u, v))
                x0, y0 = int(u), int(v)
                x1, y1 = min(x0 + 1, side - 1), min(y0 + 1, side - 1)
                above = (1 - u + x0) * pixels[i, :, y0, x0] + (u - x0) * pixels[i, :, y0, x1]
                below = (1 - u + x0) * pixels[i, :, y1, x0] + (u - x0) * pixels[i, :, y1, x1]
                out[i, :, y, x] = (1 - v + y0) * above + (v - y0) * below
    return out


@pytest.mark.parametrize("seed", range(4))
def test_random_crops_are_the_loop(seed):
    pixels = torch.randn(5, 3, 9, 9, generator=generator(seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ours = random_crops(pixels)
        torch.manual_seed(seed)
        assert_close(ours, loop_crops(pixels), rtol=1e-4, atol=1e-4)


def test_crops_are_for_training_alone():
    encoder = load_resnet(device="cpu")
    pixels = torch.randn(2, *encoder.token_shape, generator=generator(0))
    with torch.no_grad(): assert_close(encoder.image_map(pixels), encoder.image_map(pixels), rtol=0, atol=0)


# ---- words

words = st.text("abcü'-", min_size=1, max_size=6)


@settings(max_examples=40)
@given(st.lists(st.lists(words, max_size=6), max_size=5))
def test_a_word_keeps_its_number(batches):
    vocabulary, seen = Words(capacity=8), {}
    for batch in batches:
        vocabulary.learn(batch)
        known = vocabulary.known()
        assert seen.items() <= known.items() and sorted(known.values()) == list(range(1, len(known) + 1))
        assert len(known) < 8 and (set(batch) <= set(known) or len(known) == 7)
        seen = known
    other = Words(capacity=8)
    other.load_state_dict(vocabulary.state_dict())
    assert other.known() == seen


def test_the_vocabulary_travels_with_the_weights():
    "A word met in training is read in a fresh copy as it was; before that it is any other word."
    first, second = load_resnet(device="cpu").train(), load_resnet(device="cpu").eval()
    first.reader(["a zebra crossing"])
    assert_close(second.reader(["zebra"]), second.reader(["gnu"]), rtol=0, atol=0)
    second.load_state_dict(first.state_dict())
    assert "zebra" in second.reader.words.known() and (second.reader(["zebra"]) - second.reader(["gnu"])).norm() > 1e-3
    assert_close(second.reader(["zebra"]), first.eval().reader(["zebra"]), rtol=0, atol=0)


def test_a_text_that_looks_at_pictures_begins_with_its_own_mark():
    encoder, seen = load_blip(device="cpu"), []
    encoder.text_encoder.register_forward_pre_hook(lambda _, __, options: seen.append(options["input_ids"]), with_kwargs=True)
    ids, mask = encoder.tokenize(["is red", "is blue and long"])
    encoder.fused_vector(torch.randn(2, *encoder.token_shape, generator=generator(0)), ids, mask)
    assert seen[0][:, 0].tolist() == [encoder.looking] * 2 and torch.equal(seen[0][:, 1:], ids[:, 1:])
    assert (ids[:, 0] != encoder.looking).all()
    assert BLIPS_ENC == BlipConfig().text_config.vocab_size - 1


BLIPS_ENC = 30523
