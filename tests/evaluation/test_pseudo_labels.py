"""The table of pseudo-labels, on clusters whose figures can be counted by hand."""

import numpy as np
import pytest

from cbml.evaluation.pseudo_labels import pseudo_label_table


def test_purity_changes_and_sizes_are_those_that_one_counts():
    labels = np.array([7, 7, 7, 3, 3, 3])
    history = np.array([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, -3], [2, 2, 2, 0, 0, 0]])
    table = pseudo_label_table(history, labels)
    assert table.refresh.tolist() == [0, 1, 2]
    assert table.purity.tolist() == pytest.approx([500 / 6, 100, 100])
    assert table.kept_purity.tolist() == pytest.approx([500 / 6, 100, 100])
    assert table.nmi[2] == pytest.approx(100) and table.nmi[0] < 99
    assert np.isnan(table.changed[0]) and table.changed[1:].tolist() == pytest.approx([200 / 6, 100])
    assert table[["clusters", "smallest", "median", "largest"]].values.tolist() == [
        [2, 2, 3, 4],
        [3, 1, 2, 3],
        [2, 3, 3, 3],
    ]


def test_what_is_left_out_counts_in_purity_alone():
    labels = np.array([0, 0, 1, 1])
    table = pseudo_label_table(np.array([[0, 0, -1, 1]]), labels)
    assert table.purity[0] == pytest.approx(75) and table.kept_purity[0] == 100
