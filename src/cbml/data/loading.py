"""Batches made ahead of a GPU that would wait for them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cbml.data.images import Images

T = TypeVar("T")
R = TypeVar("R")
WORKERS = 4


def load_batches(
    make: Callable[[T], tuple[Any, ...]], items: Iterable[T], images: "Images", device: torch.device
) -> Iterator[list[Any]]:
    """Yield `make(item)` for each item, in order, its tensors on `device`.

    Args:
        make: makes a batch from `images`; it must depend on its item alone, because threads may call it ahead of time.
            They do for a CUDA device that the images are not on. On a CPU they would take what the model computes with.
    """
    cuda = device.type == "cuda"
    batches: Iterator[Sequence[Tensor]]
    if cuda and not images.on_gpu:
        batches = prefetch(lambda item: [_each(Tensor.pin_memory, value) for value in make(item)], items, WORKERS)
    else:
        batches = map(make, items)
    move = partial(Tensor.to, device=device, non_blocking=cuda)
    for batch in batches:
        yield [_each(move, value) for value in batch]


def _each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    return function(value) if isinstance(value, Tensor) else value


def prefetch(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`map(function, items)`, in order, with the next `workers` results under way in as many threads."""
    items = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        pending = deque(pool.submit(function, item) for item in islice(items, workers))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(items, 1))
            yield result
