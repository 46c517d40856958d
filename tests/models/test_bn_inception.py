"""BN-Inception against a description of its own, written from the paper's table and the published file's names."""

import pytest
import torch
import torch.nn.functional as F

from cbml.models.bn_inception import BNInception

# (name, kernel, stride, inputs, outputs), layer by layer
STEM = [("conv1_7x7_s2", 7, 2, 3, 64), ("conv2_3x3_reduce", 1, 1, 64, 64), ("conv2_3x3", 3, 1, 64, 192)]
# block, inputs, 1x1, 3x3 reduce, 3x3, double reduce, double 1, double 2, pool projection, map size for 224 pixels
TABLE = """
    3a  192  64  64  64  64  96  96  32  28
    3b  256  64  64  96  64  96  96  64  28
    3c  320   - 128 160  64  96  96   -  14
    4a  576 224  64  96  96 128 128 128  14
    4b  576 192  96 128  96 128 128 128  14
    4c  576 160 128 160 128 160 160 128  14
    4d  608  96 128 192 160 192 192 128  14
    4e  608   - 128 192 192 256 256   -   7
    5a 1056 352 192 320 160 224 224 128   7
    5b 1024 352 192 320 192 224 224 128   7
"""


def layers():
    yield from STEM
    for row in TABLE.strip().splitlines():
        block, *cells = row.replace("-", "0").split()
        inputs, one, reduce, three, double_reduce, double_1, double_2, proj, _ = map(int, cells)
        stride = 1 if one else 2
        rows = [
            ("1x1", 1, 1, inputs, one),
            ("3x3_reduce", 1, 1, inputs, reduce),
            ("3x3", 3, stride, reduce, three),
            ("double_3x3_reduce", 1, 1, inputs, double_reduce),
            ("double_3x3_1", 3, 1, double_reduce, double_1),
            ("double_3x3_2", 3, stride, double_1, double_2),
            ("pool_proj", 1, 1, inputs, proj),
        ]
        yield from ((f"inception_{block}_{name}", *rest) for name, *rest in rows if rest[-1])


@pytest.fixture(scope="module")
def trunk():
    torch.manual_seed(0)
    return BNInception().eval()


def published_shapes():
    """Names and shapes of the trunk's entries in bn_inception-52deb4733.pth (which has no num_batches_tracked)."""
    shapes = {}
    for name, kernel, _, inputs, outputs in layers():
        shapes |= {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}
        shapes |= {f"{name}_bn.{entry}": (outputs,) for entry in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def test_names_and_shapes(trunk):
    own = {
        name: tuple(value.shape)
        for name, value in trunk.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert own == published_shapes()
    assert len(published_shapes()) == 69 * 6


def test_strides_and_padding(trunk):
    for name, kernel, stride, *_ in layers():
        conv = trunk.get_submodule(name)
        assert (conv.stride, conv.padding) == ((stride, stride), (kernel // 2, kernel // 2)), name


def test_parameters(trunk):
    by_hand = sum(kernel**2 * inputs * outputs + outputs + 2 * outputs for _, kernel, _, inputs, outputs in layers())
    assert sum(p.numel() for p in trunk.parameters()) == by_hand == 10_270_240
    assert by_hand + 1024 * 1000 + 1000 == 11_295_240  # with the classifier of 1,000 classes


@pytest.mark.parametrize("size", [224, 227])  # 227 gives the same maps but for the first convolution's
def test_feature_maps(trunk, size):
    shapes = {}
    hooks = [
        trunk.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: shapes.__setitem__(name, (args[0].shape[1], *out.shape[1:]))
        )
        for name, *_ in layers()
    ]
    with torch.no_grad():
        assert trunk(torch.zeros(1, 3, size, size)).shape == (1, 1024, 7, 7)
    for hook in hooks:
        hook.remove()
    sizes = {f"inception_{row.split()[0]}": int(row.split()[-1]) for row in TABLE.strip().splitlines()}
    stem = {224: (112, 56), 227: (114, 57)}[size]
    sizes |= {"conv1_7x7_s2": stem[0], "conv2_3x3_reduce": stem[1], "conv2_3x3": stem[1]}
    for name, _, _, inputs, outputs in layers():
        side = sizes[name if name in sizes else name[:12]]
        if name.endswith(("3x3_reduce", "double_3x3_1")) and name.startswith(("inception_3c", "inception_4e")):
            side *= 2  # before the stride
        assert shapes[name] == (inputs, outputs, side, side), name


@pytest.mark.parametrize("size", [33, 48, 56, 96])
def test_any_image_size(trunk, size):
    with torch.no_grad():
        out = trunk(torch.rand(1, 3, size, size + 16))
    assert out.shape[:2] == (1, 1024)
    assert out.isfinite().all()


def test_forward_against_a_literal_one(trunk):
    """Block by block with explicit layers, pooling as published: ceil mode, zeros counted in the averages."""

    def layer(x, name):
        return trunk.get_submodule(f"{name}_bn")(trunk.get_submodule(name)(x)).clamp(min=0)

    image = torch.randn(1, 3, 64, 64)
    x = F.max_pool2d(layer(image, "conv1_7x7_s2"), 3, 2, ceil_mode=True)
    x = F.max_pool2d(layer(layer(x, "conv2_3x3_reduce"), "conv2_3x3"), 3, 2, ceil_mode=True)
    for block in ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        name = f"inception_{block}"
        three = layer(layer(x, f"{name}_3x3_reduce"), f"{name}_3x3")
        double = layer(layer(layer(x, f"{name}_double_3x3_reduce"), f"{name}_double_3x3_1"), f"{name}_double_3x3_2")
        if block in ("3c", "4e"):
            x = torch.cat([three, double, F.max_pool2d(x, 3, 2, ceil_mode=True)], 1)
            continue
        pooled = (
            F.max_pool2d(x, 3, 1, 1, ceil_mode=True)
            if block == "5b"
            else F.avg_pool2d(x, 3, 1, 1, ceil_mode=True, count_include_pad=True)
        )
        x = torch.cat([layer(x, f"{name}_1x1"), three, double, layer(pooled, f"{name}_pool_proj")], 1)
    torch.testing.assert_close(trunk(image), x)
