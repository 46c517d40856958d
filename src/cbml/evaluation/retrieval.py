"""Exact cosine search in bounded memory: float32 finds what may matter, float64 decides where float32 cannot.

A similarity is the cosine as float64 gives it, as a whole multiple of `STEP`, and two of them within `RESOLUTION` are a
tie. Products in float32 only sort out. They are off by less than `error_bound`, so where one is as near as that to what
it is compared with, float64 takes a second look: at single pairs or, where these are too many or may go beyond the
candidates, at the whole gallery.
"""

import os
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cbml.errors import UserError
from cbml.progress import progress

BLOCK = 2**23  # products held at once (32 MiB): never queries × gallery
PARTS = 8  # of the gallery, multiplied one after another
SPARE = 4  # candidates beyond those asked for, because float32 cannot tell which is the last of them
RESOLUTION = 2.0**-23  # of a float32 at 1.0: similarities nearer to each other than this are a tie
STEP = 2.0**-32  # of all similarities: sums and differences with `RESOLUTION` are exact, and so are ties at it


def check_shape(embeddings: Tensor, name: str) -> None:
    if embeddings.ndim != 2 or not embeddings.numel():
        raise UserError(f"{name}: shape {tuple(embeddings.shape)}, allowed is (N, D) with N and D at least 1")


def check_width(queries: Tensor, gallery: Tensor) -> None:
    if queries.shape[1] != gallery.shape[1]:
        raise UserError(
            f"gallery: embeddings have {gallery.shape[1]} dimensions, those of the queries "
            f"{queries.shape[1]}; allowed is the same number"
        )


def unit_vectors(embeddings: Tensor, name: str, order: Tensor | None = None) -> Tensor:
    """Return `embeddings` (N, D), in another order if one is given, with unit L2 norm in float64; zero stays zero.

    float64, because there neither TF32, autocast nor the order of a matmul's sums can make or break a tie.

    Raises:
        UserError: not (N, D), empty, or not finite.
    """
    check_shape(embeddings, name)
    vectors = embeddings.to(torch.float64, copy=True) if order is None else embeddings[order].double()
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    if not norms.isfinite().all() and not (finite := embeddings.isfinite().all(dim=1)).all():
        raise UserError(
            f"{name}: embedding of image {finite.int().argmin().item()} is not finite (NaN or infinite; "
            f"{(~finite).sum().item()} of {len(finite)}), only finite numbers are allowed"
        )
    return vectors.div_(norms.clamp_min_(1e-12))


def by_class(embeddings: Tensor, labels: Tensor, name: str, labels_name: str) -> tuple[Tensor, Tensor]:
    """`unit_vectors` and labels in order of class: then a query's positives stand side by side."""
    check_shape(embeddings, name)
    labels = torch.as_tensor(labels, device=embeddings.device)
    if labels.shape != embeddings.shape[:1]:
        raise UserError(
            f"{labels_name}: shape {tuple(labels.shape)}, allowed is one label per embedding, ({len(embeddings)},)"
        )
    labels, order = labels.sort(stable=True)
    return unit_vectors(embeddings, name, order), labels


def error_bound(width: int) -> float:
    """By how much `products` of unit vectors (N, width) can differ from their cosines.

    Both factors are rounded, and each term of a sum of `width` as many times at most, in whatever order they are added;
    the terms' absolute values add up to 1 at most (Higham, "Accuracy and Stability of Numerical Algorithms", section
    3.1). The rest, two more roundings and 1 %, covers second-order terms.
    """
    return 1.01 * (width + 4) * 2.0**-24


def products(queries: Tensor, gallery: Tensor) -> Tensor:
    """(Q, M) of vectors (Q, D) and (M, D), in what `search_dtype` says."""
    if queries.dtype == torch.float64:
        return queries @ gallery.T
    with torch.autocast("cpu", enabled=False):
        # oneDNN: MKL takes twice the time on AMD processors, and no setting of PyTorch makes this layer coarser than
        # float32.
        return F.linear(queries.to_mkldnn(), gallery).to_dense()


