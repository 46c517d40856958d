"""How the similarities of pairs of one class, and of two, are distributed."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cbml.evaluation.retrieval import BLOCK, Search, by_class, products

BINS = 400  # from -1 to 1
PAIRS = ("positive", "negative")
SAMPLE = 8192  # images, whose 34 million pairs show the distribution of all; CUB's and Cars' test lists are smaller


@torch.no_grad()
def pair_similarities(
    embeddings: Tensor, labels: Tensor, *, sample: int = SAMPLE, block: int = BLOCK
) -> tuple[pd.DataFrame, dict[str, dict[str, float | None]]]:
    """Densities and moments of the cosine similarity of pairs of images, by whether their class is the same.

    Args:
        embeddings, labels: (N, D), of any norm, and their classes (N,).
        sample: negative pairs are those of so many images, by chance but always the same; positive pairs are all.
        block: the most products held at once.

    Returns:
        A table with the columns `pair` (`positive`, `negative`), `similarity` (the centre of a bin) and `density`,
        which integrates to 1; a kind of pair that does not occur has no rows. And for each kind `mean`, `variance`
        (of the population; None without pairs) and `pairs`, their number.
    """
    vectors, labels = by_class(embeddings, labels, "embeddings", "labels")
    counts = {pair: torch.zeros(BINS, dtype=torch.int64, device=vectors.device) for pair in PAIRS}
    sums = {pair: torch.zeros(2, dtype=torch.float64, device=vectors.device) for pair in PAIRS}

    def add(pair: str, values: Tensor) -> None:
        values = values.double().clamp_(-1, 1)
        counts[pair] += ((values + 1) * (BINS / 2)).long().clamp_(max=BINS - 1).bincount(minlength=BINS)
        sums[pair] += torch.stack([values.sum(), values.square().sum()])

    first, last = (torch.searchsorted(labels, labels, side=side) for side in ("left", "right"))
    search = Search(vectors, vectors, first, last, block)
    for rows in search.blocks():
        similarities = search.left_out(rows)
        later = first[rows, None] + torch.arange(similarities.shape[1], device=rows.device)
        add("positive", similarities[(later > rows[:, None]) & (later < last[rows, None])])  # each pair once

    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:sample].to(labels.device)
    vectors, labels = search.vectors[chosen], labels[chosen]
    for rows in torch.arange(len(labels), device=labels.device).split(max(1, block // 8 // len(labels))):
        later = torch.arange(len(labels), device=rows.device) > rows[:, None]
        add("negative", products(vectors[rows], vectors)[later & (labels[rows, None] != labels)])

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
