import itertools
from pathlib import Path
from typing import get_args

import pytest
import torch
import torchvision
import yaml
from helpers import ENTRIES, config_of
from pydantic import ValidationError
from torch import nn

from cbml.errors import UserError
from cbml.models import BackboneConfig, EmbeddingModel, InputConvention, build_trunk, create_model, input_convention
from cbml.models.embedding_model import Normalize
from cbml.models.trunks import TRUNKS

ROOT = Path(__file__).parents[2]
FEATURES = {
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "resnet152": 2048,
    "resnet50_caffe": 2048,
    "googlenet": 1024,
    "bn_inception": 1024,
    "timm": 512,
    "tf_efficientnet_lite0": 1280,
    "convnext_tiny": 768,
    "vit_small_patch16_224": 384,
    "vit_small_patch14_dinov2": 384,
}
SIZES = {"vit_small_patch14_dinov2": 56}  # of images; 64 for the others
TORCHVISION = {
    "resnet18": "ResNet18",
    "resnet34": "ResNet34",
    "resnet50": "ResNet50",
    "resnet101": "ResNet101",
    "resnet152": "ResNet152",
    "googlenet": "GoogLeNet",
}


def random_images(size):
    return torch.randint(256, (2, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def images():
    return random_images(64)


@pytest.mark.parametrize("name", FEATURES)
def test_every_backbone(name):
    size = SIZES.get(name, 64)
    images = random_images(size)
    torch.manual_seed(0)
    model = create_model(config_of(name), embedding_dim=5, root=ROOT, crop=size)
    assert model.trunk.num_features == model.head.in_features == FEATURES[name]

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.ones_(norm.weight)  # timm starts the last of each residual branch at zero, which stops its gradient
    before = [norm.running_mean.clone() for norm in norms]
    embeddings = model.train()(images)
    assert embeddings.shape == (2, 5)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))

    assert model.training
    assert bool(norms) != name.startswith(("vit_", "convnext_"))
    assert not any(norm.training for norm in norms)
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))

    (embeddings[0] * torch.arange(5)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []

    state = model.state_dict()
    # what files of weights hold: nothing of the normalisation
    assert list(state) == [*(f"trunk.{key}" for key in model.trunk.state_dict()), "head.weight", "head.bias"]
    torch.manual_seed(1)
    twin = create_model(config_of(name), embedding_dim=5, root=ROOT, crop=size)
    assert not torch.equal(twin.head.weight, model.head.weight)
    twin.load_state_dict(state)
    torch.testing.assert_close(twin.eval()(images), model.eval()(images))


def test_the_entries_are_these_and_each_file_defines_the_key_named_after_it():
    assert set(ENTRIES) == set(FEATURES)
    for file in (ROOT / "conf/backbone").glob("*.yaml"):
        assert list(yaml.safe_load(file.read_text())) == [file.stem]


def test_the_registry_has_every_type_that_an_entry_may_name():
    assert set(TRUNKS) == set(get_args(BackboneConfig.model_fields["type"].annotation))


@pytest.mark.parametrize("name", TORCHVISION)
def test_entry_agrees_with_torchvisions_own_description_of_its_weights(name):
    config = config_of(name)
    weights = torchvision.models.get_weight(f"{TORCHVISION[name]}_Weights.IMAGENET1K_V1")
    assert config.published.url == weights.url
    assert f"-{config.published.sha256}.pth" in weights.url
    preset = weights.transforms()
    assert (list(config.input.mean), list(config.input.std)) == (preset.mean, preset.std)
    assert config.input.interpolation == preset.interpolation.value


def test_googlenets_step_and_bn_inceptions_pooling():
    assert config_of("googlenet").recipe == {"paper": {"lr_steps": [3000]}}
    assert [name for name in FEATURES if "paper" in (ENTRIES[name].get("recipe") or {})] == ["googlenet"]
    assert [name for name in FEATURES if ENTRIES[name].get("pooling") == "max"] == ["bn_inception"]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "googlenet"])
def test_trunk_and_pooling_are_torchvisions_features(name, images):
    trunk = build_trunk(config_of(name), ROOT)
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    network = torchvision.models.get_model(name, weights=None, **options)
    network.fc = nn.Identity()
    network.load_state_dict(trunk.state_dict())
    x = images / 255
    torch.testing.assert_close(trunk.eval()(x).mean((2, 3)), network.eval()(x))


def test_stride_in_the_first_1x1():
    strides = {}
    for stride_in in ("conv1", "conv2"):
        trunk = build_trunk(config_of("resnet50", stride_in=stride_in), ROOT)
        strides[stride_in] = [
            (
                trunk.get_submodule(f"layer{layer}.{block}").conv1.stride[0],
                trunk.get_submodule(f"layer{layer}.{block}").conv2.stride[0],
            )
            for layer, block in itertools.product((1, 2, 3, 4), (0, 1))
        ]
    assert strides["conv1"] == [(1, 1), (1, 1)] + 3 * [(2, 1), (1, 1)]
    assert strides["conv2"] == [(1, 1), (1, 1)] + 3 * [(1, 2), (1, 1)]
    assert config_of("resnet50_caffe").stride_in == "conv1"