def search_dtype(device: torch.device) -> torch.dtype:
    """float32 where oneDNN is, unless the environment lets it round to less; float64 on GPUs, where TF32 may be on."""
    allowed = {"ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"}.isdisjoint(os.environ)
    return torch.float32 if device.type == "cpu" and torch.backends.mkldnn.is_available() and allowed else torch.float64


def similarities_of(cosines: Tensor) -> Tensor:
    """Whole multiples of `STEP`, in place."""
    return cosines.div_(STEP).round_().mul_(STEP)


def largest(values: Tensor, k: int) -> Tensor:
    """Columns (N, k) of the largest of each row of `values` (N, M), in no order; all M where they are fewer."""
    rows, size = values.shape
    if size <= k:
        return torch.arange(size, device=values.device).expand(rows, size)
    if values.device.type == "cpu":  # NumPy takes a quarter of the time
        return torch.from_numpy(np.argpartition(values.numpy(), size - k, axis=1)[:, -k:])
    return values.topk(k, sorted=False).indices


def ascending(values: Tensor) -> Tensor:
    """`values` (N, M) with each row sorted."""
    if values.device.type == "cpu":  # NumPy takes a twentieth of the time
        return torch.from_numpy(np.sort(values.numpy(), axis=1))
    return values.sort(dim=1).values


