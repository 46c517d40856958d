"""Decoded images: sizes, pixels, modes, the copy that is kept."""

import errno
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torchvision.transforms import Resize

from cbml.data import packing
from cbml.data.images import EncodedImages, PackedImages, decode, upright_size
from cbml.data.lists import ImageList
from cbml.data.packing import pack_images
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
    monkeypatch.setattr("cbml.data.images.MOST_PIXELS", 8_000_000)
    Image.new("1", size).save(folder / "images" / "x.png")
    with pytest.raises(UserError, match=message):
        pack(folder, ["0.png", "x.png"])


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(bytes(100)),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "of other images": lambda file: np.save(file.with_name("index.npy"), np.array([[0, 24, 37], [1464, 0, 0]])),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", ["images.bin", "index.npy"])
def test_damaged_copies_are_decoded_again(folder, capsys, file, damage):
    names = ["0.png", "1.png"]
    before = pack(folder, names).data.clone()
    damage(next((folder / "cache").glob(f"*/{file}")))
    assert torch.equal(pack(folder, names).data, before)
    said = capsys.readouterr().err.splitlines()
    assert all("the decoded images are damaged" in line for line in said)
    assert len(said) == 1 or (file, damage) == ("images.bin", DAMAGES["missing"])  # as after there was no room
    pack(folder, names)
    assert not capsys.readouterr().err


def test_flipped_bytes_in_decoded_images_are_seen_and_decoded_again(tmp_path, capsys, decoded):
    names = numbered(tmp_path, 6)
    pack(tmp_path, names)
    (file,) = (tmp_path / "cache").glob("*/images.bin")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    decoded.clear()
    assert reds(pack(tmp_path, names)) == list(range(6)) and len(decoded) == 1
    assert "damaged (ValueError: wrong checksums of 1 images, e.g. images/n" in capsys.readouterr().err
    pack(tmp_path, names)
    assert not capsys.readouterr().err


def test_flipped_bytes_do_not_travel_to_the_decoded_images_of_another_list(tmp_path, decoded):
    names = numbered(tmp_path, 6)
    pack(tmp_path, names)
    (file,) = (tmp_path / "cache").glob("*/images.bin")
    file.write_bytes(b"\xff" + file.read_bytes()[1:])
    assert reds(pack(tmp_path, names[:5], fingerprint="1")) == list(range(5))


def test_checksums_are_looked_at_once_a_process(folder, monkeypatch):
    checked = []
    checksums = packing._checksums
    monkeypatch.setattr(packing, "_checksums", lambda *args: checked.append(None) or checksums(*args))
    for _ in range(3):
        pack(folder, ["0.png"])
    assert len(checked) == 2  # when they were made, and when they were opened for the first time


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENOMEM, errno.EACCES])
def test_an_error_of_the_machine_is_no_damage_of_images(folder, monkeypatch, capsys, number):
    """Neither of decoded ones, nor of files, which would be left out where unreadable ones are."""

    def fail(*_, **__):
        raise OSError(number, "the machine")

    pack(folder, ["0.png"])
    for place in ("numpy.memmap", "PIL.Image.open"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="the machine"):
            patch.setattr(place, fail)
            pack(folder, ["0.png"], fingerprint="0" if place == "numpy.memmap" else "1")
    assert "damaged" not in capsys.readouterr().err
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the machine"):
        patch.setattr("PIL.Image.open", fail)
        decode(folder / "images" / "0.png")


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


# Modes


def gradient(width=40, height=30):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], 2).astype(np.uint8))


def grey():
    return gradient().convert("L")


def sixteen(kind):
    return Image.fromarray(np.asarray(grey()).astype(kind) * 257)


MODES = {
    "grey.png": (grey, {}, grey),
    "one_bit.png": (lambda: grey().convert("1"), {}, lambda: grey().convert("1")),
    "grey_with_alpha.png": (lambda: grey().convert("LA"), {}, grey),
    "palette.gif": (lambda: gradient().quantize(8), {}, lambda: gradient().quantize(8)),
    "palette_with_transparency.png": (
        lambda: gradient().quantize(8),
        {"transparency": b"\xff\0\xff"},
        lambda: gradient().quantize(8),
    ),
    "alpha.png": (lambda: gradient().convert("RGBA"), {}, gradient),
    "cmyk.tif": (lambda: gradient().convert("CMYK"), {}, lambda: gradient().convert("CMYK")),
    "16_bit.png": (lambda: sixteen(np.uint16), {}, grey),
    "16_bit.tif": (lambda: sixteen(np.uint16), {}, grey),
    "32_bit.tif": (lambda: sixteen(np.int32), {}, grey),
    "animated.gif": (grey, {"save_all": True, "append_images": [Image.new("L", (40, 30), 7)]}, grey),
    "animated.webp": (
        gradient,
        {"save_all": True, "append_images": [Image.new("RGB", (40, 30))], "lossless": True},
        gradient,
    ),
    "lossless.webp": (gradient, {"lossless": True}, gradient),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_what_one_sees(tmp_path, name):
    make, options, expected = MODES[name]
    make().save(tmp_path / name, **options)
    found = decode(tmp_path / name)
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected().convert("RGB"))).max() <= 1


