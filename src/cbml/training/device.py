"""The device, and everything about it that changes numbers or speed."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment

from cbml import distributed
from cbml.data.images import EncodedImages, Images
from cbml.errors import UserError
from cbml.models.embedding_model import EmbeddingModel
from cbml.progress import message
from cbml.spec.recipe import Recipe

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16}


@contextmanager
def device_context(recipe: Recipe) -> Iterator[Fabric]:
    """Yield the device, with PyTorch's switches set for the block."""
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # one process, wherever it runs
    # Not Fabric's own strategy for several processes: see `distributed`, which knows them.
    own = [int(os.environ["LOCAL_RANK"])] if distributed.world() > 1 and torch.cuda.is_available() else 1
    fabric = Fabric(accelerator="auto", devices=own, plugins=[LightningEnvironment()])
    # On a CPU determinism costs next to nothing.
    deterministic = recipe.deterministic or fabric.device.type == "cpu"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first call
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    matmul.allow_tf32 = False  # similarities and exponents need all digits of a float32, whatever the precision
    cudnn.allow_tf32 = False
    cudnn.benchmark = not deterministic  # every crop has one size
    torch.use_deterministic_algorithms(deterministic)
    fresh: Any = torch.utils.deterministic
    filled = fresh.fill_uninitialized_memory
    fresh.fill_uninitialized_memory = False  # a sixth of a CPU's time, and it changes no bit
    try:
        yield fabric
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, was_deterministic = before
        torch.use_deterministic_algorithms(was_deterministic)
        fresh.fill_uninitialized_memory = filled


def set_up(network: EmbeddingModel, fabric: Fabric, recipe: Recipe) -> EmbeddingModel:
    """The network on its device, computing in the recipe's precision and memory format."""
    network.autocast = AUTOCAST[recipe.precision]
    if recipe.channels_last:
        network.to(memory_format=torch.channels_last)
    if distributed.world() > 1 and any(
        isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training
        for module in network.train().modules()
    ):
        if fabric.device.type != "cuda":
            raise UserError(
                "batch normalisation is trained, which several processes share on GPUs alone; allowed on a CPU: "
                "recipe.freeze_bn=true and a head without it, or one process"
            )
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network.to(fabric.device)


def facts(fabric: Fabric, recipe: Recipe) -> dict[str, str | bool | int]:
    """What `device_context` set and found, for the record; call it in the block."""
    found = {
        "type": fabric.device.type,
        "precision": recipe.precision,
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "processes": distributed.world(),
    }
    if fabric.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(fabric.device)
        # Another process on the same GPU takes from this one's speed.
        found["memory_of_others_gib"] = round((total - free - torch.cuda.memory_reserved()) / 2**30, 1)
    return found


def make_optimizer(recipe: Recipe, groups: list[dict], device: torch.device) -> torch.optim.Optimizer:
    """The recipe's optimizer of parameter groups that each have their `lr`, in one kernel where the device has it."""
    options: dict[str, Any] = {"weight_decay": recipe.weight_decay, "fused": device.type in ("cpu", "cuda")}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer](groups, **options)


def compile_trunk(network: EmbeddingModel, device: torch.device) -> None:
    """Run the trunk through `torch.compile`; where that does not work, say so and leave it."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler shows in many types
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        message(f"compile: not possible here, running without ({reason})")
    else:
        network.trunk.compile()


def place(lists: Sequence[Images], device: torch.device) -> list[Images]:
    """The images of some lists where they are quickest to get at, which depends on their size; says where that is.

    On a GPU with room to spare that is its memory, where no batch is ever waited for. Else decoded images stay in
    their file: what fits into half of the host's memory is read once now, and stays in the system's cache of files,
    which all processes share and which gives way to what needs the memory.
    """
    bytes_needed = sum(images.nbytes for images in lists)
    size = f"images: {sum(map(len, lists)):,}, {bytes_needed / 2**30:.2g} GB decoded"
    packed = [images for images in lists if not isinstance(images, EncodedImages)]
    if len(packed) < len(lists):
        message(f"{size}: too many to be kept, they are decoded from their files as they are needed")
        return list(lists)
    if device.type == "cuda" and bytes_needed < torch.cuda.mem_get_info(device)[0] / 4:
        try:
            placed: list[Images] = [images.to(device) for images in packed]
            message(f"{size}, in the GPU's memory")
            return placed
        except torch.OutOfMemoryError:  # another process was faster
            message("images: no room on the GPU, they stay with the host")
    if bytes_needed < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2:
        for images in packed:
            images.touch()
        message(f"{size}, in the host's memory")
    else:
        message(f"{size}, on the disk, read as they are needed")
    return list(lists)