class Search:
    """Queries in a gallery, some of which each query leaves out.

    Args:
        queries, gallery: float64 unit vectors (N, D) and (M, D).
        first, last: (N,), int64, neither ever descending; a query leaves out the gallery's items first … last - 1.
        block: the most products held at once.
    """

    def __init__(self, queries: Tensor, gallery: Tensor, first: Tensor, last: Tensor, block: int) -> None:
        self.queries, self.gallery, self.first, self.last, self.block = queries, gallery, first, last, block
        self.vectors = queries.to(search_dtype(queries.device))
        others = self.vectors if gallery is queries else gallery.to(self.vectors.dtype)
        size = -(-len(gallery) // PARTS)
        self.starts = range(0, PARTS * size, size)
        self.parts = F.pad(others, (0, 0, 0, PARTS * size - len(gallery))).split(size)
        self.error = error_bound(queries.shape[1])

    def blocks(self) -> Iterator[Tensor]:
        """Yield the queries' indices, so many at a time as a block has room for."""
        # `left_out` holds several copies of a query's positives.
        width = len(self.gallery) + 8 * (self.last - self.first).max().item()
        indices = torch.arange(len(self.queries), device=self.queries.device)
        yield from progress(indices.split(max(1, self.block // width)), "retrieve", "blocks")

    def candidates(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The `k` items with the largest products of each query, in no order.

        Returns:
            Products (rows, k), -inf for items that are left out, and items (rows, k); all M if there are fewer.
            And an upper bound of the products of all other items, (rows, 1).
        """
        size, queries = len(self.gallery), self.vectors[rows]
        found = [products(queries, part) for part in self.parts]
        for start, part in zip(self.starts, found, strict=True):
            self._leave_out(part, rows, start)
            part[:, max(0, size - start) :] = -torch.inf  # what fills up the last part
        # The k largest are in the columns whose maxima over the parts are the k largest.
        maxima = torch.maximum(found[0], found[1])
        for part in found[2:]:
            torch.maximum(maxima, part, out=maxima)
        columns = largest(maxima, k)
        values = torch.cat([part.gather(1, columns) for part in found], dim=1)
        best = largest(values, min(k, size))
        values, width = values.gather(1, best), columns.shape[1]
        items = columns.gather(1, best % width) + best // width * len(self.parts[0])
        beyond = values.amin(dim=1, keepdim=True)
        return values, items.clamp_(max=size - 1), beyond if k < size else torch.full_like(beyond, -torch.inf)

    def pairs(self, rows: Tensor, items: Tensor) -> Tensor:
        """The similarities (P,) of the queries `rows` (P,) and the gallery's `items` (P,)."""
        size = max(1, self.block // 64 // self.queries.shape[1])  # a megabyte, which stays in the cache
        parts = zip(rows.split(size), items.split(size), strict=True)
        return similarities_of(torch.cat([self.gallery[j].mul_(self.queries[i]).sum(dim=1) for i, j in parts]))

    def left_out(self, rows: Tensor) -> Tensor:
        """The similarities (rows, C) to what each query leaves out, from `first` on, -inf beyond its `last`."""
        first, last = self.first[rows], self.last[rows]
        found = self.queries.new_full((len(rows), max(1, int((last - first).max()))), -torch.inf)
        _, counts = (first + last).unique_consecutive(return_counts=True)  # queries that leave out the same
        of_each = (part.split(counts.tolist()) for part in (first, last, self.queries[rows], found))
        for start, stop, queries, part in zip(*of_each, strict=True):
            items = self.gallery[start[0] : stop[0]]
            part[:, : len(items)] = queries @ items.T
        return similarities_of(found)

    def whole(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some of `rows` and their similarities (some, M) to the gallery, -inf to what they leave out."""
        for some in rows.split(max(1, self.block // (4 * len(self.gallery)))) if len(rows) else ():
            similarities = similarities_of(self.queries[some] @ self.gallery.T)
            self._leave_out(similarities, some, 0)
            yield some, similarities

    def _leave_out(self, part: Tensor, rows: Tensor, start: int) -> None:
        low = max(self.first[rows[0]].item() - start, 0)
        high = min(self.last[rows[-1]].item() - start, part.shape[1])
        if low < high:
            items = torch.arange(start + low, start + high, device=rows.device)
            out = (items >= self.first[rows, None]) & (items < self.last[rows, None])
            part[:, low:high].masked_fill_(out, -torch.inf)


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
        block: the most products held at once.

    Returns:
        Indices (N, k) into the gallery, int64, and cosine similarities (N, k), float64; among equals of one class the
        lower index comes first.

    Raises:
        UserError: embeddings that are empty, not finite or of different widths.
    """
    assert (gallery is None) == (gallery_labels is None)
    queries = unit_vectors(queries, "queries")
    labels = labels.to(queries.device)
    first = torch.arange(len(queries), device=queries.device)
    if gallery is None or gallery_labels is None:
        others, other_labels, last = queries, labels, first + 1
    else:
        others, other_labels = unit_vectors(gallery, "gallery"), gallery_labels.to(queries.device)
        check_width(queries, others)
        first = last = torch.zeros_like(first)
    search = Search(queries, others, first, last, block)
    k = min(k, len(others) - int(gallery is None))
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    similarities = queries.new_empty(len(queries), k)

    def choose(rows: Tensor, items: Tensor, among: Tensor) -> Tensor:
        """Keep the k nearest of `items` (rows, L), at the similarities `among`; return the scores of the last."""
        different = labels[rows, None] != other_labels[items]
        # Less than half a step of the similarities, so that the index decides only between equals.
        scores = among + (RESOLUTION + STEP / 2) * different - items.double() * (STEP / 2 / len(others))
        scores, best = scores.topk(k)
        indices[rows], similarities[rows] = items.gather(1, best), among.gather(1, best)
        return scores[:, -1:]

    for rows in search.blocks():
        products, items, beyond = search.candidates(rows, k + SPARE)
        among = search.pairs(rows.repeat_interleave(items.shape[1]), items.flatten()).view_as(items)
        scores = choose(rows, items, among.masked_fill_(products == -torch.inf, -torch.inf))
        undecided = scores <= beyond.double() + search.error + RESOLUTION + STEP
        for some, among in search.whole(rows[undecided.any(dim=1)]):
            choose(some, torch.arange(len(others), device=rows.device).expand_as(among), among)
    return indices, similarities
