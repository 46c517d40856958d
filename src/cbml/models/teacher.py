"""A teacher: the exponential moving average of what is trained (Tarvainen and Valpola, NeurIPS 2017)."""

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from cbml.models.embedding_model import EmbeddingModel, Outputs

M = TypeVar("M", bound=nn.Module)


class Teacher:
    """The moving average of a network that is trained.

    Args:
        student: that network, on its device.
        momentum: m of `follow`.
    """

    def __init__(self, student: EmbeddingModel, momentum: float):
        self.student, self.network, self.momentum = student, teacher_of(student), momentum

    @torch.no_grad()
    def outputs(self, images: Tensor, wanted: Iterable[str]) -> Outputs:
        """As `EmbeddingModel.outputs`, without gradients."""
        return self.network.outputs(images, wanted)

    def follow(self) -> None:
        """Take a step towards the student."""
        follow(self.network, self.student, self.momentum)


def teacher_of(student: M) -> M:
    """A copy without gradients, in eval mode."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """t ← m t + (1 − m) s for every floating entry of the state dicts; others are copied."""
    theirs = student.state_dict()
    for name, value in teacher.state_dict().items():
        if value.is_floating_point():
            value.lerp_(theirs[name].to(value.dtype), 1 - momentum)
        else:
            value.copy_(theirs[name])
