"""The losses of conf/loss, and batches to try them on."""

from pathlib import Path

import torch
from helpers import entry
from pydantic import TypeAdapter
from torch.nn.functional import normalize

from cbml.losses import AnyLoss, Batch, Loss, Sizes, build_loss, total
from cbml.models import Outputs
from cbml.spec.method import AnyMethod

CONF = Path(__file__).parents[1] / "conf" / "loss"


CLASSES, DIM = 6, 8


def parse_option(name):
    """The method in `conf/loss/NAME.yaml`."""
    return TypeAdapter(AnyMethod).validate_python(entry("loss", name))


OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))


def parse(config):
    return TypeAdapter(AnyLoss).validate_python(config)


def build(type, **parameters):  # noqa: A002
    return build_loss(parse({"type": type} | parameters), Sizes(DIM, CLASSES))


def value(loss, embeddings, labels, **more):
    """The loss of embeddings as they are, as the training loop has it; `loss(embeddings, labels)` normalises them."""
    return total(loss.terms(Batch(embeddings, labels, **more)))


def seen(embeddings):
    """What a network gives beside embeddings, made from them: for a loss that needs it."""
    maps = embeddings[:, :, None, None].expand(-1, -1, 2, 2)
    outputs = {"features": embeddings, "raw": embeddings, "map": maps}
    outputs["indices"] = torch.arange(len(embeddings), device=embeddings.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = torch.nn.Linear(DIM, DIM).to(embeddings)
    return outputs | {"head": head, "teacher": Outputs(embeddings, embeddings, embeddings)}


def losses_in(loss):
    """A loss, and those that it is made of."""
    return [module for module in loss.modules() if isinstance(module, Loss)]


def small(config):
    """A method with two learners in place of three, and two streams: nine parts are more than `DIM` can have."""
    if isinstance(config, dict):
        fewer = {name: 2 for name in ("streams", "learners") if config.get(name) == 3}
        return {name: small(value) for name, value in config.items()} | fewer
    return config


def parse_small(name):
    return TypeAdapter(AnyMethod).validate_python(small(entry("loss", name)))


def parts_of(name):
    """Sizes of as many parts of an embedding as the head of `conf/loss/NAME.yaml` has."""
    head = parse_small(name).head
    return tuple(len(part) for part in torch.arange(DIM).tensor_split(len(head.parts(48)) if head else 1))


def option(name):
    """The loss that `conf/loss/NAME.yaml` describes."""
    torch.manual_seed(0)
    return build_loss(parse_small(name), Sizes(DIM, CLASSES, feature_dim=DIM, parts=parts_of(name)))


def sample(labels=(2, 0, 1, 0, 2, 2, 1, 0, 5), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor(labels)
    centres = torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), DIM, generator=generator, dtype=torch.float64)
    return normalize(centres[labels] + noise, dim=1).to(dtype), labels


def value_and_gradient(loss, embeddings, labels):
    """Of a `Loss`, on embeddings as they are, or of any function of embeddings and labels."""
    embeddings = embeddings.detach().requires_grad_()
    found = value(loss, embeddings, labels, **seen(embeddings)) if isinstance(loss, Loss) else loss(embeddings, labels)
    (gradient,) = torch.autograd.grad(found, embeddings)
    return found.detach(), gradient
