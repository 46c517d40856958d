"""A frozen trunk, as Markdown: `OMP_NUM_THREADS=1 python benchmarks/frozen.py`.

Iterations a second of processor time, of the loop and of a plain one in PyTorch on the same features; features a second
beside what `embed` takes for the same centre crops; memory of training on features of the size of SOP's.
"""

import argparse
import itertools
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from throughput import ROOT, option, random_images

from cbml.evaluation.embedding import embed
from cbml.losses import CBML
from cbml.network import build
from cbml.samplers.classes import ClassesConfig
from cbml.spec.cell import Cell
from cbml.spec.params import Params
from cbml.training import loop
from cbml.training.checkpoint import Checkpoint
from cbml.training.device import device_context, set_up
from cbml.training.features import Features, compute_features

WIDTH, SOP = 2048, (59_551, 60_502)


def make_cell(iterations: int) -> Cell:
    recipe = option("recipe", "frozen")["frozen"] | {"iterations": iterations, "checkpoint_every": 10**6}
    groups = {"dataset": option("dataset", "glyphs"), "backbone": option("backbone", "resnet50")}
    groups["backbone"]["resnet50"]["weights"] = None
    groups |= {"loss": option("loss", "cbml_log"), "recipe": recipe | {"weights": None}}
    params = Params.model_validate(groups | {"embedding_dim": [512], "seed": [0]})
    return params.cell("glyphs", "resnet50", "cbml_log", 512, 0)


def seconds_of(work: Callable[[], object]) -> float:
    """Of the processor: other load on the machine is not counted."""
    start = time.process_time()
    work()
    return time.process_time() - start


def made_up(train: int, test: int, views: int, folder: Path) -> Features:
    """Random features in memory-mapped files, 8 images of each class."""
    tables = []
    for number, rows in enumerate([train + test, *[train] * views]):
        file = folder / f"{number}.npy"
        table = np.lib.format.open_memmap(file, "w+", np.float16, (rows, WIDTH))
        for start in range(0, rows, 4096):
            part = table[start : start + 4096]
            part[:] = np.random.default_rng(start).standard_normal(part.shape, dtype=np.float32)
        table.flush()
        del table
        tables.append(torch.from_numpy(np.load(file, mmap_mode="c")))
    return Features(tables[0], tuple(tables[1:]), torch.arange(train + test), torch.arange(train + test) // 8)


def train(cell: Cell, images: Features, scored: Features) -> None:
    network, criterion = build(cell, num_classes=int(images.labels.max()) + 1, root=ROOT)
    sampler = ClassesConfig().build(images.labels.numpy(), cell.recipe, cell.seed)
    with tempfile.TemporaryDirectory() as folder, device_context(cell.recipe) as fabric:
        job = loop.Job(cell.recipe, cell.seed, network, criterion, sampler, images, scored)
        loop.train(job, fabric, label=cell.name, checkpoint=Checkpoint(Path(folder)), log=lambda rows: None)


def train_plainly(cell: Cell, images: Features) -> None:
    """The same steps on the same kind of tensors, with nothing around them."""
    recipe = cell.recipe
    head, criterion = torch.nn.Linear(WIDTH, cell.embedding_dim), CBML(form="log")
    optimizer = torch.optim.Adam(head.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    sampler = ClassesConfig().build(images.labels.numpy(), recipe, cell.seed)
    for sampled in itertools.islice(sampler.segment(0), recipe.iterations):
        features = images.centre[torch.as_tensor(sampled.indices)].float()
        loss = criterion(head(features), torch.from_numpy(sampled.labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def peak() -> float:
    """The most memory that this process had, in GB; files in the system's cache that it has mapped count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--images", type=int, default=24, help="that features are computed of")
    parser.add_argument("--sop", action="store_true", help="also SOP's size: 1.2 GB of files")
    arguments = parser.parse_args()
    cell, none = make_cell(arguments.iterations), make_cell(0)
    print("| of one thread | a second |\n| --- | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as name:
        images = made_up(2400, 120, cell.recipe.views, Path(name))
        train_list = images.subset(torch.arange(2400), images.labels[:2400])
        scored = images.subset(torch.arange(2400, 2520), images.labels[2400:])
        around = seconds_of(lambda: train(none, train_list, scored))
        ours = seconds_of(lambda: train(cell, train_list, scored)) - around
        plain = seconds_of(lambda: train_plainly(cell, train_list))
        print(f"| iterations, the loop | {arguments.iterations / ours:.0f} |")
        print(f"| iterations, a plain loop | {arguments.iterations / plain:.0f} |", flush=True)
    with tempfile.TemporaryDirectory() as name, device_context(cell.recipe) as fabric:
        pixels = random_images(arguments.images, cell.recipe.resize, Path(name, "images.bin"))
        network, _ = build(cell, num_classes=8, root=ROOT)
        network = set_up(network, fabric, cell.recipe).eval()
        crops = {"crop": cell.recipe.crop, "interpolation": cell.recipe.interpolation, "device": fabric.device}
        embed(network, pixels.subset(torch.arange(3), pixels.labels[:3]), **crops)  # warm
        embedded = seconds_of(lambda: embed(network, pixels, **crops))
        options = {
            "views": 0,
            "training": 0,
            "cache": Path(name),
            "identity": 0,
            "device": fabric.device,
            "label": "frozen",
        }
        computed = seconds_of(lambda: compute_features(network, pixels, cell.recipe, **options))
    print(f"| images, embed | {len(pixels) / embedded:.1f} |")
    print(f"| images, features of centre crops | {len(pixels) / computed:.1f} |", flush=True)
    if arguments.sop:
        with tempfile.TemporaryDirectory() as name:
            images = made_up(*SOP, 4, Path(name))
            size = sum(table.nbytes for table in (images.centre, *images.views)) / 2**30
            before, some = peak(), torch.arange(len(images) - 1000, len(images))
            train_list = images.subset(torch.arange(SOP[0]), images.labels[: SOP[0]])
            train(cell, train_list, images.subset(some, images.labels[some]))
            print(f"\nFeatures of SOP's size, {size:.2g} GB: {before:.2g} GB before training, {peak():.2g} GB at most.")


if __name__ == "__main__":
    main()
