"""A teacher: the exponential moving average of what is trained (Tarvainen and Valpola, NeurIPS 2017)."""

import copy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


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
