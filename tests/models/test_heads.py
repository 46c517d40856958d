"""Heads: how an embedding is made of parts, and what works on them."""

import pytest
import torch
from helpers import ROOT, config_of
from loss_options import build, parse, sample, value
from pydantic import TypeAdapter, ValidationError
from torch.nn.functional import normalize

from cbml.errors import UserError
from cbml.losses import Sizes, build_loss
from cbml.models import create_model
from cbml.models.heads import Head
from cbml.schema import first_error

TAPS = {
    "bn_inception": ["inception_3c", "inception_4e"],
    "googlenet": ["inception4a", "inception4e"],
    "resnet": ["layer2", "layer3"],
}


def head(type="branches", **parameters):  # noqa: A002
    if type == "branches":
        parameters = {"taps": TAPS, "width": 4, "hidden": 6} | parameters
    return TypeAdapter(Head).validate_python({"type": type} | parameters)


def model_of(backbone, embedding_dim, config):
    torch.manual_seed(0)
    return create_model(config_of(backbone), embedding_dim=embedding_dim, root=ROOT, head=config)


def images(count=3):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255


@pytest.mark.parametrize(
    ("config", "parts", "shares"),
    [
        (head("groups", shares=[3, 5, 8]), [6, 10, 16], [1 / 3] * 3),
        (head("groups", shares=[3, 5, 8], weights="shares"), [6, 10, 16], [0.091837, 0.255102, 0.653061]),
        (head("groups", shares=[1, 1, 1, 1]), [8] * 4, [1 / 4] * 4),
    ],
    ids=str,
)
def test_a_part_has_its_share_of_the_similarity_at_test_time_and_an_equal_one_in_training(config, parts, shares):
    model = model_of("resnet18", 32, config)
    assert model.parts == parts and type(model.head) is torch.nn.Linear
    for training in (True, False):
        embeddings = model.train(training)(images())
        lengths = torch.stack([part.square().sum(1) for part in embeddings.split(parts, 1)], 1)
        expected = torch.tensor([[1 / len(parts)] * len(parts) if training else shares])
        torch.testing.assert_close(lengths, expected.expand_as(lengths), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("backbone", ["resnet18", "bn_inception", "googlenet"])
def test_branches_are_at_the_stages_that_they_name(backbone):
    model = model_of(backbone, 18, head(weights=[1.0, 1.0, 2.0])).eval()
    assert model.parts == [6, 6, 6]
    first = model(images())[:, :6].square().sum(1)
    torch.testing.assert_close(first, torch.full((3,), 1 / 6))
    # Of a loss on the first part nothing reaches what lies behind its stage.
    model.outputs(images()).embeddings[:, 0].sum().backward()
    grads = {name: p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters()}
    deepest = {"resnet18": "layer4", "bn_inception": "inception_5b", "googlenet": "inception5b"}[backbone]
    assert any(grads[name] for name in grads if name.startswith("trunk."))
    assert not any(grads[name] for name in grads if name.startswith((f"trunk.{deepest}", "head.end")))


def test_one_part_is_the_embedding_of_today():
    plain, linear = (model_of("resnet18", 8, config).eval() for config in (None, head("linear")))
    assert torch.equal(plain(images()), linear(images()))
    assert torch.equal(plain(images()), normalize(plain.outputs(images(), ["raw"]).raw, dim=1))


def test_a_norm_before_the_linear_layer_is_of_the_features():
    model = model_of("resnet18", 8, head("linear", norm="layer")).eval()
    outputs = model.outputs(images(), ("raw", "features"))
    features = outputs.features - outputs.features.mean(1, keepdim=True)
    features = features / (features.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(outputs.raw, model.head[1](features), rtol=1e-4, atol=1e-5)
    assert {name for name, _ in model.head.named_parameters()} == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_what_is_wanted_is_there_and_nothing_else():
    outputs = model_of("resnet18", 8, None).outputs(images(), ("features", "map"))
    assert outputs.raw is None and outputs.features.shape == (3, 512) and outputs.map.shape == (3, 512, 2, 2)
    torch.testing.assert_close(outputs.map.mean((2, 3)), outputs.features)


@pytest.mark.parametrize("inner", ["contrastive", "cbml", "proxynca", "ranked_list"])
def test_a_loss_on_every_part_is_the_sum_of_it_on_the_slices(inner):
    embeddings, labels = sample()
    torch.manual_seed(0)
    config = parse({"type": "per_part", "weight": 2.0, "loss": {"type": inner, "weight": 3.0}})
    loss = build_loss(config, Sizes(8, 6, parts=(3, 5))).double()
    expected = [
        one(normalize(part, dim=1), labels) for one, part in zip(loss.losses, embeddings.split([3, 5], 1), strict=True)
    ]
    torch.testing.assert_close(loss(embeddings, labels), 2 * sum(expected))
    if inner == "proxynca":
        assert [p.shape[1] for p in loss.parameters()] == [3, 5]
        assert [group["lr"] for group in loss.parameter_groups(1.0)] == [10.0, 10.0]


def test_a_task_trains_its_part_alone_and_all_tasks_the_whole():
    embeddings, labels = sample()
    config = parse({"type": "per_part", "select": "task", "loss": {"type": "contrastive"}})
    loss = build_loss(config, Sizes(8, 6, parts=(3, 5)))
    embeddings.requires_grad_()
    (gradient,) = torch.autograd.grad(value(loss, embeddings, labels, task=1), embeddings)
    assert gradient[:, :3].abs().max() == 0 and gradient[:, 3:].abs().max() > 0
    torch.testing.assert_close(loss(embeddings, labels), build("contrastive")(embeddings, labels))


@pytest.mark.parametrize(
    ("backbone", "embedding_dim", "config", "message"),
    [
        (
            "resnet18",
            30,
            head("groups", shares=[3, 5, 8]),
            "shares .* do not divide embedding_dim 30; .* multiples of 16",
        ),
        ("resnet18", 0, head("groups", shares=[1, 1]), "do not divide embedding_dim 0"),
        ("resnet18", 8, head(), "embedding_dim 8 has no 3 parts"),
        ("resnet18", 9, head(taps={"resnet": ["layer2", "layer3"]}, weights=[1, 2]), "2 weights for 3 parts"),
        ("resnet18", 9, head(taps={"resnet": ["layer2", "layer9"]}), "no stage 'layer9'; allowed: conv1, .* layer4"),
        ("resnet18", 9, head(taps={"vgg": ["a"]}), "no taps for backbones of type resnet18; there are for vgg"),
        ("resnet18", 9, head(taps={"resnet": ["layer2"], "vgg": ["a", "b"]}), "different numbers of stages"),
    ],
    ids=str,
)
def test_a_head_that_does_not_fit_is_one_line(backbone, embedding_dim, config, message):
    with pytest.raises(UserError, match=message):
        model_of(backbone, embedding_dim, config)


def test_a_timm_trunk_has_no_stages():
    pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(UserError, match="taps layer2: this trunk has no stages"):
        create_model(config_of("timm"), embedding_dim=8, root=ROOT, head=head(taps={"timm": ["layer2"]}))


@pytest.mark.parametrize(
    "config",
    [
        {"type": "sum", "terms": {"a": {"type": "cbml", "head": {"type": "linear"}}}},
        {"type": "per_part", "loss": {"type": "cbml", "recipe": {"paper": {"lr": 1}}}},
        {"type": "xbm", "loss": {"type": "contrastive", "batches": {"type": "classes"}}},
    ],
)
def test_what_a_method_changes_is_said_by_the_outermost_loss(config):
    with pytest.raises(ValidationError) as raised:
        parse(config)
    assert "for the outermost loss only, not for" in first_error(raised.value, config)
