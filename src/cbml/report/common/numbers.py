"""Metrics as people read them: the same names, order and digits on every page."""

from collections.abc import Iterable

import pandas as pd

NO_NMI = "NMI is left out: on so many images and classes, k-means takes far longer than retrieval."
NO_NMI_IN_GALLERY = "NMI is left out: queries are searched for in a gallery."


def recalls(names: Iterable[str]) -> list[str]:
    """Those of the form `recall_at_K`, by K."""
    found = [name for name in names if name.removeprefix("recall_at_").isdecimal()]
    return sorted(found, key=lambda name: int(name.removeprefix("recall_at_")))


def metrics(names: Iterable[str]) -> list[str]:
    """Those of metrics: `recalls`, and the others that are there."""
    return [*recalls(names), *(name for name in ("r_precision", "map_at_r", "nmi") if name in names)]


def number(value: float, absent: str = "–") -> str:
    """A figure in percent, as every table has it."""
    return absent if pd.isna(value) else f"{value:.1f}"
