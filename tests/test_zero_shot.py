"An encoder as it is: small CLIPs, SigLIPs and a model of sentence-transformers made here, through evaluation, search and the page."
import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import BlipConfig, CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig, SiglipImageProcessor, SiglipModel

from dqe_cir.data import load_dataset
from dqe_cir.encoder import cache_tokens
from dqe_cir.encoder.any_backbone import SentenceEncoder, kind_of, load_backbone
from dqe_cir.encoder.native.base import random_model, tokenizer_of
from dqe_cir.evaluator import evaluate
from dqe_cir.files import DataError, read_json
from dqe_cir.methods.zero_shot import QUERIES, ZeroShot
from dqe_cir.retriever import Retriever, SearchPage
from dqe_cir.retriever.commands import main
from dqe_cir.trainer import load_run
from dqe_cir.trainer.config import zero_shot_config
from dqe_cir.trainer.evaluation_config import evaluation_config
from dqe_cir.trainer.runs import build_method
from helpers import papermill

LAYERS = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def write_towers(folder, kind, config, processor):
    "A random model of two towers as the hub has it: weights, words, and what is done to pictures."
    words = tokenizer_of("mini")
    marks = dict(pad_token_id=words.pad_token_id, bos_token_id=words.cls_token_id, eos_token_id=words.sep_token_id)
    text = LAYERS | marks | dict(vocab_size=len(words), max_position_embeddings=64, projection_dim=24, projection_size=32)
    for part in (random_model(kind, config(text_config=text, vision_config=LAYERS | dict(image_size=32, patch_size=8))), words, processor): part.save_pretrained(folder)
    return str(folder)


def write_sentences(folder, place):
    "A random small BLIP as a model of sentence-transformers, which reads pictures, texts, and both together."
    pytest.importorskip("sentence_transformers", reason="pip install dqe-cir[sentence-transformers]")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer
    from transformers import BlipImageProcessor, BlipModel, BlipProcessor
    words, layers = tokenizer_of("mini"), dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    text = layers | dict(vocab_size=len(words) + 2, encoder_hidden_size=64, max_position_embeddings=128, bos_token_id=len(words), projection_dim=64)
    config = BlipConfig(image_text_hidden_size=64, projection_dim=64, vision_config=layers | dict(image_size=64, patch_size=16, initializer_range=0.2), text_config=text)
    random_model(BlipModel, config).save_pretrained(place)
    BlipProcessor(BlipImageProcessor(size={"height": 64, "width": 64}), words).save_pretrained(place)
    SentenceTransformer(modules=[Transformer(str(place), transformer_task="feature-extraction")], device="cpu").save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    "Kind to the folder of a small model of it."
    place = tmp_path_factory.mktemp("models")
    return {"mini": "mini",
            "clip": write_towers(place / "clip", CLIPModel, CLIPConfig, CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)),
            "siglip": write_towers(place / "siglip", SiglipModel, SiglipConfig, SiglipImageProcessor(size={"height": 32, "width": 32}))}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    "The folder of a small model of sentence-transformers; skips where that is not installed."
    place = tmp_path_factory.mktemp("sentences")
    return write_sentences(place / "model", place / "parts")


@pytest.fixture(scope="module")
def val(home): return load_dataset("garments", split="val", size="smoke")


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_two_towers_score_as_the_library_does(names, name):
    "The score is the cosine that `transformers` computes from its own processors."
    encoder, picture = load_backbone(names[name], "cpu"), Image.effect_noise((70, 50), 90).convert("RGB")
    words = encoder.tokenizer(["is red"], padding="max_length" if name == "siglip" else True, max_length=64, return_tensors="pt")
    given = dict(input_ids=words["input_ids"]) if name == "siglip" else dict(words)
    given.pop("token_type_ids", None)
    made = encoder.vision_tower(pixel_values=encoder.processor(images=picture, return_tensors="pt")["pixel_values"], **given)
    image = encoder.encode_target(encoder.image_tokens(encoder.transform(picture)[None]))[:, 0]
    assert_close(image @ encoder.encode_text(*encoder.tokenize(["is red"])).T, made.image_embeds @ made.text_embeds.T)


def test_stored_vectors_are_not_shared_between_models(names, val):
    clip, siglip = (load_backbone(names[name], "cpu") for name in ("clip", "siglip"))
    assert clip.tower_fingerprint() != siglip.tower_fingerprint() and clip.fingerprint() != siglip.fingerprint()
    before = clip.fingerprint()
    clip.vision_tower.text_projection.weight.data += 1
    assert clip.fingerprint() != before and clip.tower_fingerprint() != load_backbone(names["clip"], "cpu").tower_fingerprint()


