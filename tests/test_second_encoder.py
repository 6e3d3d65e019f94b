"A second encoder that ships: it is found by its name, taken by the world that names it, licensed by its own card, and handed on by name."
import dataclasses
import json
import shutil
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from helpers import data_in

from dqe_cir.data.datasets import SPECS, world_shown
from dqe_cir.encoder import load_encoder
from dqe_cir.encoder.any_backbone import kind_of
from dqe_cir.encoder.blip2 import MINI, encoder_size, shipped
from dqe_cir.encoder.native.blip import load_blip
from dqe_cir.encoder.native.clip import load_clip
from dqe_cir.encoder.native.resnet import load_resnet
from dqe_cir.files import read_json
from dqe_cir.retriever import Retriever
from dqe_cir.retriever.drawn import drawn_at_once
from dqe_cir.retriever.share import ENCODER_LICENCE, card_head, export, licence_notes, model_card, shipped_licence
from dqe_cir.studies.ablation import study_config, study_jobs, study_record
from dqe_cir.studies.leaderboard import leaderboard_config, search_jobs
from dqe_cir.trainer import smoke_run, train_config
from dqe_cir.trainer.config import encoder_for, zero_shot_config
from dqe_cir.trainer.evaluation_config import evaluation_config

NAME = SPECS["scenes"].drawn.encoder


