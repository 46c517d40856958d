"""The training loop of one cell.

Everything random in an iteration comes from (seed, iteration), so a run that continues from a checkpoint needs no
generator states, and on a CPU ends with the very bits of an unbroken one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from cbml import distributed
from cbml.data.images import Images
from cbml.data.loading import load_batches
from cbml.data.scoring import Scoring
from cbml.errors import UserError
from cbml.evaluation.embedding import embed
from cbml.evaluation.metrics import evaluate
from cbml.losses.base import Batch, Loss, needs, total
from cbml.models.embedding_model import EmbeddingModel, Outputs
from cbml.models.teacher import Teacher
from cbml.progress import message, progress
from cbml.samplers.base import BatchSampler, SampledBatch
from cbml.spec.recipe import Recipe
from cbml.training.checkpoint import Checkpoint
from cbml.training.clock import Clock
from cbml.training.device import compile_trunk, make_optimizer, place, set_up
from cbml.training.features import learned
from cbml.training.history import History, Row
from cbml.training.micro_batch import backward_of_pieces, check_pieces, leaves, outputs_of_pieces

SETTLE_EVERY = 10  # iterations between waits for the device


@dataclass(frozen=True)
class Job:
    """One training: of what, on what, and how.

    Attributes:
        network, criterion: as built; the checkpoint's state replaces theirs.
        sampler: of `images`, whose labels are not looked at.
        scored, scoring: what every evaluation on the way is on, and how.
        select_by: the metric whose highest value is best.
        teacher_momentum: of a moving average of the network that the loss looks at.
    """

    recipe: Recipe
    seed: int
    network: EmbeddingModel
    criterion: Loss
    sampler: BatchSampler
    images: Images
    scored: Images
    scoring: Scoring = Scoring()
    select_by: str = "recall_at_1"
    teacher_momentum: float | None = None


class Learner:
    """What a training step changes: network, loss, their optimizer, and a teacher, if the loss looks at one.

    Args:
        fabric: the device, inside `device_context`.
    """

    def __init__(self, job: Job, fabric: Fabric):
        recipe, network, criterion = job.recipe, learned(job.network, job.recipe), job.criterion
        self.network, self.criterion = set_up(network, fabric, recipe), criterion.to(fabric.device)
        self.recipe, self.fabric, self.wanted = recipe, fabric, needs(criterion)
        groups = parameter_groups(network, criterion, recipe)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        if recipe.compile:
            compile_trunk(network, fabric.device)
        self.model, self.optimizer = fabric.setup(network, make_optimizer(recipe, groups, fabric.device))
        self.model.mark_forward_method("outputs")
        self.teacher = None if job.teacher_momentum is None else Teacher(network, job.teacher_momentum)

    def step(
        self, crops: Tensor, labels: Tensor, indices: Tensor, task: int, *, lr_scale: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One training step on a batch; see `Batch` of the losses. Returns the loss and its terms.

        Args:
            crops: of several processes, this one's rows; the labels and indices are those of the whole batch.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_scale

        self.model.train()
        outputs = self._outputs(self.model, crops)
        if self.recipe.micro_batch:
            outputs = leaves(outputs)
        seen = distributed.gather(outputs)._asdict()
        if self.teacher:
            seen["teacher"] = distributed.gather(self._outputs(self.teacher, crops))
        batch = Batch(labels=labels, indices=indices, task=task, head=self.network.head, **seen)
        terms = self.criterion.terms(batch)
        loss = total(terms)

        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        if pieces := self.recipe.micro_batch:
            backward_of_pieces(self.model, crops, self.wanted, pieces, outputs)
        distributed.average_gradients(self.parameters)
        if self.recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        if self.teacher:  # before the optimizer's step, as Kim et al. (STML) published it
            self.teacher.follow()
            self.criterion.follow(self.teacher.momentum)
        self.optimizer.step()
        return loss, terms

    def _outputs(self, model: Any, crops: Tensor) -> Outputs:
        if pieces := self.recipe.micro_batch:
            return outputs_of_pieces(model, crops, self.wanted, pieces)
        return model.outputs(crops, self.wanted)

    def embed(self, images: Images, what: str = "embeddings") -> Tensor:
        """Of the centre crops of all images, in eval mode, one of `Outputs`, or what a head of the loss's, by its name,
        makes of the features."""
        self.model.eval()

        def embed_crops(crops: Tensor) -> Tensor:
            if what in Outputs._fields:
                return getattr(self.model.outputs(crops, (what,)), what)
            return getattr(self.criterion, what)(self.model.outputs(crops, ("features",)).features)

        size, interpolation = self.recipe.crop, self.recipe.interpolation
        return embed(embed_crops, images, crop=size, interpolation=interpolation, device=self.fabric.device)

    @property
    def sizes(self) -> str:
        """How many parameters there are, in words."""
        count = [sum(p.numel() for p in module.parameters()) for module in (self.network, self.criterion)]
        return f"{count[0]:,} parameters in the network, {count[1]:,} in the loss"

    def state_dict(self) -> dict[str, Any]:
        """State dicts of all that a step changes."""
        state = {"network": self.network.state_dict(), "criterion": self.criterion.state_dict()}
        state["optimizer"] = self.optimizer.state_dict()
        return state | ({"teacher": self.teacher.network.state_dict()} if self.teacher else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.network.load_state_dict(state["network"])
        self.criterion.load_state_dict(state["criterion"])
        # Not its groups: they have what this device's optimizer runs with.
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]["state"]})
        if self.teacher:
            self.teacher.network.load_state_dict(state["teacher"])


@dataclass(frozen=True)
class Trained:
    """What training ends with.

    Attributes:
        network: its state dict.
        losses: a row per iteration: `iteration`, `loss`, its terms as `loss_<term>`, and `lr`.
        validations: a row per evaluation: `iteration` and its metrics; the first one is of the untrained network.
        best: the iteration of the highest `select_by`; 0 before the first evaluation of a trained network.
        seconds: see `Clock`.
    """

    network: dict[str, Tensor]
    losses: list[Row]
    validations: list[Row]
    best: int
    seconds: dict[str, float]


def train(
    job: Job,
    fabric: Fabric,
    *,
    label: str,
    checkpoint: Checkpoint,
    log: Callable[[list[Row]], None],
    keep: int | None = None,
) -> Trained:
    """Train a network, from its checkpoint if there is one.

    Args:
        fabric: the device, inside `device_context`.
        label: of the run, for messages.
        checkpoint: has, in the end, the weights `best-<iteration>` and, if asked for, `kept-<iteration>`.
        log: takes new rows of losses, of evaluations, and of `Clock.throughput`.
        keep: an iteration whose weights are kept, too.

    Raises:
        UserError: the loss or an embedding is not finite.
    """
    recipe, sampler, learner = job.recipe, job.sampler, Learner(job, fabric)
    distributed.own_rows(recipe.batch_size)  # raises where there are none
    if recipe.micro_batch:
        check_pieces(learner.network, label)
    images, scored = place([job.images, job.scored], fabric.device)
    job = replace(job, images=images, scored=scored)
    state = checkpoint.read() or {"iteration": 0, "losses": [], "validations": [], "seconds": {}}
    start, history = state["iteration"], History(label, log, state["losses"], state["validations"])
    clock = Clock(state["seconds"], images=start * recipe.batch_size)
    if start:
        message(f"{label}: continues after iteration {start}")
        learner.load_state_dict(state)
        sampler.load_state_dict(state["batches"])
    else:
        message(f"{label}: {learner.sizes}")
        clock.start("validation")
        history.validated(validate(job, learner, label, 0))
        clock.start(None)
        history.flush()

    batches = training_batches(job, learner, clock, start)
    iterations = range(start + 1, recipe.iterations + 1)
    shown = {"total": recipe.iterations, "initial": start, "scale": recipe.batch_size}
    for iteration in progress(iterations, label, "images", **shown):
        clock.start("data")
        batch = next(batches)
        clock.start("train")
        torch.manual_seed(iteration_seed(job.seed, iteration, 1))
        scale = lr_scale(recipe, iteration)
        loss, terms = learner.step(*batch, lr_scale=scale)
        history.step(iteration, recipe.lr * scale, loss, terms)

        last = iteration == recipe.iterations
        validates = last or (recipe.validate_every and iteration % recipe.validate_every == 0)
        saves = validates or iteration % recipe.checkpoint_every == 0
        if saves or iteration % SETTLE_EVERY == 0:
            history.settle()  # waits for the device: the seconds are those of the work
        if validates:
            clock.start("validation")
            history.validated(validate(job, learner, label, iteration))
        clock.start(None)
        if validates and history.best(job.select_by) == iteration:
            checkpoint.keep(f"best-{iteration}", job.network.state_dict())
        if iteration == keep:
            checkpoint.keep(f"kept-{iteration}", job.network.state_dict())
        if saves:
            history.flush({"iteration": iteration, **clock.throughput(iteration * recipe.batch_size)})
            state = {"iteration": iteration, "losses": history.losses, "validations": history.validations}
            state |= {"seconds": clock.seconds, "batches": sampler.state_dict(), **learner.state_dict()}
            checkpoint.write(state, weights=(f"best-{history.best(job.select_by)}", f"kept-{keep}"), now=last)
    weights, best = job.network.state_dict(), history.best(job.select_by)
    return Trained(weights, history.losses, history.validations, best, clock.seconds)


def training_batches(job: Job, learner: Learner, clock: Clock, start: int) -> Iterator[list[Any]]:
    """Of each iteration after `start`, on the device: crops (B, 3, crop, crop), labels (B,), indices (B,), and task.

    Of several processes each has its share of the crops.

    Segment by segment: what is made ahead must not be of one whose labels are not known yet.
    """
    recipe, sampler, images = job.recipe, job.sampler, job.images

    def make(item: tuple[int, SampledBatch]) -> tuple[Tensor, Tensor, Tensor, int]:
        iteration, sampled = item
        crops = random_crops(images, recipe, job.seed, iteration, sampled.indices)
        return crops, torch.from_numpy(sampled.labels), torch.from_numpy(sampled.indices), sampled.task

    period = sampler.period or recipe.iterations
    while start < recipe.iterations:
        number, done = divmod(start, period)
        if not done:
            clock.start("refresh")
            refresh = partial(sampler.refresh, number=number)
            distributed.refresh_together(refresh, partial(learner.embed, images))
            sampler.load_state_dict(distributed.from_first(sampler.state_dict()))
            clock.start("data")
        end = min((number + 1) * period, recipe.iterations)
        sampled = islice(sampler.segment(number), done, done + end - start)
        yield from load_batches(make, enumerate(sampled, start + 1), images, learner.fabric.device)
        start = end


def random_crops(images: Images, recipe: Recipe, seed: int, iteration: int, indices: np.ndarray) -> Tensor:
    """The crops (B, 3, crop, crop) of a batch, or this process's share; they depend on these arguments alone."""
    chosen = torch.from_numpy(indices)
    generator = torch.Generator().manual_seed(iteration_seed(seed, iteration, 0))
    return images.random_crops(
        chosen,
        generator,
        size=recipe.crop,
        scale=recipe.scale,
        ratio=recipe.ratio,
        flip=recipe.flip,
        jitter=recipe.color_jitter,
        interpolation=recipe.interpolation,
        own=distributed.own_rows(len(indices)),
    )


