"""Weights files: fetch with a hash check, read, load strictly."""

import hashlib
import shutil
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor, nn

from cbml.errors import UserError, shortage, trouble
from cbml.files import locked
from cbml.models.config import PublishedWeights

CLASSIFIERS = ("fc.", "last_linear.", "classifier.", "aux")


class Unavailable(UserError):
    """Published weights that are not here and cannot be fetched."""


def fetch_published(published: PublishedWeights) -> Path:
    """Return the published file in torch hub's cache, downloading it if it is not there.

    Raises:
        UserError: it cannot be downloaded, or what is there or came is a web page or has another SHA-256.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / published.file_name
    hidden = path.with_name(f".{path.name}")
    with locked(hidden, f"waiting for another process, which fetches {path}"):
        if not path.exists():
            _download(path, published, hidden.with_name(f"{hidden.name}.download"))
    _verify(path, published, f"{path} (delete it to download it again)")
    return path


def _download(path: Path, published: PublishedWeights, download: Path) -> None:
    """Fetch a file to `path`, by way of `download`, beside which a transfer that breaks off leaves what has come."""
    from cbml.fetch import RemoteFile, fetch, public  # which the losses, as a library, do without

    url = public(published.url)
    try:
        if url.startswith("file:"):
            shutil.copyfile(url2pathname(urlsplit(url).path), download)
        else:
            fetch(RemoteFile(url=published.url), download)
    except (OSError, UserError) as error:
        if shortage(error):
            raise
        raise Unavailable(
            f"weights {url} cannot be downloaded ({error}): fetch them elsewhere and put them at {path}"
        ) from error
    try:
        _verify(download, published, f"what came from {url}")
    except UserError:
        download.unlink()
        raise
    download.rename(path)


def _verify(path: Path, published: PublishedWeights, source: str) -> None:
    _reject_web_page(path, source)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(published.sha256):
        raise UserError(
            f"weights {source}: wrong hash, a truncated or another file: its SHA-256 starts with "
            f"{digest[: len(published.sha256)]}, expected {published.sha256}"
        )


def _reject_web_page(path: Path, source: str) -> None:
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise UserError(f"weights {source}: a web page (an error or login page saved under that name), not weights")


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from `.safetensors` or from what `torch.save` wrote (zip or legacy format).

    Raises:
        UserError: no such file, a web page, truncated or otherwise unreadable, or not names → tensors.
    """
    if not path.is_file():
        raise UserError(
            f"weights {path}: no such file (allowed: 'imagenet', null for none, or a path, relative to the "
            "repository's root)"
        )
    _reject_web_page(path, str(path))
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch  # not with this module: the losses, which import from this package, do without

            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the two readers raise at least six types on damaged files
        if trouble(error):
            raise
        raise UserError(
            f"weights {path}: unreadable: truncated, or neither safetensors nor tensors saved by "
            f"torch.save ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"weights {path}: holds no state dict (names → tensors)")
    return state


def load_state(
    trunk: nn.Module, state: dict[str, Tensor], source: Path, classifiers: tuple[str, ...] = CLASSIFIERS
) -> None:
    """Load `state` into `trunk` strictly, whatever its precision; entries of a classifier are ignored.

    Args:
        classifiers: beginnings of the names that belong to a classifier.

    Raises:
        UserError: naming some of the missing, surplus or ill-shaped entries.
    """
    own = trunk.state_dict()
    state = {name: value for name, value in state.items() if name in own or not name.startswith(classifiers)}
    for name, value in state.items():
        # bn_inception-52deb4733.pth stores the vectors of its BN layers as (1, C)
        if name in own and value.shape == (1, *own[name].shape):
            state[name] = value.squeeze(0)
    # most published files are older than num_batches_tracked, which is not used
    missing = [name for name in own if name not in state and not name.endswith(".num_batches_tracked")]
    surplus = [name for name in state if name not in own]
    misshapen = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {problem}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for problem, names in (("missing", missing), ("surplus", surplus), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise UserError(f"weights {source} do not fit the backbone: {'; '.join(problems)}")
    trunk.load_state_dict(state, strict=False)


def weights_sha256(state: dict[str, Tensor]) -> str:
    """A hash of a state dict's names and values."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
