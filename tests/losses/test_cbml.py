"""CBML against the loop over anchors, on batches where nothing is to learn, and its configuration."""

import math

import pytest
import torch
from literal_losses import cbml
from loss_options import value, value_and_gradient
from pydantic import TypeAdapter, ValidationError

from cbml.losses import AnyLoss, Batch, Sizes, build_loss
from cbml.schema import first_error

FORMS = ["log", "sqrt", "const"]
BATCHES = {
    "4 classes of 3": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
    "with singletons": [0, 1, 1, 1, 2, 3, 3, 4],
    "unordered": [2, 0, 1, 0, 2, 2, 1, 0, 5],
    "one pair and one other": [0, 0, 1],
}


def parse(**parameters):
    return TypeAdapter(AnyLoss).validate_python({"type": "cbml"} | parameters)


def build(**parameters):
    return build_loss(parse(**parameters), Sizes(8, 10))


def sample(labels, dtype=torch.float64):
    """Unit vectors scattered round one centre per class, near enough to each other for mining to keep some pairs."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor(labels)
    centres = torch.randn(int(labels.max()) + 1, 8, generator=generator, dtype=torch.float64) + 1
    embeddings = centres[labels] + torch.randn(len(labels), 8, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(embeddings, dim=1).to(dtype), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adaptive_neg": False, "top_negatives": 3},
        {"adaptive_neg": False},
        {"variance_reduction": "mean"},
        {"variance_weight": 0.0},
        {"gamma": 0.7, "margin": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loop_over_anchors(form, options, labels, dtype):
    embeddings, labels = sample(labels, dtype)
    found, gradient = value_and_gradient(build(form=form, **options), embeddings, labels)
    expected, expected_gradient = value_and_gradient(lambda e, y: cbml(e, y, form=form, **options), embeddings, labels)
    assert found > 0
    # Exponents of up to 100·s lose two digits of the similarity's seven.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    largest = float(gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    embeddings, labels = sample(BATCHES["with singletons"])
    assert torch.autograd.gradcheck(lambda e: value(build(form=form), e, labels), embeddings.requires_grad_())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("adaptive_neg", [True, False])
@pytest.mark.parametrize("labels", [[0] * 6, [0, 1, 2, 3, 4, 5], [0]], ids=["one class", "all different", "one image"])
def test_without_positives_or_negatives_is_zero_and_connected(labels, adaptive_neg, form):
    embeddings, labels = sample(labels)
    found, gradient = value_and_gradient(build(form=form, adaptive_neg=adaptive_neg), embeddings, labels)
    assert found == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("form", FORMS)
def test_all_mined_away_is_zero_and_connected(form):
    embeddings = torch.eye(2, dtype=torch.float64)[[0, 0, 1, 1]]
    found, gradient = value_and_gradient(build(form=form), embeddings, torch.tensor([0, 0, 1, 1]))
    assert found == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("form", FORMS)
def test_identical_embeddings_are_finite(form):
    embeddings = torch.ones(6, 4) / 2
    found, gradient = value_and_gradient(build(form=form), embeddings, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert found > 0
    assert torch.isfinite(found)
    assert torch.isfinite(gradient).all()


def test_true_duplicates_count_as_positives():
    """An image and its exact copy are a pair of similarity 1: the anchor is left out by index, not by value."""
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.96, 0.28]], dtype=torch.float64)
    loss = build(form="const", margin=2.0, variance_weight=0.0)
    anchor = 1 + 0.25 * math.exp(-(1 - 0.5) / 0.5) + 1 + 0.25 * math.exp((0.96 - 1) / 0.01)
    assert loss(embeddings, torch.tensor([0, 0, 1])).item() == pytest.approx(2 * anchor / 3)


@pytest.mark.parametrize("form", FORMS)
def test_order_of_the_batch_does_not_matter(form):
    embeddings, labels = sample(BATCHES["unordered"])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    found, gradient = value_and_gradient(build(form=form), embeddings, labels)
    permuted, permuted_gradient = value_and_gradient(build(form=form), embeddings[order], labels[order])
    torch.testing.assert_close(found, permuted)
    torch.testing.assert_close(gradient[order], permuted_gradient)


def test_autocast_around_changes_nothing():
    embeddings, labels = sample(BATCHES["4 classes of 3"], torch.float32)
    found, gradient = value_and_gradient(build(), embeddings, labels)
    embeddings.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = value(build(), embeddings, labels)
    assert torch.equal(found, inside)
    assert torch.equal(gradient, *torch.autograd.grad(inside, embeddings))


def test_terms_add_up_to_the_loss():
    embeddings, labels = sample(BATCHES["4 classes of 3"])
    loss = build(weight=0.5)
    terms = loss.terms(Batch(embeddings, labels))
    assert set(terms) == {"positive", "negative", "variance"}
    torch.testing.assert_close(sum(terms.values()), loss(embeddings, labels))
    torch.testing.assert_close(2 * loss(embeddings, labels), build()(embeddings, labels))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"form": "cube"}, "form: Input should be 'log', 'sqrt' or 'const', got 'cube'"),
        (
            {"margn": 0.1},
            "unknown parameter margn; allowed: type, weight, lr_factor, form, ",
        ),
        ({"margin": "wide"}, "margin: Input should be a valid number"),
        ({"negative_scale": 0}, "negative_scale: Input should be greater than 0, got 0"),
        ({"gamma": 1.5}, "gamma: Input should be less than or equal to 1, got 1.5"),
        ({"top_negatives": 0}, "top_negatives: Input should be greater than 0, got 0"),
        ({"weight": -1}, "weight: Input should be greater than or equal to 0, got -1"),
        ({"type": "cmbl"}, "cmbl"),
    ],
)
def test_bad_parameters_are_named_in_one_line(parameters, message):
    with pytest.raises(ValidationError) as raised:
        parse(**parameters)
    line = first_error(raised.value, {"type": "cbml"} | parameters)
    assert message in line
    assert "\n" not in line
