"""A frozen trunk: features are those of the images however they came to be, and the head on them is the network."""

import os
import signal

import numpy as np
import pytest
import torch
from helpers import ROOT, config_of, ending, forked

from cbml.data.images import PackedImages
from cbml.errors import UserError
from cbml.models.embedding_model import OnFeatures, create_model
from cbml.spec.recipe import Recipe
from cbml.training import features
from cbml.training.features import compute_features

RECIPE = Recipe(
    name="tiny",
    train="head",
    views=2,
    iterations=1,
    batch_size=4,
    instances=2,
    lr=1e-3,
    weight_decay=0,
    resize=24,
    crop=20,
)
CPU = torch.device("cpu")


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return PackedImages.of([rng.integers(0, 256, (24, 24 + i % 3, 3), dtype=np.uint8) for i in range(12)])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model(config_of("resnet18"), embedding_dim=8, root=ROOT).eval()


def computed(model, images, cache, recipe=RECIPE, **changes):
    options = {"views": recipe.views, "training": 8, "identity": "these", "device": CPU, "label": "tiny"} | changes
    return compute_features(model, images, recipe, cache=cache, **options)


def test_they_are_the_trunks_of_centre_crops_and_of_views_of_the_first_images(model, images, tmp_path):
    found = computed(model, images, tmp_path)
    rows = torch.arange(12)
    with torch.no_grad():
        expected = model.outputs(images.center_crops(rows, 20, "bilinear"), ("features",)).features
    torch.testing.assert_close(found.center_crops(rows), expected, rtol=1e-3, atol=1e-4)
    assert [len(view) for view in found.views] == [8, 8]
    one, other = (view.float() for view in found.views)
    assert (one - other).abs().max() > 1e-3 and (one - found.centre[:8].float()).abs().max() > 1e-3


def test_a_batch_has_one_of_its_views_of_each_image(model, images, tmp_path):
    found = computed(model, images, tmp_path)
    rows = torch.tensor([3, 3, 3, 5, 0, 3, 3])
    drawn = found.random_crops(rows, torch.Generator().manual_seed(0))
    chosen = [[torch.equal(x, view[row].float()) for view in found.views] for x, row in zip(drawn, rows, strict=True)]
    assert all(sum(each) == 1 for each in chosen) and len({tuple(each) for each in chosen}) == 2
    some = found.subset(torch.tensor([5, 7]), torch.tensor([1, 2]))
    assert torch.equal(some.center_crops(torch.tensor([1])), found.center_crops(torch.tensor([7])))


def test_the_head_on_them_is_the_whole_network(model, images, tmp_path):
    rows = torch.arange(12)
    with torch.no_grad():
        whole = model(images.center_crops(rows, 20, "bilinear"))
        head = OnFeatures(model).eval()(computed(model, images, tmp_path).center_crops(rows))
    assert (whole * head).sum(1).min() > 1 - 1e-3
    assert OnFeatures(model).state_dict().keys() == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_the_head_on_those_of_a_timm_model_is_the_whole_network(name, tmp_path):
    model = create_model(config_of("timm", model=name), embedding_dim=8, root=ROOT, crop=64).eval()
    rng = np.random.default_rng(0)
    images = PackedImages.of([rng.integers(0, 256, (70, 70, 3), dtype=np.uint8) for _ in range(5)])
    recipe, rows = RECIPE.model_copy(update={"resize": 70, "crop": 64, "views": 1}), torch.arange(5)
    with torch.no_grad():
        whole = model(images.center_crops(rows, 64, "bilinear"))
        head = OnFeatures(model).eval()(computed(model, images, tmp_path, recipe, training=3).center_crops(rows))
    assert (whole * head).sum(1).min() > 1 - 1e-3


def test_killed_they_go_on_and_end_with_the_same_values(model, images, tmp_path, monkeypatch):
    expected = computed(model, images, tmp_path / "whole")
    monkeypatch.setattr(features, "CHUNK", 4)
    monkeypatch.setattr(features, "batch_size", lambda crop, device: 2)
    outputs, calls = model.outputs, []

    def counted(pixels, wanted=()):
        calls.append(len(pixels))
        if len(calls) == 4 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return outputs(pixels, wanted)

    monkeypatch.setattr(model, "outputs", counted)
    here = os.getpid()
    assert ending(forked(lambda: computed(model, images, tmp_path))) == -signal.SIGKILL
    found = computed(model, images, tmp_path)
    for ours, theirs in zip((found.centre, *found.views), (expected.centre, *expected.views), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-4)  # of batches of another size
    assert len(calls) == 4 + 4 + 4  # two batches of the first chunk are not done again
    computed(model, images, tmp_path)
    assert len(calls) == 12
    assert {file.suffix for file in tmp_path.iterdir() if file.is_file()} <= {".npy", ".lock"}


@pytest.mark.parametrize(
    ("changes", "new"),
    [({}, 0), ({"views": 3}, 1), ({"scale": (0.5, 1.0)}, 2), ({"crop": 16}, 3), ({"lr": 1.0}, 0), ({"flip": False}, 2)],
)
def test_what_changes_them_computes_them_again_and_nothing_else_does(model, images, tmp_path, changes, new):
    computed(model, images, tmp_path)
    before = len([*tmp_path.glob("*.npy")])
    computed(model, images, tmp_path, RECIPE.model_copy(update=changes))
    assert len([*tmp_path.glob("*.npy")]) == before + new


def test_other_images_are_others(model, images, tmp_path):
    computed(model, images, tmp_path)
    computed(model, images, tmp_path, identity="those")
    assert len([*tmp_path.glob("*.npy")]) == 6


def test_colours_are_each_images_own_whatever_a_batch_is(model, images, tmp_path, monkeypatch):
    recipe = RECIPE.model_copy(update={"color_jitter": (0.4, 0.4, 0.4, 0.1), "views": 1})
    plain = computed(model, images, tmp_path / "plain", RECIPE.model_copy(update={"views": 1}))
    expected = computed(model, images, tmp_path / "one", recipe)
    monkeypatch.setattr(features, "batch_size", lambda crop, device: 3)
    found = computed(model, images, tmp_path / "two", recipe)
    torch.testing.assert_close(found.views[0], expected.views[0], rtol=2e-3, atol=1e-4)
    assert (found.views[0] - plain.views[0]).abs().max() > 1e-3


def test_what_half_precision_cannot_hold_is_refused(model, images, tmp_path, monkeypatch):
    outputs = model.outputs
    monkeypatch.setattr(
        model, "outputs", lambda *args: outputs(*args)._replace(features=torch.full((12, 512), 1e5)[: len(args[0])])
    )
    with pytest.raises(UserError, match="tiny: features: image 0 or one soon after it: not finite in half precision"):
        computed(model, images, tmp_path)
    assert not [*tmp_path.glob("*.npy")]
