"""Tables: means over seeds, the published figures beside them, and the same metric names whatever ran."""

import json
import re
import shutil
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from finished_cells import TEST, cells, finish, write_cell_page, write_images
from helpers import ROOT, entry, tiny_params

from cbml import provenance
from cbml.errors import UserError
from cbml.report.common.numbers import recalls as recalls_of
from cbml.report.tables import rows as tables
from cbml.report.tables.latex import to_latex
from cbml.report.tables.markdown import to_markdown
from cbml.stages.hand_over import hand_over
from cbml.stages.tabulate import tabulate
from cbml.tracking import store as tracking
from cbml.workspace import Workspace

NO_GAINS = pd.DataFrame()
SEEDS = [0, 1, 2]
LOSSES = {name: {"type": "cbml", "form": name[5:]} for name in ("cbml_log", "cbml_sqrt")}
CUB = {"type": "cub200", "mirrors": [[{"url": "http://x/CUB_200_2011.tgz", "size": 1, "md5": "0" * 32}]]}
DATASETS = tiny_params()["dataset"] | {"cub200": CUB}
CONF = ROOT / "conf"
TRAIN = "dvc repro -f -s train@resnet18-cbml_log-16-0-glyphs"


def set_params(workspace, **groups):
    """Two data sets, two losses and three seeds, unless `groups` say otherwise, as the workspace's params.yaml."""
    content = {"dataset": DATASETS, "loss": LOSSES, "embedding_dim": [64], "seed": SEEDS} | groups
    (workspace.tree / "params.yaml").write_text(yaml.safe_dump(tiny_params(**content)))
    return workspace.params()


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A workspace without cells and without a tracking store."""
    monkeypatch.setattr(tracking, "mlflow", None)
    return Workspace(tmp_path, tmp_path)


@pytest.fixture
def workspace(empty):
    """All cells of two data sets, finished."""
    params = set_params(empty)
    for dataset in DATASETS:
        for cell in params.cells(dataset):
            finish(empty, cell, 60.0 + cell.seed + (5 if cell.loss == "cbml_sqrt" else 0))
    return empty


@pytest.fixture
def finished(tmp_path):
    """Finish cells that may have the same name, each in a place of its own, and tell them apart."""
    count = iter(range(100))

    def finish_all(*several, **options):
        return tables.with_variants(
            [finish(Workspace(tmp_path / str(next(count))), one, **options) for one in several], CONF
        )

    return finish_all


def squeezed(text):
    """Markdown without the spaces that align its tables."""
    return re.sub(" +", " ", text)


def test_mean_and_standard_deviation_over_seeds(workspace):
    tabulate(workspace, "glyphs")
    table = pd.read_csv(workspace.report("glyphs") / "tables.csv").set_index(["method", "protocol"])
    row = table.loc["cbml_log", "final"]
    assert (row.n, row.recall_at_1, row.recall_at_1_sd) == (
        3,
        pytest.approx(61),
        pytest.approx(np.std([60, 61, 62], ddof=1)),
    )
    assert table.loc["cbml_sqrt", "best_on_test"].recall_at_1 == pytest.approx(69)
    assert row.untrained_recall_at_1 == pytest.approx(10)
    assert table.index[0] == ("cbml_sqrt", "best_on_test")  # best first


def test_what_training_made_worse_is_said(workspace):
    assert "worse than untrained" not in tabulate(workspace, "glyphs")
    for cell in workspace.cells("glyphs"):
        if cell.loss == "cbml_log":
            for folder in (workspace.evaluation(cell), workspace.page(cell)):
                shutil.rmtree(folder)
            finish(workspace, cell, 5.0)
    assert "worse than untrained, by Recall@1: resnet18-cbml_log-64.\n" in tabulate(workspace, "glyphs")


def test_the_papers_figures_stand_beside_ours_for_cub_alone(workspace):
    text = squeezed(tabulate(workspace, "cub200"))
    table = pd.read_csv(workspace.report("cub200") / "tables.csv").set_index(["method", "protocol"])
    row = table.loc["cbml_sqrt", "final"]  # the paper: ResNet18, 64, CBML-sqrt: 59.4
    assert (row.paper_recall_at_1, row.difference_recall_at_1) == (59.4, pytest.approx(66 - 59.4))
    assert table.loc["EPSHN", "published"].recall_at_1 == 54.2  # literature, same backbone and size
    assert "| resnet18 | cbml_sqrt | final | 3 | 66.0 ± 1.0 | 59.4 (+6.6) |" in text
    assert "a run: 1.5 minutes, 10.0% of it waiting" in text and "device: abacus" in text
    assert "Test list: 1,140 images of 20 classes." in text and "not comparable with this part" in text
    assert "googlenet" not in text  # other backbones' rows are not asked for

    assert "paper" not in tabulate(workspace, "glyphs")
    assert squeezed((workspace.report("cub200") / "tables.md").read_text()) == text
    picture = ElementTree.parse(workspace.report("cub200") / "curves.svg")
    assert {"cbml_log", "cbml_sqrt"} < {element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")}


def cells_with(recalls):
    """What `collect` returns for one backbone: {method: Recall@1 of seed 0, 1, …}."""
    rows = [
        {
            "embedding_dim": 64,
            "backbone": "b",
            "method": method,
            "variant": "",
            "iterations": 200,
            "batch_size": 32,
            "spent": "",
            "unsupervised": False,
            "protocol": "final",
            "seed": seed,
            "recall_at_1": value,
        }
        for method, values in recalls.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_a_difference_is_paired_by_seed_and_has_an_interval():
    recalls = {"good": [60, 65, 70], "close": [59, 63, 69], "erratic": [40, 80, 61]}
    table = tables.versus_best(cells_with(recalls))
    row = table.set_index("method").loc["close"]
    # d = -1, -2, -1: mean -4/3, standard error 1/3, t(0.975, 2) = 4.3027
    assert row.versus_best == pytest.approx(-4 / 3)
    assert row.versus_best_low == pytest.approx(-4 / 3 - 4.302653 / 3, abs=1e-5)
    assert row.versus_best_high == pytest.approx(-4 / 3 + 4.302653 / 3, abs=1e-5)
    assert row.within_noise
    # The seeds spread over ten points, but both methods in the same way: the difference is certain.
    table = tables.versus_best(cells_with({"good": [60, 65, 70], "worse": [55, 59, 65.5]}))
    assert table.method.tolist() == ["worse"] and not table.within_noise[0]


def test_fewer_than_three_seeds_make_no_claim(workspace):
    assert tables.versus_best(cells_with({"good": [60, 65], "worse": [10, 11]})).empty
    set_params(workspace, seed=[0, 1])
    text = tabulate(workspace, "glyphs")
    assert "against the best" not in text and "rank nothing" in text
    set_params(workspace)
    text = tabulate(workspace, "glyphs")
    assert "-5.0 [-5.0, -5.0]" in text and "rank nothing" not in text


def test_one_lucky_seed_is_not_the_best():
    recalls = {"good": [60, 65, 70], "close": [59, 63, 69]}
    lucky = tables.versus_best(cells_with(recalls | {"lucky": [99]}))
    assert lucky.method.tolist() == ["close"]
    assert lucky.equals(tables.versus_best(cells_with(recalls)))


def losses(**parameters):
    return {"cbml_log": LOSSES["cbml_log"] | parameters}


def recipe(name="tiny", **parameters):
    return tiny_params()["recipe"] | {"name": name} | parameters


def test_cells_of_the_same_names_are_with_variants_by_what_differs(finished):
    pair = [*cells(loss=losses(margin=0.1)), *cells(loss=losses(margin=0.2), seed=[0, 1])]
    assert [one.variant for one in finished(*pair)] == ["margin=0.1", "margin=0.2", "margin=0.2"]
    other_sizes = cells(loss=losses(margin=0.2), embedding_dim=[32])
    assert [one.variant for one in finished(*cells(loss=losses(margin=0.1)), *other_sizes)] == ["", ""]


def test_seeds_are_with_variants_by_nothing(finished):
    assert [one.variant for one in finished(*cells(seed=SEEDS))] == ["", "", ""]


def test_another_recipe_is_named_without_what_follows_from_it(finished):
    tiny, cpu = cells(recipe=recipe()), cells(recipe=recipe("cpu", lr=0.5, flip=False))
    assert [one.variant for one in finished(*tiny, *cpu)] == ["recipe=tiny", "recipe=cpu"]
    faster = cells(recipe=recipe("cpu", lr=0.7, flip=False))
    assert [one.variant for one in finished(*tiny, *cpu, *faster)] == [
        "recipe=tiny, recipe.lr=0.001",
        "recipe=cpu, recipe.lr=0.5",
        "recipe=cpu, recipe.lr=0.7",
    ]


def test_what_was_set_of_the_recipe_is_shown_on_all_rows(finished):
    long, short = cells(loss={"a": {"type": "cbml"}}), cells(loss={"b": {"type": "cbml"}}, recipe=recipe(iterations=3))
    assert [one.variant for one in finished(*long, *short)] == ["recipe.iterations=6", "recipe.iterations=3"]


def test_what_the_files_of_options_want_of_the_recipe_is_not_shown_until_something_else_is_set(finished):
    backbones = {name: {"backbone": {name: entry("backbone", name)}} for name in ("resnet50", "googlenet")}
    paper = entry("recipe", "paper")
    by_file = [one for groups in backbones.values() for one in cells(**groups, recipe=paper)]
    assert by_file[0].recipe.lr_steps != by_file[1].recipe.lr_steps
    assert [one.variant for one in finished(*by_file)] == ["", ""]
    other = cells(**backbones["resnet50"], recipe=paper | {"lr_steps": [7]}, loss={"a": {"type": "cbml"}})
    assert [one.variant for one in finished(*by_file, *other)] == [f"recipe.lr_steps=[{n}]" for n in (1200, 3000, 7)]


def test_rows_of_unlike_budgets_are_tables_of_their_own_and_not_ranked_together(finished):
    several = [cells(loss=LOSSES, seed=SEEDS, recipe=recipe(iterations=n, validate_every=0)) for n in (6, 3)]
    evaluated = finished(*several[0][:3], *several[1][3:])
    for one in evaluated:
        (one.folder / "validations.csv").write_text("iteration,recall_at_1\n0,1.0\n6,2.0\n")
    table = tables.summarise(tables.collect(evaluated, CONF), with_published=False)
    assert table.versus_best.isna().all()
    text = squeezed(to_markdown(table, "glyphs", TEST, evaluated, NO_GAINS))
    assert "not ranked together" in text and text.index("6 iterations of 8 images") < text.index("3 iterations of 8")
    alike = finished(*several[0])
    table = tables.summarise(tables.collect(alike, CONF), with_published=False)
    assert table.versus_best.notna().any() and "iterations of 8" not in to_markdown(
        table, "glyphs", TEST, alike, NO_GAINS
    )


def test_a_parameter_that_a_cell_does_not_have_is_not_its_name(finished):
    selected = cells(recipe=recipe(select_by="map_at_r"))
    assert [one.variant for one in finished(*cells(), *selected)] == [
        "recipe.select_by=null",
        "recipe.select_by.metric=map_at_r, recipe.select_by.validation_classes=0.2",
    ]


def test_where_things_come_from_tells_nothing_apart(finished, tmp_path):
    def of(weights, **dataset):
        entry = tiny_params()["backbone"]["resnet18"] | {"weights": weights}
        (cell,) = cells(dataset={"glyphs": tiny_params()["dataset"]["glyphs"] | dataset}, backbone={"resnet18": entry})
        return cell

    assert [one.variant for one in finished(of("a.pth"), of("b/a.pth"), weights="same")] == ["", ""]
    other = [
        finish(Workspace(tmp_path / weights), of(weights, classes=classes), weights=weights)
        for weights, classes in (("a.pth", 12), ("b.pth", 14))
    ]
    digits = [one.record["key"][-10:] for one in other]
    assert [one.variant for one in tables.with_variants(other, CONF)] == digits and digits[0] != digits[1]


def test_no_two_variants_are_the_same(tmp_path):
    """One pair differs in a parameter, another in what it started from."""
    one, two = cells(loss=losses(margin=0.1)) + cells(loss=losses(margin=0.2))
    started = [(one, "a"), (two, "a"), (one, "b")]
    evaluated = [
        finish(Workspace(tmp_path / str(i)), cell, weights=weights) for i, (cell, weights) in enumerate(started)
    ]
    evaluated = tables.with_variants(evaluated, CONF)
    digits = [one.record["key"][-10:] for one in evaluated]
    assert [one.variant for one in evaluated] == [f"margin=0.1, {digits[0]}", "margin=0.2", f"margin=0.1, {digits[2]}"]
    assert (tables.summarise(tables.collect(evaluated, ROOT / "conf"), with_published=False).n == 1).all()


def test_both_variants_are_rows_of_every_table(finished):
    evaluated = finished(*cells(loss=losses(margin=0.1), seed=SEEDS), *cells(loss=losses(margin=0.2), seed=SEEDS))
    table = tables.summarise(tables.collect(evaluated, ROOT / "conf"), with_published=False)
    assert sorted(zip(table.variant, table.protocol, table.n, strict=True)) == [
        (variant, protocol, 3) for variant in ("margin=0.1", "margin=0.2") for protocol in ("best_on_test", "final")
    ]
    text = squeezed(to_markdown(table, "glyphs", TEST, evaluated, NO_GAINS))
    assert all(f"| cbml_log (margin={margin}) | final | 3 |" in text for margin in (0.1, 0.2))
    assert "cbml\\_log (margin=0.2)" in to_latex(table, "glyphs", TEST)
    assert "(margin=0." in tables.headline(table)["best_cell"]
    assert tables.versus_best(tables.collect(evaluated, ROOT / "conf")).shape[0] == 2  # final, best_on_test
    curves = tables.curves(evaluated)
    assert list(curves) == ["cell", *tables.ROW, "seed", "iteration", "recall_at_1"]
    assert curves.groupby("variant").cell.nunique().to_dict() == {"margin=0.1": 3, "margin=0.2": 3}


@pytest.mark.slow
def test_every_finished_cell_of_the_store_is_tabulated(tmp_path, capsys):
    workspace = Workspace(tmp_path, tmp_path)
    set_params(workspace)
    with pytest.raises(UserError, match="glyphs: the tracking store has no evaluated cell"):
        tabulate(workspace, "glyphs", all_cells=True)
    # DVC has but one place for the first two; the third is of other images.
    others = {"fingerprint": "4567", "finished": "2025-12-31T00:00:00+00:00"}
    for margin, record in {0.1: {}, 0.2: {}, 0.3: others}.items():
        tree = Workspace(tmp_path / str(margin))
        (cell,) = cells(loss=losses(margin=margin))
        one = finish(tree, cell, **record)
        page = one.page if margin == 0.1 else None
        hand_over(workspace, cell, one.folder, tree.run(cell), page=page)
    text = squeezed(tabulate(workspace, "glyphs", all_cells=True))
    assert all(f"| resnet18 | cbml_log (margin={margin}) | final | 1 |" in text for margin in (0.1, 0.2))
    assert "runs: 2," in text and "1 cells of other images or lists are left out" in capsys.readouterr().err
    curves = pd.read_csv(workspace.report("glyphs") / "curves.csv")
    assert set(curves.variant) == {"margin=0.1", "margin=0.2"} and len(curves) == 8
    page = (workspace.report("glyphs") / "index.html").read_text()
    rows = [row for row in page.split("<tr") if "resnet18 · final" in row]
    seeds = {
        re.search(r"\((margin=0.\d)\)", row)[1]: re.search(r"<td>(.*0.*)</td>\n<td><button", row)[1] for row in rows
    }
    assert "<a href" not in next(row for row in rows if "margin=0.2" in row)
    link = re.fullmatch(r'<a href="(.+)#.+">0</a>', seeds["margin=0.1"])[1]
    assert (workspace.report("glyphs") / link).read_text() == "the page of a cell" and seeds["margin=0.2"] == "0"

    client = tracking.Store(workspace).client
    (run,) = client.search_runs([client.get_experiment_by_name("tables").experiment_id])
    assert run.data.params["loss"] == "cbml_log" and run.data.tags["dataset"] == "glyphs"
    assert squeezed(run.data.tags["mlflow.note.content"]) == text
    kept = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"tables.md", "tables.csv", "tables.tex", "curves.csv", "curves.svg", "tables.json"} <= kept
    assert min(kept) == "cells.html"  # what MLflow lists first


def test_two_datasets_have_a_page_each_and_one_page_leads_to_both(workspace):
    tabulate(workspace, "glyphs")
    (workspace.report("birds")).mkdir()  # as git has it: the figures of a page that was made elsewhere
    (workspace.report("birds") / "metrics.json").write_text((workspace.report("glyphs") / "metrics.json").read_text())
    links = re.findall(r'<a href="([^"]+)">', workspace.index.read_text())
    assert links == ["glyphs/index.html"] and 'location.replace("glyphs"' in workspace.index.read_text()
    tabulate(workspace, "cub200")
    text = workspace.index.read_text()
    assert "location.replace" not in text
    assert re.findall(r'<a href="([^"]+)">', text) == ["cub200/index.html", "glyphs/index.html"]
    for dataset in DATASETS:
        page = (workspace.reports / dataset / "index.html").read_text()
        assert f"<h1>Recall@K on {dataset}</h1>" in page and 'href="../index.html#all"' in page
    assert (
        len(re.findall(r">66.0</td>\s*<td class=\"number\">10.0</td>\s*.*2</td>\s*<td>resnet18-cbml_sqrt-64<", text))
        == 2
    )


def test_a_cell_that_other_code_trained_is_announced_with_the_command_that_trains_it_again(finished):
    now = provenance.training_code()
    evaluated = finished(*cells())
    assert tables.outdated(evaluated) == []
    old = finished(*cells(), code=now | {"training/loop.py": "000000000000", "losses/gone.py": "111111111111"})
    (line,) = tables.outdated(old)
    assert "code than today's** (src/cbml/training/loop.py; no longer there: src/cbml/losses/gone.py): resnet" in line
    assert f"`{TRAIN} && dvc repro`" in line
    table = tables.summarise(tables.collect(old, ROOT / "conf"), with_published=False)
    assert line in to_markdown(table, "glyphs", TEST, old, NO_GAINS).partition("## Embeddings")[0]  # before any figure
    assert "other code" not in to_markdown(table, "glyphs", TEST, evaluated, NO_GAINS)


def test_one_command_trains_all_such_cells_again_and_names_each_once(finished):
    old = {"code": {"network.py": "000000000000"}}
    evaluated = finished(*cells(loss=losses(margin=0.1), seed=[0, 1]), *cells(loss=losses(margin=0.2)), **old)
    (line,) = tables.outdated([*evaluated, *finished(*cells(embedding_dim=[32]))])
    assert f"`{TRAIN} train@resnet18-cbml_log-16-1-glyphs && dvc repro`" in line and "-32-" not in line
    assert [line.count(f"-{name})") for name in ("0 (margin=0.1", "1 (margin=0.1", "0 (margin=0.2")] == [1, 1, 1]


def test_the_command_for_a_cell_of_the_store_comes_after_that_of_its_row(finished):
    """Params.yaml may have another cell of that name."""
    old = {"code": {"network.py": "000000000000"}}
    evaluated = finished(*cells(loss=losses(margin=0.1)), *cells(loss=losses(margin=0.2)), **old)
    (line,) = tables.outdated([replace(one, page=one.folder) for one in evaluated])
    assert "0 (margin=0.1), resnet18-cbml_log-16-0 (margin=0.2). Again, after the command of its row, just" in line
    assert "after the command" not in tables.outdated(evaluated)[0]


def test_a_cell_that_other_code_scored_is_announced_with_the_command_that_scores_it_again(finished):
    other = {"scoring_code": provenance.scoring_code() | {"models/heads.py": "000000000000"}}
    (line,) = tables.outdated([*finished(*cells(), **other), *finished(*cells(embedding_dim=[32]))])
    assert line == (
        "**Scored by other code than today's** (src/cbml/models/heads.py): resnet18-cbml_log-16-0. Again, just those: "
        "`dvc repro -f -s evaluate@resnet18-cbml_log-16-0-glyphs && dvc repro`."
    )
    trained, scored = tables.outdated(finished(*cells(), code={"network.py": "000000000000"}, **other))
    assert trained.startswith("**Trained by") and scored.startswith("**Scored by")


def test_records_of_an_earlier_layout_are_read(finished):
    """Their hashes are of files that are elsewhere now; and what scored them they do not say."""
    old = {"code": {"training/loop.py": "0" * 12, "batches/base.py": "1" * 12, "batches/kmeans.py": "2" * 12}}
    (line,) = tables.outdated(finished(*cells(), **old))
    absent = "src/cbml/batches/base.py, src/cbml/batches/kmeans.py"
    assert f"(src/cbml/training/loop.py; no longer there: {absent})" in line


def test_the_metrics_have_the_same_names_whatever_cells_ran(workspace):
    file = workspace.report("glyphs") / "metrics.json"
    tabulate(workspace, "glyphs")
    all_cells = json.loads(file.read_text())
    set_params(workspace, loss={"cbml_log": LOSSES["cbml_log"]}, seed=[2])
    tabulate(workspace, "glyphs")
    one_cell = json.loads(file.read_text())
    assert list(all_cells) == list(one_cell)
    assert one_cell["R@1"] == {"resnet18-cbml_log-64": 62.0}
    assert sorted(all_cells["R@1"]) == ["resnet18-cbml_log-64", "resnet18-cbml_sqrt-64"]
    assert (all_cells["best_cell"], all_cells["recall_at_1"]) == ("resnet18-cbml_sqrt-64", 66.0)
    assert (one_cell["best_cell"], one_cell["recall_at_1"], one_cell["cells"]) == ("resnet18-cbml_log-64", 62.0, 1)


def named(backbone, losses, sizes):
    """Cells whose names are those of published rows."""
    entry = tiny_params()["backbone"]["resnet18"]
    return cells(backbone={backbone: entry}, loss=losses, embedding_dim=sizes)


def test_published_figures_of_others_stand_beside_our_option_of_their_method_with_their_size(finished):
    evaluated = finished(*named("resnet50", {"mic": {"type": "cbml"}, "tml": {"type": "tml"}}, [512, 128]))
    table = tables.summarise(tables.collect(evaluated, ROOT / "conf"), with_published=True)
    text = squeezed(to_markdown(table, "cub200", tables.PUBLISHED_TEST, evaluated, NO_GAINS))
    large, small = text.split("## Embeddings of ")[1:3]
    assert "| resnet50 | mic | final | 1 | 50.0 | 66.1 (128-d, -16.1) |" in large
    assert "| resnet50 | tml | final | 1 | 50.0 | 62.5 (-12.5) |" in large
    assert "| resnet50 | mic | final | 1 | 50.0 | 66.1 (-16.1) |" in small  # in its own size
    assert "MIC+Margin: 128 in its authors' code" in text and "CBML-log: " not in text


def test_what_was_trained_without_labels_is_a_table_of_its_own_beside_its_published_figures(finished):
    clusters = {"type": "cbml", "batches": {"type": "clusters", "k": 4}}
    losses = {"stml": clusters, "cbml_log": {"type": "cbml"}}
    evaluated = finished(*named("googlenet", losses, [512]))
    table = tables.summarise(tables.collect(evaluated, ROOT / "conf"), with_published=True)
    text = squeezed(to_markdown(table, "cub200", tables.PUBLISHED_TEST, evaluated, NO_GAINS))
    labelled, unlabelled = text.split("## Embeddings of 512")[1:]
    assert unlabelled.startswith(", trained without labels")
    assert "| googlenet | stml (from scratch) | final | 1 | 50.0 | 60.6 (-10.6) |" in unlabelled
    assert "UDML-SS" in unlabelled and "UDML-SS" not in labelled and "| cbml_log |" not in unlabelled
    assert "BIER" in labelled and "| cbml_log | final | 1 | 50.0 | 63.8 (-13.8) |" in labelled
    assert "no label of this dataset" in text


def test_the_published_tables_are_complete():
    paper = tables.published()
    assert paper.source.value_counts().to_dict() == {"literature": 29, "paper": 18, "unsupervised": 4}
    options = {file.stem for file in (ROOT / "conf" / "loss").glob("*.yaml")}
    assert set(paper.option) <= options
    recalls = paper[paper.source != "unsupervised"][recalls_of(paper)]
    assert recalls.shape == (47, 4)
    assert (recalls.diff(axis=1).iloc[:, 1:].fillna(1) > 0).all(axis=None)


def test_similarities_are_means_over_bins(finished):
    densities = tables.similarities(finished(*cells(seed=[0, 1])), 0.6)  # 2, 3, 3, 2 of those that are 0.2 apart
    assert list(densities) == ["cell", "split", "pair", "similarity", "density"]
    assert len(densities) == 2 * 2 * 2 * 4
    assert densities.similarity[:4].tolist() == [-0.8, -0.3, 0.3, 0.8] and set(densities.density) == {0.5}


def test_latex_has_one_tabular_per_size_with_the_papers_figures(finished):
    evaluated = finished(*cells(embedding_dim=[64, 16], seed=[0, 1]))
    table = tables.summarise(tables.collect(evaluated, ROOT / "conf"), with_published=True)
    text = to_latex(table, "glyphs", TEST)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    first, second = text.split("% Recall@K")[1:]
    assert "glyphs in percent: Embeddings of 64; test list: 1,140 images" in first.splitlines()[0]
    assert "Embeddings of 16" in second.splitlines()[0]
    for tabular in (first, second):
        columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", tabular)[1])
        lines = [line for line in tabular.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {columns - 1}
    assert r"resnet18 & cbml\_log & final & 2 & 50.0 $\pm$ 0.0 & 61.3 (-11.3) &" in first
    assert "paper" not in second


def test_latex_prints_every_character_as_it_stands(finished):
    (one,) = finished(*cells())
    evaluated = [replace(one, variant=r"a_b & 50% #1 $x$ {y} ~ ^ \z")]
    cells_of_it = tables.collect(evaluated, ROOT / "conf")
    table = tables.summarise(cells_of_it, with_published=False).assign(map_at_r=np.nan)
    text = to_latex(table, "glyphs", TEST)
    assert (
        r"cbml\_log (a\_b \& 50\% \#1 \$x\$ \{y\} \textasciitilde \space \textasciicircum \space \textbackslash z)"
        in text
    )
    body = text.partition("\n")[2]  # after the comment
    assert not re.search(r"(?<!\\)[%#_]|[^\x00-\x7f]", body) and "& -- &" in body


WRITTEN_BY = {
    "run.json": "evaluate",
    "validations.csv": "evaluate",
    "metrics.json": "evaluate",
    "similarities.csv": "evaluate",
    "similarities.json": "evaluate",
    "classes.csv": "evaluate",
    "neighbours.npz": "evaluate",
    "summary.json": "evaluate",
}
DAMAGED = [(name, content) for name in WRITTEN_BY for content in (None, b"", b"\x89PNG\n\0\xff", b"[]")] + [
    ("run.json", b'{"key": "resnet18-cb'),
    ("run.json", b'{"key": "resnet18-cbml_log-64-0-0123456789"}'),
    ("metrics.json", b'{"final": {"recall_at_1": 0.'),
    ("metrics.json", b"{}"),
    ("metrics.json", b'{"final": {"recall_at_1": 50.0}, "untrained": {"rekall_at_1": 9.0}}'),
    ("metrics.json", b'{"final": {"recall_at_1": "50.0"}, "untrained": {"recall_at_1": 9.0}}'),
    (
        "metrics.json",
        b'{"final": {"recall_at_1": 50.0, "nmi": 60.0}, "best_on_test": {"recall_at_1": 51.0}, '
        b'"untrained": {"recall_at_1": 9.0}}',
    ),
    ("summary.json", b"{}"),
    ("validations.csv", b"iteration,recall_at_1\n"),
    ("validations.csv", b"iteration,recall_at_1\n0,10.0\n2,40.0\n"),
    ("similarities.csv", b"split,pair,similarity,density\ntrain,positive,-0.9,0.5\n"),
    ("similarities.json", b"{}"),
    ("classes.csv", b"class,images,recall_at_1,confused_with\na,9,25.0,b\n"),
    ("similarities.csv", b"split,pair,similarity,density\n"),
    ("validations.csv", b"iteration,recall_at_1\n0,10.0\n2,4q.0\n4,50.0\n6,50.0\n"),
    ("classes.csv", b"class,images,recall_at_1,confused_with\n"),
]


@pytest.mark.parametrize(("name", "content"), DAMAGED)
def test_one_line_names_a_file_that_is_missing_or_damaged_and_the_stage_that_writes_it(empty, name, content):
    (cell,) = set_params(empty, loss=losses(), seed=[0]).cells("glyphs")
    evaluated = finish(empty, cell)
    write_images(empty)
    file = evaluated.folder / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as raised:
        if name == "classes.csv":
            write_cell_page(evaluated, empty)
        else:
            tabulate(empty, "glyphs")
    text = str(raised.value)
    assert text.startswith(f"{file}: ") and "\n" not in text and f"the stage {WRITTEN_BY[name]}" in text
    assert not empty.reports.exists()


@pytest.mark.parametrize("content", [b"cbml_log: [", b"[]", b"cbml_log: 7\n", b"\xff\xfe", b"other: {}\n"])
@pytest.mark.parametrize("group", ["loss", "backbone", "dataset"])
def test_a_row_whose_options_file_cannot_be_read_has_no_command(empty, capsys, group, content):
    """A command is shown, and ends no stage."""
    shutil.copytree(ROOT / "conf", empty.conf)
    (cell,) = set_params(empty, loss=losses(), seed=[0], dataset=tiny_params()["dataset"]).cells("glyphs")
    one = finish(empty, cell)
    assert "## Every row again" in tabulate(empty, "glyphs")
    (empty.conf / group / f"{getattr(cell, group)}.yaml").write_bytes(content)
    capsys.readouterr()
    hand_over(empty, cell, one.folder, empty.run(cell))
    text, said = tabulate(empty, "glyphs"), capsys.readouterr().err
    assert "| resnet18 | cbml_log | final |" in squeezed(text)
    if "no command is shown for it" in said:
        assert "dvc exp run" not in text and "dvc exp run" not in (empty.report("glyphs") / "index.html").read_text()
    else:  # what is there is no mapping, and so no option of that name
        assert "dvc exp run" in text


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff", b'{"recall_at_1": "high"}', None])
def test_a_damaged_report_of_another_dataset_ends_no_table(workspace, capsys, content):
    tabulate(workspace, "cub200")
    file = workspace.report("cub200") / "metrics.json"
    headline = json.loads(file.read_text())
    if content is None:
        file.unlink()
    elif content.startswith(b'{"'):
        file.write_text(json.dumps(headline | json.loads(content)))
    else:
        file.write_bytes(content)
    capsys.readouterr()
    tabulate(workspace, "glyphs")
    said = capsys.readouterr().err
    assert f"no figures of cub200: {file}: " in said and "tabulate@cub200" in said
    rows = re.findall(r"<tr.*?</tr>", workspace.index.read_text(), re.DOTALL)
    assert any('href="cub200/index.html"' in row for row in rows) and any("66.0" in row for row in rows)


def test_without_the_images_of_the_cells_a_page_has_no_pictures_and_says_why(workspace, capsys):
    write_images(workspace)
    tabulate(workspace, "glyphs")
    page = workspace.report("glyphs") / "index.html"
    assert 'class="tile right"' in page.read_text() and "without pictures" not in capsys.readouterr().err
    for damage, reason in (
        (
            lambda lists: (lists / "summary.json").write_text('{"fingerprint": "4567"}'),
            "is of other images than the cells",
        ),
        (lambda lists: (lists / "summary.json").unlink(), "summary.json: no such file"),
    ):
        damage(workspace.lists("glyphs"))
        tabulate(workspace, "glyphs")
        assert "tile right" not in page.read_text() and "<h1>Recall@K on glyphs" in page.read_text()
        assert reason in capsys.readouterr().err


def test_a_missing_evaluation_is_named_with_its_stage(workspace):
    set_params(workspace, seed=[3])
    with pytest.raises(
        UserError, match=r"resnet18-cbml_log-64-3/run\.json: no such file; the stage evaluate writes it"
    ):
        tabulate(workspace, "glyphs")
    with pytest.raises(UserError, match="dataset 'birds' is not there; allowed: cub200, glyphs"):
        tabulate(workspace, "birds")
