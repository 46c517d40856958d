"""The training loop of one cell.

Everything random in an iteration comes from (seed, iteration), so a run that continues from a checkpoint needs no
generator states, and on a CPU ends with the very bits of an unbroken one.
"""

import math
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from cbml.data.crops import color_jitter, random_boxes
from cbml.data.images import Images
from cbml.data.loading import load_batches
from cbml.errors import UserError
from cbml.evaluation.embedding import embed
from cbml.evaluation.metrics import evaluate
from cbml.evaluation.scoring import Scoring
from cbml.losses.base import Loss, needs
from cbml.models.embedding_model import EmbeddingModel, Outputs
from cbml.models.teacher import follow, teacher_of
from cbml.progress import message, progress
from cbml.samplers.base import BatchSampler, EmbedTrainSet, SampledBatch
from cbml.spec.recipe import Recipe
from cbml.training.checkpoint import Checkpoint
from cbml.training.device import compile_trunk, make_optimizer, place, set_up

SETTLE_EVERY = 10  # iterations between waits for the device

Row = dict[str, float]


def train(
    recipe: Recipe,
    seed: int,
    network: EmbeddingModel,
    criterion: Loss,
    batches: BatchSampler,
    images: Images,
    scored: Images,
    scoring: Scoring = Scoring(),  # noqa: B008 (it is frozen)
    *,
    fabric: Fabric,
    label: str,
    checkpoint: Checkpoint,
    log: Callable[[list[Row]], None],
    select_by: str = "recall_at_1",
    keep: int | None = None,
    teacher_momentum: float | None = None,
) -> dict[str, Any]:
    """Train a network, from its checkpoint if there is one.

    Args:
        network, criterion: as built; the checkpoint's state replaces theirs.
        batches: of `images`.
        images: their labels are not looked at.
        scored, scoring: what every evaluation on the way is on, and how.
        fabric: the device, inside `device_context`.
        label: of the run, for messages.
        log: called with new rows of losses and evaluations, and with `train_images_per_second` and
            `train_data_percent`, how much of that time went into getting batches. With a GPU that is the host's time:
            an upper bound of what the device waits, which has queued iterations to work on, and without its own work
            on crops.
        select_by: the metric whose highest value is best.
        keep: an iteration whose weights are kept, too.
        teacher_momentum: of a moving average of the network that the loss looks at. It takes the weights before a step
            of the optimizer, as Kim et al. (STML) published it.

    Returns:
        The last state of the checkpoint: `iteration`; state dicts of `network`, `criterion`, `optimizer` and `batches`;
        `losses`, a row per iteration with `iteration`, `loss`, its terms as `loss_<term>` and `lr`; `validations`, a
        row per evaluation with `iteration` and its metrics, the first one of the untrained network; `best`, the
        `iteration` and `score` of the highest `select_by`, 0 and -1 before the first evaluation of a trained network;
        and the `seconds` spent on iterations (`train`), on their batches as a part of that (`data`), on looking at
        images before a segment of batches (`refresh`), and on evaluations.
        The checkpoint has the weights `best` and, if asked for, `kept`.

    Raises:
        UserError: the loss or an embedding is not finite.
    """
    criterion.to(fabric.device)
    groups = [
        {"params": [p for name, p in network.named_parameters() if not name.startswith("head.")], "lr": recipe.lr},
        {"params": list(network.head.parameters()), "lr": recipe.lr * recipe.head_lr_factor},
        *criterion.parameter_groups(recipe.lr),
    ]
    groups = [group for group in groups if group["params"]]
    parameters = [p for group in groups for p in group["params"]]
    base_lrs = [group["lr"] for group in groups]
    set_up(network, fabric, recipe)
    if recipe.compile:
        compile_trunk(network, fabric.device)
    model, optimizer = fabric.setup(network, make_optimizer(recipe, groups, fabric.device))
    model.mark_forward_method("outputs")
    wanted = needs(criterion)
    teacher = None if teacher_momentum is None else teacher_of(network)
    images, scored = place([images, scored], fabric.device)

    state = checkpoint.read()
    if state:
        message(f"{label}: continues after iteration {state['iteration']}")
        network.load_state_dict(state["network"])
        criterion.load_state_dict(state["criterion"])
        batches.load_state_dict(state["batches"])
        if teacher:
            teacher.load_state_dict(state["teacher"])
        # Not its groups: how the optimizer runs is this device's affair.
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]["state"]})
    else:
        sizes = [sum(p.numel() for p in module.parameters()) for module in (network, criterion)]
        message(f"{label}: {sizes[0]:,} parameters in the network, {sizes[1]:,} in the loss")
        state = {"iteration": 0, "losses": [], "validations": [], "best": {"iteration": 0, "score": -1.0}}
        state["seconds"] = {"train": 0.0, "data": 0.0, "refresh": 0.0, "validation": 0.0}
        began = time.monotonic()
        state["validations"].append(score(model, scored, scoring, recipe, 0, fabric.device, label))
        state["seconds"]["validation"] += time.monotonic() - began
        log(state["validations"])

    def embed_train_set(what: str) -> Tensor:
        model.eval()

        def see(crops: Tensor) -> Tensor:
            if what in Outputs._fields:
                return getattr(model.outputs(crops, (what,)), what)
            return getattr(criterion, what)(model.outputs(crops, ("features",)).features)

        return embed(see, images, crop=recipe.crop, interpolation=recipe.interpolation, device=fabric.device)

    def make(item: tuple[int, SampledBatch]) -> tuple[Tensor, Tensor, Tensor, int]:
        iteration, drawn = item
        crops = random_crops(images, recipe, seed, iteration, drawn.indices)
        return crops, torch.from_numpy(drawn.labels), torch.from_numpy(drawn.indices), drawn.task

    start, seconds = state["iteration"], state["seconds"]
    # Segment by segment: what is made ahead must not be of one whose labels are not known yet.
    loaded = chain.from_iterable(
        load_batches(make, segment, images, fabric.device)
        for segment in segments(batches, embed_train_set, start, recipe.iterations, seconds)
    )
    pending: list[dict[str, Any]] = []  # rows whose values are still on the device
    unlogged: list[Row] = []
    logged = start, seconds.copy()
    iterations = range(start + 1, recipe.iterations + 1)
    for iteration in progress(
        iterations, label, "images", total=recipe.iterations, initial=start, scale=recipe.batch_size
    ):
        began = time.monotonic()
        pixels, labels, indices, task = next(loaded)
        seconds["data"] += time.monotonic() - began
        torch.manual_seed(stream(seed, iteration, 1))
        scale = lr_scale(recipe, iteration)
        for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = base_lr * scale

        model.train()
        seen = model.outputs(pixels, wanted)._asdict()
        if teacher:
            with torch.no_grad():
                seen["teacher"] = teacher.outputs(pixels, wanted)
        terms = criterion.terms(labels=labels, indices=indices, task=task, head=network.head, **seen)
        loss = cast(Tensor, sum(terms.values()))
        optimizer.zero_grad()
        fabric.backward(loss)
        if recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
        if teacher and teacher_momentum is not None:
            follow(teacher, network, teacher_momentum)
            criterion.follow(teacher_momentum)
        optimizer.step()

        row: dict[str, Any] = {"iteration": iteration, "loss": loss.detach(), "lr": recipe.lr * scale}
        if len(terms) > 1:
            row |= {f"loss_{name}": value.detach() for name, value in terms.items()}
        pending.append(row)
        last = iteration == recipe.iterations
        validates = last or (recipe.validate_every and iteration % recipe.validate_every == 0)
        saves = validates or iteration % recipe.checkpoint_every == 0
        if saves or iteration % SETTLE_EVERY == 0:
            unlogged += settle(pending)  # waits for the device: the seconds are those of the work
            if not math.isfinite(unlogged[-1]["loss"]):
                log(unlogged[:-1])
                raise UserError(
                    f"{label}: the loss is not finite at iteration {unlogged[-1]['iteration']} ({unlogged[-1]}); "
                    "lower the recipe's lr or change the loss's parameters"
                )
        seconds["train"] += time.monotonic() - began
        if validates:
            began = time.monotonic()
            row = score(model, scored, scoring, recipe, iteration, fabric.device, label)
            seconds["validation"] += time.monotonic() - began
            state["validations"].append(row)
            unlogged.append(row)
            if row[select_by] > state["best"]["score"]:
                state["best"] = {"iteration": iteration, "score": row[select_by]}
                checkpoint.keep(f"best-{iteration}", network.state_dict())
        if iteration == keep:
            checkpoint.keep(f"kept-{iteration}", network.state_dict())
        if saves:
            since, before = logged
            passed = seconds["train"] - before["train"]
            speed = {"train_images_per_second": recipe.batch_size * (iteration - since) / passed}
            speed["train_data_percent"] = 100 * (seconds["data"] - before["data"]) / passed
            log([*unlogged, {"iteration": iteration, **speed}])
            logged = iteration, seconds.copy()
            state["losses"] += [row for row in unlogged if "loss" in row]
            unlogged = []
            state |= {"iteration": iteration, "network": network.state_dict(), "criterion": criterion.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "batches": batches.state_dict()}
            if teacher:
                state["teacher"] = teacher.state_dict()
            checkpoint.write(state, weights=(f"best-{state['best']['iteration']}", f"kept-{keep}"), now=last)
    return state | {"network": network.state_dict()}


