"""Pages of pictures: queries with their neighbours, and pairs of classes that are confused."""

from functools import cache
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cbml.datasets.images import PackedImages
from cbml.datasets.transforms import center_boxes
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


def neighbour_page(
    title: str,
    subtitle: str,
    rows: dict[int, list[tuple[int, float]]],
    images: PackedImages,
    labels: list[int],
    names: dict[int, str],
) -> Image.Image:
    """Draw queries and neighbours, a row each; right ones in a plain frame, wrong ones in a frame with a cross.

    Args:
        rows: of each query its neighbours, nearest first, as (index, cosine similarity).
        labels: the class of each image, which `names` names.
    """
    columns = max(map(len, rows.values()), default=0) + 1
    page, draw = _page(title, subtitle, max(columns * CELL + 2 * MARGIN, 640), len(rows) * ROW, frames=[True, False])
    for number, (query, neighbours) in enumerate(rows.items()):
        top = HEADER + number * ROW
        page.paste(thumbnail(images, query), (MARGIN + FRAME, top + FRAME))
        _caption(draw, MARGIN, top, names[labels[query]], "query")
        for column, (index, similarity) in enumerate(neighbours, 1):
            left = MARGIN + 8 + column * CELL
            right = labels[index] == labels[query]
            page.paste(framed(thumbnail(images, index), right), (left, top))
            _caption(draw, left, top, names[labels[index]], f"{similarity:.3f}")
    return page


def confusion_page(
    title: str, subtitle: str, pairs: pd.DataFrame, images: PackedImages, names: dict[int, str]
) -> Image.Image:
    """Draw rows of `confusions`, two abreast: the surest failure of each pair of classes, its count and share."""
    height = (len(pairs) + 1) // 2 * PAIR_HEIGHT
    page, draw = _page(title, subtitle, 2 * PAIR_WIDTH + 2 * MARGIN, height, frames=[False])
    for number, pair in enumerate(pairs.itertuples()):
        left = MARGIN + number % 2 * PAIR_WIDTH
        top = HEADER + number // 2 * PAIR_HEIGHT
        page.paste(thumbnail(images, pair.query), (left + FRAME, top + FRAME))
        page.paste(framed(thumbnail(images, pair.wrong), False), (left + FRAMED + 6, top))
        x, width = left + 2 * FRAMED + 16, PAIR_WIDTH - 2 * FRAMED - 30
        lines = [(text, TEXT) for text in _wrap(names[pair.label], width)]
        lines.append(("nearest to", FAINT))
        lines += [(text, TEXT) for text in _wrap(names[pair.wrong_label], width)]
        lines.append((f"{pair.count} of {pair.queries} queries ({pair.share:.0%})", TEXT))
        lines.append((f"similarity of these two {pair.similarity:.3f}", FAINT))
        _lines(draw, x, top + 6, lines)
    return page


def save_jpeg(page: Image.Image, path: Path) -> None:
    with atomic_write(path) as temporary:
        page.save(temporary, quality=80, optimize=True)


def thumbnail(images: PackedImages, index: int) -> Image.Image:
    """The centre square of one image, `THUMBNAIL` pixels wide: nearly what the network sees."""
    size = images.sizes[[index]]
    box = center_boxes(size, size.min().item())
    pixels = images.crops(torch.tensor([index]), box, THUMBNAIL, interpolation="bicubic")[0].permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().cpu().numpy())


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


def _page(
    title: str, subtitle: str, width: int, height: int, frames: list[bool]
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty page with a header, which says what the right or wrong `frames` mean."""
    page = Image.new("RGB", (width, HEADER + height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, 10), _truncate(title, width - 2 * MARGIN, _font(15, "-Bold")), TEXT, _font(15, "-Bold"))
    draw.text((MARGIN, 32), subtitle, TEXT, _font(12))
    x = MARGIN
    for right in frames:
        corner = framed(Image.new("RGB", (THUMBNAIL, THUMBNAIL), PAPER), right).crop((FRAMED - 26, 0, FRAMED, 22))
        page.paste(corner, (x, 52))
        draw.text((x + 32, 55), "the query's class" if right else "another class", FAINT, _font())
        x += 160
    return page, draw


def _caption(draw: ImageDraw.ImageDraw, left: int, top: int, name: str, note: str) -> None:
    _lines(draw, left, top + FRAMED + 2, [(text, TEXT) for text in _wrap(name, FRAMED)] + [(note, FAINT)])


def _lines(draw: ImageDraw.ImageDraw, left: int, top: int, lines: list[tuple[str, str]]) -> None:
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
