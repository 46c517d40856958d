"""Proxy-NCA (Movshovitz-Attias et al., ICCV 2017)."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from cbml.errors import UserError
from cbml.losses.base import Batch, Loss, Sizes, register
from cbml.schema import Positive


@register("proxynca")
class ProxyNCA(Loss):
    """Eq. 4: −ln(exp(−d(x, p)) / Σ exp(−d(x, q))), p the proxy of the image's class and q those of all others.

    d is the squared Euclidean distance of embedding and proxy, both of length `scale`. Own code, because the library
    counts p in the denominator.

    Args:
        scale: length of embeddings and proxies.
        positive_in_denominator: count p in the denominator, as in a softmax.
        label_smoothing: share of the target spread evenly over the other classes.

    Raises:
        UserError: fewer than two classes.
    """

    per_class = True
    lr_factor = 10.0
    idle_on = ()

    def __init__(
        self,
        sizes: Sizes,
        scale: Positive = 3.0,
        positive_in_denominator: bool = False,
        label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ):
        super().__init__()
        if sizes.num_classes < 2:
            raise UserError(f"loss proxynca: {sizes.num_classes} class in the training list; allowed: 2 or more")
        self.scale, self.positive_in_denominator = scale, positive_in_denominator
        self.label_smoothing = label_smoothing
        self.proxies = nn.Parameter(torch.randn(sizes.num_classes, sizes.embedding_dim))

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        cosine = normalize(embeddings, dim=1) @ normalize(self.proxies, dim=1).T
        distance = self.scale**2 * (2 - 2 * cosine)
        own = one_hot(labels, len(self.proxies)).bool()
        other_share = self.label_smoothing / (len(self.proxies) - 1)
        target = torch.full_like(distance, other_share).masked_fill(own, 1 - self.label_smoothing)
        exponents = -distance if self.positive_in_denominator else -distance.masked_fill(own, torch.inf)
        return {"loss": ((target * distance).sum(1) + exponents.logsumexp(1)).mean()}
