"""Losses of methods that are more than a loss: their formulas as loops, published numbers, where gradients flow."""

import math

import pytest
import torch
from loss_options import build, parse, sample, value, value_and_gradient
from torch import nn
from torch.nn.functional import normalize

from cbml.errors import UserError
from cbml.losses import Batch, Sizes, build_loss
from cbml.losses.methods.adversarial import adversarial
from cbml.losses.methods.stml import contextual_similarity
from cbml.models import Outputs
from cbml.models.heads import Slices, SlicesHead


def plane(*degrees):
    """Unit vectors in the plane at these angles."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


FOUR, LABELS = plane(0, 20, 50, 110), torch.tensor([0, 0, 1, 1])
OTHERS = plane(0, 60, 90, 120)


def make(type, parts=None, feature_dim=None, embedding_dim=2, **parameters):  # noqa: A002
    torch.manual_seed(0)
    config = parse({"type": type} | parameters)
    size = sum(parts) if parts else embedding_dim
    return build_loss(config, Sizes(size, 6, feature_dim, tuple(parts or ()))).double()


def joined(*parts):
    return torch.cat(parts, 1) / len(parts) ** 0.5


def pairs(labels):
    """Every ordered pair of two images, and whether they are of one class."""
    count = range(len(labels))
    return [(i, j, bool(labels[i] == labels[j])) for i in count for j in count if i != j]


# Tuplet margin loss


def literal_tml(e, y, scale=64.0, margin=5.73):
    terms = []
    for a, p, same in pairs(y):
        if same:
            angle = torch.acos((e[a] @ e[p]).clamp(-1 + 1e-12, 1 - 1e-12))
            negatives = [e[a] @ e[n] for n in range(len(y)) if y[n] != y[a]]
            terms.append(sum((scale * (s - torch.cos(angle - math.radians(margin)))).exp() for s in negatives).log1p())
    return sum(terms) / len(terms)


def literal_variance(e, y, epsilon=0.01):
    of = {same: torch.stack([e[i] @ e[j] for i, j, is_same in pairs(y) if is_same == same]) for same in (True, False)}
    below = ((1 - epsilon) * of[True].mean() - of[True]).clamp(min=0)
    above = (of[False] - (1 + epsilon) * of[False].mean()).clamp(min=0)
    return below.square().mean() + above.square().mean()


@pytest.mark.parametrize(("scale", "expected"), [(64.0, 4.513285), (8.0, 0.735479)])
def test_tml_has_its_known_values(scale, expected):
    terms = make("tml", scale=scale, variance_weight=1.0).terms(Batch(FOUR, LABELS))
    assert terms["tuplet"].item() == pytest.approx(expected, abs=1e-6)
    assert terms["variance"].item() == pytest.approx(0.022610 + 0.111933, abs=2e-6)


def test_tml_is_softplus_for_one_negative_and_no_margin():
    embeddings, labels = plane(0, 30, 100), torch.tensor([0, 0, 1])
    s = embeddings @ embeddings.T
    expected = nn.functional.softplus(64 * torch.stack([s[0, 2] - s[0, 1], s[1, 2] - s[0, 1]])).mean()
    torch.testing.assert_close(make("tml", margin=0.0).terms(Batch(embeddings, labels))["tuplet"], expected)


# Hard-aware deeply cascaded embedding


def literal_hdc(parts, y, ratios, nested, margin=1.0, factor=10.0):
    unordered = [(i, j, same) for i, j, same in pairs(y) if i < j]
    kept = {same: [(i, j) for i, j, is_same in unordered if is_same == same] for same in (True, False)}
    totals, loss = {same: len(members) for same, members in kept.items()}, 0.0
    for e, ratio in zip(parts, ratios, strict=True):

        def cost(pair, same, e=e):
            squared = (e[pair[0]] - e[pair[1]]).square().sum()
            return squared if same else factor * (margin - squared).clamp(min=0)

        chosen = {
            same: sorted(members, key=lambda pair, same=same, e=e: (e[pair[0]] @ e[pair[1]]) * (1 if same else -1))[
                : int(ratio * totals[same])
            ]
            for same, members in kept.items()
        }
        values = [cost(pair, same) for same, members in chosen.items() for pair in members]
        loss = loss + sum(values) / max(1, sum(value > 0 for value in values))
        kept = chosen if nested else kept
    return loss


def test_hdc_has_its_known_value():
    terms = make("hdc", parts=[2], ratios=[1.0]).terms(Batch(FOUR, LABELS))
    assert terms["part_1"].item() == pytest.approx((1 + 0.120615 + 7.320508 + 2.855752) / 4, abs=1e-6)


@pytest.mark.parametrize("nested", [True, False])
def test_hdc_equals_its_loop(nested):
    embeddings, labels = sample((0, 0, 0, 1, 1, 1, 2, 2, 2))
    ratios = [1.0, 0.5, 0.2]
    loss = make("hdc", parts=[3, 3, 2], nested=nested)

    def expected(e, y):
        return literal_hdc([normalize(part, dim=1) for part in e.split([3, 3, 2], 1)], y, ratios, nested)

    for found, wanted in zip(
        value_and_gradient(loss, embeddings, labels), value_and_gradient(expected, embeddings, labels), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_hdc_trains_on_no_pair_outside_the_share():
    embeddings = FOUR.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(make("hdc", parts=[2], ratios=[0.3])(embeddings, LABELS), embeddings)
    assert gradient[[0, 3]].abs().max() == 0 and gradient[[1, 2]].abs().min() > 0  # the closest negative pair is 1, 2


def test_hdc_wants_a_ratio_for_each_part():
    with pytest.raises(UserError, match="hdc: 3 ratios for 1 parts"):
        build("hdc")


# BIER


def literal_bier(parts, y, boosting, alpha=2.0, beta=0.5, cost=25.0, shrinkage=0.06):
    n, total, weights = len(y), 0.0, {}
    positives = sum(same for *_, same in pairs(y)) + n
    negatives = n * n - positives
    for i, j, same in pairs(y):
        weight, so_far = 1.0, 0.5 if boosting == "linear" else 0.0
        for number, e in enumerate(parts, 1):
            a = alpha * (e[i] @ e[j] - beta) * (1 if same else -cost)
            total = total + weight / (positives if same else negatives) * nn.functional.softplus(-a) / len(parts)
            weights[i, j, number] = float(weight)
            if boosting == "linear":
                so_far = so_far + shrinkage * a.detach()
                weight = torch.sigmoid(-so_far) * (1 if same else 2)
            else:
                so_far = (1 - 2 / (number + 1)) * so_far + 2 / (number + 1) * a.detach()
                weight = torch.sigmoid(-so_far)
    return total, weights


@pytest.mark.parametrize(
    ("boosting", "expected", "weights"),
    [
        ("linear", 6.333118, [0.365224, 0.964197, 0.092525, 1.290432, 0.238406, 0.377541]),
        ("online", 5.647832, [0.293305, 0.999207, 0, 1, 0, 0.5]),
    ],
)
def test_bier_has_its_known_values(boosting, expected, weights):
    loss = make("bier", parts=[2, 2], boosting=boosting, decorrelation_weight=0.0)
    assert value(loss, joined(FOUR, OTHERS), LABELS).item() == pytest.approx(expected, abs=1e-6)
    literal, found = literal_bier([FOUR, OTHERS], LABELS, boosting)
    assert literal.item() == pytest.approx(expected, abs=1e-6)
    second = [found[i, j, 2] for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]
    assert second == pytest.approx(weights, abs=1e-6)


@pytest.mark.parametrize("boosting", ["linear", "online"])
def test_bier_equals_its_loop_and_no_gradient_flows_through_weights(boosting):
    embeddings, labels = sample()
    sizes = [3, 3, 2]
    loss = make("bier", parts=sizes, boosting=boosting, decorrelation_weight=0.0)

    def expected(e, y):
        return literal_bier([normalize(part, dim=1) for part in e.split(sizes, 1)], y, boosting)[0]

    for found, wanted in zip(
        value_and_gradient(loss, embeddings, labels), value_and_gradient(expected, embeddings, labels), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.fixture
def seen():
    """A head of 5 features, two parts of 2 and 3, and what it gives for four images."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(5, 5).double()
    features = torch.randn(4, 5, dtype=torch.float64, generator=generator).requires_grad_()
    return {"embeddings": normalize(head(features), dim=1), "features": features, "head": head}


