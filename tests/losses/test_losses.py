"""Every loss against its formula as a loop, on batches where nothing is to learn, and trained on a toy set."""

from operator import attrgetter

import literal_losses as literal
import pytest
import torch
import yaml
from loss_options import (
    CLASSES,
    CONF,
    DIM,
    OPTIONS,
    build,
    losses_in,
    option,
    parse,
    parse_option,
    parts_of,
    sample,
    seen,
    value,
    value_and_gradient,
)
from pydantic import ValidationError
from torch.nn.functional import normalize

from cbml.errors import UserError
from cbml.losses import REGISTRY, Batch, Sizes, build_loss
from cbml.schema import first_error

ALONE = [  # (type, parameters, literal loss of (embeddings, labels))
    ("multi_similarity", {}, literal.multi_similarity),
    ("multi_similarity", {"beta": 40.0, "base": 1.0}, literal.multi_similarity),
    ("contrastive", {}, literal.contrastive),
    ("contrastive", {"margin": 1.3, "negatives": "closest"}, literal.contrastive),
    ("triplet", {}, literal.triplet),
    ("triplet", {"mining": "hard"}, literal.triplet),
    ("triplet", {"mining": "all", "margin": 0.5}, literal.triplet),
    ("triplet", {"mining": "all", "margin": 1.0, "average": "all", "one_sided": True}, literal.triplet),
    ("npair", {}, literal.npair),
    ("npair", {"scale": 1.0}, literal.npair),
    ("angular", {}, literal.angular),
    ("angular", {"alpha": 36.0}, literal.angular),
    ("ranked_list", {}, literal.ranked_list),
    ("ranked_list", {"alpha": 1.4, "positives": "all", "balance": 0.3}, literal.ranked_list),
    ("lifted_structure", {}, literal.lifted_structure),
    ("histogram", {"bins": 10}, literal.histogram),
    ("histogram", {"bins": 51}, literal.histogram),
    ("binomial_deviance", {}, literal.binomial_deviance),
    ("cluster", {}, literal.cluster),
    ("epshn", {}, literal.epshn),
    ("circle", {}, literal.circle),
    ("circle", {"margin": 0.25, "scale": 20.0}, literal.circle),
    ("supcon", {}, literal.supcon),
    ("supcon", {"temperature": 0.5}, literal.supcon),
    ("smooth_ap", {}, literal.smooth_ap),
    ("smooth_ap", {"temperature": 0.1}, literal.smooth_ap),
    ("recall_at_k", {"temperature": 0.1}, literal.recall_at_k),
    ("recall_at_k", {"ks": [1, 3]}, literal.recall_at_k),
]
TRAINED = [  # (type, parameters, name of the trained tensor, literal loss of (embeddings, labels, tensor))
    ("center", {}, "centers", literal.center),
    ("crossentropy", {}, "classifier", literal.crossentropy),
    ("proxynca", {}, "proxies", literal.proxynca),
    ("proxynca", {"positive_in_denominator": True, "label_smoothing": 0.1}, "proxies", literal.proxynca),
    ("proxy_anchor", {}, "loss.proxies", literal.proxy_anchor),
    ("arcface", {}, "loss.W", literal.arcface),
    ("arcface", {"margin": 10.0, "scale": 8.0}, "loss.W", literal.arcface),
]
# The files that are not named after a type, by what they set beyond the defaults.
VARIANTS = {
    "adversarial": {"type": "sum", "terms": {"cbml_log": {"type": "cbml"}, "adversarial": {"type": "adversarial"}}},
    "cbml_center": {
        "type": "sum",
        "terms": {"cbml_log": {"type": "cbml"}, "center": {"type": "center", "weight": 0.01}},
    },
    "cbml_const": {"type": "cbml", "form": "const"},
    "cbml_log": {"type": "cbml"},
    "cbml_log_unconstrained": {"type": "cbml", "variance_weight": 0.0},
    "cbml_sqrt": {"type": "cbml", "form": "sqrt"},
    "abier": {"type": "bier", "decorrelation": "adversarial"},
    "cbml_clusters": {"type": "cbml"},
    "multi_similarity_clusters": {"type": "multi_similarity", "beta": 40.0},
    "divide_conquer": {"type": "per_part", "select": "task", "loss": {"type": "margin", "learn_beta": False}},
    "mic": {"type": "mic", "loss": {"type": "margin", "nonzero_loss_cutoff": 2.0}},
    "horde": {"type": "horde", "loss": {"type": "cosine_contrastive"}},
    "ranked_list_lmh": {"type": "per_part", "loss": {"type": "ranked_list"}},
    "xbm_contrastive": {"type": "xbm", "memory_size": 128, "loss": {"type": "contrastive"}},
}
# Of each option the traits that its loss, or one inside, states: see `Loss`.
IDLE_ON = {name: set.intersection(*(set(loss.idle_on) for loss in losses_in(option(name)))) for name in OPTIONS}
IN_ANY_ORDER = [name for name in OPTIONS if not any(loss.ordered for loss in losses_in(option(name)))]
OF_LABELS = [name for name in OPTIONS if not any(loss.own_batches for loss in losses_in(option(name)))]


