"""Both ways of cropping against Pillow and torchvision, picture by picture."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, RandomResizedCrop

from cbml.data.crops import center_boxes, color_jitter, crop_each, crop_together, random_boxes
from cbml.data.images import PackedImages

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SIZES = [(60, 80), (90, 60), (60, 60), (61, 97)]


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    # smooth enough to be a photograph, sharp enough to alias
    small = rng.integers(0, 256, (len(SIZES), 9, 12, 3), dtype=np.uint8)
    return [
        Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)
        for array, (height, width) in zip(small, SIZES, strict=True)
    ]


@pytest.fixture(params=[crop_each, crop_together])
def crop(request, pictures):
    """One box from each picture, by each function; the batched one runs on any device."""
    packed = PackedImages.of([np.asarray(picture) for picture in pictures])

    def crop(boxes, size, flip=(False,) * 4, interpolation="bilinear"):
        boxes, flip = torch.as_tensor(boxes), torch.tensor(flip)
        widths = packed.sizes[:, 1]
        return request.param(packed.data, packed.starts, widths, boxes, size, flip=flip, interpolation=interpolation)

    return crop


def assert_pillows(crops, pictures, boxes, interpolation, flip=(False,) * 4):
    size = crops.shape[-1]
    for picture, (top, left, height, width), mirrored, ours in zip(pictures, boxes, flip, crops, strict=True):
        box = picture.crop((left, top, left + width, top + height)).resize((size, size), PILLOW[interpolation])
        expected = np.asarray(box, dtype=np.float32)[:, :: -1 if mirrored else 1]
        difference = np.abs(ours.permute(1, 2, 0).numpy() - expected)
        # Pillow rounds after each direction, so a sum of roundings may be 1 or 2 away.
        assert difference.mean() <= 0.5 and difference.max() <= 2


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize("size", [16, 33, 100])
@pytest.mark.parametrize(
    "boxes",
    [
        [[0, 0, 60, 80], [7, 11, 31, 44], [20, 3, 17, 5], [60, 96, 1, 1]],  # all of one, one pixel in a corner
        [[0, 0, 1, 1]] * 4,
        [[59, 0, 1, 80], [0, 59, 90, 1], [27, 27, 33, 33], [1, 2, 16, 17]],  # a row, a column, a copy
    ],
)
def test_a_crop_is_the_one_that_pillow_makes(crop, pictures, boxes, size, interpolation):
    crops = crop(boxes, size, interpolation=interpolation)
    assert crops.shape == (4, 3, size, size) and crops.dtype == torch.uint8 and crops.is_contiguous()
    assert_pillows(crops, pictures, boxes, interpolation)


@pytest.mark.parametrize("interpolation", PILLOW)
def test_random_crops_are_those_that_pillow_makes(crop, pictures, interpolation):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        boxes = random_boxes(torch.tensor(SIZES), (0.16, 1.0), (3 / 4, 4 / 3), generator)
        flip = (torch.rand(4, generator=generator) < 0.5).tolist()
        assert_pillows(crop(boxes, 48, flip, interpolation), pictures, boxes.tolist(), interpolation, flip)


def test_flip_mirrors_only_the_chosen_images(crop):
    for size in (20, 40):  # resized, copied
        plain = crop([[3, 5, 40, 40]] * 4, size)
        flipped = crop([[3, 5, 40, 40]] * 4, size, [True, False, True, False])
        assert torch.equal(flipped[[0, 2]], plain[[0, 2]].flip(3)) and torch.equal(flipped[[1, 3]], plain[[1, 3]])


@pytest.mark.parametrize("size", [20, 33, 60])
def test_center_crops_are_exact(crop, pictures, size):
    expected = [np.asarray(CenterCrop(size)(picture)).transpose(2, 0, 1) for picture in pictures]
    assert np.array_equal(crop(center_boxes(torch.tensor(SIZES), size), size), np.stack(expected))


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


def test_colours_are_changed_as_torchvision_does_and_by_the_generator_alone():
    crops = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def jittered(*shares, seed=1):
        return color_jitter(crops, shares, torch.Generator().manual_seed(seed))

    assert torch.equal(jittered(0, 0, 0, 0), crops)
    assert torch.equal(jittered(0.4, 0.4, 0.4, 0.1), jittered(0.4, 0.4, 0.4, 0.1))
    assert not torch.equal(jittered(0.4, 0.4, 0.4, 0.1), jittered(0.4, 0.4, 0.4, 0.1, seed=2))
    brighter = jittered(0.5, 0, 0, 0).float() / crops.clamp(min=1)
    factors = brighter.flatten(1).median(1).values
    assert factors.min() > 0.49 and factors.max() < 1.51 and factors.std() > 0.1
    grey = crops.float().mean((2, 3))
    for part in (jittered(0, 0, 0.9, 0), jittered(0, 0, 0, 0.5)):  # saturation and hue leave brightness nearly alone
        assert not torch.equal(part, crops) and (part.float().mean((2, 3)).mean(1) - grey.mean(1)).abs().max() < 25
