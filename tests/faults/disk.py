"""A disk that has no room: no file may grow beyond a limit, which the system reports as it reports a full disk. Whatever is written then ends in one
clear line, what was there before stays as it was, and with room again the same command ends as it should."""
import multiprocessing
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from dqe_cir.data.garments.benchmark import make_garments
from dqe_cir.encoder import cache_tokens, load_encoder
from dqe_cir.files import append_jsonl, read_json, write_json
from dqe_cir.retriever import SHIPPED, Retriever

from . import runs


def limited(act: Callable, limit: int | None) -> str:
    "What became of an action in a process whose files may have at most `limit` bytes: done, or the error in words."
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def body():
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            act()
            theirs.send("done")
        except BaseException as problem:
            theirs.send(f"{type(problem).__name__}: {problem}")

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    theirs.close()
    try:
        said = ours.recv() if ours.poll(120) else "hang"
    except EOFError:
        said = f"killed by signal {-process.exitcode if process.exitcode else '?'}"
    process.join(5)
    return said


def content(folder: Path) -> dict[str, bytes]:
    "What lies in a folder, by name."
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def training(folder):
    "A run that was stopped after two epochs goes on."
    run = runs.copied(folder, mining=True)
    return run, lambda: runs.go_on(run, True)


def events(folder):
    "An event is appended to a log."
    log = folder / "log" / "metrics.jsonl"
    for epoch in range(40): append_jsonl(log, kind="epoch", epoch=epoch, loss={"total": epoch / 7})
    return log.parent, lambda: append_jsonl(log, kind="epoch", epoch=40, loss={"total": 1.0})


def record(folder):
    "A record replaces another one."
    path = write_json(folder / "record" / "results.json", {"runs": list(range(2000))})
    return path.parent, lambda: write_json(path, {"runs": list(range(4000))})


def tokens(folder):
    "Images are encoded into an empty store."
    (folder / "tokens").mkdir()
    dataset = runs.parts(True)[0]
    return folder / "tokens", lambda: cache_tokens(load_encoder("mini", "cpu"), dataset, folder / "tokens", progress=False)


def index(folder):
    "Pictures are indexed a second time, some of them new."
    pictures, store = folder / "pictures", folder / "store"
    shutil.copytree(runs.parts(True)[0].files[runs.parts(True)[0].gallery[0]].parent, pictures)
    for path in sorted(pictures.iterdir())[40:]: path.unlink()
    retriever = Retriever.load(SHIPPED, device="cpu")
    kept = sorted(pictures.iterdir())[0].read_bytes()
    retriever.index(pictures, store)
    (pictures / "another.png").write_bytes(kept + b"0")
    return store, lambda: Retriever.load(SHIPPED, device="cpu").index(pictures, store)


def export(folder):
    "A retriever is exported."
    (folder / "shared").mkdir()
    return folder / "shared", lambda: Retriever.load(SHIPPED, device="cpu").save(folder / "shared" / "out")


def drawing(folder):
    "The garments are drawn."
    (folder / "data").mkdir()
    return folder / "data", lambda: make_garments(folder / "data" / "garments", size="smoke")


PLACES = {"training": (training, 200_000), "events": (events, 2_000), "record": (record, 9_000), "tokens": (tokens, 100_000), "index": (index, 2_000),
          "export": (export, 20_000), "drawing": (drawing, 1_000)}


def full(name: str, folder: Path) -> tuple[str, str, bool]:
    "What was said with no room, what with room again, and whether what was there before was left as it was."
    prepare, limit = PLACES[name]
    place, act = prepare(folder)
    before = content(place)
    said = limited(act, limit)
    after = content(place)
    intact = all(after.get(file, b"").startswith(before[file]) for file in before if not file.startswith(".lock"))
    return said, limited(act, None), intact
