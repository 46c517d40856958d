"""Which queries fail and what they are mistaken for, and how similar pairs are: worked by hand or by brute force."""

import math

import numpy as np
import pytest
import torch
from helpers import LargestTensor, angles, clusters, judged
from scipy import stats

from cbml.errors import UserError
from cbml.evaluation.metrics import evaluate
from cbml.evaluation.retrieval import unit_vectors
from cbml.evaluation.similarities import pair_similarities
from cbml.report.common import queries

# Who is right


def test_a_query_is_judged_as_evaluate_does():
    embeddings, labels = clusters(9, 5, noise=1.5)
    embeddings[7] = embeddings[20]  # a tie
    found = judged(embeddings, labels)
    right = found.right[found.has_answer]
    assert 100 * right.mean() == pytest.approx(evaluate(embeddings, labels)["recall_at_1"])
    assert 0.1 < right.mean() < 0.9


def test_equal_embeddings_are_all_wrong():
    labels = torch.tensor([4, 4, 4, 9, 9, 9])
    found = judged(angles(*[30] * 6), labels)
    assert not found.right.any()
    assert found.nearest.tolist() == [3, 3, 3, 0, 0, 0]


def test_what_float32_cannot_tell_apart_is_a_tie():
    labels = torch.tensor([0, 0, 1])
    for degrees, right in ((10 + 1e-6, False), (10.1, True)):
        found = judged(angles(0, 10, -degrees), labels)
        assert found.right[0] == right
        assert found.nearest[0] == (1 if right else 2)


def test_the_nearest_image_of_each_query():
    labels = torch.tensor([0, 0, 5, 5, 8, 0])
    found = judged(angles(0, 50, 10, 170, 180, 51), labels)
    assert found.label.tolist() == labels.tolist()
    assert found.nearest.tolist() == [2, 5, 0, 4, 3, 1]
    assert found.nearest_label.tolist() == [5, 0, 0, 8, 5, 0]
    assert found.right.tolist() == [False, True, False, False, False, True]
    assert found.has_answer.tolist() == [True, True, True, True, False, True]
    np.testing.assert_allclose(found.similarity, [math.cos(math.radians(d)) for d in (10, 1, 10, 10, 10, 1)])


def test_the_first_neighbour_alone_judges():
    embeddings, labels = clusters(9, 5)
    assert judged(embeddings, labels, k=1).equals(judged(embeddings, labels, k=8))


# Which queries are shown


def test_queries_are_one_a_class_with_an_answer_and_do_not_depend_on_the_model():
    labels = torch.tensor([3, 3, 3, 5, 8, 8, 11, 11])
    picks = set()
    for seed in range(20):
        a, b = (judged(torch.randn(8, 4), labels) for _ in "ab")
        chosen = queries.pick(a, 2, seed)
        assert chosen == queries.pick(b, 2, seed)
        of = labels[chosen].tolist()
        assert len(set(of)) == 2 and 5 not in of
        picks.add(tuple(chosen))
    assert len(picks) > 3


def test_more_queries_than_classes_are_one_of_each():
    found = judged(*clusters(3, 4))
    chosen = queries.pick(found, 8, 0)
    assert sorted(found.label[chosen]) == sorted(found.label.unique())


def test_failures_are_ordered_by_similarity_and_each_pair_is_shown_once():
    embeddings = angles(0, 4, 100, 106, 200, 208, 300, 301, 309)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2, 4])
    failed = queries.failures(judged(embeddings, labels))
    assert failed.index.tolist() == [0, 1, 2, 3, 4, 5]
    # query 1 is 0 the other way round, and 2 and 5 are of the class of 0
    assert queries.surest(failed, 8) == [0, 3, 4]
    assert queries.surest(failed, 1) == [0]


def models(*rights, labels):
    """What `judge` says of models that answer these queries rightly; similarities do not matter."""
    labels, answer = np.array(labels), {}
    for label in labels:
        answer[label] = np.flatnonzero(labels == label)
    wrong = {label: np.flatnonzero(labels != label)[0] for label in labels}
    found = []
    for right in rights:
        nearest = [
            next((i for i in answer[label] if i != query), wrong[label]) if query in right else wrong[label]
            for query, label in enumerate(labels)
        ]
        found.append(queries.judge(np.array(nearest)[:, None], np.ones((len(labels), 1)), labels))
    return found


