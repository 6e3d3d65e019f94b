"House rules that no single notebook can check: clean notebooks, modules in step, pins that agree. Imports: test_layout.py."
import ast
import configparser
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import ROOT, papermill, private_environment

RUNNER_NAMES = ("train", "evaluate", "pretrain", "ablate", "search", "leaderboard", "inspect_run")
PAGE_NAMES = ("evidence", "worlds", "results", "own_data")  # pages that export nothing
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in path.parts and not path.name.startswith("_"))
RUNNERS = [path for path in NOTEBOOKS if path.stem in RUNNER_NAMES]
LIBRARY = [path for path in NOTEBOOKS if path not in RUNNERS]


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT / "nbs")))


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def exported(cell):
    return re.search(r"^#\s*\|\s*exporti?\b", cell.source, re.M)


# ---- notebooks

def test_there_are_notebooks():
    assert LIBRARY and all(re.match(r"\d\d_|tutorial_", path.name) or path.stem in PAGE_NAMES for path in LIBRARY)


@each(NOTEBOOKS)
def test_notebook_is_clean(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.nbformat_minor >= 5, "cells need ids"
    assert "widgets" not in notebook.metadata, "execute with --ExecutePreprocessor.store_widget_state=False"
    assert set(notebook.metadata) == {"kernelspec"} and notebook.metadata.kernelspec.name == "python3"
    for cell in code_cells(path):
        assert cell.execution_count is None, cell.source
        assert not [output for output in cell.outputs if output.output_type == "error"], cell.source
        assert "nbdev_export(" not in cell.source, "papermill would run it"


@each(NOTEBOOKS)
def test_notebook_is_small(path):
    assert path.stat().st_size <= 300_000
    for cell in code_cells(path):
        for output in cell.outputs:
            assert len(json.dumps(output)) <= 100_000, cell.source


@each(LIBRARY)
def test_library_notebook_reads_as_a_page(path):
    "A title with its subtitle, outputs kept, exported cells short."
    cells = nbformat.read(path, 4).cells
    title = next(cell.source for cell in cells if cell.cell_type == "markdown")
    assert re.match(r"# .+\n+> .+", title)
    assert any(cell.outputs for cell in code_cells(path)), "execute it: the outputs are part of the page"
    lengths = [sum(1 for line in cell.source.splitlines() if line.strip() and not line.startswith("#|"))
               for cell in code_cells(path) if exported(cell)]
    assert max(lengths, default=0) <= 40
    assert statistics.median(lengths or [0]) <= 10


@each(NOTEBOOKS)
def test_code_fits_the_page(path):
    "JupyterLab shows some 115 characters of a line at 1280 pixels; the rest is cut."
    wide = [line for cell in code_cells(path) for line in cell.source.splitlines() if len(line) > 110]
    assert not wide, f"{len(wide)} lines over 110 characters, such as: {wide[0]}"


# ---- runners

def parameters_position(cells):
    tagged = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, "papermill needs exactly one cell tagged 'parameters'"
    return tagged[0]


@each(RUNNERS)
def test_runner_is_stripped_and_exports_nothing(path):
    cells = code_cells(path)
    parameters_position(cells)
    for cell in cells:
        assert not cell.outputs, "a runner is committed without outputs; what counts is the run's record"
        assert not exported(cell) and "default_exp" not in cell.source


@each(RUNNERS)
def test_known_parameters_arrive_and_unknown_ones_stop_the_run(path, tmp_path):
    "The parameters cell, an echo, and the runner's next cell: -p wins over the default there, and a wrong name is refused."
    notebook = nbformat.read(path, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    parameters, guard = cells[parameters_position(cells):][:2]
    name = ast.parse(parameters.source).body[0]
    name = (name.target if isinstance(name, ast.AnnAssign) else name.targets[0]).id
    notebook.cells = [parameters, nbformat.v4.new_code_cell(f"print({name})"), guard]
    nbformat.write(notebook, tmp_path / "start.ipynb")
    done = papermill(tmp_path / "start.ipynb", tmp_path / "executed.ipynb", (name, "arrived"), ("no_such_parameter", "1"), cwd=tmp_path)
    *_, echo, refused = code_cells(tmp_path / "executed.ipynb")
    assert echo.outputs[0].text == "arrived\n"
    assert done.returncode != 0 and "no_such_parameter" in refused.outputs[-1].evalue


# ---- modules

def test_export_and_clean_change_nothing(tmp_path):
    "In a copy: modules made anew from the notebooks equal the committed ones, and cleaning finds nothing to clean."
    copy = tmp_path / "copy"
    for name in ("nbs", "dqe_cir"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "assets"))
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, copy)
    for module in copy.rglob("*.py"):
        if "AUTOGENERATED" in module.read_text(): module.unlink()
    command = "import nbdev.doclinks, nbdev.clean; nbdev.doclinks.nbdev_export(); nbdev.clean.nbdev_clean()"
    subprocess.run([sys.executable, "-c", command], cwd=copy, env=private_environment(tmp_path), check=True)
    made = {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.suffix in (".py", ".ipynb", ".toml")}
    committed = {path: (ROOT / path).read_bytes() if (ROOT / path).exists() else None for path in made}
    assert not [str(path) for path in made if made[path] != committed[path]], "run nbdev_export and nbdev_clean"
    modules = {path.relative_to(ROOT) for path in (ROOT / "dqe_cir").rglob("*.py")}
    assert not modules - set(made), "modules without a notebook"


# ---- requirements

def names_and_specifiers(lines):
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in requirements}


def pins(name):
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return names_and_specifiers(line for line in lines if line)


def settings():
    config = configparser.ConfigParser()
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]


def test_pins_lie_in_the_ranges_of_settings():
    ranges = names_and_specifiers(shlex.split(settings()["requirements"]) + shlex.split(settings()["dev_requirements"]))
    pinned = pins("requirements.txt")
    assert set(pinned) == set(ranges)
    for name, specifier in pinned.items():
        version = re.fullmatch(r"==([\d.]+)", str(specifier))[1]
        assert ranges[name].contains(version), f"{name}=={version} is outside {ranges[name]}"


def test_constraints_repeat_the_pins_and_leave_torch_open():
    constraints, pinned = pins("constraints.txt"), pins("requirements.txt")
    assert {name: constraints[name] for name in pinned if name != "torch"} == {n: s for n, s in pinned.items() if n != "torch"}
    assert not [name for name in constraints if re.match("torch|nvidia|cuda|triton", name)]


def test_environment_equals_requirements_and_settings():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert set(environment) == {"name", "channels", "dependencies"}
    *conda, pip = environment["dependencies"]
    assert conda == [f"python={settings()['min_python']}", "pip"]
    first, *middle, last = pip["pip"]
    assert (first, last) == ("-c constraints.txt", "-e .")
    assert names_and_specifiers(middle) == pins("requirements.txt")


# ---- files

def test_no_file_names_a_machine():
    "Neither folders of somebody's machine nor addresses of package indexes."
    if not (ROOT / ".git").exists(): pytest.skip("not a git checkout: no list of the repository's files")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    machine = re.compile(r"(?<![\w.])/(?:work|root|tmp|farm|home/\w+|Users/\w+|opt/\w+)/"
                         r"|https?://[^\s/]*(?:pypi|pythonhosted|registry|anaconda)|--(?:extra-)?index-url|--find[-]links")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png", ".jpg", ".npz", ".safetensors"):
            found += [f"{name}: {match[0]}" for match in machine.finditer(path.read_text(encoding="utf-8"))]
    assert not found
