"""CPU seconds and memory of one block of a refresh, from random features.

python tests/refresh_seconds.py 400 4000      queries and images; 32 embeddings of 256 numbers each
python tests/refresh_seconds.py 512 45429     one block of FashionIQ's size; a refresh has 36
... slow                                      and what the slow form of `slow_mining.py` takes, once

One thread, the least of three runs. Memory is the growth of the process's peak while one block is scored, chosen and reported."""
import json
import resource
import sys
import time

import torch

import slow_mining
from dqe_cir.attributes import unit
from dqe_cir.core import generator
from dqe_cir.retrieval import similarity
from dqe_cir.sampler import MidZone, ScoreDropBand
from dqe_cir.trainer.mining import POOL, mine_block

EMBEDDINGS, WIDTH = 32, 256


def features(queries, images):
    "Unit queries (Q,D), gallery (N,T,D), targets (Q,) that most queries score high, and valid candidates (Q,N)."
    draw = generator(0, "refresh")
    gallery = torch.empty(images, EMBEDDINGS, WIDTH)
    for some in gallery.split(256): some.copy_(unit(torch.randn(some.shape, generator=draw)))  # held once
    target = torch.randint(0, images, (queries,), generator=draw)
    near = gallery[target, 0] + 0.2 * torch.randn(queries, WIDTH, generator=draw)
    valid = torch.ones(queries, images, dtype=torch.bool).scatter(1, target.unsqueeze(1), False)
    return unit(near), gallery, target, valid


def least(work, runs=3):
    "CPU seconds of the quickest run, and what it returned."
    best = float("inf")
    for _ in range(runs):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return round(best, 4), result


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB, where the system counts in KiB


def slowly(sampler, scores, target, valid):
    "The block by the slow form: zones for the pools, and again for the report."
    pools = slow_mining.pool(sampler, scores, target, valid, POOL, generator(1)).int()
    return pools, slow_mining.report(sampler, scores, target, valid)


def main(queries, images, slow=False):
    torch.set_num_threads(1)
    query, gallery, target, valid = features(queries, images)
    samplers, held = {"trns": MidZone(), "qure": ScoreDropBand()}, peak()
    mine_block(samplers["trns"], similarity(query, gallery), target, valid, generator(1))
    figures = {"queries": queries, "images": images, "GiB": round(peak() - held, 3)}
    figures["score"], scores = least(lambda: similarity(query, gallery))
    for name, sampler in samplers.items():
        figures[name], _ = least(lambda: mine_block(sampler, scores, target, valid, generator(1)))
        if slow: figures[f"{name} slow"], _ = least(lambda: slowly(sampler, scores, target, valid), runs=1)
    print(json.dumps(figures))


if __name__ == "__main__": main(*map(int, sys.argv[1:3]), slow="slow" in sys.argv)
