"Every method answers the questions of `check_method` and declares what it reads; QuRe and SPRC against figures of their own programs."
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from helpers import ROOT

from dqe_cir.encoder import Blip2Encoder
from dqe_cir.methods import METHODS
from dqe_cir.methods import Batch
from dqe_cir.trainer import check_method
from dqe_cir.trainer import NegativePool
from dqe_cir.methods.parts import LearnedTemperature, read_text
from dqe_cir.studies.systems import measured, published
from dqe_cir.studies.tables import method_name, read_figures
from dqe_cir.trainer import TrainConfig, TrainingSet, train_config


@pytest.mark.parametrize("name", list(METHODS))
def test_is_a_method(name): check_method(METHODS[name], method=name)


# ---- declarations

FORMS = [form for method in METHODS.values() for form in (method, method.native) if form]
FIELDS = {field.name for field in dataclasses.fields(TrainConfig)}
OF_EVERY_RUN = {"dataset", "method", "form", "encoder", "seed", "epochs", "lr", "head_rate", "batch_size", "recipe"}


class Watched:
    "A run's parameters that remembers which of them were read."
    def __init__(self, config): self.config, self.read = config, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self.config, name)


def name_of(form): return next(name for name, method in METHODS.items() if form in (method, method.native))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_options_are_what_a_method_reads(form):
    config = Watched(train_config(dict(method=name_of(form), device="cpu")))
    form.from_config(form.load_encoder("mini", device="cpu"), config)
    assert config.read - OF_EVERY_RUN == set(form.options)
    assert len(set(form.options)) == len(form.options)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_what_authors_used_are_parameters_of_every_run(form):
    assert set(form.published) <= {"fashioniq", "cirr"} and form.published == METHODS[name_of(form)].published
    for schedule in form.published.values(): assert set(schedule) <= {"epochs", "lr", "batch_size", "head_rate", "refresh_left"}


def test_every_system_with_printed_figures_says_what_its_authors_used():
    printed = {method_name(row["system"]) for row in read_figures(ROOT / "data" / "paper_tables.csv")} & set(METHODS)
    assert len(printed) >= 8
    for name in printed: assert set(METHODS[name].published) == {"fashioniq", "cirr"}, name


@pytest.mark.parametrize("method, options, complaint", [
    ("info_nce", dict(label_smoothing=1.0), "label_smoothing=1.0 must be at least 0 and below 1"),
    ("info_nce", dict(label_smoothing=0.0, soft_labels="target"), "soft_labels=target spreads the softened share"),
    ("dqe_cir", dict(label_smoothing=-0.1), "label_smoothing=-0.1 must be at least 0 and below 1"),
    ("dqe_cir", dict(pair_smoothing=0.7), "pair_smoothing=0.7 must be at least 0 and below 0.5: it is the share"),
    ("dqe_cir", dict(pair_smoothing=0.5), "pair_smoothing=0.5 must be at least 0 and below 0.5"),
    ("dqe_cir", dict(pair_smoothing=float("nan")), "pair_smoothing=nan"),
    *[("dqe_cir", {f"{term}_weight": -0.25}, f"{term}_weight=-0.25 must be at least 0")
      for term in ("preference", "ranking", "attribute", "contrastive")],
    ("dqe_cir", dict(preference_weight=0.0, ranking_weight=0.0, attribute_weight=0.0, contrastive_weight=0.0), "contrastive_weight are all 0"),
    ("dqe_cir", dict(mined_columns=True, preference_weight=1.0, contrastive_weight=0.0), "mined_columns=True widens the contrastive term: contrastive_weight=0"),
    ("dqe_cir", dict(mined_columns=True, contrastive_weight=1.0, negatives="in_batch"), "negatives=in_batch mines none"),
    ("dqe_cir", dict(attribute_negatives="own", negatives="in_batch"), "attribute_negatives=own chooses from mined pools"),
    ("dqe_cir", dict(attribute_negatives="own", dataset="fashioniq"), "labels of all images, which fashioniq has not"),
])
def test_what_cannot_work_is_one_line(method, options, complaint):
    config = dataclasses.replace(train_config(dict(method=method)), **options)
    with pytest.raises(ValueError) as told: METHODS[method].check(config)
    assert complaint in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("name", list(METHODS))
def test_what_the_presets_fill_in_works(name):
    for dataset in ("garments", "fashioniq", "cirr"):
        config = train_config(dict(method=name, dataset=dataset, encoder="a full-size one"))
        METHODS[name].check(config)
        assert set(METHODS[name].options) <= FIELDS


def test_the_weights_of_the_other_terms_follow_the_data_set():
    "As the authors' programs have them; a data set that they do not know is treated as FashionIQ."
    auxiliary, backward = METHODS["sprc"], METHODS["bi_blip4cir"]
    for dataset, of_sprc, of_bi_blip in (("cirr", 0.4, (0.1, 0.1)), ("fashioniq", 1.0, (0.4, 0.5)), ("garments", 1.0, (0.4, 0.5))):
        config = train_config(dict(dataset=dataset))
        assert auxiliary.from_config(auxiliary.load_encoder("mini", device="cpu"), config).weights == dict(text_only=of_sprc, alignment=of_sprc)
        assert backward.from_config(backward.load_encoder("mini", device="cpu"), config).backward == of_bi_blip


