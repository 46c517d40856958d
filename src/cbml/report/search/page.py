"""The page of a search: each query with the images most similar to it."""

from pathlib import Path

import numpy as np

from cbml.data.lists import ImageList
from cbml.report.common.html import render
from cbml.report.common.pictures import Pictures

SIDE = 96  # of a thumbnail, in pixels
QUERIES = 200  # shown, which bounds the page

Found = list[tuple[Path, float]]  # files, most similar first, with their cosine similarities


def search_page(title: str, queries: list[Path], found: list[Found]) -> str:
    """A page with one row per query: the image, and what was found for it.

    Raises:
        UserError: an image cannot be read.
    """
    shown = list(zip(queries, found, strict=True))[:QUERIES]
    files = list(dict.fromkeys(file for query, images in shown for file in (query, *(each for each, _ in images))))
    numbers = {file: number for number, file in enumerate(files)}
    names = {number: file.name for file, number in numbers.items()}
    # Absolute, so that no folder stands before them.
    pictures = Pictures(ImageList([str(file.absolute()) for file in files], np.arange(len(files)), names), Path(), SIDE)
    rows = [
        (pictures.one(numbers[query]), [pictures.one(numbers[file], f"{value:.3f}") for file, value in images])
        for query, images in shown
    ]
    return render("search", heading=title, rows=rows, pictures=pictures, queries=len(queries))
