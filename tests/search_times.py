"""CPU seconds of searches in galleries of random unit vectors, one thread: an index in memory, one that stays in its file, and Qdrant in a folder.

python tests/search_times.py                     writes data/results/search-times.json
python tests/search_times.py 100000 1 256        one gallery: pictures, vectors of each, numbers of each vector; the other rows stay
python tests/search_times.py 100000 1 256 qdrant written added    one gallery in some ways alone, and the others of its row stay;
                                                                  all but `qdrant` need what `written` before them wrote

Every way has a process of its own, so that its memory is its own, and Qdrant two: one that writes, one that opens the folder and asks. Twenty queries are
asked, and the least time counts. Vectors are random, since time and bytes depend on shapes alone; the ten pictures found for each query are kept as a hash
of their names, by which the ways of a row are compared."""
import hashlib
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from torch.nn.functional import normalize

from helpers import ROOT

from dqe_cir.core import environment, generator
from dqe_cir.files import read_json, write_json
from dqe_cir.retriever import QdrantFolder, Retriever, index
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


def own():
    "GiB that are the process's alone, pages of files not counted: what the system cannot take back."
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(status["RssAnon"].split()[0]) / 2**20, 2)


def asked_each(ask, shape) -> dict:
    "CPU milliseconds of the first of twenty queries, and the least of the others; a hash of all that was found."
    taken = [least(lambda: [name for name, _ in ask(query[None])], 1) for query in queries(shape, 20)]
    answers = hashlib.blake2b(json.dumps([names for _, names in taken]).encode(), digest_size=8).hexdigest()
    return {"first query ms": 1000 * taken[0][0], "query ms": 1000 * min(seconds for seconds, _ in taken[1:]), "answers": answers}


def empty():
    shipped = Retriever.load("garments", device="cpu")
    return Retriever(shipped.method, shipped.config)


def asked(retriever, shape) -> dict:
    found = asked_each(lambda query: retriever.best(query, 10), shape)
    block, _ = least(lambda: retriever.best_places(queries(shape, 32), 10), 2)
    return {**found, "32 queries ms": 1000 * block, "peak GiB": peak(), "own GiB": own()}


def written(shape, folder) -> dict:
    retriever = empty()
    retriever.files = {f"{i:07}.png": Path("/pictures", f"{i:07}.png") for i in range(shape[0])}
    retriever.keys, retriever.root, retriever.source = [f"{i:032x}" for i in range(shape[0])], Path("/pictures"), "/pictures"
    retriever.embeddings = torch.cat(list(pieces(shape)))
    taken, _ = least(lambda: retriever.write_index(folder), 1)
    return {"write s": taken, "MB": sum(path.stat().st_size for path in folder.iterdir()) / 1e6}


def at_hand(shape, folder, bytes_at_hand) -> dict:
    "An index read from its file, held in float32 or left where it is."
    retriever = empty()
    with mock.patch.object(index, "AT_HAND", bytes_at_hand): taken, read = least(lambda: retriever.read_index(folder), 1)
    assert read
    return {"read s": taken, **asked(retriever, shape)}


def in_memory(shape, folder): return at_hand(shape, folder, 2**40)
def in_its_file(shape, folder): return at_hand(shape, folder, 0)


def added(shape, folder) -> dict:
    "A thousand pictures more, here and there among those of the index. Walking the folder, reading every file and encoding are left out."
    names = sorted([f"{i:07}.png" for i in range(shape[0])] + [f"{i * shape[0] // 1000:07} new.png" for i in range(1000)])
    keys = {name: name if "new" in name else f"{int(name[:7]):032x}" for name in names}
    pictures = index.Pictures("/pictures", {name: Path("/pictures", name) for name in names}, keys, {}, Path("/pictures"))
    vectors = next(pieces((1000, *shape[1:]))).float()

    def encoded(self, files, wanted, known, progress, keep):
        known |= zip(wanted, vectors)
        keep(known)
        return {}

    retriever = empty()
    with mock.patch.object(index, "pictures_of", lambda _: pictures), mock.patch.object(Retriever, "encode_files", encoded):
        taken, report = least(lambda: retriever.index("/pictures", folder), 1)
    assert (len(report.new), len(report.kept)) == (1000, shape[0])
    made, highest = retriever.embeddings.half(), peak()
    alone, _ = least(lambda: (index.seal(made), index.write_tensors(folder / "alone.safetensors", {"embeddings": made})))
    return {"add 1,000 s": taken, "its embeddings s": alone, "peak GiB": highest}


