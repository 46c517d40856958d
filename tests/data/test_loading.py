"""Batches made ahead: in order, no further ahead than asked, errors where they belong."""

import itertools
import threading

import pytest
import torch

from cbml.data.images import PackedImages
from cbml.data.loading import load_batches, prefetch


def test_results_come_in_order_although_later_ones_are_ready_first():
    later = [threading.Event() for _ in range(4)]

    def wait_for_the_next(i):
        assert later[i].wait(10)
        if i:
            later[i - 1].set()
        return i

    later[3].set()
    assert list(prefetch(wait_for_the_next, range(4), workers=4)) == [0, 1, 2, 3]


def test_no_more_is_under_way_than_there_are_workers():
    taken = []
    results = prefetch(lambda i: i, (taken.append(i) or i for i in itertools.count()), workers=3)
    assert [next(results), next(results)] == [0, 1]
    assert taken == [0, 1, 2, 3, 4]
    results.close()


def test_an_error_is_raised_in_place_of_its_result():
    results = prefetch(lambda i: 6 // i, [3, 2, 0, 1], workers=2)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_on_a_cpu_batches_are_made_when_asked_for_in_the_thread_that_asks():
    made = []

    def make(i):
        made.append(threading.current_thread())
        return (torch.tensor([i]),)

    images = PackedImages(torch.zeros(0, dtype=torch.uint8), torch.zeros(0, 2), torch.zeros(0))
    loaded = load_batches(make, itertools.count(), images, torch.device("cpu"))
    assert next(loaded) == [torch.tensor([0])] and made == [threading.current_thread()]
