"""Which queries fail and what for, and how two models differ on them: worked by hand or by brute force."""

import math

import numpy as np
import pytest
import torch
from helpers import angles, clusters, judged
from scipy import stats

from cbml.evaluation.metrics import evaluate
from cbml.report.cell.failures import confusions, failures, surest
from cbml.report.common.queries import judge, sample_queries
from cbml.report.tables.paired import compare_by_class, divided, mcnemar

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
        chosen = sample_queries(a, 2, seed)
        assert chosen == sample_queries(b, 2, seed)
        of = labels[chosen].tolist()
        assert len(set(of)) == 2 and 5 not in of
        picks.add(tuple(chosen))
    assert len(picks) > 3


def test_more_queries_than_classes_are_one_of_each():
    found = judged(*clusters(3, 4))
    chosen = sample_queries(found, 8, 0)
    assert sorted(found.label[chosen]) == sorted(found.label.unique())


def test_failures_are_ordered_by_similarity_and_each_pair_is_shown_once():
    embeddings = angles(0, 4, 100, 106, 200, 208, 300, 301, 309)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2, 4])
    failed = failures(judged(embeddings, labels))
    assert failed.index.tolist() == [0, 1, 2, 3, 4, 5]
    # query 1 is 0 the other way round, and 2 and 5 are of the class of 0
    assert surest(failed, 8) == [0, 3, 4]
    assert surest(failed, 1) == [0]


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
        found.append(judge(np.array(nearest)[:, None], np.ones((len(labels), 1)), labels))
    return found


def test_the_queries_that_models_are_most_divided_on_come_first_one_of_a_class():
    labels = [2, 2, 2, 5, 5, 8, 8, 9, 9]
    several = models(
        {0, 1, 3, 5, 6}, {0, 1, 5, 6}, {0, 2, 5, 6}, {0, 5, 7}, labels=labels
    )  # right by 4 2 1 1 0 4 3 1 0
    firsts = {tuple(divided(several, seed)) for seed in range(20)}
    assert {chosen[0] for chosen in firsts} == {1}
    assert {chosen[1:] for chosen in firsts} == {(3, 6, 7), (3, 7, 6), (6, 3, 7), (6, 7, 3), (7, 3, 6), (7, 6, 3)}
    assert divided(several[:1], 0) == []


def test_each_of_two_models_is_right_alone_among_the_first_queries():
    labels = [label for label in range(8) for _ in range(2)]
    several = models({0, 2, 4, 6, 8, 10}, {14}, labels=labels)
    for seed in range(10):
        chosen = divided(several, seed)
        assert 14 in chosen[:2] and len(chosen) == 7


# Two models


def test_two_models_are_compared_class_by_class():
    labels = [4] * 8 + [7] * 4 + [9]  # 9 has no answer
    first, second = models({0, 1, 8, 9, 10, 11}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 11}, labels=labels)
    table = compare_by_class(first, second)
    assert table.index.tolist() == [4, 7]
    assert table[["queries", "both", "only_first", "only_second"]].to_numpy().tolist() == [[8, 1, 1, 6], [4, 3, 1, 0]]
    # 4: (1 + 7) / 2^7 on either side; 7: 1 of 1.
    assert table.p.tolist() == pytest.approx([0.125, 1])
    assert table.p_corrected.tolist() == pytest.approx([0.25, 1])
    turned = compare_by_class(second, first)
    assert turned.only_first.tolist() == table.only_second.tolist() and turned.p.tolist() == table.p.tolist()


def test_the_exact_mcnemar_test_is_a_binomial_test():
    rng = np.random.default_rng(0)
    only_first, only_second = rng.integers(0, 40, (2, 50))
    expected = [stats.binomtest(int(a), int(a + b)).pvalue for a, b in zip(only_first, only_second, strict=True)]
    assert mcnemar(only_first, only_second).tolist() == pytest.approx(expected)
    assert mcnemar(0, 0) == 1 and mcnemar(3, 3) == 1


def test_p_values_are_corrected_as_holm_does():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(12), 20)
    first, second = models(*(set(np.flatnonzero(rng.random(240) < share)) for share in (0.3, 0.6)), labels=labels)
    table = compare_by_class(first, second)
    assert table.p.is_monotonic_increasing and len(table) == 12
    literal = [min(1, max((12 - j) * p for j, p in enumerate(table.p[: i + 1]))) for i in range(12)]
    assert table.p_corrected.tolist() == pytest.approx(literal) and 0 < literal[0] < 1


# Confusions


def worked_example():
    """Class 7: none of three right; 2: none of three, twice nearest to 7 and once to 9; 9: one image; 4: both right."""
    labels = [7, 7, 2, 2, 7, 2, 9, 4, 4]
    degrees = [0, 10, 13, -4, 100, 200, 203, 300, 301]
    # 7: 0 → -4 (2) wrong, 10 → 13 (2) wrong, 100 → 13 (2) wrong; 2: 13 → 10, -4 → 0 (7), 200 → 203 (9)
    return judged(angles(*degrees), torch.tensor(labels))


def test_without_a_failure_there_is_none_to_show():
    embeddings, labels = clusters(4, 5, noise=0.01)
    found = judged(embeddings, labels)
    assert not len(confusions(found)) and surest(failures(found), 8) == []


def test_confusions_are_counted_by_pair():
    pairs = confusions(worked_example())
    columns = ["label", "nearest_label", "count", "queries", "query", "nearest"]
    # the most frequent first; of three failures the example is the surest, 10° with 13°
    assert pairs[columns].to_numpy().tolist() == [[7, 2, 3, 3, 1, 2], [2, 7, 2, 3, 2, 1], [2, 9, 1, 3, 5, 6]]
    assert pairs.share.tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    assert pairs.similarity.tolist() == pytest.approx([math.cos(math.radians(3))] * 3)