def test_bn_trains_when_asked(images):
    model = create_model(config_of("resnet18"), embedding_dim=5, root=ROOT)
    model.freeze_bn = False
    model.train()(images)
    assert model.trunk.bn1.training
    assert model.trunk.bn1.running_mean.abs().sum() > 0


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_freezing_concerns_the_bn_of_the_trunk_alone(images, freeze_bn):
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    trunk.num_features = 4
    model = EmbeddingModel(trunk, config_of("resnet18").input, "avg", 6, freeze_bn)
    model.head = nn.Sequential(model.head, nn.BatchNorm1d(6))
    moved = {}
    for mode in (True, False):
        model.train(mode)
        for name, norm in (("trunk", trunk[1]), ("head", model.head[1])):
            before = norm.running_mean.clone()
            model(images)
            moved[name, mode] = not torch.equal(norm.running_mean, before)
            assert norm.training == moved[name, mode]
    # whether the statistics follow the batches, by part and by training mode
    assert moved == {
        ("trunk", True): not freeze_bn,
        ("head", True): True,
        ("trunk", False): False,
        ("head", False): False,
    }
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "pool"), [("resnet18", lambda x: x.mean((2, 3))), ("bn_inception", lambda x: x.amax((2, 3)))]
)
def test_without_a_head_embeddings_are_pooled_features(name, pool, images):
    model = create_model(config_of(name), embedding_dim=0, root=ROOT).eval()
    assert model.embedding_dim == FEATURES[name]
    features = pool(model.trunk(model.normalize(images)))
    torch.testing.assert_close(model(images), features / features.square().sum(1, keepdim=True).sqrt())


def test_head_is_kaiming_fan_out_with_zero_bias():
    torch.manual_seed(0)
    head = create_model(config_of("resnet18"), embedding_dim=64, root=ROOT).head
    assert head.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.02)  # fan-in would give √(2 / 512)
    assert not head.bias.any()


def test_bf16_autocast_of_the_model_gives_float32_unit_embeddings(images):
    model = create_model(config_of("resnet18"), embedding_dim=8, root=ROOT)
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = model(images)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


PICTURE = [[[0, 255], [51, 102]], [[255, 0], [153, 204]], [[10, 20], [30, 40]]]  # red, green, blue


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "resnet18",
            [
                [[(0 - 0.485) / 0.229, (1 - 0.485) / 0.229], [(0.2 - 0.485) / 0.229, (0.4 - 0.485) / 0.229]],
                [[(1 - 0.456) / 0.224, (0 - 0.456) / 0.224], [(0.6 - 0.456) / 0.224, (0.8 - 0.456) / 0.224]],
                [
                    [(10 / 255 - 0.406) / 0.225, (20 / 255 - 0.406) / 0.225],
                    [(30 / 255 - 0.406) / 0.225, (40 / 255 - 0.406) / 0.225],
                ],
            ],
        ),
        (
            "bn_inception",
            [
                [[10 - 104, 20 - 104], [30 - 104, 40 - 104]],
                [[255 - 117, 0 - 117], [153 - 117, 204 - 117]],
                [[0 - 128, 255 - 128], [51 - 128, 102 - 128]],
            ],
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_input_convention_by_hand(name, expected, dtype):
    picture = torch.tensor([PICTURE], dtype=dtype)
    normalize = Normalize(config_of(name).input)
    torch.testing.assert_close(normalize(picture), torch.tensor([expected], dtype=torch.float32))
    assert picture.tolist() == [PICTURE]
    assert not normalize.state_dict() and not list(normalize.parameters())


def test_the_normalisation_goes_where_the_network_goes():
    model = create_model(config_of("resnet18"), embedding_dim=5, root=ROOT).to("meta")
    assert {buffer.device.type for buffer in model.normalize.buffers()} == {"meta"}
    assert model(torch.empty(2, 3, 64, 64, dtype=torch.uint8, device="meta")).shape == (2, 5)


def test_the_model_normalises_by_itself(images):
    """The same trunk under another convention gives other embeddings; the caller feeds RGB 0–255 to both."""
    bgr = {**ENTRIES["bn_inception"]["input"]}
    models = [
        create_model(config_of("resnet18", **changes), embedding_dim=0, root=ROOT).eval()
        for changes in ({}, {"input": bgr})
    ]
    models[1].load_state_dict(models[0].state_dict())
    own = images.flip(1).float() - torch.tensor([104.0, 117.0, 128.0]).view(3, 1, 1)
    expected = torch.nn.functional.normalize(models[0].trunk(own).mean((2, 3)), dim=1)
    torch.testing.assert_close(models[1](images), expected)


def test_timm_brings_its_own_input_convention():
    expected = InputConvention(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize=256, crop=224, interpolation="bicubic")
    assert input_convention(config_of("tf_efficientnet_lite0")) == expected


def test_timm_pools_by_itself(images):
    config = config_of("tf_efficientnet_lite0")
    model = create_model(config, embedding_dim=0, root=ROOT).eval()
    assert model(images).shape == (2, 1280)
    assert model.trunk(model.normalize(images)).shape == (2, 1280)


def test_another_size_of_images_is_the_crop_that_a_timm_model_brings():
    """Beside its crop, resize follows by the share that the model's own evaluation crops."""
    expected = {"resize": 124, "crop": 112, "interpolation": "bicubic"}
    own = input_convention(config_of("vit_small_patch16_224", arguments={"img_size": 112}))
    assert own.model_dump(include=set(expected)) == expected
    assert input_convention(config_of("vit_small_patch14_dinov2")).crop == 224  # its weights: 518


@pytest.mark.parametrize("model", ["test_vit", "test_vit_relpos", "test_resnet"])
def test_a_timm_model_is_built_for_the_crop(model):
    config = config_of("timm", model=model)
    own = input_convention(config).crop
    for crop in (64, own, None):
        network = create_model(config, embedding_dim=5, root=ROOT, crop=crop)
        assert network(random_images(crop or own)).shape == (2, 5) and network.training


def test_further_arguments_reach_timm():
    trunk = build_trunk(config_of("timm", model="test_vit", arguments={"drop_path_rate": 0.5, "img_size": 80}), ROOT)
    assert trunk.blocks[-1].drop_path1.drop_prob == 0.5 and trunk.patch_embed.img_size == (80, 80)


@pytest.mark.parametrize(
    ("arguments", "crop", "message"),
    [
        ({}, 100, r"timm model 'test_vit' does not take images of 100 pixels \(AssertionError: .*patch size"),
        ({"drop_pat_rate": 0.5}, None, r"timm model 'test_vit' cannot be had \(TypeError: .*drop_pat_rate"),
    ],
)
def test_what_a_timm_model_does_not_take(arguments, crop, message):
    with pytest.raises(UserError, match=message) as error:
        build_trunk(config_of("timm", model="test_vit", arguments=arguments), ROOT, crop)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet18x", r"timm .* has no model 'resnet18x'; near: .*resnet18"),
        ("resnet50.nonsense", r"timm .* model 'resnet50.nonsense': Invalid pretrained tag"),
    ],
)
def test_unknown_timm_model(model, message):
    with pytest.raises(UserError, match=message):
        create_model(config_of("timm", model=model), embedding_dim=0, root=ROOT)


