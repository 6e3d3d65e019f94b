"The package as others install it: a wheel in an empty environment, used where there is no checkout."
import ast
import configparser
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from helpers import ROOT

SEARCH = """
import importlib.metadata, json

import dqe_cir
from dqe_cir.encoder import load_encoder
from dqe_cir.methods import METHODS
from dqe_cir.retriever import Retriever

pixels = load_encoder("mini", device="cpu").image_tokens
retriever = Retriever.load("garments", device="cpu")
report = retriever.index("pictures")
found = retriever.search("red.png", "is blue", k=2)
print(json.dumps({"file": dqe_cir.__file__, "version": dqe_cir.__version__, "known as": importlib.metadata.version("dqe-cir"),
                  "indexed": len(report.new), "found": [result.id for result in found], "methods": list(METHODS)}))
"""


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def settings():
    config = configparser.ConfigParser()
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]


def tracked(folder=""):
    "The files of the repository that are on disk, by path."
    listed = run("git", "ls-files", "-z", folder or ".", cwd=ROOT).split("\0")
    return [name for name in listed if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    "The Python of a new environment that holds the wheel. What the wheel requires is lent by the environment of the tests."
    if not (ROOT / ".git").exists(): pytest.skip("not a git checkout: no list of the repository's files")
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "copy" / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "copy")
    wheel, = folder.glob("*.whl")
    venv.create(folder / "new", symlinks=True)
    python = folder / "new" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel)
    lent = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}  # only added to the path: an editable install in there is not followed
    (package(python).parent / "lent.pth").write_text("\n".join(lent))
    return python


def package(python):
    "The folder of the installed package."
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return python.parent.parent / "lib" / version / "site-packages" / "dqe_cir"


def contents(folder):
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    "A folder far from the checkout with three pictures, and the surroundings of a user who has set nothing."
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "pictures").mkdir()
    for colour in ("red", "green", "blue"): Image.new("RGB", (64, 64), colour).save(folder / "pictures" / f"{colour}.png")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DQE_CIR", "IN_TEST"))}
    return dict(cwd=folder, env={**kept, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")})


@pytest.fixture(scope="module")
def searched(python, elsewhere):
    "What the search said, and the package's files before it."
    before = contents(package(python))
    return json.loads(run(python, "-c", SEARCH, **elsewhere).splitlines()[-1]), before


def test_the_package_is_the_one_of_the_wheel(python, searched):
    said, _ = searched
    assert Path(said["file"]).parent == package(python)
    assert said["version"] == said["known as"] == settings()["version"]


def test_it_searches_a_folder_of_pictures(searched):
    said, _ = searched
    assert said["indexed"] == 3 and sorted(said["found"]) == ["blue.png", "green.png"] and "dqe_cir" in said["methods"]


def test_nothing_is_written_into_the_package(python, elsewhere, searched):
    "Nor beside the user's pictures."
    assert contents(package(python)) == searched[1]
    assert {path.name for path in elsewhere["cwd"].iterdir()} <= {"pictures", "hub"}
    assert len(list((elsewhere["cwd"] / "pictures").iterdir())) == 3


def test_everything_of_the_package_is_in_the_wheel(python):
    assert set(contents(package(python))) == {name.removeprefix("dqe_cir/") for name in tracked("dqe_cir")}


def test_a_missing_folder_is_named_in_one_line(python, elsewhere):
    command = [str(python), "-m", "dqe_cir.data", "verify", "--dataset", "fashioniq", "--root", "nowhere", "--split", "val"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **elsewhere)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1 and "nowhere" in done.stdout
    assert "Traceback" not in done.stderr


def needed(names):
    "Distributions and all that they need in turn, without extras."
    found, open_names = set(), [canonicalize_name(name) for name in names]
    while open_names:
        name = open_names.pop()
        if name in found: continue
        found.add(name)
        try: lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError: continue  # for another system or Python
        open_names += [canonicalize_name(Requirement(line).name) for line in lines if "extra ==" not in line]
    return found


def test_all_that_is_imported_is_required():
    "At the top of a module, that is: what a function imports may be optional."
    required = needed(Requirement(line).name for line in shlex.split(settings()["requirements"]))
    providers = importlib.metadata.packages_distributions()
    for name in tracked("dqe_cir"):
        if not name.endswith(".py"): continue
        for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in {module.split(".")[0] for module in modules} - {"dqe_cir", *sys.stdlib_module_names}:
                assert {canonicalize_name(provider) for provider in providers.get(module, [])} & required, f"{name} imports {module}: add it to requirements in settings.ini"


def test_one_version_everywhere():
    version = settings()["version"]
    assert f'__version__ = "{version}"' in (ROOT / "dqe_cir" / "__init__.py").read_text()
    newest = re.search(r"^## \[(.+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert newest[1] == citation["version"] == version
    assert newest[2] == str(citation["date-released"])


def test_the_citation_has_what_its_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"] and citation["authors"]
    paper, = citation["references"]
    assert {"type", "title", "authors"} <= set(paper) and paper["identifiers"] == [{"type": "other", "value": "arXiv:2603.04037"}]


def test_the_command_searches(python, elsewhere, tmp_path):
    "`dqe-cir`, with its caches in a folder of their own, so that nothing lies beside the pictures."
    words = ("search", "pictures", "--model", "garments", "--reference", "pictures/red.png", "--text", "is blue", "--json")
    environment = {**elsewhere["env"], "DQE_CIR_DATA": str(tmp_path)}
    found = json.loads(run(python.parent / "dqe-cir", *words, cwd=elsewhere["cwd"], env=environment))
    assert sorted(row["id"] for row in found) == ["blue.png", "green.png"]
    assert (tmp_path / "indexes").is_dir()
