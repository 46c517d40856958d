"""Characters in many typefaces: a dataset that needs no download. A class is a character."""

import unicodedata
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from pydantic import Field

from cbml.data.sources.base import ClassShare, DatasetConfig, own_folder
from cbml.data.sources.layout import catalogue_of
from cbml.files import atomic_write
from cbml.progress import progress

# matplotlib's text typefaces; its others hold symbols, or map letters to the wrong code points
CUTS = {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
    "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
}
TYPEFACES = [f"{family}{cut}.ttf" for family, cuts in CUTS.items() for cut in cuts]

# In all of these typefaces, and no two of one shape (as Latin A, Greek Alpha and Cyrillic A would be, or o and O):
# two classes that look the same would bound Recall@1 from above.
CHARACTERS = (
    "123456789ABCDEFGHJKLMNOPQRSTUVWXYZabdefghijmnqrty"
    "ßÆæŒÞðøŋƈƕƛƪƫƺƾǂɐɕɘɟɠɣɧɮɰɲɳɷɹɻɽʁʂʇʉʊʌʍʎʐʑʒʔʕʖʗʘʚʝʞʤʥʦʧʨɥɭʋɔĲﬁ"
    "ΓΔΞΠΣΦΨΩαβγδεζθλμξπρςσφωϖϙϞϟϠϡϰ"
    "БДЖИЛЦЧШЩЪЫЭЮЯЂЇЉЊЋѢђ"
    '!#$%&*+/<=>?@~£€¥§©¤¶¿×±‡†∂¬№‰½™«»{}(^;÷␣"'
)


class GlyphsConfig(DatasetConfig):
    """How many characters to draw, how often, how large (pixels; images are square), and from which seed.

    `plain`: black on white and sharp, so that images of a character differ in typeface and pose alone.
    The first `split` of the characters train, the others test.
    """

    type: Literal["glyphs"]
    classes: int = Field(200, ge=4, le=len(CHARACTERS))
    images_per_class: int = Field(20, ge=2)
    size: int = Field(48, ge=16)
    seed: int = Field(0, ge=0)
    plain: bool = False
    split: ClassShare = 0.5

    def folder(self, data: Path, root: Path) -> Path:
        return own_folder(data, self.type, [self.classes, self.images_per_class, self.size, self.seed, self.plain])

    def catalogue(self, folder: Path) -> pd.DataFrame:
        return catalogue_of(folder, folder, self.split)

    def download(self, folder: Path, root: Path = Path()) -> None:
        """Draw the dataset, in the layout of `cbml.data.sources.layout`.

        The characters are shuffled, so that both halves of the classes hold all scripts.
        """
        folder_of_fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
        fonts = [ImageFont.truetype(folder_of_fonts / name, self.size) for name in TYPEFACES]
        characters = np.random.default_rng(self.seed).permutation(list(CHARACTERS))[: self.classes].tolist()
        names = [f"{i:03}.{unicodedata.name(c).replace(' ', '_')}" for i, c in enumerate(characters, 1)]
        images = [(i, k) for i in range(self.classes) for k in range(self.images_per_class)]
        paths = [f"{names[i]}/{k + 1:04}.png" for i, k in images]
        with atomic_write(folder) as new:
            for name in names:
                (new / "images" / name).mkdir(parents=True)
            for (i, k), path in zip(progress(images, "drawing", "images"), paths, strict=True):
                rng = np.random.default_rng([self.seed, ord(characters[i]), k])
                font = fonts[rng.integers(len(fonts))]
                draw(characters[i], font, self.size, rng, plain=self.plain).save(new / "images" / path)
            tables: dict[str, list[Any]] = {
                "classes.txt": names,
                "images.txt": paths,
                "image_class_labels.txt": [i + 1 for i, _ in images],
                "train_test_split.txt": [int(i < self.classes // 2) for i, _ in images],
            }
            for file, values in tables.items():
                (new / file).write_text(
                    "".join(f"{n} {value}\n" for n, value in enumerate(values, 1)), encoding="utf-8"
                )


def draw(
    character: str, font: ImageFont.FreeTypeFont, size: int, rng: np.random.Generator, *, plain: bool = False
) -> Image.Image:
    """Draw a character in a random pose, stroke, colour, blur and background; returns an RGB image of `size` pixels.

    Args:
        plain: in a random pose and stroke, black on white.
    """
    stroke = round(size / 48) * int(rng.random() < 1 / 3)
    left, top, right, bottom = font.getbbox(character, stroke_width=stroke)
    glyph = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(glyph).text((1 - left, 1 - top), character, fill=255, font=font, stroke_width=stroke)
    # pixel p of the result shows the glyph at matrix @ p + offset
    zoom = max(glyph.size) / (size * rng.uniform(0.55, 0.8))
    angle, shear = np.radians(rng.uniform(-15, 15)), rng.uniform(-0.2, 0.2)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = zoom * rotation @ [[1, shear], [0, 1]]
    offset = np.array(glyph.size) / 2 - matrix @ (size * rng.uniform(0.42, 0.58, 2))
    ink = glyph.transform(
        (size, size), Image.Transform.AFFINE, np.c_[matrix, offset].ravel().tolist(), Image.Resampling.BICUBIC
    )
    if plain:
        return ImageOps.invert(ink).convert("RGB")
    coverage = np.asarray(ink.filter(ImageFilter.GaussianBlur(size / 48 * rng.uniform(0, 1))))[..., None] / 255

    brightness = rng.permutation([rng.uniform(0, 70), rng.uniform(185, 255)])  # dark on light or light on dark
    colours = brightness[:, None] + rng.uniform(-40, 40, (2, 3))
    ramp = np.linspace(-1, 1, size)
    gradient = rng.uniform(-25, 25, 2) @ [np.tile(ramp, size), np.repeat(ramp, size)]
    background = colours[1] + gradient.reshape(size, size, 1)
    pixels = background + coverage * (colours[0] - background) + rng.normal(0, rng.uniform(0, 15), (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
