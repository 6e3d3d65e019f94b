"The miner as it is defined: every fallback for every row, whole rows sorted with their columns, and one matrix of random numbers."
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dqe_cir.attributes import unit
from dqe_cir.core import generator
from dqe_cir.evaluator.scoring import encode_gallery, encode_queries
from dqe_cir.sampler import Hardest, MidZone, Random, ScoreDropBand, candidates_below, positions_below, possible_negatives, relative_scores, zone_ends
from dqe_cir.trainer import mining
from dqe_cir.trainer.mining import DELTA_GRID, candidate_ids, rows_of, same_pictures, summed_up, valid_candidates


# ---- zones

def quantile(sampler, delta, below):
    first, last = zone_ends(below.sum(1, keepdim=True), sampler.low, sampler.high, sampler.smallest)
    position = positions_below(delta, below)
    return below & (position >= first) & (position < last)


def bounds(sampler, delta, possible):
    if sampler.scale == "absolute" or not possible.any(): return sampler.low, sampler.high
    mean, std = delta[possible].mean(), delta[possible].std(correction=0)
    return float(mean + sampler.low * std), float(mean + sampler.high * std)


def mid_zones(sampler, scores, target, valid):
    "The zone and its fallbacks."
    delta, possible = relative_scores(scores, target), possible_negatives(target, valid)
    low, high = (0.0, None) if sampler.scale == "quantile" else bounds(sampler, delta, possible)
    below = possible & (delta > max(0.0, low))
    nearest = below & (positions_below(delta, below) < sampler.smallest)
    if sampler.scale != "quantile": return [possible & (delta >= low) & (delta < high), nearest]
    return [quantile(sampler, delta, candidates_below(delta, valid, target, sampler.guard)), quantile(sampler, delta, below), nearest]


def hardest_zones(sampler, scores, target, valid):
    delta, possible = relative_scores(scores, target), possible_negatives(target, valid)
    below = possible & (delta > 0)
    return [below & (positions_below(delta, below) == 0), possible & (positions_below(-delta, possible) == 0)]


def drop_zones(sampler, scores, target, valid):
    relative_scores(scores, target)  # refuses NaN
    return [sampler.walked(scores, target) & possible_negatives(target, valid)]


def random_zones(sampler, scores, target, valid):
    relative_scores(scores, target)  # refuses NaN
    return [possible_negatives(target, valid)]


ZONES = {MidZone: mid_zones, Hardest: hardest_zones, ScoreDropBand: drop_zones, Random: random_zones}


def rungs(sampler, scores, target, valid):
    zones = [*ZONES[type(sampler)](sampler, scores, target, valid), possible_negatives(target, valid)]
    eligible, used = torch.zeros_like(valid), torch.full(target.shape, -1)
    for rung, zone in enumerate(zones):
        open_rows = (used < 0) & zone.any(1)
        eligible[open_rows], used[open_rows] = zone[open_rows], rung
    return eligible, used


def pool(sampler, scores, target, valid, size, generator):
    eligible, _ = rungs(sampler, scores, target, valid)
    keys = torch.rand(scores.shape, generator=generator).masked_fill(~eligible, -1.0)
    best = keys.topk(min(size, scores.shape[1]), dim=1)
    drawn = best.indices.masked_fill(best.values < 0, -1)
    return torch.nn.functional.pad(drawn, (0, size - drawn.shape[1]), value=-1)


# ---- the report

def counts(delta, mask):
    low, high, steps = DELTA_GRID
    place = ((delta[mask] - low) * (steps / (high - low))).floor().clamp(0, steps - 1).long()
    return torch.bincount(place, minlength=steps)


def report(sampler, scores, target, valid, right=None, judged=None):
    eligible, rung = rungs(sampler, scores if judged is None else judged, target, valid)
    delta, possible = relative_scores(scores, target), possible_negatives(target, valid)
    size, inside = eligible.sum(1), delta.masked_fill(~eligible, torch.nan)
    found = {"zone": size, "rung": rung, "delta": inside.nanmedian(1).values, "rank": 1 + (delta < 0).sum(1),
             "nearest": inside.nan_to_num(torch.inf).amin(1), "farthest": inside.nan_to_num(-torch.inf).amax(1),
             "count possible": counts(delta, possible), "count zone": counts(delta, eligible)}
    if right is None: return found
    return found | {"false": (right & eligible).sum(1) / size.clamp(min=1), "count right": counts(delta, right & possible)}


# ---- a refresh

def likeness(gallery, target):
    images = unit(gallery.float().mean(1))
    return images[target] @ images.T


def refresh(method, dataset, tokens, sampler, seed, epoch, zone_on="query"):
    "Pools and what `summed_up` makes of the blocks."
    pools, reports = torch.full((len(dataset.triplets), mining.POOL), -1, dtype=torch.int32), []
    for name, ids in candidate_ids(dataset).items():
        rows, gallery = rows_of(dataset, name), encode_gallery(method, tokens, ids)
        same, position = same_pictures(dataset, ids), {image: i for i, image in enumerate(ids)}
        for start in range(0, len(rows), mining.BLOCK):
            block = rows[start:start + mining.BLOCK]
            triplets = [dataset.triplets[row] for row in block]
            scores = method.score(encode_queries(method, tokens, triplets), gallery).float()
            target = torch.tensor([position[t.target] for t in triplets])
            valid = valid_candidates(dataset, triplets, position, same)
            judged = scores if zone_on == "query" else likeness(gallery, target)
            pools[block] = pool(sampler, judged, target, valid, mining.POOL, generator(seed, "pool", epoch, name, start)).int()
            right = torch.tensor([[name in dataset.relevant[t.pair_id] for name in ids] for t in triplets]) if dataset.relevant else None
            reports.append(report(sampler, scores, target, valid, right, judged))
    return pools, summed_up(reports)


# ---- memory

class Largest(TorchDispatchMode):
    "How many numbers the largest new tensor of float or int holds; bool ones and views of what was there apart."
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for found in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(found) and found.dtype != torch.bool and not found._is_view(): self.numbers = max(self.numbers, found.numel())
        return result
