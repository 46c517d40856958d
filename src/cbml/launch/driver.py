"""Cells, or trials, on all GPUs of this machine, or of the cluster that RAY_ADDRESS names."""

import logging
import os
import shlex
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from cbml import provenance
from cbml.errors import UserError
from cbml.launch import node
from cbml.launch.pending import SCRIPT, Pending, pending_cells
from cbml.launch.show import Display
from cbml.progress import message
from cbml.workspace import Workspace

SNAPSHOT = ("src", "pipeline", "conf", "lists", "params.yaml")
LEFT_OUT = ("__pycache__", "*.egg-info", ".gitignore")  # Ray would leave out what the last one names
OBJECT_STORE = 100 * 2**20  # bytes; where the disk is shared no tensor goes through it
AFTER = "`dvc repro` takes what is trained, and goes on from there"

Resources = tuple[float, int, int]  # see `_resources`


@dataclass(frozen=True)
class Options:
    """How cells are spread.

    Attributes:
        cells_per_gpu: that share one.
        gpus_per_cell: of one node; None: 1, or 0 where this machine is all there is and has none.
        cpus_per_cell: threads; None: with GPUs its share of the node's, else as many as without `launch`.
        gpus: that this machine is said to have; None: those that Ray finds.
    """

    cells_per_gpu: int = 1
    gpus_per_cell: int | None = None
    cpus_per_cell: int | None = None
    gpus: int | None = None

    def check(self) -> None:
        """Raises a UserError if they do not fit together."""
        for name in ("cells_per_gpu", "cpus_per_cell"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}; allowed: from 1")
        for name in ("gpus_per_cell", "gpus"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise UserError(f"--{name.replace('_', '-')} {value}; allowed: from 0")
        if self.cells_per_gpu > 1 and (self.gpus_per_cell or 1) > 1:
            raise UserError("--cells-per-gpu and --gpus-per-cell: cells share a GPU, or GPUs a cell; take one of them")
        if self.gpus is not None and "RAY_ADDRESS" in os.environ:
            raise UserError("--gpus: what a cluster has its nodes say: ray start --num-gpus=N; leave out RAY_ADDRESS")


def commands(cells: list[Pending], options: Options) -> Iterator[str]:
    """What trains each of the cells, for another scheduler."""
    processes = options.gpus_per_cell or 1
    run = f"torch.distributed.run --standalone --max-restarts=3 --nproc-per-node={processes} -m "
    for cell in cells:
        if not cell.finished:
            module = f"{run if processes > 1 else ''}{SCRIPT}"
            yield f"PYTHONPATH=src python -m {module} {shlex.join(cell.arguments)}"


def summary(workspace: Workspace) -> list[Pending]:
    """Say what there is to do; the cells that DVC lacks."""
    cells, known = pending_cells(workspace)
    finished = sum(cell.finished for cell in cells)
    message(f"cells: DVC has {known}, {finished} are trained and wait for `dvc repro`, {len(cells) - finished} are not")
    return cells


def launch(workspace: Workspace, options: Options) -> list[str]:
    """Train every cell that DVC lacks and that is not trained; what is interrupted goes on.

    Returns:
        A line for each cell that failed.

    Raises:
        UserError: Ray is not installed, its cluster does not answer, or a cell needs more than this machine has.
    """
    options.check()
    cells = [cell for cell in summary(workspace) if not cell.finished]
    if not cells:
        message(AFTER)
        return []
    with _session(workspace, options) as token:
        failed = _run(workspace, cells, options, _resources(options), token)
    message("\n".join([*failed, f"{len(cells) - len(failed)} of {len(cells)} cells are trained; {AFTER}"]))
    return failed


def launch_tune(workspace: Workspace, arguments: list[str], processes: int) -> list[str]:
    """Run `pipeline.tune` as so many processes on every GPU, or without GPUs on every machine.

    They share each study by its storage: Optuna's file on the checkout's disk, or the URL among the arguments.

    Returns:
        A line for each that failed.

    Raises:
        UserError: as `launch`.
    """
    if processes < 1:
        raise UserError(f"--processes {processes}; allowed: from 1")
    options = Options(cells_per_gpu=processes)
    with _session(workspace, options) as token:
        if not _most("GPU"):
            options = Options(gpus_per_cell=0, cpus_per_cell=max(1, int(_most("CPU")) // processes))
        resources = _resources(options)
        workers = [Pending(f"tune-{i + 1}", arguments) for i in range(_slots(resources))]
        failed = _run(workspace, workers, options, resources, token, "pipeline.tune")
    message("\n".join([*failed, f"{len(workers) - len(failed)} of {len(workers)} processes are done"]))
    return failed


def _run(
    workspace: Workspace,
    cells: list[Pending],
    options: Options,
    resources: Resources,
    token: str,
    module: str = SCRIPT,
) -> list[str]:
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpus, cpus, threads = resources
    logs = {cell.key: workspace.log(cell.key) for cell in cells}
    workspace.log("").parent.mkdir(parents=True, exist_ok=True)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote
    kept: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 16}
    keeper = remote(**kept, scheduling_strategy=here)(node.Keeper).remote(
        str(workspace.root),
        {key: str(log) for key, log in logs.items()},
        {cell.key: cell.batch_size for cell in cells},
    )
    passed = {name: value for name, value in os.environ.items() if name.startswith(("MLFLOW_", "CBML_"))}
    passed.pop(node.SCRATCH, None)  # each node's own
    common: dict[str, Any] = {
        "root": str(workspace.root),
        "token": token,
        "keeper": keeper,
        "module": module,
        "processes": options.gpus_per_cell or 1,
        "threads": threads,
        "env": passed | {provenance.REVISION: provenance.revision()},
    }
    task = remote(num_gpus=gpus, num_cpus=cpus, max_retries=-1, scheduling_strategy="SPREAD")(node.compute)
    tasks = {task.remote(cell.key, cell.arguments, cell.run_folder, **common): cell.key for cell in cells}
    display, failed = Display(cells), []
    message(f"logs: {workspace.log('KEY')}")
    while tasks:
        done, _ = ray.wait([*tasks], timeout=1)
        display.update(_present(ray.get(keeper.states.remote())), [*tasks.values()])
        for each in done:
            key = tasks.pop(each)
            try:
                status, reason = ray.get(each)
            except RayError as error:
                status, reason = -1, str(error).strip().splitlines()[-1]
            if status:
                failed.append(f"{key}: failed: {reason} (log: {logs[key]})")
                display.failed += 1
                display.event(failed[-1])
            else:
                display.done += 1
                display.event(f"{key}: done ({display.done} of {len(cells)})")
    return failed


def _present(states: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those on nodes that are there: what ran on another one waits."""
    import ray

    there = {each["NodeID"] for each in ray.nodes() if each["Alive"]}
    return {key: state for key, state in states.items() if state.get("node") in there}


def _most(name: str) -> float:
    """GPUs, or cores, of the node that has most of them."""
    return max(_each_has(name), default=0)


def _each_has(name: str) -> list[float]:
    import ray

    return [each["Resources"].get(name, 0) for each in ray.nodes() if each["Alive"]]


def _slots(resources: Resources) -> int:
    """How many tasks run at once now: a node that comes later gets none."""
    gpus, cpus, _ = resources
    name, needed = ("GPU", gpus) if gpus else ("CPU", cpus)
    return max(1, sum(int(has / needed) for has in _each_has(name)))


def _resources(options: Options) -> Resources:
    """GPUs and cores of a task, and threads of its process: 0 for its share of the node's."""
    most, cluster, wanted = _most("GPU"), "RAY_ADDRESS" in os.environ, options.gpus_per_cell
    if wanted is None:
        wanted = 1 if cluster or most else 0
    if wanted > most:
        if not cluster:
            raise UserError(f"--gpus-per-cell {wanted}: this machine has {most:g}")
        message(f"no node has {wanted} GPU(s) yet: cells wait for one (nodes without GPUs: --gpus-per-cell 0)")
    gpus = wanted if wanted > 1 else wanted / options.cells_per_gpu
    if options.cpus_per_cell:
        return gpus, options.cpus_per_cell, options.cpus_per_cell
    if gpus:
        return gpus, max(1, wanted), 0
    threads = torch.get_num_threads()  # more of them, or fewer, would give other bits
    return gpus, threads, threads


@contextmanager
def _session(workspace: Workspace, options: Options) -> Iterator[str]:
    """Ray with a snapshot as everybody's working directory, and the token that `_token` makes."""
    if not find_spec("ray"):  # which is not imported before `_connected` has set what it reads then
        raise UserError("Ray is not installed; pip install 'cbml[ray]' (or --print: only the commands)")
    with _snapshot(workspace) as folder, _connected(options, folder), _token(workspace) as token:
        yield token


@contextmanager
def _snapshot(workspace: Workspace) -> Iterator[Path]:
    """A folder with `source`, a copy of all that determines the cells: what is edited from now on changes none of them.

    Ray's own files go there, too: everybody may write in its folder, and only this user gets through the one around it.
    """
    top = os.environ.get("RAY_TMPDIR", "/tmp")  # a short path: sockets lie below it
    with tempfile.TemporaryDirectory(prefix="cbml-", dir=top, ignore_cleanup_errors=True) as folder:
        for name in SNAPSHOT:
            source, target = workspace.tree / name, Path(folder) / "source" / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
            else:
                shutil.copy(source, target)
        yield Path(folder)


@contextmanager
def _connected(options: Options, folder: Path) -> Iterator[None]:
    """Ray, on this machine alone or on its cluster, with the snapshot as everybody's working directory."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without GPUs the variable stays as it is
    os.environ.setdefault("RAY_worker_niceness", "0")  # a cell is worth no less than without `launch`
    here: dict[str, Any] = {"address": "local", "num_gpus": options.gpus, "object_store_memory": OBJECT_STORE}
    here |= {"_temp_dir": str(folder / "r")}
    if "RAY_ADDRESS" not in os.environ:
        # Ray reads it when it is imported: "0" lets it listen on the loopback interface, as it does on macOS by itself.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(node)  # a node's own `cbml` may be another, or none
    try:
        ray.init(
            **(here if "RAY_ADDRESS" not in os.environ else {}),
            runtime_env={"working_dir": str(folder / "source")},
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,  # each cell has a log, and a lost node would flood the terminal
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = os.environ.get("RAY_ADDRESS", "this machine")
        raise UserError(f"Ray at {where}: {' '.join(str(error).split())[:300]}") from None
    # Whatever happens to a node Ray prints on standard output, hundreds of lines of it, some when it ends; what matters
    # is told here.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _token(workspace: Workspace) -> Iterator[str]:
    """A file of the checkout, by whose path a node finds out whether it sees it."""
    file = workspace.checkpoint(f".launch-{uuid.uuid4().hex}")
    file.parent.mkdir(exist_ok=True)
    file.touch()
    try:
        yield str(file.relative_to(workspace.root))
    finally:
        file.unlink(missing_ok=True)
