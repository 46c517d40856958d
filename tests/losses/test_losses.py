"""Every loss against its formula as a loop, on batches where nothing is to learn, and trained on a toy set."""

import copy
import os
import re
import shutil
import subprocess
import sys
from inspect import signature
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

from cbml import losses
from cbml.errors import UserError
from cbml.losses import CBML, REGISTRY, Batch, Sizes, build_loss, needs
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
    "deml": {
        "type": "sum",
        "terms": {
            "deviance": {"type": "per_part", "weight": 1 / 3, "loss": {"type": "binomial_deviance", "cost": 35.0}},
            "activation": {"type": "activation", "weight": 0.014 / 3, "order": 1, "penalty_weight": 0.5 / 0.014 * 3},
            "learners": {"type": "learners", "weight": 0.2},
        },
    },
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


HINGE = '''
"""A loss that somebody adds."""

from torch import Tensor

from cbml.losses.base import Batch, Loss, masked_mean, pair_masks, register
from cbml.schema import Positive


@register("hinge")
class Hinge(Loss):
    """max(0, s - margin) over negative pairs and 1 - s over positive ones."""

    idle_on = ("single",)

    def __init__(self, margin: Positive = 0.5):
        super().__init__()
        self.margin = margin

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        similarity = batch.embeddings @ batch.embeddings.T
        positive, negative = pair_masks(batch.labels)
        loss = masked_mean(1 - similarity, positive) + masked_mean((similarity - self.margin).clamp(min=0), negative)
        return {"loss": loss}
'''


@pytest.mark.slow
def test_a_loss_is_added_by_two_files(tmp_path):
    """Its module and its YAML file; these tests find it, and try it as they try the others."""
    root = CONF.parents[1]
    for folder in ("src", "conf"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    for file in ("tests/helpers.py", "tests/loss_options.py", "tests/literal_losses.py", "tests/losses/test_losses.py"):
        shutil.copy(root / file, tmp_path / "tests")
    (tmp_path / "src/cbml/losses/hinge.py").write_text(HINGE)
    (tmp_path / "conf/loss/hinge.yaml").write_text("hinge:\n  type: hinge\n  margin: 0.5\n")
    (tmp_path / "conf/loss/hinge_wide.yaml").write_text("hinge_wide:\n  type: hinge\n  margin: 0.8\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "hinge", "tests/test_losses.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}/src:{tmp_path}/tests", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # The file's defaults; and of both files: degenerate batches twice, idle, in any order, learns, its constructor.
    assert f"{1 + 2 * 6} passed" in done.stdout


def test_own_loops_may_give_embeddings_of_any_length():
    embeddings, labels = sample()
    for name in OPTIONS:
        if needs(loss := option(name).double()):
            continue
        states = copy.deepcopy(loss), copy.deepcopy(loss), copy.deepcopy(loss)  # some remember batches
        torch.manual_seed(0)
        expected = value(states[0], embeddings, labels)
        longer = (embeddings * torch.linspace(0.1, 20, len(labels))[:, None]).requires_grad_()
        torch.manual_seed(0)
        found = states[1](longer, labels)
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(found, longer)
        assert (gradient * longer).sum(1).abs().max() < 1e-9 * max(1, gradient.abs().max())  # no radial part
        torch.manual_seed(0)
        torch.testing.assert_close(states[2](embeddings, labels.tolist()), expected)


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (
            torch.eye(4),
            torch.tensor([0, 0, 1]),
            r"CBML: labels have shape \(3,\) .*; allowed: \(4,\), one whole number",
        ),
        (torch.eye(4), torch.zeros(4, 1, dtype=torch.int64), r"labels have shape \(4, 1\)"),
        (torch.eye(4), torch.zeros(4), "dtype torch.float32; allowed: .* whole number"),
        (torch.eye(4), torch.zeros(4, dtype=torch.bool), "dtype torch.bool"),
        (torch.eye(4)[0], torch.zeros(4, dtype=torch.int64), r"CBML: embeddings have shape \(4,\) .*allowed: \(B, D\)"),
        (torch.eye(4).long(), torch.zeros(4, dtype=torch.int64), "embeddings have .*torch.int64; .* floating"),
    ],
)
def test_a_batch_of_other_shapes_is_one_line(embeddings, labels, message):
    with pytest.raises(UserError, match=message) as raised:
        CBML()(embeddings, labels)
    assert "\n" not in str(raised.value)