def literal_activation(f, w, penalty):
    (fm, fn), (wm, wn) = f, w
    products = [(fm[b, i] * fn[b, j]) ** 2 for b in range(4) for i in range(2) for j in range(3)]
    lengths = [torch.stack([(v @ v - 1) ** 2 for v in matrix]).mean() for matrix in (wm, wn)]
    return sum(products) / len(products) + penalty * sum(lengths)


def test_activation_decorrelates_by_the_heads_weights_alone(seen):
    loss = make("bier", parts=[2, 3], decorrelation_weight=0.5, penalty_weight=7.0)
    term = loss.terms(Batch(labels=LABELS, **seen))["decorrelation"]
    weights = seen["head"].weight.split([2, 3])
    expected = 0.5 * literal_activation([seen["features"].detach() @ w.T for w in weights], weights, 7.0)
    torch.testing.assert_close(term, expected)
    of_head, of_bias, of_features = torch.autograd.grad(
        term, [seen["head"].weight, seen["head"].bias, seen["features"]], allow_unused=True
    )
    torch.testing.assert_close(of_head, torch.autograd.grad(expected, seen["head"].weight)[0])
    assert of_bias is None and of_features is None


def test_adversaries_predict_and_the_head_hinders(seen):
    loss = make("bier", parts=[2, 3], decorrelation="adversarial", decorrelation_weight=1.0, penalty_weight=0.0)
    term = loss.terms(Batch(labels=LABELS, **seen))["decorrelation"]
    small, large = (seen["features"].detach() @ w.T for w in seen["head"].weight.split([2, 3]))
    (regressor,) = loss.regressors
    expected = -(small * regressor(large)).square().mean()
    torch.testing.assert_close(term, expected)
    for tensor, sign in ((seen["head"].weight, -1), (regressor[0].weight, 1)):
        found, wanted = (torch.autograd.grad(value, tensor, retain_graph=True)[0] for value in (term, expected))
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, sign * wanted)
    assert torch.autograd.grad(term, seen["features"], allow_unused=True) == (None,)


