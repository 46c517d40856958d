"""Time of a training step and memory of whole methods, as a Markdown table: `python benchmarks/methods.py`.

Every option of `conf/loss` that is more than a loss of embeddings, beside plain contrastive, trains on random images by
the recipe `cpu`: crops, heads, teacher, backward pass and Adam. What a method looks at before a segment of iterations
is apart from its steps. A process each, because the peak of a process never goes down.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from losses import load
from throughput import option, random_images

from cbml.network import build
from cbml.samplers.classes import ClassesConfig
from cbml.spec.cell import Cell
from cbml.spec.params import Params
from cbml.training.checkpoint import Checkpoint
from cbml.training.device import device_context
from cbml.training.loop import Job, train

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
IMAGES = 800


def make_cell(loss: str, backbone: str, iterations: int) -> Cell:
    """The recipe `cpu`, from scratch: one row of speed after half of the iterations, to warm up, and one at the end."""
    recipe = option("recipe", "cpu")["cpu"] | {"weights": None, "iterations": iterations, "validate_every": 0}
    groups = {"dataset": option("dataset", "glyphs"), "backbone": option("backbone", backbone)}
    groups |= {"loss": option("loss", loss), "recipe": recipe | {"checkpoint_every": iterations // 2}}
    size = 504 if "branches" in str(groups["loss"]) or "slices" in str(groups["loss"]) else 512  # 3 or 9 equal parts
    params = Params.model_validate(groups | {"embedding_dim": [size], "seed": [0]})
    return params.cell("glyphs", backbone, loss, size, 0)


def measure(cell: Cell) -> None:
    """Print images in a step, its milliseconds, those of a look at the images, and the peak in MiB."""
    recipe, rows = cell.recipe, []
    with tempfile.TemporaryDirectory() as folder, device_context(recipe) as fabric:
        images = random_images(IMAGES, recipe.resize, Path(folder, "images.bin"))
        sampler = (cell.loss_config.batches or ClassesConfig()).build(images.labels.numpy(), recipe, 0)
        network, criterion = build(cell, num_classes=sampler.num_classes, root=ROOT)
        few = images.subset(torch.arange(40), images.labels[:40])
        teacher = cell.loss_config.teacher
        job = Job(recipe, 0, network, criterion, sampler, images, few, teacher_momentum=teacher)
        seconds = train(job, fabric, label=cell.loss, checkpoint=Checkpoint(Path(folder)), log=rows.extend).seconds
    speed = [row["train_images_per_second"] for row in rows if "train_images_per_second" in row][-1]
    memory = torch.cuda.max_memory_allocated() if CUDA else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    looks = -(-recipe.iterations // sampler.period) if sampler.period else 0
    look = f"{1000 * seconds['refresh'] / looks:.0f}" if looks else "-"
    print(f"{recipe.batch_size} {1000 * recipe.batch_size / speed:.0f} {look} {memory / 2**20:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50" if CUDA else "resnet18")
    parser.add_argument("--iterations", type=int, default=100 if CUDA else 8, help="half of them to warm up")
    parser.add_argument("--measure", metavar="LOSS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(make_cell(arguments.measure, arguments.backbone, arguments.iterations))

    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.backbone}, crops of 96 pixels, a look is at {IMAGES} images, {device}\n")
    print(
        "| option | images a step | ms a step | ms a look | peak MiB |\n| --- | ---: | ---: | ---: | ---: |", flush=True
    )
    names = sorted(file.stem for file in (ROOT / "conf" / "loss").glob("*.yaml"))
    for name in ["contrastive", *(name for name in names if load(name) is None)]:
        command = [sys.executable, __file__, "--backbone", arguments.backbone, "--measure", name]
        command += ["--iterations", str(arguments.iterations)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(f"| {name} | " + " | ".join(output.split()) + " |", flush=True)
    return None


if __name__ == "__main__":
    main()
