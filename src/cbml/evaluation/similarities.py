"""How the similarities of pairs of one class, and of two, are distributed."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cbml.evaluation.retrieval import BLOCK, unit_vectors
from cbml.progress import progress

BINS = 400  # from -1 to 1
PAIRS = ("positive", "negative")


@torch.no_grad()
def pair_similarities(
    embeddings: Tensor, labels: Tensor, *, block: int = BLOCK
) -> tuple[pd.DataFrame, dict[str, dict[str, float | None]]]:
    """Densities and moments of the cosine similarity of all pairs of images, by whether their class is the same.

    Args:
        embeddings, labels: (N, D), of any norm, and their classes (N,).
        block: the most similarities held at once.

    Returns:
        A table with the columns `pair` (`positive`, `negative`), `similarity` (the centre of a bin) and `density`,
        which integrates to 1; a kind of pair that does not occur has no rows. And for each kind `mean`, `variance`
        (of the population; None without pairs) and `pairs`, their number.
    """
    embeddings = unit_vectors(embeddings, "embeddings")
    labels = labels.to(embeddings.device)
    counts = {pair: torch.zeros(BINS, dtype=torch.float64, device=embeddings.device) for pair in PAIRS}
    sums = {pair: torch.zeros(2, dtype=torch.float64, device=embeddings.device) for pair in PAIRS}
    step = max(1, block // len(embeddings))
    for start in progress(range(0, len(embeddings), step), "similarities", "blocks"):
        rows = slice(start, start + step)
        # Each pair once: columns before the block were its rows, and within it only those after the diagonal count.
        similarities = (embeddings[rows] @ embeddings[start:].T).clamp_(-1, 1)
        same = labels[rows, None] == labels[start:]
        later = torch.ones_like(same).triu_(1)
        for pair, chosen in (("positive", same & later), ("negative", ~same & later)):
            values = similarities[chosen]
            counts[pair] += torch.histc(values, BINS, -1, 1)
            sums[pair] += torch.stack([values.sum(), values.square().sum()])
    tables: list[pd.DataFrame] = []
    moments: dict[str, dict[str, float | None]] = {}
    centres = ((np.arange(BINS) + 0.5) * 2 / BINS - 1).round(6)
    for pair in PAIRS:
        total = int(counts[pair].sum())
        moments[pair] = {"mean": None, "variance": None, "pairs": total}
        if total:
            mean, square = (sums[pair] / total).tolist()
            moments[pair] |= {"mean": mean, "variance": max(square - mean**2, 0.0)}
            density = counts[pair].cpu().numpy() / total * BINS / 2
            tables.append(pd.DataFrame({"pair": pair, "similarity": centres, "density": density}))
    return pd.concat(tables) if tables else pd.DataFrame(columns=["pair", "similarity", "density"]), moments