def iteration_seed(seed: int, iteration: int, number: int) -> int:
    """The seed of an iteration's crops (0), which may be made ahead of it, or of the rest of it (1)."""
    return int(np.random.SeedSequence([seed, iteration]).generate_state(2)[number])


def lr_scale(recipe: Recipe, iteration: int) -> float:
    """What the learning rate of an iteration, counted from 1, is multiplied by."""
    if iteration <= recipe.warmup:
        return iteration / recipe.warmup
    if recipe.schedule == "cosine":
        return (1 + math.cos(math.pi * (iteration - recipe.warmup - 1) / (recipe.iterations - recipe.warmup))) / 2
    return recipe.lr_gamma ** sum(iteration >= step for step in recipe.lr_steps)


def parameter_groups(network: EmbeddingModel, criterion: Loss, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups for the optimizer, each with the rate that `lr_scale` multiplies, `initial_lr`."""
    new = network.new_parameters
    theirs = {id(parameter) for parameter in new}
    groups = [
        {"params": [p for p in network.parameters() if id(p) not in theirs], "lr": recipe.lr},
        {"params": new, "lr": recipe.lr * recipe.head_lr_factor},
        *criterion.parameter_groups(recipe.lr),
    ]
    return [group | {"initial_lr": group["lr"]} for group in groups if group["params"]]


def validate(job: Job, learner: Learner, label: str, iteration: int) -> Row:
    """A row of `Trained.validations`."""
    embeddings = learner.embed(job.scored)
    try:
        metrics = evaluate(*job.scoring.split_query_gallery(embeddings, job.scored.labels), ks=job.scoring.ks)
    except UserError as error:
        raise UserError(f"{label}: iteration {iteration}: {error}") from None
    message(f"{label}: iteration {iteration}: Recall@1 {metrics['recall_at_1']:.1f} %")
    return {"iteration": iteration, **metrics}