def stream(seed: int, iteration: int, number: int) -> int:
    """The seed of an iteration's crops (0), which may be made ahead of it, or of the rest of it (1)."""
    return int(np.random.SeedSequence([seed, iteration]).generate_state(2)[number])


def lr_scale(recipe: Recipe, iteration: int) -> float:
    """What the learning rate of an iteration, counted from 1, is multiplied by."""
    if iteration <= recipe.warmup:
        return iteration / recipe.warmup
    if recipe.schedule == "cosine":
        return (1 + math.cos(math.pi * (iteration - recipe.warmup - 1) / (recipe.iterations - recipe.warmup))) / 2
    return recipe.lr_gamma ** sum(iteration >= step for step in recipe.lr_steps)


def segments(
    batches: BatchSampler, embed_train_set: EmbedTrainSet, start: int, stop: int, seconds: dict[str, float]
) -> Iterator[Iterator[tuple[int, SampledBatch]]]:
    """For each segment after `start` up to `stop` iterations, its batches with the numbers of their iterations.

    The images are looked at when a segment is asked for; the time for that is no part of the iterations'.
    """
    period = batches.period or stop
    while start < stop:
        number, done = divmod(start, period)
        if not done:
            began = time.monotonic()
            batches.refresh(embed_train_set, number)
            took = time.monotonic() - began
            for name, share in (("refresh", took), ("data", -took), ("train", -took)):
                seconds[name] += share
        end = min((number + 1) * period, stop)
        yield enumerate(islice(batches.segment(number), done, done + end - start), start + 1)
        start = end