def test_the_queries_that_models_are_most_divided_on_come_first_one_of_a_class():
    labels = [2, 2, 2, 5, 5, 8, 8, 9, 9]
    several = models(
        {0, 1, 3, 5, 6}, {0, 1, 5, 6}, {0, 2, 5, 6}, {0, 5, 7}, labels=labels
    )  # right by 4 2 1 1 0 4 3 1 0
    firsts = {tuple(queries.divided(several, seed)) for seed in range(20)}
    assert {chosen[0] for chosen in firsts} == {1}
    assert {chosen[1:] for chosen in firsts} == {(3, 6, 7), (3, 7, 6), (6, 3, 7), (6, 7, 3), (7, 3, 6), (7, 6, 3)}
    assert queries.divided(several[:1], 0) == []


def test_chosen_images_are_some_of_some_classes_in_order():
    labels = np.array([4, 9, 9, 4, 2, 9, 4, 9])
    picks = set()
    for seed in range(20):
        chosen = queries.choose(labels, 2, 3, seed)
        assert chosen.tolist() == sorted(set(chosen.tolist())) == queries.choose(labels, 2, 3, seed).tolist()
        of, counts = np.unique(labels[chosen], return_counts=True)
        assert counts.tolist() == [min(3, (labels == label).sum()) for label in of] and len(of) == 2
        picks.add(tuple(chosen.tolist()))
    assert len(picks) > 5
    assert queries.choose(labels, 9, 9, 0).tolist() == list(range(8))


# Two models


def test_two_models_are_compared_class_by_class():
    labels = [4] * 8 + [7] * 4 + [9]  # 9 has no answer
    first, second = models({0, 1, 8, 9, 10, 11}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 11}, labels=labels)
    table = queries.compare(first, second)
    assert table.index.tolist() == [4, 7]
    assert table[["queries", "both", "only_first", "only_second"]].to_numpy().tolist() == [[8, 1, 1, 6], [4, 3, 1, 0]]
    # 4: (1 + 7) / 2^7 on either side; 7: 1 of 1.
    assert table.p.tolist() == pytest.approx([0.125, 1])
    assert table.p_corrected.tolist() == pytest.approx([0.25, 1])
    turned = queries.compare(second, first)
    assert turned.only_first.tolist() == table.only_second.tolist() and turned.p.tolist() == table.p.tolist()


def test_the_exact_mcnemar_test_is_a_binomial_test():
    rng = np.random.default_rng(0)
    only_first, only_second = rng.integers(0, 40, (2, 50))
    expected = [stats.binomtest(int(a), int(a + b)).pvalue for a, b in zip(only_first, only_second, strict=True)]
    assert queries.mcnemar(only_first, only_second).tolist() == pytest.approx(expected)
    assert queries.mcnemar(0, 0) == 1 and queries.mcnemar(3, 3) == 1


def test_p_values_are_corrected_as_holm_does():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(12), 20)
    first, second = models(*(set(np.flatnonzero(rng.random(240) < share)) for share in (0.3, 0.6)), labels=labels)
    table = queries.compare(first, second)
    assert table.p.is_monotonic_increasing and len(table) == 12
    literal = [min(1, max((12 - j) * p for j, p in enumerate(table.p[: i + 1]))) for i in range(12)]
    assert table.p_corrected.tolist() == pytest.approx(literal) and 0 < literal[0] < 1


# classes.csv and confusions


def worked_example():
    """Class 7: none of three right; 2: none of three, twice nearest to 7 and once to 9; 9: one image; 4: both right."""
    labels = [7, 7, 2, 2, 7, 2, 9, 4, 4]
    degrees = [0, 10, 13, -4, 100, 200, 203, 300, 301]
    # 7: 0 → -4 (2) wrong, 10 → 13 (2) wrong, 100 → 13 (2) wrong; 2: 13 → 10, -4 → 0 (7), 200 → 203 (9)
    return judged(angles(*degrees), torch.tensor(labels))


def test_class_table():
    table = queries.class_table(worked_example(), {7: "seven", 2: "two", 9: "nine", 4: "four"})
    rows = table.astype(object).where(table.notna(), None).to_numpy().tolist()
    assert list(table) == ["class", "images", "recall_at_1", "confused_with"]
    assert rows == [
        ["seven", 3, 0.0, "two"],
        ["two", 3, 0.0, "seven"],
        ["four", 2, 100.0, None],
        ["nine", 1, None, None],
    ]


def test_class_table_adds_up_to_recall_at_1():
    embeddings, labels = clusters(12, 6, noise=1.5)
    table = queries.class_table(judged(embeddings, labels), {label: f"{label:02}" for label in labels.tolist()})
    mean = (table.recall_at_1 * table.images).sum() / table.images.sum()
    assert mean == pytest.approx(evaluate(embeddings, labels)["recall_at_1"])
    assert table.recall_at_1.is_monotonic_increasing and 10 < mean < 90