@pytest.mark.parametrize("change, said", [
    ({"model_type": "bert"}, "is a model of type bert; what can be searched with are blip-2, blip, clip, siglip"),
    ({}, "is a model of type unknown")])
def test_a_model_that_is_not_read_is_refused_by_its_type(tmp_path, change, said):
    (tmp_path / "config.json").write_text(json.dumps(change))
    with pytest.raises(DataError, match=said): load_backbone(str(tmp_path))


def test_a_folder_without_processing_of_pictures_is_refused_in_one_line(names, tmp_path):
    folder = shutil.copytree(names["clip"], tmp_path / "clip")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(DataError) as told: load_backbone(str(folder))
    assert "\n" not in str(told.value) and "could not be loaded" in str(told.value)


def test_a_text_file_is_no_encoder(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="is a file, and no file of weights"): kind_of(str(tmp_path / "notes.txt"))


def test_a_folder_of_zero_shot_is_not_a_finished_run(names, tmp_path, monkeypatch):
    "So that nobody who names nothing gets it."
    monkeypatch.setattr(sys.modules["dqe_cir.trainer.evaluation_config"], "runs_folder", lambda: tmp_path / "runs")  # the package has a function of that name
    config = evaluation_config({"method": "zero_shot", "encoder": names["clip"]})
    assert config.run_dir == str(tmp_path / "runs" / "zero_shot-clip") and (config.dataset, config.size) == ("garments", "full")
    with pytest.raises(ValueError, match="no finished run under"): evaluation_config({})
    method, found = load_run(config.run_dir, "cpu")
    assert type(method) is ZeroShot and found.encoder == names["clip"] and not method.training
    with pytest.raises(ValueError, match="other values of encoder"): evaluation_config({"method": "zero_shot", "run_dir": config.run_dir})
    with pytest.raises(ValueError, match="query=sum is read with method=zero_shot only"): evaluation_config({"run_dir": config.run_dir, "query": "sum"})


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_evaluation_notebook_takes_it(names, tmp_path, home, name):
    done = papermill("nbs/evaluate.ipynb", tmp_path / "out.ipynb", ("method", "zero_shot"), ("encoder", names[name]), ("run_dir", tmp_path / "bare"), ("size", "smoke"), DQE_CIR_DATA=str(home))
    assert done.returncode == 0, done.stderr[-2000:]
    record = read_json(tmp_path / "bare" / "evaluation-garments-val.json")
    assert (record["method"], record["query"], record["trained_on"], record["data"]) == ("zero_shot", "sum", "", "garments")
    assert 0 <= record["metrics"]["R@10"] <= 100


@pytest.mark.parametrize("dataset", ["fashioniq", "cirr"])
def test_the_protocols_of_other_data_sets_take_it(names, home, dataset):
    method, data = build_method(zero_shot_config(names["clip"], device="cpu")).eval(), load_dataset(dataset, split="val", size="smoke")
    result = evaluate(method, data, cache_tokens(method.encoder, data, progress=False))
    assert "R@10" in result.metrics and result.protocol


def pictures(folder):
    folder.mkdir()
    for name in ("red", "blue", "green"): Image.new("RGB", (40, 60), name).save(folder / f"{name}.png")
    return folder


def test_own_photographs_are_searched_without_training(names, tmp_path):
    "With an index that is kept, and read again by the same model only."
    folder, store = pictures(tmp_path / "photos"), tmp_path / "store"
    retriever = Retriever.zero_shot(names["siglip"], device="cpu")
    assert str(retriever.index(folder, store)) == "3 pictures: 3 new"
    assert {result.id for result in retriever.search("red.png", "is blue", 5)} == {"blue.png", "green.png"}
    assert str(Retriever.zero_shot(names["siglip"], "image", "cpu").index(folder, store)) == "3 pictures: 3 kept"
    assert not Retriever.zero_shot(names["clip"], device="cpu").read_index(store)


def test_the_page_opens_with_it(names, home):
    retriever = Retriever.load("zero_shot", encoder=names["clip"])
    page = SearchPage(retriever, size="smoke")
    page.open("garments")
    assert "zero_shot, query: sum)" in page.status.value and retriever.lessons is None