def test_a_cmyk_jpeg_has_its_colours(tmp_path):
    gradient().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(np.asarray(decode(tmp_path / "a.jpg")).astype(int) - np.asarray(gradient())).mean() < 3


def test_floating_point_pixels_have_no_known_range(tmp_path):
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: not an image .*floating-point numbers; save it with 8 or 16 bits"):
        decode(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_an_image_is_turned_as_its_camera_says(tmp_path, name, orientation):
    """The same as Pillow's own `exif_transpose`, and the size is known before it is decoded."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    gradient().save(tmp_path / name, exif=exif, **({"lossless": True} if name.endswith("webp") else {}))
    with Image.open(tmp_path / name) as file:
        size = upright_size(file)
        expected = ImageOps.exif_transpose(file)
    found = decode(tmp_path / name)
    assert found.size == expected.size == size == ((40, 30) if orientation < 5 else (30, 40))
    assert np.array_equal(found, expected)


# What is decoded once


def numbered(folder, count, **changes):
    """Images that are told apart by their red."""
    (folder / "images").mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (9, 8 + i % 3), (i, 0, 0)).save(folder / "images" / f"n{i}.png")
    return [f"n{i}.png" for i in range(count)]


def reds(images):
    return [int(images.data[3 * start]) for start in images.starts]


@pytest.fixture
def decoded(monkeypatch):
    """The numbers of the images that are decoded; `decoded.stop_at` kills the process there."""

    class Decoded(list):
        stop_at = None

    numbers = Decoded()

    def watching(file):
        number = int(file.stem[1:])
        if number == numbers.stop_at:
            raise KeyboardInterrupt
        numbers.append(number)
        return decode(file)

    monkeypatch.setattr(packing, "decode", watching)
    monkeypatch.setattr(packing, "CHUNK", 10)
    return numbers


def test_decoding_goes_on_where_it_was_cut_off(tmp_path, decoded):
    names = numbered(tmp_path, 60)
    decoded.stop_at = 45
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path, names)
    decoded.clear()
    decoded.stop_at = None
    assert reds(pack(tmp_path, names)) == list(range(60))
    assert sorted(decoded) == list(range(40, 60)) and not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "progress.json").write_text("{"),
        lambda folder: (folder / "progress.json").write_text('{"done": 99, "sizes": [[24, "bilinear"]]}'),
        lambda folder: (folder / "24-bilinear").write_bytes(b"short"),
        lambda folder: (folder / "24-bilinear").unlink(),
    ],
)
def test_damaged_progress_starts_again(tmp_path, decoded, damage):
    names = numbered(tmp_path, 60)
    decoded.stop_at = 45
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path, names)
    (left,) = (tmp_path / "cache").glob("*.partial")
    damage(left)
    decoded.clear()
    decoded.stop_at = None
    assert reds(pack(tmp_path, names)) == list(range(60)) and len(decoded) == 60


def test_what_was_decoded_before_is_not_decoded_again(tmp_path, decoded):
    names = numbered(tmp_path, 12)
    pack(tmp_path, names[:8])
    decoded.clear()
    assert reds(pack(tmp_path, names[::-1], fingerprint="1")) == list(range(12))[::-1]
    assert sorted(decoded) == [8, 9, 10, 11]
    pack(tmp_path, names, resize=12)
    assert len(decoded) == 4 + 12


def test_without_room_the_crops_are_the_same(folder, monkeypatch):
    names = ["0.png", "1.png", "2.png"]
    indices, boxes = (
        torch.tensor([2, 1, 1, 0]),
        torch.tensor([[0, 0, 24, 24], [12, 0, 20, 24], [0, 3, 9, 9], [1, 2, 20, 30]]),
    )
    options = {"flip": torch.tensor([True, False, True, False]), "interpolation": "bicubic"}
    kept = pack(folder, names)
    expected = kept.crops(indices, boxes, 10, **options)
    monkeypatch.setenv("CBML_PACKED_GB", "0")
    encoded = pack(folder, names, fingerprint="1")
    assert isinstance(encoded, EncodedImages) and not list((folder / "cache").glob("*/images.bin"))[1:]
    assert encoded.sizes.tolist() == kept.sizes.tolist() and encoded.nbytes == kept.nbytes
    assert torch.equal(encoded.crops(indices, boxes, 10, **options), expected)
    some = encoded.subset(indices[:2], torch.tensor([5, 6]))
    assert torch.equal(some.crops(torch.tensor([1]), boxes[1:2], 10, interpolation="bicubic"), expected[1:2])
    monkeypatch.setenv("CBML_PACKED_GB", "1")  # now there is room
    assert isinstance(pack(folder, names, fingerprint="1"), PackedImages)


def test_images_that_do_not_fit_are_said_to_be_decoded_as_needed(folder, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=packing.SPARE_BYTES + 1000))
    pack(folder, ["0.png"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 images take 2.48e-06 GB; 9.31e-07 GB of the disk may be used (free space, CBML_PACKED_GB)" in line
    pack(folder, ["0.png"])
    assert not capsys.readouterr().err
