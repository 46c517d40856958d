"""Time and memory of the losses, forward and backward, as Markdown tables: `python benchmarks/losses.py`.

The first table sets CBML against a literal loop over anchors; the second measures every option of `conf/loss` that is
a loss of embeddings and labels alone (methods.py has the others), and multi-similarity with its miner to compare with.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from cbml.errors import UserError
from cbml.losses import Sizes, build_loss, needs
from cbml.spec.method import parse_method
from cbml.spec.options import option_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import literal_losses  # noqa: E402

DIM, CLASSES, INSTANCES = 512, 100, 8


def batch(size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors round one centre per class, (size, DIM), and their labels; so scattered that mining keeps pairs."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) // INSTANCES
    centres, noise = (torch.randn(count, DIM, generator=generator) for count in (CLASSES, size))
    embeddings = torch.nn.functional.normalize(centres[labels] + 3 * noise, dim=1)
    return embeddings.to(device), labels.to(device)


def load(name: str) -> torch.nn.Module | None:
    """The loss of an option; None if it is a method that needs more than embeddings and labels."""
    config = parse_method(option_file(ROOT / "conf", "loss", name))
    if config.head or config.batches:
        return None
    loss = build_loss(config, Sizes(DIM, CLASSES, feature_dim=DIM))
    return None if needs(loss) else loss


def seconds(loss, embeddings: torch.Tensor, labels: torch.Tensor, repeats: int) -> float:
    """Median time of forward and backward, after one pass to warm up."""
    times = []
    for _ in range(repeats + 1):
        embeddings = embeddings.detach().requires_grad_()
        start = time.perf_counter()
        loss(embeddings, labels).backward()
        if embeddings.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(name: str, size: int, device: str) -> None:
    """Print the milliseconds and the MiB of memory that one loss needs beyond its batch."""
    embeddings, labels = batch(size, device)
    loss = load(name).to(device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    try:
        milliseconds = 1000 * seconds(loss, embeddings, labels, repeats=5)
    except UserError:  # a batch too large for the loss: a memory of embeddings has its size
        print("–")
        return
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    print(f"{milliseconds:.1f} {memory:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=3, metavar=("LOSS", "BATCH", "DEVICE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, size, device = arguments.measure
        return measure(name, int(size), device)

    embeddings, labels = batch(120, "cpu")
    print(f"CBML at 120 x {DIM}, CPU, {torch.get_num_threads()} threads\n")
    print("| form | loop, ms | vectorised, ms | ratio |\n| --- | ---: | ---: | ---: |")
    for form in ("log", "sqrt", "const"):
        loop = seconds(lambda e, y, form=form: literal_losses.cbml(e, y, form=form), embeddings, labels, repeats=1)
        vectorised = seconds(load(f"cbml_{form}"), embeddings, labels, repeats=20)
        print(f"| {form} | {1000 * loop:.0f} | {1000 * vectorised:.2f} | {loop / vectorised:.0f} x |", flush=True)

    columns = [(size, device) for device in ["cpu"] + ["cuda"] * torch.cuda.is_available() for size in (120, 480)]
    print("\nForward and backward: median ms / peak MiB\n")
    print("| loss |" + "".join(f" {device}, {size} x {DIM} |" for size, device in columns))
    print("| --- |" + " ---: |" * len(columns))
    for path in sorted((ROOT / "conf" / "loss").glob("*.yaml")):
        if load(path.stem) is None:
            continue
        cells = []
        for size, device in columns:
            # A process each, because the peak of a process never goes down.
            command = [sys.executable, __file__, "--measure", path.stem, str(size), device]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            cells.append(" / ".join(output.split()))
        print(f"| {path.stem} | " + " | ".join(cells) + " |", flush=True)
    return None


if __name__ == "__main__":
    main()
