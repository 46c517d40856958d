"""Decoded images: sizes, pixels, the copy that is kept."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Resize

from cbml.datasets.images import pack_images
from cbml.datasets.lists import ImageList
from cbml.errors import UserError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i, (height, width) in enumerate([(30, 47), (61, 40), (24, 24)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def pack(folder, names, **options):
    images = ImageList([f"images/{name}" for name in names], np.arange(len(names)))
    return pack_images(
        images, folder, folder / "cache", **{"resize": 24, "interpolation": "bilinear", "fingerprint": "0"} | options
    )


def test_images_are_those_of_torchvisions_resize(folder):
    packed = pack(folder, ["0.png", "1.png", "2.png"])
    for i in range(3):
        expected = np.asarray(Resize(24)(Image.open(folder / "images" / f"{i}.png")))
        assert packed.sizes[i].tolist() == list(expected.shape[:2])
        first = 3 * packed.starts[i]
        assert np.array_equal(packed.data[first : first + expected.size], expected.ravel())


def test_crops_are_cut_from_the_images_that_the_indices_name(folder):
    packed = pack(folder, ["0.png", "1.png", "2.png"])
    crops = packed.crops(torch.tensor([2, 1, 1]), torch.tensor([[0, 0, 24, 24], [12, 0, 24, 24], [0, 0, 24, 24]]), 24)
    square, tall = (np.asarray(Resize(24)(Image.open(folder / "images" / f"{i}.png"))) for i in (2, 1))
    expected = np.stack([square, tall[12:], tall[:24]]).transpose(0, 3, 1, 2)
    assert np.array_equal(crops, expected)


def test_the_decoded_copy_is_used_until_anything_about_it_changes(folder):
    before = pack(folder, ["0.png"]).data.clone()
    Image.new("RGB", (30, 47)).save(folder / "images" / "0.png")
    assert torch.equal(pack(folder, ["0.png"]).data, before)
    assert pack(folder, ["0.png"], fingerprint="1").data.sum() == 0
    assert pack(folder, ["0.png"], resize=12).sizes.min() == 12


def test_an_image_that_cannot_be_decoded(folder):
    file = folder / "images" / "1.png"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"images/1\.png: not an image that Pillow can read"):
        pack(folder, ["0.png", "1.png"])
    assert not [path for path in (folder / "cache").iterdir() if path.is_dir()]