def searched_at_the_terminal(encoder, place, capsys, monkeypatch):
    "What `dqe-cir search --model zero_shot` prints as JSON for red, which is to be blue; everything is kept below `place`."
    monkeypatch.setenv("DQE_CIR_DATA", str(place / "data"))
    folder = pictures(place / "photos")
    status = main(["search", str(folder), "--model", "zero_shot", "--encoder", encoder, "--reference", str(folder / "red.png"), "--text", "is blue", "--json"])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert f"{encoder.rpartition('/')[2]}, without training" in said.err
    return {row["id"] for row in json.loads(said.out)}


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_terminal_searches_with_it(names, name, tmp_path, capsys, monkeypatch):
    assert searched_at_the_terminal(names[name], tmp_path, capsys, monkeypatch) == {"blue.png", "green.png"}


def test_the_search_notebook_takes_it(names, tmp_path):
    folder = pictures(tmp_path / "photos")
    done = papermill("nbs/search.ipynb", tmp_path / "out.ipynb", ("model", "zero_shot"), ("encoder", names["clip"]), ("gallery", folder), DQE_CIR_DATA=str(tmp_path / "data"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "zero_shot, query: sum" in (tmp_path / "out.ipynb").read_text()


def test_an_encoder_that_is_not_there_is_one_line_at_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DQE_CIR_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["search", str(pictures(tmp_path / "photos")), "--model", "zero_shot", "--encoder", "nobody/nothing", "--reference", "red.png", "--text", "is blue"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "nobody/nothing" in said[0]


def test_it_is_saved_and_named_by_content(names, tmp_path):
    "A zero-shot retriever is a folder too, without weights of its own."
    retriever = Retriever.zero_shot(names["clip"], device="cpu")
    retriever.save_pretrained(tmp_path / "shared")
    for path in (tmp_path / "shared").iterdir(): assert names["clip"].encode() not in path.read_bytes(), path.name
    with pytest.raises(DataError, match="is not at any place known here"): Retriever.load(tmp_path / "shared", "cpu")
    assert Retriever.load(tmp_path / "shared", "cpu", names["clip"]).model_key() == retriever.model_key()
    with pytest.raises(DataError, match="is not the one that"): Retriever.load(tmp_path / "shared", "cpu", names["siglip"])
    assert "nothing trained" in (tmp_path / "shared" / "README.md").read_text()


# ---- sentence-transformers

def test_a_model_of_sentence_transformers_reads_both(sentences, val):
    "Its joint query looks at the picture and at the text, and is what the library itself gives."
    encoder = load_backbone(sentences, "cpu")
    assert type(encoder) is SentenceEncoder and encoder.reads_both and ZeroShot(encoder).query == "joint"
    reference = torch.stack([encoder.transform(Image.new("RGB", (30, 50), name)) for name in ("red", "blue")]).half()
    asked = ZeroShot(encoder).encode_query(reference, ["is green", "is white"])
    [own] = encoder.vision_tower.encode([dict(image=encoder.pictures(reference)[0], text="is green")], convert_to_tensor=True, normalize_embeddings=True)
    assert_close(asked[0], own.clone())
    for other in (reference.flip(0), reference): assert asked.shape == ZeroShot(encoder, "sum").encode_query(other, ["a", "b"]).shape
    assert not torch.equal(asked, ZeroShot(encoder).encode_query(reference.flip(0), ["is green", "is white"]))
    assert not torch.equal(asked, ZeroShot(encoder).encode_query(reference, ["is white", "is green"]))


def test_a_model_of_sentence_transformers_is_evaluated_and_searched(sentences, val, tmp_path, home):
    method = build_method(zero_shot_config(sentences, device="cpu")).eval()
    tokens = cache_tokens(method.encoder, val, progress=False)
    for query in QUERIES: assert "mAP" in evaluate(ZeroShot(method.encoder, query), val, tokens).metrics
    retriever = Retriever.zero_shot(sentences, device="cpu")
    retriever.index(pictures(tmp_path / "photos"))
    assert len(retriever.search("red.png", "is blue", 5)) == 2
    page = SearchPage(retriever, size="smoke")
    page.open("garments")
    assert "zero_shot, query: joint)" in page.status.value


def test_the_terminal_searches_with_a_model_of_sentence_transformers(sentences, tmp_path, capsys, monkeypatch):
    assert searched_at_the_terminal(sentences, tmp_path, capsys, monkeypatch) == {"blue.png", "green.png"}


def test_the_fingerprint_of_a_model_of_sentence_transformers_lasts(sentences):
    assert load_backbone(sentences, "cpu").fingerprint() == load_backbone(sentences, "cpu").fingerprint()
