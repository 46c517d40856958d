"""Recall@K, R-Precision, MAP@R and NMI, in percent: here, and so wherever they are written or shown."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cbml.errors import UserError
from cbml.evaluation.retrieval import BLOCK, RESOLUTION, check_width, similarity_blocks, unit_vectors


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
        block: the most similarities held at once.

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
    queries = unit_vectors(embeddings, "embeddings")
    labels = _labels(labels, queries, "labels")
    if gallery is None or gallery_labels is None:
        gallery_labels = labels
    else:
        gallery = unit_vectors(gallery, "gallery")
        check_width(queries, gallery)
        gallery_labels = _labels(gallery_labels, gallery, "gallery_labels")

    blocks = []
    for rows, similarities in similarity_blocks(queries, gallery, block):
        same = labels[rows, None] == gallery_labels
        r = same.sum(dim=1, keepdim=True) - int(gallery is None)
        r_max = max(1, int(r.max()))
        # Ranks beyond both R and K count for nothing, so no more negatives than that are needed.
        n_negatives = min(max(r_max, *ks), len(gallery_labels))
        positives = similarities.masked_fill(~same, -torch.inf).topk(r_max).values
        negatives = similarities.masked_fill_(same, -torch.inf).topk(n_negatives).values
        n_ahead = torch.searchsorted(-negatives, RESOLUTION - positives, right=True)
        j = torch.arange(1, r_max + 1, device=r.device)
        rank = j + n_ahead
        hit = (rank <= r).double()
        block_scores = [rank[:, 0] <= k for k in ks] + [hit.sum(1) / r[:, 0], (hit * j / rank).sum(1) / r[:, 0]]
        blocks.append(torch.stack([score.double() for score in block_scores], dim=1)[r[:, 0] > 0])
    scores = torch.cat(blocks)
    if not len(scores):
        raise UserError("labels: no query has another image of its class in the gallery, at least one must")

    names = [f"recall_at_{k}" for k in ks] + ["r_precision", "map_at_r"]
    metrics = dict(zip(names, (100 * scores.sum(dim=0) / len(scores)).tolist(), strict=True))
    if nmi:
        from sklearn.cluster import KMeans  # takes a second to import, which what serves a model need not wait for
        from sklearn.metrics import normalized_mutual_info_score

        k_means = KMeans(n_clusters=len(labels.unique()), random_state=0)
        clusters = k_means.fit_predict(queries.cpu().numpy())
        metrics["nmi"] = 100 * float(normalized_mutual_info_score(labels.cpu().numpy(), clusters))
    metrics["queries"] = len(scores)
    metrics["queries_without_answer"] = len(queries) - len(scores)
    return metrics


def _labels(labels: Tensor, embeddings: Tensor, name: str) -> Tensor:
    labels = torch.as_tensor(labels, device=embeddings.device)
    if labels.shape != embeddings.shape[:1]:
        raise UserError(
            f"{name}: shape {tuple(labels.shape)}, allowed is one label per embedding, ({len(embeddings)},)"
        )
    return labels
