"""The registry of trunks: networks up to their last feature map."""

import difflib
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn

from cbml.errors import UserError
from cbml.models.bn_inception import BNInception
from cbml.models.config import BackboneConfig, InputConvention
from cbml.models.stages import Staged
from cbml.models.weights import CLASSIFIERS, Unavailable, fetch_published, load_state, read_state


def build_trunk(config: BackboneConfig, root: Path, crop: int | None = None) -> nn.Module:
    """Build a trunk and load its weights.

    Args:
        root: what a relative path in `config.weights` is relative to.
        crop: side of the images, in pixels, for the timm models that are built for one size, as most vision
            transformers are: their positional embeddings are resampled to it. None: the backbone's own.

    Returns:
        A module from normalised images (B, 3, H, W) to features (B, C, h, w), or (B, C) if it is a timm model, which
        pools by itself. Its attribute `num_features` is C.

    Raises:
        UserError: the weights cannot be had, read or loaded, timm or the timm model is missing, or it does not take
            images of that size.
    """
    if crop:
        config = config.model_copy(update={"arguments": config.arguments | {"img_size": crop}})
    trunk = TRUNKS[config.type](config)
    if (path := weights_file(config, root)) is None:
        return trunk
    state = read_state(path)
    if config.type == "timm":
        state = _adapted(state, trunk, path)
    load_state(trunk, state, path, (*CLASSIFIERS, *getattr(trunk, "classifier_names", ())))
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


def _resnet(config: BackboneConfig) -> nn.Module:
    import torchvision

    network = torchvision.models.get_model(config.type, weights=None)
    if config.stride_in == "conv1":
        for block in network.modules():
            if isinstance(block, torchvision.models.resnet.Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return Stages(network)


def _googlenet(config: BackboneConfig) -> nn.Module:
    import torchvision

    network = torchvision.models.googlenet(weights=None, transform_input=False, aux_logits=False, init_weights=False)
    return _kaiming(Stages(network))


def _bn_inception(config: BackboneConfig) -> nn.Module:
    return _kaiming(BNInception())


def _timm(config: BackboneConfig) -> nn.Module:
    timm = _timm_with(config)
    arguments = dict(config.arguments, pretrained=config.weights == "imagenet", num_classes=0)
    size = arguments.get("img_size")
    if not getattr(timm.get_pretrained_cfg(config.model), "fixed_input_size", False):
        arguments.pop("img_size", None)
    try:
        trunk = timm.create_model(config.model, **arguments)
    except Exception as error:  # timm, its hub client and their transports each have their own types
        kind = Unavailable if arguments["pretrained"] else UserError
        raise kind(f"timm model '{config.model}' cannot be had ({_reason(error)})") from error
    if size:
        try:
            with torch.no_grad():
                trunk.eval()(torch.zeros(1, 3, size, size))
        except Exception as error:  # a size that patches or windows do not divide
            raise UserError(
                f"timm model '{config.model}' does not take images of {size} pixels ({_reason(error)})"
            ) from error
        trunk.train()
    trunk.num_features = trunk.head_hidden_size  # differs where a layer follows the pooling, as in MobileNetV3
    classifiers = trunk.pretrained_cfg.get("classifier") or ()
    names = (classifiers,) if isinstance(classifiers, str) else classifiers
    trunk.classifier_names = tuple(f"{name.partition('.')[0]}." for name in names)  # with the layers around them
    return trunk


def _adapted(state: dict[str, Tensor], trunk: nn.Module, path: Path) -> dict[str, Tensor]:
    """A state dict as timm adapts those of the trunk's family: to its names, and to the size of images."""
    adapt = getattr(inspect.getmodule(type(trunk)), "checkpoint_filter_fn", None)
    try:
        return adapt(state, trunk) if adapt else state
    except Exception as error:  # names and shapes of another network raise many types
        raise UserError(f"weights {path} do not fit the backbone ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


TRUNKS: dict[str, Callable[[BackboneConfig], nn.Module]] = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), _resnet),
    "googlenet": _googlenet,
    "bn_inception": _bn_inception,
    "timm": _timm,
}


class Stages(Staged, nn.Sequential):
    """The layers of a torchvision network before its global pooling, under their own names."""

    def __init__(self, network: nn.Module):
        super().__init__(OrderedDict(takewhile(lambda child: child[0] != "avgpool", network.named_children())))
        self.num_features = cast(nn.Linear, network.fc).in_features

    def steps(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        return list(self.named_children())


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
