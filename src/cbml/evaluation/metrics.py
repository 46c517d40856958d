"""Recall@K, R-Precision, MAP@R and NMI, in percent: here, and so wherever they are written or shown."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cbml.errors import UserError
from cbml.evaluation.retrieval import BLOCK, RESOLUTION, SPARE, Search, ascending, by_class, check_width, unit_vectors

NMI_BOUND = 2**20  # images × classes: the time of k-means grows with it; beyond this it exceeds that of everything else


@torch.no_grad()
def evaluate(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    nmi: bool = False,
    block: int = BLOCK,
) -> dict[str, float]:
    """Score embeddings by exact cosine retrieval.

    With R the number of gallery items of a query's class and rank_j the rank of the j-th nearest of them:

        Recall@K    = [rank_1 <= K]
        R-Precision = 1/R Σ_j [rank_j <= R]
        MAP@R       = 1/R Σ_j [rank_j <= R] j / rank_j

    averaged over the queries (Musgrave et al., "A Metric Learning Reality Check", ECCV 2020, section 3). Ties count
    against the model: items of other classes whose similarity is equal to within 2^-23 (float32's resolution) come
    first. So equal embeddings score 0 (given K items of other classes), and the order of the input does not matter.

    Args:
        embeddings, labels: queries (N, D), of any norm, and their classes (N,).
        gallery, gallery_labels: (M, D) and (M,); without them the queries are the gallery, each leaving itself out
            by index.
        ks: the K of Recall@K.
        nmi: also cluster the embeddings by k-means (seed 0, as many clusters as classes) and compare with the labels;
            for self-retrieval only.
        block: the most products held at once.

    Returns:
        `recall_at_{K}`, `r_precision`, `map_at_r` and, if asked for, `nmi`, all in percent; `queries`, the number of
        queries in these means; `queries_without_answer`, the number left out because the gallery has no (other) item
        of their class.

    Raises:
        UserError: embeddings that are empty, not finite or of different widths; labels that do not match them;
            no query with an answer; K below 1; NMI with a gallery.
    """
    if not ks or min(ks) < 1:
        raise UserError(f"ks: {list(ks)}, allowed are one or more whole numbers of at least 1")
    if (gallery is None) != (gallery_labels is None):
        raise UserError("gallery: embeddings and labels are allowed only together, one of them is missing")
    if nmi and gallery is not None:
        raise UserError("nmi: allowed only without a gallery")
    queries, in_order = by_class(embeddings, labels, "embeddings", "labels")
    self_retrieval = gallery is None
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = queries, in_order
    else:
        gallery, gallery_labels = by_class(gallery, gallery_labels, "gallery", "gallery_labels")
        check_width(embeddings, gallery)
    first, last = (torch.searchsorted(gallery_labels, in_order, side=side) for side in ("left", "right"))
    search = Search(queries, gallery, first, last, block)

    blocks = []
    for rows in search.blocks():
        r = (last - first)[rows, None] - int(self_retrieval)
        r_max = max(1, int(r.max()))
        positives = search.left_out(rows)
        if self_retrieval:
            positives.scatter_(1, (rows - first[rows])[:, None], -torch.inf)
        thresholds = ascending(positives)[:, -r_max:].contiguous() - RESOLUTION
        j = torch.arange(r_max, 0, -1, device=r.device)  # the nearest is the last
        needed = r - j
        needed[:, -1].clamp_(min=max(ks) - 1)
        rank = j + _negatives_ahead(search, rows, thresholds, needed, max(r_max, *ks))
        hit = (rank <= r).double()
        block_scores = [rank[:, -1] <= k for k in ks] + [hit.sum(1) / r[:, 0], (hit * j / rank).sum(1) / r[:, 0]]
        blocks.append(torch.stack([score.double() for score in block_scores], dim=1)[r[:, 0] > 0])
    scores = torch.cat(blocks)
    if not len(scores):
        raise UserError("labels: no query has another image of its class in the gallery, at least one must")

    names = [f"recall_at_{k}" for k in ks] + ["r_precision", "map_at_r"]
    metrics = dict(zip(names, (100 * scores.sum(dim=0) / len(scores)).tolist(), strict=True))
    if nmi:
        from sklearn.cluster import KMeans  # takes a second to import: serving a model must not wait for it
        from sklearn.metrics import normalized_mutual_info_score

        k_means = KMeans(n_clusters=len(in_order.unique()), random_state=0)
        clusters = k_means.fit_predict(unit_vectors(embeddings, "embeddings").cpu().numpy())
        metrics["nmi"] = 100 * float(normalized_mutual_info_score(torch.as_tensor(labels).cpu().numpy(), clusters))
    metrics["queries"] = len(scores)
    metrics["queries_without_answer"] = len(queries) - len(scores)
    return metrics


def recall_at_k(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    block: int = BLOCK,
) -> dict[int, float]:
    """Recall@K by exact cosine retrieval, in percent: how many queries have one of their class among the K nearest.

    A query is not its own neighbour. Ties count against the model: of items that are equally similar, to within 2^-23,
    those of other classes come first; so collapsed embeddings score 0, and not 100. Queries without another item of
    their class are left out. Memory does not grow with queries × gallery, but with `block`.

    Args:
        embeddings, labels, gallery, gallery_labels, ks, block: as of `evaluate`, which has further metrics and the
            number of queries left out.

    Returns:
        By K.

    Raises:
        UserError: as `evaluate`.
    """
    metrics = evaluate(embeddings, labels, gallery, gallery_labels, ks=ks, block=block)
    return {k: metrics[f"recall_at_{k}"] for k in ks}


def affords_nmi(labels: Tensor) -> bool:
    """Whether NMI costs seconds: up to 2^20 images × classes (CUB-200-2011 has 0.6 million, SOP 685 million)."""
    return len(labels) * len(labels.unique()) <= NMI_BOUND


def _negatives_ahead(search: Search, rows: Tensor, thresholds: Tensor, needed: Tensor, k: int) -> Tensor:
    """How many items of other classes are at least as similar as `thresholds` (rows, R), which ascend.

    Args:
        needed: (rows, R), all below `k`; a count above it need not be exact.
    """
    found, items, beyond = search.candidates(rows, k + SPARE)
    similarities = found.double()
    surely_ahead = found.shape[1] - torch.searchsorted(ascending(found).double(), thresholds + search.error)
    thresholds = thresholds.masked_fill(surely_ahead > needed, -torch.inf)
    low, high = (torch.searchsorted(thresholds, similarities + error) for error in (-search.error, search.error))
    near = (low < high) & found.isfinite()
    throughout = near.sum(dim=1) > len(search.gallery) // 16  # then a matrix product takes less time
    near[throughout] = False
    row, place = near.nonzero().unbind(dim=1)
    similarities[row, place] = search.pairs(rows[row], items[row, place])
    ahead = similarities.shape[1] - torch.searchsorted(ascending(similarities), thresholds)
    # At a threshold this low, items that are not candidates may be ahead too.
    unsettled = (thresholds - search.error <= beyond) & (ahead <= needed)
    throughout |= unsettled.any(dim=1)
    for some, similarities in search.whole(rows[throughout]):
        some = some - rows[0]
        ahead[some] = similarities.shape[1] - torch.searchsorted(ascending(similarities), thresholds[some])
    return ahead