def case_id(value):
    return getattr(value, "__name__", str(value)[:60])


def assert_same(loss, expected, embeddings, labels):
    found, gradient = value_and_gradient(lambda e, y: value(loss, normalize(e), y), embeddings, labels)
    expected_value, expected_gradient = value_and_gradient(lambda e, y: expected(normalize(e), y), embeddings, labels)
    assert found != 0
    # `cdist` loses digits of short distances to a matrix product.
    tolerance = 1e-4 if embeddings.dtype == torch.float32 else 1e-8
    torch.testing.assert_close(found, expected_value, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "parameters", "expected"), ALONE, ids=case_id)
def test_equals_the_formula(name, parameters, expected, dtype):
    embeddings, labels = sample(dtype=dtype)
    assert_same(build(name, **parameters), lambda e, y: expected(e, y, **parameters), embeddings, labels)


@pytest.mark.parametrize(("name", "parameters", "tensor", "expected"), TRAINED, ids=case_id)
def test_with_parameters_equals_the_formula(name, parameters, tensor, expected):
    embeddings, labels = sample()
    loss = build(name, **parameters).double()
    own = attrgetter(tensor)(loss).detach()
    assert_same(loss, lambda e, y: expected(e, y, own, **parameters), embeddings, labels)


def test_softtriple_equals_the_formula():
    embeddings, labels = sample()
    loss = build("softtriple", centers_per_class=3).double()
    own = loss.loss.fc.detach().T
    assert_same(loss, lambda e, y: literal.softtriple(e, y, own, per_class=3), embeddings, labels)


def test_margin_equals_the_formula_on_its_triplets():
    embeddings, labels = sample()
    loss = build("margin").double()
    loss.loss.beta.data += torch.linspace(-0.3, 0.3, CLASSES)

    def expected(e, y):
        torch.manual_seed(1)
        triplets = torch.stack(loss.miner(e, y), dim=1).tolist()
        return literal.margin(e, triplets, y, loss.loss.beta.detach())

    torch.manual_seed(1)
    assert_same(loss, expected, embeddings, labels)


def test_margin_samples_flat_over_distances():
    """The closer negative of an anchor is drawn more often, by the inverse of the density of distances on a sphere."""
    angles = torch.tensor([0.0, 0.1, 0.6, 1.3])
    embeddings = torch.zeros(4, DIM, dtype=torch.float64)
    embeddings[:, 0], embeddings[:, 1] = angles.cos(), angles.sin()
    labels = torch.tensor([0, 0, 1, 2])
    torch.manual_seed(0)
    miner = build("margin").miner
    drawn = torch.cat([torch.stack(miner(embeddings, labels)) for _ in range(1000)], dim=1)
    of_first = drawn[2, drawn[0] == 0]
    density = [
        literal.distance(embeddings, 0, j) ** (DIM - 2)
        * (1 - literal.distance(embeddings, 0, j) ** 2 / 4) ** ((DIM - 3) / 2)
        for j in (2, 3)
    ]
    expected = (1 / density[0]) / (1 / density[0] + 1 / density[1])
    assert (of_first == 2).double().mean().item() == pytest.approx(expected.item(), abs=0.03)


def test_adversarial_equals_the_formula():
    embeddings, labels = sample()
    loss = build("adversarial", hidden=5).double()
    found, gradient = value_and_gradient(loss, embeddings, labels)
    expected, expected_gradient = value_and_gradient(
        lambda e, _: literal.adversarial(e, loss.regressor), embeddings, labels
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, -expected_gradient)  # reversed for the embeddings …
    regressor = loss.regressor[0].weight
    torch.testing.assert_close(
        torch.autograd.grad(value(loss, embeddings, labels), regressor),  # … and not for the regressor
        torch.autograd.grad(literal.adversarial(embeddings, loss.regressor), regressor),
    )


# Circle's weights depend on similarities, and have no gradient.
@pytest.mark.parametrize("name", sorted({name for name, *_ in ALONE + TRAINED} - {"circle"} | {"softtriple"}))
def test_gradcheck(name):
    embeddings, labels = sample((0, 0, 1, 1, 2))
    loss = build(name).double()
    assert torch.autograd.gradcheck(lambda e: value(loss, e, labels), embeddings.requires_grad_())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("name", OPTIONS)
