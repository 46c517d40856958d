"""Where the time of a run goes, and what is written down of it."""

import pytest
import torch

from cbml.errors import UserError
from cbml.training import clock
from cbml.training.clock import Clock
from cbml.training.history import History


@pytest.fixture
def after(monkeypatch):
    """A function that lets seconds pass."""
    now = [100.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])

    def pass_by(seconds):
        now[0] += seconds

    return pass_by


def test_time_is_of_one_kind_and_batches_are_a_part_of_training(after):
    watch = Clock()
    for kind, seconds in (("data", 1), ("refresh", 20), ("data", 2), ("train", 5), (None, 100), ("validation", 7)):
        watch.start(kind)
        after(seconds)
    watch.start(None)
    assert watch.seconds == {"train": 1 + 2 + 5, "data": 1 + 2, "refresh": 20, "validation": 7}


def test_the_speed_is_that_since_the_last_time_also_of_a_run_that_goes_on(after):
    watch = Clock({"train": 50.0, "data": 5.0, "refresh": 0.0, "validation": 0.0}, images=1000)
    for images, data, train in ((1080, 1, 3), (1100, 1, 1)):
        watch.start("data")
        after(data)
        watch.start("train")
        after(train)
        watch.start(None)
        speed = watch.throughput(images)
        assert speed["train_data_percent"] == 100 * data / (data + train)
        assert speed["train_images_per_second"] == {1080: 20, 1100: 10}[images]
    assert watch.seconds["train"] == 56


def step(history, iteration, loss):
    history.step(iteration, 0.1, torch.tensor(loss), {"positive": torch.tensor(1.0), "negative": torch.tensor(2.0)})


def test_rows_are_logged_once_in_order_and_kept():
    logged = []
    history = History("cell", logged.extend, [{"iteration": 1, "loss": 9.0}], [{"iteration": 0, "recall": 50.0}])
    step(history, 2, 3.0)
    assert not logged and len(history.losses) == 1  # still on the device
    history.settle()
    history.validated({"iteration": 2, "recall": 40.0})
    history.flush({"iteration": 2, "speed": 1.0})
    history.flush()
    row = {"iteration": 2, "loss": 3.0, "lr": 0.1, "loss_positive": 1.0, "loss_negative": 2.0}
    assert logged == [row, {"iteration": 2, "recall": 40.0}, {"iteration": 2, "speed": 1.0}]
    assert history.losses == [{"iteration": 1, "loss": 9.0}, row] and len(history.validations) == 2


def test_what_is_not_finite_stops_and_what_was_before_it_is_logged():
    logged = []
    history = History("cell", logged.extend)
    for iteration, loss in enumerate((1.0, 2.0, float("inf"), 3.0), 1):
        step(history, iteration, loss)
    with pytest.raises(UserError, match="cell: the loss is not finite at iteration 3 "):
        history.settle()
    assert [row["loss"] for row in logged] == [1.0, 2.0]


def test_the_best_is_the_first_of_the_highest_of_a_trained_network():
    history = History("cell", print)
    history.validated({"iteration": 0, "recall": 99.0})
    assert history.best("recall") == 0
    for iteration, recall in ((2, 10.0), (4, 30.0), (6, 30.0)):
        history.validated({"iteration": iteration, "recall": recall})
    assert history.best("recall") == 4
