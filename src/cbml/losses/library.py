"""The losses taken from pytorch-metric-learning, each with the miner of its paper."""

import math
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices
from torch import Tensor, nn

from cbml.losses.base import Batch, Loss, Sizes, register
from cbml.schema import NonNegative, Positive, Share

# Embeddings have unit length already; a second normalisation would cost time and take the radial part of gradients.
COSINE = {"distance": distances.DotProductSimilarity(normalize_embeddings=False)}
EUCLIDEAN = {"distance": distances.LpDistance(normalize_embeddings=False)}
SQUARED_EUCLIDEAN = {"distance": distances.LpDistance(normalize_embeddings=False, power=2)}


class LibraryLoss(Loss):
    """Adapter: a pytorch-metric-learning loss, on what its miner selects or on everything."""

    def __init__(self, loss: nn.Module, miner: nn.Module | None = None):
        super().__init__()
        self.loss, self.miner = loss, miner

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        embeddings, labels = batch.embeddings, batch.labels
        selected = self.miner(embeddings, labels) if self.miner else None
        return {"loss": self.loss(embeddings, labels, selected)}


@register("multi_similarity")
class MultiSimilarity(LibraryLoss):
    """Wang et al., CVPR 2019, eq. 15, on the pairs of its mining rule (eq. 11, 12).

    Args:
        alpha, beta: scales of the positive and the negative exponents.
        base: λ, the similarity at which an exponent is zero; the paper's text has 1, its authors' code 0.5.
        epsilon: margin of the mining rule.
    """

    def __init__(self, alpha: Positive = 2.0, beta: Positive = 50.0, base: float = 0.5, epsilon: float = 0.1):
        super().__init__(
            losses.MultiSimilarityLoss(alpha, beta, base, **COSINE), miners.MultiSimilarityMiner(epsilon, **COSINE)
        )


class ContrastiveLoss(losses.ContrastiveLoss):
    """The squared form of the paper, ½ d² and ½ max(0, m − d)², where the library's is linear.

    Its name is the library's, by which `CrossBatchMemory` knows the losses that it can wrap.
    """

    def pos_calc(self, pos_pair_dist, margin):
        return super().pos_calc(pos_pair_dist, margin).square() / 2

    def neg_calc(self, neg_pair_dist, margin):
        return super().neg_calc(neg_pair_dist, margin).square() / 2


class ClosestNegativesMiner(miners.BaseMiner):
    """All positive pairs, and as many negative pairs: those with the smallest distances of the whole batch."""

    def mine(self, embeddings, labels, ref_emb, ref_labels):
        anchors, positives, others, negatives = get_all_pairs_indices(labels, ref_labels)
        gaps = self.distance(embeddings, ref_emb)[others, negatives]
        closest = gaps.topk(min(len(anchors), len(gaps)), largest=False).indices
        return anchors, positives, others[closest], negatives[closest]


@register("contrastive")
class Contrastive(LibraryLoss):
    """Hadsell et al., CVPR 2006, eq. 4, with Euclidean distances; positive and negative pairs averaged apart.

    Args:
        margin: m, a distance.
        negatives: `all` pairs, or only the `closest`, as many as there are positive pairs.
    """

    def __init__(self, margin: Positive = 1.0, negatives: Literal["all", "closest"] = "all"):
        super().__init__(
            ContrastiveLoss(neg_margin=margin, reducer=reducers.MeanReducer(), **EUCLIDEAN),
            ClosestNegativesMiner(**EUCLIDEAN) if negatives == "closest" else None,
        )


class TripletMiner(miners.TripletMarginMiner):
    """The library's miner; with `one_sided`, a positive pair is anchored by its earlier image alone."""

    def __init__(self, one_sided: bool, **kwargs: Any):
        super().__init__(**kwargs)
        self.one_sided = one_sided

    def mine(self, embeddings, labels, ref_emb, ref_labels):
        anchors, positives, negatives = super().mine(embeddings, labels, ref_emb, ref_labels)
        if not self.one_sided:
            return anchors, positives, negatives
        keep = anchors < positives
        return anchors[keep], positives[keep], negatives[keep]


@register("triplet")
class Triplet(LibraryLoss):
    """Schroff et al. (FaceNet), CVPR 2015, eq. 2, with squared Euclidean distances.

    Args:
        margin: α, a squared distance.
        mining: triplets that violate the margin: `all`, `semihard` (the negative is farther than the positive), or
            `hard` (it is closer).
        average: over the triplets with a loss above zero (`violating`), or over every triplet (`all`; with
            `mining: all` alone does it differ).
        one_sided: anchor each positive pair by the image that comes first in the batch, instead of by both.
    """

    def __init__(
        self,
        margin: Positive = 0.2,
        mining: Literal["semihard", "hard", "all"] = "semihard",
        average: Literal["violating", "all"] = "violating",
        one_sided: bool = False,
    ):
        keep = math.inf if average == "all" and mining == "all" else margin
        super().__init__(
            losses.TripletMarginLoss(
                margin, reducer=reducers.MeanReducer() if average == "all" else None, **SQUARED_EUCLIDEAN
            ),
            TripletMiner(one_sided, margin=keep, type_of_triplets=mining, **SQUARED_EUCLIDEAN),
        )


