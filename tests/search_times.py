"""CPU seconds of searches in galleries of random unit vectors, one thread: an index in memory, one that stays in its file, and Qdrant in a folder.

python tests/search_times.py                     writes data/results/search-times.json
python tests/search_times.py 100000 1 256        one gallery: pictures, vectors of each, numbers of each vector; the other rows stay
                                                 with --no-engine behind it: without Qdrant

Every way has a process of its own, so that its memory is its own; the least of five queries counts. Vectors are random, since time and bytes depend on
shapes alone; the engine's answers are compared with those of the index."""
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import normalize

from helpers import ROOT

from dqe_cir.core import environment, generator
from dqe_cir.files import read_json, write_json
from dqe_cir.retriever import QdrantFolder, Retriever
from dqe_cir.retriever.beyond_memory import StoredPictures

SHAPES = [(100_000, 1, 256), (100_000, 8, 64), (1_000_000, 1, 256), (1_000_000, 8, 64)]
PIECE = 20_000


def pieces(shape):
    "The gallery piece by piece, in half precision."
    random = generator(0, "search times")
    for start in range(0, shape[0], PIECE):
        yield normalize(torch.randn(min(PIECE, shape[0] - start), *shape[1:], generator=random), dim=-1).half()


def queries(shape, count): return normalize(torch.randn(count, shape[2], generator=generator(1, "search times")), dim=1)


def least(act, times=5):
    "The least CPU seconds of a call, and what it returned last."
    taken = []
    for _ in range(times):
        started = time.process_time()
        found = act()
        taken.append(time.process_time() - started)
    return min(taken), found


def peak(): return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def empty():
    shipped = Retriever.load("garments", device="cpu")
    return Retriever(shipped.method, shipped.config)


def asked(retriever, shape) -> dict:
    one, many = queries(shape, 1), queries(shape, 32)
    first, _ = least(lambda: retriever.best(one, 10), 1)
    again, found = least(lambda: retriever.best(one, 10))
    block, _ = least(lambda: retriever.best_places(many, 10), 2)
    return {"first query ms": 1000 * first, "query ms": 1000 * again, "32 queries ms": 1000 * block, "peak GiB": peak(), "found": [name for name, _ in found]}


def written(shape, folder) -> dict:
    retriever = empty()
    retriever.files = {f"{i:07}.png": Path("/pictures", f"{i:07}.png") for i in range(shape[0])}
    retriever.keys, retriever.root, retriever.source = [f"{i:032x}" for i in range(shape[0])], Path("/pictures"), "/pictures"
    retriever.embeddings = torch.cat(list(pieces(shape)))
    taken, _ = least(lambda: retriever.write_index(folder), 1)
    return {"write s": taken, "MB": sum(path.stat().st_size for path in folder.iterdir()) / 1e6}


def at_hand(shape, folder, bytes_at_hand) -> dict:
    "An index read from its file, held in float32 or left where it is."
    from dqe_cir.retriever import index
    index.AT_HAND = bytes_at_hand
    retriever = empty()
    taken, read = least(lambda: retriever.read_index(folder), 1)
    assert read
    return {"read s": taken, **asked(retriever, shape)}


def in_memory(shape, folder): return at_hand(shape, folder, 2**40)
def in_its_file(shape, folder): return at_hand(shape, folder, 0)


def qdrant(shape, folder) -> dict:
    stored = StoredPictures(QdrantFolder(folder / "qdrant"), "times")
    started, number = time.process_time(), 0
    for piece in pieces(shape):
        for start in range(0, len(piece), 1000):
            rows = piece[start:start + 1000]
            stored.write([(f"{number + i:07}.png", vectors, f"{number + i:032x}", None, []) for i, vectors in enumerate(rows)])
            number += len(rows)
    taken = time.process_time() - started
    first, _ = least(lambda: stored.best(queries(shape, 1)[0], 10), 1)
    again, found = least(lambda: stored.best(queries(shape, 1)[0], 10))
    size = sum(path.stat().st_blocks * 512 for path in (folder / "qdrant").rglob("*") if path.is_file())
    return {"write s": taken, "MB": size / 1e6, "first query ms": 1000 * first, "query ms": 1000 * again, "peak GiB": peak(), "found": [name for name, _ in found]}


def alone(act, shape, folder, results): results.put({name: value if isinstance(value, list) else round(value, 3) for name, value in act(shape, folder).items()})


def row(shape, ways) -> dict:
    context, found = multiprocessing.get_context("spawn"), {}
    folder = Path(tempfile.mkdtemp(dir=ROOT / ".cache"))
    try:
        for act in ways:
            results = context.SimpleQueue()
            process = context.Process(target=alone, args=(act, shape, folder, results))
            process.start()
            process.join()
            if process.exitcode: raise SystemExit(f"{act.__name__} of {shape} ended with {process.exitcode}")
            found[act.__name__.replace("_", " ")] = results.get()
            print(shape, act.__name__, {name: value for name, value in list(found.values())[-1].items() if name != "found"}, flush=True)
    finally: shutil.rmtree(folder, ignore_errors=True)
    answers = [way.pop("found") for way in found.values() if "found" in way]
    return {"pictures": shape[0], "vectors": shape[1], "numbers": shape[2], "same ten pictures": all(answer == answers[0] for answer in answers), **found}


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = [tuple(map(int, sys.argv[1:4]))] if len(sys.argv) > 3 else SHAPES
    path = ROOT / "data" / "results" / "search-times.json"
    about = {"command": "python tests/search_times.py", "unit": "CPU seconds or milliseconds of one process, the least of five; GiB of resident memory at its highest"}
    before = read_json(path)["rows"] if path.exists() and len(sys.argv) > 3 else []
    ways = [written, in_memory, in_its_file, qdrant][:3 if "--no-engine" in sys.argv else 4]
    for shape in given:
        before = [old for old in before if (old["pictures"], old["vectors"], old["numbers"]) != shape] + [row(shape, ways)]
        before.sort(key=lambda old: (old["vectors"], old["pictures"]))
        write_json(path, {**about, "rows": before, "environment": environment()})
    print(json.dumps(before, indent=1))