def test_degenerate_batches_are_finite(name, autocast):
    identical = torch.ones(6, DIM) / DIM**0.5
    orthogonal = torch.eye(DIM)[[0, 0, 0, 1, 1, 1]]
    pairs, one, different = [0, 0, 0, 1, 1, 1], [0] * 6, list(range(6))
    for embeddings, labels in [
        (sample(one, torch.float32)[0], one),
        (sample(different, torch.float32)[0], different),
        (identical, pairs),
        (identical, one),
        (identical, different),
        (orthogonal, pairs),
        (identical[:1], [0]),
        (identical[:2], [0, 0]),
        (identical[:2], [0, 1]),
    ]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found, gradient = value_and_gradient(option(name), embeddings, torch.tensor(labels))
        assert found.dtype == torch.float32
        assert found.isfinite(), labels
        assert gradient.isfinite().all(), labels


@pytest.mark.parametrize(("name", "batch"), [(name, batch) for name in OPTIONS for batch in sorted(IDLE_ON[name])])
def test_nothing_to_learn_is_zero(name, batch):
    """One image; one class at one point; two classes at opposite points. No part of a point is zero."""
    parts = parts_of(name)
    same = (
        torch.cat([torch.eye(4, size, dtype=torch.float64)[:1] for size in parts], 1).expand(4, -1) / len(parts) ** 0.5
    )
    embeddings, labels = {
        "single": (same[:1], [0]),
        "collapsed": (same, [0, 0, 0, 0]),
        "apart": (torch.cat([same[:2], -same[:2]]), [0, 0, 1, 1]),
    }[batch]
    found, gradient = value_and_gradient(option(name), embeddings, torch.tensor(labels))
    assert found == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", IN_ANY_ORDER)
def test_order_of_the_batch_does_not_matter(name):
    embeddings, labels = sample()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    found, gradient = value_and_gradient(option(name).double(), embeddings, labels)
    permuted, permuted_gradient = value_and_gradient(option(name).double(), embeddings[order], labels[order])
    torch.testing.assert_close(found, permuted)
    torch.testing.assert_close(gradient[order], permuted_gradient)