def another(folder, words=("teapot", "lawn")):
    "A copy of the small encoder with other weights and a word more in its vocabulary, in a folder of its own."
    shutil.copytree(MINI, folder)
    weights = load_file(folder / "model.safetensors")
    weights["query_tokens"] = weights["query_tokens"] + 0.1
    words_there = json.loads((folder / "tokenizer.json").read_text())
    spelled = words_there["model"]["vocab"]
    old = [word for word in spelled if word.isalpha() and len(word) > 4][:len(words)]
    words_there["model"]["vocab"] = {dict(zip(old, words)).get(word, word): number for word, number in spelled.items()}
    (folder / "tokenizer.json").write_text(json.dumps(words_there))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    "The folder of the assets with `mini`, the encoder that the scenes name, and one that no world names."
    home = tmp_path_factory.mktemp("package") / "assets"
    shutil.copytree(MINI, home / "mini")
    for name in (NAME, "mini-made"): another(home / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dqe_cir.encoder.blip2.MINI", home / "mini")
        yield home


@pytest.fixture(scope="module")
def run(assets):
    "A run of seconds on the scenes, with no encoder named."
    return smoke_run(dataset="scenes", method="info_nce", readings="none", epochs=1)


# ---- which one

@pytest.mark.parametrize("dataset, wanted", [("scenes", NAME), ("cirr", NAME), ("garments", "mini"), ("fashioniq", "mini"), ("custom", "mini"), ("", "mini"), ("nothing", "mini")])
def test_the_encoder_is_that_of_the_pictures(assets, tmp_path, dataset, wanted):
    with warnings.catch_warnings(), data_in(tmp_path):
        warnings.simplefilter("error")
        assert encoder_for(dataset) == wanted == zero_shot_config(dataset=dataset).encoder
        if dataset in SPECS and SPECS[dataset].training:
            assert train_config(dict(dataset=dataset)).encoder == wanted
            assert train_config(dict(dataset=dataset, encoder="mini-made")).encoder == "mini-made", "what is named wins"


def test_real_data_take_the_usual_one(assets, tmp_path):
    "Where the pictures of a data set are there, and where their folder is named, none of them is drawn."
    with data_in(tmp_path):
        (tmp_path / "cirr").mkdir()
        assert world_shown("cirr") is None and train_config(dict(dataset="cirr")).encoder == "mini"
        assert train_config(dict(dataset="cirr", data_root=str(tmp_path / "elsewhere"))).encoder == "mini"
        assert train_config(dict(dataset="scenes", data_root=str(tmp_path / "drawn"))).encoder == NAME


def test_every_world_names_an_encoder_that_ships(monkeypatch):
    monkeypatch.setattr("dqe_cir.encoder.blip2.MINI", MINI)
    assert all(shipped(spec.drawn.encoder) for spec in SPECS.values() if spec.drawn)


# ---- what is found under its name

def test_it_loads_by_its_name(assets):
    usual, second = (load_encoder(name, device="cpu") for name in ("mini", NAME))
    torch.testing.assert_close(second.query_tokens, usual.query_tokens + 0.1)
    assert encoder_size(NAME) == "small" and kind_of(NAME) == "blip-2" and second.fingerprint() != usual.fingerprint()
    assert second.tokenizer.tokenize("teapot") == ["teapot"] != usual.tokenizer.tokenize("teapot")


NATIVE = {"clip": lambda name: load_clip(name, "cpu").tokenizer, "blip": lambda name: load_blip(name, "cpu").tokenizer,
          "resnet": lambda name: load_resnet(name, "cpu", reads="roberta").reader.tokenizer}


@pytest.mark.parametrize("kind", NATIVE)
def test_small_native_backbones_have_its_words(assets, kind):
    "Random weights, and the vocabulary of the encoder that is named."
    known = [NATIVE[kind](name).get_vocab() for name in ("mini", NAME)]
    assert "teapot" not in known[0] and "teapot" in known[1] and len(known[0]) == len(known[1])


# ---- a run, an evaluation, a search and a study with it

def test_a_run_on_the_world_takes_it(run):
    assert read_json(run / "config.json")["encoder"] == NAME
    retriever = Retriever.load(run, device="cpu")
    assert retriever.method.encoder.tokenizer.tokenize("teapot") == ["teapot"]


def test_an_evaluation_without_training_takes_it(assets, tmp_path):
    found = evaluation_config(dict(method="zero_shot", dataset="scenes", size="smoke", run_dir=str(tmp_path / "bare")))
    assert found.encoder == NAME and read_json(tmp_path / "bare" / "config.json")["encoder"] == NAME
    assert evaluation_config(dict(method="zero_shot", run_dir=str(tmp_path / "plain"))).encoder == "mini"


def test_a_search_without_training_takes_it(assets):
    assert Retriever.load("zero_shot", device="cpu", dataset="scenes").config.encoder == NAME
    assert Retriever.load("zero_shot", device="cpu").config.encoder == "mini"
    assert Retriever.load("zero_shot", device="cpu", encoder="mini-made", dataset="scenes").name == "mini-made, without training"
    assert Retriever.zero_shot(NAME, "text", device="cpu").method.query == "text"


def test_studies_take_it_and_their_command_need_not_name_it(assets):
    config = study_config(dict(dataset="scenes", conditions="info_nce,hand_lists,trns,sprc", seeds="0"))
    assert {job.config.encoder for job in study_jobs(config.folder, config.rated, config.seed_list, config.common)} == {NAME}
    run = dict(condition="sprc", seed=0, parameters={}, data="scenes", split="val", metrics={}, environment={})
    assert "encoder" not in study_record(config, [run])["command"]
    board = leaderboard_config(dict(dataset="scenes", conditions="info_nce", seeds="0", boards="common"))
    assert {job.config.encoder for job in search_jobs(board)} == {NAME}
    named = study_config(dict(dataset="scenes", conditions="info_nce", seeds="0", encoder="mini-made"))
    assert study_jobs(named.folder, named.named, [0], named.common)[0].config.encoder == "mini-made"


# ---- rights, and what is handed on

def test_the_licence_is_that_of_its_own_card(assets, monkeypatch):
    assert shipped_licence("mini") == shipped_licence(NAME) == "apache-2.0"
    card = assets / "mini-made" / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: mit"))
    config = dataclasses.replace(train_config(dict(dataset="scenes")), encoder="mini-made")
    assert licence_notes(config)[2] == "The small encoder is part of this repository, Mit."
    own = Retriever(Retriever.zero_shot("mini-made", device="cpu").method, config)
    assert card_head(own).license == "other", "not all of it is ours"
    card.unlink()
    assert shipped_licence("mini-made") == "" and licence_notes(config)[2] == ENCODER_LICENCE
    for name in ("owner/model", "/somewhere/mini-made", "mini-unheard"): assert shipped_licence(name) == ""


def test_an_export_names_it_and_is_free(run, tmp_path):
    folder = export(run, tmp_path / "for others")
    assert read_json(folder / "config.json")["encoder"] == NAME, "by its name, not by its content"
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and f"`{NAME}`, image tower frozen" in card.text and "-p encoder" not in card.text
    assert "part of this repository, Apache-2.0." in card.text
    again = Retriever.load(folder, device="cpu")
    assert again.config.encoder == NAME and len(again) > 0


def test_a_card_of_a_search_without_training_is_free_too(assets):
    retriever = Retriever.load("zero_shot", device="cpu", dataset="scenes")
    assert "license: apache-2.0" in model_card(retriever) and f"`{NAME}`" in model_card(retriever)


# ---- the one that ships in earnest

def test_the_encoder_of_the_scenes_reads_their_requests(monkeypatch):
    "No request is cut, and none has a word that is spelled letter by letter."
    monkeypatch.setattr("dqe_cir.encoder.blip2.MINI", MINI)
    encoder = load_encoder(NAME, device="cpu")
    texts = [text for triplet in drawn_at_once("scenes", "val", "smoke").triplets for text in triplet.captions]
    pieces = [encoder.tokenizer.tokenize(text) for text in texts]
    assert all(len(each) <= encoder.longest - 2 and encoder.tokenizer.unk_token not in each for each in pieces)
    assert not [piece for each in pieces for piece in each if piece.startswith("##")]
    assert train_config(dict(dataset="scenes")).encoder == NAME
