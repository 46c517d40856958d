"""What tells runs apart in MLflow's UI: names, colours, descriptions."""

from dataclasses import replace

import pandas as pd
import pytest
from helpers import ROOT, entry, tiny_params

from cbml.report.common.style import COLOURS
from cbml.report.tables.comparisons import cell_colours
from cbml.spec.params import Params
from cbml.tracking.run import ABOUT_TABLES, TABLES, open_cell, open_tables, run_name
from cbml.tracking.store import NOTE, Store
from cbml.workspace import Workspace

LOSSES = {"cbml_log": entry("loss", "cbml_log"), "triplet": entry("loss", "triplet")}


def cells(**groups):
    return Params.model_validate(tiny_params(**groups)).cells("glyphs")


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path, tmp_path)


def test_a_run_is_named_by_what_was_set_beyond_the_files_of_its_options():
    (cell,) = cells(recipe=entry("recipe", "quick"))
    assert run_name(cell, ROOT / "conf") == cell.name == "resnet18-cbml_log-16-0"
    loss = cell.loss_config.model_copy(update={"margin": 0.2})
    recipe = cell.recipe.model_copy(update={"iterations": 60, "lr_steps": [5]})
    other = replace(cell, loss_config=loss, recipe=recipe)
    assert run_name(other, ROOT / "conf") == f"{cell.name} margin=0.2, recipe.iterations=60, recipe.lr_steps=[5]"


def test_a_name_needs_no_files(tmp_path):
    (cell,) = cells()
    assert run_name(cell, tmp_path) == cell.name
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "cbml_log.yaml").write_text("[")
    assert run_name(cell, tmp_path) == cell.name


def test_methods_have_the_colours_of_the_page_and_others_those_that_are_left(workspace):
    several = cells(loss=LOSSES, seed=[0, 1])
    other = cells(loss={"margin": entry("loss", "margin")})
    keys = [f"{cell.name}-0" for cell in [*several, *other]]
    for cell, key in zip([*several, *other], keys, strict=True):
        with open_cell(workspace, cell, key, "0123"):
            pass
    rows = [
        {"cell": key, "method": cell.loss, "variant": "", "iteration": i, "recall_at_1": i * (2 - (cell.loss < "m"))}
        for cell, key in zip(several, keys, strict=False)
        for i in (0, 6)
    ]
    colours, left = cell_colours(pd.DataFrame(rows))
    assert [colours[key] for key in keys[:4]] == [COLOURS[1], COLOURS[1], COLOURS[0], COLOURS[0]]  # best first
    for _ in range(2):
        with open_tables(workspace, "glyphs", several) as run:
            run.colour("glyphs", colours, left)
        assert run.complete
    client = Store(workspace).client
    found = client.search_runs([client.get_experiment_by_name("glyphs").experiment_id])
    tags = {run.data.tags["cell_key"]: run.data.tags["mlflow.runColor"] for run in found}
    assert tags == colours | {keys[4]: COLOURS[2]}


def test_experiments_say_what_they_hold_and_what_was_said_stays(workspace):
    store = Store(workspace)
    made = store.experiment("glyphs")  # as earlier releases made it
    for _ in range(2):
        with open_cell(workspace, cells()[0], "key-0", "0123"):
            pass
        assert "a network trained on glyphs" in store.client.get_experiment(made).tags[NOTE]
    store.client.set_experiment_tag(made, NOTE, "mine")
    with open_cell(workspace, cells()[0], "key-0", "0123"), open_tables(workspace, "glyphs", cells()):
        pass
    assert store.client.get_experiment(made).tags[NOTE] == "mine"
    assert store.client.get_experiment_by_name(TABLES).tags[NOTE] == ABOUT_TABLES