def test_the_penalty_of_adversaries_is_on_weights_by_inputs_and_on_long_biases(seen):
    loss = make("bier", parts=[2, 3], decorrelation="adversarial", decorrelation_weight=1.0, penalty_weight=1.0)
    regressor = loss.regressors[0]
    regressor[0].bias.data.fill_(1.0)
    without = make("bier", parts=[2, 3], decorrelation="adversarial", decorrelation_weight=1.0, penalty_weight=0.0)
    without.load_state_dict(loss.state_dict())
    found = value(loss, labels=LABELS, **seen) - value(without, labels=LABELS, **seen)
    matrices = [*seen["head"].weight.split([2, 3]), regressor[0].weight, regressor[2].weight]
    expected = sum(torch.stack([(v @ v - 1) ** 2 for v in matrix.T]).mean() for matrix in matrices)
    expected = expected + sum(max(0.0, layer.bias.square().sum() - 1) for layer in (regressor[0], regressor[2]))
    torch.testing.assert_close(found, expected)


def test_bier_wants_parts_and_a_linear_head(seen):
    with pytest.raises(UserError, match="bier: an embedding of 1 part"):
        build("bier")
    with pytest.raises(UserError, match="needs the features of its batch"):
        make("bier", parts=[2, 3]).terms(Batch(labels=LABELS, **seen | {"features": None}))
    with pytest.raises(UserError, match="not one linear layer"):
        make("bier", parts=[2, 3]).terms(Batch(labels=LABELS, **seen | {"head": nn.Identity()}))


# DeML

STREAMS = [2] * 4  # of two streams with two learners each


def literal_hinge(parts, learners, margin=2.0):
    total = 0.0
    for first in range(0, len(parts), learners):
        for m in range(first, first + learners):
            for n in range(m + 1, first + learners):
                costs = [max(0.0, margin - (a - b).norm()) ** 2 for a, b in zip(parts[m], parts[n], strict=True)]
                total = total + sum(costs) / len(costs) / 2
    return total


@pytest.mark.parametrize("margin", [2.0, 0.9])
@pytest.mark.parametrize(("sizes", "learners"), [(STREAMS, 2), ([2] * 4, 4), ([4, 4], 2)])
def test_the_hinge_between_learners_equals_its_loop(sizes, learners, margin):
    embeddings, labels = sample()
    loss = make("learners", parts=sizes, learners=learners, margin=margin)

    def expected(e, y):
        return literal_hinge([normalize(part, dim=1) for part in e.split(sizes, 1)], learners, margin)

    for found, wanted in zip(
        value_and_gradient(loss, embeddings, labels), value_and_gradient(expected, embeddings, labels), strict=True
    ):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted)


