"The search page as a person meets it: JupyterLab in a real browser, run all, type, click, look. `make test-browser` runs this; screenshots: .cache/browser."
import base64
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import numpy as np
import pytest
from PIL import Image

from helpers import ROOT

from dqe_cir.retriever import Retriever
from dqe_cir.retriever.drawn import garments_at_once

pytestmark = pytest.mark.browser
SHOTS = ROOT / ".cache" / "browser"
FIRST, SECOND = "is red and has long sleeves", "is striped"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
SETTINGS = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
            "notebook-extension/tracker": {"windowingMode": "none"}}  # without: a pop-up; cells off the screen are not in the page


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "The address of a JupyterLab that serves a copy of nbs/search.ipynb and keeps its own files in a temporary folder."
    home = tmp_path_factory.mktemp("lab")
    for name, values in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    (home / "work").mkdir()
    notebook = nbformat.read(ROOT / "nbs" / "search.ipynb", 4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += '\nmodel = "garments"  # the shipped model, whatever has been trained here'
    nbformat.write(notebook, home / "work" / "search.ipynb")
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    names = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    environment = {**{name: value for name, value in os.environ.items() if name not in ("IN_TEST", "PYTEST_CURRENT_TEST")}, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(home / "ipython"),
                   "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
                   **{f"JUPYTER_{name}": str(home / folder) for name, folder in names.items()}}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--IdentityProvider.token=T",
               f"--ServerApp.root_dir={home / 'work'}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(home / "log", "w") as log: process = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log)
    try:
        yield wait_for(f"http://127.0.0.1:{port}", process, home / "log")
    finally:
        process.terminate(); process.wait(30)


def wait_for(address, process, log):
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(f"{address}/api/status?token=T", timeout=5)
            return address
        except OSError: time.sleep(0.5)
    raise AssertionError(log.read_text()[-2000:])


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None: pytest.skip("no chromium or google-chrome on PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-browser.txt")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=executable, args=FLAGS)
        yield running
        running.close()


class Lab:
    "The open notebook: what a person sees, in words a test can compare."

    def __init__(self, page): self.page, self.seconds = page, {}

    @property
    def ids(self): return self.page.locator(".dqe-result[title]").evaluate_all("boxes => boxes.map(box => box.title)")

    @property
    def status(self): return self.page.locator(".dqe-status").first.inner_text()

    @property
    def reference(self): return self.page.locator(".dqe-result > b").first.inner_text()

    @property
    def text(self): return self.page.get_by_placeholder("what should change?")

    def pictures(self):
        "The pictures of the grid as they arrived in the browser, without their frames."
        read = "images => Promise.all(images.map(async i => { await i.decode(); const b = await (await fetch(i.src)).arrayBuffer(); return btoa(String.fromCharCode(...new Uint8Array(b))) }))"
        sent = self.page.locator("img.widget-image").evaluate_all(read)[1:1 + len(self.ids)]
        return [Image.open(io.BytesIO(base64.b64decode(packed))).convert("RGB") for packed in sent]

    def until(self, done, what, seconds=30):
        "Wait until `done()` holds; returns how long it took."
        started = time.perf_counter()
        while not done():
            assert time.perf_counter() < started + seconds, f"{what} did not come; text: {self.text.input_value()!r}, status: {self.status}"
            self.page.wait_for_timeout(25)
        return time.perf_counter() - started

    def write(self, text):
        "Write into the text box, at the pace of a person: when the kernel is idle, and a moment before the next key or click."
        self.page.wait_for_timeout(200)
        self.page.wait_for_selector("#jp-main-statusbar >> text=/ipykernel.*Idle/")
        self.text.fill(text)
        self.page.wait_for_timeout(300)

    def search(self, text):
        before = self.ids
        self.write(text)
        self.page.get_by_role("button", name="Search", exact=True).click()
        self.until(lambda: f"“{text}”" in self.status and self.ids != before, f"an answer to {text!r}")
        self.page.wait_for_timeout(300)

    def shot(self, name): self.page.locator(".dqe-page").first.screenshot(path=SHOTS / f"{name}.png")

    def places(self):
        "Where the pictures lie on the page, however far it is scrolled."
        return self.page.evaluate("""() => { const page = document.querySelector('.dqe-page').getBoundingClientRect();
            return [...document.querySelectorAll('img.widget-image')].slice(0, 11).map(i => i.getBoundingClientRect()).map(b => [b.x - page.x, b.y - page.y, b.width, b.height]) }""")


