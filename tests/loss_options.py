"""The losses of conf/loss, and batches to try them on."""

from pathlib import Path

import torch
from helpers import entry
from pydantic import TypeAdapter
from torch.nn.functional import normalize

from cbml.losses import build_loss, config_union, needs
from cbml.models import Outputs

CONF = Path(__file__).parents[1] / "conf" / "loss"


CLASSES, DIM = 6, 8


def parse_option(name):
    """The parameters in `conf/loss/NAME.yaml`."""
    return parse(entry("loss", name))


OPTIONS = sorted(path.stem for path in CONF.glob("*.yaml"))


def parse(config):
    return TypeAdapter(config_union()).validate_python(config)


def build(type, **parameters):  # noqa: A002
    return build_loss(parse({"type": type} | parameters), embedding_dim=DIM, num_classes=CLASSES)


def option(name):
    """The loss that `conf/loss/NAME.yaml` describes; what it looks at beside embeddings is made from them."""
    torch.manual_seed(0)
    config = parse_option(name)
    count = len(config.head.parts(48)) if config.head else 1
    parts = [len(part) for part in torch.arange(DIM).tensor_split(count)]
    loss = build_loss(config, embedding_dim=DIM, num_classes=CLASSES, feature_dim=DIM, parts=parts)
    if needs(loss):
        head = torch.nn.Linear(DIM, DIM)

        def add(module, arguments, more):
            embeddings = arguments[0]
            maps = embeddings[:, :, None, None].expand(-1, -1, 2, 2)
            seen = {"features": embeddings, "raw": embeddings, "indices": torch.arange(len(embeddings)), "map": maps}
            others = {"head": head.to(embeddings.dtype), "teacher": Outputs(embeddings, embeddings, embeddings)}
            return arguments, seen | others | more

        loss.register_forward_pre_hook(add, with_kwargs=True)
    return loss


def sample(labels=(2, 0, 1, 0, 2, 2, 1, 0, 5), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor(labels)
    centres = torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), DIM, generator=generator, dtype=torch.float64)
    return normalize(centres[labels] + noise, dim=1).to(dtype), labels


def value_and_gradient(loss, embeddings, labels):
    embeddings = embeddings.detach().requires_grad_()
    value = loss(embeddings, labels)
    (gradient,) = torch.autograd.grad(value, embeddings)
    return value.detach(), gradient
