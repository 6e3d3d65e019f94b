"Metrics against plain loops, exhaustive chance and simulated orders; CIRCO and HP-FashionIQ against reference results."
import itertools
import json
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.testing import assert_close

from dqe_cir.core import generator
from dqe_cir.metrics import average_precision, chance_average_precision, chance_recall_at_k, listed_ranks
from dqe_cir.metrics import mean_average_precision_at_k, preference_agreement, preference_ratio, recall_at_k
from dqe_cir.metrics import subset_ranks, top1_valid
from dqe_cir.retrieval import ranks, similarity, top_k

positive = st.integers(1, 60)


# ---- plain loops, written from the definitions

def loop_average_precision(scores, right, exclude):
    "Over thresholds: every right answer's precision among the images that score at least as high."
    kept = [j for j in range(len(scores)) if j != exclude]
    right = [j for j in right if j != exclude]
    precisions = []
    for j in right:
        admitted = [i for i in kept if scores[i] >= scores[j]]
        precisions.append(sum(i in right for i in admitted) / len(admitted))
    return statistics.fmean(precisions)


def loop_list_precision(predictions, right, k):
    hits, total = 0, 0.0
    for i, image in enumerate(predictions[:k], 1):
        if image in right:
            hits += 1
            total += hits / i
    return total / min(len(right), k)


def random_queries(seed, queries=6, images=8):
    "Scores with many ties, right answers (at least two per query), an image to exclude."
    g = generator(seed, "queries")
    scores, right = torch.randint(0, 4, (queries, images), generator=g).float(), torch.rand(queries, images, generator=g) < .3
    right[:, :2] = True
    return scores, right, torch.randint(images, (queries,), generator=g)


# ---- recall

@given(st.lists(positive, min_size=1, max_size=20), st.lists(positive, min_size=1, max_size=4))
def test_recall_is_the_loop_and_grows_with_k(found, ks):
    recalls = recall_at_k(torch.tensor(found), ks)
    assert recalls == {k: 100 * sum(rank <= k for rank in found) / len(found) for k in ks}
    assert [recalls[k] for k in sorted(recalls)] == sorted(recalls.values())


# ---- CIRR's second ranking

@given(seed=st.integers(0, 999), members=st.integers(2, 6))
def test_subset_ranks_are_ranks_in_a_gallery_of_members(seed, members):
    g = generator(seed, "subsets")
    scores = torch.randint(0, 4, (5, 9), generator=g).float()
    subset = torch.stack([torch.randperm(9, generator=g)[:members] for _ in range(5)])
    target, exclude = subset[:, 0], subset[:, 1]
    within = scores.gather(1, subset)
    zero, one = torch.zeros(5, dtype=torch.long), torch.ones(5, dtype=torch.long)
    assert_close(subset_ranks(scores, target, subset, exclude), ranks(within, zero, one))
    assert_close(subset_ranks(scores, target, subset), ranks(within, zero))
    assert_close(subset_ranks(scores, target, subset.flip(1), exclude), ranks(within, zero, one))  # the order of members is free
    louder = scores.clone().scatter_(1, subset, scores.gather(1, subset) - 100)  # all outsiders now score higher
    assert_close(subset_ranks(louder, target, subset, exclude), ranks(within, zero, one))


def test_subset_ranks_refuse_bad_members():
    scores, target = torch.rand(2, 4), torch.tensor([0, 1])
    for subset, message in [([[0, 1], [1, 4]], r"subset column 1\[1\] is 4, outside"), ([[0, 1]], r"subset must be \(2,S\), not \(1, 2\)"),
                            ([[0, 1], [0, 2]], "the subset of query 1 does not hold its target")]:
        with pytest.raises(ValueError, match=message): subset_ranks(scores, target, torch.tensor(subset))


# ---- average precision and the first image

@given(seed=st.integers(0, 999), excluding=st.booleans())
def test_average_precision_is_the_loop(seed, excluding):
    scores, right, exclude = random_queries(seed)
    expected = [loop_average_precision(row.tolist(), r.nonzero()[:, 0].tolist(), e if excluding else None)
                for row, r, e in zip(scores, right, exclude.tolist())]
    assert_close(average_precision(scores, right, exclude if excluding else None), torch.tensor(expected))


@given(seed=st.integers(0, 999))
def test_average_precision_does_not_depend_on_the_order_of_the_gallery(seed):
    scores, right, exclude = random_queries(seed)
    moved = torch.randperm(scores.shape[1], generator=generator(seed, "moved"))
    assert_close(average_precision(scores[:, moved], right[:, moved], moved.argsort()[exclude]), average_precision(scores, right, exclude))


