import errno
import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cbml import fetch
from cbml.errors import UserError
from cbml.models import BackboneConfig, build_trunk, weights_content

INPUT = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HTML = b"\n<!DOCTYPE html><html><title>404 Not Found</title></html>"


def config(weights, published=None, **changes):
    return BackboneConfig.model_validate(
        {"type": "resnet18", "pooling": "avg", "input": INPUT, "weights": weights, "published": published, **changes}
    )


@pytest.fixture(scope="module")
def state():
    """A trunk's entries as an old file has them: with the classifier, without num_batches_tracked."""
    torch.manual_seed(1)
    trunk = build_trunk(config(None), Path())
    state = {
        name: torch.randn_like(value)
        for name, value in trunk.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    return state | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def published(path):
    return {"url": path.as_uri(), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:8]}


def fails(settings, root, *patterns):
    with pytest.raises(UserError) as caught:
        build_trunk(settings, root)
    assert "\n" not in str(caught.value)
    for pattern in patterns:
        assert str(pattern) in str(caught.value)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "half.safetensors"])
def test_formats(name, state, tmp_path):
    if name == "half.safetensors":
        safetensors.torch.save_file({key: value.half() for key, value in state.items()}, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=name == "zip.pth")
    own = build_trunk(config(name), tmp_path).state_dict()
    rounded = (lambda x: x.half().float()) if "half" in name else (lambda x: x)
    for key, value in own.items():
        if not key.endswith("num_batches_tracked"):
            assert value.dtype == torch.float32
            assert torch.equal(value, rounded(state[key])), key


def test_bn_vectors_stored_as_rows(state, tmp_path):
    rows = {key: value[None] for key, value in state.items() if key.startswith("bn1.")}
    torch.save(state | rows, tmp_path / "w.pth")
    assert torch.equal(build_trunk(config("w.pth"), tmp_path).bn1.weight, state["bn1.weight"])


@pytest.mark.parametrize("name", ["last_linear.weight", "classifier.bias", "aux1.conv.conv.weight", "aux2.fc1.bias"])
def test_classifiers_are_ignored(name, state, tmp_path):
    torch.save(state | {name: torch.zeros(3)}, tmp_path / "w.pth")
    build_trunk(config("w.pth"), tmp_path)


@pytest.mark.parametrize(
    ("change", "patterns"),
    [
        (lambda s: s.pop("layer1.0.conv1.weight"), ["1 missing: layer1.0.conv1.weight"]),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), ["1 surplus: extra.weight"]),
        (
            lambda s: s.update({"conv1.weight": torch.zeros(64, 1, 7, 7)}),
            ["1 of another shape: conv1.weight (64, 1, 7, 7) for (64, 3, 7, 7)"],
        ),
        (
            lambda s: [s.pop(f"layer4.1.bn2.{key}") for key in ("weight", "bias", "running_mean", "running_var")],
            ["4 missing: layer4.1.bn2.weight, layer4.1.bn2.bias, layer4.1.bn2.running_mean, …"],
        ),
    ],
)
def test_strictness(change, patterns, state, tmp_path):
    state = dict(state)
    change(state)
    torch.save(state, tmp_path / "w.pth")
    fails(config("w.pth"), tmp_path, tmp_path / "w.pth", "do not fit the backbone", *patterns)


def test_another_architecture(state, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    fails(config("w.pth", type="resnet34"), tmp_path, "missing: layer1.2.conv1.weight")


def test_wrong_path(tmp_path):
    fails(config("weights/w.pth"), tmp_path, tmp_path / "weights/w.pth", "no such file", "repository's root")
    fails(config("imagnet"), tmp_path, tmp_path / "imagnet", "no such file", "allowed: 'imagenet'")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_web_page(name, tmp_path):
    (tmp_path / name).write_bytes(HTML)
    fails(config(name), tmp_path, tmp_path / name, "a web page")


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "w.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated(name, share, tmp_path):
    state = {"conv1.weight": torch.rand(64, 3, 7, 7)}
    if name == "w.safetensors":
        safetensors.torch.save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=name == "zip.pth")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    fails(config(name), tmp_path, tmp_path / name, "unreadable: truncated")


def test_pickled_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"conv1.weight": Trap()}, tmp_path / "w.pth")
    fails(config("w.pth"), tmp_path, "unreadable")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"state_dict": {"conv1.weight": torch.zeros(1)}}])
def test_no_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    fails(config("w.pth"), tmp_path, tmp_path / "w.pth", "holds no state dict")


