"""What differs on a GPU, which conftest.py hides from the tests: only a CPU repeats bits.

CUDA_VISIBLE_DEVICES=0 pytest tests/test_cuda.py
"""

import json

import pytest
import torch
from cbml.evaluation.cell import evaluate_cell
from test_losses import OPTIONS, option, sample, value_and_gradient
from test_training import run

from cbml.datasets.images import PackedImages
from cbml.datasets.transforms import random_boxes
from cbml.training import loop

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or CUDA_VISIBLE_DEVICES hides it")


@pytest.mark.parametrize("name", OPTIONS)
def test_a_loss_is_that_of_the_cpu(name):
    embeddings, labels = sample(dtype=torch.float32)
    expected = value_and_gradient(option(name), embeddings, labels)
    found = value_and_gradient(option(name).to(DEVICE), embeddings.to(DEVICE), labels.to(DEVICE))
    for ours, cpus in zip(found, expected, strict=True):
        assert ours.device.type == DEVICE and ours.isfinite().all()
        if name != "margin":  # draws its pairs at random
            torch.testing.assert_close(ours.cpu(), cpus, rtol=1e-3, atol=1e-4)


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
    assert (found.cpu().int() - expected.int()).abs().float().mean() < 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("resident", [False, True])
def test_a_cell_is_trained_continued_and_evaluated(project, validating, monkeypatch, precision, resident):
    if not resident:
        monkeypatch.setattr(loop, "_move_if_it_fits", lambda images, device: images)
    recipe = {"tiny": validating | {"precision": precision, "channels_last": True}}
    hashes = []
    for _ in range(2):  # the second time from the checkpoint of the last iteration
        folder = run(project, recipe=recipe)
        hashes.append(json.loads((folder / "run.json").read_text())["final_weights_sha256"])
    assert hashes[0] == hashes[1]
    metrics = evaluate_cell(folder, state=project)
    assert 0 < metrics["final"]["map_at_r"] <= 1 and set(metrics) >= {"final", "best_on_test", "validated"}
