"At the terminal: long work says that it lives, an error is two lines, a stop says how to go on, nothing is overwritten."
import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from helpers import ROOT, papermill, private_environment

LIVES = """
from dqe_cir.terminal import Progress
import time
for _ in Progress(range(3), desc="counting", unit="steps", every=0): time.sleep(0.2)
"""
FAILS = 'raise ValueError("size is wrong:\\n  choose full or smoke")'
HANGS = """
import time
from dqe_cir.terminal import say
say("started")
time.sleep(120)
"""


@pytest.fixture
def notebook(tmp_path):
    def written(*sources):
        cells = [nbformat.v4.new_code_cell(source.strip()) for source in sources]
        kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "work.ipynb")
        return tmp_path / "work.ipynb"
    return written


def started(tmp_path, source, *words):
    command = [sys.executable, "-m", "dqe_cir", str(source), str(tmp_path / "out" / "work.ipynb"), "--no-progress-bar", *words]
    return subprocess.Popen(command, cwd=tmp_path, env=private_environment(tmp_path, PYTHONPATH=str(ROOT)), stderr=subprocess.PIPE, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a worker of pytest ignores it


def lines(text): return [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]


def test_plain_papermill_shows_that_work_lives(notebook, tmp_path):
    done = papermill(notebook(LIVES), tmp_path / "out.ipynb")
    told = [line for line in lines(done.stderr) if line.startswith("counting")]
    assert done.returncode == 0 and len(told) == 3 and told[-1].startswith("counting: 3 of 3 steps")


def test_work_in_a_test_says_nothing(notebook, tmp_path):
    assert "counting" not in papermill(notebook(LIVES), tmp_path / "out.ipynb", IN_TEST="1").stderr


def test_an_error_is_two_lines_and_its_traceback_is_in_the_notebook(notebook, tmp_path):
    running = started(tmp_path, notebook("1 + 1", FAILS))
    told = lines(running.communicate(timeout=120)[1])
    assert running.returncode == 1
    assert told[-2:] == ["ValueError: size is wrong: choose full or smoke", f"cell 2 of {tmp_path}/out/work.ipynb has the traceback"]
    assert not any("Traceback" in line for line in told) and len(told) < 8
    assert "Traceback" in (tmp_path / "out" / "work.ipynb").read_text()


def test_the_next_notebook_gets_a_name_of_its_own(notebook, tmp_path):
    for expected in ("work.ipynb", "work-2.ipynb"):
        running = started(tmp_path, notebook("1 + 1"))
        assert lines(running.communicate(timeout=120)[1])[-1] == f"executed notebook: {tmp_path}/out/{expected}"
        assert running.returncode == 0 and (tmp_path / "out" / expected).exists()


def test_a_stop_ends_the_kernel_and_says_how_to_go_on(notebook, tmp_path):
    work = notebook(HANGS, "'never reached'")
    work.rename(tmp_path / "train.ipynb")
    running = started(tmp_path, tmp_path / "train.ipynb")
    while "started" not in (line := running.stderr.readline()): assert line, "it ended before it began"
    run = tmp_path / "out" / "garments-seed0"
    run.mkdir()
    (run / "config.json").write_text("{}")
    children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
    running.send_signal(signal.SIGINT)
    told = lines(running.communicate(timeout=60)[1])
    assert running.returncode == 130 and "stopped" in " ".join(told)
    assert f"-p run_dir {run.relative_to(tmp_path)}" in told[-1]
    assert children and not any(alive(child) for child in children)


def alive(process):
    "Is a process still there, after some seconds in which it may end?"
    for _ in range(50):
        if not os.path.exists(f"/proc/{process}"): return False
        time.sleep(0.1)
    return True
