"""The command of a row: Hydra, as DVC calls it, makes the same cells of it."""

import importlib.util
import shlex

import pytest
import yaml
from dvc.utils.cli_parse import to_path_overrides
from dvc.utils.hydra import compose_and_dump
from helpers import ROOT

from cbml.report.tables.commands import command
from cbml.spec.params import Params
from cbml.workspace import Workspace


@pytest.fixture
def compose(tmp_path):
    """The workspace that `dvc exp run -S …` runs in, for settings in addition to the default configuration."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")

    def compose_settings(settings):
        overrides = to_path_overrides(settings).get("params.yaml", [])
        compose_and_dump(tmp_path / "params.yaml", str(ROOT / "conf"), None, "config", None, overrides)
        return Workspace(tmp_path, tmp_path)

    return compose_settings


def settings_of(text):
    words = shlex.split(text)
    assert words[:3] == ["dvc", "exp", "run"] and set(words[3::2]) == {"-S"}
    return words[4::2]


def test_it_names_what_differs_from_the_files(compose):
    changed = yaml.safe_load((ROOT / "params.yaml").read_text())
    changed["loss"]["cbml_log"]["margin"] = 0.2
    changed["backbone"]["resnet18"] |= {"weights": "my weights.pth", "recipe": {"quick": {"lr": 0.01}}}
    changed["recipe"] |= {"scale": [0.5, 0.8], "select_by": "map_at_r"}
    cell = Params.model_validate(changed).cell("glyphs", "resnet18", "cbml_log", 512, 0)
    settings = settings_of(command(cell, [0, 1], ROOT / "conf"))
    assert settings == [
        "dataset=glyphs",
        "recipe=quick",
        "backbone=[resnet18]",
        "loss=[cbml_log]",
        "embedding_dim=[512]",
        "seed=[0,1]",
        'backbone.resnet18.weights="my weights.pth"',
        "loss.cbml_log.margin=0.2",
        "recipe.lr=0.01",
        "recipe.scale=[0.5,0.8]",
        "recipe.select_by={metric:map_at_r,validation_classes:0.2}",
    ]
    again = compose(settings)
    names = {"dataset": "glyphs", "backbone": "resnet18", "loss": "cbml_log", "embedding_dim": 512, "seed": 0}
    assert again.cell(**names) == cell and again.params().seed == [0, 1]


TIMM = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
SETTINGS = {
    "nothing": [],
    "weights that have no address": [
        "recipe=cpu",
        "backbone=[resnet50_caffe]",
        "backbone.resnet50_caffe.weights=resnet50_caffe.safetensors",
    ],
    "a metric alone to select by": ["recipe.select_by=map_at_r"],
    "a mapping to select by": ["recipe.select_by={metric:recall_at_1,validation_classes:0.3}"],
    "the backbone's own": ["recipe=paper", "backbone=[googlenet]"],
    "against the backbone's own": ["recipe=paper", "backbone=[googlenet]", "recipe.lr_steps=[2000]"],
    "the recipe's file against the backbone's own": [
        "recipe=paper",
        "backbone=[googlenet]",
        "++backbone.googlenet.recipe.paper.lr_steps=[1200]",
    ],
    "the recipe's file against a loss's variant": ["loss=[center]", "loss.center.recipe.quick.lr=0.001"],
    "another value in a loss's variant": ["loss=[center]", "loss.center.recipe.quick.lr=0.002"],
    "a recipe of one's own": ["recipe.name=mine", "recipe.lr=0.002"],
    "nothing against the backbone's own": ["recipe=paper", "backbone=[googlenet]", "recipe.lr_steps=[]"],
    "another crop than a timm model's": ["recipe=quick", "backbone=[timm]", "recipe.crop=24"],
    "the recipe's crop, not a timm model's": [
        "recipe=cpu",
        "backbone=[timm]",
        "++backbone.timm.recipe.cpu={crop:96,resize:112}",
    ],
    "a timm backbone with an entry": ["recipe=cpu", "backbone=[tf_efficientnet_lite0]", "recipe.crop=64"],
    "a timm model's arguments": ["recipe=cpu", "backbone=[timm]", "backbone.timm.model=test_vit"]
    + ["+backbone.timm.arguments={img_size: 96, drop_path_rate: 0.1}"],
    "a crop against a timm entry's": ["recipe=cpu", "backbone=[vit_small_patch14_dinov2]", "recipe.crop=84"],
    "another optimizer and schedule": ["recipe=paper", "recipe.optimizer=adamw", "recipe.weight_decay=0.05"]
    + ["recipe.schedule=cosine", "recipe.lr_steps=[]", "recipe.warmup=250"]
    + ["recipe.clip_norm=1", "recipe.head_lr_factor=10"],
    "colours": ["recipe.color_jitter=[0.4,0.4,0.4,0.1]"],
    "weights of one's own": ["recipe=cpu", "backbone.resnet18.weights=/data/my-weights.pth"],
    "odd characters": ['backbone.resnet18.weights="é $x {a}, \'b\' \\"c\\" \\\\d:%.pth"'],
    "words that are not words": ["backbone.resnet18.weights='null'", "dataset.glyphs.seed=1"],
    "numbers that are not numbers": ["++backbone.resnet18.published.sha256='1378e020'"],
    "images of one's own": [
        "dataset=folder",
        'dataset.folder.path="/my pictures, all/é.csv"',
        "dataset.folder.split=0.7",
    ],
    "another mirror": ["dataset=sop", "dataset.sop.mirrors=[[{url:'http://localhost/a.zip?b=1',size:7}]]"],
    "K of one's own": ["dataset=inshop", "dataset.inshop.ks=[1,5]", "dataset.inshop.counts=null"],
    "a loss in a loss": ["loss=[xbm_contrastive]", "loss.xbm_contrastive.memory_size=64"],
    "one term less": ["loss=[cbml_center]", "~loss.cbml_center.terms.center"],
    "one term more": ["loss=[cbml_center]", "+loss.cbml_center.terms.more={type:triplet,margin:0.3}"],
    "another type": ["loss=[triplet]", "loss.triplet.type=contrastive"]
    + [f"~loss.triplet.{name}" for name in ("mining", "average", "one_sided")],
    "a head of fewer parts": ["loss=[hdc]", "embedding_dim=[512]", "loss.hdc.head.weights=[1,1]"]
    + ["loss.hdc.head.taps={googlenet:[inception4a],bn_inception:[inception_4a],resnet:[layer2]}"],
    "no head": ["embedding_dim=[0]", "loss.cbml_log.margin=1e-5", "recipe.flip=true"],
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=TIMM if "timm" in name else ()) for name in SETTINGS])
def test_hydra_makes_the_same_cell_of_it(compose, case):
    workspace = compose(SETTINGS[case])
    cell = workspace.cells(*workspace.params().dataset)[-1]
    again = compose(settings_of(command(cell, [cell.seed], ROOT / "conf")))
    assert again.cells(cell.dataset) == [cell]


def test_images_of_ones_own_need_no_parameter_but_their_place(compose):
    cell = compose(["dataset=folder", "dataset.folder.path=/pictures"]).cells("folder")[0]
    settings = settings_of(command(cell, [0], ROOT / "conf"))
    assert len(settings) == 7 and settings[-1] == "dataset.folder.path=/pictures"


def test_a_default_cell_needs_no_parameter(compose):
    cell = compose(["recipe=paper", "backbone=[googlenet]"]).cells("glyphs")[0]
    assert len(settings_of(command(cell, [0], ROOT / "conf"))) == 6


@pytest.mark.parametrize("group", ["loss", "backbone"])
def test_an_option_without_a_file_is_added_by_one_setting(compose, group):
    entry = {"loss": "{type: cbml, batches: {type: clusters, k: 50}}", "backbone": "${backbone.resnet18}"}[group]
    cell = compose([f"+{group}.mine={entry}"]).cells("glyphs")[-1]
    assert getattr(cell, group) == "mine"
    settings = settings_of(command(cell, [0], ROOT / "conf"))
    assert settings[6].startswith(f"+{group}.mine=") and len(settings) == 7
    assert compose(settings).cells("glyphs") == [cell]


def test_the_command_of_a_loss_whose_file_is_a_base_and_a_difference_names_what_was_set_alone(compose):
    cell = compose(["loss=[cbml_sqrt]", "loss.cbml_sqrt.margin=0.2"]).cells("glyphs")[0]
    assert settings_of(command(cell, [0], ROOT / "conf"))[6:] == ["loss.cbml_sqrt.margin=0.2"]
