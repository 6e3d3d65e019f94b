"The making of the small encoder: pictures that cover everything, stages that keep to their own weights, and what shipped."
import json
import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import Blip2ForImageTextRetrieval

from dqe_cir.encoder import pretraining
from dqe_cir.encoder import MINI, load_encoder
from dqe_cir.encoder.blip2 import encoder_size
from dqe_cir.data.garments.draw import ATTRIBUTES, CATEGORIES, Garment, draw_garment
from dqe_cir.data.garments.requests import caption_corpus, caption_of
from dqe_cir.encoder.pretraining import CURRICULA, GridHead, QUESTIONS, accuracies, answer_loss, augmented
from dqe_cir.encoder.pretraining import draw_pictures, encode_pictures, make_tokenizer, new_encoder
from dqe_cir.encoder.pretraining import itm_logits, itm_pairs, new_itm_head, normalised, optimise, save_encoder
from dqe_cir.encoder.pretraining import similar_rows, train_qformer, train_teacher, train_tower

COUNTS = [len(values) for values in QUESTIONS.values()]


def generator(seed): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pictures(): return draw_pictures(160, seed=7, purpose="tests")


# ---- pictures

@pytest.mark.parametrize("count", [1, 2430, 2431, 4860])
def test_combinations_are_drawn_equally_often_up_to_one(count, monkeypatch):
    blank = replace(CURRICULA["garments"], draw=lambda garment, rng, size: Image.new("RGB", (2, 2)))
    monkeypatch.setitem(CURRICULA, "garments", blank)
    drawn = draw_pictures(count, seed=1, purpose="count")
    combinations, times = np.unique(drawn.labels.numpy(), axis=0, return_counts=True)
    assert times.sum() == count and times.max() - (times.min() if len(combinations) == 2430 else 0) <= 1
    for garment, label in zip(drawn.shown[:50], drawn.labels.tolist()):
        assert [values[i] for values, i in zip(QUESTIONS.values(), label)] == list(vars(garment).values())


def test_purposes_and_seeds_do_not_share_pictures():
    sets = [{picture.numpy().tobytes() for picture in draw_pictures(40, seed, purpose).pixels} for seed, purpose in ((0, "pretraining"), (0, "probe"), (1, "pretraining"))]
    assert all(len(part) == 40 for part in sets) and len(set.union(*sets)) == 120


def test_pixels_are_the_transform_of_the_benchmark(pictures):
    "Pretraining must see what training will see: the same numbers that `target_pad` gives."
    from dqe_cir.data import target_pad
    picture = Image.fromarray(pictures.pixels[0].permute(1, 2, 0).numpy())
    torch.testing.assert_close(normalised(pictures.pixels[:1])[0], target_pad(picture, size=64))


@given(seed=st.integers(0, 1000))
def test_augmentation_keeps_range_and_shape_and_follows_its_generator(pictures, seed):
    first, again, other = (augmented(pictures.pixels[:8], generator(s)) for s in (seed, seed, seed + 1))
    low, high = normalised(torch.zeros(1, 3, 1, 1)), normalised(torch.full((1, 3, 1, 1), 255))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first >= low - 1e-6).all() and (first <= high + 1e-6).all() and first.shape == (8, 3, 64, 64)


# ---- heads and losses

def test_grid_head_averages_two_by_two_cells():
    "By hand: cell (r, c) of the 4x4 grid is the mean of four features of the 8x8 one, channels first in the flat order."
    features, head = torch.randn(3, 64, 96, generator=generator(0)), GridHead()
    cells = torch.empty(3, 96, 4, 4)
    for row, column in product(range(4), range(4)):
        places = [8 * (2 * row + dy) + 2 * column + dx for dy in (0, 1) for dx in (0, 1)]
        cells[:, :, row, column] = features[:, places].mean(1)
    torch.testing.assert_close(torch.cat(head(features), 1), head.linear(cells.flatten(1)))


def test_answer_loss_is_the_mean_over_questions_of_the_textbook_loss():
    logits = torch.randn(5, sum(COUNTS), generator=generator(0)).split(COUNTS, 1)
    labels = torch.stack([torch.randint(count, (5,), generator=generator(count)) for count in COUNTS], 1)
    total = 0.0
    for question, answer in enumerate(logits):
        for row in range(5):
            scores = answer[row].tolist()
            total += math.log(sum(math.exp(score) for score in scores)) - scores[labels[row, question]]
    assert answer_loss(logits, labels).item() == pytest.approx(total / 5 / len(COUNTS), rel=1e-5)


