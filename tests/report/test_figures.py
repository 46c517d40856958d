"""Charts and thumbnails: what they show, and that the same input gives the same picture."""

import io
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import angles, clusters
from PIL import Image

from cbml.errors import UserError
from cbml.evaluation.metrics import evaluate
from cbml.evaluation.retrieval import unit_vectors
from cbml.evaluation.similarities import pair_similarities
from cbml.report.cell import charts
from cbml.report.cell.embedding_map import map_chart, project
from cbml.report.common.style import INK, chart, to_svg
from cbml.report.common.thumbnails import contact_sheet, thumbnail
from cbml.report.tables import comparisons

CLASSES = {7: "gull", 10: "tern", 13: "auk", 16: "skua"}


def texts(svg):
    """How often each text stands in a chart."""
    return Counter(element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"))


# Thumbnails


def test_every_thumbnail_is_in_its_place(tmp_path):
    files = [tmp_path / f"{n}.png" for n in range(5)]
    for n, file in enumerate(files):
        Image.new("RGB", (30, 24 + n % 3), (40 * n,) * 3).save(file)  # each of its own grey and none square
    with Image.open(io.BytesIO(contact_sheet(files, 16, columns=2))) as sheet:
        assert sheet.size == (32, 48) and sheet.format == "JPEG"
        pixels = np.asarray(sheet).astype(int)
    for n in range(5):
        top, left = 16 * (n // 2), 16 * (n % 2)
        assert abs(pixels[top : top + 16, left : left + 16] - 40 * n).max() <= 2


def test_a_thumbnail_is_the_centre_of_its_own_image(tmp_path):
    wide, tall = np.zeros((20, 60, 3), np.uint8), np.zeros((500, 400, 3), np.uint8)
    wide[:, 18:42] = 200  # the centre, and as much beyond it as bicubic interpolation looks at
    tall[40:-40] = 90
    for name, pixels in (("wide", wide), ("tall", tall)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        shown = np.asarray(thumbnail(tmp_path / f"{name}.png", 96))
        assert shown.shape == (96, 96, 3)
        assert np.unique(shown).tolist() == [pixels.max()]


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match="broken.jpg: not an image") as caught:
        contact_sheet([tmp_path / "broken.jpg"], 16, columns=2)
    assert "\n" not in str(caught.value)


# Charts of one cell


VALIDATIONS = pd.DataFrame({"iteration": [0, 5, 10], "recall_at_1": [10.0, 50.0, 40.0]})


def losses_of(iterations):
    values = np.linspace(2, 1, iterations)
    return pd.DataFrame(
        {"iteration": range(1, iterations + 1), "loss": values, "lr": 0.1, "loss_a": 0.4, "loss_b": 0.6}
    )


def test_training_marks_what_is_scored():
    text = charts.training_chart("a cell", losses_of(10), VALIDATIONS, 5)
    for label in ("untrained: 10.0% at 0", "best on test: 50.0% at 5", "final: 40.0% at 10", ">a<", ">b<", ">a cell<"):
        assert label in text
    assert ">lr<" not in text


def test_a_network_that_was_not_trained():
    text = charts.training_chart("a cell", pd.DataFrame(), VALIDATIONS[:1], 0)
    assert "untrained: 10.0% at 0" in text and "final" not in text and ">loss<" not in text


def test_many_iterations_are_averaged():
    validations = pd.DataFrame({"iteration": [0, 5000], "recall_at_1": [25.0, 50.0]})
    text = charts.training_chart("a cell", losses_of(5000), validations, 5000)
    assert "means of 13 iterations" in text and len(text) < 100_000
    assert "means of" not in charts.training_chart("a cell", losses_of(10), VALIDATIONS, 5)


def test_recall_at_k_says_its_first_and_its_eighth_in_percent():
    recalls = pd.DataFrame({"k": [1, 2, 4, 8, 16], "recall": [12.5, 30.0, 50.0, 75.4, 90.0]})
    shown = texts(charts.recall_chart("a cell", recalls))
    assert {"12.5%", "75.4%", "a cell", "1", "2", "4", "8", "16"} <= set(shown)
    assert not {"30.0%", "50.0%", "90.0%"} & set(shown)
    assert "12.5%" in texts(charts.recall_chart("a cell", recalls[:1]))


def similarities_of(**splits):
    """What evaluation writes of these embeddings and labels: densities of all splits, and moments by split."""
    found = {split: pair_similarities(*each) for split, each in splits.items()}
    densities = pd.concat({split: table for split, (table, _) in found.items()}, names=["split"]).reset_index("split")
    return densities, {split: moments for split, (_, moments) in found.items()}


def test_similarities_are_drawn_by_split_with_their_moments():
    embeddings, labels = clusters(12, 6, noise=1.5)
    densities, moments = similarities_of(train=(embeddings.flip(1), labels.flip(0)), test=(embeddings, labels))
    text = charts.similarities_chart("a cell", densities, moments)
    for split in ("train", "test"):
        assert f"cosine similarity of a pair, {split}" in text
        for pair, values in moments[split].items():
            assert f"{pair}: mean {values['mean']:.3f}, variance {values['variance']:#.2g}" in text


def test_a_kind_of_pair_that_does_not_occur_is_not_drawn():
    densities, moments = similarities_of(
        train=(angles(0, 1), torch.tensor([3, 3])), test=(angles(0, 20, 90), torch.tensor([12, 12, 40]))
    )
    text = charts.similarities_chart("a cell", densities, moments)
    assert text.count("positive: mean") == 2 and text.count("negative: mean") == 1


def test_a_map_keeps_clusters_together():
    embeddings, labels = clusters(3, 30, noise=0.05)
    positions, method = project(unit_vectors(embeddings, "test").numpy(), 0)
    assert positions.shape == (90, 2) and method in ("t-SNE", "UMAP")
    assert evaluate(torch.from_numpy(positions) - positions.mean(0), labels)["recall_at_1"] > 90


def test_a_map_names_its_classes_and_how_it_was_made():
    embeddings, labels = clusters(4, 10)
    names = CLASSES | {7: "a gull of a name that is much too long to be shown"}
    assert set(labels.tolist()) == set(names)
    shown = texts(map_chart("a cell", embeddings.numpy(), labels.numpy(), names, 0))
    title = [text for text in shown if text.startswith("a cell: ")]
    assert title in (["a cell: t-SNE of 4 test classes"], ["a cell: UMAP of 4 test classes"])
    assert set(shown) == {*title, "a gull of a name that is mu…", "tern", "auk", "skua"}


def test_the_length_of_embeddings_does_not_matter_for_a_map():
    embeddings, labels = (each.numpy() for each in clusters(4, 10))
    lengths = 2.0 ** np.arange(-20, 20)[:, None]  # powers of two: not a bit of a direction changes
    expected = map_chart("a cell", embeddings, labels, CLASSES, 0)
    assert map_chart("a cell", embeddings * lengths.astype(np.float32), labels, CLASSES, 0) == expected


@pytest.mark.parametrize(
    ("embeddings", "labels"),
    [
        (angles(0, 90), [7, 10]),
        (angles(0, 20, 90), [7, 7, 10]),
        (torch.ones(40, 4), [7, 10, 13, 16] * 10),
        (torch.zeros(40, 4), [7, 10, 13, 16] * 10),
        (clusters(1, 12)[0], [7] * 12),
    ],
    ids=["two images", "three images", "collapsed", "zero", "one class"],
)
def test_a_map_of_few_or_equal_embeddings(embeddings, labels):
    shown = texts(map_chart("a cell", embeddings.numpy(), np.array(labels), CLASSES, 0))
    assert {CLASSES[label] for label in labels} <= set(shown)


# Charts of many cells


def curves_of(methods, settings=(("resnet18", 64),), seeds=(0,), variant=""):
    """Recall@1 of the i-th method: 20 + i, 50 + i, 40 + i percent."""
    parts = [
        pd.DataFrame({"iteration": [0, 5, 10], "recall_at_1": [20.0 + i, 50.0 + i, 40.0 + i]}).assign(
            cell=f"{backbone}-{method}-{size}-{seed}",
            embedding_dim=size,
            backbone=backbone,
            method=method,
            variant=variant,
            seed=seed,
        )
        for i, method in enumerate(methods)
        for backbone, size in settings
        for seed in seeds
    ]
    return pd.concat(parts, ignore_index=True)


def test_few_methods_share_the_panel_of_their_backbone_and_size():
    curves = curves_of(["cbml_log", "triplet"], settings=[("resnet18", 64), ("googlenet", 512)], seeds=(0, 1))
    shown = texts(comparisons.curves_chart(curves))
    assert shown["resnet18, 64"] == shown["googlenet, 512"] == 1
    assert shown["cbml_log"] == shown["triplet"] == 1  # in the legend
    alone = texts(comparisons.curves_chart(curves_of(["cbml_log"])))
    assert alone["resnet18, 64"] == 1 and "cbml_log" not in alone  # no legend of one method


def test_seeds_are_a_mean_with_a_band_and_a_single_seed_is_a_line(monkeypatch):
    monkeypatch.setattr(comparisons, "to_svg", lambda figure: figure)
    seeds = curves_of(["a"], seeds=(0, 1, 2))
    seeds["recall_at_1"] += 5 * (seeds.seed - 1)  # mean as of one seed, standard deviation 5
    for curves, reach in ((seeds, 5), (curves_of(["a"]), 0)):
        (axis,) = comparisons.curves_chart(curves).axes
        (band,) = axis.collections
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
        means = {0: 20, 5: 50, 10: 40}
        assert corners == {(x, y + sign * reach) for x, y in means.items() for sign in (-1, 1)}
        line, marker = axis.lines[:2]
        assert dict(zip(*line.get_data(), strict=True)) == means and (*marker.get_xdata(), *marker.get_ydata()) == (
            5,
            50,
        )


def test_many_methods_have_a_panel_each_the_best_first():
    methods = [f"loss_{i}" for i in range(13)]
    svg = comparisons.curves_chart(curves_of(methods))
    assert all(texts(svg)[method] == 1 for method in methods)
    places = [svg.index(f">{method}<") for method in methods]
    assert places == sorted(places, reverse=True)  # the last has the highest Recall@1


def test_variants_of_a_method_are_methods():
    curves = pd.concat([curves_of(["cbml_log"], variant=variant) for variant in ("margin=0.1", "margin=0.2")])
    shown = texts(comparisons.curves_chart(curves))
    assert shown["cbml_log (margin=0.1)"] == shown["cbml_log (margin=0.2)"] == 1


def test_distributions_have_a_panel_for_each_cell():
    embeddings, labels = clusters(12, 6, noise=1.5)
    table, _ = pair_similarities(embeddings, labels)
    cells = [f"cell {i}" for i in range(5)]
    shown = texts(comparisons.distributions_chart(pd.concat([table.assign(cell=cell) for cell in cells])))
    assert all(shown[cell] == 1 for cell in cells)
    assert shown["positive pairs"] == shown["negative pairs"] == 1


def test_the_papers_figures_stand_beside_those_that_have_one():
    table = pd.DataFrame(
        {
            "embedding_dim": 64,
            "backbone": "resnet18",
            "method": ["cbml_log", "cbml_log", "cbml_log", "triplet"],
            "variant": ["", "", "margin=0.2", ""],
            "protocol": ["best_on_test", "final", "final", "final"],
            "recall_at_1": [61.0, 60.0, 59.0, 50.0],
            "recall_at_1_sd": [0.5, np.nan, 0.4, 0.3],
            "paper_recall_at_1": [59.0, 59.0, 59.0, np.nan],
        }
    )
    shown = texts(comparisons.paper_chart(table))
    assert shown["64 · resnet18 · cbml_log"] == shown["64 · resnet18 · cbml_log (margin=0.2)"] == 1
    assert shown["paper"] == shown["final"] == shown["best_on_test"] == 1
    assert not any("triplet" in text for text in shown)


# All charts


def every_chart(title):
    embeddings, labels = clusters(4, 10)
    densities, moments = similarities_of(train=(embeddings, labels), test=(embeddings, labels))
    recalls = pd.DataFrame({"k": [1, 2, 4, 8], "recall": [10.0, 20.0, 30.0, 40.0]})
    return {
        "training": charts.training_chart(title, losses_of(10), VALIDATIONS, 5),
        "recall": charts.recall_chart(title, recalls),
        "similarities": charts.similarities_chart(title, densities, moments),
        "map": map_chart(title, embeddings.numpy(), labels.numpy(), dict.fromkeys(CLASSES, title), 0),
        "curves": comparisons.curves_chart(curves_of([title, "b"])),
        "distributions": comparisons.distributions_chart(densities[densities.split == "test"].assign(cell=title)),
    }


def test_the_same_input_gives_the_same_bytes():
    assert every_chart("a cell") == every_chart("a cell")


@pytest.mark.parametrize("name", ["e $$", "5$-10$", "$x^2$", r"$\nosuch{$", "a_b", "_hidden", "100 % #1"])
def test_names_are_drawn_as_they_are_written(name):
    """None is mathematics, and none is left out of a legend."""
    losses = losses_of(10).rename(columns={"loss_a": f"loss_{name}"})
    several = every_chart(name) | {"terms": charts.training_chart("a cell", losses, VALIDATIONS, 5)}
    for chart_name, svg in several.items():
        assert any(name in text for text in texts(svg)), chart_name
        assert "mathdefault" not in svg, chart_name
    titled = [texts(svg)[name] for chart_name, svg in several.items() if chart_name in ("map", "curves", "terms")]
    assert titled == [len(CLASSES), 1, 1]


def test_charts_are_elements_in_the_colours_of_their_page_and_names_are_text():
    for name, svg in every_chart('<b>&"').items():
        assert svg.startswith("<svg"), name
        assert "currentColor" in svg and INK not in svg, name
        assert any('<b>&"' in text for text in texts(svg)), name


def test_a_long_title_has_as_many_lines_as_it_needs():
    recalls = pd.DataFrame({"k": [1, 2], "recall": [10.0, 20.0]})
    title = " ".join(["resnet18-a_loss_of_a_long_name-512-0"] * 4)
    lines = [text for text in texts(charts.recall_chart(title, recalls)) if text.startswith("resnet18")]
    assert len(lines) in (1, 4) and set(lines) == {"resnet18-a_loss_of_a_long_name-512-0"}


def test_a_chart_leaves_no_figure_and_no_style_behind():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    with chart(2, 1) as (figure, ax):
        ax.plot([1, 2])
        assert 'width="144pt"' in to_svg(figure)
    assert dict(mpl.rcParams) == before