def test_learners_of_different_streams_have_nothing_to_do_with_each_other():
    apart, alike = joined(FOUR, -FOUR, FOUR, -FOUR), joined(FOUR, FOUR, -FOUR, -FOUR)
    loss = make("learners", parts=STREAMS, learners=2)
    assert value(loss, apart, LABELS).item() == pytest.approx(0, abs=1e-9)
    assert value(loss, alike, LABELS).item() == pytest.approx(2 * 2.0**2 / 2, abs=1e-4)


def test_alike_learners_have_a_finite_gradient():
    embeddings = joined(FOUR, FOUR, OTHERS, OTHERS).requires_grad_()
    (gradient,) = torch.autograd.grad(
        value(make("learners", parts=STREAMS, learners=2), embeddings, LABELS), embeddings
    )
    assert gradient.isfinite().all()


def test_the_reversal_hinders_what_the_regressor_learns():
    loss = make("learners", parts=STREAMS, learners=2, adversary="reversal", hidden=8)
    plain = [part.clone().requires_grad_() for part in (FOUR, OTHERS, OTHERS, -FOUR)]
    term = value(loss, torch.cat(plain, 1), LABELS)
    predicted = [
        -(normalize(a, dim=1) * normalize(regressor(normalize(b, dim=1)), dim=1)).square().mean()
        for (a, b), regressor in zip((plain[:2], plain[2:]), loss.regressors, strict=True)
    ]
    torch.testing.assert_close(term, sum(predicted))
    for tensor, sign in ((plain[0], -1), (plain[3], -1), (loss.regressors[1][0].weight, 1)):
        found, wanted = (torch.autograd.grad(each, tensor, retain_graph=True)[0] for each in (term, sum(predicted)))
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, sign * wanted)
    assert len(list(loss.parameters())) == 2 * 4 and not list(make("learners", parts=STREAMS, learners=2).parameters())


