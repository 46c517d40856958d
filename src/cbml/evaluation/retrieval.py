"""Exact cosine search in bounded memory."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cbml.errors import UserError
from cbml.progress import progress

BLOCK = 2**22  # similarities held at once (32 MiB): never queries × gallery
RESOLUTION = 2.0**-23  # of a float32 at 1.0: similarities nearer to each other than this are a tie


def unit_vectors(embeddings: Tensor, name: str) -> Tensor:
    """Return `embeddings` (N, D) with unit L2 norm in float64; an embedding that is zero stays zero.

    float64, because there neither TF32, autocast nor the order of a matmul's sums can make or break a tie.

    Raises:
        UserError: not (N, D), empty, or not finite.
    """
    if embeddings.ndim != 2 or not embeddings.numel():
        raise UserError(f"{name}: shape {tuple(embeddings.shape)}, allowed is (N, D) with N and D at least 1")
    finite = embeddings.isfinite().all(dim=1)
    if not finite.all():
        raise UserError(
            f"{name}: embedding of image {finite.int().argmin().item()} is not finite (NaN or infinite; "
            f"{(~finite).sum().item()} of {len(finite)}), only finite numbers are allowed"
        )
    return F.normalize(embeddings.double(), dim=1)


def similarity_blocks(queries: Tensor, gallery: Tensor | None, block: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, similarities (rows, M)) of unit vectors, at most `block` similarities or one row at a time.

    Without a gallery the queries are their own, and each one's similarity to itself, by index, is -inf.
    """
    self_retrieval, gallery = gallery is None, queries if gallery is None else gallery
    step = max(1, block // len(gallery))
    for start in progress(range(0, len(queries), step), "retrieve", "blocks"):
        rows = slice(start, start + step)
        similarities = queries[rows] @ gallery.T
        if self_retrieval:
            similarities.diagonal(start).fill_(-torch.inf)
        yield rows, similarities


@torch.no_grad()
def retrieve(queries: Tensor, gallery: Tensor | None, k: int, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Return the `k` nearest gallery items of each query by cosine similarity, nearest first.

    Args:
        queries: embeddings (N, D), of any norm.
        gallery: embeddings (M, D), or None: the queries themselves, each leaving itself out by index.
        block: the most similarities held at once.

    Returns:
        similarities (N, k), float32, in steps of 2^-23, and indices (N, k) into the gallery; among equal similarities
        the lower index comes first.

    Raises:
        UserError: embeddings that are empty, not finite or of different widths; `k` beyond the gallery.
    """
    queries = unit_vectors(queries, "queries")
    if gallery is not None:
        gallery = unit_vectors(gallery, "gallery")
        check_width(queries, gallery)
    size = len(queries) if gallery is None else len(gallery)
    most = size - 1 if gallery is None else size
    if not 1 <= k <= most:
        raise UserError(f"k: {k} neighbours asked for, allowed is 1 to {most} (the gallery)")
    order = torch.arange(size, device=queries.device)
    similarities, indices = [], []
    for _, block_similarities in similarity_blocks(queries, gallery, block):
        steps = block_similarities.div_(RESOLUTION).round_()
        nearest = (steps * size - order).topk(k).indices  # distinct whole numbers, so topk has no ties to break
        similarities.append((steps.gather(1, nearest) * RESOLUTION).float())
        indices.append(nearest)
    return torch.cat(similarities), torch.cat(indices)


def check_width(queries: Tensor, gallery: Tensor) -> None:
    if queries.shape[1] != gallery.shape[1]:
        raise UserError(
            f"gallery: embeddings have {gallery.shape[1]} dimensions, those of the queries "
            f"{queries.shape[1]}; allowed is the same number"
        )