def test_average_precision_takes_infinite_scores():
    scores = torch.tensor([[float("inf"), 1.0, 0.0, float("-inf")]])
    right = torch.tensor([[False, True, False, True]])
    assert_close(average_precision(scores, right), torch.tensor([(1 / 2 + 2 / 4) / 2]))
    assert_close(average_precision(scores, right, [0]), torch.tensor([(1 + 2 / 3) / 2]))
    assert_close(average_precision(scores, right, [3]), torch.tensor([1 / 2]))  # an excluded right answer is not missed


@given(seed=st.integers(0, 999), excluding=st.booleans())
def test_first_image_is_the_one_that_top_k_shows(seed, excluding):
    g = generator(seed, "first")
    query, gallery = (torch.randint(-1, 2, shape, generator=g).float() for shape in [(6, 2), (8, 2)])
    _, right, exclude = random_queries(seed)
    exclude = exclude if excluding else None
    _, first = top_k(query, gallery, 1, exclude)
    assert_close(top1_valid(similarity(query, gallery), right, exclude), right.gather(1, first)[:, 0])


@pytest.mark.parametrize("measure", [average_precision, top1_valid])
def test_relevance_is_checked(measure):
    scores, right = torch.rand(2, 3), torch.tensor([[True, True, False], [True, False, False]])
    with pytest.raises(ValueError, match="query 1 has no right answer"): measure(scores, right, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"relevant must be bool \(2, 3\), not torch.bool \(2, 2\)"): measure(scores, right[:, :2])
    with pytest.raises(ValueError, match="scores of query 0 hold NaN"): measure(torch.full((2, 3), float("nan")), right)


# ---- precision of lists

@given(st.data())
def test_list_precision_is_the_loop(data):
    rows = [data.draw(st.permutations(range(12))) for _ in range(3)]
    length = data.draw(st.integers(1, 12))
    relevant = [data.draw(st.sets(st.integers(0, 14), min_size=1)) for _ in rows]
    predictions = torch.tensor(rows)[:, :length]
    ks = [1, 5, 10, 50]
    expected = {k: 100 * statistics.fmean(loop_list_precision(row[:length], right, k) for row, right in zip(rows, relevant)) for k in ks}
    assert mean_average_precision_at_k(predictions, relevant, ks) == pytest.approx(expected, abs=1e-9)


def test_listed_ranks_never_count_what_is_not_listed():
    found = listed_ranks(torch.tensor([[3, 1, 2]] * 3), torch.tensor([2, 3, 9]))
    assert found[:2].tolist() == [3, 1]
    assert recall_at_k(found, [3, 50, 10**9]) == pytest.approx({3: 200 / 3, 50: 200 / 3, 10**9: 200 / 3})


# ---- preferences

answers = st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2), st.sampled_from([1, 2])), min_size=1, max_size=30)


@given(answers)
def test_preferences_are_the_loop(rows):
    one, two, choice = (torch.tensor(column) for column in zip(*rows))
    asked = [c for a, b, c in rows if a > b]
    assert preference_ratio(one, two, choice) == pytest.approx(sum(c == 1 for c in asked) / len(asked) if asked else 0)
    agreed = [.5 if a == b else float((a > b) == (c == 1)) for a, b, c in rows]
    assert preference_agreement(one, two, choice) == pytest.approx(statistics.fmean(agreed))
    assert preference_agreement(one, two, choice) + preference_agreement(two, one, choice) == pytest.approx(1)


@pytest.mark.parametrize("one, two, choice, message", [
    ([.1], [.2, .3], [1, 2], r"must be \(Q,\) alike"), ([], [], [], r"with Q > 0"), ([.1, float("nan")], [.2, .3], [1, 2], "question 1 has a score of NaN"),
    ([.1], [.2], [0], "question 0 has a choice that is neither 1 nor 2")])
def test_preferences_refuse_bad_questions(one, two, choice, message):
    for measure in (preference_ratio, preference_agreement):
        with pytest.raises(ValueError, match=message): measure(torch.tensor(one), torch.tensor(two), torch.tensor(choice))


# ---- chance: the mean over every order there is

@pytest.mark.parametrize("images, right", [(1, 1), (4, 1), (4, 2), (5, 5), (6, 3)])
def test_chance_is_the_mean_over_all_orders(images, right):
    orders = torch.tensor(list(itertools.permutations(range(images))))
    relevant = torch.zeros(len(orders), images, dtype=torch.bool)
    relevant[:, :right] = True
    assert chance_average_precision(images, right).item() == pytest.approx(average_precision(orders.double(), relevant).double().mean().item(), abs=1e-6)
    for k in (1, 2, 5, 50):
        measured = mean_average_precision_at_k(orders, [set(range(right))] * len(orders), [k])[k]
        assert 100 * chance_average_precision(images, right, k).item() == pytest.approx(measured)
        first = torch.zeros(len(orders), dtype=torch.long)
        assert chance_recall_at_k(images, [k])[k] == pytest.approx(recall_at_k(ranks(orders.float(), first), [k])[k])
    assert top1_valid(orders.float(), relevant).double().mean().item() == pytest.approx(right / images)