@pytest.mark.parametrize("name", OF_LABELS)
def test_learns_a_toy_set(name):
    """Classes that differ in two of eight coordinates: a linear map learns to look at these two alone."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(8)
    angles = labels * 2 * torch.pi / CLASSES
    images = torch.randn(len(labels), DIM, generator=generator)
    images[:, 0], images[:, 1] = angles.cos() + 0.1 * images[:, 0], angles.sin() + 0.1 * images[:, 1]

    def recall_at_1(model):
        embeddings = normalize(model(images), dim=1)
        similarity = (embeddings @ embeddings.T).fill_diagonal_(-1)
        return (labels[similarity.argmax(1)] == labels).double().mean().item()

    torch.manual_seed(0)
    model = torch.nn.Linear(DIM, DIM)
    loss = option(name)
    before = recall_at_1(model)
    own = [parameter.detach().clone() for parameter in loss.parameters()]
    optimizer = torch.optim.Adam([{"params": model.parameters()}, *loss.parameter_groups(lr=0.01)], lr=0.01)
    for _ in range(90 if name == "hdc" else 30):  # which looks at the hardest pairs alone
        optimizer.zero_grad()
        embeddings = normalize(model(images), dim=1)
        value(loss, embeddings, labels, **seen(embeddings)).backward()
        optimizer.step()
    assert recall_at_1(model) > before + 0.2
    assert all((parameter != start).any() for parameter, start in zip(loss.parameters(), own, strict=True))


def test_learning_rate_of_own_parameters():
    terms = {"a": {"type": "cbml"}, "b": {"type": "center", "lr_factor": 5.0}, "c": {"type": "proxynca"}}
    loss = build("sum", lr_factor=2.0, terms=terms)
    assert [(len(group["params"]), group["lr"]) for group in loss.parameter_groups(lr=0.1)] == [(1, 1.0), (1, 2.0)]
    assert build("cbml").parameter_groups(lr=0.1) == []


@pytest.mark.parametrize("name", [name for name in OPTIONS if name in REGISTRY or name in VARIANTS])
def test_files_hold_the_defaults(name):
    expected = parse(VARIANTS.get(name, {"type": name}))
    assert parse_option(name).model_dump(include=set(type(expected).model_fields)) == expected.model_dump()


def test_sum_weighs_and_names_its_terms():
    embeddings, labels = sample()
    loss = build("sum", weight=3.0, terms={"a": {"type": "cbml", "weight": 0.5}, "b": {"type": "contrastive"}})
    terms = loss.terms(Batch(embeddings, labels))
    assert list(terms) == ["a", "b"]
    torch.testing.assert_close(terms["a"], 1.5 * build("cbml")(embeddings, labels))
    torch.testing.assert_close(terms["b"], 3 * build("contrastive")(embeddings, labels))
    torch.testing.assert_close(loss(embeddings, labels), terms["a"] + terms["b"])


def test_memory_adds_pairs_with_earlier_batches():
    """Anchors of the last batch against everything in the memory, the anchor itself left out."""
    memory_size, size = 10, 4
    labels = torch.arange(16) % 3
    embeddings, _ = sample(labels.tolist())
    loss = build("xbm", memory_size=memory_size, weight=2.0, loss={"type": "contrastive", "weight": 3.0})
    for start in range(0, 16, size):
        found = loss(embeddings[start : start + size], labels[start : start + size])
        kept = range(max(0, start + size - memory_size), start + size)
        positive, negative = [], []
        for i in range(start, start + size):
            for j in kept:
                d = literal.distance(embeddings, i, j)
                if labels[i] != labels[j]:
                    negative.append((1 - d).clamp(min=0) ** 2 / 2)
                elif i != j:
                    positive.append(d**2 / 2)
        expected = literal.mean(positive) + literal.mean(negative)
        torch.testing.assert_close(found, 6 * expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("inner", ["angular", "contrastive", "margin", "multi_similarity", "triplet"])
def test_memory_continues_from_its_state(inner):
    embeddings, labels = sample(dtype=torch.float32)
    config = {"memory_size": 16, "loss": {"type": inner}}
    loss, resumed = build("xbm", **config), build("xbm", **config)
    loss(embeddings, labels)
    loss(embeddings, labels)
    resumed.load_state_dict(loss.state_dict())
    values = []
    for each in (loss, resumed):
        torch.manual_seed(0)
        values.append(each(embeddings, labels))
    assert torch.equal(*values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "sum", "terms": {}}, "terms: Dictionary should have at least 1 item"),
        ({"type": "sum", "terms": {"a": {"type": "centre"}}}, "'centre'"),
        (
            {"type": "sum", "terms": {"a": {"type": "center", "wight": 1}}},
            "unknown parameter wight; allowed: type, weight",
        ),
        (
            {"type": "sum", "terms": {"a b": {"type": "center"}}},
            "terms.a b: String should match pattern '^\\w+$', got 'a b'",
        ),
        ({"type": "triplet", "mining": "soft"}, "mining: Input should be 'semihard', 'hard' or 'all', got 'soft'"),
        ({"type": "softtriple", "centers_per_class": 1}, "centers_per_class: Input should be greater than 1, got 1"),
        ({"type": "center", "lr_factor": 0}, "lr_factor: Input should be greater than 0, got 0"),
        ({"type": "proxynca", "num_classes": 5}, "unknown parameter num_classes"),
    ],
)
def test_bad_parameters_are_named_in_one_line(config, message):
    with pytest.raises(ValidationError) as raised:
        parse(config)
    line = first_error(raised.value, config)
    assert message in line
    assert "\n" not in line


def test_impossible_combinations_are_named():
    with pytest.raises(UserError, match="xbm: cannot hold center; allowed: angular, contrastive"):
        build("xbm", loss={"type": "center"})
    with pytest.raises(UserError, match="xbm: a triplet inside .* allowed: one_sided: false"):
        build("xbm", loss={"type": "triplet", "one_sided": True})
    embeddings, labels = sample()
    with pytest.raises(UserError, match="xbm: memory_size 4 is below the batch of 9"):
        build("xbm", memory_size=4, loss={"type": "contrastive"})(embeddings, labels)
    with pytest.raises(UserError, match="adversarial: embedding_dim 1 has no two parts"):
        build_loss(parse({"type": "adversarial"}), Sizes(1, 2))
    with pytest.raises(UserError, match="proxynca: 1 class in the training list"):
        build_loss(parse({"type": "proxynca"}), Sizes(8, 1))


def test_every_loss_has_an_option():
    """Each registered type is used by a file of `conf/loss`, alone or inside another loss."""
    used = set()

    def collect(config):
        if isinstance(config, dict):
            used.add(config.get("type"))
            for value in config.values():
                collect(value)

    for path in CONF.glob("*.yaml"):
        collect(yaml.safe_load(path.read_text()))
    assert set(REGISTRY) <= used
