"""Losses as loops over anchors, pairs or triplets, written from their formulas: slow, but easy to check by eye."""

import math

import torch
from torch import Tensor


def cbml(
    embeddings: Tensor,
    labels: Tensor,
    form: str = "log",
    margin: float = 0.1,
    adaptive_neg: bool = True,
    top_negatives: int = 100,
    gamma: float = 0.2,
    variance_weight: float = 1.0,
    variance_reduction: str = "sum",
) -> Tensor:
    """Kan et al., TPAMI 2023: one anchor after the other, with the published offsets and scales."""
    total = embeddings.sum() * 0
    for i in range(len(labels)):
        similarities = embeddings @ embeddings[i]
        positives = similarities[(labels == labels[i]) & (torch.arange(len(labels)) != i)]
        negatives = similarities[labels != labels[i]]
        if not len(positives) or not len(negatives):
            continue
        mined_positives = positives[positives - margin < negatives.max()]
        if adaptive_neg:
            mined_negatives = negatives[negatives + margin > positives.min()]
        else:
            mined_negatives = negatives.sort(descending=True).values[:top_negatives]
        if not len(mined_positives) or not len(mined_negatives):
            continue
        p = torch.exp(-(mined_positives - 0.5) / 0.5).sum()
        n = torch.exp((mined_negatives - 1) / 0.01).sum()
        if form == "log":
            total = total + torch.log(1 + p) + torch.log(1 + n)
        elif form == "sqrt":
            total = total + torch.sqrt(1 + p) + torch.sqrt(1 + n)
        else:
            total = total + (1 + 0.25 * p) + (1 + 0.25 * n)
        xi = gamma * positives.mean() + (1 - gamma) * negatives.mean()
        variance = ((negatives - xi) ** 2).sum()
        total = total + variance_weight * (variance / len(negatives) if variance_reduction == "mean" else variance)
    return total / len(labels)


def neighbours(labels: Tensor, i: int) -> tuple[list[int], list[int]]:
    """Indices of the positives of anchor `i` and of its negatives."""
    others = [j for j in range(len(labels)) if j != i]
    return [j for j in others if labels[j] == labels[i]], [j for j in others if labels[j] != labels[i]]


def distance(embeddings: Tensor, i: int, j: int) -> Tensor:
    return ((embeddings[i] - embeddings[j]) ** 2).sum().sqrt()


def mean(values: list[Tensor]) -> Tensor | float:
    return sum(values) / len(values) if values else 0.0


def multi_similarity(embeddings, labels, alpha=2, beta=50, base=0.5, epsilon=0.1):
    total = 0
    for i in range(len(labels)):
        positives, negatives = ([embeddings[i] @ embeddings[j] for j in group] for group in neighbours(labels, i))
        if not positives or not negatives:
            continue
        mined_positives = [s for s in positives if s - epsilon < max(negatives)]
        mined_negatives = [s for s in negatives if s + epsilon > min(positives)]
        if not mined_positives:
            continue
        total += torch.log(1 + sum(torch.exp(-alpha * (s - base)) for s in mined_positives)) / alpha
        total += torch.log(1 + sum(torch.exp(beta * (s - base)) for s in mined_negatives)) / beta
    return total / len(labels)


def contrastive(embeddings, labels, margin=1, negatives="all"):
    positive, negative = [], []
    for i in range(len(labels)):
        for j in range(i):
            d = distance(embeddings, i, j)
            (positive if labels[i] == labels[j] else negative).append(d)
    if negatives == "closest":
        negative = sorted(negative, key=Tensor.item)[: len(positive)]
    return mean([d**2 / 2 for d in positive]) + mean([(margin - d).clamp(min=0) ** 2 / 2 for d in negative])


