"""The training loop of one cell.

Everything random in an iteration comes from (seed, iteration), so a run that continues from a checkpoint needs no
generator states, and on a CPU ends with the very bits of an unbroken one.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from cbml.backbones import EmbeddingModel
from cbml.config import Cell
from cbml.datasets.images import PackedImages
from cbml.datasets.loading import load
from cbml.datasets.transforms import random_boxes
from cbml.errors import UserError
from cbml.evaluation import evaluate
from cbml.evaluation.embedding import embed
from cbml.files import atomic_write
from cbml.losses import Loss
from cbml.progress import message, progress

SETTLE_EVERY = 10  # iterations between waits for the device

Row = dict[str, float]


@dataclass
class Trained:
    """What training a cell leaves.

    Attributes:
        final: state dict after the last iteration.
        best: state dict where the metric `select_by` was highest; the untrained network does not count.
        kept: state dict after the iteration that the caller asked to keep.
        best_iteration, best_score: of `best`.
        losses: a row an iteration: `iteration`, `loss`, its terms as `loss_<term>`, `lr`.
        validations: a row an evaluation: `iteration` and its metrics; the first one is of the untrained network.
        train_seconds, data_seconds, validation_seconds: spent in iterations, in getting their batches (part of the
            former; see `train`), and in evaluations, by all processes that took part.
    """

    final: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    best_iteration: int = 0
    best_score: float = -1.0
    losses: list[Row] = field(default_factory=list)
    validations: list[Row] = field(default_factory=list)
    train_seconds: float = 0.0
    data_seconds: float = 0.0
    validation_seconds: float = 0.0


def train(
    cell: Cell,
    network: EmbeddingModel,
    criterion: Loss,
    batches: Iterator[np.ndarray],
    train_images: PackedImages,
    validation_images: PackedImages,
    *,
    name: str,
    checkpoint: Path,
    log: Callable[[list[Row]], None],
    select_by: str = "recall_at_1",
    keep: int | None = None,
) -> Trained:
    """Train a cell, from its checkpoint if there is one.

    Args:
        network, criterion: as built; the checkpoint's state replaces theirs.
        batches: indices into `train_images`, from the first iteration on.
        train_images: with labels from 0 to the number of classes - 1.
        validation_images: what every evaluation on the way is on.
        name: of the run, for messages.
        checkpoint: file that the run can continue from; the caller names it after the configuration.
        log: called with new rows of losses and validations, before the checkpoint that covers them, and with
            `images_per_second` and `data_share`, the share of that time that went into getting batches. With a GPU that
            is the host's time: an upper bound of what the device waits, which has queued iterations to work on, and
            without its own work on crops.
        select_by: the metric whose highest value is `Trained.best`.
        keep: the iteration of `Trained.kept`.

    Raises:
        UserError: the loss or an embedding is not finite.
    """
    recipe = cell.recipe
    fabric = Fabric(accelerator="auto", devices=1, precision=recipe.precision)
    torch.backends.cuda.matmul.allow_tf32 = False  # an environment may have set it; the loss needs float32
    if fabric.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    if recipe.channels_last:
        network.to(memory_format=torch.channels_last)
    if recipe.compile and _compiler_works(fabric.device):
        network.trunk.compile()
    criterion.to(fabric.device)
    groups = [{"params": list(network.parameters()), "lr": recipe.lr}, *criterion.parameter_groups(recipe.lr)]
    base_lrs = [group["lr"] for group in groups]
    optimizer = torch.optim.Adam(groups, weight_decay=recipe.weight_decay, fused=fabric.device.type == "cuda" or None)
    model, optimizer = fabric.setup(network, optimizer)
    pair = (train_images, validation_images)
    train_images, validation_images = (_move_if_it_fits(images, fabric.device) for images in pair)

    def seed(iteration: int, stream: int) -> int:
        """Of the crops of an iteration (stream 0), which may be made ahead of it, and of the rest (stream 1)."""
        return int(np.random.SeedSequence([cell.seed, iteration]).generate_state(2)[stream])

    def random_crops(numbered: tuple[int, np.ndarray]) -> tuple[Tensor, Tensor]:
        iteration, indices = numbered[0], torch.from_numpy(numbered[1])
        generator = torch.Generator().manual_seed(seed(iteration, 0))
        boxes = random_boxes(train_images.sizes[indices], recipe.scale, recipe.ratio, generator)
        flip = torch.rand(len(indices), generator=generator) < 0.5 if recipe.flip else None
        crops = train_images.crops(indices, boxes, recipe.crop, flip=flip, interpolation=cell.interpolation)
        return crops, train_images.labels[indices]

    def validate(iteration: int) -> Row:
        began = time.monotonic()
        model.eval()
        where = {"crop": recipe.crop, "interpolation": cell.interpolation, "device": fabric.device}
        embeddings = embed(model, validation_images, **where)
        try:
            metrics = evaluate(embeddings, validation_images.labels)
        except UserError as error:
            raise UserError(f"{name}: iteration {iteration}: {error}") from None
        message(f"{name}: iteration {iteration}: Recall@1 {metrics['recall_at_1']:.1%}")
        done.validation_seconds += time.monotonic() - began
        return {"iteration": iteration, **metrics}

    resumed = torch.load(checkpoint, weights_only=True, map_location="cpu") if checkpoint.is_file() else None
    if resumed is None:
        counts = [sum(p.numel() for p in module.parameters()) for module in (network, criterion)]
        message(f"{name}: {counts[0]:,} parameters in the network, {counts[1]:,} in the loss")
        done = Trained(best=copy.deepcopy(network.state_dict()))
        done.validations.append(validate(0))
        log(done.validations)
        start = 0
    else:
        network.load_state_dict(resumed["network"])
        criterion.load_state_dict(resumed["criterion"])
        optimizer.load_state_dict(resumed["optimizer"])
        done, start = Trained(**resumed["done"]), resumed["iteration"]
        message(f"{name}: continues after iteration {start}")

    pending: list[dict[str, Any]] = []  # rows whose values are still on the device

    def settle() -> list[Row]:
        """Move pending rows to `done.losses` and return them; stop at the first that is not finite."""
        rows = [{name: float(value) for name, value in row.items()} for row in pending]
        for position, row in enumerate(rows):
            row["iteration"] = int(row["iteration"])
            if not math.isfinite(row["loss"]):
                log([*unlogged, *rows[:position]])
                terms = ", ".join(f"{name} {value}" for name, value in row.items() if name.startswith("loss"))
                raise UserError(
                    f"{name}: the loss is not finite at iteration {row['iteration']} ({terms}); "
                    f"lower recipe.{cell.recipe_name}.lr or change the loss's parameters"
                )
        pending.clear()
        done.losses.extend(rows)
        return rows

    unlogged: list[Row] = []
    seconds = waited = 0.0
    numbered = enumerate(islice(batches, start, recipe.iterations), start + 1)
    loaded = load(random_crops, numbered, train_images, fabric.device)
    iterations = range(start + 1, recipe.iterations + 1)
    for iteration in progress(
        iterations, name, "images", total=recipe.iterations, initial=start, scale=recipe.batch_size
    ):
        began = time.monotonic()
        images, labels = next(loaded)
        waited += time.monotonic() - began
        torch.manual_seed(seed(iteration, 1))
        lr_scale = recipe.lr_gamma ** sum(iteration > step for step in recipe.lr_steps)
        for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = base_lr * lr_scale

        model.train()
        terms = criterion.terms(model(images), labels)
        loss = sum(terms.values())
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()

        row = {"iteration": iteration, "loss": loss.detach(), "lr": recipe.lr * lr_scale}
        if len(terms) > 1:
            row |= {f"loss_{name}": value.detach() for name, value in terms.items()}
        pending.append(row)
        last = iteration == recipe.iterations
        validates = last or (recipe.validate_every and iteration % recipe.validate_every == 0)
        saves = validates or iteration % recipe.checkpoint_every == 0
        if saves or iteration % SETTLE_EVERY == 0:
            unlogged += settle()  # waits for the device, so that the seconds are those of the work
        seconds += time.monotonic() - began
        if validates:
            row = validate(iteration)
            done.validations.append(row)
            unlogged.append(row)
            if row[select_by] > done.best_score:
                done.best = copy.deepcopy(network.state_dict())
                done.best_iteration, done.best_score = iteration, row[select_by]
        if iteration == keep:
            done.kept = copy.deepcopy(network.state_dict())
        if saves:
            trained_on = recipe.batch_size * sum("loss" in row for row in unlogged)
            speed = {"images_per_second": trained_on / seconds, "data_share": waited / seconds}
            log([*unlogged, {"iteration": iteration, **speed}])
            done.train_seconds += seconds
            done.data_seconds += waited
            unlogged, seconds, waited = [], 0.0, 0.0
            state = {
                "iteration": iteration,
                "network": network.state_dict(),
                "criterion": criterion.state_dict(),
                "optimizer": optimizer.state_dict(),
                "done": vars(done),
            }
            with atomic_write(checkpoint) as temporary:
                torch.save(state, temporary)
    done.final = network.state_dict()
    return done


def _compiler_works(device: torch.device) -> bool:
    """Whether `torch.compile` finds what it needs; says so if not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler shows in many types
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        message(f"compile: not possible here, running without ({reason})")
        return False
    return True


def _move_if_it_fits(images: PackedImages, device: torch.device) -> PackedImages:
    """On a GPU with room to spare, keep the decoded images there: then no batch is ever waited for."""
    if device.type == "cuda" and images.data.numel() < torch.cuda.mem_get_info(device)[0] / 4:
        return images.to(device)
    return images
