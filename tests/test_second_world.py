"""A second drawn world, a toy of two squares in CIRR's layout, walks through every runner: whoever asks for another world by its name is found out here."""
import ast
import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image, ImageDraw

from helpers import ROOT, data_in

from dqe_cir.data import CIRDataset, DatasetSpec, DrawnWorld, load_cirr, load_dataset, uneven_targets
from dqe_cir.data.base import SIZES
from dqe_cir.data.cirr import CIRR
from dqe_cir.data.datasets import SPECS
from dqe_cir.evaluator.protocols import PROTOCOLS, Protocol
from dqe_cir.retriever import Retriever, Session
from dqe_cir.retriever.drawn import drawn_at_once, world_of
from dqe_cir.retriever.session import open_gallery
from dqe_cir.retriever.share import export
from dqe_cir.studies.ablation import StudyConfig
from dqe_cir.studies.tables import conditions_table, read_runs, status_table, systems_table, read_figures, to_run
from dqe_cir.trainer import smoke_run, train_config

COLOURS, GROUNDS, SIDES = ("red", "green", "blue", "yellow", "black"), ("white", "grey"), ("left", "right")
REQUEST = re.compile(r"(left|right) one is (\w+)")
SPLITS = {"train": "train", "dev": "train", "val": "dev"}  # split to the pictures that it searches
EVERY = [*itertools.product(COLOURS, COLOURS, GROUNDS)]


def root_name(size):
    return f"squares-{size}-00000001"


def contents(size):
    "Every picture by id: the colours of both squares and of the ground."
    return {f"{kind}-{i}-0-img0": shown for kind in ("train", "dev") for i, shown in enumerate(EVERY)}


def draw(name, shown, path):
    picture = Image.new("RGB", (64, 64), shown[2])
    for x, colour in zip((6, 36), shown): ImageDraw.Draw(picture).rectangle((x, 20, x + 22, 44), fill=colour)
    picture.save(path, "PNG")


def place(root, name):
    return root / "cirr" / "img_raw" / name.split("-")[0] / f"{name}.png"


def read(text):
    "Side to colour of a request; None where not all of it is understood."
    asked = dict(REQUEST.findall(text))
    rest = REQUEST.sub("", text.lower()).replace("and", "").replace("the", "").replace(",", "").strip(" .")
    return asked if asked and not rest and set(asked.values()) <= set(COLOURS) else None


def right(asked, reference, shown):
    "The ids that show what is asked for, and of the other square what the reference shows; the ground is free."
    wanted = [asked.get(side, colour) for side, colour in zip(SIDES, shown[reference])]
    return sorted(name for name, found in shown.items() if name != reference and [*found[:2]] == wanted)


def answers(dataset, reference, text, names):
    about, asked = dataset.attributes, read(text)
    if asked is None or reference not in about: return None
    shown = {name: tuple(about[name].values()) for name in {reference, *names}}
    return set(right(asked, reference, shown)) & set(names)


def rows(split, size):
    "Rows of a caption file with what each asks for and what answers it."
    shown = {name: found for name, found in contents(size).items() if name.startswith(SPLITS[split])}
    ids = list(shown)
    for number, reference in enumerate(ids[::2] if split == "train" else ids[1::4]):
        side = SIDES[number % 2]
        colour = COLOURS[(COLOURS.index(shown[reference][SIDES.index(side)]) + 1 + number % 4) % 5]
        found = right({side: colour}, reference, shown)
        target = found[number % len(found)]
        others = [name for name in ids if name not in (reference, target)][number % 7::7][:4]
        group = [reference, target, *others]
        yield dict(pairid=number, reference=reference, target_hard=target, target_soft={target: 1.0},
                   caption=f"the {side} one is {colour}", img_set=dict(id=number, members=group)), {side: [colour]}, found


def write_texts(folder, size):
    truth = dict(images={name: dict(zip((*SIDES, "ground"), shown)) for name, shown in contents(size).items()}, asked={}, right={})
    for split, kind in SPLITS.items():
        told, asked, found = zip(*rows(split, size))
        truth["asked"][split], truth["right"][split] = asked, found
        paths = {name: f"./{kind}/{name}.png" for name in contents(size) if name.startswith(kind)}
        for part, content in {f"captions/cap.rc2.{split}.json": told, f"image_splits/split.rc2.{split}.json": paths}.items():
            path = folder / "cirr" / part
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
    (folder / "squares.json").write_text(json.dumps(truth))


def make(folder=None, size="full"):
    root = (folder or Path(os.environ["DQE_CIR_DATA"])) / root_name(size)
    if root.exists(): return root
    write_texts(root, size)
    for name, shown in contents(size).items():
        place(root, name).parent.mkdir(parents=True, exist_ok=True)
        draw(name, shown, place(root, name))
    return root