def triplet(embeddings, labels, margin=0.2, mining="semihard", average="violating", one_sided=False):
    costs = []
    for i in range(len(labels)):
        positives, negatives = neighbours(labels, i)
        for j in positives:
            if one_sided and j < i:
                continue
            for k in negatives:
                gap = distance(embeddings, i, k) ** 2 - distance(embeddings, i, j) ** 2
                if mining == "all" or gap <= 0 and mining == "hard" or 0 < gap <= margin and mining == "semihard":
                    costs.append((margin - gap).clamp(min=0))
    return mean([cost for cost in costs if cost > 0] if average == "violating" else costs)


def npair(embeddings, labels, scale=16.0):
    pairs = []
    for label in sorted(set(labels.tolist())):
        of_class = [i for i in range(len(labels)) if labels[i] == label]
        if len(of_class) > 1:
            pairs.append(of_class[:2])
    return mean(
        [
            torch.log(
                1
                + sum(
                    torch.exp(scale * (embeddings[a] @ embeddings[other] - embeddings[a] @ embeddings[p]))
                    for _, other in pairs
                    if other != p
                )
            )
            for a, p in pairs
        ]
    )


def angular(embeddings, labels, alpha=45):
    t = math.tan(math.radians(alpha)) ** 2
    costs = []
    for i in range(len(labels)):
        positives, negatives = neighbours(labels, i)
        for j in positives:
            a, p = embeddings[i], embeddings[j]
            f = [4 * t * (a + p) @ embeddings[k] - 2 * (1 + t) * a @ p for k in negatives]
            costs.append(torch.log(1 + sum(torch.exp(x) for x in f)))
    return mean(costs)


def ranked_list(embeddings, labels, margin=0.4, alpha=1.2, temperature=10, balance=0.5, positives="violating"):
    total = 0
    for i in range(len(labels)):
        same, different = ([distance(embeddings, i, j) for j in group] for group in neighbours(labels, i))
        excess = [(d - (alpha - margin)).clamp(min=0) for d in same]
        if positives == "violating":
            excess = [x for x in excess if x > 0]
        close = [d for d in different if d < alpha]
        weights = [torch.exp(temperature * (alpha - d)) for d in close]
        weighted = sum(w * (alpha - d) for w, d in zip(weights, close, strict=True)) / sum(weights) if close else 0
        total += (1 - balance) * mean(excess) + balance * weighted
    return total / len(labels)


def lifted_structure(embeddings, labels, margin=1):
    costs = []
    for i in range(len(labels)):
        positives, negatives = neighbours(labels, i)
        for j in positives:
            if j < i:
                lifted = sum(torch.exp(margin - distance(embeddings, a, k)) for a in (i, j) for k in negatives)
                costs.append((torch.log(lifted) + distance(embeddings, i, j)).clamp(min=0) ** 2)
    return sum(costs) / (2 * len(costs))


def histogram(embeddings, labels, bins=200):
    width = 2 / bins
    nodes = [-1 + r * width for r in range(bins + 1)]
    shares = {True: [0.0] * (bins + 1), False: [0.0] * (bins + 1)}
    pairs = [(i, j) for i in range(len(labels)) for j in range(i)]
    for kind in shares:
        similarities = [embeddings[i] @ embeddings[j] for i, j in pairs if bool(labels[i] == labels[j]) == kind]
        for r, node in enumerate(nodes):
            shares[kind][r] = mean([(1 - (s - node).abs() / width).clamp(min=0) for s in similarities])
    return sum(shares[False][r] * sum(shares[True][: r + 1]) for r in range(bins + 1))


def binomial_deviance(embeddings, labels, alpha=2, beta=0.5, cost=25):
    positive, negative = [], []
    for i in range(len(labels)):
        for j in range(i):
            s = embeddings[i] @ embeddings[j]
            if labels[i] == labels[j]:
                positive.append(torch.log(1 + torch.exp(-alpha * (s - beta))))
            else:
                negative.append(torch.log(1 + torch.exp(alpha * cost * (s - beta))))
    return mean(positive) + mean(negative)


