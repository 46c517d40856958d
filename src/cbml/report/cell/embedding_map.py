"""A map of some classes: their embeddings in two dimensions."""

from importlib.util import find_spec

import numpy as np
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from cbml.report.common.style import COLOURS, chart, heading, legend, to_svg

MARKERS = "os^vDPX<>*"
UMAP_NEIGHBOURS = 15


def project(embeddings: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """(N, 2) positions of (N, D) unit vectors, and the method: UMAP if umap-learn is installed, else t-SNE."""
    n = len(embeddings)
    with threadpool_limits(1):  # with more, sums differ in their last bits from run to run, and the map with them
        if n > UMAP_NEIGHBOURS and find_spec("umap"):
            from umap import UMAP

            method = UMAP(n_neighbors=UMAP_NEIGHBOURS, init="random", random_state=seed, n_jobs=1)
            return method.fit_transform(embeddings), "UMAP"
        # Not from principal components: embeddings that are all the same have none.
        method = TSNE(perplexity=min(30, (n - 1) / 3), init="random", random_state=seed)
        return method.fit_transform(embeddings), "t-SNE"


def map_chart(title: str, embeddings: np.ndarray, labels: np.ndarray, names: dict[int, str], seed: int) -> str:
    """Draw images of some classes.

    Args:
        embeddings, labels: (N, D) and their classes (N,), which `names` names.
    """
    embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True).clip(min=1e-12)
    positions, method = project(embeddings, seed)
    classes = np.unique(labels)
    with chart(6.4, 4.2) as (figure, ax):
        points = []
        for number, label in enumerate(classes):
            look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            points.append(ax.scatter(*positions[labels == label].T, s=22, linewidths=0, alpha=0.9, **look))
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_aspect("equal", adjustable="datalim")
        heading(figure, f"{title}: {method} of {len(classes)} test classes")
        shown = [name if len(name) <= 28 else f"{name[:27].rstrip()}…" for name in (names[each] for each in classes)]
        legend(figure, shown, points, loc="outside right center")
        return to_svg(figure)
