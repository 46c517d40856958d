"""Images a second, as Markdown tables: `python benchmarks/throughput.py`.

The first table sets crops from decoded images against Pillow and torchvision, without and with decoding; the second is
`cbml.training.loop.train` on random images: crops, forward, backward, Adam, and how much of the time batches took; the
third sets it beside a plain loop in PyTorch: the same crops, network, loss, optimizer and precision.
"""

import argparse
import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cbml.data.crops import center_boxes, random_boxes
from cbml.data.images import PackedImages
from cbml.network import build
from cbml.samplers.classes import ClassesConfig
from cbml.spec.cell import Cell
from cbml.spec.options import option_file
from cbml.spec.params import Params
from cbml.training import loop
from cbml.training.checkpoint import Checkpoint
from cbml.training.device import device_context, set_up

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()


def option(group: str, name: str) -> dict:
    return {name: option_file(ROOT / "conf", group, name)}


def make_cell(arguments: argparse.Namespace, precision: str, compiled: bool) -> Cell:
    """The published recipe, shortened: one row of speed after `iterations` to warm up, one after as many more."""
    recipe = option("recipe", "paper")["paper"] | {
        "iterations": 2 * arguments.iterations,
        "checkpoint_every": arguments.iterations,
        "validate_every": 0,
        "batch_size": arguments.batch,
        "crop": arguments.crop,
        "resize": side(arguments.crop),
        "precision": precision,
        "weights": None,
        "compile": compiled,
    }
    backbone, loss = option("backbone", arguments.backbone), option("loss", "cbml_log")
    groups = {"dataset": option("dataset", "glyphs"), "backbone": backbone, "loss": loss, "recipe": recipe}
    params = Params.model_validate(groups | {"embedding_dim": [512], "seed": [0]})
    return params.cell("glyphs", arguments.backbone, "cbml_log", 512, 0)


def side(crop: int) -> int:
    """The short side that images are decoded to, in the published proportion."""
    return round(crop * 256 / 227)


