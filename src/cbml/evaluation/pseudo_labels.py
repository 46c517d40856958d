"""How pseudo-labels compare with the classes that training was not told."""

import numpy as np
import pandas as pd
from sklearn.metrics import normalized_mutual_info_score


def pseudo_label_table(history: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """One row per refresh of the clusters.

    Args:
        history: (R, N) int, by refresh and image: its cluster, or -1 - cluster if it was left out of batches.
        labels: (N,), the classes.

    Returns:
        `refresh`, from 0; in percent: `nmi` with the classes and `purity`, the share of images that are of their
        cluster's most frequent class, both of all images; `kept_purity`, that of the images in batches alone;
        `changed`, the share of images that have another cluster than at the refresh before (empty for the first);
        `clusters` in use, and the `smallest`, `median` and `largest` number of images in one.
    """
    classes = np.unique(labels, return_inverse=True)[1]
    rows, before = [], None
    for refresh, found in enumerate(history):
        clusters = np.where(found < 0, -1 - found, found)
        sizes = np.bincount(clusters)
        sizes = sizes[sizes > 0]
        rows.append(
            {
                "refresh": refresh,
                "nmi": 100 * normalized_mutual_info_score(classes, clusters),
                "purity": _purity(clusters, classes),
                "kept_purity": _purity(clusters[found >= 0], classes[found >= 0]),
                "changed": None if before is None else 100 * float((clusters != before).mean()),
                "clusters": len(sizes),
                "smallest": int(sizes.min()),
                "median": float(np.median(sizes)),
                "largest": int(sizes.max()),
            }
        )
        before = clusters
    return pd.DataFrame(rows)


def _purity(clusters: np.ndarray, classes: np.ndarray) -> float:
    pairs = pd.DataFrame({"cluster": clusters, "class": classes}).value_counts()
    return 100 * float(pairs.groupby("cluster").max().sum() / len(clusters))