@pytest.fixture(scope="module")
def lab(server, browser):
    "nbs/search.ipynb after Run All Cells, in a window 1280 pixels wide, and high enough for the whole page."
    SHOTS.mkdir(parents=True, exist_ok=True)
    page = browser.new_page(viewport={"width": 1280, "height": 1700})
    page.set_default_timeout(15_000)
    lab = Lab(page)
    lab.trouble, lab.requests = [], []
    page.on("console", lambda message: message.type == "error" and lab.trouble.append(message.text))
    page.on("pageerror", lambda error: lab.trouble.append(str(error)))
    page.on("request", lambda request: lab.requests.append(request.url))
    page.goto(f"{server}/lab/tree/search.ipynb?token=T&reset")
    try: page.wait_for_selector("#jp-main-statusbar >> text=/ipykernel.*Idle/", timeout=90_000)  # earlier, the run would be dropped
    finally: page.screenshot(path=SHOTS / "0-lab.png")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    started = time.perf_counter()
    lab.text.wait_for(timeout=120_000)
    lab.until(lambda: "pictures" in lab.status, "an open gallery", 120)
    lab.seconds["run all to ready"] = round(time.perf_counter() - started, 2)
    page.keyboard.press("Control+b")  # the file browser away: the page has the width
    lab.text.scroll_into_view_if_needed()
    yield lab
    (SHOTS / "seconds.json").write_text(json.dumps(lab.seconds, indent=1))
    page.close()


@pytest.fixture(scope="module")
def expected():
    "ids(reference, text): what the page has to show, computed without a page."
    retriever, dataset = Retriever.load("garments", device="cpu"), garments_at_once("val", "full")
    def ids(reference, text, **options):
        among = next(names for names in dataset.galleries.values() if reference in names)
        return [result.id for result in retriever.search(reference, text, 10, among=among, **options)]
    ids.files = retriever.files
    return ids


def difference(one, other): return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())


def fitted(picture, border=0):
    picture = picture.crop((border, border, picture.width - border, picture.height - border))
    return picture.convert("RGB").resize((32, 32), Image.Resampling.BOX)


def test_a_person_searches_step_by_step(lab, expected):
    "Text, Search, a result as the next reference, another text, Undo; ids, pictures and places are what they must be."
    lab.shot("1-open")
    start, places = lab.reference, lab.places()
    lab.search(FIRST)
    lab.seconds["first search, in the page's words"] = lab.status
    assert "green: a right answer" in lab.status, "the garments' grammar understands the request"
    first = lab.ids
    assert first == expected(start, FIRST) and len(first) == 10
    shown, files = [fitted(picture, 5) for picture in lab.pictures()], [fitted(Image.open(expected.files[name])) for name in first]
    assert [min(range(10), key=lambda j: difference(picture, files[j])) for picture in shown] == list(range(10)), "each picture is the one its caption names"
    assert lab.places() == places, "nothing jumps"
    lab.shot("2-searched")

    lab.page.get_by_role("button", name="Use as reference").nth(1).click()
    lab.until(lambda: lab.reference == first[1], "the new reference")
    assert lab.text.input_value() == ""
    lab.search(SECOND)
    assert lab.ids == expected(first[1], SECOND) != first
    assert lab.places() == places
    lab.shot("3-next-step")

    lab.page.get_by_role("button", name="Undo").click()
    lab.until(lambda: lab.ids == first, "the results before")
    assert lab.reference == first[1] and lab.text.input_value() == SECOND, "Undo gives the undone question back"


def test_the_gate_ranks_again_at_once(lab, expected):
    "Off and back again; the ranking is the retriever's for that gate."
    lab.page.get_by_role("button", name="Undo").click()
    lab.until(lambda: not lab.ids, "an empty grid")
    start = lab.reference
    texts = ("is darker and has no sleeves", "is longer and is dotted", "is lighter and has a collar", "is sleeveless")
    text = next(text for text in texts if expected(start, text) != expected(start, text, gate="off"))
    lab.search(text)
    learned, off = expected(start, text), expected(start, text, gate="off")
    assert lab.ids == learned
    lab.page.get_by_role("button", name="off", exact=True).click()
    lab.seconds["another gate"] = round(lab.until(lambda: lab.ids == off, "the ranking without the gate"), 3)
    lab.page.get_by_role("button", name="learned", exact=True).click()
    lab.until(lambda: lab.ids == learned, "the learned ranking")


def test_a_result_tells_why(lab):
    name, places = lab.ids[0], lab.places()
    lab.page.get_by_role("button", name="Why?").first.click()
    lab.page.get_by_text(f"Why {name}?").wait_for()
    lab.page.get_by_text("The text speaks of").wait_for()
    lab.page.locator(".js-plotly-plot .main-svg").first.wait_for()
    lab.page.get_by_text("Nearest training query").wait_for()
    lab.page.wait_for_timeout(700)
    assert lab.places() == places, "the panel opens below everything else"
    lab.shot("4-why")


