"""One cell on several processes, which `torchrun` starts: each has a share of every batch, and all the same loss.

Every process draws the whole batch, crops and embeds its own rows, and gathers those of the others; then it computes
the loss of the whole batch. What one process would have computed comes out, within rounding. Without `torchrun` there
is one process, and nothing here does anything.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cbml.errors import UserError

PATIENCE = timedelta(days=7)  # the first process may wait so long for another training of its cell


@contextmanager
def joined() -> Iterator[None]:
    """In the block, this process is one of those that `torchrun` has started; else it is alone."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    # torchrun keeps its store when it starts processes again: there are the addresses of those that are no more.
    store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=number, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one."""
    return dist.get_rank() if world() > 1 else 0


def first() -> bool:
    """Whether this one writes."""
    return rank() == 0


def barrier() -> None:
    """Wait until all are here."""
    if world() > 1:
        dist.barrier()


def own_rows(batch_size: int) -> slice:
    """Which rows of a batch are this process's.

    Raises:
        UserError: there is no equal share for each.
    """
    share, rest = divmod(batch_size, world())
    if rest:
        raise UserError(f"recipe.batch_size {batch_size}: {world()} processes need a multiple of {world()}")
    return slice(rank() * share, (rank() + 1) * share)


class _Gather(torch.autograd.Function):
    """All processes compute the same loss, so a row's gradient is whole where the row is: nothing is sent back.

    `average_gradients` divides by the number of processes, which is multiplied with here: what the loss gives its own
    parameters, and the head's that it looks at, is whole on each.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        context.count = len(rows)
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        start = rank() * context.count
        return gradients[0][start : start + context.count] * world()


def gather(outputs: Any) -> Any:
    """A tuple of tensors (B / W, …), or None, with the rows of all processes (B, …), in the order of the batch."""
    if world() == 1:
        return outputs
    return outputs._make(each if each is None else _Gather.apply(each) for each in outputs)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over all processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if world() == 1 or not gradients:
        return
    together = torch.cat([each.reshape(-1) for each in gradients])
    dist.all_reduce(together)
    for gradient, part in zip(gradients, (together / world()).split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def from_first(value: Any = None) -> Any:
    """What the first process has, on all of them."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def from_all(parts: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors that were dealt out, `parts` to this process, in the order before, on `device`."""
    if world() == 1:
        return parts
    every: list[Any] = [None] * world()
    dist.all_gather_object(every, [each.cpu() for each in parts])
    count = sum(map(len, every))
    return [every[number % world()][number // world()].to(device) for number in range(count)]


def refresh_together(refresh: Callable[[Callable[[str], Tensor]], None], embed: Callable[[str], Tensor]) -> None:
    """`refresh(embed)` in the first process; the others take part in what it embeds, which it alone knows."""
    if first():

        def ask(what: str) -> Tensor:
            from_first(what)
            return embed(what)

        refresh(ask if world() > 1 else embed)
        from_first()
    else:
        while what := from_first():
            embed(what)
