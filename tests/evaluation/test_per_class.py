"""Recall@1 by class, and some images of some classes: worked by hand."""

import numpy as np
import pytest
import torch
from helpers import angles, clusters, judged

from cbml.evaluation.metrics import evaluate
from cbml.evaluation.per_class import class_table, sample_images
from cbml.evaluation.retrieval import retrieve


def table_of(embeddings, labels, names=None):
    indices, similarities = (each[:, 0].numpy() for each in retrieve(embeddings, labels, 1))
    return class_table(
        labels.numpy(), indices, similarities, names or {label: f"{label:02}" for label in labels.tolist()}
    )


def worked_example():
    """Class 7: none of three right; 2: none of three, twice nearest to 7 and once to 9; 9: one image; 4: both right."""
    labels = [7, 7, 2, 2, 7, 2, 9, 4, 4]
    degrees = [0, 10, 13, -4, 100, 200, 203, 300, 301]
    # 7: 0 → -4 (2) wrong, 10 → 13 (2) wrong, 100 → 13 (2) wrong; 2: 13 → 10, -4 → 0 (7), 200 → 203 (9)
    return angles(*degrees), torch.tensor(labels)


def test_class_table():
    table = table_of(*worked_example(), {7: "seven", 2: "two", 9: "nine", 4: "four"})
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
    table = table_of(embeddings, labels)
    mean = (table.recall_at_1 * table.images).sum() / table.images.sum()
    assert mean == pytest.approx(evaluate(embeddings, labels)["recall_at_1"])
    assert table.recall_at_1.is_monotonic_increasing and 10 < mean < 90


def test_without_a_failure_no_class_is_confused():
    table = table_of(*clusters(4, 5, noise=0.01))
    assert len(table) == 4 and table.confused_with.isna().all() and (table.recall_at_1 == 100).all()


def test_of_equally_frequent_confusions_the_surest_is_named():
    # 0: once nearest to 1, at 9°, and once to 2, at 4°.
    table = table_of(angles(0, 9, 100, 104, 250), torch.tensor([0, 1, 0, 2, 2]))
    assert table.set_index("class").confused_with["00"] == "02"


def test_classes_of_queries_with_a_gallery():
    """3 has no image in the gallery; 9 has one there and none among the other queries."""
    labels = np.array([3, 3, 9, 5, 5, 9, 5])  # the first four are the queries
    table = class_table(labels, np.array([4, 6, 5, 5]), np.full(4, 0.5), {3: "a", 5: "b", 9: "c"})
    rows = table.astype(object).where(table.notna(), None).to_numpy().tolist()
    assert rows == [["b", 1, 0.0, "c"], ["c", 1, 100.0, None], ["a", 2, None, None]]


def test_pages_judge_queries_as_the_table_of_classes_does():
    embeddings, labels = clusters(12, 6, noise=1.5)
    found = judged(embeddings, labels)
    expected = 100 * found[found.has_answer].groupby("label").right.mean()
    table = table_of(embeddings, labels).set_index("class").recall_at_1
    assert {int(name): recall for name, recall in table.items()} == pytest.approx(expected.to_dict())


def test_chosen_images_are_some_of_some_classes_in_order():
    labels = np.array([4, 9, 9, 4, 2, 9, 4, 9])
    picks = set()
    for seed in range(20):
        chosen = sample_images(labels, 2, 3, seed)
        assert chosen.tolist() == sorted(set(chosen.tolist())) == sample_images(labels, 2, 3, seed).tolist()
        of, counts = np.unique(labels[chosen], return_counts=True)
        assert counts.tolist() == [min(3, (labels == label).sum()) for label in of] and len(of) == 2
        picks.add(tuple(chosen.tolist()))
    assert len(picks) > 5
    assert sample_images(labels, 9, 9, 0).tolist() == list(range(8))