def test_the_history_is_saved(lab):
    "As JSON and as a sheet, where the status line says."
    lab.page.get_by_role("button", name="Save history").click()
    lab.until(lambda: "saved" in lab.status, "the names of two files")
    data, sheet = (ROOT / name for name in lab.status.removeprefix("saved ").split(" and "))
    try:
        steps = json.loads(data.read_text())["steps"]
        assert [result["id"] for result in steps[-1]["results"]] == lab.ids
        with Image.open(sheet) as picture: assert picture.height == len(steps) * 104
    finally: data.unlink(), sheet.unlink()


def test_a_picture_of_ones_own(lab, expected, tmp_path):
    "Uploaded with a transparent ground: searched as the encoder sees it, shown on white."
    with Image.open(expected.files["dress-val-0003"]) as picture: own = picture.convert("RGBA")
    for x in range(20):
        for y in range(own.height): own.putpixel((x, y), (0, 0, 0, 0))
    own.save(tmp_path / "my dress.png")
    with lab.page.expect_file_chooser() as chosen: lab.page.get_by_role("button", name="Upload").click()
    chosen.value.set_files(tmp_path / "my dress.png")
    lab.until(lambda: "my dress.png" in lab.reference, "the uploaded reference")
    lab.search("is blue")
    assert len(lab.ids) == 10 and "right answers unknown" in lab.status
    read = "async i => { await i.decode(); const b = await (await fetch(i.src)).arrayBuffer(); return btoa(String.fromCharCode(...new Uint8Array(b))) }"
    shown = Image.open(io.BytesIO(base64.b64decode(lab.page.locator("img.widget-image").first.evaluate(read)))).convert("RGB")
    assert min(shown.getpixel((8, shown.height // 2))) > 250
    lab.shot("5-upload")


def test_what_is_wrong_is_said_in_place(lab):
    before = lab.ids
    lab.write("")
    lab.page.get_by_role("button", name="Search", exact=True).click()
    lab.until(lambda: "say what should change" in lab.status, "a message")
    assert lab.ids == before


def test_a_folder_of_ones_own(lab, mixed_folder):
    "The folder nobody has tidied: what can be read is searched, the rest is counted in the status line."
    folder, good, bad = mixed_folder
    lab.page.get_by_label("Gallery").select_option("a folder of your own pictures")
    box = lab.page.get_by_placeholder("path of a folder")
    box.fill(str(folder)); box.press("Enter")
    lab.until(lambda: "unreadable" in lab.status, "an indexed folder", 60)
    assert f"{len(good)} pictures" in lab.status and f"{len(bad)} unreadable" in lab.status
    lab.write("is red")
    lab.text.press("Enter")
    lab.until(lambda: len(lab.ids) == 10, "results")
    assert set(lab.ids) < good
    assert all(picture.getextrema() != ((0, 0),) * 3 for picture in lab.pictures())
    lab.shot("6-own-folder")


def test_the_page_fits_and_stays_at_home(lab, server):
    "1280 pixels are enough, nothing was asked of another machine, and the browser's console holds no error."
    box = lab.page.locator(".dqe-page").first.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 1280
    foreign = [url for url in lab.requests if not url.startswith((server, server.replace("http", "ws"), "blob:", "data:"))]
    assert not foreign and not lab.trouble


def test_the_app_without_code(browser, expected, tmp_path):
    "`make app` in a browser: refused without its token; with it the page alone, and it searches."
    if not importlib.util.find_spec("voila"): pytest.skip("voila is not installed: make app installs it")
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    notebook = nbformat.read(ROOT / "nbs" / "search.ipynb", 4)
    next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])).source += '\nmodel = "garments"'
    nbformat.write(notebook, tmp_path / "search.ipynb")
    names = {name: str(tmp_path / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    environment = {name: value for name, value in os.environ.items() if name not in ("IN_TEST", "PYTEST_CURRENT_TEST")} | names | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "voila", str(tmp_path / "search.ipynb"), "--no-browser", "--Voila.ip=127.0.0.1", f"--port={port}", "--Voila.token=secret"]
    with open(tmp_path / "log", "w") as log: process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    page = browser.new_page(viewport={"width": 1280, "height": 1200})
    try:
        for _ in range(240):
            try: socket.create_connection(("127.0.0.1", port), 1).close(); break
            except OSError: time.sleep(0.25)
        app = Lab(page)
        page.goto(f"http://127.0.0.1:{port}/")
        assert app.text.count() == 0
        page.goto(f"http://127.0.0.1:{port}/?token=secret", timeout=90_000)
        app.text.wait_for(timeout=90_000)
        app.until(lambda: "pictures" in app.status, "an open gallery", 60)
        start = app.reference
        app.text.fill(FIRST); page.wait_for_timeout(500)
        page.get_by_role("button", name="Search", exact=True).click()
        app.until(lambda: len(app.ids) == 10, "results")
        assert app.ids == expected(start, FIRST) and page.locator(".jp-InputArea-editor").count() == 0
        page.wait_for_timeout(500)
        app.shot("7-app")
    finally:
        page.close(); process.terminate(); process.wait(30)
