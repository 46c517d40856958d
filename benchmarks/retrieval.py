"""Time and memory of exact retrieval, beside faiss, as a Markdown table: `python benchmarks/retrieval.py`.

    python benchmarks/retrieval.py --images 60502 --classes 11316      # the size of SOP's test list; CUB's if not given

Everything runs once per round, one after the other, with as many threads (`OMP_NUM_THREADS`); the ratio to faiss is of
processor time within one round, so that what else the machine does is in both. Without `pip install faiss-cpu` there is
no such column.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cbml.evaluation.metrics import evaluate
from cbml.evaluation.retrieval import retrieve
from cbml.evaluation.similarities import pair_similarities

try:
    import faiss
except ImportError:
    faiss = None

CURVE = [2**power for power in range(10)]


def clusters(images: int, classes: int, dim: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors (images, dim) round one centre per class, and their labels, in no order."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images)[torch.randperm(images, generator=generator)] % classes
    embeddings = torch.randn(images, dim, generator=generator).mul_(noise)
    embeddings += torch.randn(classes, dim, generator=generator)[labels]
    return torch.nn.functional.normalize(embeddings, dim=1), labels


def tasks(embeddings: torch.Tensor, labels: torch.Tensor) -> dict[str, Callable[[], Any]]:
    found = {
        "evaluate, K = 1, 2, 4, 8": lambda: evaluate(embeddings, labels),
        "evaluate, K = 1, 2, … 512": lambda: evaluate(embeddings, labels, ks=CURVE),
        "retrieve, 8 neighbours": lambda: retrieve(embeddings, labels, 8),
        "pair_similarities": lambda: pair_similarities(embeddings, labels),
    }
    if faiss:
        faiss.omp_set_num_threads(torch.get_num_threads())
        vectors = embeddings.numpy()
        found["faiss.knn, k = 9"] = lambda: faiss.knn(vectors, vectors, 9, metric=faiss.METRIC_INNER_PRODUCT)
    return found


def resident(what: str) -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` at most."""
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(what)
    )
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5924)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--noise", type=float, default=3.0, help="about a class's centre, which has variance 1")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    embeddings, labels = clusters(arguments.images, arguments.classes, arguments.dim, arguments.noise)
    wall: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    results: dict[str, Any] = {}
    for _ in range(arguments.rounds):
        for name, task in tasks(embeddings, labels).items():
            Path("/proc/self/clear_refs").write_text(
                "5", encoding="utf-8"
            )  # from here on VmHWM is the peak of this task
            before, start, start_processor = resident("VmRSS"), time.perf_counter(), time.process_time()
            results[name] = task()
            processor.setdefault(name, []).append(time.process_time() - start_processor)
            wall.setdefault(name, []).append(time.perf_counter() - start)
            memory[name] = max(memory.get(name, 0), resident("VmHWM") - before)

    scores = results["evaluate, K = 1, 2, 4, 8"]
    print(
        f"{arguments.images:,} × {arguments.dim}, {arguments.classes:,} classes, noise {arguments.noise:g} "
        f"(Recall@1 {scores['recall_at_1']:.1f}, MAP@R {scores['map_at_r']:.1f}), {torch.get_num_threads()} threads, "
        f"{arguments.rounds} rounds\n"
    )
    columns = ["seconds, least", "median", "processor seconds, least", "median", "MiB over the embeddings"]
    columns += ["× faiss, least", "median"] if faiss else []
    print("| | " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    for name in wall:
        cells = [f"{f(times[name]):.3g}" for times in (wall, processor) for f in (min, statistics.median)]
        cells.append(f"{memory[name]:.0f}")
        if faiss:
            pairs = zip(processor[name], processor["faiss.knn, k = 9"], strict=True)
            ratios = [ours / theirs for ours, theirs in pairs]
            cells += [f"{min(ratios):.2f}", f"{statistics.median(ratios):.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
