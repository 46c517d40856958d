"""Sheets of pictures: queries with their neighbours, and pairs of classes that are confused."""

from functools import cache
from pathlib import Path

import matplotlib
import pandas as pd
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cbml.datasets.images import load_image
from cbml.figures.style import RIGHT, WRONG
from cbml.files import atomic_write

# Pixels.
THUMBNAIL = 96
FRAME = 4
FRAMED = THUMBNAIL + 2 * FRAME
CELL = FRAMED + 10
LINE = 14  # of text
MARGIN = 14
HEADER = 84
ROW = FRAMED + 3 * LINE + 16
PAIR_WIDTH, PAIR_HEIGHT = 2 * FRAMED + 270, FRAMED + 18

PAPER, TEXT, FAINT = "#ffffff", "#202020", "#606060"


def neighbour_sheet(
    title: str,
    subtitle: str,
    rows: dict[int, list[tuple[int, float]]],
    files: list[Path],
    labels: list[int],
    names: dict[int, str],
) -> Image.Image:
    """Draw queries and neighbours, one row each; right ones in a plain frame, wrong ones in a frame with a cross.

    Args:
        rows: of each query its neighbours, nearest first, as (index, cosine similarity).
        files, labels: of each image its file, and its class, which `names` names.
    """
    columns = max(map(len, rows.values()), default=0) + 1
    sheet, draw = _sheet(title, subtitle, max(columns * CELL + 2 * MARGIN, 640), len(rows) * ROW, frames=[True, False])
    for number, (query, neighbours) in enumerate(rows.items()):
        top = HEADER + number * ROW
        sheet.paste(thumbnail(files[query]), (MARGIN + FRAME, top + FRAME))
        _caption(draw, MARGIN, top, names[labels[query]], "query")
        for column, (index, similarity) in enumerate(neighbours, 1):
            left = MARGIN + 8 + column * CELL
            right = labels[index] == labels[query]
            sheet.paste(framed(thumbnail(files[index]), right), (left, top))
            _caption(draw, left, top, names[labels[index]], f"{similarity:.3f}")
    return sheet


def confusion_sheet(
    title: str, subtitle: str, pairs: pd.DataFrame, files: list[Path], names: dict[int, str]
) -> Image.Image:
    """Draw rows of `confusions`, two abreast: the surest failure of each pair of classes, its count and share."""
    height = (len(pairs) + 1) // 2 * PAIR_HEIGHT
    sheet, draw = _sheet(title, subtitle, 2 * PAIR_WIDTH + 2 * MARGIN, height, frames=[False])
    for number, pair in enumerate(pairs.itertuples()):
        left = MARGIN + number % 2 * PAIR_WIDTH
        top = HEADER + number // 2 * PAIR_HEIGHT
        sheet.paste(thumbnail(files[pair.query]), (left + FRAME, top + FRAME))
        sheet.paste(framed(thumbnail(files[pair.nearest]), False), (left + FRAMED + 6, top))
        x, width = left + 2 * FRAMED + 16, PAIR_WIDTH - 2 * FRAMED - 30
        lines = [(text, TEXT) for text in _wrap(names[pair.label], width)]
        lines.append(("nearest to", FAINT))
        lines += [(text, TEXT) for text in _wrap(names[pair.nearest_label], width)]
        lines.append((f"{pair.count} of {pair.queries} queries ({pair.share:.0%})", TEXT))
        lines.append((f"similarity of these two {pair.similarity:.3f}", FAINT))
        _text_lines(draw, x, top + 6, lines)
    return sheet


def save_jpeg(sheet: Image.Image, path: Path) -> None:
    with atomic_write(path) as temporary:
        sheet.save(temporary, quality=80, optimize=True)


@cache
def thumbnail(file: Path) -> Image.Image:
    """The centre square of an image, `THUMBNAIL` pixels wide."""
    image = Image.fromarray(load_image(file, resize=THUMBNAIL, interpolation="bicubic"))
    left, top = (image.width - THUMBNAIL) // 2, (image.height - THUMBNAIL) // 2
    return image.crop((left, top, left + THUMBNAIL, top + THUMBNAIL))


def framed(image: Image.Image, right: bool) -> Image.Image:
    """The image in a frame of `RIGHT`, or of `WRONG` with a cross in its corner."""
    colour = RIGHT if right else WRONG
    image = ImageOps.expand(image, FRAME, colour)
    if not right:
        draw, size, inset = ImageDraw.Draw(image), 20, 5
        left = image.width - size
        draw.rectangle((left, 0, image.width, size), fill=colour)
        near, far = left + inset, image.width - 1 - inset
        for ends in ((near, inset, far, size - 1 - inset), (near, size - 1 - inset, far, inset)):
            draw.line(ends, fill=PAPER, width=3)
    return image


@cache
def _font(size: int = 11, cut: str = "") -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{cut}.ttf"), size)


def _sheet(
    title: str, subtitle: str, width: int, height: int, frames: list[bool]
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty sheet with a header, which says what the right or wrong `frames` mean."""
    sheet = Image.new("RGB", (width, HEADER + height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 10), _truncate(title, width - 2 * MARGIN, _font(15, "-Bold")), TEXT, _font(15, "-Bold"))
    draw.text((MARGIN, 32), subtitle, TEXT, _font(12))
    x = MARGIN
    for right in frames:
        corner = framed(Image.new("RGB", (THUMBNAIL, THUMBNAIL), PAPER), right).crop((FRAMED - 26, 0, FRAMED, 22))
        sheet.paste(corner, (x, 52))
        draw.text((x + 32, 55), "the query's class" if right else "another class", FAINT, _font())
        x += 160
    return sheet, draw


def _caption(draw: ImageDraw.ImageDraw, left: int, top: int, name: str, note: str) -> None:
    _text_lines(draw, left, top + FRAMED + 2, [(text, TEXT) for text in _wrap(name, FRAMED)] + [(note, FAINT)])


def _text_lines(draw: ImageDraw.ImageDraw, left: int, top: int, lines: list[tuple[str, str]]) -> None:
    for number, (text, colour) in enumerate(lines):
        draw.text((left, top + number * LINE), text, colour, _font())


def _wrap(text: str, width: int) -> list[str]:
    """Break a text at a space into one or two lines; what does not fit ends in an ellipsis."""
    words = text.split()
    taken = 1
    while taken < len(words) and _font().getlength(" ".join(words[: taken + 1])) <= width:
        taken += 1
    lines = [" ".join(words[:taken]), " ".join(words[taken:])]
    return [_truncate(line, width, _font()) for line in lines if line]


def _truncate(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"