@pytest.mark.parametrize("name", ["info_nce", "sprc", "qure", "dqe_cir"])
@pytest.mark.parametrize("start", [None, 0.1])
def test_the_temperature_is_one_number_between_bounds(name, start):
    "Under the name that checkpoints know; it starts at the encoder's, or where a run says."
    encoder = METHODS[name].load_encoder("mini", device="cpu")
    method = METHODS[name].from_config(encoder, train_config({"method": name, "temperature": start}))
    assert isinstance(method, LearnedTemperature) and method.state_dict()["log_temperature"].shape == ()
    assert method.temperature.item() == pytest.approx(start or encoder.temperature)
    for far, bound in ((-99.0, 0.01), (99.0, 0.5)):
        method.log_temperature.data.fill_(far)
        assert method.temperature.item() == pytest.approx(bound)
    assert encoder.temperature == pytest.approx(0.0332, abs=1e-3)


# ---- reference models: small random weights under the names that LAVIS gives them

RENAMED = [(r"^Qformer\.bert\.embeddings\.LayerNorm", "qformer.layernorm"), (r"^Qformer\.bert\.embeddings", "embeddings"), (r"^Qformer\.bert", "qformer"),
           (r"attention\.self\.", "attention.attention."), (r"^visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
           (r"^visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"), (r"^visual_encoder\.patch_embed\.proj", "vision_model.embeddings.patch_embedding"),
           (r"^visual_encoder\.blocks", "vision_model.encoder.layers"), (r"\.norm(\d)\.", r".layer_norm\1."), (r"\.attn\.proj\.", ".self_attn.projection."), (r"\.attn\.", ".self_attn."),
           (r"^ln_vision", "vision_model.post_layernorm"), (r"^(vision|text)_proj\.", r"\1_projection.")]


def renamed(name):
    for pattern, new in RENAMED: name = re.sub(pattern, new, name)
    return name


def reference_encoder(golden, which):
    "A reference model as an encoder, with its temperature, its prompts (or None) and its stored figures."
    stored, about = load_file(golden(f"blip2_{which}.safetensors")), json.loads(golden("blip2_parity.json").read_text())
    config = about["config"]
    model = Blip2ForImageTextRetrieval(Blip2Config(
        vision_config=dict(hidden_size=config["vis_width"], intermediate_size=len(stored["visual_encoder.blocks.0.mlp.fc1.bias"]), num_hidden_layers=config["vis_depth"],
                           num_attention_heads=config["vis_heads"], image_size=config["img_size"], patch_size=config["patch"], layer_norm_eps=1e-6),
        qformer_config=dict(vocab_size=config["vocab"], hidden_size=config["hidden"], intermediate_size=config["inter"], num_hidden_layers=config["layers"],
                            num_attention_heads=config["heads"], encoder_hidden_size=config["vis_width"], max_position_embeddings=config["max_pos"],
                            cross_attention_frequency=config["cross_freq"], use_qformer_text_input=True, layer_norm_eps=1e-12),
        num_query_tokens=about[which]["num_query_token"], image_text_hidden_size=about[which]["embed_dim"]))
    model.vision_model.post_layernorm.eps = 1e-5
    weights = {renamed(name): value for name, value in stored.items()}
    for layer in range(config["vis_depth"]):
        place = f"vision_model.encoder.layers.{layer}.self_attn."
        query, value = weights.pop(f"{place}q_bias"), weights.pop(f"{place}v_bias")
        weights[f"{place}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    missing, _ = model.load_state_dict(weights, strict=False)
    assert not [name for name in missing if not name.startswith("itm_head")]
    arrays = {name: torch.from_numpy(array) for name, array in np.load(golden(f"blip2_{which}.npz")).items()}
    encoder = Blip2Encoder(model, None, stored["temp"]).eval()
    encoder.tokenize = lambda texts: (arrays["input_ids"].long(), arrays["attention_mask"].long())
    return encoder, stored.get("prompt_tokens"), arrays, about[which]


def close(ours, theirs): assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def compare_gradients(method, expected):
    "Norms of the gradients, by the names of the reference; ours of the temperature is that of its logarithm."
    ours = {name: parameter.grad.norm().item() for name, parameter in method.named_parameters() if parameter.requires_grad}
    ours["temp"] = ours.pop("log_temperature") / method.temperature.item()
    place = lambda name: name if name == "temp" else "prompts" if name == "prompt_tokens" else "encoder." + renamed(name).replace("vision_model.post_layernorm", "ln_vision")
    compared = {name for name in expected if place(name) in ours}
    assert not {name for name in expected if expected[name] > 1e-6} - compared
    for name in compared: assert ours[place(name)] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


def test_sprc_passes_losses_and_gradients(golden):
    encoder, prompts, arrays, expected = reference_encoder(golden, "sprc_eva_vit")
    method = METHODS["sprc"](encoder).eval()
    method.prompts.data.copy_(prompts[0])
    reference, target = (encoder.image_tokens(arrays[f"{side}_pixels"]) for side in ("reference", "target"))
    close(encoder.ln_vision(reference), arrays["reference_frozen"])
    words = encoder.tokenize(None)
    query, fused = method.sentence(reference, *words)
    close(fused, arrays["fusion_hidden"][:, :32])
    close(query, arrays["fusion_feature"])
    close(read_text(encoder, *words, method.prompts, read=None), arrays["prompt_text_hidden"])
    close(method.encode_target(target), arrays["target_features"])
    close(method.score(query, method.encode_target(target)), arrays["retrieval_scores"])
    terms = method.losses(Batch(reference, ["?"] * 5, target, torch.arange(5)))
    for term, name in (("contrastive", "loss_itc"), ("text_only", "loss_rtc"), ("alignment", "loss_align")):
        assert terms[term].mean().item() == pytest.approx(expected["losses"][name], rel=1e-4)
    sum(term.mean() for term in terms.values()).backward()
    compare_gradients(method, expected["grad_norm_of_unweighted_total"])


def test_sprc_takes_the_steps_of_its_program(golden):
    "Five steps of AdamW with the program's settings; it learns the temperature itself, not its logarithm."
    encoder, prompts, arrays, expected = reference_encoder(golden, "sprc_eva_vit")
    method = type("AsPublished", (METHODS["sprc"],), {"temperature": property(lambda self: self.temp)})(encoder).eval()
    method.prompts.data.copy_(prompts[0])
    method.temp = torch.nn.Parameter(torch.tensor(encoder.temperature))
    batch = Batch(encoder.image_tokens(arrays["reference_pixels"]), ["?"] * 5, encoder.image_tokens(arrays["target_pixels"]), torch.arange(5))
    trained = [parameter for name, parameter in method.named_parameters() if parameter.requires_grad and name != "log_temperature"]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.05), []
    for _ in range(5):
        loss = sum(term.mean() for term in method.losses(batch).values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, expected["loss_over_5_adamw_steps_lr1e-4_betas.9_.98_eps1e-7_wd.05_eval_mode"], rtol=1e-4)


def test_qure_passes_loss_and_gradients(golden):
    encoder, _, arrays, expected = reference_encoder(golden, "qure_eva_vit")
    method = METHODS["qure"](encoder).eval()
    reference, target, negative = (encoder.image_tokens(arrays[f"{side}_pixels"]) for side in ("reference", "target", "negative"))
    close(method.encode_query(reference, None), arrays["query_feature"])
    close(method.encode_target(torch.cat([target, negative])), arrays["target_features"])
    batch = Batch(reference, None, target, torch.arange(len(reference)), negative.unsqueeze(1))
    loss = method.losses(batch)["preference"].mean()
    assert loss.item() == pytest.approx(expected["kl_loss"], rel=1e-4)
    loss.backward()
    compare_gradients(method, expected["grad_norm"])


@pytest.mark.parametrize("dataset, key", [("fashioniq", "fashionIQ (30 epochs, negative_definition_epoch_num 6, warmup)"), ("cirr", "cirr (50 epochs, 6, warmup)")])
def test_qure_mines_when_its_program_does(golden, dataset, key):
    "The published schedule's epochs: five times in 30, and six times in 50, the last for two epochs."
    config = train_config({"dataset": dataset, "method": "qure", "encoder": "a full-size one"})
    data, pool = TrainingSet.__new__(TrainingSet), NegativePool.__new__(NegativePool)
    data.negatives, pool.warmup, pool.every = pool, config.warmup_epochs, config.refresh_every
    epochs = [epoch for epoch in range(config.epochs) if data.refresh_due(epoch, config)]
    assert epochs == json.loads(golden("blip2_parity.json").read_text())["qure_refresh_epochs"][key]


# ---- what the pages show

def test_each_system_has_printed_figures_and_a_row_of_the_leaderboard():
    names = {method_name(row["system"]): row["system"] for row in read_figures()}
    assert set(names) == METHODS.keys() - {"info_nce"}
    for method, system in names.items():
        shown = published(system).data
        printed = [row for row in read_figures() if row["system"] == system and " " not in row["metric"]]
        assert printed and all(f"{row['metric']} {row['value']:.2f}" in shown and row["backbone"] in shown for row in printed)
        shown = measured(method).data
        assert "**Not run**" in shown or f"| `{method}` |" in shown and "| `info_nce` |" in shown
    with pytest.raises(ValueError, match="no printed figure of 'InfoNCE'; known: CoSMo"): published("InfoNCE")
