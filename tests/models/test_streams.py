"""The composite trunk: where a stream looks, what its learners are, where gradients flow."""

import copy

import numpy as np
import pytest
import torch
from helpers import ROOT, config_of, entry
from pydantic import ValidationError
from torch import nn
from torch.nn.functional import interpolate

from cbml.errors import UserError
from cbml.models import create_model
from cbml.models.heads import Slices
from cbml.models.stages import Staged
from cbml.models.streams import Streams, StreamsTrunk, crop_salient, saliency, salient_boxes
from cbml.spec.method import parse_method

AFTER = {"googlenet": "inception4b", "bn_inception": "inception_4b", "resnet": "layer3"}
# What only each stage further on has, of a backbone.
BEHIND = {"resnet18": "layer4", "resnet50_caffe": "layer4", "googlenet": "inception5b", "bn_inception": "inception_5b"}


class Two(Staged):
    """A trunk of two stages, 8 × 8 maps to 4 × 4 ones."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.num_features = 5

    def steps(self):
        return [("first", self.first), ("second", lambda x: self.second(x).relu())]


def two_streams(streams=3, learners=3):
    torch.manual_seed(0)
    config = Streams(type="streams", streams=streams, learners=learners, after={"resnet": "first"}, width=2)
    return config.build(Two(), "resnet18")


def model_of(backbone, embedding_dim=18, **changes):
    torch.manual_seed(0)
    streams, head = Streams(type="streams", after=AFTER, width=4), Slices(type="slices")
    config = config_of(backbone, **changes)
    return create_model(config, embedding_dim=embedding_dim, root=ROOT, streams=streams, head=head)


def images(count=2, size=64):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255


# The crop


def map_with(*blobs, size=7):
    """A map that is zero but for squares (top, left, side, value)."""
    found = torch.zeros(1, 4, size, size)
    for top, left, side, value in blobs:
        found[:, :, top : top + side, left : left + side] = value
    return found


def literal_saliency(f, sigma, steps):
    """Of one map (C, h, w), as loops."""
    c, h, w = f.shape
    count = h * w
    go = np.zeros((count, count))
    for j in range(count):
        for k in range(count):
            unlike = sum((float(f[i, j // w, j % w]) - float(f[i, k // w, k % w])) ** 2 for i in range(c)) ** 0.5
            apart = (j // w - k // w) ** 2 + (j % w - k % w) ** 2
            go[j, k] = unlike * np.exp(-apart / (2 * (sigma * w) ** 2))
    for k in range(count):
        go[:, k] /= sum(go[:, k])
    found = np.full(count, 1 / count)
    for _ in range(steps):
        found = np.array([sum(go[j, k] * found[k] for k in range(count)) for j in range(count)])
    return found.reshape(h, w)


def literal_box(s, size):
    """Of one saliency, as loops: a flood fill of the enlarged map, and the square round the largest region."""
    levels = torch.from_numpy(np.floor(255 * (s - s.min()) / (s.max() - s.min())))
    big = interpolate(levels[None, None], (size, size), mode="bilinear", align_corners=False)[0, 0].numpy()
    todo = {(y, x) for y in range(size) for x in range(size) if big[y, x] > big.mean()}
    regions = []
    while todo:
        region, edge = set(), [min(todo)]
        while edge:
            y, x = edge.pop()
            if (y, x) in todo:
                todo.remove((y, x))
                region.add((y, x))
                edge += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        regions.append(region)
    region = max(regions, key=len)
    top, bottom = min(y for y, _ in region), max(y for y, _ in region) + 1
    left, right = min(x for _, x in region), max(x for _, x in region) + 1
    side = (bottom - top + right - left) // 2
    y, x = (top + bottom - side) // 2, (left + right - side) // 2
    return [min(max(y, 0), size - side), min(max(x, 0), size - side), side]


@pytest.mark.parametrize("side", [2, 4, 7])
def test_the_walk_and_its_box_are_those_of_loops(side):
    maps = torch.rand(3, 6, side, side, generator=torch.Generator().manual_seed(side))
    found = saliency(maps, 0.15, 10)
    expected = np.stack([literal_saliency(each, 0.15, 10) for each in maps])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(found.sum((1, 2)).numpy(), 1, rtol=1e-12)
    assert salient_boxes(found, (40, 40)).tolist() == [literal_box(each, 40) for each in expected]


@pytest.mark.parametrize("where", [(0, 0), (0, 5), (5, 5), (2, 3), (3, 3)], ids=str)
def test_the_square_is_round_the_blob_and_inside_the_image(where):
    """A blob of 2 × 2 positions of 7 × 7, in images of 70: each position is 10 pixels."""
    ((top, left, side),) = salient_boxes(saliency(map_with((*where, 2, 1.0))), (70, 70)).tolist()
    assert 20 < side < 70 and 0 <= top <= 70 - side and 0 <= left <= 70 - side
    y, x = 10 * where[0], 10 * where[1]
    assert top <= y and y + 20 <= top + side and left <= x and x + 20 <= left + side


def test_of_two_blobs_the_larger_one_counts():
    large, small = (0, 0, 3, 1.0), (5, 5, 1, 1.0)
    two, one = (salient_boxes(saliency(map_with(*blobs)), (70, 70)) for blobs in ([large, small], [large]))
    assert (two - one).abs().max() <= 10
    (top, left, side), mirrored = two[0].tolist(), salient_boxes(saliency(map_with(large, small).flip(2, 3)), (70, 70))
    assert (top, left) == (0, 0) and mirrored.tolist() == [[70 - side, 70 - side, side]]


@pytest.mark.parametrize("maps", [torch.zeros(2, 4, 7, 7), torch.full((2, 4, 7, 7), 0.37), torch.rand(2, 4, 1, 1)])
def test_without_a_blob_it_is_the_whole_image(maps):
    pixels = images(2, 32)
    assert salient_boxes(saliency(maps), (32, 32)).tolist() == [[0, 0, 32]] * 2
    assert torch.equal(crop_salient(pixels, maps), pixels)


def test_rounding_makes_no_blob():
    uniform = torch.full((1, 7, 7), 1 / 49, dtype=torch.float64)
    uniform[0, 2, 2] += 1e-15
    assert salient_boxes(uniform, (70, 70)).tolist() == [[0, 0, 70]]
    maps = torch.full((1, 4, 2, 2), 0.1)
    maps[0, 0, [0, 1], [1, 0]] = 0.3  # a chequerboard: no position is more salient than another
    assert salient_boxes(saliency(maps), (70, 70)).tolist() == [[0, 0, 70]]


def test_an_oblong_image_gets_a_square_too():
    assert salient_boxes(torch.full((1, 3, 5), 1 / 15, dtype=torch.float64), (30, 50)).tolist() == [[0, 10, 30]]


def test_each_crop_is_its_square_enlarged_and_no_gradient_flows():
    pixels, maps = images(3, 32).requires_grad_(), torch.rand(3, 4, 4, 4, requires_grad=True)
    found = crop_salient(pixels, maps)
    assert not found.requires_grad and found.shape == pixels.shape
    for image, crop, (top, left, side) in zip(
        pixels.detach(), found, salient_boxes(saliency(maps), (32, 32)).tolist(), strict=True
    ):
        square = image[None, :, top : top + side, left : left + side]
        assert torch.equal(crop[None], interpolate(square, 32, mode="bilinear", align_corners=False))
        assert crop.min() >= square.min() - 1e-3 and crop.max() <= square.max() + 1e-3  # nothing from outside of it
    for number in range(3):  # of an image alone, whatever the batch
        assert torch.equal(found[number], crop_salient(pixels[number : number + 1], maps[number : number + 1])[0])


# The trunk


def literal_streams(trunk, image):
    """The maps of one image (1, 3, H, W), learner by learner."""
    found, x = [], image
    for copy_, gates in zip(trunk.trunks, trunk.attentions, strict=True):
        if found:
            (top, left, side) = literal_box(literal_saliency(found[-len(gates)][0], 0.15, 10), image.shape[-1])
            x = interpolate(x[:, :, top : top + side, left : left + side], image.shape[-2:], mode="bilinear")
        for gate in gates:
            y = copy_.first(x)
            hidden = (gate[0].weight[:, :, 0, 0] @ y[0].flatten(1) + gate[0].bias[:, None]).clamp(min=0)
            gated = torch.sigmoid(gate[2].weight[:, :, 0, 0] @ hidden + gate[2].bias[:, None])
            found.append(copy_.second(y * gated.view_as(y)).relu())
    return torch.cat(found, 1)


@torch.no_grad()
def test_streams_equal_a_loop_over_images_and_learners():
    trunk, batch = two_streams(), images(4, 8) / 255
    for module in trunk.attentions.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias)
    found = trunk(batch)
    assert found.shape == (4, 9 * 5, 4, 4) and trunk.num_features == 45
    expected = torch.cat([literal_streams(trunk, image[None]) for image in batch])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    again, first, second = trunk(batch, ("first", "second"))
    assert torch.equal(again, found) and torch.equal(second, found)
    assert first.shape == (4, 9 * 4, 8, 8)


def test_each_copy_begins_with_the_backbones_own_weights():
    trunk = two_streams()
    states = [each.state_dict() for each in trunk.trunks]
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in states[0])
    pointers = {parameter.data_ptr() for parameter in trunk.parameters()}
    assert len(pointers) == len(list(trunk.parameters()))  # and shares none of them


@pytest.mark.parametrize("backbone", ["resnet18", "googlenet", "resnet50_caffe", "bn_inception"])
def test_the_parts_are_the_learners_and_streams_do_not_reach_into_each_other(backbone):
    model = model_of(backbone)
    assert model.parts == [2] * 9 and model.num_features == 9 * model_of_one(model)
    outputs = model.outputs(images(), ("features", "map"))
    torch.testing.assert_close(outputs.embeddings.norm(dim=1), torch.ones(2))
    deepest, names = BEHIND[backbone], dict(model.named_parameters())
    for part in (0, 4, 8):
        stream, learner = divmod(part, 3)
        part_of = outputs.embeddings[:, 2 * part : 2 * part + 1].sum()
        found = torch.autograd.grad(part_of, list(names.values()), allow_unused=True, retain_graph=True)
        reached = {name for name, each in zip(names, found, strict=True) if each is not None and each.abs().sum() > 0}
        own = (f"trunk.trunks.{stream}.", f"trunk.attentions.{stream}.{learner}.", f"head.streams.{stream}.")
        assert all(name.startswith(own) for name in reached)
        assert any(name.startswith(f"trunk.trunks.{stream}.{deepest}") for name in reached)
        assert {name for name in names if name.startswith(own[1:])} <= reached


def model_of_one(model):
    return model.trunk.trunks[0].num_features


def test_a_projection_gets_the_gradients_of_all_learners_of_its_stream():
    model = model_of("resnet18")
    features = torch.rand(2, model.num_features, generator=torch.Generator().manual_seed(0))
    per = model.num_features // 9
    raw = model.head(features)
    for part in range(9):
        weight = model.head.streams[part // 3].weight
        slice_ = features[:, per * part : per * (part + 1)]
        torch.testing.assert_close(raw[:, 2 * part : 2 * part + 2], slice_ @ weight.T)
    (of_all,) = torch.autograd.grad(raw[:, 6:12].sum(), model.head.streams[1].weight, retain_graph=True)
    expected = features[:, 3 * per : 6 * per].view(2, 3, per).sum((0, 1)).expand(2, -1)
    torch.testing.assert_close(of_all, expected)
    (of_another,) = torch.autograd.grad(raw[:, :6].sum(), model.head.streams[1].weight)
    assert of_another.abs().max() == 0


def test_the_head_and_the_attentions_are_new():
    model = model_of("resnet18")
    new = {id(parameter) for parameter in model.new_parameters}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in new}
    assert names == {n for n, _ in model.named_parameters() if n.startswith(("head.", "trunk.attentions."))}
    assert len(names) == 3 + 9 * 4


def test_an_embedding_does_not_depend_on_its_batch_and_survives_its_state_dict():
    model = model_of("resnet18").eval()
    with torch.no_grad():
        together = model(images(3))
        torch.testing.assert_close(together[1:2], model(images(3)[1:2]), rtol=1e-4, atol=1e-5)
        other = model_of("resnet18").eval()
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(other(images(3)), together)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: model_of("resnet18", 512),
            "slices: embedding_dim 512 has no 9 parts of equal size; .* multiples of 9",
        ),
        (lambda: model_of("resnet18", 0), "slices: embedding_dim 0 has no 9 parts"),
        (
            lambda: Streams(type="streams", after={"vgg": "a"}).build(Two(), "resnet18"),
            "trunk streams: no taps for backbones of type resnet18; there are for vgg",
        ),
        (
            lambda: Streams(type="streams", after={"resnet": "third"}).build(Two(), "resnet18"),
            "trunk streams: the trunk has no stage 'third'; allowed: first, second",
        ),
        (
            lambda: Streams(type="streams", after={"timm": "blocks"}).build(nn.Flatten(), "timm"),
            "trunk streams: taps blocks: this trunk has no stages",
        ),
        (
            lambda: create_model(config_of("resnet18"), embedding_dim=9, root=ROOT, head=Slices(type="slices")),
            "head slices: 512 features do not divide into 9 slices; allowed: .* as many streams",
        ),
    ],
    ids=["512", "no head", "backbone", "stage", "no stages", "plain trunk"],
)
def test_what_does_not_fit_is_one_line(build, message):
    with pytest.raises(UserError, match=message) as raised:
        build()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", [{"streams": 9, "learners": 1}, {"learners": 2}], ids=str)
def test_slices_of_other_streams_are_refused(change):
    config = entry("loss", "deml")
    config["head"] |= change
    with pytest.raises(ValidationError, match="3 streams of 3 learners, head slices is for .* the same numbers"):
        parse_method(config)


def test_streams_are_counted():
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Streams(type="streams", streams=0, after=AFTER)
    trunk = two_streams(streams=2, learners=1)
    assert isinstance(trunk, StreamsTrunk) and trunk(images(1, 8)).shape == (1, 10, 4, 4)