def load(root, split) -> CIRDataset:
    root = Path(root)
    dataset, truth = load_cirr(root / "cirr", split), json.loads((root / "squares.json").read_text())
    ids = [t.pair_id for t in dataset.triplets]
    relevant = dict(zip(ids, map(frozenset, truth["right"][split])))
    if split != "train": dataset.triplets = [dataclasses.replace(t, positives=relevant[t.pair_id]) for t in dataset.triplets]
    return dataclasses.replace(dataset, name="squares", title="squares", data="squares", attributes=truth["images"],
                               relevant=relevant, mentions=dict(zip(ids, truth["asked"][split])))


WORLD = DrawnWorld(make=make, root=root_name, write_texts=write_texts, contents=contents, draw=draw, place=place, answers=answers,
                   phrases=lambda: [f"the {side} one is {colour}" for side in SIDES for colour in COLOURS],
                   examples=("the left one is red", "the right one is black"), values=dict.fromkeys(SIDES, COLOURS), excluding=SIDES)
SQUARES = DatasetSpec("squares", "squares", get="draw it again", load=load, folder="img_raw", drawn=WORLD, reference_ranked=False,
                      galleries={"original": "all squares of the split"}, subsets=True, mean=("R@5", "Rs@1"), measure="mAP",
                      held_out=("val", "dev"), select_on="last", training=CIRR.training, zone_bounds=CIRR.zone_bounds)


@pytest.fixture(scope="module")
def place_of_all(tmp_path_factory):
    "A folder for everything, with the second world among the data sets."
    folder = tmp_path_factory.mktemp("squares")
    with data_in(folder / "data"), pytest.MonkeyPatch.context() as patch:
        (folder / "data").mkdir()
        patch.setitem(SPECS, "squares", SQUARES)
        patch.setitem(PROTOCOLS, "squares", Protocol("squares", exclude_reference=True))
        patch.delenv("IN_TEST", raising=False)
        yield folder


@pytest.fixture(scope="module")
def run(place_of_all):
    "A run of dqe_cir on the squares, by the runner."
    told = walk("train", dataset="squares", size="smoke", epochs=2, batch_size=16, warmup_epochs=1, readings="mined", run_dir=place_of_all / "run")
    assert "squares" in told
    return place_of_all / "run"


def shown(value):
    "What a notebook would show of a value, as text."
    for form in ("_repr_markdown_", "_repr_html_", "to_json"):
        if hasattr(value, form) and not isinstance(value, type): return str(getattr(value, form)())
    return "" if value is None else repr(value)


def walk(runner, **parameters):
    "Execute the cells of a runner in this process with parameters in place of its own; returns all that it shows."
    cells = json.loads((ROOT / "nbs" / f"{runner}.ipynb").read_text())["cells"]
    first, *others = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    told = io.StringIO()
    show = lambda *values: told.write("\n".join(map(shown, values)))
    space = {"display": show}
    with contextlib.redirect_stdout(told), mock.patch("IPython.display.display", show):
        exec(first, space)
        own = {name for name in space if not name.startswith("__")}
        assert parameters.keys() <= own, f"{runner} has no {parameters.keys() - own}"
        space |= {name: str(value) if isinstance(value, os.PathLike) else value for name, value in parameters.items()}
        for source in others: told.write(f"\n{shown(run_cell(source, space))}\n")
    clean(told.getvalue(), runner)
    return told.getvalue()


def run_cell(source, space):
    "Execute a cell; the value of its last line, if that is an expression."
    tree = ast.parse(re.sub(r"^#\|.*$", "", source, flags=re.M))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), space)
    silent = source.rstrip().endswith(";")
    return eval(compile(ast.Expression(last.value), "cell", "eval"), space) if last and not silent else None


def clean(text, where):
    "No word of another world."
    found = re.search(r".{0,60}(garment|dress|shirt|toptee|sleeve).{0,60}", text, re.I)
    assert not found, f"{where} speaks of another world: {found[0]!r}"


def written(folder):
    "All that a folder holds in words."
    for path in sorted(folder.rglob("*.json*")) + sorted(folder.rglob("*.md")): clean(path.read_text(), path.name)


def test_the_world_is_drawn_whole_or_at_once_and_both_are_the_same(place_of_all, tmp_path):
    lazy, whole = drawn_at_once("squares", "val", "full"), load(make(tmp_path, "full"), "val")
    assert lazy.triplets == whole.triplets and lazy.relevant == whole.relevant
    name = lazy.triplets[0].target
    assert lazy.files[name].read_bytes() == whole.files[name].read_bytes()
    assert all(world_of(spec.drawn.root(size))[0] is spec.drawn for spec in SPECS.values() if spec.drawn for size in SIZES)


def test_a_run_and_its_record(run):
    record = json.loads((run / "results.json").read_text())
    assert (record["dataset"], record["data"], record["title"]) == ("squares", "squares", "squares")
    assert {"mAP", "R@10", "Rs@1", "top-1 valid", "mean"} <= record["metrics"].keys()
    assert not [name for name in record["metrics"] if "colour" in name or "held-out" in name]
    written(run)