def test_download_fills_the_cache_once(state, hub, tmp_path):
    source = tmp_path / "resnet18-test.pth"
    torch.save(state, source)
    settings = config("imagenet", published(source))
    assert torch.equal(build_trunk(settings, tmp_path).bn1.weight, state["bn1.weight"])
    assert [path.name for path in hub.glob("[!.]*")] == ["resnet18-test.pth"]
    source.unlink()
    assert torch.equal(build_trunk(settings, tmp_path).bn1.weight, state["bn1.weight"])


def test_offline_with_nothing_cached(hub, tmp_path):
    settings = config("imagenet", {"url": (tmp_path / "absent.pth").as_uri(), "sha256": "0" * 8})
    fails(settings, tmp_path, "cannot be downloaded", f"put them at {hub / 'absent.pth'}")


@pytest.fixture
def served(server, state, tmp_path):
    """A server of a weights file, and what says where it is, with a password."""
    torch.save(state, tmp_path / "w.pth")
    server.content = (tmp_path / "w.pth").read_bytes()
    url = f"{server.url.rpartition('/')[0].replace('://', '://someone:s3cret@')}/w.pth"
    return config("imagenet", published(tmp_path / "w.pth") | {"url": url})


def test_a_download_that_breaks_off_is_continued_and_one_that_stalls_ends(served, server, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "STALL", 0.5)
    monkeypatch.setattr(fetch, "CHUNK", 2**16)
    server.breaks, server.stalls = [200_000] + [0] * (fetch.RETRIES + 1), []
    fails(served, tmp_path, "cannot be downloaded", "bytes arrived in", "run again to continue")
    have = server.log[-1]
    assert 200_000 - fetch.CHUNK < have <= 200_000
    server.log.clear()
    server.breaks, server.stalls = [], ["hang", "header"]
    build_trunk(served, tmp_path)
    assert server.log == [have] * 3 and [path.name for path in hub.glob("[!.]*")] == ["w.pth"]
    assert not list(hub.glob(".*.part")) and not list(hub.glob(".*.download"))


def test_no_line_holds_the_password_of_a_url(served, server, hub, tmp_path, capsys):
    for fault in ({"status": 404}, {"status": 503}, {"status": None, "content": b"other"}):
        vars(server).update(fault)
        with pytest.raises(UserError) as caught:
            build_trunk(served, tmp_path)
        said = str(caught.value) + capsys.readouterr().err
        assert "w.pth" in said and "s3cret" not in said and "someone" not in said


def test_waiting_for_another_process_is_said(served, hub, tmp_path, capsys):
    hub.mkdir(parents=True)
    code = f"import filelock\nwith filelock.FileLock({str(hub / '.w.pth.lock')!r}): print(flush=True), input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        threading.Timer(2, other.stdin.close).start()
        build_trunk(served, tmp_path)
    assert f"waiting for another process, which fetches {hub / 'w.pth'}" in capsys.readouterr().err


def test_little_memory_is_no_damage_of_weights(state, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    torch.save(state, tmp_path / "w.pth")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OSError, match="Too many open files"):
        build_trunk(config("w.pth"), tmp_path)


def test_download_of_another_file(hub, tmp_path):
    source = tmp_path / "w.pth"
    source.write_bytes(b"other")
    settings = config("imagenet", {**published(source), "sha256": "0" * 8})
    fails(
        settings,
        tmp_path,
        source.as_uri(),
        "wrong hash",
        f"starts with {published(source)['sha256']}, expected 00000000",
    )
    assert list(hub.glob("[!.]*")) == []


def test_download_of_a_web_page(hub, tmp_path):
    source = tmp_path / "w.pth"
    source.write_bytes(HTML)
    fails(config("imagenet", {**published(source), "sha256": "0" * 8}), tmp_path, source.as_uri(), "a web page")
    assert list(hub.glob("[!.]*")) == []


def test_the_content_of_weights_is_what_identifies_them(hub, tmp_path):
    one, same, other = (tmp_path / name for name in ("one.pth", "same.pth", "other.pth"))
    for path, content in ((one, b"weights"), (same, b"weights"), (other, b"Weights")):
        path.write_bytes(content)
    assert weights_content(config("one.pth"), tmp_path) == hashlib.sha256(b"weights").hexdigest()
    assert weights_content(config("same.pth"), tmp_path) == weights_content(config("one.pth"), tmp_path)
    assert weights_content(config(str(one)), Path("elsewhere")) == weights_content(config("one.pth"), tmp_path)
    assert weights_content(config("imagenet", published(one)), tmp_path) == weights_content(config("one.pth"), tmp_path)
    assert weights_content(config("other.pth"), tmp_path) != weights_content(config("one.pth"), tmp_path)
    one.write_bytes(b"trained further")
    assert weights_content(config("same.pth"), tmp_path) != weights_content(config("one.pth"), tmp_path)


