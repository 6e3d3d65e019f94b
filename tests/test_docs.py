"The documentation: built once as a whole, and once from a small checkout with every kind of mistake in it."
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import nbformat
import pytest

from helpers import ROOT

NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts and path.name[0] != "_")
MODULES = sorted(path for path in (ROOT / "dqe_cir").rglob("*.py") if "__all__ = [" in path.read_text(encoding="utf-8"))
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def builder():
    "docs/build.py under a name of its own; the files beside it are found as they are when it runs as a script."
    sys.path.insert(0, str(ROOT / "docs"))
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "docs"))
    return module


build = builder()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the whole site."
    folder = tmp_path_factory.mktemp("docs") / "site"
    build.Site().write(folder)
    return folder


def page_of(site, notebook):
    return site / notebook.relative_to(ROOT).with_suffix(".html")


# ---- the whole site

def test_the_site_is_whole(site):
    "Every relative link leads to a file, and every anchor to an id in it; said again here without the builder's own check."
    texts = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in texts.items()}
    checked = 0
    for path, text in texts.items():
        for link in map(unescape, re.findall(r'\b(?:href|src)="([^"]{1,500})"', text)):
            if urlsplit(link).scheme: continue
            place, anchor = urldefrag(link)
            found = (path.parent / unquote(place)).resolve() if place else path
            assert found.is_file(), f"{path.relative_to(site)}: {link}"
            if anchor and found in anchors: assert unquote(anchor) in anchors[found], f"{path.relative_to(site)}: {link}"
            checked += 1
    assert checked > 50 * len(NOTEBOOKS)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT / "nbs")))