def test_evaluation_and_tables(run):
    told = walk("evaluate", run_dir=run, device="cpu")
    assert "dqe_cir trained on squares, squares val (squares benchmark)" in told
    runs, left_out = read_runs(run)
    found = conditions_table(runs).data
    assert "squares val, encoder mini" in found and "squares benchmark" in found and "Rs@1" in found and not left_out.get("results.json")
    clean(found, "the table of conditions")
    assert "| squares | 0 | – | – | – | 1 | " in status_table(read_figures(), runs).data
    assert "squares mAP" in systems_table(read_figures(), runs).data
    assert "-p dataset squares" in to_run("sprc", "squares")["command"]


def test_inspection_of_two_runs(run, place_of_all):
    other = smoke_run(dataset="squares", method="info_nce", readings="none", epochs=1)
    told = walk("inspect_run", run_dir=run, other=other, device="cpu")
    assert "left asked for" in told and "right kept" in told and "Value expected (down)" in told


def test_a_session_with_marks(run):
    retriever = Retriever.load(run, device="cpu")
    session, told = open_gallery(retriever, "squares", "smoke")
    assert told.startswith("squares: 50 pictures") and len(retriever) == 50
    own = session.examples(3)[0]
    session.choose(own.reference)
    step = session.search(own.captions[0])
    assert len(step.marks) == 10 and set(step.marks) <= {"target", "valid", "miss"} and not step.unheard
    assert len(step.subset) == 5 and step.subset_marks.count("target") == 1, "its own group, less the reference"
    typed = session.search("the left one is red, and the right one is blue")
    wanted = right({"left": "red", "right": "blue"}, own.reference, {n: tuple(a.values()) for n, a in session.dataset.attributes.items() if n in retriever.files})
    assert [mark == "valid" for mark in typed.marks] == [result.id in wanted for result in typed.results]
    assert session.search("the left one is mauve").marks == [] and "mauve" in session.step.unheard
    assert retriever.taught_picture(retriever.lessons.taught[0][0]).size == (64, 64)
    assert walk("search", model=run, gallery="squares", size="smoke", interactive="no")


def test_an_export_opens_with_its_index(run, place_of_all):
    folder = export(run, place_of_all / "exported")
    written(folder)
    again = Retriever.load(folder, device="cpu")
    assert again.drawn and len(again) == 50 and again.trained_on == "squares"
    assert "squares, drawn by this repository" in (folder / "README.md").read_text()
    assert Session(again, drawn_at_once("squares", "val", "smoke")).examples(1)
    went_on = smoke_run(dataset="squares", start_from=str(folder), method="dqe_cir", epochs=2, warmup_epochs=1, readings="mined")
    assert json.loads((went_on / "config.json").read_text())["came_from"]["dataset"] == "squares"


def test_one_condition_and_a_leaderboard(place_of_all):
    small = dict(dataset="squares", size="smoke", epochs=2, batch_size=16, warmup_epochs=1, workers=1, device="cpu")
    study = place_of_all / "study"
    told = walk("ablate", conditions="info_nce,plain_batches", seeds="0,1", study=study, sheet=study / "sheet.jpg", pair="info_nce,plain_batches", **small)
    record = json.loads((study / "records.json").read_text())
    assert record["data"] == "squares" and "confused" in record["runs"][0]["metrics"] and "squares val" in told
    written(study)
    board = place_of_all / "board"
    told = walk("leaderboard", conditions="info_nce,clip4cir", boards="common", seeds="0", factors="1", study=board, **small)
    assert "squares val, mAP" in told and "info_nce" in told
    written(board)


def test_what_the_world_does_not_have_is_refused_in_one_line(place_of_all):
    for wish, said in {"readings": ("hand", "nobody has written word lists for squares"),
                       "attribute_negatives": ("own", "labels of all images, which squares has not")}.items():
        with pytest.raises(ValueError, match=said[1]) as problem: train_config(dict(dataset="squares", recipe="paper", **{wish: said[0]}))
        assert "\n" not in str(problem.value)
    assert "hand_lists" not in StudyConfig(dataset="squares").named
    assert (smoke_run(dataset="squares", readings="paper", epochs=1, warmup_epochs=0) / "model.safetensors").exists()


def test_annotators_of_any_world_may_be_uneven(place_of_all):
    train = load_dataset("squares", split="train", size="smoke")
    uneven = uneven_targets(train)
    assert all(t.target in train.relevant[t.pair_id] for t in uneven.triplets)
    assert train_config(dict(dataset="squares", annotators="uneven")).annotators == "uneven"


def test_a_run_of_seconds_reads_the_folder_that_it_is_given(place_of_all, tmp_path):
    root = make(tmp_path, "full")
    run = smoke_run(dataset="squares", data_root=str(root), method="info_nce", readings="none", epochs=1)
    assert json.loads((run / "config.json").read_text())["data_root"] == str(root)
    with pytest.raises(ValueError, match="squares.json|is missing"):
        smoke_run(dataset="squares", data_root=str(tmp_path / "nowhere"), method="info_nce", readings="none", epochs=1)
