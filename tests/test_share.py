"What is handed on: no place of the trainer's machine, a card that the hub reads, and a way to say where the encoder lies now."
import dataclasses
import json
import shutil

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from dqe_cir.data import load_dataset
from dqe_cir.encoder import MINI, cache_tokens
from dqe_cir.files import DataError, read_json, read_tensors, write_json, write_tensors
from dqe_cir.retriever import Retriever, export
from dqe_cir.retriever.share import eval_results
from dqe_cir.trainer import SMOKE, build_method, fit, load_run, open_run, train_config, training_set
from dqe_cir.trainer.runs import trained_state

HOME = "home-of-alice"  # part of every path that must not show


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    "A run whose encoder, data and folder all lie in somebody's home; returns that home and a copy of its encoder elsewhere."
    place = tmp_path_factory.mktemp("machine") / HOME
    shutil.copytree(MINI, place / "blip2")
    dataset = load_dataset("garments", split="train", size="smoke")
    run = open_run(train_config({**SMOKE, "epochs": 1, "evaluate_every": 0, "run_dir": str(place / "run"), "encoder": str(place / "blip2"), "data_root": str(dataset.root)}))
    method = build_method(run.config)
    fit(method, training_set(run.config, dataset, cache_tokens(method.encoder, dataset, progress=False)), run)
    write_json(run.folder / "results.json", dict(dataset="garments", data="garments", split="val", protocol="p", encoder=run.config.encoder, metrics={"R@10": 10.0}))
    (place / "pictures").mkdir()
    for name in ("red", "blue"): Image.new("RGB", (40, 60), name).save(place / "pictures" / f"{name}.png")
    elsewhere = place.parent / "elsewhere"
    shutil.copytree(MINI, elsewhere)
    return place, elsewhere


@pytest.fixture(scope="module")
def shared(trained):
    "The exported folder of that run."
    return export(trained[0] / "run", trained[0].parent / "export")


def leaks(folder, word=HOME):
    return sorted(path.name for path in folder.iterdir() if word.encode() in path.read_bytes())


def same(one, other):
    "Are two folders alike: the same names, texts, tensors and metadata? The order of metadata in a file is not fixed."
    if sorted(path.name for path in one.iterdir()) != sorted(path.name for path in other.iterdir()): return False
    for path in one.iterdir():
        if path.suffix != ".safetensors":
            if path.read_bytes() != (other / path.name).read_bytes(): return False
            continue
        (tensors, about), (others, of_other) = read_tensors(path), read_tensors(other / path.name)
        if about != of_other or tensors.keys() != others.keys(): return False
        if not all(torch.equal(value, others[name]) for name, value in tensors.items()): return False
    return True


def test_an_export_names_no_place(trained, shared):
    assert leaks(shared) == []
    assert read_json(shared / "config.json")["encoder"] == read_json(shared / "results.json")["encoder"] == read_tensors(shared / "model.safetensors")[1]["encoder"]


def test_an_index_of_own_pictures_stays_at_home(trained, tmp_path):
    "`save` is for this machine and keeps it, with its places; what is for others does not have it."
    place, _ = trained
    retriever = Retriever.load(place / "run", "cpu")
    retriever.index(place / "pictures")
    retriever.save_pretrained(tmp_path / "for others")
    assert leaks(tmp_path / "for others") == [] and not (tmp_path / "for others" / "index.json").exists()
    again = Retriever.load(retriever.save(tmp_path / "mine"), "cpu", str(place / "blip2"))
    assert again.ids == ["blue.png", "red.png"] and again.search("red.png", "is blue", 1)[0].id == "blue.png"


def test_whoever_loads_says_where_the_encoder_is(trained, shared):
    place, elsewhere = trained
    with pytest.raises(DataError, match=r"'content:[0-9a-f]{16}', is not at any place known here: say where .* encoder=PLACE\) or -p encoder PLACE"):
        Retriever.load(shared, "cpu")
    ours, theirs = Retriever.load(place / "run", "cpu"), Retriever.from_pretrained(shared, device="cpu", encoder=str(elsewhere))
    for name, value in trained_state(ours.method).items(): assert torch.equal(value, trained_state(theirs.method)[name])
    reference = theirs.ids[0]
    ours.index(load_dataset("garments", split="val", size="smoke"))
    assert [(one.id, one.score) for one in ours.search(reference, "is red", 9)] == [(one.id, one.score) for one in theirs.search(reference, "is red", 9)]


def test_an_encoder_of_another_content_is_refused(trained, shared, tmp_path):
    shutil.copytree(MINI, tmp_path / "other")
    tensors, about = read_tensors(tmp_path / "other" / "model.safetensors")
    tensors["query_tokens"] = tensors["query_tokens"] + 1
    write_tensors(tmp_path / "other" / "model.safetensors", tensors, about)
    with pytest.raises(DataError, match="is not the one that .* was trained with.*name it with encoder=PLACE"): Retriever.load(shared, "cpu", str(tmp_path / "other"))


