"""What runs in Ray's processes: `compute`, on any node, and the `Keeper`, on the machine of the checkout.

Ray brings this module there by value, so it imports the standard library and what Ray itself needs, and no other module
of this package: the cell is trained by the snapshot's source, in a process of its own.
"""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any

SCRATCH = "CBML_SCRATCH"  # environment variable of a node: work in this folder, whether or not it sees the checkout
KILLS = 3  # times that a training may be killed by a signal before its cell counts as failed
# What a training says of itself; see `progress` and `validate`.
SPEED = re.compile(r" ([\d.]+[kM]?)/[\d.]+[kM]? \[.*?([\d.]+[kM]?) images/s")
RECALL = re.compile(r"iteration (\d+): Recall@1 ([\d.]+) %")
TRIAL = re.compile(r"^(\S+, trial \d+ of \d+: [\d.]+) with", re.MULTILINE)
UNITS = {"": 1.0, "k": 1e3, "M": 1e6}


def compute(
    key: str,
    arguments: list[str],
    run_folder: Path | None,
    *,
    module: str,
    root: str,
    token: str,
    keeper: Any,
    processes: int,
    threads: int,
    env: dict[str, str],
) -> tuple[int, str]:
    """Train one cell in the working directory, which is the snapshot, and go on from its checkpoint if there is one.

    Args:
        run_folder: where it leaves its result, beside its checkpoint; None: it leaves none here, as `pipeline.tune`.
        module: what is run with these arguments.
        root: the checkout; who does not see its file `token` works in a folder of the node's own, and the keeper has
            the checkpoints.
        processes: that share the cell.
        threads: of all of them; 0: the cell's share of the node's.

    Returns:
        The status of the process, negative for a signal, and the line that says why it is not 0.
    """
    import ray

    context = ray.get_runtime_context()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    shared = (Path(root) / token).is_file() and SCRATCH not in os.environ
    home = Path(root) if shared else Path(os.environ.get(SCRATCH) or Path.home() / ".cache" / "cbml")
    folder = home / ".checkpoints" / key
    (resources,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    at_once = max(1.0, resources.get("GPU", 0) / context.get_assigned_resources().get("GPU", 1))
    threads = max(1, int((threads or resources.get("CPU", 1) / at_once) / processes))
    place = f"{socket.gethostname()} {context.get_node_id()[:4]}"
    ray.get(keeper.begin.remote(key, context.get_node_id(), place, gpus))
    if not (shared or run_folder or "--storage" in arguments):
        return 1, f"{place} does not see {root}; tune with --storage, a database that every node reaches"
    if not shared and (packed := ray.get(keeper.load.remote(key))):
        unpack(packed, folder)
    command = [sys.executable, "-m", module, *arguments]
    if processes > 1:
        run = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command[1:1] = ["-m", *run]
    env = os.environ | env | {"PYTHONPATH": "src", "DVC_ROOT": str(home), "OMP_NUM_THREADS": str(threads)}
    for _ in range(KILLS):
        status, said = _run(command, env, key, folder, keeper, shared)
        reasons = [line for line in said if line.startswith("error: ")]
        # `torchrun` ends with 1 as well if one of its processes was killed, which then has not said why.
        if not (status < 0 or (status and processes > 1 and not reasons)):
            break
        time.sleep(5)  # a node that goes away ends this process now
    if run_folder:
        if not shared and not status:
            _send(keeper, key, folder, finished=True)
        shutil.rmtree(run_folder, ignore_errors=True)  # `dvc repro` writes it where it belongs
    if status < 0:
        return status, f"killed by {signal.Signals(-status).name}, {KILLS} times"
    return status, (reasons or said or ["it said nothing"])[-1].removeprefix("error: ")


def _run(
    command: list[str], env: dict[str, str], key: str, folder: Path, keeper: Any, shared: bool
) -> tuple[int, list[str]]:
    """Run a training to its end, and tell the keeper meanwhile; its status, and its last lines."""
    import ray

    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    new: deque[str] = deque()
    reader = threading.Thread(target=lambda: new.extend(process.stdout or ()), daemon=True)
    reader.start()
    said: list[str] = []
    sent = _newest(folder)
    while reader.is_alive() or new:
        reader.join(1)
        lines = [new.popleft() for _ in range(len(new))]
        if lines:
            said = [line.strip() for line in [*said, *lines] if line.strip()][-20:]
            ray.get(keeper.heard.remote(key, "".join(lines)))
        if not shared and (stamp := _newest(folder)) > sent:
            sent = stamp
            _send(keeper, key, folder)
    return process.wait(), said


def _newest(folder: Path) -> float:
    """When the newest state of a checkpoint was written."""
    times = []
    for file in folder.glob("**/state.pt"):
        try:
            times.append(file.stat().st_mtime)
        except FileNotFoundError:
            continue
    return max(times, default=0.0)


def _send(keeper: Any, key: str, folder: Path, finished: bool = False) -> None:
    import ray

    ray.get(keeper.save.remote(key, pack(folder, finished)))


def pack(folder: Path, finished: bool = False) -> bytes:
    """The files of a checkpoint that a training may be writing, all of one moment; or its finished run folder alone."""
    while True:
        stamp, buffer = _newest(folder), io.BytesIO()
        try:
            with tarfile.open(fileobj=buffer, mode="w") as tar:
                for file in folder.glob("*/run/*" if finished else "**/*"):
                    name = file.relative_to(folder)
                    if file.is_file() and not any(part.startswith(".") for part in name.parts):
                        tar.add(file, arcname=str(name))
        except FileNotFoundError:  # replaced meanwhile
            continue
        if _newest(folder) == stamp:
            return buffer.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    """Put a packed checkpoint in place of `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(new, filter="data")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


class Keeper:
    """What the nodes tell, and the checkpoints of those that do not share the checkout's disk.

    Args:
        root: the checkout.
        logs: of each cell its file.
        batch_sizes: of each cell.
    """

    def __init__(self, root: str, logs: dict[str, str], batch_sizes: dict[str, int]):
        self.root, self.logs, self.batch_sizes = Path(root), logs, batch_sizes
        self._states: dict[str, dict[str, Any]] = {}

    def begin(self, key: str, node: str, place: str, gpus: str) -> None:
        """A cell begins, or begins again."""
        attempts = self._states.get(key, {}).get("attempts", 0) + 1
        self._states[key] = {"node": node, "place": place, "gpus": gpus, "attempts": attempts}

    def heard(self, key: str, text: str) -> None:
        """A training has written this."""
        state = self._states.setdefault(key, {})
        own = "\n".join(line for line in text.splitlines() if line.startswith(f"{key}: "))  # not those of "embed: "
        if found := SPEED.findall(own):
            done, speed = found[-1]
            images = float(done.rstrip("kM")) * UNITS[done.lstrip("0123456789.")]
            state |= {"iteration": round(images / self.batch_sizes[key]), "speed": speed}
        if found := RECALL.findall(text):
            state["iteration"] = max(int(found[-1][0]), state.get("iteration", 0))
            state["recall"] = float(found[-1][1])
        if found := TRIAL.findall(text):
            state["trial"] = found[-1]
        with Path(self.logs[key]).open("a", encoding="utf-8") as file:
            file.write(text)

    def states(self) -> dict[str, dict[str, Any]]:
        """Of each cell that has begun: where it is, and how far."""
        return self._states

    def load(self, key: str) -> bytes | None:
        """The checkpoint of a cell."""
        folder = self.root / ".checkpoints" / key
        return pack(folder) if folder.is_dir() else None

    def save(self, key: str, packed: bytes) -> None:
        """Keep a checkpoint."""
        from filelock import FileLock

        folder = self.root / ".checkpoints" / key
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):  # as a training of this machine does
            unpack(packed, folder)
