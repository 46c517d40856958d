"""Batched crop and resize against Pillow and torchvision, picture by picture."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, RandomResizedCrop

from cbml.datasets.transforms import center_boxes, crop_resize, random_boxes

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    small = rng.integers(
        0, 256, (4, 9, 12, 3), dtype=np.uint8
    )  # smooth enough to be a photograph, sharp enough to alias
    return [Image.fromarray(array).resize((80, 60), Image.Resampling.BICUBIC) for array in small]


def to_batch(pictures):
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize("size", [16, 33, 100])
def test_a_crop_is_the_one_that_pillow_makes(pictures, size, interpolation):
    boxes = torch.tensor([[0, 0, 60, 80], [7, 11, 31, 44], [20, 3, 17, 5], [59, 79, 1, 1]])
    ours = crop_resize(to_batch(pictures), boxes, size, interpolation=interpolation)
    for picture, (top, left, height, width), result in zip(pictures, boxes.tolist(), ours, strict=True):
        crop = picture.crop((left, top, left + width, top + height)).resize((size, size), PILLOW[interpolation])
        difference = (result.permute(1, 2, 0).numpy() - np.asarray(crop, dtype=np.float32)).__abs__()
        assert difference.mean() <= 1.0 and difference.max() <= 2.0  # of 255; Pillow rounds twice


def test_flip_mirrors_only_the_chosen_images(pictures):
    boxes = torch.tensor([[3, 5, 40, 50]] * 4)
    plain = crop_resize(to_batch(pictures), boxes, 20)
    flipped = crop_resize(to_batch(pictures), boxes, 20, flip=torch.tensor([True, False, True, False]))
    assert torch.equal(flipped[[0, 2]], plain[[0, 2]].flip(3)) and torch.equal(flipped[[1, 3]], plain[[1, 3]])


@pytest.mark.parametrize("size", [20, 33, 60])
def test_center_crops_are_exact(pictures, size):
    sizes = torch.tensor([[60, 80]] * 4)
    ours = crop_resize(to_batch(pictures), center_boxes(sizes, size), size)
    theirs = to_batch([CenterCrop(size)(picture) for picture in pictures])
    assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("height, width", [(60, 80), (256, 256), (40, 400), (400, 40)])
def test_random_boxes_have_the_distribution_of_torchvision(height, width):
    n = 4000
    generator = torch.Generator().manual_seed(0)
    ours = random_boxes(torch.tensor([[height, width]] * n), (0.16, 1.0), (3 / 4, 4 / 3), generator).double()
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(picture, [0.16, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    ).double()
    for summary in (lambda b: b, lambda b: b[:, 2:].prod(1, keepdim=True), lambda b: (b[:, 3:] / b[:, 2:3]).log()):
        a, b = summary(ours), summary(theirs)
        assert torch.allclose(
            a.quantile(torch.tensor([0.1, 0.5, 0.9]).double(), 0),
            b.quantile(torch.tensor([0.1, 0.5, 0.9]).double(), 0),
            atol=0.06 * b.abs().max().item(),
        )
    assert (
        (ours[:, :2] >= 0).all()
        and (ours[:, 0] + ours[:, 2] <= height).all()
        and (ours[:, 1] + ours[:, 3] <= width).all()
    )