def written_to_qdrant(shape, folder) -> dict:
    stored = StoredPictures(QdrantFolder(folder / "qdrant"), "times")
    started, clock, number = time.process_time(), time.monotonic(), 0
    for piece in pieces(shape):
        for start in range(0, len(piece), 1000):
            rows = piece[start:start + 1000]
            stored.write([(f"{number + i:07}.png", vectors, f"{number + i:032x}", None, []) for i, vectors in enumerate(rows)])
            number += len(rows)
    taken, clock = time.process_time() - started, time.monotonic() - clock
    stored.engine.close()
    size = sum(path.stat().st_blocks * 512 for path in (folder / "qdrant").rglob("*") if path.is_file())
    return {"write s": taken, "write s by the clock": clock, "MB": size / 1e6, "peak GiB while writing": peak()}


def asked_of_qdrant(shape, folder) -> dict:
    taken, stored = least(lambda: StoredPictures(QdrantFolder(folder / "qdrant"), "times"), 1)
    return {"read s": taken, **asked_each(lambda query: stored.best(query[0], 10), shape), "peak GiB": peak(), "own GiB": own()}


WAYS = {"written": [written], "in memory": [in_memory], "in its file": [in_its_file], "added": [added], "qdrant": [written_to_qdrant, asked_of_qdrant]}


def alone(act, shape, folder, results):
    torch.set_num_threads(1)
    results.put({name: round(value, 3) if isinstance(value, float) else value for name, value in act(shape, folder).items()})


def by_itself(act, shape, folder) -> dict:
    "What a process of its own finds."
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=alone, args=(act, shape, folder, results))
    process.start()
    process.join()
    if process.exitcode: raise SystemExit(f"{act.__name__} of {shape} ended with {process.exitcode}")
    found = results.get()
    print(shape, act.__name__, found, flush=True)
    return found


def row(shape, ways, before) -> dict:
    "The row of a gallery, measured in some ways; what is known of others stays."
    found, folder = {way: before[way] for way in WAYS if way in before}, Path(tempfile.mkdtemp(dir=ROOT / ".cache"))
    try:
        for way in ways: found[way] = {name: value for act in WAYS[way] for name, value in by_itself(act, shape, folder).items()}
    finally: shutil.rmtree(folder, ignore_errors=True)
    answers = {way["answers"] for way in found.values() if "answers" in way}
    same = len(answers) == 1 if answers else before.get("same ten pictures")
    return {"pictures": shape[0], "vectors": shape[1], "numbers": shape[2], "same ten pictures": same, **found}


if __name__ == "__main__":
    shapes = [tuple(map(int, sys.argv[1:4]))] if len(sys.argv) > 3 else SHAPES
    ways = sys.argv[4:] or list(WAYS)
    path = ROOT / "data" / "results" / "search-times.json"
    unit = "CPU seconds or milliseconds of one process, the least of 19 queries after a first; GiB of resident memory at its highest, and `own` without pages of files, at the end"
    made_with = environment()  # as it was before this record was written
    rows = {(old["pictures"], old["vectors"], old["numbers"]): old for old in read_json(path)["rows"]} if path.exists() else {}
    for shape in shapes:
        rows[shape] = row(shape, ways, rows.get(shape, {}))
        shown = sorted(rows.values(), key=lambda old: (old["vectors"], old["pictures"]))
        write_json(path, {"command": "python tests/search_times.py", "unit": unit, "rows": shown, "environment": made_with})
