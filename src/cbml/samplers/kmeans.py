"""k-means (Lloyd) on the device of the points: the same result every time on a CPU, and on a GPU in float32."""

import torch
from torch import Tensor

from cbml.progress import progress

BLOCK = 2**25  # distances held at once


@torch.no_grad()
def kmeans(
    points: Tensor, k: int, *, seed: int, starts: int = 1, iterations: int = 100, centres: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Clusters of points, none of them empty.

    Args:
        points: (N, D), of which at least `k` differ.
        starts: k-means++ that many times, and keep the best by its sum of squared distances.
        iterations: at most, of each start; it ends before if no point changes its cluster.
        centres: (k, D), on any device, to go on from instead, so that the numbers of the clusters persist.

    Returns:
        The number of each point's cluster, (N,) int64, and the centres, (k, D).
    """
    generator = torch.Generator().manual_seed(seed)
    best, best_cost = None, float("inf")
    for _ in range(1 if centres is not None else starts):
        means = _plus_plus(points, k, generator) if centres is None else centres.to(points)
        clusters = torch.full((len(points),), -1, device=points.device)
        for _ in progress(range(iterations), "k-means", "steps"):
            distances, found = _nearest(points, means)
            _fill_empty(distances, found, k)
            if torch.equal(found, clusters):
                break
            clusters = found
            counts = clusters.bincount(minlength=k)
            means = torch.zeros_like(means).index_add_(0, clusters, points) / counts[:, None]
        distances, _ = _nearest(points, means)
        if (cost := distances.sum().item()) < best_cost:
            best, best_cost = (clusters, means), cost
    assert best is not None
    return best


def _plus_plus(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Centres among the points, each drawn in proportion to its squared distance from those before."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    squares = points.square().sum(1)
    distances = torch.full((len(points),), torch.inf, device=points.device)
    for _ in progress(range(1, k), "k-means++", "centres"):
        latest = points[chosen[-1]]
        distances = torch.minimum(distances, (squares - 2 * (points @ latest) + squares[chosen[-1]]).clamp(min=0))
        distances[chosen[-1]] = 0
        cumulated = distances.double().cumsum(0)
        threshold = torch.rand((), generator=generator, dtype=torch.float64).item() * cumulated[-1]
        chosen.append(min(int(torch.searchsorted(cumulated, threshold, right=True)), len(points) - 1))
    return points[chosen]


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance (N,) to the nearest centre, and its number (N,)."""
    squares = centres.square().sum(1)
    found = [(squares - 2 * (block @ centres.T)).min(1) for block in points.split(max(1, BLOCK // len(centres)))]
    distances = torch.cat([each.values for each in found]) + points.square().sum(1)
    return distances.clamp(min=0), torch.cat([each.indices for each in found])


def _fill_empty(distances: Tensor, clusters: Tensor, k: int) -> None:
    """Give each empty cluster the point that is farthest from its centre, of those in a cluster of several."""
    counts = clusters.bincount(minlength=k)
    empty = (counts == 0).nonzero().flatten().tolist()
    if not empty:
        return
    farthest = iter(distances.argsort(descending=True, stable=True).tolist())
    for cluster in empty:
        point = next(point for point in farthest if counts[clusters[point]] > 1)
        counts[clusters[point]] -= 1
        counts[cluster] = 1
        clusters[point] = cluster