def random_images(count: int, short_side: int, file: Path) -> PackedImages:
    """Images of 3:4 in a memory-mapped file, 8 of each class."""
    height, width = short_side, round(short_side * 4 / 3)
    np.random.default_rng(0).integers(0, 256, count * height * width * 3, dtype=np.uint8).tofile(file)
    data = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="c"))
    return PackedImages(data, torch.tensor([[height, width]] * count), torch.arange(count) // 8)


def training_speed(cell: Cell, images: PackedImages, *, resident: bool) -> tuple[float, float]:
    """Images a second and the share of time that went into batches, after a warm-up of as many iterations."""
    recipe, rows = cell.recipe, []
    torch.compiler.reset()  # the compiler keeps only so many versions of the same code
    network, criterion = build(cell, num_classes=int(images.labels.max()) + 1, root=ROOT)
    sampler = ClassesConfig().build(images.labels.numpy(), recipe, cell.seed)
    first = images.subset(torch.arange(recipe.batch_size), images.labels[: recipe.batch_size])
    with (
        tempfile.TemporaryDirectory() as folder,
        device_context(recipe) as fabric,
        patch.object(loop, "place", lambda lists, device: [each.to(device) if resident else each for each in lists]),
    ):
        job = loop.Job(recipe, cell.seed, network, criterion, sampler, images, first)
        loop.train(job, fabric, label=cell.name, checkpoint=Checkpoint(Path(folder)), log=rows.extend)
    speed = [row for row in rows if "train_data_percent" in row][-1]
    return speed["train_images_per_second"], speed["train_data_percent"] / 100


def plain_speed(cell: Cell, images: PackedImages) -> float:
    """Images a second of the same steps on the same crops in a plain loop, with PyTorch's own settings."""
    recipe, half = cell.recipe, cell.recipe.iterations // 2
    network, criterion = build(cell, num_classes=int(images.labels.max()) + 1, root=ROOT)
    with device_context(recipe) as fabric:
        set_up(network, fabric, recipe)
    parameters = [*network.parameters(), *criterion.to(fabric.device).parameters()]
    optimizer = torch.optim.Adam(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    sampler = ClassesConfig().build(images.labels.numpy(), recipe, cell.seed)
    start = 0.0
    for iteration, sampled in enumerate(itertools.islice(sampler.segment(0), recipe.iterations), 1):
        if iteration == half + 1:
            start = now()
        crops = loop.random_crops(images, recipe, cell.seed, iteration, sampled.indices).to(fabric.device)
        loss = criterion(network(crops), torch.from_numpy(sampled.labels).to(fabric.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return half * recipe.batch_size / (now() - start)


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


class Pictures(Dataset):
    """JPEG files in memory, or the pictures in them, through torchvision's transforms."""

    def __init__(self, pictures: list[bytes | Image.Image], *steps: Callable):
        self.pictures = pictures
        self.transform = transforms.Compose([*steps, transforms.PILToTensor()])

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> torch.Tensor:
        picture = self.pictures[index]
        return self.transform(Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture)


def photographs(count: int) -> list[bytes]:
    """JPEG files of 500 × 375 pixels with the detail of a photograph, about 60 kB each."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
        pixels = np.asarray(coarse) + rng.normal(0, 6, (375, 500, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def best_seconds(works: dict[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """The shortest time of each, in turn, so that other load on the machine meets them all alike."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(repeats):
        for name, work in works.items():
            start = now()
            work()
            best[name] = min(best[name], now() - start)
    return best


def crop_speeds(crop: int, count: int) -> dict[str, list[float]]:
    """Images a second of every way to make random and centre crops."""
    files = photographs(count)
    decoded = [transforms.Resize(side(crop))(Image.open(io.BytesIO(file))) for file in files]
    images = PackedImages.of([np.asarray(picture) for picture in decoded])
    indices, generator = torch.arange(count), torch.Generator().manual_seed(0)
    scale, ratio = (0.16, 1.0), (3 / 4, 4 / 3)
    random = [transforms.RandomResizedCrop(crop, scale, ratio), transforms.RandomHorizontalFlip()]
    ways = {"decoded images, cbml": images} | ({"decoded images, cbml, on the GPU": images.to("cuda")} if CUDA else {})
    speeds: dict[str, list[float]] = {}
    for steps in (random, [transforms.CenterCrop(crop)]):
        works: dict[str, Callable[[], object]] = {}
        for name, packed in ways.items():

            def crops(packed=packed, centre=steps is not random):
                if centre:
                    return packed.crops(indices, center_boxes(packed.sizes, crop), crop)
                flip = torch.rand(count, generator=generator) < 0.5
                return packed.crops(indices, random_boxes(packed.sizes, scale, ratio, generator), crop, flip=flip)

            works[name] = crops
        loaders = {"decoded images, Pillow": DataLoader(Pictures(decoded, *steps), batch_size=count // 4)}
        for workers in (0, os.cpu_count()):
            loaders[f"JPEG files, Pillow, {workers or 'no'} workers"] = DataLoader(
                Pictures(files, transforms.Resize(side(crop)), *steps),
                batch_size=count // 4,
                num_workers=workers,
                persistent_workers=workers > 0,
            )
        works |= {name: lambda loader=loader: list(loader) for name, loader in loaders.items()}
        for name, seconds in best_seconds(works).items():
            speeds.setdefault(name, []).append(count / seconds)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    backbones = sorted(file.stem for file in (ROOT / "conf" / "backbone").glob("*.yaml"))
    parser.add_argument("--backbone", choices=backbones, default="resnet50" if CUDA else "resnet18")
    parser.add_argument("--batch", type=int, default=120 if CUDA else 24, help="images, a multiple of 8")
    parser.add_argument("--crop", type=int, default=227 if CUDA else 112, help="pixels; a backbone's own wins")
    parser.add_argument("--iterations", type=int, default=100 if CUDA else 3, help="measured, after as many to warm up")
    parser.add_argument("--rounds", type=int, default=5, help="runs of the loop and of a plain one")
    arguments = parser.parse_args()
    if arguments.batch < 8 or arguments.batch % 8 or min(arguments.crop, arguments.iterations) < 1:
        parser.error("--batch must be a multiple of 8, --crop and --iterations at least 1")
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"

    print(f"Crops of 227 x 227 from images of 256 x 341, images/s on {os.cpu_count()} cores\n")
    print("| from | random crop, flip | centre crop |\n| --- | ---: | ---: |", flush=True)
    for name, (random, centre) in crop_speeds(227, 120).items():
        print(f"| {name} | {random:.0f} | {centre:.0f} |", flush=True)

    choices = list(itertools.product(("32-true", "bf16-mixed"), (False, True)[: 1 + CUDA]))
    cells = [make_cell(arguments, precision, compiled) for precision, compiled in choices]
    recipe = cells[0].recipe
    print(
        f"\nTraining {arguments.backbone}, batches of {recipe.batch_size} x {recipe.crop} x {recipe.crop}, {device}\n"
    )
    print("| precision | compiled | images | images/s | time for batches |\n| --- | --- | --- | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        images = random_images(4 * recipe.batch_size, recipe.resize, Path(folder, "images.bin"))
        for cell, resident in itertools.product(cells, (False, True)[: 1 + CUDA]):
            speed, share = training_speed(cell, images, resident=resident)
            axes = f"{cell.recipe.precision} | {'yes' if cell.recipe.compile else 'no'}"
            place = "on the GPU" if resident else "memory-mapped file"
            print(f"| {axes} | {place} | {speed:.1f} | {share:.1%} |", flush=True)

        speeds: dict[str, list[float]] = {"cbml": [], "a plain PyTorch loop": []}
        for _ in range(arguments.rounds):  # in turn, so that other load on the machine meets both alike
            speeds["cbml"].append(training_speed(cells[0], images, resident=CUDA)[0])
            speeds["a plain PyTorch loop"].append(plain_speed(cells[0], images.to("cuda") if CUDA else images))
    print(f"\nThe loop, float32, of {arguments.rounds} runs in turn\n")
    print("| loop | median images/s | range |\n| --- | ---: | ---: |")
    for name, values in speeds.items():
        print(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} to {max(values):.1f} |")


if __name__ == "__main__":
    main()
