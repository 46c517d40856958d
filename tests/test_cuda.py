"""What differs on a GPU, which conftest.py hides from all other tests: only a CPU repeats bits.

CBML_TEST_GPU=1 pytest tests/test_cuda.py
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, TINY_RECIPE, VALIDATING, break_at, broken, environment, from_the_beginning, result, run
from loss_options import OPTIONS, option, sample, value_and_gradient

from cbml import network, trained
from cbml.data.crops import random_boxes
from cbml.data.images import PackedImages
from cbml.models.streams import crop_salient, saliency, salient_boxes
from cbml.stages.evaluate import evaluate_cell
from cbml.training import device, loop

DEVICE = "cuda"
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or CBML_TEST_GPU is not 1")


def test_the_other_tests_see_no_gpu_even_where_one_is_chosen():
    code = "import conftest, torch; print(torch.cuda.is_available())"
    chosen = environment() | {"CUDA_VISIBLE_DEVICES": "0", "CBML_TEST_GPU": "0"}
    chosen["PYTHONPATH"] += f":{ROOT / 'tests'}"
    done = subprocess.run([sys.executable, "-c", code], env=chosen, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@on_a_gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_a_loss_is_that_of_the_cpu(name):
    embeddings, labels = sample((2, 0, 1, 0, 2, 2, 1, 0, 5, 5), torch.float32)  # even: MoCo takes two crops of each
    expected = value_and_gradient(option(name), embeddings, labels)
    found = value_and_gradient(option(name).to(DEVICE), embeddings.to(DEVICE), labels.to(DEVICE))
    for ours, cpus in zip(found, expected, strict=True):
        assert ours.device.type == DEVICE and ours.isfinite().all()
        if name != "margin":  # draws its pairs at random
            torch.testing.assert_close(ours.cpu(), cpus, rtol=1e-3, atol=1e-4)


@on_a_gpu
def test_a_stream_looks_where_it_does_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    images, maps = (torch.rand(6, *shape, generator=generator) for shape in ((3, 68, 68), (16, 7, 7)))
    maps[0] = 0.3  # no object
    boxes = [salient_boxes(saliency(each), (68, 68)) for each in (maps, maps.to(DEVICE))]
    assert torch.equal(*boxes) and boxes[0][0].tolist() == [0, 0, 68]
    found = crop_salient(images.to(DEVICE), maps.to(DEVICE))
    assert found.device.type == DEVICE
    torch.testing.assert_close(found.cpu(), crop_salient(images, maps), rtol=1e-5, atol=1e-5)


@on_a_gpu
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_are_those_of_the_cpu(interpolation):
    generator = torch.Generator().manual_seed(0)
    shapes = [(60, 80, 3), (80, 60, 3), (70, 70, 3)]
    images = PackedImages.of([torch.randint(0, 256, s, generator=generator).byte().numpy() for s in shapes])
    indices = torch.arange(60) % 3
    boxes = random_boxes(images.sizes[indices], (0.16, 1.0), (3 / 4, 4 / 3), generator)
    flip = torch.rand(60, generator=generator) < 0.5
    found, expected = (
        where.crops(indices, boxes, 48, flip=flip, interpolation=interpolation)
        for where in (images.to(torch.device(DEVICE)), images)
    )
    assert found.device.type == DEVICE and found.shape == expected.shape
    difference = (found.cpu().int() - expected.int()).abs()
    # The CPU's kernel rounds after each direction; noise is the worst case.
    assert difference.float().mean() < 1 and difference.max() <= 3


@pytest.fixture
def step(workspace):
    """A function that takes some training steps of the tiny cell on a device, and returns network and state dict."""

    def take(where: str, steps: int, watch=None):
        (cell,) = workspace.cells("glyphs")
        recipe, seed = cell.recipe, cell.seed
        torch.manual_seed(seed)
        model, criterion = network.build(cell, num_classes=6, root=Path())
        model.to(where).train()
        groups = [{"params": list(model.parameters()), "lr": recipe.lr}]
        optimizer = device.make_optimizer(recipe, groups, torch.device(where))
        pictures = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)
        images = PackedImages.of(list(pictures)).to(torch.device(where))
        labels = (torch.arange(12) // 2).to(where)
        with device.device_context(recipe):
            for iteration in range(1, steps + 1):
                if watch and iteration == steps:
                    torch.cuda.set_sync_debug_mode(watch)
                crops = loop.random_crops(images, recipe, seed, iteration, np.arange(12))
                loss = criterion(model(crops), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
        return {name: value.cpu() for name, value in model.state_dict().items()}

    return take


@on_a_gpu
def test_no_step_waits_for_the_gpu(step):
    try:
        step(DEVICE, 4, watch="error")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_a_step_is_that_of_the_cpu(step):
    for name, value in step(DEVICE, 1).items():
        expected = step("cpu", 1)[name]
        if value.is_floating_point():  # Adam's first step is ±lr wherever the gradient is not near zero
            assert (value - expected).abs().mean() < 2e-4, name


@on_a_gpu
def test_broken_off_it_ends_with_the_same_bits_if_it_is_to_be_deterministic(workspace, monkeypatch):
    recipe = TINY_RECIPE | {"checkpoint_every": 1, "deterministic": True}
    unbroken = from_the_beginning(workspace, recipe=recipe)
    break_at(monkeypatch, 3)
    broken(workspace, recipe=recipe)
    assert result(run(workspace, recipe=recipe)) == unbroken


@on_a_gpu
def test_a_compiled_cell_is_trained(workspace, capsys):
    folder = run(workspace, recipe=TINY_RECIPE | {"compile": True})
    assert "compile: not possible" not in capsys.readouterr().err
    assert evaluate_cell(folder, workspace)["final"]["map_at_r"] > 0


@on_a_gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("resident", [False, True])
def test_a_cell_is_trained_continued_and_evaluated(workspace, monkeypatch, precision, resident):
    if not resident:
        monkeypatch.setattr(loop, "place", lambda images, device: images)
    recipe = VALIDATING | {"precision": precision, "channels_last": True}
    records = []
    for _ in range(2):  # the second time from the checkpoint of the last iteration
        folder = run(workspace, recipe=recipe)
        records.append(json.loads((folder / "run.json").read_text()))
    assert records[0]["final_weights_sha256"] == records[1]["final_weights_sha256"]
    found = records[0]["numerics"]
    assert (found["type"], found["tf32"], found["cudnn_benchmark"], found["deterministic"]) == (
        "cuda",
        False,
        True,
        False,
    )
    metrics = evaluate_cell(folder, workspace)
    assert 0 < metrics["final"]["map_at_r"] <= 100 and set(metrics) >= {"final", "best_on_test", "validated"}


@on_a_gpu
def test_clusters_are_of_embeddings_on_the_gpu_and_go_on_from_their_centres(workspace):
    batches = {"type": "clusters", "k": 6, "refresh": 0.5}
    loss = yaml.safe_load((ROOT / "conf/loss/cbml_log.yaml").read_text())["cbml_log"] | {"batches": batches}
    folder = run(workspace, loss={"cbml_log": loss})
    with np.load(folder / "pseudo_labels.npz") as arrays:
        assert arrays["history"].shape == (3, 36) and arrays["iterations"].tolist() == [0, 2, 4]


@on_a_gpu
def test_a_trained_cell_embeds_as_on_the_cpu(workspace):
    folder = run(workspace)
    pictures = sorted(Path("data/glyphs/images").rglob("*.png"))[:9]
    found, expected = (trained.load(folder, where).embed(pictures) for where in (DEVICE, "cpu"))
    assert np.abs(found - expected).max() < 1e-2  # PyTorch's own default is TF32