def test_accuracies_count_right_answers():
    labels = torch.zeros(4, len(COUNTS), dtype=torch.long)
    logits = [F.one_hot(torch.zeros(4, dtype=torch.long), count).float() for count in COUNTS]
    logits[2] = F.one_hot(torch.tensor([0, 1, 2, 0]), COUNTS[2]).float()
    assert accuracies(tuple(logits), labels) == {name: 0.5 if i == 2 else 1.0 for i, name in enumerate(QUESTIONS)}


@given(seed=st.integers(0, 10_000), count=st.integers(1, 300), size=st.integers(1, 64))
def test_similar_rows_share_a_category_and_two_colours(seed, count, size):
    "Also from few pictures, where some category and colours have no picture at all: a batch always has rows."
    labels = torch.stack([torch.randint(values, (count,), generator=generator(seed + i)) for i, values in enumerate(COUNTS)], 1)
    rows = similar_rows(labels, size, generator(seed))
    assert 1 <= len(rows) <= size and len(set(rows.tolist())) == len(rows)
    assert len(labels[rows, 0].unique()) == 1 and len(labels[rows, 1].unique()) <= 2


# ---- matching

@given(seed=st.integers(0, 10_000), count=st.integers(1, 24), kinds=st.integers(1, 6), spread=st.sampled_from([0.0, 1.0, 300.0]))
def test_what_is_said_not_to_match_does_not(seed, count, kinds, spread):
    "Whatever the scores: pairs first, then one wrong text a picture and one wrong picture a text, none with the labels of the other side."
    labels = torch.randint(kinds, (count, 1), generator=generator(seed)).expand(-1, 6)
    scores = spread * torch.randn(count, count, generator=generator(seed + 1))
    picture, text, together = itm_pairs(scores, labels, generator(seed))
    assert picture[:count].tolist() == text[:count].tolist() == list(range(count)) and together[:count].all()
    alike = (labels[picture] == labels[text]).all(1)
    assert torch.equal(alike, together.bool())
    able = [row for row in range(count) if (labels != labels[row]).any()]
    assert picture[count:].tolist()[:len(able)] == text[count + len(able):].tolist() == able and len(picture) == count + 2 * len(able)


def test_the_likelier_wrong_one_is_asked_about_more_often():
    "Of three wrong texts with scores 2, 1 and 0 the shares are those of the softmax, both ways."
    scores = torch.tensor([[5.0, 2, 1, 0], [0, 5, 0, 0], [0, 0, 5, 0], [0, 0, 0, 5]])
    labels, chance = torch.arange(4)[:, None].expand(-1, 6), generator(0)
    texts = torch.stack([itm_pairs(scores, labels, chance)[1][4] for _ in range(2000)])
    pictures = torch.stack([itm_pairs(scores.T, labels, chance)[0][8] for _ in range(2000)])
    expected = torch.tensor([2.0, 1, 0]).softmax(0).tolist()
    for drawn in (texts, pictures):
        shares = (drawn.bincount(minlength=4)[1:] / 2000).tolist()
        assert shares == pytest.approx(expected, abs=0.04)


def test_without_a_head_nothing_is_drawn_for_it(pictures):
    "Contrast alone is what it was: the joint pass gets no part in the loss, so words and pictures are all that move."
    encoder, other = new_encoder(0), new_encoder(0)
    tokens = encode_pictures(encoder, pictures)
    plain = train_qformer(encoder, tokens, pictures, 2, 0, batch_size=8)
    both = train_qformer(other, tokens, pictures, 2, 0, batch_size=8, itm_head=new_itm_head(other, 0))
    assert both[0] == pytest.approx(plain[0] + math.log(2), abs=0.2), "an untrained head is undecided"


# ---- stages

def snapshot(module): return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before): return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def test_optimise_moves_what_may_move_and_falls():
    line, frozen = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).requires_grad_(False)
    before, x = snapshot(frozen), torch.linspace(-1, 1, 32)[:, None]
    def loss(rows, chance): return (line(x[rows]) + frozen(x[rows]).detach() - 3 * x[rows]).square().mean()
    losses = optimise([line, frozen], loss, 32, steps=150, batch_size=8, lr=0.05, seed=0, name="line")
    assert len(losses) == 150 and losses[-1] < 0.05 * losses[0] and not changed(frozen, before)
    assert not line.training


def test_every_row_is_visited_once_before_any_comes_again():
    seen, parameter = [], torch.nn.Linear(1, 1)
    def loss(rows, chance): seen.extend(rows.tolist()); return parameter.weight.sum()
    optimise([parameter], loss, 12, steps=6, batch_size=4, lr=0.1, seed=0, name="rows")
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12)) and seen[:12] != seen[12:]