@pytest.mark.parametrize("order", [1, 2])
def test_the_activation_term_equals_its_loop_and_trains_the_head_alone(order):
    loss = make("activation", parts=STREAMS, learners=2, order=order, penalty_weight=3.0)
    head = SlicesHead(Slices(type="slices", streams=2, learners=2), 5, 2).double()
    features = torch.randn(4, 4 * 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = loss.terms(Batch(normalize(head(features), dim=1), LABELS, features=features, head=head))
    weights = [layer.weight for layer in head.streams]
    product = penalty = 0.0
    for stream, weight in enumerate(weights):
        squares = []  # of each learner and image
        for learner in range(2):
            start = 5 * (2 * stream + learner)
            squares.append([(weight @ image[start : start + 5].detach()).square().mean() for image in features])
        if order == 1:
            product = product + sum(sum(each) / 4 for each in squares)
        else:
            product = product + sum(a * b for a, b in zip(*squares, strict=True)) / 4
        penalty = penalty + 3 * sum((row @ row - 1) ** 2 for row in weight) / 2
    torch.testing.assert_close(found["product"], product)
    torch.testing.assert_close(found["penalty"], penalty)
    total = found["product"] + found["penalty"]
    for weight in weights:
        (wanted,) = torch.autograd.grad(product + penalty, weight, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(total, weight, retain_graph=True)[0], wanted)
    assert torch.autograd.grad(total, features, allow_unused=True) == (None,)


def test_in_one_stream_it_is_the_term_of_bier(seen):
    alike = make("activation", parts=[2, 2], learners=2, penalty_weight=7.0)
    head = nn.Linear(5, 4).double()
    both = seen | {"head": head, "embeddings": normalize(head(seen["features"]), dim=1)}
    expected = make("bier", parts=[2, 2], decorrelation_weight=1.0, penalty_weight=7.0)
    torch.testing.assert_close(
        value(alike, labels=LABELS, **both), expected.terms(Batch(labels=LABELS, **both))["decorrelation"]
    )


@pytest.mark.parametrize("type_", ["learners", "activation"])
def test_learners_are_parts_of_equal_size_in_whole_streams(type_):
    for parts in ([2, 2], [2, 2, 3], [2, 2, 2, 2]):
        with pytest.raises(UserError, match=f"loss {type_}: parts .* are no streams of 3 equal learners"):
            make(type_, parts=parts)


# HORDE


def literal_cosine_contrastive(e, y, margin=0.5):
    positive = [(1 - e[i] @ e[j]) ** 2 / 2 for i, j, same in pairs(y) if same]
    negative = [e[i] @ e[j] - margin for i, j, same in pairs(y) if not same and e[i] @ e[j] > margin]
    return sum(positive) / len(positive) + sum(negative) / (2 * max(1, len(negative)))


def test_the_contrastive_loss_of_horde_has_its_known_value():
    assert value(make("cosine_contrastive"), FOUR, LABELS).item() == pytest.approx(0.190612, abs=1e-6)
    assert literal_cosine_contrastive(FOUR, LABELS).item() == pytest.approx(0.190612, abs=1e-6)
    embeddings, labels = sample()
    torch.testing.assert_close(
        make("cosine_contrastive")(embeddings, labels), literal_cosine_contrastive(embeddings, labels)
    )


def horde(**parameters):
    inner = {"type": "cosine_contrastive"}
    return make("horde", feature_dim=2, embedding_dim=3, loss=inner, **{"orders": 3, "width": 3} | parameters)


def test_moments_have_their_known_values(monkeypatch):
    """One image of four positions; the last projections hand the moments on."""
    loss, seen = horde(), []
    matrices = ([[1.0, -1], [1, 1], [2, 0]], [[1.0, 1], [-1, 1], [0, 1]], [[1.0, 0], [0, 1], [1, 1]])
    for projection, matrix in zip(loss.projections, matrices, strict=True):
        projection.data = torch.tensor(matrix, dtype=torch.float64)
    for output in loss.outputs:
        output.weight.data = torch.eye(3, dtype=torch.float64)
        output.register_forward_hook(lambda module, inputs, result: seen.append(inputs[0]))
    feature_map = torch.tensor([[1.0, 2], [0, 1], [3, 0], [1, 1]], dtype=torch.float64).T.reshape(1, 2, 2, 2)
    embedding = plane(0)
    loss.terms(Batch(torch.nn.functional.pad(embedding, (0, 1)), torch.tensor([0]), map=feature_map))
    assert [moment.squeeze().tolist() for moment in seen] == [[1.25, -1.25, 1.5], [6, 1.75, 4]]


def test_horde_is_the_sum_over_orders_and_does_not_see_positions():
    embeddings, labels = sample()
    embeddings = normalize(embeddings[:, :3], dim=1)
    maps = torch.randn(len(labels), 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = horde()
    terms = loss.terms(Batch(embeddings, labels, map=maps))
    assert list(terms) == ["order_1", "order_2", "order_3"]
    x, phi = maps.flatten(2).mT, []
    for order, projection in enumerate(loss.projections, 1):
        phi.append(x @ projection.T if order == 1 else phi[-1] * (x @ projection.T))
    for order, output in enumerate(loss.outputs, 2):
        expected = literal_cosine_contrastive(normalize(output(phi[order - 1].mean(1)), dim=1), labels)
        torch.testing.assert_close(terms[f"order_{order}"], expected)
    shuffled = maps.flatten(2)[:, :, torch.randperm(16)].view_as(maps)
    torch.testing.assert_close(value(loss, embeddings, labels, map=shuffled), sum(terms.values()))
    alone = horde(orders=1)
    assert list(alone.parameters()) == []
    torch.testing.assert_close(alone(embeddings, labels), make("cosine_contrastive")(embeddings, labels))


def test_random_signs_stand_for_the_square_of_the_product():
    loss = horde(orders=2, width=200_000, trainable=False)
    assert loss.parameter_groups(1.0) == [] and set(loss.projections[0].unique().tolist()) == {-1, 1}
    x, y = torch.tensor([[1.0, 2.0], [0.5, 1.0]], dtype=torch.float64)
    first, second = loss.projections
    assert ((first @ x) * (second @ x) * (first @ y) * (second @ y)).mean().item() == pytest.approx(2.5**2, rel=0.05)


def test_horde_without_a_map_is_one_line():
    with pytest.raises(UserError, match="needs the map of its batch"):
        horde()(torch.eye(3, dtype=torch.float64), torch.tensor([0, 0, 1]))


# MIC


def test_the_adversarial_term_has_its_known_value_and_reversed_gradient():
    a = torch.tensor([[1.0, 0.5], [0.2, 1]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[1.0, 1, 0], [0, 1, 1]], dtype=torch.float64)
    first, second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
    first.weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, -1, 0]], dtype=torch.float64)
    second.weight.data = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]], dtype=torch.float64)
    term = adversarial(a, b, nn.Sequential(first, nn.ReLU(), second))
    assert term.item() == pytest.approx(-0.365385, abs=1e-6)
    (gradient,) = torch.autograd.grad(term, a)
    assert gradient.flatten().tolist() == pytest.approx([0, 0, -0.092456, 0.018491], abs=1e-6)


