"""Small pictures of images."""

import io
from pathlib import Path

from PIL import Image

from cbml.data.images import load_image


def thumbnail(file: Path, side: int) -> Image.Image:
    """The centre square of an image, `side` pixels wide."""
    image = Image.fromarray(load_image(file, resize=side, interpolation="bicubic"))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def contact_sheet(files: list[Path], side: int, columns: int) -> bytes:
    """A JPEG with the thumbnails of these images, row by row.

    Args:
        side: in pixels; of multiples of 16, JPEG's blocks, no thumbnail shows in the one beside it.
    """
    sheet = Image.new("RGB", (columns * side, -(-len(files) // columns) * side))
    for number, file in enumerate(files):
        row, column = divmod(number, columns)
        sheet.paste(thumbnail(file, side), (column * side, row * side))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=75, optimize=True)
    return buffer.getvalue()
