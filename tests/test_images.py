"""Decoded images: sizes, pixels, the copy that is kept."""

import subprocess
import sys
import threading

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


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((65_000, 1), r"x\.png: 65000 x 1 pixels become 1560000 x 24 at short side 24; at most 8000000 are allowed"),
        ((10_000, 10_000), r"x\.png: .*10000 x 10000 pixels, at most \d+ allowed"),
        ((20_000, 10_000), r"x\.png: .*200000000 pixels"),
    ],
)
def test_an_image_of_too_many_pixels(folder, monkeypatch, size, message):
    monkeypatch.setattr("cbml.datasets.images.MOST_PIXELS", 8_000_000)
    Image.new("1", size).save(folder / "images" / "x.png")
    with pytest.raises(UserError, match=message):
        pack(folder, ["0.png", "x.png"])


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(bytes(100)),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "of other images": lambda file: np.save(file.with_name("sizes.npy"), np.array([[24, 37], [24, 24]])),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", ["images.bin", "sizes.npy"])
def test_damaged_copies_are_decoded_again(folder, capsys, file, damage):
    names = ["0.png", "1.png"]
    before = pack(folder, names).data.clone()
    damage(next((folder / "cache").glob(f"*/{file}")))
    assert torch.equal(pack(folder, names).data, before)
    (line,) = capsys.readouterr().err.splitlines()
    assert "the decoded images are damaged" in line
    pack(folder, names)
    assert not capsys.readouterr().err


def test_waiting_for_another_process_is_said(folder, capsys):
    pack(folder, ["0.png"])
    (lock,) = (folder / "cache").glob("*.lock")
    code = f"import filelock\nwith filelock.FileLock({str(lock)!r}): print(flush=True), input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        timer = threading.Timer(2, other.stdin.close)
        timer.start()
        pack(folder, ["0.png"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("waiting for another process, which decodes the same images")