def cluster(embeddings, labels, margin=1):
    groups = [embeddings[labels == label] for label in labels.unique()]
    means = [group.sum(0) / len(group) for group in groups]
    costs = []
    for c, group in enumerate(groups):
        radius = max((x - means[c]).norm() for x in group)
        gap = min((other - means[c]).norm() for o, other in enumerate(means) if o != c)
        costs.append((radius - gap + margin).clamp(min=0))
    return mean(costs)


def epshn(embeddings, labels, temperature=0.1):
    costs = []
    for i in range(len(labels)):
        positives, negatives = ([embeddings[i] @ embeddings[j] for j in group] for group in neighbours(labels, i))
        if positives and (below := [s for s in negatives if s < max(positives)]):
            p, n = torch.exp(max(positives) / temperature), torch.exp(max(below) / temperature)
            costs.append(-torch.log(p / (p + n)))
    return mean(costs)


def center(embeddings, labels, centers):
    return mean([((x - centers[y]) ** 2).sum() / 2 for x, y in zip(embeddings, labels, strict=True)])


def crossentropy(embeddings, labels, classifier, temperature=0.05):
    costs = []
    for x, y in zip(embeddings, labels, strict=True):
        scores = [torch.exp(x @ w / w.norm() / temperature) for w in classifier]
        costs.append(-torch.log(scores[y] / sum(scores)))
    return mean(costs)


def proxynca(embeddings, labels, proxies, scale=3, positive_in_denominator=False, label_smoothing=0):
    costs = []
    for x, y in zip(embeddings, labels, strict=True):
        d = [((scale * x - scale * p / p.norm()) ** 2).sum() for p in proxies]
        denominator = sum(torch.exp(-d[c]) for c in range(len(d)) if c != y or positive_in_denominator)
        for c in range(len(d)):
            target = 1 - label_smoothing if c == y else label_smoothing / (len(d) - 1)
            costs.append(-target * torch.log(torch.exp(-d[c]) / denominator))
    return sum(costs) / len(labels)


def softtriple(embeddings, labels, centers, per_class=10, scale=20, gamma=0.1, margin=0.01, tau=0.2):
    """`centers`: (classes × per_class, D), those of a class beside each other."""
    centers = [w / w.norm() for w in centers]
    classes = [centers[c : c + per_class] for c in range(0, len(centers), per_class)]
    costs = []
    for x, y in zip(embeddings, labels, strict=True):
        scores = []
        for c, group in enumerate(classes):
            weights = [torch.exp(x @ w / gamma) for w in group]
            similarity = sum(q / sum(weights) * (x @ w) for q, w in zip(weights, group, strict=True))
            scores.append(torch.exp(scale * (similarity - margin * (c == y))))
        costs.append(-torch.log(scores[y] / sum(scores)))
    spread = sum((2 - 2 * group[t] @ group[s]).sqrt() for group in classes for s in range(per_class) for t in range(s))
    return mean(costs) + tau * spread / (len(classes) * per_class * (per_class - 1))


def margin(embeddings, triplets, labels, beta, alpha=0.2):
    """On given (anchor, positive, negative) triplets; `beta`: (classes,)."""
    costs = []
    for a, p, n in triplets:
        b = beta[labels[a]]
        costs.append((distance(embeddings, a, p) - b + alpha).clamp(min=0))
        costs.append((b - distance(embeddings, a, n) + alpha).clamp(min=0))
    return mean([cost for cost in costs if cost > 0])


def adversarial(embeddings, regressor):
    """`regressor` from the second half to the first."""
    half = embeddings.shape[1] // 2
    costs = []
    for x in embeddings:
        a, b = x[:half] / x[:half].norm(), x[half:] / x[half:].norm()
        prediction = regressor(b)
        costs.append(-((a * prediction / prediction.norm()) ** 2).sum() / half)
    return mean(costs)