def test_timm_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    config = BackboneConfig(type="timm", model="resnet18")
    with pytest.raises(UserError, match=r"needs timm: pip install 'cbml\[timm\]'"):
        create_model(config, embedding_dim=0, root=ROOT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "resnet19"}, "Input should be 'resnet18', 'resnet34'"),
        ({"poling": "avg"}, "unknown parameter poling; allowed: type, .*pooling"),
        ({"pooling": "mean"}, "pooling\n.*'avg' or 'max'"),
        ({"pooling": None}, "type resnet18 needs `pooling`"),
        ({"input": None, "pooling": None}, "type resnet18 needs `pooling` and `input`"),
        ({"stride_in": "conv1"}, "stride_in 'conv1' is for resnet50, resnet101, resnet152 only, not for resnet18"),
        ({"model": "resnet18"}, "`model` is for type timm only"),
        ({"weights": "imagenet", "published": None}, "weights 'imagenet' needs `published`"),
        ({"weights": 3}, "weights\n.*valid string"),
        ({"published": {"url": "resnet18.pth", "sha256": "f37072fd"}}, "published.url\n"),
        ({"published": {"url": "https://example.org/a.pth", "sha256": "f370"}}, "published.sha256\n"),
        ({"input": {**ENTRIES["resnet18"]["input"], "channels": "GBR"}}, "input.channels\n.*'RGB' or 'BGR'"),
        ({"input": {**ENTRIES["resnet18"]["input"], "range": 2}}, "input.range\n.*1 or 255"),
        ({"input": {**ENTRIES["resnet18"]["input"], "std": [1, 0, 1]}}, "input.std.1\n.*greater than 0"),
        (
            {"input": {**ENTRIES["resnet18"]["input"], "means": [1, 1, 1]}},
            "input\n.*unknown parameter means; allowed: .*mean",
        ),
        ({"input": {**ENTRIES["resnet18"]["input"], "crop": 0}}, "input.crop\n.*greater than 0"),
        ({"type": "timm", "published": None, "model": "resnet18"}, "brings its own pooling and input"),
        ({"type": "timm"}, "type timm needs `model`"),
        ({"arguments": {"img_size": 96}}, "`arguments` is for type timm only"),
        (
            {"type": "timm", "model": "a", "pooling": None, "input": None, "published": None}
            | {"arguments": {"img_size": [96, 96]}},
            "arguments.img_size is the side of a square",
        ),
    ],
)
def test_bad_options_are_found_in_the_configuration(changes, message):
    with pytest.raises(ValidationError, match=message):
        config_of("resnet18", **changes)