def random_crops(images: Images, recipe: Recipe, seed: int, iteration: int, indices: np.ndarray) -> Tensor:
    """The crops (B, 3, crop, crop) of a batch; they depend on these arguments alone."""
    chosen = torch.from_numpy(indices)
    generator = torch.Generator().manual_seed(stream(seed, iteration, 0))
    boxes = random_boxes(images.sizes[chosen], recipe.scale, recipe.ratio, generator)
    flip = torch.rand(len(chosen), generator=generator) < 0.5 if recipe.flip else None
    crops = images.crops(chosen, boxes, recipe.crop, flip=flip, interpolation=recipe.interpolation)
    if recipe.color_jitter:
        crops = color_jitter(crops, recipe.color_jitter, generator)
    return crops


def score(
    model: EmbeddingModel,
    images: Images,
    scoring: Scoring,
    recipe: Recipe,
    iteration: int,
    device: torch.device,
    label: str,
) -> Row:
    """A row of `validations`."""
    model.eval()
    embeddings = embed(model, images, crop=recipe.crop, interpolation=recipe.interpolation, device=device)
    try:
        metrics = evaluate(*scoring.split_query_gallery(embeddings, images.labels), ks=scoring.ks)
    except UserError as error:
        raise UserError(f"{label}: iteration {iteration}: {error}") from None
    message(f"{label}: iteration {iteration}: Recall@1 {metrics['recall_at_1']:.1f} %")
    return {"iteration": iteration, **metrics}


def settle(pending: list[dict[str, Any]]) -> list[Row]:
    """Take all pending rows from the device, up to the first whose loss is not finite."""
    rows = []
    for row in pending:
        rows.append({name: int(value) if name == "iteration" else float(value) for name, value in row.items()})
        if not math.isfinite(rows[-1]["loss"]):
            break
    pending.clear()
    return rows
