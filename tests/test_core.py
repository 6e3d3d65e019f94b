"Seeds, parameters and records under hostile conditions: what the first notebook only tells the story of."
import errno
import json
import platform
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqe_cir import core
from dqe_cir.core import DataError, append_jsonl, checked, environment, generator, read_jsonl, scalars, smoke
from dqe_cir.core import use_static_figures, write_json

# ---- generators

addresses = st.tuples(st.integers(0, 2**40), st.lists(st.one_of(st.integers(-5, 10**6), st.text(max_size=8)), max_size=3).map(tuple))


def draws(seed, *salt, count=8): return torch.rand(count, generator=generator(seed, *salt), dtype=torch.float64).tolist()


@given(addresses, addresses)
def test_equal_addresses_and_only_they_draw_equal_numbers(first, second):
    assert (draws(first[0], *first[1]) == draws(second[0], *second[1])) == (first == second)


def test_an_address_is_not_its_spelling():
    assert len({tuple(draws(*address)) for address in [(0,), (0, 0), (0, "0"), (0, "a", "b"), (0, "ab"), (0, "a, b"), (0, ("a", "b")), (1,), (0, -1)]}) == 9


def test_neighbouring_generators_are_uncorrelated():
    series = torch.tensor([draws(seed, "epoch", epoch, count=2000) for seed in range(3) for epoch in range(5)])
    apart = torch.corrcoef(series) - torch.eye(15)
    assert apart.abs().max() < 0.1  # 105 pairs, each with a standard deviation of 0.022


def test_generators_neither_read_nor_move_the_global_one():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before, one = torch.get_rng_state(), draws(0, "x")
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(2)
        assert draws(0, "x") == one


# ---- parameters

@dataclass
class Config:
    name: str = "a"
    epochs: int = 3
    rate: float = 0.1
    amp: bool = False
    limit: int | None = None


@given(st.fixed_dictionaries({}, optional={"name": st.text(), "epochs": st.integers(), "rate": st.one_of(st.integers(-9, 9), st.floats(allow_nan=False)),
                                           "amp": st.booleans(), "limit": st.one_of(st.none(), st.integers())}))
def test_well_typed_values_arrive_as_they_are(values):
    given_values = dict(values)
    config = checked(Config, values)
    assert {name: getattr(config, name) for name in values} == values == given_values
    assert type(config.rate) is float


@pytest.mark.parametrize("values, message", [
    ({"epoch": 1}, "unknown parameter epoch; known: name, epochs, rate, amp, limit"),
    ({"zeta": 1, "alpha": 2, "epochs": 3}, "unknown parameter alpha, zeta;"),
    ({"epochs": "3"}, "parameter epochs='3' must be int, not str"),
    ({"epochs": 3.0}, "parameter epochs=3.0 must be int, not float"),
    ({"epochs": True}, "parameter epochs=True must be int, not bool"),
    ({"rate": True}, "parameter rate=True must be float, not bool"),
    ({"amp": "false"}, "parameter amp='false' must be bool, not str"),
    ({"amp": 0}, "parameter amp=0 must be bool, not int"),
    ({"name": None}, "parameter name=None must be str, not NoneType"),
    ({"limit": "none"}, "parameter limit='none' must be int or None, not str")])
def test_wrong_values_are_named(values, message):
    with pytest.raises(ValueError) as refused: checked(Config, values)
    assert message in str(refused.value)


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.one_of(st.integers(), st.text(), st.none(), st.booleans(), st.floats(), st.lists(st.integers()), st.just(Path))))
def test_parameters_are_the_public_scalars(namespace):
    found, kinds = scalars(namespace), (int, str, type(None), bool, float)
    assert set(found) == {name for name, value in namespace.items() if name[0] != "_" and type(value) in kinds}
    assert all(found[name] is namespace[name] for name in found)


# ---- records

def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"mAP": 1})
    before = path.read_bytes()
    with pytest.raises(TypeError): write_json(path, {"long": list(range(100_000)), "not json": object()})
    assert path.read_bytes() == before
    with pytest.raises(TypeError): write_json(tmp_path / "new.json", [1, object()])
    assert not (tmp_path / "new.json").exists()


