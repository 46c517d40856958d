"""The gradient of a batch whose graph does not fit the memory: two passes over pieces of it.

The first pass keeps outputs alone, the loss gives these their gradients, and the second pass takes them on to the
parameters piece by piece (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021).
It is the gradient of the whole batch, within rounding, if the network treats each image by itself.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cbml.errors import UserError
from cbml.models.embedding_model import EmbeddingModel, Outputs


def check_pieces(network: EmbeddingModel, label: str) -> None:
    """Refuse a network in training whose outputs depend on what else is in the batch, or on chance.

    Raises:
        UserError: it has batch normalisation that is trained, or dropout.
    """
    for name, module in network.train().named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            hint = "recipe.freeze_bn=true" if name.startswith("trunk.") else "another head"
            raise UserError(f"{label}: recipe.micro_batch: {name} normalises whole batches; allowed with it: {hint}")
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            raise UserError(f"{label}: recipe.micro_batch: {name} is dropout; allowed with it: a network without")


@torch.no_grad()
def outputs_of_pieces(model: Any, crops: Tensor, wanted: Iterable[str], size: int) -> Outputs:
    """The first pass: outputs of the whole batch, without their graph."""
    pieces = [model.outputs(piece, wanted)._asdict() for piece in crops.split(size)]
    names = [name for name, value in pieces[0].items() if value is not None]
    return Outputs(**{name: torch.cat([piece[name] for piece in pieces]) for name in names})


def leaves(outputs: Outputs) -> Outputs:
    """The same, for the loss to leave gradients at."""
    found = {name: value.requires_grad_() for name, value in outputs._asdict().items() if value is not None}
    return Outputs(**found)


def backward_of_pieces(model: Any, crops: Tensor, wanted: Iterable[str], size: int, outputs: Outputs) -> None:
    """The second pass: from the gradients of those outputs to the parameters'."""
    gradients = {name: value.grad for name, value in outputs._asdict().items() if value is not None}
    names = [name for name, gradient in gradients.items() if gradient is not None]
    for start in range(0, len(crops), size):
        rows = slice(start, start + size)
        again = model.outputs(crops[rows], wanted)._asdict()
        torch.autograd.backward([again[name] for name in names], [gradients[name][rows] for name in names])
