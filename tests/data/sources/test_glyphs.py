from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageFont
from pydantic import ValidationError

from cbml.data.sources import GlyphsConfig
from cbml.data.sources.glyphs import CHARACTERS, TYPEFACES, draw
from cbml.data.sources.layout import LAYOUT

FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def config():
    return GlyphsConfig(type="glyphs", classes=6, images_per_class=3, size=32, seed=1)


def test_layout_and_counts(config, tmp_path):
    config.download(tmp_path / "glyphs")
    assert sorted(path.name for path in (tmp_path / "glyphs").iterdir()) == sorted(LAYOUT)
    table = config.catalogue(tmp_path / "glyphs")
    assert Counter(table.label) == dict.fromkeys(range(6), 3)
    assert Counter(table.split) == {"train": 9, "test": 9} and set(table.label[table.split == "train"]) == {0, 1, 2}
    assert not any(name.isupper() or "_" in name for name in table.name)
    split = (tmp_path / "glyphs/train_test_split.txt").read_text().split()[1::2]
    assert split == ["1"] * 9 + ["0"] * 9
    with Image.open(tmp_path / "glyphs" / table.path[0]) as image:
        assert image.size == (32, 32)
        assert image.mode == "RGB"


def test_what_makes_other_images_has_another_folder(config, tmp_path):
    changes = [{}, {"seed": 2}, {"classes": 8}, {"images_per_class": 4}, {"size": 33}, {"plain": True}]
    same = [{"split": 0.4}, {"ks": [1]}, {"watch": "x"}]
    folders = [config.model_copy(update=change).folder(tmp_path, tmp_path) for change in changes + same]
    assert len(set(folders)) == len(changes) and set(folders[len(changes) :]) == {folders[0]}


def test_the_seed_decides_every_byte(config, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config.model_copy(update={"seed": seed}).download(tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a").keys() != files(tmp_path / "c").keys()


def test_more_images_leave_the_first_ones_as_they_were(config, tmp_path):
    config.download(tmp_path / "a")
    config.model_copy(update={"images_per_class": 4}).download(tmp_path / "b")
    few, many = ({k: v for k, v in files(tmp_path / name).items() if k.suffix == ".png"} for name in "ab")
    assert few.items() < many.items()


def test_every_typeface_has_every_character():
    assert len(CHARACTERS) == len(set(CHARACTERS)) >= 200
    for typeface in TYPEFACES:
        assert {ord(c) for c in CHARACTERS} <= FT2Font(str(FONTS / typeface)).get_charmap().keys(), typeface


def test_drawings_of_a_character_differ_and_have_contrast():
    font = ImageFont.truetype(FONTS / TYPEFACES[0], 48)
    images = [np.asarray(draw("R", font, 48, np.random.default_rng(seed))).astype(int) for seed in range(20)]
    for i, image in enumerate(images):
        brightness = image.mean(2)
        low, high = np.percentile(brightness, [1, 99])
        assert high - low > 60
        assert all(np.abs(image - other).mean() > 5 for other in images[:i])


@pytest.mark.parametrize("wrong", [{"classes": 10_000}, {"classes": 1}, {"size": 0}, {"colour": "red"}, {"seed": -1}])
def test_bad_parameters(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        GlyphsConfig(type="glyphs", **wrong)


def test_plain_ones_are_black_on_white_in_typefaces_and_poses():
    font = ImageFont.truetype(FONTS / "DejaVuSans.ttf", 32)
    one, other = (np.asarray(draw("A", font, 32, np.random.default_rng(seed), plain=True)) for seed in (0, 1))
    for image in (one, other):
        assert image.shape == (32, 32, 3) and image.min() == 0 and (image[0] == 255).all()
        assert (image == image[:, :, :1]).all()
    assert (one != other).any()
