"The recipes of CONTRIBUTING.md, followed to the letter in a copy of this repository: every block is written, every command is run."
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from helpers import ROOT, private_environment

GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
_, *HEADED = re.split(r"^### An? (.+)$", GUIDE[GUIDE.index("## Recipes"):GUIDE.index("## Versions")], flags=re.M)
RECIPES = dict(zip(HEADED[::2], HEADED[1::2]))
COPIED = ("nbs", "dqe_cir", "tests", "settings.ini", "pyproject.toml", "setup.py", "pytest.ini")


def blocks(recipe):
    "(language, place, text) of each fenced block; what is to be done with one depends on its language."
    return re.findall(r"^```(\w+) ?(\S*)\n(.*?)\n```$", RECIPES[recipe], re.M | re.S)


def commands(recipe): return [line for language, _, text in blocks(recipe) if language == "sh" for line in text.splitlines()]


# ---- what a reader does with a block

def add_cell(path, kind, text):
    "A new cell at the end of a notebook, which is made if it is not there; new lines at the end of a file of tests."
    if path.suffix == ".py":
        path.write_text(f"{path.read_text()}\n\n{text}\n")
        return
    new = nbformat.v4.new_notebook(metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}})
    notebook = nbformat.read(path, 4) if path.exists() else new
    if not path.exists(): notebook.cells = [nbformat.v4.new_code_cell(f"#| default_exp {path.parent.name}.{path.stem[3:]}")]
    make = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
    notebook.cells.append(make(text, id=uuid.uuid4().hex[:8]))
    nbformat.write(notebook, path)


def changed(source, edit):
    "The text after a diff block, or None if it does not hold once what the block says is there. The block's last line may be a line's beginning."
    old = "\n".join(line[1:] for line in edit.splitlines() if line[0] in " -")
    new = "\n".join(line[1:] for line in edit.splitlines() if line[0] in " +")
    return source.replace(old, new) if source.count(old) == 1 else None


def edit(path, text):
    "A diff block applied to the one cell, or the file, that holds its lines."
    if path.suffix == ".py":
        path.write_text(changed(path.read_text(), text))
        return
    notebook = nbformat.read(path, 4)
    fits = [cell for cell in notebook.cells if changed(cell.source, text)]
    assert len(fits) == 1, f"{len(fits)} cells of {path.name} hold the lines that are to be changed:\n{text}"
    fits[0].source = changed(fits[0].source, text)
    nbformat.write(notebook, path)


def follow(folder, recipe):
    for language, place, text in blocks(recipe):
        if language == "diff": edit(folder / place, text)
        elif language in ("python", "markdown"): add_cell(folder / place, language, text)
        else: assert language == "sh", f"a {language} block: nobody knows what to do with it"


# ---- the copy

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A function that runs a command line in a copy of the repository in which every recipe was followed."
    folder = tmp_path_factory.mktemp("recipes") / "copy"
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "golden")
    for name in COPIED:
        if (ROOT / name).is_dir(): shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else: shutil.copy(ROOT / name, folder)
    for path in ("runs", "tests/golden"): (folder / path).mkdir()
    shutil.copy(ROOT / "tests/golden/losses.json", folder / "tests/golden")
    shoes(folder / "data" / "shoes")
    for recipe in RECIPES: follow(folder, recipe)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = private_environment(folder.parent, PYTHONPATH=str(folder), OMP_NUM_THREADS="1", PATH=path, DQE_CIR_DATA=str(folder / "data"))
    def run(command):
        done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout
    run.folder = folder
    run("nbdev_export")
    return run


def shoes(folder):
    "Twelve pictures of one colour each, and a request from each to the next."
    (folder / "images").mkdir(parents=True)
    for i in range(12): Image.new("RGB", (32, 32), (20 * i, 255 - 20 * i, 128)).save(folder / "images" / f"shoe{i}.png")
    rows = [{"reference": f"shoe{i}", "target": f"shoe{(i + 1) % 12}", "text": f"is number {i + 1}"} for i in range(12)]
    for split in ("train", "val"): (folder / f"{split}.json").write_text(json.dumps(rows * (1 + (split == "train"))))


def record(run, name):
    "results.json of the run that the notebook of this name made."
    shown = (run.folder / "runs" / f"{name}.ipynb").read_text()
    return json.loads((run.folder / "runs" / re.search(r"run folder': '([^']+)'", shown)[1] / "results.json").read_text())


# ---- the recipes

def test_the_recipes_are_those_that_are_followed():
    assert list(RECIPES) == ["loss", "method", "sampler", "data set", "attribute"]
    for recipe in RECIPES: assert commands(recipe), f"the recipe of a {recipe} ends in no command"


def test_the_new_pages_and_the_changed_ones_run(run):
    "But for those of the attribute, which speak of two attributes: its recipe says so."
    places = {recipe: {place for _, place, _ in blocks(recipe) if place.startswith("nbs/")} for recipe in RECIPES}
    pages = set().union(*places.values()) - places["attribute"] - {"nbs/train.ipynb"}
    names = "|".join(re.escape(Path(path).name) for path in sorted(pages))
    told = run(f"nbdev_test --n_workers 0 --do_print --file_re '{names}'")
    assert told.count("- Completed ") == len(pages)


def test_the_new_modules_lie_where_the_layout_wants_them(run):
    run("pytest -q tests/test_layout.py")


def test_a_loss(run):
    for command in commands("loss"): assert "1 passed" in run(command)


def test_a_method_trains_and_is_chosen_by_its_name(run):
    papermill, first_steps, tests = commands("method")
    run(papermill)
    assert record(run, "arithmetic")["method"] == "arithmetic"
    assert "losses.json written: 1 of " in run(first_steps)
    assert " passed" in run(tests)


def test_a_sampler_is_chosen_by_its_name(run):
    for command in commands("sampler"): run(command)
    config = max((run.folder / "runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    assert json.loads(config.read_text())["negatives"] == "semi_hard"


def test_a_data_set_is_verified_and_trained_on(run):
    verify, papermill = commands("data set")
    assert "all 24 triplets and 12 images" in run(verify)
    run(papermill)
    found = record(run, "shoes")
    assert (found["dataset"], found["data"]) == ("shoes", "real") and set(found["metrics"]) >= {"R@1", "R@10"}


def test_an_attribute(run):
    for command in commands("attribute"): run(command)


# ---- the map

def test_the_map_names_every_page():
    drawn = GUIDE[GUIDE.index("## How the house is laid out"):GUIDE.index("## House rules")].split("```")[1]
    lines = [line.replace("|", " ").split() for line in drawn.splitlines()]
    names = {word for line in lines for word in line}
    for page in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in page.parts or page.name.startswith("_"): continue
        folder = page.parent.name if page.parent != ROOT / "nbs" else "nbs/"
        name = page.stem if folder == "nbs/" else page.stem[3:]
        assert name in names and folder in names, f"{page.relative_to(ROOT)} is not on the map of CONTRIBUTING.md"
    pages = {page.stem for page in (ROOT / "nbs").rglob("*.ipynb")}
    known = pages | {stem[3:] for stem in pages} | {folder.name for folder in (ROOT / "nbs").rglob("*") if folder.is_dir()} | {"nbs/"}
    assert names - known == set("tensors in, tensors out: what the paper is about".split())
