"""The registry of trunks: networks up to their last feature map."""

import difflib
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from cbml.backbones.bn_inception import BNInception
from cbml.backbones.entries import BackboneConfig, InputConvention
from cbml.backbones.weights import CLASSIFIERS, fetch_published, load_state, read_state
from cbml.errors import UserError


def build_trunk(config: BackboneConfig, root: Path) -> nn.Module:
    """Build a trunk and load its weights.

    Args:
        root: what a relative path in `config.weights` is relative to.

    Returns:
        A module from normalised images (B, 3, H, W) to features (B, C, h, w), or (B, C) if it is a timm model, which
        pools by itself. Its attribute `num_features` is C.

    Raises:
        UserError: the weights cannot be had, read or loaded, or timm or the timm model is missing.
    """
    trunk = TRUNKS[config.type](config, root)
    if (path := weights_file(config, root)) is None or "img_size" in config.arguments:
        return trunk  # timm has loaded its weights, and resized what depends on the size of images
    load_state(trunk, read_state(path), path, (*CLASSIFIERS, *getattr(trunk, "classifier_names", ())))
    return trunk


def weights_file(config: BackboneConfig, root: Path) -> Path | None:
    """The file that a backbone starts from, downloaded if need be; None from scratch, and for timm's own."""
    if config.weights == "imagenet":
        return fetch_published(config.published) if config.published else None
    return root / config.weights if config.weights else None


def weights_content(config: BackboneConfig, root: Path) -> str | None:
    """What identifies the weights that a backbone starts from: the SHA-256 of a file, or None from scratch.

    Raises:
        UserError: the file cannot be had.
    """
    if (path := weights_file(config, root)) is None:
        return config.weights  # timm knows its own by the model's name
    if not path.is_file():
        raise UserError(f"weights {path}: no such file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_convention(config: BackboneConfig) -> InputConvention:
    """The pixels that a backbone expects: its entry's, or a timm model's own.

    Raises:
        UserError: timm or the timm model is missing.
    """
    if config.input:
        return config.input
    timm = _timm_with(config)
    pretrained = timm.get_pretrained_cfg(config.model)
    data = timm.data.resolve_data_config(pretrained_cfg=pretrained.to_dict() if pretrained else {})
    crop = config.arguments.get("img_size", data["input_size"][1])
    return InputConvention(
        mean=data["mean"],
        std=data["std"],
        resize=int(crop / data["crop_pct"]),
        crop=crop,
        interpolation=data["interpolation"],
    )


def needs_size(config: BackboneConfig) -> bool:
    """Whether a network has to be built for one size of images, as most vision transformers are."""
    if config.type != "timm":
        return False
    pretrained = _timm_with(config).get_pretrained_cfg(config.model)
    return bool(pretrained and pretrained.fixed_input_size)


def _resnet(config: BackboneConfig, root: Path) -> nn.Module:
    import torchvision

    network = torchvision.models.get_model(config.type, weights=None)
    if config.stride_in == "conv1":
        for block in network.modules():
            if isinstance(block, torchvision.models.resnet.Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return _until_pooling(network)


def _googlenet(config: BackboneConfig, root: Path) -> nn.Module:
    import torchvision

    network = torchvision.models.googlenet(weights=None, transform_input=False, aux_logits=False, init_weights=False)
    return _kaiming(_until_pooling(network))


def _bn_inception(config: BackboneConfig, root: Path) -> nn.Module:
    return _kaiming(BNInception())


def _timm(config: BackboneConfig, root: Path) -> nn.Module:
    timm = _timm_with(config)
    options = dict(config.arguments, pretrained=config.weights == "imagenet", num_classes=0)
    if "img_size" in options and config.weights not in (None, "imagenet"):
        path = root / config.weights
        read_state(path)  # for what it says of a bad file
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    try:
        trunk = timm.create_model(config.model, **options)
    except Exception as error:  # timm, its hub client and their transports each have their own types
        reason = f"{error}".strip().partition("\n")[0]
        raise UserError(
            f"timm model '{config.model}' cannot be had ({type(error).__name__}: {reason}); a file of weights can be "
            "named: -S backbone.NAME.weights=PATH"
        ) from error
    trunk.num_features = trunk.head_hidden_size  # differs where a layer follows the pooling, as in MobileNetV3
    classifiers = trunk.pretrained_cfg.get("classifier") or ()
    trunk.classifier_names = tuple(
        f"{name}." for name in ((classifiers,) if isinstance(classifiers, str) else classifiers)
    )
    return trunk


TRUNKS: dict[str, Callable[[BackboneConfig, Path], nn.Module]] = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), _resnet),
    "googlenet": _googlenet,
    "bn_inception": _bn_inception,
    "timm": _timm,
}


def _until_pooling(network: Any) -> nn.Module:
    """The layers of a torchvision network before its global pooling, under their own names."""
    trunk = nn.Sequential(OrderedDict(takewhile(lambda child: child[0] != "avgpool", network.named_children())))
    trunk.num_features = network.fc.in_features
    return trunk


def _kaiming(trunk: nn.Module) -> nn.Module:
    """Initialise as torchvision does its ResNets: a smaller start vanishes in the depth while BN is frozen."""
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return trunk


def _timm_with(config: BackboneConfig) -> ModuleType:
    """Import timm and make sure that it knows the entry's model."""
    model = str(config.model)
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(f"backbone timm model '{model}' needs timm: pip install 'cbml[timm]'") from error
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), 3)
        raise UserError(
            f"timm {timm.__version__} has no model '{model}'; "
            + (f"near: {', '.join(near)}" if near else "timm.list_models() names those it has")
        )
    try:
        timm.get_pretrained_cfg(model)
    except RuntimeError as error:  # a good name with a wrong tag, as in resnet50.imagenet
        raise UserError(f"timm {timm.__version__}, model '{model}': {error}") from error
    return timm
