"What is malformed is refused in one line, a killed run goes on to the same end, a full disk loses nothing. A sample; `make test-faults` runs all."
import ast
import random
import re

import pytest

from faults import disk, kills, parameters, runs
from faults.frame import Case, check
from faults.soak import soak
from helpers import ROOT

SAMPLE = [*random.Random(0).sample(list(parameters.cases(3)), 25)]


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name[:40])
def test_odd_parameters_are_refused_in_one_line(case, tmp_path):
    assert check(case, tmp_path) == "held"


def test_odd_run_folders_are_refused_in_one_line(tmp_path):
    for number, case in enumerate(random.Random(0).sample(list(runs.cases(5)), 25)):
        (tmp_path / str(number)).mkdir()
        assert check(case, tmp_path / str(number)) == "held", case.name


def test_the_frame_tells_foreign_silent_and_hanging_apart(tmp_path):
    def made(act): return Case("toy", "toy", lambda folder: act)
    assert check(made(lambda: 1), tmp_path) == "silent"
    assert check(made(lambda: int("x")), tmp_path).startswith("foreign: ValueError")
    assert check(made(lambda: {}["x"]), tmp_path).startswith("foreign: KeyError")
    assert check(made(lambda: [0] * 10**10), tmp_path) == "memory"
    assert check(Case("toy", "toy", lambda folder: lambda: __import__("time").sleep(60)), tmp_path, seconds=1) == "hang"


@pytest.mark.parametrize("name", ["training", "events", "record", "index", "export"])
def test_a_full_disk_is_named_and_loses_nothing(name, tmp_path):
    runs.parts(True)
    said, again, intact = disk.full(name, tmp_path)
    assert re.match(r"DataError: .* could not be written \(File too large\)", said) and intact and again == "done"


def test_a_run_killed_while_writing_ends_as_if_it_had_not_been():
    rounds = list(kills.rounds(step=99, first=11))
    assert len(rounds) == 3 and all(same for _, _, same, _ in rounds), rounds


def test_a_long_training_keeps_its_memory_and_its_files():
    found = soak(epochs=60)
    assert found["MiB per epoch"] < 0.5 and found["open files"][0] == found["open files"][1]


# ---- one helper writes and reads all files of ours

EXCEPTIONS = {  # module and call: why it is not a file of ours, or not one file
    ("encoder/checkpoints.py", "os.replace"): "a whole folder is moved at once",
    ("encoder/checkpoints.py", "save_file"): "into a folder that is moved at once",
    ("encoder/checkpoints.py", "load_file"): "a checkpoint of other people, with checks of its own",
    ("encoder/checkpoints.py", "safe_open"): "reads only the header of a folder's weights",
    ("data/drawn.py", "os.replace"): "a whole folder is moved at once",
    ("studies/ablation.py", "write_text"): "resets a counter of the system",
}
WRITERS, READERS = ("write_text", "write_bytes", "save_file"), ("safe_open", "load_file", "load_safetensors")


def named(function):
    if isinstance(function, ast.Name): return function.id
    if isinstance(function, ast.Attribute):
        return f"os.{function.attr}" if isinstance(function.value, ast.Name) and function.value.id == "os" else function.attr
    return ""


def beside(tree):
    "The names that `with replacing(...) as name` binds: what is written to them is a part that takes its place whole."
    items = [item for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items]
    return {item.optional_vars.id for item in items if isinstance(item.context_expr, ast.Call) and named(item.context_expr.func) == "replacing"
            and isinstance(item.optional_vars, ast.Name)}


def bare_calls(path):
    "Calls of a module that read or write a file without the helper."
    tree = ast.parse(path.read_text())
    parts = beside(tree)
    from_safetensors = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("safetensors")
                        for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call): continue
        name = named(node.func)
        written = {a.id for a in [*node.args, getattr(node.func, "value", None)] if isinstance(a, ast.Name)}
        if name in WRITERS and name in {*from_safetensors, "write_text", "write_bytes"} and isinstance(node.func, ast.Attribute | ast.Name):
            own = isinstance(node.func, ast.Name) and name in ("write_text", "write_bytes")  # the helper itself
            if not own and not written & parts: yield name
        if name in READERS and name in from_safetensors: yield name
        if name == "os.replace" or name in ("rename", "os.rename"): yield name
        if name == "loads" and any(named(inner.func) in ("read_text", "read_bytes", "read") for inner in ast.walk(node) if isinstance(inner, ast.Call)): yield "json.loads"
        if name == "open" and any(isinstance(a, ast.Constant) and isinstance(a.value, str) and re.fullmatch("[wax][b+t]*", a.value) for a in node.args): yield "open to write"


def test_every_file_of_ours_goes_through_the_one_reader_and_writer():
    found = {(path.relative_to(ROOT / "dqe_cir").as_posix(), name) for path in (ROOT / "dqe_cir").rglob("*.py")
             if path.name not in ("files.py", "_modidx.py") for name in bare_calls(path)}
    assert found == set(EXCEPTIONS), f"not through dqe_cir.files: {sorted(found - set(EXCEPTIONS))}; no longer there: {sorted(set(EXCEPTIONS) - found)}"


def test_the_guard_sees_a_bare_writer(tmp_path):
    (tmp_path / "bare.py").write_text("import json, os\nfrom safetensors.torch import save_file\npath.write_text('x')\nsave_file(t, path)\nos.replace(a, b)\n"
                                      "json.loads(p.read_text())\nopen('x', 'w')\nwith replacing(p) as part: part.write_text('x'); save_file(t, part)\n")
    assert sorted(bare_calls(tmp_path / "bare.py")) == ["json.loads", "open to write", "os.replace", "save_file", "write_text"]