def test_what_starts_from_scratch_has_no_content_and_timm_knows_its_own():
    assert weights_content(config(None), Path()) is None
    timm = {"type": "timm", "model": "resnet18"}
    assert weights_content(BackboneConfig(**timm), Path()) is None
    assert weights_content(BackboneConfig(**timm, weights="imagenet"), Path()) == "imagenet"


def test_weights_that_are_not_there_have_no_content(hub, tmp_path):
    absent = config("imagenet", {"url": (tmp_path / "absent.pth").as_uri(), "sha256": "0" * 8})
    for settings, message in (
        (config("weights/w.pth"), f"weights {tmp_path / 'weights/w.pth'}: no such file"),
        (config("."), f"weights {tmp_path}: no such file"),
        (absent, "cannot be downloaded"),
    ):
        with pytest.raises(UserError) as caught:
            weights_content(settings, tmp_path)
        assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "pattern"), [(b"cut", "wrong hash, a truncated"), (HTML, "a web page")])
def test_cached_file_is_checked(content, pattern, hub, tmp_path):
    hub.mkdir(parents=True)
    (hub / "w.pth").write_bytes(content)
    settings = config("imagenet", {"url": "https://example.org/w.pth", "sha256": "0" * 8})
    fails(settings, tmp_path, hub / "w.pth", "delete it", pattern)


def test_timm_classifier_under_its_own_name_is_ignored(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed (pip install 'cbml[timm]')")
    whole = timm.create_model("regnety_002", num_classes=7)  # its classifier is head.fc
    safetensors.torch.save_file(whole.state_dict(), tmp_path / "w.safetensors")
    trunk = build_trunk(BackboneConfig(type="timm", model="regnety_002", weights="w.safetensors"), tmp_path)
    assert torch.equal(trunk.stem.conv.weight, whole.stem.conv.weight)


@pytest.mark.parametrize("model", ["test_vit", "test_vit_relpos", "levit_128s"])
@pytest.mark.parametrize("crop", [None, 128])
def test_timm_file_of_another_size_is_resampled_as_timm_does_it(model, crop, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed (pip install 'cbml[timm]')")
    whole = timm.create_model(model, num_classes=7)
    safetensors.torch.save_file(whole.state_dict(), tmp_path / "w.safetensors")
    settings = BackboneConfig(type="timm", model=model, weights="w.safetensors")
    if model == "levit_128s" and crop:  # timm has no way to resample its attention
        with pytest.raises(UserError, match=r"w.safetensors do not fit .* of another shape: stages.0"):
            build_trunk(settings, tmp_path, crop)
        return
    trunk = build_trunk(settings, tmp_path, crop).eval()
    size = {"img_size": crop} if crop else {}
    own = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "w.safetensors")}}
    theirs = timm.create_model(model, num_classes=0, **own, **size).eval()
    images = torch.rand(1, 3, *2 * [crop or whole.default_cfg["input_size"][1]])
    assert torch.equal(trunk(images), theirs(images))


@pytest.mark.parametrize("crop", [None, 64])
def test_timm_file_of_another_network_is_not_taken_in_silence(crop, state, tmp_path):
    """timm itself ignores what is missing in a file where the number of classes is another."""
    pytest.importorskip("timm", reason="timm is not installed (pip install 'cbml[timm]')")
    torch.save(state, tmp_path / "w.pth")
    settings = BackboneConfig(type="timm", model="test_vit", weights="w.pth")
    with pytest.raises(UserError, match=r"w.pth do not fit the backbone: .* missing: cls_token"):
        build_trunk(settings, tmp_path, crop)


def test_timm_pretrained_offline(monkeypatch):
    timm = pytest.importorskip("timm", reason="timm is not installed (pip install 'cbml[timm]')")

    def offline(*args, pretrained, **kwargs):
        assert pretrained
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    fails(
        BackboneConfig(type="timm", model="resnet18", weights="imagenet"),
        Path(),
        "timm model 'resnet18'",
        "no route to host",
    )
