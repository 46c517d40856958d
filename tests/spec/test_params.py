"""Parameters: what is committed is what composes, and bad ones are refused in one line that says what is allowed."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import compose_and_dump
from helpers import ROOT, TINY_RECIPE, ended, entry, tiny_params

from cbml.errors import UserError
from cbml.report.tables.rows import published
from cbml.spec.options import option_file, recipe_file
from cbml.spec.params import Params, load_cell, load_params
from cbml.workspace import Workspace

OPTIONS = [file for group in ("dataset", "backbone", "loss", "recipe") for file in sorted(ROOT.glob(f"conf/{group}/*"))]


def test_params_yaml_is_what_conf_composes_to(tmp_path):
    compose_and_dump(tmp_path / "params.yaml", str(ROOT / "conf"), None, "config", None, [])
    assert yaml.safe_load((tmp_path / "params.yaml").read_text()) == yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.mark.parametrize("file", OPTIONS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_option_of_a_group_defines_itself_and_is_valid(file, tmp_path):
    group, option = file.parent.name, option_file(ROOT / "conf", file.parent.name, file.stem)
    options = option if group == "recipe" else {file.stem: option}
    params = tiny_params(**{group: options}, embedding_dim=[144])  # up to nine parts share it
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    read = getattr(load_params(tmp_path / "params.yaml"), group)
    assert read.name == file.stem if group == "recipe" else list(read) == [file.stem]


def changed(path, value):
    """Tiny parameters with the one at `path` set."""
    params = yaml.safe_load(yaml.safe_dump(tiny_params()))
    *parents, last = path.split(".")
    node = params
    for name in parents:
        node = node[name]
    node[last] = value
    return params


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("loss.cbml_log.type", "cmbl", r"loss\.cbml_log: .*'cmbl'.*'cbml'"),
        ("backbone.resnet18.type", "resnet19", r"backbone\.resnet18\.type: .*'resnet18'.*resnet19"),
        ("dataset.glyphs.type", "birds", r"dataset\.glyphs: .*'birds'.*'glyphs', 'cub200'"),
        ("loss.cbml_log.margn", 0.1, r"loss\.cbml_log: unknown parameter margn; allowed: .*margin"),
        ("loss.cbml_log.margin", "wide", r"loss\.cbml_log\.margin: .*valid number.*'wide'"),
        ("loss.cbml_log.form", "exp", r"loss\.cbml_log\.form: .*'log', 'sqrt' or 'const'.*'exp'"),
        ("backbone.resnet18.poolin", "avg", r"backbone\.resnet18.*poolin.*allowed: .*pooling"),
        ("dataset.glyphs.clases", 8, r"dataset\.glyphs.*clases.*allowed: .*classes"),
        ("recipe.iteratons", 5, r"recipe: unknown parameter iteratons; allowed: name, weights, iterations"),
        ("recipe.lr", "fast", r"recipe\.lr: .*valid number.*'fast'"),
        ("recipe.batch_size", 9, r"recipe: batch_size 9 is not a multiple of instances 2"),
        ("recipe.crop", 30, r"recipe: crop 30 is larger than resize 24"),
        ("recipe.optimizer", "adamp", r"recipe\.optimizer: .*'adam', 'adamw' or 'sgd'"),
        ("recipe.color_jitter", [0.1, 0.1, 0.1, 0.6], r"recipe\.color_jitter.*less than or equal to 0.5"),
        ("seed.0", -1, r"seed\.0: .*greater than or equal to 0"),
        ("loss.cbml_log.head", {"type": "groups", "shares": [1, 2]}, r"loss\.cbml_log: .*do not divide"),
    ],
)
def test_a_bad_parameter_is_one_line(path, value, message, tmp_path):
    params = tiny_params(seed=[-1]) if path == "seed.0" else changed(path, value)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(UserError, match=message) as error:
        load_params(tmp_path / "params.yaml")
    assert "\n" not in str(error.value) and "params.yaml" in str(error.value)


def test_a_missing_and_a_broken_file(tmp_path):
    with pytest.raises(UserError, match="no such file; run from the repository"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not YAML"):
        load_params(tmp_path / "params.yaml")


def test_a_cell_that_is_not_there(project):
    with pytest.raises(UserError, match=r"loss 'triplet' is not there; allowed: cbml_log"):
        load_params(Path("params.yaml")).cell("glyphs", "resnet18", "triplet", 16, 0)


def test_a_cell_survives_its_file(project):
    cell = load_params(Path("params.yaml")).cell("glyphs", "resnet18", "cbml_log", 16, 0)
    Path("cell.yaml").write_text(yaml.safe_dump(cell.to_dict()))
    assert load_cell(Path("cell.yaml")) == cell and cell.name == "resnet18-cbml_log-16-0"


def cell_of(**changes):
    """The one cell of the tiny parameters with some groups replaced."""
    Path("params.yaml").write_text(yaml.safe_dump(tiny_params(**changes)))
    (cell,) = Workspace().cells("glyphs")
    return cell


def with_recipe(**changes):
    return {"recipe": TINY_RECIPE | changes}


def with_entry(**changes):
    return {"backbone": {"resnet18": tiny_params()["backbone"]["resnet18"] | changes}}


def test_the_key_follows_everything_that_a_result_depends_on(project):
    def key(data="images", weights=None, **changes):
        return cell_of(**changes).key(data, weights)

    keys = [
        key(),
        key(data="others"),
        key(weights="content"),
        key(seed=[1]),
        key(**with_recipe(lr=0.1)),
        key(**with_recipe(name="other")),
        key(loss={"cbml_log": {"type": "cbml", "margin": 0.2}}),
        key(**with_entry(pooling="max")),
    ]
    assert len(set(keys)) == len(keys) and key() == keys[0]
    assert keys[0].startswith("resnet18-cbml_log-16-0-")
    assert keys[0].rpartition("-")[2] == keys[3].rpartition("-")[2]  # seeds of one row


def test_the_key_does_not_follow_where_things_are_from(project):
    key = cell_of().key("images", "content")
    assert cell_of(**with_entry(weights="somewhere/a.pth")).key("images", "content") == key
    assert cell_of(**with_entry(weights="/elsewhere/b.pth")).key("images", "content") == key
    assert cell_of(**with_entry(recipe={"other": {"lr": 1.0}})).key("images", "content") == key


def test_the_key_does_not_follow_how_its_constants_were_found(project):
    loss = entry("loss", "cbml_log")
    tuned = cell_of(loss={"cbml_log": loss | {"tuned": "4 trials"}})
    assert tuned.key("images", None) == cell_of(loss={"cbml_log": loss}).key("images", None)
    assert tuned.flat()["loss.tuned"] == "4 trials"


def test_a_backbone_brings_its_own_pixels_and_changes_to_the_recipe(project):
    own = tiny_params()["backbone"]["resnet18"]["input"] | {"crop": 16, "interpolation": "bicubic"}
    cell = cell_of(**with_entry(recipe={"tiny": {"lr_steps": [3]}, "other": {"lr_steps": [9]}}, input=own))
    assert (cell.recipe.lr_steps, cell.recipe.crop, cell.recipe.resize) == ([3], 16, 24)
    assert cell.recipe.interpolation == "bicubic"
    assert cell.changes == {
        "crop": (20, 16, "backbone.resnet18"),
        "interpolation": ("bilinear", "bicubic", "backbone.resnet18"),
        "lr_steps": ([], [3], "backbone.resnet18"),
    }
    with pytest.raises(UserError, match=r"backbone\.resnet18 with recipe=tiny: .*unknown parameter lr_step"):
        cell_of(**with_entry(recipe={"tiny": {"lr_step": [3]}}))


def test_a_loss_changes_the_recipe_after_the_backbone_and_what_is_set_for_a_run_wins(project):
    Path("conf/recipe").mkdir(parents=True)
    Path("conf/recipe/tiny.yaml").write_text(yaml.safe_dump(TINY_RECIPE))
    loss = {"loss": {"cbml_log": {"type": "cbml", "recipe": {"tiny": {"lr_steps": [4], "flip": False}}}}}
    entry = with_entry(recipe={"tiny": {"lr_steps": [3]}}) | loss
    cell = cell_of(**entry)
    assert cell.changes == {"lr_steps": ([], [4], "loss.cbml_log"), "flip": (True, False, "loss.cbml_log")}
    assert cell_of(**entry, **with_recipe(lr_steps=[2])).recipe.lr_steps == [2]
    # What the recipe came to is what counts, not by whom.
    same = cell_of(**with_recipe(lr_steps=[4], flip=False), loss={"cbml_log": {"type": "cbml"}})
    assert cell.key("images", None) == same.key("images", None)
    loss["loss"]["cbml_log"]["recipe"]["tiny"] = {"lr_step": [4]}
    with pytest.raises(UserError, match=r"loss\.cbml_log with recipe=tiny: .*unknown parameter lr_step"):
        cell_of(**loss)


def test_what_is_set_for_a_run_wins_over_the_backbones_entry(project):
    """Else `-S recipe.paper.lr_steps=[2000]` would do nothing, in silence, for GoogLeNet."""
    Path("conf/recipe").mkdir(parents=True)
    Path("conf/recipe/tiny.yaml").write_text(yaml.safe_dump(TINY_RECIPE))
    own = tiny_params()["backbone"]["resnet18"]["input"] | {"crop": 16}
    entry = with_entry(recipe={"tiny": {"lr_steps": [3]}}, input=own)
    untouched = cell_of(**entry)
    assert (untouched.recipe.lr_steps, untouched.recipe.crop) == ([3], 16)
    cell = cell_of(**entry, **with_recipe(lr_steps=[2], crop=24))
    assert (cell.recipe.lr_steps, cell.recipe.crop) == ([2], 24) and not cell.changes


def test_the_name_of_a_metric_stands_for_a_selection(project):
    short = cell_of(**with_recipe(select_by="map_at_r"))
    full = cell_of(**with_recipe(select_by={"metric": "map_at_r", "validation_classes": 0.2}))
    assert short.recipe == full.recipe and short.key("", None) == full.key("", None)


@pytest.mark.parametrize("size", [512, 64])
def test_the_presets_are_the_cells_that_the_paper_publishes(size, tmp_path):
    compose_and_dump(tmp_path / "params.yaml", str(ROOT / "conf"), None, "config", None, [f"+paper=cub200_{size}"])
    cells = load_params(tmp_path / "params.yaml").cells("cub200")
    paper = published().query("source == 'paper' and embedding_dim == @size")
    expected = {(row.backbone, row.method.lower().replace("-", "_")) for row in paper.itertuples()}
    assert {(cell.backbone, cell.loss) for cell in cells} == expected and len(cells) == 3 * len(expected)
    for cell in cells:
        assert (cell.backbone_config.weights, cell.recipe.iterations, cell.recipe.batch_size) == ("imagenet", 5000, 120)
        assert cell.recipe.lr_steps == ([3000] if cell.backbone == "googlenet" else [1200])


PRESETS_WITHOUT_LABELS = [
    ("unsupervised", set()),
    ("unsupervised_controls", {"cbml_log"}),
    ("cub200_unsupervised", set()),
    ("cub200_frozen_clusters", set()),
]


@pytest.mark.parametrize(("preset", "labelled"), PRESETS_WITHOUT_LABELS)
def test_the_presets_without_labels_use_none(preset, labelled, tmp_path):
    compose_and_dump(tmp_path / "params.yaml", str(ROOT / "conf"), None, "config", None, [f"+paper={preset}"])
    params = load_params(tmp_path / "params.yaml")
    cells = params.cells(*params.dataset)
    assert {cell.seed for cell in cells} == {0, 1, 2}
    batches = {cell.loss: cell.loss_config.batches for cell in cells}
    assert {loss for loss, each in batches.items() if each is None or each.needs_labels} == labelled
    assert batches["cbml_clusters_permuted"].permuted


def test_a_selection_by_labels_is_refused_where_none_are_used(project):
    loss = {"loss": {"isif": {"type": "isif", "batches": {"type": "instances"}}}}
    with pytest.raises(UserError, match="select_by map_at_r needs labels, loss.isif is trained without; allowed: null"):
        cell_of(**with_recipe(select_by="map_at_r"), **loss)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "isif", "teacher": 1.0}, "loss.x.teacher: Input should be less than 1, got 1.0"),
        (
            {"type": "proxynca", "batches": {"type": "clusters", "warm": False}},
            "proxynca has parameters of its own for each class, and the labels of these batches change their meaning",
        ),
        (
            {"type": "sum", "terms": {"a": {"type": "center"}}, "batches": {"type": "clusters", "warm": False}},
            "center has parameters of its own for each class",
        ),
    ],
)
def test_a_bad_method_is_one_line(config, message, project):
    with pytest.raises(UserError, match=re.escape(message)):
        cell_of(loss={"x": config})


@pytest.mark.parametrize(("dataset", "instances"), [("cars196", 8), ("sop", 4), ("inshop", 4)])
def test_the_presets_of_other_datasets_are_the_papers_recipe(dataset, instances, tmp_path):
    compose_and_dump(tmp_path / "params.yaml", str(ROOT / "conf"), None, "config", None, [f"+paper={dataset}"])
    cells = load_params(tmp_path / "params.yaml").cells(dataset)
    assert len(cells) == 9 and {cell.recipe.instances for cell in cells} == {instances}
    assert {(cell.recipe_name, cell.recipe.iterations, cell.recipe.batch_size) for cell in cells} == {
        ("paper", 5000, 120)
    }


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"seed": [0, 0]}, r"seed: \[0, 0\] holds a value twice"),
        ({"seed": [True]}, r"seed is \[true\], but is not a switch"),
        (
            {"recipe": TINY_RECIPE | {"iterations": True}},
            r"recipe: iterations is true, but is not a switch",
        ),
        ({"loss": {}}, "loss: .*at least 1 item"),
        (
            {"recipe": TINY_RECIPE | {"schedule": "cosine", "lr_steps": [3]}},
            r"recipe: lr_steps \[3\] are for schedule steps, not for cosine",
        ),
        ({"validation_classes": 0.2}, "unknown parameter validation_classes; allowed: .*"),
        ({"seed": [2**32]}, "seed.0: .*less than 4294967296"),
        ({"seed": [2**64]}, "seed.0: .*less than 4294967296"),
        ({"embedding_dim": [10**9]}, "embedding_dim.0: .*less than or equal to 65536"),
        ({"loss": {"a/b": {"type": "cbml"}}}, r"loss\.a/b: .*match pattern"),
        ({"loss": {"..": {"type": "cbml"}}}, r"loss\.\.\.: .*match pattern"),
        ({"recipe": TINY_RECIPE | {"name": "x" * 101}}, r"recipe\.name: .*at most 100 characters"),
        (
            {"recipe": TINY_RECIPE | {"select_by": {"metric": "nmi"}}},
            r"recipe\.select_by\.metric: .*'recall_at_1' or 'map_at_r'",
        ),
        (
            {"recipe": TINY_RECIPE | {"select_by": {"metric": "map_at_r", "validation_classes": 1}}},
            r"recipe\.select_by\.validation_classes: .*less than 1",
        ),
    ],
)
def test_a_bad_axis(bad, message, tmp_path):
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params(**bad)))
    with pytest.raises(UserError, match=message):
        load_params(tmp_path / "params.yaml")


def test_a_queued_experiment_names_the_files_that_its_copy_lacks(tmp_path):
    workspace = Workspace(tmp_path / "copy", tmp_path)
    for file in ("conf/loss/cbml_log.yaml", "conf/loss/mine.yaml", "src/cbml/losses/mine.py", "copy/params.yaml"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(yaml.safe_dump(tiny_params(loss={"mine": {"type": "mine"}})))
    shutil.copytree(tmp_path / "conf", workspace.conf, ignore=shutil.ignore_patterns("mine.yaml"))
    with pytest.raises(UserError, match=r"'mine' .*`git add conf/loss/mine.yaml src/cbml/losses/mine.py`") as caught:
        workspace.params()
    with pytest.raises(UserError) as elsewhere:
        Workspace(workspace.tree, workspace.tree).params()
    assert "git add" not in str(elsewhere.value) and str(elsewhere.value) in str(caught.value)


def test_flat_names_do_not_depend_on_the_option(project):
    flat = load_params(Path("params.yaml")).cell("glyphs", "resnet18", "cbml_log", 16, 0).flat()
    assert (flat["loss"], flat["loss.margin"], flat["recipe.lr"], flat["seed"]) == ("cbml_log", 0.1, 1e-3, 0)
    assert flat["backbone.input.channels"] == "RGB"


@pytest.mark.parametrize(
    "stage, message",
    [
        ("download birds", "params.yaml: dataset 'birds' is not there; allowed: glyphs"),
        ("build_lists birds", "params.yaml: dataset 'birds' is not there; allowed: glyphs"),
        ("evaluate runs/glyphs/none", "runs/glyphs/none/cell.yaml: no such file; the stage train writes it"),
        ("draw evaluations/glyphs/none", "none/cell.yaml: no such file"),
        ("tabulate glyphs", "run.json: no such file; the stage evaluate writes it"),
    ],
)
def test_a_stage_without_its_input_ends_with_one_line(project, capsys, stage, message):
    text = ended(*f"pipeline.{stage}".split())
    assert message in text and "\n" not in text and not capsys.readouterr().err


def test_a_recipe_says_what_backbones_start_from_that_do_not_say_themselves(tmp_path):
    def weights(entry, recipe):
        content = tiny_params()
        content["backbone"]["resnet18"]["weights"] = entry
        content["recipe"] = content["recipe"] | {"weights": recipe}
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
        return load_params(tmp_path / "params.yaml").cell("glyphs", "resnet18", "cbml_log", 16, 0)

    assert weights(None, None).backbone_config.weights is None
    assert weights(None, "imagenet").backbone_config.weights == "imagenet"
    assert weights("a.pth", "imagenet").backbone_config.weights == "a.pth"


def test_a_dot_in_the_name_of_an_option_is_refused_at_once_and_read_in_old_records(tmp_path):
    """DVC takes it for a level below, and ends in "Parameters are missing" after the lists."""
    entries = tiny_params()
    dotted = {
        "dataset.glyphs_2.0": {"dataset": {"glyphs_2.0": entries["dataset"]["glyphs"]}},
        "backbone.resnet_1.5": {"backbone": {"resnet_1.5": entries["backbone"]["resnet18"]}},
        "loss.cbml_m0.2": {"loss": {"cbml_m0.2": {"type": "cbml", "margin": 0.2}}},
        "recipe.name 'v1.1'": {"recipe": TINY_RECIPE | {"name": "v1.1"}},
    }
    for where, changes in dotted.items():
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params(**changes)))
        with pytest.raises(
            UserError, match=f"{re.escape(where)}: .*a dot .*allowed: letters, digits, _ and -"
        ) as caught:
            load_params(tmp_path / "params.yaml")
        assert "\n" not in str(caught.value)
        cell = load_cell(tmp_path / "params.yaml")
        assert "." in cell.dataset + cell.backbone + cell.loss + cell.recipe_name


# A finished cell as it was written when a recipe was {name: parameters}, and the key that it had then.
BEFORE = tiny_params() | {"recipe": {"tiny": {name: TINY_RECIPE[name] for name in TINY_RECIPE if name != "name"}}}
del BEFORE["loss"]["cbml_log"]["search"]  # which no record has
KEY = "resnet18-cbml_log-16-0-67373c9fc4"


def test_a_record_from_before_recipes_were_flat_is_read_and_keeps_its_key(tmp_path):
    (tmp_path / "cell.yaml").write_text(yaml.safe_dump(BEFORE))
    cell = load_cell(tmp_path / "cell.yaml")
    (tmp_path / "cell.yaml").write_text(cell.to_yaml())
    assert load_cell(tmp_path / "cell.yaml") == cell and cell.recipe_name == "tiny" and cell.recipe.lr == 1e-3
    now = Params.model_validate(tiny_params()).cell("glyphs", "resnet18", "cbml_log", 16, 0)
    assert cell.key("images", "weights") == now.key("images", "weights") == KEY


@pytest.mark.parametrize(
    "recipe",
    [BEFORE["recipe"], TINY_RECIPE | BEFORE["recipe"], TINY_RECIPE | {"quick": {"lr": 0.1}}],
    ids=["in the file", "added to it", "set for a run"],
)
def test_a_recipe_that_is_not_flat_is_told_the_new_form(recipe, tmp_path):
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params(recipe=recipe)))
    with pytest.raises(UserError, match=r"a recipe is flat, -S recipe=(tiny|quick) -S recipe\.\w+=[\d.]+$") as caught:
        load_params(tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)


def test_the_names_that_are_shown_are_the_names_to_set(tmp_path):
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    settings = ["recipe=paper", "recipe.iterations=20", "loss=[cbml_log]", "loss.cbml_log.margin=0.2"]
    compose_and_dump(tmp_path / "params.yaml", str(ROOT / "conf"), None, "config", None, settings)
    flat = Workspace(tmp_path, tmp_path).cells("glyphs")[0].flat()
    assert (flat["recipe"], flat["recipe.iterations"], flat["loss.margin"]) == ("paper", 20, 0.2)
    assert "recipe.name" not in flat


def test_a_number_is_a_number_however_it_is_written(tmp_path):
    """To YAML 1.1, and so to PyYAML, 1e-5 is text; Hydra and DVC read a number."""
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump(tiny_params(backbone={"vit": {"type": "timm", "model": "m", "arguments": {"a": 7, "b": 8}}}))
        .replace("a: 7", "a: 1e-5")
        .replace("b: 8", "b: -2E6")
    )
    assert load_params(tmp_path / "params.yaml").backbone["vit"].arguments == {"a": 1e-5, "b": -2e6}


def test_what_a_record_has_as_text_stays_text(tmp_path):
    """PyYAML writes 1378e020 without quotes, and it is a number to Hydra."""
    cell = Params.model_validate(tiny_params()).cell("glyphs", "resnet18", "cbml_log", 16, 0)
    published = cell.backbone_config.published.model_copy(update={"sha256": "1378e020"})
    cell = replace(cell, backbone_config=cell.backbone_config.model_copy(update={"published": published}))
    (tmp_path / "cell.yaml").write_text(cell.to_yaml())
    assert load_cell(tmp_path / "cell.yaml") == cell


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2024_01_15", r"got 20240115; .*quotes of its own: -S 'dataset.mine.path=\"…\"'"),
        ("0.5", r"got 0\.5; .*quotes of its own"),
        ("[1, 2]", r"Input should be a valid string, got \[1, 2\]$"),
    ],
)
def test_text_that_reads_like_a_number(value, message, tmp_path):
    """`-S dataset.folder.path=2024_01_15` is a number to Hydra."""
    option = {"mine": {"type": "folder", "path": "PLACE"}}
    text = yaml.safe_dump(tiny_params(dataset=option)).replace("PLACE", value)
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.mine\.path: " + ".*" + message):
        load_params(tmp_path / "params.yaml")


def test_what_dvc_looks_at_is_text_also_if_a_path_reads_like_a_number(tmp_path):
    """Else DVC ends with "'int' object has no attribute 'decode'"."""
    settings = ["dataset=folder", "dataset.folder.path=2024_01_15"]
    compose_and_dump(tmp_path / "params.yaml", str(ROOT / "conf"), None, "config", None, settings)
    assert yaml.safe_load((tmp_path / "params.yaml").read_text())["dataset"]["folder"]["watch"] == "20240115"


@pytest.mark.parametrize(("loss", "lr"), [("center", 5e-4), ("triplet", 1e-4)])
def test_a_loss_that_needs_another_rate_takes_up_a_variant_of_the_recipe(loss, lr, tmp_path):
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    compose_and_dump(tmp_path / "params.yaml", str(ROOT / "conf"), None, "config", None, [f"loss=[{loss}]"])
    (cell,) = Workspace(tmp_path, tmp_path).cells("glyphs")
    assert (cell.recipe.lr, cell.recipe.iterations, cell.recipe.lr_steps) == (lr, 400, [300])
    assert cell.changes["lr"] == (1e-3, lr, f"loss.{loss}")


def test_a_file_of_an_option_that_hydra_cannot_compose_is_one_line(project):
    Path("conf/recipe").mkdir(parents=True)
    Path("conf/recipe/tiny.yaml").write_text("defaults:\n  - absent\n  - _self_\n")
    with pytest.raises(UserError, match=r"conf/recipe/tiny\.yaml: Hydra cannot compose it: .*absent") as caught:
        Workspace().cells("glyphs")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"- 1\n", b"5\n", b"iterations: [", b"\0\1", b"defaults: 5\n"])
def test_a_recipe_whose_file_cannot_be_read_is_one_line(tmp_path, content):
    file = tmp_path / "conf/recipe/tiny.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"conf/recipe/tiny\.yaml: Hydra cannot compose it: ") as caught:
        recipe_file(tmp_path / "conf", "tiny")
    assert "\n" not in str(caught.value)
