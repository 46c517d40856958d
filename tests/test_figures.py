"""The pictures of a cell: what they show, against cases worked out by hand or by brute force."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from cbml.figures.cell import display_name, draw_cell
from cbml.figures.curves import draw_training
from cbml.figures.similarities import pair_similarities
from PIL import Image, ImageChops
from test_evaluation import LargestTensor

from cbml.datasets.images import PackedImages
from cbml.errors import UserError
from cbml.evaluation import evaluate, retrieve
from cbml.evaluation.retrieval import unit_vectors
from cbml.figures import neighbours, pages
from cbml.figures.embedding_map import project
from cbml.figures.style import RIGHT, WRONG

FILES = [
    *("classes.csv", "confusions.jpg", "embedding_map.svg", "failures.jpg", "gallery.jpg", "recall_at_k.csv"),
    *("recall_at_k.svg", "similarities.csv", "similarities.json", "similarities.svg", "training.svg"),
]


def angles(*degrees):
    """Unit vectors in the plane: a difference of angles is easy to think about."""
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def clusters(classes, per_class, *, dim=8, noise=1.0, seed=0):
    """Embeddings scattered about a random centre a class, and labels that neither start at 0 nor are in order."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.randperm(classes, generator=generator) * 3 + 7).repeat(per_class)
    centres = torch.randn(100, dim, generator=generator)
    return centres[labels] + noise * torch.randn(len(labels), dim, generator=generator), labels


def pictures(count, value=128):
    return PackedImages.of([np.full((24 + n % 3, 30, 3), value, np.uint8) for n in range(count)])