def proxy_anchor(embeddings, labels, proxies, margin=0.1, alpha=32.0):
    """Kim et al., CVPR 2020, eq. 4."""
    proxies = proxies / proxies.norm(dim=1, keepdim=True)
    positive, negative = [], []
    for c in range(len(proxies)):
        s = embeddings @ proxies[c]
        if (labels == c).any():
            positive.append(torch.log(1 + sum(torch.exp(-alpha * (v - margin)) for v in s[labels == c])))
        negative.append(torch.log(1 + sum(torch.exp(alpha * (v + margin)) for v in s[labels != c])))
    return mean(positive) + mean(negative)


def arcface(embeddings, labels, classes, margin=28.65, scale=64.0):
    """Deng et al., CVPR 2019, eq. 3; beyond pi the margin is a constant."""
    classes, m = classes / classes.norm(dim=0), math.radians(margin)
    losses = []
    for e, label in zip(embeddings, labels.tolist(), strict=True):
        cosines = list(e @ classes)
        angle = torch.acos(cosines[label])
        own = torch.cos(angle + m) if angle <= math.pi - m else torch.cos(angle) - m * math.sin(m)
        others = [torch.exp(scale * c) for i, c in enumerate(cosines) if i != label]
        losses.append(-torch.log(torch.exp(scale * own) / (torch.exp(scale * own) + sum(others))))
    return mean(losses)


def circle(embeddings, labels, margin=0.4, scale=80.0):
    """Sun et al., CVPR 2020, eq. 6, an anchor after the other; the weights have no gradient."""
    losses = []
    for i in range(len(labels)):
        positives, negatives = neighbours(labels, i)
        s = embeddings @ embeddings[i]
        p = [torch.exp(-scale * (1 + margin - s[j].detach()).clamp(min=0) * (s[j] - 1 + margin)) for j in positives]
        n = [torch.exp(scale * (s[j].detach() + margin).clamp(min=0) * (s[j] - margin)) for j in negatives]
        if p and n:
            losses.append(torch.log(1 + sum(p) * sum(n)))
    return mean(losses)


def supcon(embeddings, labels, temperature=0.1):
    """Khosla et al., NeurIPS 2020, eq. 2."""
    losses = []
    for i in range(len(labels)):
        positives, negatives = neighbours(labels, i)
        weights = torch.exp(embeddings @ embeddings[i] / temperature)
        total = sum(weights[j] for j in positives + negatives)
        if positives:
            losses.append(-mean([torch.log(weights[j] / total) for j in positives]))
    return mean(losses)


def smooth_rank(similarities, j, others, temperature):
    """The rank of `j` among `others` by similarity, counted with sigmoids."""
    return 1 + sum(torch.sigmoid((similarities[k] - similarities[j]) / temperature) for k in others if k != j)


def smooth_ap(embeddings, labels, temperature=0.01):
    """Brown et al., ECCV 2020, eq. 6."""
    losses = []
    for i in range(len(labels)):
        positives, negatives = neighbours(labels, i)
        s = embeddings @ embeddings[i]
        precisions = [
            smooth_rank(s, j, positives, temperature) / smooth_rank(s, j, positives + negatives, temperature)
            for j in positives
        ]
        if precisions:
            losses.append(1 - mean(precisions))
    return mean(losses)


def recall_at_k(embeddings, labels, ks=(1, 2, 4, 8, 16), temperature=0.01):
    """Patel et al., CVPR 2022."""
    losses = []
    for i in range(len(labels)):
        positives, negatives = neighbours(labels, i)
        s = embeddings @ embeddings[i]
        for k in ks if positives else ():
            ranks = [smooth_rank(s, j, positives + negatives, temperature) for j in positives]
            found = sum(torch.sigmoid((k - rank) / k) for rank in ranks)
            losses.append(1 - found.clamp(max=k) / min(k, len(positives)))
    return mean(losses)
