"""Which images are searched for among which, and how many of the nearest count."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """How the images of a test list are scored.

    Attributes:
        ks: the K of Recall@K.
        queries: the first so many images are searched for among the others; None: each among all others.
    """

    ks: Sequence[int] = (1, 2, 4, 8)
    queries: int | None = None

    def split_query_gallery(
        self, embeddings: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Embeddings and labels of the queries, and of the gallery, as `evaluate` takes them.

        Args:
            embeddings, labels: (N, D) and (N,), of the whole list.
        """
        if self.queries is None:
            return embeddings, labels, None, None
        n = self.queries
        return embeddings[:n], labels[:n], embeddings[n:], labels[n:]
