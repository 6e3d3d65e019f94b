"The house has one way down: every import of every module goes to a room below, or to an earlier page of its own room."
import ast
import graphlib
import re
import sys

import pytest

from helpers import ROOT

from dqe_cir import _moved

PACKAGE = ROOT / "dqe_cir"
RUNNERS = ("train", "evaluate", "pretrain", "ablate", "search", "leaderboard", "inspect_run")

# Room by room from the ground up: what a room may import. A room is a module or a package directly inside dqe_cir.
ALLOWED = {
    "files": set(),
    "static": set(),
    "core": {"files", "static"},
    "terminal": {"core", "files"},
    "retrieval": set(),
    "metrics": {"retrieval"},
    "losses": set(),
    "attributes": set(),
    "vocabulary": set(),
    "sampler": set(),
    "readings": set(),
    "data": {"files", "core", "terminal"},
    "encoder": {"files", "core", "terminal", "retrieval", "data"},
    "show": {"files", "core", "terminal", "data"},
    "methods": {"files", "core", "retrieval", "losses", "attributes", "vocabulary", "readings", "data", "encoder"},
    "evaluator": {"files", "core", "retrieval", "metrics", "data", "methods", "show"},
    "trainer": {"files", "core", "terminal", "retrieval", "attributes", "vocabulary", "sampler", "data", "encoder", "methods", "evaluator"},
    "studies": {"files", "core", "terminal", "retrieval", "sampler", "data", "encoder", "methods", "evaluator", "trainer", "show", "retriever"},
    "retriever": {"files", "core", "terminal", "retrieval", "attributes", "readings", "data", "encoder", "methods", "evaluator", "trainer", "show"},
}


def dotted(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def own_imports(path):
    "The dqe_cir modules that a file imports anywhere, as dotted names below the package. nbdev writes imports as relative ones."
    package = ("dqe_cir", *path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            found |= {f"{module}.{alias.name}" if is_module(module, alias.name) else module for alias in node.names}
    return {name.removeprefix("dqe_cir.") for name in found if name.startswith("dqe_cir.")}


def is_module(package, name):
    "Does `from package import name` import a module?"
    place = ROOT.joinpath(*package.split(".")) / name
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


MODULES = {dotted(path): own_imports(path) - {dotted(path)} for path in PACKAGE.rglob("*.py")
           if path.name not in ("__init__.py", "__main__.py", "_modidx.py", "_moved.py")}
CONTENTS = {dotted(path): own_imports(path) for path in PACKAGE.rglob("*.py") if path.name in ("__init__.py", "__main__.py")}


def room(module):
    return module.split(".")[0]


def pages():
    "Module name to notebook, read off the generated files."
    for path in PACKAGE.rglob("*.py"):
        source = re.search(r"File to edit: (\S+\.ipynb)", path.read_text())
        if source and path.name != "_modidx.py":
            yield dotted(path), (path.parent / source[1]).resolve()


PAGES = dict(pages())


def test_every_room_is_in_the_table():
    assert {room(module) for module in MODULES} == set(ALLOWED)


def test_the_table_itself_points_one_way():
    "A circle raises. And it allows what somebody needs, no more; `files` and `core` are for everybody."
    assert set(graphlib.TopologicalSorter(ALLOWED).static_order()) == set(ALLOWED)
    used = {(room(module), room(name)) for module, names in MODULES.items() for name in names if room(module) != room(name)}
    idle = {(above, below) for above, rooms in ALLOWED.items() for below in rooms - {"core", "files"}} - used
    assert not idle, f"nothing needs {sorted(idle)}: strike it from the table"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_rooms_below(module):
    imported = {room(name) for name in MODULES[module]} - {room(module)}
    assert imported <= ALLOWED[room(module)], f"{module} may not import {sorted(imported - ALLOWED[room(module)])}"
    assert not {room(name) for name in MODULES[module]} & set(RUNNERS), "nobody imports a runner"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_names_the_page_it_needs(module):
    "Inside the package nobody goes through a table of contents: that is for people outside, and would close circles."
    through = MODULES[module] & {name for name in CONTENTS if name}
    assert not through, f"{module} imports the package {sorted(through)}: name the module"


def test_no_import_closes_a_circle():
    list(graphlib.TopologicalSorter(MODULES).static_order())


@pytest.mark.parametrize("module", sorted(PAGES))
def test_notebooks_lie_where_their_module_lies_in_the_order_of_imports(module):
    "Folders mirror packages; the pages of the flat modules lie in nbs/ideas. A page imports pages with a smaller number."
    page = PAGES[module]
    folder = page.parent.relative_to(ROOT / "nbs").as_posix()
    assert folder == ("/".join(module.split(".")[:-1]) or "ideas"), f"{page.name} of {module} lies in {folder}"
    number = re.match(r"(\d\d)_", page.name)
    assert number and page.stem[3:] == module.split(".")[-1], f"{page.name} is not named after {module}"
    for other in MODULES[module]:
        if other in PAGES and PAGES[other].parent == page.parent:
            assert PAGES[other].name < page.name, f"{module} imports {other}, which comes after it"


def test_methods_do_not_know_each_other():
    for module, imported in MODULES.items():
        if module.startswith("methods.") and module != "methods.zoo":
            inner = {name for name in imported if name.startswith("methods")}
            assert inner <= {"methods.base", "methods.parts", "methods.readings"}, f"{module} imports {sorted(inner)}"


def test_tables_of_contents_are_short():
    "A package's __init__ imports from its own modules and does nothing else."
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent == PACKAGE: continue
        body = ast.parse(path.read_text()).body
        assert isinstance(body[0], ast.Expr), f"{path} begins with a sentence"
        old = [node for node in body[1:] if isinstance(node, ast.FunctionDef) and node.name == "__getattr__"]
        assert all(isinstance(node, ast.ImportFrom) or node in old for node in body[1:]), f"{path} only hands names on"
        others = {name for name in own_imports(path) if room(name) != room(dotted(path))}
        assert others <= {"_moved", "_moved.old_name"}, f"{path} hands on names of other rooms"


def test_import_paths_of_the_first_version_still_work():
    "Each with a warning that names the new place; a name that never was is still an AttributeError."
    with pytest.warns(DeprecationWarning, match="dqe_cir.trainer.SMOKE has moved: import dqe_cir.trainer.loop.SMOKE"):
        from dqe_cir.trainer import SMOKE
    for module in ("search_page", "methods.check"): sys.modules.pop(f"dqe_cir.{module}", None)
    with pytest.warns(DeprecationWarning, match="dqe_cir.retriever.session and dqe_cir.retriever.page"):
        import dqe_cir.search_page
    with pytest.warns(DeprecationWarning, match="dqe_cir.trainer.check"):
        from dqe_cir.methods.check import check_method
    from dqe_cir.retriever.page import SearchPage
    assert dqe_cir.search_page.SearchPage is SearchPage and callable(check_method) and SMOKE["size"] == "smoke"
    with pytest.raises(ImportError): from dqe_cir.trainer import nothing_of_that_name
    for module in MODULES: assert module not in _moved.MODULES, f"{module} is there: its old path needs no help"
    for parts in _moved.MODULES.values(): assert set(parts) <= set(MODULES)