def small_run(pictures, folder, seed=0):
    teacher, _, _ = train_teacher(pictures, 2, seed, batch_size=8)
    encoder = new_encoder(seed)
    train_tower(encoder, teacher, pictures, 2, seed, batch_size=8)
    head = new_itm_head(encoder, seed)
    train_qformer(encoder, encode_pictures(encoder, pictures), pictures, 3, seed, batch_size=8, itm_head=head)
    return save_encoder(encoder, folder, head)


def test_one_seed_gives_one_model_to_the_byte_and_leaves_global_chance_alone(pictures, tmp_path):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = small_run(pictures, tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = small_run(pictures, tmp_path / "b"), small_run(pictures, tmp_path / "c", seed=1)
    weights = lambda folder: (folder / "model.safetensors").read_bytes()
    assert weights(first) == weights(second) != weights(other)


def test_stages_keep_to_their_weights(pictures):
    teacher, _, _ = train_teacher(pictures, 1, 0, batch_size=8)
    encoder = new_encoder(0)
    before, kept = snapshot(encoder), snapshot(teacher)
    train_tower(encoder, teacher, pictures, 2, 0, batch_size=8)
    moved = changed(encoder, before)
    assert moved and all(name.startswith(("vision_tower", "ln_vision")) for name in moved) and not changed(teacher, kept)
    assert not any(parameter.requires_grad for parameter in encoder.vision_tower.parameters())
    before, mark = snapshot(encoder), encoder.tower_fingerprint()
    train_qformer(encoder, encode_pictures(encoder, pictures), pictures, 2, 0, batch_size=8)
    moved = changed(encoder, before)
    assert {name.split(".")[0] for name in moved} >= {"query_tokens", "qformer", "embeddings", "ln_vision"}
    assert not any(name.startswith("vision_tower") for name in moved) and encoder.tower_fingerprint() == mark
    assert not encoder.training


@torch.no_grad()
def test_the_library_reads_what_we_save(pictures, tmp_path):
    encoder = new_encoder(3)
    encoder.temperature = 0.0421
    folder = save_encoder(encoder, tmp_path / "saved")
    theirs = Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
    pixels, (ids, mask) = normalised(pictures.pixels[:3]), encoder.tokenize(["a red dress", "is longer", "zebra"])
    encoder.eval()
    ours = torch.einsum("itd,jd->itj", encoder.encode_target(encoder.image_tokens(pixels)), encoder.encode_text(ids, mask)).amax(1)
    torch.testing.assert_close(theirs(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits_per_image, ours)
    head = new_itm_head(encoder, 5)
    theirs = Blip2ForImageTextRetrieval.from_pretrained(save_encoder(encoder, tmp_path / "with head", head)).eval()
    asked = dict(pixel_values=pixels, input_ids=ids, attention_mask=mask, use_image_text_matching_head=True)
    torch.testing.assert_close(theirs(**asked).logits_per_image, itm_logits(encoder, head, encoder.image_tokens(pixels), ids, mask))
    again = load_encoder(str(folder), device="cpu")
    assert again.temperature == pytest.approx(0.0421) and again.tokenizer.get_vocab() == encoder.tokenizer.get_vocab()


def test_what_is_saved_is_an_encoder_and_no_run(pictures, tmp_path):
    "Both lie in runs/ with a config.json and weights. The encoder's states its type, and neither method nor data set."
    folder = save_encoder(new_encoder(0), tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "blip-2" and not {"method", "dataset", "form", "epochs"} & set(config)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert encoder_size(str(folder)) == "small"


def test_a_model_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    folder = save_encoder(new_encoder(0), tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(source, place):
        Path(place).write_bytes(b"half")
        raise OSError("no space left")
    monkeypatch.setattr("dqe_cir.encoder.pretraining.shutil.copyfile", full)
    with pytest.raises(OSError, match="no space left"): save_encoder(new_encoder(1), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---- vocabulary

def test_no_word_of_the_garments_is_spelled_out():
    tokenizer = make_tokenizer()
    phrases = [re.sub(r"\{\w*\}", "", phrase) for phrase in caption_corpus()]
    pieces = {piece for phrase in phrases for piece in tokenizer.tokenize(phrase)}
    assert tokenizer.unk_token not in pieces and not [piece for piece in pieces if piece.startswith("##")]


@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
def test_typed_text_has_no_unknown_piece(text):
    assert make_tokenizer().unk_token not in make_tokenizer().tokenize(text)


# ---- what ships

RECORD = MINI.resolve().parents[2] / "data" / "results" / "pretrain.json"


@pytest.fixture(scope="module")
def record(): return json.loads(RECORD.read_text())


def test_recorded_figures_reach_the_goals(record):
    "Goals on unseen pictures: grid probe .95 on every attribute, mean-token probe and retrieval .90 on the neckline."
    figures = record["figures"]
    assert all(figures["grid probe"][name] >= 0.95 for name in ATTRIBUTES)
    assert figures["mean probe"]["neckline"] >= 0.9 and figures["retrieval agreement"]["neckline"] >= 0.9


def test_recorded_run_took_at_most_twenty_minutes(record):
    "Of the record, not of this machine: what `make pretrain` promises has to be shown once."
    assert sum(record["seconds"].values()) <= 1200


def test_the_card_repeats_the_record(record):
    "Each row of the model card's table is a row of the record, in percent with one decimal."
    rows = dict(re.findall(r"^\| (grid probe|mean probe|retrieval agreement) \|(.+)\|$", (MINI / "README.md").read_text(), re.M))
    for test, figures in record["figures"].items():
        assert [cell.strip() for cell in rows[test].split("|")] == [f"{100 * figures[name]:.1f}" for name in QUESTIONS]


@torch.no_grad()
def test_the_shipped_model_finds_what_is_described(record):
    "A plain recount on 400 pictures of its own: the record must not come from another file than the one that ships."
    rng, encoder = np.random.default_rng(20_000), load_encoder("mini", device="cpu")
    garments = [Garment(*(values[rng.integers(len(values))] for values in (CATEGORIES, *ATTRIBUTES.values()))) for _ in range(400)]
    pixels = torch.from_numpy(np.stack([np.asarray(draw_garment(garment, rng)) for garment in garments])).permute(0, 3, 1, 2)
    gallery = encoder.encode_target(encoder.image_tokens(normalised(pixels)))
    queries = encoder.encode_text(*encoder.tokenize([caption_of(garment, rng) for garment in garments]))
    found = [garments[max(range(400), key=scores.__getitem__)] for scores in torch.einsum("qd,ntd->qnt", queries, gallery).amax(-1).tolist()]
    for name, share in record["figures"]["retrieval agreement"].items():
        agreement = np.mean([getattr(one, name) == getattr(other, name) for one, other in zip(found, garments)])
        assert agreement == pytest.approx(share, abs=0.06), name


SCENES, SCENES_RECORD = MINI.parent / "mini-scenes", RECORD.with_name("pretrain_scenes.json")


@pytest.fixture(scope="module")
def of_scenes():
    return json.loads(SCENES_RECORD.read_text())


def test_the_card_of_the_scenes_repeats_its_record(of_scenes):
    "A row for each of the fourteen questions, a column for each test; sizes and seconds in the text."
    card, figures = (SCENES / "README.md").read_text(), of_scenes["figures"]
    rows = dict(re.findall(r"^\| (\w+) \| ([\d. |]+) \|$", card, re.M))
    assert rows == {name: " | ".join(f"{100 * part[name]:.1f}" for part in figures.values()) for name in figures["grid probe"]}
    assert f"| question | {' | '.join(figures)} |" in card and f"are {of_scenes['megabytes']} MB" in card
    told = "{drawing} s for drawing, {teacher} s for the teacher, {tower} s for the tower and {Q-Former} s for the Q-Former: ".format(**of_scenes["seconds"])
    assert f"{told}{sum(of_scenes['seconds'].values()):,} s" in card and of_scenes["command"] in card.replace("\\\n  ", "")
    for stage in ("teacher", "tower", "qformer"): assert f"({CURRICULA['scenes'].schedule[f'{stage}_steps']:,} steps" in card


def test_the_grid_of_the_scenes_encoder_reaches_its_goal(of_scenes):
    "Kinds and colours of every group, on unseen scenes: at least 90 %."
    probe = of_scenes["figures"]["grid probe"]
    assert all(probe[f"{group}{part}"] >= 0.9 for group in ("dish", "thing", "toy") for part in ("", "_colour"))


@pytest.mark.parametrize("folder", [MINI, SCENES], ids=lambda folder: folder.name)
def test_the_card_of_an_encoder_that_ships_states_its_licence_and_its_sizes(folder):
    from huggingface_hub import ModelCard
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and f'`load_encoder("{folder.name}")`' in card.text
    config = json.loads((folder / "config.json").read_text())
    vision, qformer = config["vision_config"], config["qformer_config"]
    assert f"{vision['num_hidden_layers']} layers of width {vision['hidden_size']}, {vision['image_size']} x {vision['image_size']} pixels in patches of {vision['patch_size']}" in card.text
    assert f"{qformer['num_hidden_layers']} layers of width {qformer['hidden_size']}, {qformer['num_attention_heads']} heads" in card.text
    size = (folder / "model.safetensors").stat().st_size
    assert size <= 8_000_000 and f"{size / 1e6:.2f} MB" in card.text
