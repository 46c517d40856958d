"""The gradient of a cell's third batch, its weights as at the start: in one process, or in those of `torchrun`.

As a script: gradients.py FOLDER MICRO_BATCH, for every kind of loss.
"""

import os
import sys
from pathlib import Path

import torch
import yaml
from helpers import TINY_RECIPE, entry, tiny_params

from cbml import distributed
from cbml.stages import train as stage
from cbml.training import loop
from cbml.training.clock import Clock
from cbml.training.device import device_context
from cbml.workspace import Workspace

# One loss of each kind that asks for something of its own, and what of its option fits tiny data.
KINDS = {
    "cbml_log": {},  # pairs
    "proxy_anchor": {},  # parameters of its own
    "crossentropy": {},  # a classifier
    "xbm_contrastive": {},  # a memory
    "stml": {
        "batches": {"type": "neighbours", "count": 3, "views": 2, "refresh": 1.0},
        "neighbours": 6,
    },  # a teacher, and heads of the loss's own
    "horde": {},  # the feature map
    "cbml_clusters": {"batches": {"type": "clusters", "k": 6, "refresh": 1.0}},  # clusters
    "bier": {"head": {"type": "groups", "shares": [1, 1, 2]}},  # parts
}
RECIPE = TINY_RECIPE | {"batch_size": 12, "freeze_bn": True, "lr": 0.0, "weight_decay": 0.0}


def params_of(kind, **recipe):
    loss = entry("loss", kind) | KINDS[kind] | {"recipe": {}}
    return tiny_params(loss={kind: loss}, recipe=RECIPE | recipe, embedding_dim=[24])


def gradients(workspace, kind, iterations=3, **recipe):
    """Of all parameters, one after another, after so many steps that change no weight; and the loss."""
    Path("params.yaml").write_text(yaml.safe_dump(params_of(kind, **recipe), sort_keys=False))
    (cell,) = workspace.cells("glyphs")
    data = stage.open_data(workspace, cell)
    parts = stage._build(cell, workspace, data.train)
    job = stage._prepare(cell, workspace, data, parts, data.train, data.test, data.scoring)
    with device_context(cell.recipe) as fabric:
        learner = loop.Learner(job, fabric)
        batches = loop.training_batches(job, learner, Clock(), 0)
        for iteration in range(iterations):
            torch.manual_seed(iteration)
            loss, _ = learner.step(*next(batches), lr_scale=0.0)
    return torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None]), loss.item()


def difference(ours, theirs):
    """‖difference‖ / ‖gradient‖, and the largest difference by the largest gradient."""
    apart = ours - theirs
    return (apart.norm() / theirs.norm()).item(), (apart.abs().max() / theirs.abs().max()).item()


def main():
    """In a folder of its own for each process: lists and images are those of FOLDER."""
    folder, micro_batch = Path(sys.argv[1]), int(sys.argv[2]) or None
    torch.set_num_threads(1)
    with distributed.joined():
        own = folder / f"rank-{distributed.rank()}"
        own.mkdir(exist_ok=True)
        os.chdir(own)
        for name in ("lists", "data"):
            Path(name).symlink_to(folder / name)
        here = Workspace.here()
        found = {kind: gradients(here, kind, micro_batch=micro_batch) for kind in KINDS}
        torch.save(found, folder / f"gradients-{distributed.rank()}.pt")


if __name__ == "__main__":
    main()