def inputs(test, labels, **changes):
    iterations = range(1, 11)
    return {
        "title": "a cell",
        "test": test,
        "test_labels": labels,
        "images": pictures(len(test)),
        "class_names": {int(label): f"{label:03}.Class_{label}" for label in labels.unique()},
        "train": test.flip(1),
        "train_labels": labels,
        "losses": pd.DataFrame({"iteration": iterations, "loss": 1.0, "lr": 0.1, "loss_a": 0.4, "loss_b": 0.6}),
        "validations": pd.DataFrame({"iteration": [0, 5, 10], "recall_at_1": [0.1, 0.5, 0.4]}),
        "best_iteration": 5,
        "seed": 0,
    } | changes


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of pictures, and what they are of."""
    folder, given = tmp_path_factory.mktemp("cell"), inputs(*clusters(12, 6, noise=1.5))
    draw_cell(folder, **given)
    return folder, given


def has_colour(image, colour):
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    return (pixels == np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])).all(1).any()


# Who is right


def test_memory_is_bounded():
    embeddings, labels = clusters(20, 75)
    unit = unit_vectors(embeddings, "test")
    with LargestTensor() as largest:
        neighbours.judge_queries(unit, labels, block=20_000)
        pair_similarities(unit, labels, block=20_000)
    assert unit.numel() <= largest.elements <= 40_000  # the positions of a mask's members are two numbers each


def test_a_query_is_judged_as_evaluate_does():
    embeddings, labels = clusters(9, 5, noise=1.5)
    embeddings[7] = embeddings[20]  # a tie
    queries = neighbours.judge_queries(unit_vectors(embeddings, "test"), labels, block=100)
    right = queries.right[queries.has_answer]
    assert right.mean() == pytest.approx(evaluate(embeddings, labels)["recall_at_1"])
    assert 0.1 < right.mean() < 0.9


def test_equal_embeddings_are_all_wrong():
    labels = torch.tensor([4, 4, 4, 9, 9, 9])
    assert not neighbours.judge_queries(angles(*[30] * 6), labels).right.any()
    assert neighbours.nearest(angles(*[30] * 6), labels, 0)[0][0] in (3, 4, 5)


def test_what_float32_cannot_tell_apart_is_a_tie():
    labels = torch.tensor([0, 0, 1])
    for degrees, right in ((10 + 1e-6, False), (10.1, True)):
        queries = neighbours.judge_queries(angles(0, 10, -degrees), labels)
        assert queries.right[0] == right
        assert neighbours.nearest(angles(0, 10, -degrees), labels, 0)[0][0] == (1 if right else 2)


def test_the_nearest_image_of_another_class():
    labels = torch.tensor([0, 0, 5, 5, 8])
    queries = neighbours.judge_queries(angles(0, 50, 10, 170, 180), labels, block=5)
    assert queries.wrong.tolist() == [2, 2, 0, 4, 3]
    assert queries.wrong_label.tolist() == [5, 5, 0, 8, 5]
    assert queries.right.tolist() == [False, False, False, False, False]
    assert queries.has_answer.tolist() == [True, True, True, True, False]
    np.testing.assert_allclose(queries.similarity, [math.cos(math.radians(d)) for d in (10, 40, 10, 10, 10)])


def test_neighbours_are_those_of_retrieve():
    embeddings, labels = clusters(9, 5)
    similarities, indices = retrieve(embeddings, None, 8)
    for query in (0, 17, 44):
        found = neighbours.nearest(unit_vectors(embeddings, "test"), labels, query)
        assert [index for index, _ in found] == indices[query].tolist()
        assert [value for _, value in found] == pytest.approx(similarities[query].tolist(), abs=1e-6)


def test_a_small_gallery_has_fewer_neighbours():
    assert len(neighbours.nearest(angles(0, 10, 20), torch.tensor([0, 0, 1]), 1)) == 2


# Which queries are shown


def test_queries_are_one_a_class_with_an_answer_and_do_not_depend_on_the_model():
    labels = torch.tensor([3, 3, 3, 5, 8, 8, 11, 11])
    picks = set()
    for seed in range(20):
        a, b = (
            neighbours.judge_queries(torch.nn.functional.normalize(torch.randn(8, 4).double()), labels) for _ in "ab"
        )
        chosen = neighbours.pick_queries(a, 2, seed)
        assert chosen == neighbours.pick_queries(b, 2, seed)
        of = labels[chosen].tolist()
        assert len(set(of)) == 2 and 5 not in of
        picks.add(tuple(chosen))
    assert len(picks) > 3


def test_failures_are_ordered_by_similarity_and_each_pair_is_shown_once():
    embeddings = angles(0, 4, 100, 106, 200, 208, 300, 301, 309)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2, 4])
    queries = neighbours.judge_queries(embeddings, labels)
    failed = neighbours.failures(queries)
    assert failed.index.tolist() == [0, 1, 2, 3, 4, 5]
    # query 1 is 0 the other way round, and 2 and 5 are of the class of 0
    assert neighbours.worst_failures(failed, 8) == [0, 3, 4]
    assert neighbours.worst_failures(failed, 1) == [0]


# classes.csv and confusions


def worked_example():
    """Class 7: two of three right; 2: none of three right, twice nearest to 7 and once to 9; 9: one image; 4: right."""
    labels = [7, 7, 2, 2, 7, 2, 9, 4, 4]
    degrees = [0, 10, 13, -4, 100, 200, 203, 300, 301]
    # 7: 0 → -4 (2) wrong, 10 → 13 (2) wrong, 100 → 13 (2) wrong; 2: 13 → 10, -4 → 0 (7), 200 → 203 (9)
    return neighbours.judge_queries(angles(*degrees), torch.tensor(labels))


def test_class_table():
    table = neighbours.class_table(worked_example(), {7: "seven", 2: "two", 9: "nine", 4: "four"})
    rows = table.astype(object).where(table.notna(), None).to_numpy().tolist()
    assert list(table) == ["class", "images", "recall_at_1", "confused_with"]
    assert rows == [
        ["seven", 3, 0.0, "two"],
        ["two", 3, 0.0, "seven"],
        ["four", 2, 1.0, None],
        ["nine", 1, None, None],
    ]


def test_confusions_are_counted_by_pair():
    pairs = neighbours.confusions(worked_example())
    columns = ["label", "wrong_label", "count", "queries", "query", "wrong"]
    # the most frequent first; of three failures the example is the surest, 10° with 13°
    assert pairs[columns].to_numpy().tolist() == [[7, 2, 3, 3, 1, 2], [2, 7, 2, 3, 2, 1], [2, 9, 1, 3, 5, 6]]
    assert pairs.share.tolist() == pytest.approx([1, 2 / 3, 1 / 3])


# Pages


def test_right_and_wrong_frames_differ_in_colour_and_in_shape():
    image = pages.thumbnail(pictures(1), 0)
    right, wrong = pages.framed(image, True), pages.framed(image, False)
    assert has_colour(right, RIGHT) and not has_colour(right, WRONG)
    assert has_colour(wrong, WRONG) and not has_colour(wrong, RIGHT)
    inside = (pages.FRAME, pages.FRAME, pages.FRAME + pages.THUMBNAIL, pages.FRAME + pages.THUMBNAIL)
    assert not ImageChops.difference(right.crop(inside), image).getbbox()
    assert ImageChops.difference(wrong.crop(inside), image).getbbox()


def test_a_page_frames_each_neighbour_by_its_class():
    labels, names = [0, 0, 1], {0: "a", 1: "b"}
    page = pages.neighbour_page("t", "s", {0: [(2, 0.9), (1, 0.8)]}, pictures(3), labels, names)
    columns = [pages.MARGIN + 8 + column * pages.CELL for column in (1, 2)]
    for left, colour in zip(columns, (WRONG, RIGHT), strict=True):
        cell = page.crop((left, pages.HEADER, left + pages.FRAMED, pages.HEADER + pages.FRAMED))
        assert has_colour(cell, colour)
        assert not has_colour(cell, {RIGHT: WRONG, WRONG: RIGHT}[colour])


def test_a_thumbnail_is_the_centre_of_its_own_image():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    images = PackedImages.of([np.full((50, 40, 3), 90, np.uint8), wide])
    assert np.unique(np.asarray(pages.thumbnail(images, 0))).tolist() == [90]
    assert np.unique(np.asarray(pages.thumbnail(images, 1))).tolist() == [200]


def test_a_page_of_long_names_is_no_wider():
    rows = {0: [(1, 0.9)]}
    short, long = (
        pages.neighbour_page(name, "s", rows, pictures(2), [0, 1], {0: name, 1: name})
        for name in ("a", "an_unbroken_name_of_very_many_letters_" * 9)
    )
    assert short.size == long.size


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("101.White_Pelican", "White Pelican"),
        ("005.LATIN_SMALL_LETTER_A", "latin small letter a"),
        ("Chuck_will_Widow", "Chuck will Widow"),
        ("12.4_Runner", "4 Runner"),
    ],
)
def test_class_names_are_shown_for_reading(raw, shown):
    assert display_name(raw) == shown


# Similarities


@pytest.mark.parametrize("block", [1, 50, 10**6])
def test_similarities_are_those_of_all_pairs(block):
    embeddings, labels = clusters(5, 7)
    unit = unit_vectors(embeddings, "test")
    densities, moments = pair_similarities(unit, labels, block=block)
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
    densities, moments = pair_similarities(unit_vectors(torch.tensor([[3.0, 1], [3, 1], [-3, -1]]), ""), torch.zeros(3))
    assert moments["positive"]["pairs"] == 3
    assert densities.density.iloc[[0, -1]].tolist() == pytest.approx([2 / 3 * 200, 1 / 3 * 200])
    assert moments["negative"] == {"mean": None, "variance": None, "pairs": 0}
    assert set(densities.pair) == {"positive"}


def test_rounding_beyond_one_loses_no_pair():
    unit = unit_vectors(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), "test").repeat(2, 1)
    assert (unit @ unit.T).max() > 1
    _, moments = pair_similarities(unit, torch.arange(60).repeat(2))
    assert moments["positive"]["pairs"] == 60 and moments["negative"]["pairs"] == 120 * 119 // 2 - 60


# All of it


def test_all_files_are_written_and_small(drawn):
    folder, _ = drawn
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for path in folder.glob("*.jpg"):
        with Image.open(path) as image:
            image.load()
        assert path.stat().st_size < 400_000


def test_the_same_input_gives_the_same_bytes(drawn, tmp_path):
    folder, given = drawn
    draw_cell(tmp_path, **given)
    assert [name for name in FILES if (folder / name).read_bytes() != (tmp_path / name).read_bytes()] == []


def test_recall_at_k_is_that_of_evaluate(drawn):
    folder, given = drawn
    table = pd.read_csv(folder / "recall_at_k.csv")
    assert table.k.tolist() == [1, 2, 4, 8, 16, 32, 64]  # 72 images
    expected = evaluate(given["test"], given["test_labels"], ks=table.k.tolist())
    assert table.recall.tolist() == pytest.approx([expected[f"recall_at_{k}"] for k in table.k])
    classes = pd.read_csv(folder / "classes.csv")
    assert (classes.recall_at_1 * classes.images).sum() / classes.images.sum() == pytest.approx(table.recall[0])
    assert classes.recall_at_1.is_monotonic_increasing


def test_similarities_are_kept_by_split(drawn):
    folder, given = drawn
    moments = json.loads((folder / "similarities.json").read_text())
    for split in ("train", "test"):
        unit = unit_vectors(given[split], split)
        assert moments[split] == pair_similarities(unit, given[f"{split}_labels"])[1]
        for values in moments[split].values():
            assert f"mean {values['mean']:.3f}" in (folder / "similarities.svg").read_text()
    table = pd.read_csv(folder / "similarities.csv")
    assert list(table) == ["split", "pair", "similarity", "density"]
    assert set(zip(table.split, table.pair, strict=True)) == {
        (split, pair) for split in ("train", "test") for pair in ("positive", "negative")
    }


def test_training_marks_what_is_scored(drawn):
    text = (drawn[0] / "training.svg").read_text()
    for label in ("untrained: 10.0% at 0", "best on test: 50.0% at 5", "final: 40.0% at 10", ">a<", ">b<"):
        assert label in text


def test_a_network_that_was_not_trained(tmp_path):
    validations = pd.DataFrame({"iteration": [0], "recall_at_1": [0.25]})
    draw_training(tmp_path / "training.svg", "a cell", pd.DataFrame(), validations, 0)
    text = (tmp_path / "training.svg").read_text()
    assert "untrained: 25.0% at 0" in text and "final" not in text and ">loss<" not in text


def test_many_iterations_are_averaged(tmp_path):
    losses = pd.DataFrame({"iteration": range(1, 5001), "loss": np.linspace(2, 1, 5000), "lr": 1.0})
    validations = pd.DataFrame({"iteration": [0, 5000], "recall_at_1": [0.25, 0.5]})
    draw_training(tmp_path / "training.svg", "a cell", losses, validations, 5000)
    text = (tmp_path / "training.svg").read_text()
    assert "means of 13 iterations" in text and len(text) < 100_000


def test_no_failure_is_said_in_the_pictures(tmp_path):
    given = inputs(*clusters(4, 5, noise=0.01))
    draw_cell(tmp_path, **given)
    assert pd.read_csv(tmp_path / "classes.csv").confused_with.isna().all()
    for name in ("failures.jpg", "confusions.jpg"):
        with Image.open(tmp_path / name) as image:
            assert image.height == pages.HEADER  # a header alone


def test_the_smallest_lists(tmp_path):
    test, labels = angles(0, 20, 90), torch.tensor([12, 12, 40])
    draw_cell(tmp_path, **inputs(test, labels, train=angles(0, 1), train_labels=torch.tensor([3, 3])))
    assert pd.read_csv(tmp_path / "recall_at_k.csv").to_numpy().tolist() == [[1, 1], [2, 1]]
    assert json.loads((tmp_path / "similarities.json").read_text())["train"]["negative"]["pairs"] == 0
    table = pd.read_csv(tmp_path / "classes.csv")
    assert table["class"].tolist() == ["Class 12", "Class 40"] and table.recall_at_1.isna().tolist() == [False, True]


def test_collapsed_embeddings_and_one_test_class(tmp_path):
    draw_cell(tmp_path / "collapsed", **inputs(torch.ones(40, 4), torch.arange(8).repeat(5)))
    assert (pd.read_csv(tmp_path / "collapsed" / "classes.csv").recall_at_1 == 0).all()
    draw_cell(tmp_path / "single", **inputs(clusters(1, 12)[0], torch.full((12,), 3)))
    assert pd.read_csv(tmp_path / "single" / "classes.csv").recall_at_1.tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": pictures(11)}, "images: 11 images"),
        ({"class_names": {7: "a"}}, "class_names: no name for label 10"),
        ({"train_labels": torch.zeros(3)}, "train_labels: shape"),
        ({"test_labels": torch.arange(12)}, "no query has another image"),
    ],
)
def test_input_that_does_not_match(tmp_path, changes, message):
    given = inputs(*clusters(3, 4))
    if "test_labels" in changes:
        given["class_names"] = dict.fromkeys(range(12), "x")
    with pytest.raises(UserError, match=message):
        draw_cell(tmp_path, **given | changes)


def test_a_map_keeps_clusters_together():
    embeddings, labels = clusters(3, 30, noise=0.05)
    positions, method = project(unit_vectors(embeddings, "test").numpy(), 0)
    assert positions.shape == (90, 2) and method in ("t-SNE", "UMAP")
    assert evaluate(torch.from_numpy(positions) - positions.mean(0), labels)["recall_at_1"] > 0.9
