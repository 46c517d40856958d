"""A map of some classes: their embeddings in two dimensions."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor

from cbml.figures.style import COLOURS, chart, save_svg

CLASSES, POINTS = 10, 600
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


def draw_map(path: Path, title: str, embeddings: Tensor, labels: np.ndarray, names: dict[int, str], seed: int) -> None:
    """Draw up to `CLASSES` classes and `POINTS` images, chosen by chance and the same for every model.

    Args:
        embeddings, labels: (N, D) unit vectors and their classes (N,), which `names` names.
    """
    rng = np.random.default_rng(seed)
    classes = sorted(rng.permutation(np.unique(labels))[:CLASSES])
    members = [np.flatnonzero(labels == label) for label in classes]
    members = [np.sort(rng.permutation(indices)[: POINTS // len(classes)]) for indices in members]
    positions, method = project(embeddings[np.concatenate(members)].cpu().numpy(), seed)
    with chart(6.4, 4.2) as (figure, ax):
        parts = np.split(positions, np.cumsum([len(indices) for indices in members])[:-1])
        for number, (label, part) in enumerate(zip(classes, parts, strict=True)):
            colour = COLOURS[number % len(COLOURS)]
            name = names[label] if len(names[label]) <= 28 else f"{names[label][:27].rstrip()}…"
            ax.scatter(*part.T, s=22, color=colour, marker=MARKERS[number], linewidths=0, alpha=0.9, label=name)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_aspect("equal", adjustable="datalim")
        figure.suptitle(f"{title}: {method} of {len(classes)} test classes", wrap=True)
        figure.legend(loc="outside right center")
        save_svg(figure, path)
