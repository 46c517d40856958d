"""Test images on a page, with their neighbours."""

import base64
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cbml.data.lists import ImageList
from cbml.report.common.thumbnails import contact_sheet

Neighbours = dict[str, np.ndarray]  # `indices` (N, k) and `similarities` (N, k) of the images nearest to each of N


class Pictures:
    """Images of a list on a page, which holds each of them once, in one sheet, however often it shows them.

    Args:
        images, root: the list, and the dataset folder that its paths are relative to.
        side: of a thumbnail, in pixels.
    """

    columns = 16  # of the sheet

    def __init__(self, images: ImageList, root: Path, side: int):
        self.images, self.root, self.side = images, root, side
        self.names = images.class_names
        self.places: dict[int, int] = {}  # of each image that is shown its place in the sheet

    def one(self, index: int, note: str = "", *, query: int | None = None) -> dict[str, Any]:
        """What the template's macro `tile` takes: an image, and whether it is of the class of `query`."""
        row, column = divmod(self.places.setdefault(int(index), len(self.places)), self.columns)
        labels = self.images.labels
        verdict = "" if query is None else "right" if labels[index] == labels[query] else "wrong"
        return {"row": row, "column": column, "name": self.names[labels[index]], "verdict": verdict, "note": note}

    def neighbours(self, query: int, found: Neighbours, count: int | None = None) -> list[dict[str, Any]]:
        """The images nearest to a query, with their similarity."""
        pairs = zip(found["indices"][query][:count], found["similarities"][query][:count], strict=True)
        return [self.one(index, f"{similarity:.3f}", query=query) for index, similarity in pairs]

    @cached_property
    def sheet(self) -> str:
        """All that were shown, as a `data:` URL."""
        files = [self.root / self.images.paths[index] for index in self.places]
        data = contact_sheet(files, self.side, self.columns)
        return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