def test_a_loss_that_needs_more_says_what():
    loss = build_loss(parse({"type": "horde", "loss": {"type": "contrastive"}}), Sizes(DIM, CLASSES, feature_dim=DIM))
    with pytest.raises(UserError, match="needs the map of its batch"):
        loss(*sample(dtype=torch.float32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CBML(form="logg"), "loss cbml: form: Input should be 'log', 'sqrt' or 'const', got 'logg'"),
        (lambda: CBML("logg"), "loss cbml: form: Input should be 'log', 'sqrt' or 'const', got 'logg'"),
        (lambda: CBML(gamma=-3), "loss cbml: gamma: Input should be greater than or equal to 0, got -3"),
        (lambda: CBML(margn=0.2), "loss cbml: unknown parameter margn; allowed: type, weight, lr_factor, form, margin"),
        (lambda: CBML(margin=True), "loss cbml: margin is true, but is not a switch"),
        (lambda: CBML(margin=float("nan")), "loss cbml: margin: Input should be a finite number"),
        (lambda: CBML(sizes=Sizes(8, 6)), "loss cbml: unknown parameter sizes; allowed: type"),
        (lambda: losses.Triplet(mining="soft"), "loss triplet: mining: Input should be 'semihard', 'hard' or 'all'"),
        (lambda: losses.ProxyNCA(Sizes(8, 6), scale=0), "loss proxynca: scale: Input should be greater than 0, got 0"),
        (lambda: losses.ProxyNCA(8, 6), "loss proxynca: sizes: allowed is Sizes(embedding_dim, num_classes), got 8"),
        (lambda: losses.STML(Sizes(8, 6)), "loss: needs the size feature_dim"),
        (lambda: losses.Sum(Sizes(8, 6), terms={"a": {"type": "cbml", "form": "x"}}), "loss sum: terms.a.form: Input"),
    ],
)
def test_constructors_refuse_what_the_files_may_not_say(make, message):
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_constructor_takes_what_its_option_sets_and_nothing_else(name):
    for loss in losses_in(option(name)):
        sizes = (
            {"sizes": Sizes(DIM, CLASSES, DIM, parts_of(name))} if "sizes" in signature(type(loss)).parameters else {}
        )
        again = type(loss)(**sizes, **loss.arguments)
        assert again.arguments == loss.arguments and (again.weight, again.lr_factor) == (loss.weight, loss.lr_factor)
        with pytest.raises(UserError, match=f"loss {type(loss).Config.model_fields['type'].annotation.__args__[0]}: "):
            type(loss)(**sizes, **loss.arguments | {"no_such": 1})


def test_a_loss_shows_its_parameters():
    assert str(CBML()).startswith("CBML(form='log', margin=0.1, adaptive_neg=True, top_negatives=100, ")
    assert "gamma=0.5" in str(CBML(gamma=0.5)) and str(CBML(weight=3)).endswith("weight=3.0)")
    shown = str(build("xbm", loss={"type": "contrastive", "margin": 0.3}))
    assert "memory_size=1024" in shown and "margin=0.3, negatives='all'" in shown


def test_losses_have_their_names_in_the_package():
    assert losses.CBML is CBML and losses.RankedList is REGISTRY["ranked_list"]
    with pytest.raises(ImportError, match="cannot import name 'CMBL'"):
        from cbml.losses import CMBL  # noqa: F401