def test_every_notebook_has_a_page(site, notebook):
    "With its title, its headings, its formulas, its pictures, and nothing of its hidden cells."
    page, cells = page_of(site, notebook).read_text(encoding="utf-8"), nbformat.read(notebook, 4).cells
    words = re.sub(r"\W+", " ", unescape(re.sub(r"<[^>]+>", "", page)))
    for line in re.findall(r"^#+ ([^`$\n]+)$", "\n".join(c.source for c in cells if c.cell_type == "markdown"), re.M):
        assert re.sub(r"\W+", " ", line).strip() in words
    assert page.count("<math") >= sum(c.source.count("$$") // 2 for c in cells if c.cell_type == "markdown")
    shown = [c for c in cells if c.cell_type == "code" and not re.search(r"^#\s*\|\s*(hide|default_exp)\b", c.source, re.M)]
    pictures = sum(bool({"image/png", "image/jpeg"} & set(output.get("data", {}))) for c in shown for output in c.outputs)
    assert page.count('src="data:image/') == pictures
    code = re.findall(r'class="(?:library|example)">(.*?)</div>', page, re.S)
    assert len(code) <= len(shown) and not [text for text in code if re.match(r"\s*#\s*\|", unescape(re.sub(r"<[^>]+>", "", text)))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_page_of_a_module_names_its_signatures(site, path):
    "As Python itself sees them after an import, which the builder does without."
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    page, module = (site / "api" / f"{name}.html").read_text(encoding="utf-8"), importlib.import_module(name)
    parts = re.findall(r'<section class="level\d"><h\d id="([\w.]+)">(.*?)</section>', page, re.S)
    plain = {key: unescape(re.sub(r"<[^>]+>", "", text)) for key, text in parts}
    for public in module.__all__:
        thing = getattr(module, public)
        texts = [text for text in plain.values() if f"def {public}(" in text]  # a method stands under its class
        assert texts or public in plain, public
        if inspect.isfunction(thing) and thing.__name__ == public:
            wanted = [rf"\b{parameter}\b" for parameter in inspect.signature(thing).parameters]
            assert any(all(re.search(word, text) for word in wanted) for text in texts), (public, wanted)
        if not inspect.isclass(thing) or thing.__module__ != name: continue
        for key, value in vars(thing).items():
            if not inspect.isfunction(value) or key[0] == "_" or value.__module__ != name: continue
            assert f"{public}.{key}" in plain or key in plain or re.search(rf"\b{key}\b", plain[public]), (public, key)


def test_nothing_is_fetched_and_no_machine_is_named(site):
    for path in site.rglob("*.*"):
        if path.suffix not in (".html", ".css"): continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'(src|<link[^>]+href)="(https?:)?//|@import|url\((?!#)', text), path.name
        assert str(ROOT) not in text and str(site) not in text, path.name


def test_figures_of_the_performance_page_are_those_of_the_records():
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    towers = json.loads((ROOT / "data" / "results" / "full-size.json").read_text())["towers"]
    for name, tower in (("ViT-g", towers["vit_g"]), ("ViT-L", towers["vit_l"])):
        count, seconds = tower["parameters"], tower["seconds"]
        assert (f"| {name} | {count['tower'] / 1e6:.0f} M | {count['trained'] / 1e6:.0f} M | {seconds['training step, batch 2']} s "
                f"| {seconds['tower, 4 images']} s | {tower['peak_memory_GiB']['in all']:.1f} GiB |") in text
    made = json.loads((ROOT / "data" / "results" / "pretrain.json").read_text())
    flat = " ".join(text.split())
    assert "took {teacher} s for the teacher, {tower} s for the tower and {Q-Former} s for the Q-Former after {drawing} s".format(**made["seconds"]) in flat
    assert f"its files take {made['megabytes']:.1f} MB" in flat


def test_make_help_lists_it():
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "make docs" in said and "make wheel" in said


# ---- a small checkout

def notebook(*cells):
    made = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    return nbformat.writes(nbformat.v4.new_notebook(cells=[made[kind](source, **more) for kind, source, more in cells]))


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def display(data): return {"outputs": [nbformat.v4.new_output("display_data", data)]}


@pytest.fixture
def small(tmp_path):
    "A checkout of three notebooks, one of them in a folder that nobody knows."
    write(tmp_path / "checkout", {
        "settings.ini": "[DEFAULT]\nversion = 1.2.3\n",
        "docs/index.md": "# Home\n\n<!-- include ../README.md: Start -->\n\n<!-- reading order -->\n",
        "README.md": "# Other\n\n## Start\n\nSee [the idea](nbs/ideas/01_first.ipynb#a-law), [a table](data/t.csv) and [all ideas](nbs/ideas).\n\n## End\n\nNot here.\n",
        "data/t.csv": "a,b\n",
        "tests/test_x.py": "def test_it_holds(): pass\n",
        "dqe_cir/__init__.py": "", "dqe_cir/first.py": '''"Firsts."
__all__ = ["one", "Two"]
# %% ../nbs/ideas/01_first.ipynb #abcd1234
def one(
    size: int,  # how many
    *, step: float = 1e-3,
) -> "list":
    "As many `Two` as `size`: from 2*size to 3*size, a_b_c < $1."
class Two:
    "A pair."
    left: int = 0  # where
@patch
def swap(self: Two, times=1):
    "The other way round."
def again(self): return 2
Two.again = again
''',
        "dqe_cir/deep/__init__.py": '"A package."\nfrom ..first import one\nfrom pathlib import Path\n',
        "nbs/unknown/00_last.ipynb": notebook(("markdown", "# Last\n\n> It comes last.", {})),
        "nbs/train.ipynb": notebook(("markdown", "# Train\n\n> Run it.\n\nKept by `test_it_holds`.", {})),
        "nbs/ideas/01_first.ipynb": notebook(
            ("markdown", "# First\n\n> One idea,\n> two lines.\n\n## A law\n\nWith $a_i$ from [training](../train.ipynb), `Two.swap` and `one`:\n\n$$\\frac{a}{b}$$", {}),
            ("code", "#| export\nshown = 1", {"id": "abcd1234"}), ("code", "#| hide\nsecret = 1", display({"text/plain": "a secret"})),
            ("code", "figure()", display({"application/vnd.plotly.v1+json": {}, "image/png": PNG})),
            ("code", "bare()", display({"application/vnd.plotly.v1+json": {}})),
            ("code", "bar()", display({"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"})),
            ("code", "2 + 3", {"outputs": [nbformat.v4.new_output("execute_result", {"text/plain": "<5>"})]})),
    })
    return tmp_path / "checkout"


def test_a_small_site(small, tmp_path):
    made = build.Site(small).write(tmp_path / "site")
    assert list(made) == ["index.html", "nbs/train.html", "nbs/ideas/01_first.html", "nbs/unknown/00_last.html", "api/dqe_cir.first.html", "api/dqe_cir.deep.html"]
    home, first, module = made["index.html"], made["nbs/ideas/01_first.html"], made["api/dqe_cir.first.html"]
    for part in ('href="nbs/ideas/01_first.html#a-law"', 'href="files/data/t.csv"', 'href="index.html#nbs/ideas"', "One idea, two lines.", "1.2.3"): assert part in home
    assert "Not here" not in home and (tmp_path / "site" / "files" / "data" / "t.csv").read_text() == "a,b\n"
    for part in ('href="../train.html"', "<mfrac>", "../../api/dqe_cir.first.html#Two.swap", 'id="cell-abcd1234" class="library"', f"base64,{PNG}", "&lt;5&gt;"):
        assert part in first
    assert first.count("drawn when the notebook is run") == 1 and first.count('src="data:image/png') == 1
    assert "secret" not in first and "0%" not in first and "#|" not in first
    assert "tests/test_x.py::<wbr>test_it_holds" in made["nbs/train.html"]
    plain = unescape(re.sub(r"<[^>]+>", "", module))
    for part in ("As many Two as size: from 2*size to 3*size, a_b_c < $1.", "size: int,  # how many", "*, step: float = 1e-3", "left: int = 0  # where", "def swap(self: Two, times=1):", "The other way round.", "def again(self):"):
        assert part in plain
    assert '<a href="dqe_cir.first.html#one"><code>one</code></a>' in made["api/dqe_cir.deep.html"] and "Path" not in made["api/dqe_cir.deep.html"]
    assert 'id="Two.again"' in module and 'id="again"' not in module and "../nbs/ideas/01_first.html#cell-abcd1234" in module


@pytest.mark.parametrize("text, said", [
    ("[a page](gone.ipynb)", "nbs/new.ipynb: the link gone.ipynb leads nowhere"),
    ("[above](../../outside.md)", "nbs/new.ipynb: the link ../../outside.md leads nowhere"),
    ("![a picture](gone.png)", "nbs/new.ipynb: the link gone.png leads nowhere"),
    ("[a part](ideas/01_first.ipynb#no-such-part)", "nbs/new.html: the link ideas/01_first.html#no-such-part leads nowhere"),
    ("[here](#no-such-part)", "nbs/new.html: the link #no-such-part leads nowhere"),
    ("<a href='gone.html'>by hand</a>", "nbs/new.html: the link gone.html leads nowhere"),
    ("Kept by `test_of_nothing`.", "nbs/new.ipynb: there is no test test_of_nothing"),
    (r"$\nosuchsign$", r"nbs/new.ipynb: the formula \nosuchsign cannot be set"),
])
def test_a_link_to_nowhere_ends_the_build(small, tmp_path, text, said):
    write(small, {"nbs/new.ipynb": notebook(("markdown", f"# New\n\n{text}", {}))})
    with pytest.raises(SystemExit) as ended: build.Site(small).write(tmp_path / "site")
    assert ended.value.code.splitlines() == ["the site was not written:", said]
    assert not (tmp_path / "site").exists()


def test_links_of_the_readme_are_checked_where_no_page_includes_them(small, tmp_path):
    write(small, {"README.md": (small / "README.md").read_text() + "[more](nbs/gone.ipynb)\n"})
    with pytest.raises(SystemExit, match="README.md: the link nbs/gone.ipynb leads nowhere"): build.Site(small).write(tmp_path / "site")


def test_a_heading_that_is_gone_ends_the_build(small, tmp_path):
    write(small, {"docs/more.md": "# More\n\n<!-- include ../README.md: Gone -->\n"})
    with pytest.raises(SystemExit, match="docs/more.md: README.md has no heading 'Gone' to include"): build.Site(small).write(tmp_path / "site")


def test_a_folder_of_somebody_else_is_left_alone(small, tmp_path):
    write(tmp_path / "mine", {"letter.txt": "Dear"})
    with pytest.raises(SystemExit, match="is no site made by this script"): build.Site(small).write(tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "Dear"


# ---- a notebook as a page of its own

@pytest.mark.parametrize("name", ["evidence", "results", "studies/02_leaderboard"])
def test_a_notebook_prints_as_it_is_read(name, tmp_path):
    "`jupyter nbconvert --to html` with the settings that the Makefile installs: no empty prompts, nothing that is hidden."
    command = [sys.executable, "-m", "nbconvert", "--to", "html", str(ROOT / "nbs" / f"{name}.ipynb"), "--output-dir", str(tmp_path)]
    settings = ["--config", str(ROOT / "docs" / "jupyter_nbconvert_config.py")]
    subprocess.run([*command, *settings], check=True, capture_output=True, timeout=300)
    page, notebook = next(tmp_path.iterdir()).read_text(encoding="utf-8"), nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    hidden = [cell for cell in code if re.search(r"^#\| (hide|default_exp)\b", cell.source, re.M)]
    assert page.count('<div class="jp-Cell jp-CodeCell') == len(code) - len(hidden)
    assert "In&nbsp;[" not in page and "In [" not in page and "#|" not in page