@pytest.mark.parametrize("task", [0, 1])
def test_mic_is_a_loss_on_the_head_of_its_task_and_the_adversarial_term(task):
    embeddings, labels = sample()
    features = torch.randn(len(labels), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = make("mic", feature_dim=5, embedding_dim=8, loss={"type": "contrastive"})
    embeddings.requires_grad_()
    terms = loss.terms(Batch(embeddings, labels, features=features, task=task))
    shared = normalize(loss.shared(features), dim=1)
    torch.testing.assert_close(terms["task"], build("contrastive")((embeddings, shared)[task], labels))
    torch.testing.assert_close(terms["adversarial"], 2500 * adversarial(embeddings, shared, loss.regressor))
    of_embeddings, of_shared = torch.autograd.grad(terms["task"], [embeddings, loss.shared.weight], allow_unused=True)
    assert (of_embeddings is None, of_shared is None) == (task == 1, task == 0)


# STML

TAUGHT = plane(0, 12, 35, 90, 101, 140)
F = torch.tensor([[1.0, 0], [0.9, 0.3], [0.5, 0.9], [0, 1.2], [-0.2, 1.0], [-0.8, 0.5]], dtype=torch.float64)
G = torch.tensor(
    [[1.0, 0.1, 0], [0.8, 0.3, 0.1], [0.6, 0.7, 0.2], [0.1, 1, 0.3], [-0.1, 1, 0.2], [-0.7, 0.6, 0]],
    dtype=torch.float64,
)
TWICE = torch.tensor([0, 1, 2, 0, 1, 2])


def literal_similarity(embeddings, indices, sigma, k):
    n = len(embeddings)
    pairwise = [
        [math.exp(-((embeddings[i] - embeddings[j]).square().sum()) / sigma) for j in range(n)] for i in range(n)
    ]
    equal = [[1.0 if indices[i] == indices[j] else pairwise[i][j] for j in range(n)] for i in range(n)]
    near = [sorted(range(n), key=lambda j, i=i: -equal[i][j])[:k] for i in range(n)]
    mutual = [{j for j in near[i] if i in near[j]} for i in range(n)]
    overlap = [
        [len(mutual[i] & mutual[j]) / len(mutual[i]) if j in mutual[i] else 0.0 for j in range(n)] for i in range(n)
    ]
    half = near_half(near, k)
    wide = [[sum(overlap[h][j] for h in half[i]) / len(half[i]) for j in range(n)] for i in range(n)]
    return torch.tensor([[(pairwise[i][j] + (wide[i][j] + wide[j][i]) / 2) / 2 for j in range(n)] for i in range(n)])


def near_half(near, k):
    return [neighbours[: round(k / 2)] for neighbours in near]


@pytest.mark.parametrize(
    ("indices", "first_row"),
    [
        (TWICE, [0.875, 0.680269, 0.630710, 0.631709, 0.413545, 0.341545]),
        (torch.arange(6), [1, 0.992769, 0.911960, 0.256709, 0.226045, 0.154045]),
    ],
)
def test_contextual_similarity_has_its_known_values(indices, first_row):
    found = contextual_similarity(3 * TAUGHT, indices, sigma=3.0, k=4)
    assert found[0].tolist() == pytest.approx(first_row, abs=1e-6)
    torch.testing.assert_close(found.float(), literal_similarity(TAUGHT, indices, 3.0, 4))
    torch.testing.assert_close(found, found.T)
    assert found.min() >= 0 and found.max() <= 1


def stml(**parameters):
    """With projections that hand the features on."""
    loss = make("stml", feature_dim=3, neighbours=4, projection_dim=3, **parameters)
    for head in (loss.projection, loss.teacher):
        head.weight.data = torch.eye(3, dtype=torch.float64)
    return loss


def test_stml_has_its_known_values():
    taught = nn.functional.pad(TAUGHT, (0, 1)).requires_grad_()
    f, g = F.clone().requires_grad_(), G.clone().requires_grad_()
    seen = {"embeddings": normalize(f, dim=1), "labels": TWICE, "indices": TWICE}
    terms = stml().terms(Batch(**seen, raw=f, features=g, teacher=Outputs(taught, features=taught)))
    assert terms["embedding"].item() == pytest.approx(0.894409 / 2, abs=1e-6)
    assert terms["projection"].item() == pytest.approx(0.895314 / 2, abs=1e-6)
    assert terms["distillation"].item() == pytest.approx(0.004504, abs=1e-6)
    gradients = torch.autograd.grad(terms["distillation"], [f, g, taught], allow_unused=True, retain_graph=True)
    assert [gradient is None for gradient in gradients] == [False, True, True]
    assert torch.autograd.grad(sum(terms.values()), taught, allow_unused=True) == (None,)
    scaled = stml().terms(Batch(**seen, raw=5 * f, features=g, teacher=Outputs(taught, features=taught)))
    torch.testing.assert_close(scaled, terms)


def test_the_teacher_of_a_head_follows_it_and_is_not_trained():
    loss = stml()
    loss.projection.weight.data.fill_(1.0)
    loss.teacher.weight.data.fill_(0.0)
    for steps, expected in ((1, 0.001), (1, 0.001999), (998, 0.632305)):
        for _ in range(steps):
            loss.follow(0.999)
        assert loss.teacher.weight[0, 0].item() == pytest.approx(expected, abs=1e-6)
    assert [len(group["params"]) for group in loss.parameter_groups(1.0)] == [2]


# ISIF and MoCo


def literal_isif(e, y, temperature):
    n, total = len(e), 0.0
    for a in range(n):
        exps = {k: torch.exp(e[a] @ e[k].detach() / temperature) for k in range(n) if k != a}
        q = {k: value / sum(exps.values()) for k, value in exps.items()}
        total = total - sum(q[k].log() if y[k] == y[a] else (1 - q[k]).log() for k in q)
    return total / n


@pytest.mark.parametrize(("temperature", "expected"), [(0.1, 0.503717), (1.0, 2.051874)])
def test_isif_has_its_known_values_and_gradients_through_the_anchor_alone(temperature, expected):
    embeddings, labels = plane(0, 50, 100, 15, 65, 95), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = make("isif", temperature=temperature)
    assert loss(embeddings, labels).item() == pytest.approx(expected, abs=1e-6)
    for found, wanted in zip(
        value_and_gradient(loss, embeddings, labels),
        value_and_gradient(lambda e, y: literal_isif(e, y, temperature), embeddings, labels),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_moco_tells_the_teachers_crop_from_the_queue():
    loss = make("moco", embedding_dim=3, projection_dim=2, queue=5, temperature=0.5)
    raw, taught = (torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    queue = loss.queue.clone()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    found = value(loss, normalize(raw, dim=1), labels, raw=raw, teacher=Outputs(taught, raw=taught))
    queries, keys = normalize(loss.projection(raw[:3]), dim=1), normalize(loss.teacher(taught[3:]), dim=1)
    expected = sum(
        -torch.log_softmax(torch.stack([q @ k, *(q @ other for other in queue)]) / 0.5, 0)[0]
        for q, k in zip(queries, keys, strict=True)
    )
    torch.testing.assert_close(found, expected / 3)
    torch.testing.assert_close(loss.queue, torch.cat([keys, queue])[:5])
    resumed = make("moco", embedding_dim=3, projection_dim=2, queue=5)
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed.queue, loss.queue)


# All of them


@pytest.mark.parametrize(
    ("type_", "parameters"),
    [("tml", {}), ("cosine_contrastive", {}), ("learners", {"parts": STREAMS, "learners": 2})],
)
def test_gradcheck(type_, parameters):
    embeddings, labels = sample((0, 0, 1, 1, 2))
    loss = make(type_, **parameters)
    assert torch.autograd.gradcheck(lambda e: value(loss, normalize(e), labels), embeddings.requires_grad_())