def test_without_a_failure_no_class_is_confused():
    embeddings, labels = clusters(4, 5, noise=0.01)
    found = judged(embeddings, labels)
    table = queries.class_table(found, {label: f"{label}" for label in labels.tolist()})
    assert len(table) == 4 and table.confused_with.isna().all() and (table.recall_at_1 == 100).all()
    assert not len(queries.confusions(found)) and queries.surest(queries.failures(found), 8) == []


def test_confusions_are_counted_by_pair():
    pairs = queries.confusions(worked_example())
    columns = ["label", "nearest_label", "count", "queries", "query", "nearest"]
    # the most frequent first; of three failures the example is the surest, 10° with 13°
    assert pairs[columns].to_numpy().tolist() == [[7, 2, 3, 3, 1, 2], [2, 7, 2, 3, 2, 1], [2, 9, 1, 3, 5, 6]]
    assert pairs.share.tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    assert pairs.similarity.tolist() == pytest.approx([math.cos(math.radians(3))] * 3)


# Similarities


@pytest.mark.parametrize("block", [1, 50, 10**6])
def test_similarities_are_those_of_all_pairs(block):
    embeddings, labels = clusters(5, 7)
    densities, moments = pair_similarities(embeddings, labels, block=block)
    unit = embeddings.double() / embeddings.double().norm(dim=1, keepdim=True)
    later = torch.ones(35, 35).triu(1).bool()
    for pair, same in (("positive", True), ("negative", False)):
        values = (unit @ unit.T)[later & ((labels[:, None] == labels) == same)].numpy()
        assert moments[pair]["pairs"] == len(values)
        assert moments[pair]["mean"] == pytest.approx(values.mean())
        assert moments[pair]["variance"] == pytest.approx(values.var())
        table = densities[densities.pair == pair]
        width = 2 / len(table)
        assert (table.density * width).sum() == pytest.approx(1)
        counts, edges = np.histogram(values, len(table), (-1, 1))
        np.testing.assert_allclose(table.density * width * len(values), counts, atol=1e-9)
        np.testing.assert_allclose(table.similarity, (edges[:-1] + edges[1:]) / 2)


def test_equal_and_opposite_pairs_are_counted():
    densities, moments = pair_similarities(torch.tensor([[3.0, 1], [3, 1], [-3, -1]]), torch.zeros(3))
    assert moments["positive"]["pairs"] == 3
    assert densities.density.iloc[[0, -1]].tolist() == pytest.approx([2 / 3 * 200, 1 / 3 * 200])
    assert moments["negative"] == {"mean": None, "variance": None, "pairs": 0}
    assert set(densities.pair) == {"positive"}


def test_one_image_makes_no_pair():
    densities, moments = pair_similarities(torch.ones(1, 3), torch.zeros(1))
    assert list(densities) == ["pair", "similarity", "density"] and not len(densities)
    assert [values["pairs"] for values in moments.values()] == [0, 0]


def test_rounding_beyond_one_loses_no_pair():
    embeddings = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    unit = unit_vectors(embeddings, "test")
    assert (unit @ unit.T).max() > 1
    _, moments = pair_similarities(embeddings, torch.arange(60).repeat(2))
    assert moments["positive"]["pairs"] == 60 and moments["negative"]["pairs"] == 120 * 119 // 2 - 60


def test_negative_pairs_are_those_of_some_images_where_there_are_many():
    embeddings, labels = clusters(20, 30)
    every, some = (pair_similarities(embeddings, labels, sample=sample) for sample in (600, 200))
    assert every[1]["negative"]["pairs"] == 600 * 599 // 2 - 20 * 30 * 29 // 2
    assert some[1]["positive"] == pytest.approx(every[1]["positive"])
    assert 0.9 < some[1]["negative"]["pairs"] / (200 * 199 // 2) < 1
    assert some[1]["negative"]["mean"] == pytest.approx(every[1]["negative"]["mean"], abs=0.02)
    assert some[1]["negative"]["variance"] == pytest.approx(every[1]["negative"]["variance"], rel=0.1)
    assert some[0].equals(pair_similarities(embeddings, labels, sample=200)[0])


def test_memory_of_pairs_is_bounded():
    embeddings, labels = clusters(20, 75)
    with LargestTensor() as largest:
        pair_similarities(embeddings, labels, block=20_000)
    assert embeddings.numel() <= largest.elements <= 40_000  # the positions of a mask's members are two numbers each


def test_pairs_of_embeddings_that_are_not_finite():
    with pytest.raises(UserError, match="embedding of image 1 is not finite"):
        pair_similarities(torch.tensor([[1.0, 0], [math.nan, 1]]), torch.zeros(2))
