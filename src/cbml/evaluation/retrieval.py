"""Exact cosine search in bounded memory."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cbml.errors import UserError
from cbml.progress import progress

BLOCK = 2**22  # similarities held at once (32 MiB): never queries × gallery
RESOLUTION = 2.0**-23  # of a float32 at 1.0: similarities nearer to each other than this are a tie
STEP = 2.0**-32  # of all similarities: sums and differences with `RESOLUTION` are exact, and so are ties at it


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

    They are whole multiples of `STEP`. Without a gallery the queries are their own, and each one's similarity to
    itself, by index, is -inf.
    """
    self_retrieval, gallery = gallery is None, queries if gallery is None else gallery
    step = max(1, block // len(gallery))
    for start in progress(range(0, len(queries), step), "retrieve", "blocks"):
        rows = slice(start, start + step)
        similarities = (queries[rows] @ gallery.T).div_(STEP).round_().mul_(STEP)
        if self_retrieval:
            similarities.diagonal(start).fill_(-torch.inf)
        yield rows, similarities


@torch.no_grad()
def retrieve(
    queries: Tensor,
    labels: Tensor,
    k: int,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """The nearest gallery items of each query, by the rules of `evaluate`: at a tie, other classes come first.

    Args:
        queries, labels: embeddings (N, D), of any norm, and their classes (N,).
        k: the number of neighbours; all others, if they are fewer.
        gallery, gallery_labels: (M, D) and (M,); without them the queries are the gallery, each leaving itself out by
            index.
        block: the most similarities held at once.

    Returns:
        Indices (N, k) into the gallery, int64, and cosine similarities (N, k), float64; among equals of one class the
        lower index comes first.

    Raises:
        UserError: embeddings that are empty, not finite or of different widths.
    """
    queries = unit_vectors(queries, "queries")
    assert (gallery is None) == (gallery_labels is None)
    others = labels if gallery_labels is None else gallery_labels
    if gallery is not None:
        gallery = unit_vectors(gallery, "gallery")
        check_width(queries, gallery)
    size = len(others)
    k = min(k, size - (gallery is None))
    # Below half a step of the similarities: it decides between equals alone.
    order = torch.arange(size, device=queries.device, dtype=torch.float64) * (STEP / 2 / size)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    similarities = queries.new_empty(len(queries), k)
    for rows, block_similarities in similarity_blocks(queries, gallery, block):
        different = labels[rows, None].to(queries.device) != others.to(queries.device)
        indices[rows] = (block_similarities + (RESOLUTION + STEP / 2) * different - order).topk(k).indices
        similarities[rows] = block_similarities.gather(1, indices[rows])
    return indices, similarities


def check_width(queries: Tensor, gallery: Tensor) -> None:
    if queries.shape[1] != gallery.shape[1]:
        raise UserError(
            f"gallery: embeddings have {gallery.shape[1]} dimensions, those of the queries "
            f"{queries.shape[1]}; allowed is the same number"
        )