def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_json(tmp_path / "results.json", {"mAP": 1})
    def half(part, content):
        part.open("wb").write(content[:5])
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(DataError, match=r"results.json could not be written \(No space left on device\); the former file stands"): write_json(path, {"mAP": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert json.loads(path.read_text()) == {"mAP": 1}


def test_a_reader_beside_a_writer_sees_whole_files(tmp_path):
    values = [[number] * 20_000 for number in (1, 2)]
    path, stop = write_json(tmp_path / "deep" / "results.json", values[0]), threading.Event()
    def keep_writing():
        while not stop.is_set():
            for value in values: write_json(path, value)
    writer = threading.Thread(target=keep_writing)
    writer.start()
    seen = [json.loads(path.read_text()) for _ in range(60)]
    stop.set()
    writer.join()
    assert all(value in values for value in seen)
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


json_values = st.one_of(st.none(), st.booleans(), st.integers(-10**9, 10**9), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=10))


@given(events=st.lists(st.dictionaries(st.text(min_size=1, max_size=6).filter(lambda name: name != "path"), json_values, max_size=3), min_size=1, max_size=5),
       data=st.data())
def test_a_log_cut_anywhere_keeps_the_events_before_the_cut(tmp_path_factory, events, data):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    for event in events: append_jsonl(path, **event)
    written = path.read_bytes()
    cut = data.draw(st.integers(0, len(written)))
    path.write_bytes(written[:cut])
    whole = written[:cut].count(b"\n")
    assert read_jsonl(path)[:whole] == events[:whole]
    assert len(read_jsonl(path)) - whole in (0, 1)  # a cut just before the end of a line may lose only the line's end


@pytest.mark.parametrize("text, line", [('{"a": 1\n{"b": 2}\n', 1), ('{"a": 1}\nnoise\n{"b": 2}\n', 2), ('{"a": 1}\n{"b": 2\n', 2)])
def test_a_broken_line_that_was_not_cut_off_is_named(tmp_path, text, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"metrics\.jsonl, line {line}, is not JSON"): read_jsonl(path)


# ---- what surrounds a number

def git(folder, *words): subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)


def test_the_commit_says_whether_files_were_edited(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "one")
    monkeypatch.setattr(core, "checkout", lambda: tmp_path)
    clean = environment()["commit"]
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "not tracked").touch()
    assert environment()["commit"] == clean
    (tmp_path / "file").write_text("two")
    assert environment()["commit"] == clean + "+edited"
    monkeypatch.setattr(core, "checkout", lambda: None)
    assert environment()["commit"] is None  # an installed copy


def test_an_environment_can_be_written_down():
    found = environment()
    assert found["torch"] == torch.__version__ and found["python"] == platform.python_version()
    assert {"transformers", "numpy", "pillow", "machine"} <= set(found) and json.loads(json.dumps(found)) == found
    time.strptime(found["time"], "%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.parametrize("value, expected", [("1", True), ("yes", True), ("", False), (None, False)])
def test_a_notebook_knows_that_it_is_tested(monkeypatch, value, expected):
    monkeypatch.delenv("IN_TEST", raising=False)
    if value is not None: monkeypatch.setenv("IN_TEST", value)
    assert smoke() is expected


@pytest.fixture
def renderers(monkeypatch):
    "Plotly's default renderer, restored afterwards."
    import plotly.io as pio
    before = pio.renderers.default
    monkeypatch.delenv("IN_TEST", raising=False)
    yield pio.renderers
    pio.renderers.default = before


def carried(): return set(go.Figure(go.Scatter(y=[1, 3, 2]))._repr_mimebundle_())


def test_a_figure_carries_a_picture_without_any_browser(monkeypatch, renderers):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("IN_TEST", raising=False)
    assert use_static_figures() == renderers.default == "plotly_mimetype+picture"
    assert carried() == {"application/vnd.plotly.v1+json", "image/png"}


def test_in_a_test_a_figure_carries_its_json(monkeypatch, renderers):
    monkeypatch.setenv("IN_TEST", "1")
    assert use_static_figures() == "plotly_mimetype" and carried() == {"application/vnd.plotly.v1+json"}


def test_data_lie_where_the_variable_says_or_beside_the_notebooks(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DQE_CIR_DATA", "some/disk")
    assert core.data_folder() == Path("some/disk")
    monkeypatch.setenv("DQE_CIR_DATA", "")
    assert core.data_folder() == core.checkout() / "data"
    monkeypatch.setattr(core, "checkout", lambda: None)
    assert core.data_folder() == tmp_path / "data"
