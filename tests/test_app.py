"The page without code: served to whoever brings the token, refused to everybody else."
import ast
import importlib.util
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from helpers import ROOT

from dqe_cir.retriever.commands import serve_command


def make_lines(target):
    "The commands of a Makefile target, as make would print them."
    done = subprocess.run(["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def words_of(target):
    "The words with which a make target starts its server; the app goes through `dqe-cir serve`."
    line = next(line for line in make_lines(target).splitlines() if "jupyter lab" in line or "serve" in line)
    return serve_command(Path("search.ipynb"), []) if target == "app" else shlex.split(line)


def test_the_app_is_bound_to_this_machine_and_never_without_a_token():
    assert "dqe_cir.retriever serve --model garments" in make_lines("app")
    assert {"--Voila.ip=127.0.0.1", "--Voila.auto_token=True"} <= set(words_of("app"))


@pytest.mark.parametrize("target, server", [("lab", "ServerApp"), ("app", "Voila")])
def test_a_message_may_be_as_large_as_a_photograph(target, server):
    "Tornado cuts the connection at 10 MB and says nothing; both servers are started with room for more than 25."
    settings = next(word.split("=", 1)[1] for word in words_of(target) if word.startswith(f"--{server}.tornado_settings="))
    assert ast.literal_eval(settings)["websocket_max_message_size"] > 25 * 2**20


def status(address):
    "The HTTP status of a GET, redirections followed, and the address it ended at."
    try:
        with urllib.request.urlopen(address, timeout=60) as answer: return answer.status, answer.url
    except urllib.error.HTTPError as refused: return refused.code, address


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(tmp_path):
    "A server started as `make app` starts it, with a token known to the test."
    if not importlib.util.find_spec("voila"): pytest.skip("voila is not installed: make app installs it")
    port, names = free_port(), ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    (tmp_path / "page.ipynb").write_text('{"cells": [], "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}, "nbformat": 4, "nbformat_minor": 5}')
    command = [sys.executable, "-m", "voila", str(tmp_path / "page.ipynb"), "--no-browser", "--Voila.ip=127.0.0.1", f"--port={port}", "--Voila.token=secret"]
    process = subprocess.Popen(command, env={**os.environ, **{name: str(tmp_path / name.lower()) for name in names}}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    base = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try: socket.create_connection(("127.0.0.1", port), 1).close(); break
        except OSError: time.sleep(0.25)
    yield base
    process.terminate(); process.wait(20)


@pytest.mark.slow
def test_without_the_token_the_page_is_refused(server):
    code, address = status(f"{server}/")
    assert code == 403 or "/login" in address
    code, address = status(f"{server}/?token=wrong")
    assert code == 403 or "/login" in address
    code, address = status(f"{server}/?token=secret")
    assert code == 200 and "/login" not in address