def test_an_export_is_handed_on_again(trained, shared, tmp_path):
    "Loaded from another place and exported anew, it is the same folder."
    elsewhere = trained[1]
    Retriever.load(shared, "cpu", str(elsewhere)).save_pretrained(tmp_path / "again")
    assert same(tmp_path / "again", shared)
    assert leaks(tmp_path / "again", "elsewhere") == []


def test_a_moved_encoder_of_a_run_and_of_an_old_export_is_named_likewise(trained, shared, tmp_path):
    "Folders written before had the path; nobody has to write them again."
    place, elsewhere = trained
    old = shutil.copytree(place / "run", tmp_path / "old")
    values = read_json(old / "config.json") | {"encoder": "/gone/blip2"}
    write_json(old / "config.json", values)
    tensors, about = read_tensors(old / "model.safetensors")
    write_tensors(old / "model.safetensors", tensors, about | {"parameters": json.dumps(json.loads(about["parameters"]) | {"encoder": "/gone/blip2"})})
    with pytest.raises(DataError, match="'/gone/blip2', is not at any place known here"): load_run(old, "cpu")
    method, config = load_run(old, "cpu", str(elsewhere))
    assert config.encoder == str(elsewhere) and method.stands_on == read_json(shared / "config.json")["encoder"].removeprefix("content:")


def test_the_card_is_read_by_the_hubs_library(trained, shared):
    card = ModelCard.load(shared / "README.md")
    assert card.data.library_name == "dqe-cir" and card.data.license == "other" and card.data.datasets == ["garments"]
    assert "composed-image-retrieval" in card.data.tags and card.data.get("base_model") is None
    [found] = card.data.eval_results
    assert (found.metric_name, found.metric_value, found.dataset_args) == ("R@10", 10.0, {"protocol": "p"})
    assert found.dataset_split == "val" and "encoder=PLACE" in card.text and "-p encoder PLACE" in card.text


def test_the_card_goes_through_the_librarys_own_validation(monkeypatch):
    "Its strict reading here, and, through the boundary of the network, the question that it puts to the hub before a push: the very card, with figures that come back as they went."
    import httpx
    from huggingface_hub import ModelCardData, repocard
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
    from dqe_cir.retriever.share import model_card
    text, asked = model_card(Retriever.load("garments", "cpu")), []

    class Session:
        def post(self, url, json, headers):
            asked.append((url, json))
            return httpx.Response(200, request=httpx.Request("POST", url))

    monkeypatch.setattr(repocard, "get_session", Session)
    card = ModelCard(text, ignore_metadata_errors=False)
    card.validate()
    [(url, sent)] = asked
    assert url.endswith("/api/validate-yaml") and sent == {"repoType": "model", "content": text}
    told = ModelCardData(**card.data.to_dict(), ignore_metadata_errors=False)
    assert told.to_dict() == card.data.to_dict() and told.eval_results == card.data.eval_results
    index = eval_results_to_model_index(card.data.model_name, card.data.eval_results)
    assert model_index_to_eval_results(index) == (card.data.model_name, card.data.eval_results) and len(card.data.eval_results) >= 4


@pytest.mark.parametrize("name, base", [("owner/model", ["owner/model"]), ("owner/resnet+owner/roberta", ["owner/resnet", "owner/roberta"]), ("mini", None)])
def test_a_hub_id_is_kept_and_named_as_base_model(name, base):
    shipped = Retriever.load("garments", "cpu")
    named = Retriever(shipped.method, dataclasses.replace(shipped.config, encoder=name), record=shipped.record)
    from dqe_cir.retriever.share import card_head
    assert named.shared_config.encoder == name and card_head(named).base_model == base


def test_a_run_without_figures_lists_none():
    assert eval_results({}) == [] == eval_results({"metrics": {}, "dataset": "cirr"})


def test_push_sends_the_folder_and_nothing_else(trained, shared, tmp_path, monkeypatch):
    "One commit, through the boundary of huggingface_hub; there and back every bit is the same."
    sent = {}

    class Repo: repo_id = "alice/model"

    def upload(self, **named):
        sent.update(named)
        shutil.copytree(named["folder_path"], tmp_path / "hub")
        return "url of the commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, **named: Repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    retriever = Retriever.load(shared, "cpu", str(trained[1]))
    assert retriever.push_to_hub("alice/model", private=True) == "url of the commit"
    assert sent["repo_id"] == "alice/model" and sent["repo_type"] == "model"
    assert same(tmp_path / "hub", shared)


def test_a_name_that_the_hub_does_not_know_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError) as told: Retriever.from_pretrained("no body/here")
    assert "\n" not in str(told.value) and "correct the name" in str(told.value)
    with pytest.raises(DataError, match="is neither a folder nor a model that the hub gives"): Retriever.from_pretrained("no-body/here", local_files_only=True)