def test_chance_takes_one_number_or_one_per_query():
    for k in (4, 7, None):
        each = chance_average_precision([5, 9, 700], [1, 3, 13], k)
        assert_close(each, torch.stack([chance_average_precision(n, m, k) for n, m in [(5, 1), (9, 3), (700, 13)]]))
    for candidates, relevant in [(5, 0), (5, 6)]:
        with pytest.raises(ValueError, match="at least one right answer"): chance_average_precision(candidates, relevant)


# ---- reference results

def load(golden, name): return json.loads(golden(f"{name}.json").read_text())


def check_circo(predictions, target, relevant, aspects, expected):
    "All three kinds of CIRCO figures; `aspects` maps a name to the rows of its queries."
    ks = [int(k) for k in expected["map_at"]]
    assert {str(k): v / 100 for k, v in mean_average_precision_at_k(predictions, relevant, ks).items()} == pytest.approx(expected["map_at"], abs=1e-9)
    recalls = recall_at_k(listed_ranks(predictions, target), ks)
    assert {str(k): v / 100 for k, v in recalls.items()} == pytest.approx(expected["recall_at"], abs=1e-9)
    by_aspect = {name: mean_average_precision_at_k(predictions[rows], [relevant[i] for i in rows], [10])[10] / 100 for name, rows in aspects.items()}
    assert by_aspect == pytest.approx(expected["semantic_map_at10"], abs=1e-9)


@pytest.mark.parametrize("run, predicted, length", [("seeded", "predictions", 50), ("seeded_first7_only", "predictions", 7),
                                                     ("shipped_submission_val", "shipped_predictions", 50)])
def test_circo(golden, run, predicted, length):
    arrays, expected = np.load(golden("circo_metrics.npz")), load(golden, "circo_metrics")
    relevant = [set(part.tolist()) for part in np.split(arrays["gt_flat"], arrays["gt_count"].cumsum()[:-1])]
    aspects = {str(name): arrays["aspects"][:, i].nonzero()[0].tolist() for i, name in enumerate(arrays["aspect_names"])}
    predictions, target = (torch.from_numpy(arrays[name]).long() for name in (predicted, "target"))
    check_circo(predictions[:, :length], target, relevant, aspects, expected[run])


def test_circo_synthetic(golden):
    made = load(golden, "circo_synthetic")
    queries = made["annotations"]
    predictions = torch.tensor([made["predictions"][str(query["id"])] for query in queries])
    names = sorted({name for query in queries for name in query["semantic_aspects"]})
    aspects = {name: [i for i, query in enumerate(queries) if name in query["semantic_aspects"]] for name in names}
    check_circo(predictions, torch.tensor([q["target_img_id"] for q in queries]), [set(q["gt_img_ids"]) for q in queries], aspects, made["expected"])


def test_preference_synthetic(golden):
    made = load(golden, "preference_synthetic")
    one, two, choice = (torch.tensor(made[name]) for name in ("score1", "score2", "user_choice"))
    assert one[:15].equal(two[:15])
    assert preference_ratio(one, two, choice) == made["expected"]
    assert preference_ratio(torch.minimum(one, two), two, choice) == made["expected_where_set1_is_never_preferred"]


def test_hp_fashioniq(golden):
    arrays, expected = np.load(golden("hp_fashioniq.npz")), load(golden, "hp_fashioniq")
    query, tokens = (normalize(torch.from_numpy(arrays[name]).float(), dim=-1) for name in ("query", "target_tokens"))
    scores = similarity(query, tokens)
    one, two = (scores.gather(1, torch.from_numpy(arrays[name]).long()).mean(1) for name in ("set1", "set2"))
    choice = torch.from_numpy(arrays["user_choice"])
    assert_close(one, torch.from_numpy(arrays["score1"]), rtol=0, atol=1e-5)
    same = torch.from_numpy((np.sort(arrays["set1"]) == np.sort(arrays["set2"])).all(1))
    assert same.sum() == expected["n_question_with_the_same_five_images_in_both_sets"]
    asked = one[~same] > two[~same]
    assert asked.sum() == expected["n_model_prefers_set1_without_those"]
    assert (choice[~same][asked] == 1).sum() == expected["n_of_those_user_prefers_set1"]
    assert preference_ratio(one[~same], two[~same], choice[~same]) == expected["preference_ratio_without_those"]
    assert preference_agreement(one, two, choice) == pytest.approx(expected["symmetric_agreement_for_information"], abs=int(same.sum()) / len(same))
