"""Which images make a batch: P distinct classes × K images, pass by pass; and batches that look at the images."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch.nn.functional import normalize

from cbml.errors import UserError
from cbml.samplers import kmeans as kmeans_module
from cbml.samplers.classes import class_balanced_batches
from cbml.samplers.config import AnyBatchSampler
from cbml.samplers.kmeans import kmeans
from cbml.samplers.neighbours import nearest
from cbml.samplers.subspaces import match_clusters


def recipe(batch_size, instances, iterations):
    return SimpleNamespace(batch_size=batch_size, instances=instances, iterations=iterations)


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
    message = "batch_size 28 / instances 4 = 7 classes a batch, but the training list has 6; there are enough with "
    with pytest.raises(UserError, match=message):
        class_balanced_batches(LABELS, 28, 4, seed=0)
    assert len(next(class_balanced_batches(LABELS, 28, 7, seed=0))) == 28


def look_at(**views):
    return lambda what: torch.as_tensor(views[what], dtype=torch.float32)


def blobs(counts, spread=0.05):
    """Points round the corners of a simplex, and which corner each is at."""
    corner = np.repeat(np.arange(len(counts)), counts)
    noise = np.random.default_rng(0).normal(0, spread, (len(corner), len(counts)))
    return torch.from_numpy(np.eye(len(counts))[corner] + noise).float(), corner


def same_partition(a, b):
    return len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(set(a.tolist())) == len(set(b.tolist()))


def test_kmeans_finds_what_is_apart_the_same_every_time():
    points, corner = blobs([30, 5, 20, 10, 40])
    clusters, centres = kmeans(points, 5, seed=0, starts=3)
    assert same_partition(clusters, corner)
    torch.testing.assert_close(centres[clusters[0]], points[:30].mean(0))
    again = kmeans(points, 5, seed=0, starts=3)
    assert torch.equal(clusters, again[0]) and torch.equal(centres, again[1])


def test_kmeans_goes_on_from_centres_so_that_numbers_persist_and_no_cluster_is_empty():
    points, corner = blobs([30, 5, 20])
    order = [2, 0, 1]
    centres = torch.eye(3)[order]
    clusters, _ = kmeans(points, 3, seed=0, centres=centres)
    assert clusters.tolist() == [order.index(each) for each in corner]
    # As a checkpoint keeps them on the CPU when points are on a GPU: of another kind than the points.
    assert torch.equal(kmeans(points, 3, seed=0, centres=centres.double())[0], clusters)
    centres[1] = 100.0  # far from every point
    clusters, _ = kmeans(points, 3, seed=0, centres=centres)
    assert (clusters.bincount(minlength=3) > 0).all()
    assert kmeans(points[:4], 4, seed=0)[0].sort().values.tolist() == [0, 1, 2, 3]


def test_kmeans_in_blocks_is_kmeans(monkeypatch):
    points, _ = blobs([10, 10, 10], spread=0.5)
    expected = kmeans(points, 4, seed=1)
    monkeypatch.setattr(kmeans_module, "BLOCK", 12)
    found = kmeans(points, 4, seed=1)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_clusters_keep_the_numbers_that_they_overlap_most():
    old, new = torch.tensor([0, 0, 1, 1, 2, 2, 2]), torch.tensor([2, 2, 0, 0, 0, 1, 1])
    assert match_clusters(new, old, 3).tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert match_clusters(match_clusters(new, old, 3), old, 3).tolist() == [0, 0, 1, 1, 1, 2, 2]


# Six classes of eight images, half of each class at either of two corners, the last class at the second alone.
CLASSES = np.repeat(np.arange(6), 8)
HALVES, CORNER = blobs([24, 24])
PLACES = np.argsort(np.argsort(np.where(CLASSES == 5, 1, np.arange(48) % 2), kind="stable"), kind="stable")


def subspaces(**changes):
    config = {"type": "subspaces", "clusters": 2, "refresh": 1.0, "whole": 0.25} | changes
    numbers = recipe(8, 2, 16), 0
    return TypeAdapter(AnyBatchSampler).validate_python(config).build(CLASSES, *numbers)


def test_a_batch_is_of_one_cluster_and_the_last_ones_are_of_all():
    batches, features = subspaces(), HALVES[PLACES]
    assert batches.period == 48 // 8 and batches.num_classes == 6
    drawn = []
    for number in range(3):
        batches.refresh(look_at(features=features), number)
        assert same_partition(batches.clusters, CORNER[PLACES])
        drawn += islice(batches.segment(number), batches.period)
    assert [each.task for each in drawn[:16]] == [0, 1] * 6 + [-1] * 4
    for each in drawn[:16]:
        assert each.indices.shape == (8,) and (each.labels == CLASSES[each.indices]).all()
        assert (np.bincount(each.labels) % 2 == 0).all()
        if each.task >= 0:
            assert (batches.clusters.numpy()[each.indices] == each.task).all()


def test_a_cluster_of_few_classes_draws_some_twice_and_single_images_are_left_out():
    batches = subspaces()
    batches.clusters = torch.from_numpy(np.where(CLASSES < 2, 0, 1))
    batches.clusters[47] = 0  # alone of its class there
    of_first = [each for each in islice(batches.segment(0), 6) if each.task == 0]
    assert of_first and all(len(each.indices) == 8 and set(each.labels) <= {0, 1} for each in of_first)
    batches.clusters = torch.zeros(48, dtype=torch.int64)
    assert {each.task for each in islice(batches.segment(0), 6)} == {0}  # the other has no images


def two_tasks(**changes):
    config = {"type": "two_tasks", "clusters": 4, "refresh": 1.0} | changes
    numbers = recipe(8, 2, 16), 0
    return TypeAdapter(AnyBatchSampler).validate_python(config).build(CLASSES, *numbers)


def test_batches_of_classes_and_of_clusters_across_them():
    batches = two_tasks(clusters=8, probability=1.0, foreign=0.0)
    assert batches.num_classes == 8
    batches.refresh(look_at(features=HALVES[PLACES]), 0)
    drawn = list(islice(batches.segment(0), 8))
    assert [each.task for each in drawn] == [0, 1] * 4
    for each in drawn:
        expected = (CLASSES, batches.clusters.numpy())[each.task]
        assert (each.labels == expected[each.indices]).all()
    assert {each.task for each in islice(two_tasks_with(batches, probability=0.0), 8)} == {0}
    foreign = [each for each in islice(two_tasks_with(batches, foreign=1.0), 8) if each.task == 1]
    assert foreign and all((batches.clusters.numpy()[each.indices] != each.labels).all() for each in foreign)


def two_tasks_with(others, **changes):
    batches = two_tasks(clusters=8, **changes)
    batches.load_state_dict(others.state_dict())
    return batches.segment(0)


def test_the_first_clusters_are_of_what_is_left_without_the_class():
    """The class is by far the largest difference between these images, and no cluster follows it."""
    which = np.arange(48) % 4
    features = np.concatenate([10 * np.eye(6)[CLASSES], np.eye(4)[which]], axis=1)
    batches = two_tasks()
    batches.refresh(look_at(features=features), 0)
    assert same_partition(batches.clusters, which)
    batches.refresh(look_at(shared=np.eye(4)[CLASSES % 4]), 1)
    assert same_partition(batches.clusters, CLASSES % 4)


@pytest.mark.parametrize("make", [subspaces, two_tasks])
def test_a_segment_is_a_function_of_the_state_and_its_number(make):
    first, second = make(), make()
    first.refresh(look_at(features=HALVES[PLACES]), 0)
    second.load_state_dict(first.state_dict())
    for a, b in zip(islice(first.segment(1), 6), islice(second.segment(1), 6), strict=True):
        assert np.array_equal(a.indices, b.indices) and np.array_equal(a.labels, b.labels) and a.task == b.task
    others = [each.indices.tolist() for each in islice(first.segment(2), 6)]
    assert others != [each.indices.tolist() for each in islice(first.segment(1), 6)]


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (subspaces, {"clusters": 49}, "49 clusters of 48 images"),
        (two_tasks, {"clusters": 3}, "3 clusters; allowed: from the 4 of a batch to the 48 images"),
        (two_tasks, {"clusters": 49}, "49 clusters; allowed: from the 4"),
    ],
)
def test_numbers_that_do_not_fit_together_are_one_line(make, changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def clusters(**changes):
    config = {"type": "clusters", "k": 4, "refresh": 1.0, "keep": 1.0} | changes
    numbers = recipe(8, 2, 16), 0
    return TypeAdapter(AnyBatchSampler).validate_python(config).build(np.zeros(48, dtype=np.int64), *numbers)


def test_clusters_stand_for_classes_and_keep_their_numbers():
    points, corner = blobs([20, 10, 10, 8])
    batches = clusters()
    assert batches.num_classes == 4
    for number in range(4):  # of features, then of embeddings
        batches.refresh(look_at(features=points, embeddings=points), number)
    assert all(same_partition(found, torch.from_numpy(corner)) for found in batches.history)
    assert torch.equal(batches.history[2], batches.history[1]) and torch.equal(batches.history[3], batches.history[1])
    for drawn in islice(batches.segment(3), 5):
        assert (drawn.labels == batches.history[3].numpy()[drawn.indices]).all() and drawn.labels.dtype == np.int64
        assert np.bincount(drawn.labels).max() == 2


def test_images_between_clusters_are_left_out():
    points, corner = blobs([20, 10, 10, 8])
    points[3] = points[20:48].mean(0) + points[:3].mean(0)  # of no corner
    batches = clusters(keep=47 / 48)
    batches.refresh(look_at(features=points), 0)
    assert (batches.history[0] < 0).nonzero().flatten().tolist() == [3]
    assert all(3 not in drawn.indices for drawn in islice(batches.segment(0), 20))


def test_permuted_clusters_say_nothing_and_warm_ones_go_on():
    points, corner = blobs([12, 12, 12, 12])
    batches = clusters(permuted=True)
    batches.refresh(look_at(features=points), 0)
    assert batches.history[0].bincount().tolist() == [12] * 4
    assert not same_partition(batches.history[0], torch.from_numpy(corner))
    first, second = clusters(), clusters()
    for number in (0, 1):
        first.refresh(look_at(features=points, embeddings=points), number)
    second.load_state_dict(first.state_dict())
    for each in (first, second):
        each.refresh(look_at(embeddings=points + 0.01), 2)
    assert torch.equal(first.history, second.history)


def test_neighbours_come_with_an_image_in_as_many_crops():
    points, _ = blobs([24, 24])
    config = {"type": "neighbours", "count": 3, "views": 2}
    numbers = recipe(12, 2, 9), 0
    batches = TypeAdapter(AnyBatchSampler).validate_python(config).build(np.zeros(48, dtype=np.int64), *numbers)
    assert batches.period == 48 // 6 and batches.num_classes == 48
    batches.refresh(look_at(projection=points), 0)
    distances = torch.cdist(points, points)
    queries = []
    for drawn in islice(batches.segment(0), batches.period):
        assert np.array_equal(drawn.labels, drawn.indices) and np.array_equal(drawn.indices[:6], drawn.indices[6:])
        for group in drawn.indices[:6].reshape(2, 3):
            queries.append(group[0])
            assert sorted(group) == sorted(distances[group[0]].argsort()[:3].tolist())
    assert len(set(queries)) == len(queries) == 16  # without replacement


def test_the_second_of_an_instance_is_its_crop_or_its_neighbours():
    points, _ = blobs([24, 24])
    numbers = recipe(12, 2, 9), 0
    seconds = {}
    for share in (0.0, 0.5, 1.0):
        config = {"type": "instances", "neighbour_share": share}
        batches = TypeAdapter(AnyBatchSampler).validate_python(config).build(np.zeros(48, dtype=np.int64), *numbers)
        batches.refresh(look_at(features=points), 0)
        drawn = next(batches.segment(0))
        assert np.array_equal(drawn.labels, np.tile(drawn.indices[:6], 2))
        seconds[share] = (drawn.indices[6:] == drawn.indices[:6]).mean()
        neighbours = nearest(normalize(points, dim=1), 2)[:, 1].numpy()
        assert np.isin(drawn.indices[6:], [*drawn.indices[:6], *neighbours[drawn.indices[:6]]]).all()
    assert seconds[0.0] == 1 and seconds[1.0] == 0 and 0 < seconds[0.5] < 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "clusters", "k": 49}, "k 49; allowed: from the 4 clusters of a batch to the 48 images"),
        ({"type": "clusters", "k": 3}, "k 3; allowed: from the 4 clusters"),
        ({"type": "neighbours"}, "batch_size 8; allowed: multiples of count 5 × views 2"),
    ],
)
def test_pseudo_labels_that_cannot_be_are_one_line(config, message):
    numbers = recipe(8, 2, 9), 0
    with pytest.raises(UserError, match=message):
        TypeAdapter(AnyBatchSampler).validate_python(config).build(np.zeros(48, dtype=np.int64), *numbers)