@register("margin")
class Margin(LibraryLoss):
    """Wu et al. (Sampling Matters), ICCV 2017, eq. 6, with distance-weighted sampling and a learned β for each class.

    Args:
        margin: α.
        beta: the boundary between positive and negative distances, at the start.
        nu: weight of the regularisation of β.
        learn_beta: train β; otherwise it stays as it is.
        cutoff: distances below it are sampled as if they were there.
        nonzero_loss_cutoff: negatives beyond this distance are not sampled.
    """

    per_class = True
    lr_factor = 50.0
    ordered = True

    def __init__(
        self,
        sizes: Sizes,
        margin: Positive = 0.2,
        beta: Positive = 1.2,
        nu: NonNegative = 0.0,
        learn_beta: bool = True,
        cutoff: Positive = 0.5,
        nonzero_loss_cutoff: Positive = 1.4,
    ):
        super().__init__(
            losses.MarginLoss(margin, nu, beta, learn_beta=learn_beta, num_classes=sizes.num_classes, **EUCLIDEAN),
            miners.DistanceWeightedMiner(cutoff, nonzero_loss_cutoff),
        )


@register("npair")
class NPair(LibraryLoss):
    """Sohn, NIPS 2016, eq. 7: the first two images of each class in the batch are its anchor and its positive.

    The paper's embeddings have a length of their own, kept short by an L2 penalty. Here they have unit length: the
    penalty is a constant, left out, and `scale` stands for the length.

    Args:
        scale: of the similarities, the square of the length.
    """

    ordered = True  # of a class, its first two images
    idle_on = ("single", "collapsed")  # a negative always has a cost

    def __init__(self, scale: Positive = 16.0):
        super().__init__(losses.NPairsLoss(**COSINE))
        self.scale = scale

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        return super().compute(replace(batch, embeddings=batch.embeddings * self.scale**0.5))


@register("angular")
class Angular(LibraryLoss):
    """Wang et al., ICCV 2017, eq. 8, over every positive pair and its negatives.

    Args:
        alpha: the upper bound of the angle at the negative, in degrees.
    """

    idle_on = ("single", "collapsed")  # a negative always has a cost

    def __init__(self, alpha: Annotated[float, Field(gt=0, lt=90)] = 45.0):
        super().__init__(losses.AngularLoss(alpha))


@register("softtriple")
class SoftTriple(LibraryLoss):
    """Qian et al., ICCV 2019, eq. 9.

    Args:
        centers_per_class: K.
        scale: λ, of the similarities to the classes.
        gamma: temperature of the softmax over the centres of a class.
        margin: δ.
        tau: weight of the regulariser that merges the centres of a class.
    """

    per_class = True
    lr_factor = 100.0
    idle_on = ()

    def __init__(
        self,
        sizes: Sizes,
        centers_per_class: Annotated[int, Field(gt=1)] = 10,
        scale: Positive = 20.0,
        gamma: Positive = 0.1,
        margin: NonNegative = 0.01,
        tau: NonNegative = 0.2,
    ):
        super().__init__(
            losses.SoftTripleLoss(
                sizes.num_classes,
                sizes.embedding_dim,
                centers_per_class,
                la=scale,
                gamma=gamma,
                margin=margin,
                weight_regularizer=regularizers.SparseCentersRegularizer(sizes.num_classes, centers_per_class),
                weight_reg_weight=tau,
            )
        )


@register("proxy_anchor")
class ProxyAnchor(LibraryLoss):
    """Kim et al., CVPR 2020, eq. 4: each class's proxy is the anchor, the images of the batch are its pairs.

    Args:
        margin: δ, of the similarities.
        alpha: scale of the exponents.
    """

    per_class = True
    lr_factor = 100.0
    idle_on = ()

    def __init__(self, sizes: Sizes, margin: NonNegative = 0.1, alpha: Positive = 32.0):
        super().__init__(losses.ProxyAnchorLoss(sizes.num_classes, sizes.embedding_dim, margin, alpha))


@register("arcface")
class ArcFace(LibraryLoss):
    """Deng et al., CVPR 2019, eq. 3: cross-entropy of cosines, with a margin on the angle to the image's own class.

    Args:
        margin: m, in degrees.
        scale: s, of the cosines.
    """

    per_class = True
    lr_factor = 10.0
    idle_on = ()

    def __init__(
        self,
        sizes: Sizes,
        margin: Annotated[float, Field(ge=0, lt=90)] = 28.65,
        scale: Positive = 64.0,
    ):
        super().__init__(losses.ArcFaceLoss(sizes.num_classes, sizes.embedding_dim, margin, scale))


@register("circle")
class Circle(LibraryLoss):
    """Sun et al., CVPR 2020, eq. 6, each image once the anchor; averaged over those with both kinds of pairs.

    Args:
        margin: m, by which the optima and the boundary of similarities are relaxed.
        scale: γ.
    """

    idle_on = ("single", "collapsed")  # a negative always has a cost

    def __init__(self, margin: Share = 0.4, scale: Positive = 80.0):
        super().__init__(losses.CircleLoss(margin, scale))


@register("supcon")
class SupCon(LibraryLoss):
    """Supervised contrastive loss: Khosla et al., NeurIPS 2020, eq. 2, averaged over images that have a positive.

    Args:
        temperature: τ.
    """

    idle_on = ("single", "collapsed")  # a negative always has a cost

    def __init__(self, temperature: Positive = 0.1):
        super().__init__(losses.SupConLoss(temperature, **COSINE))
