"""The sampler of the published runs: P distinct classes × K images, pass by pass."""

from itertools import islice

import numpy as np
import pytest

from cbml.batches.classes import class_balanced_batches
from cbml.errors import UserError

LABELS = np.repeat(np.arange(6), [8, 9, 11, 3, 4, 12])


def test_every_batch_holds_distinct_classes_with_equal_shares():
    for batch in islice(class_balanced_batches(LABELS, 12, 4, seed=0), 50):
        classes = LABELS[batch].reshape(3, 4)
        assert (classes == classes[:, :1]).all() and len(set(classes[:, 0])) == 3


def test_a_pass_uses_each_image_once_and_tops_up_small_classes():
    # Groups of 4: 2, 2, 2, 1 (topped up), 1, 3 = 11. One class a batch, so a pass ends when all groups are used.
    batches = list(islice(class_balanced_batches(LABELS, 4, 4, seed=1), 11))
    used = np.bincount(np.concatenate(batches), minlength=len(LABELS))
    small = LABELS == 3
    assert used[~small].max() == 1 and used[small].sum() == 4 and used[small].min() >= 1
    assert [used[c == LABELS].sum() for c in range(6)] == [8, 8, 8, 4, 4, 12]


def test_order_depends_on_the_seed_and_the_pass_alone():
    a, b = (list(islice(class_balanced_batches(LABELS, 8, 4, seed), 30)) for seed in (0, 0))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, list(islice(class_balanced_batches(LABELS, 8, 4, 1), 30)))
    assert not np.array_equal(a[:5], a[5:10])


def test_more_classes_a_batch_than_exist():
    with pytest.raises(
        UserError, match=r"batch_size 28 / instances 4 = 7 classes a batch, but the training list has 6"
    ):
        class_balanced_batches(LABELS, 28, 4, seed=0)
