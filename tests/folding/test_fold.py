"""fold: equal to fn in float64, whatever the layout and the order of operations; and refusals."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn._folding.program import bodies
from jaxbn._folding.training_mode import batch_statistics
from tests.support import oracle
from tests.support.folding import IMAGES, affines, equations, normal
from tests.support.networks import ResNet

# Two float32 results, each off by its own rounding: of kernels, of sums of up to 300 products.
TOLERANCE = 2 * oracle.tolerance("float32", 300)


ONE_AFFINE = "; now one multiplication and one addition"


class Norm(NamedTuple):
    """Params and State of one norm; a scale that is negative, and one that is 0."""

    params: jaxbn.Params
    state: jaxbn.State
    axis: int | tuple[int, ...]

    def __call__(self, x):
        return jaxbn.batch_norm(x, self.params, self.state, train=False, axis=self.axis)[0]

    def in_float64(self, x):
        scale, bias, mean, var = map(np.float64, (*self.params, *self.state[:2]))
        axes = tuple(a % x.ndim for a in np.atleast_1d(self.axis))
        shape = [n if a in axes else 1 for a, n in enumerate(x.shape)]
        scale, bias, mean, var = (v.reshape(shape) for v in (scale, bias, mean, var))
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def norm(*features, axis=-1, seed=1):
    rng = np.random.default_rng(seed)
    scale, bias, mean = np.float32(rng.normal(size=(3, *features)))
    scale.flat[:2] = (-1.5, 0)[: scale.size]
    var = np.float32(rng.uniform(0.1, 3, features))
    return Norm(jaxbn.Params(scale, bias), jaxbn.State(mean, var, None), axis)


# Every convolution and every dot

N2, N1, N3 = ("NHWC", "HWIO", "NHWC"), ("NWC", "WIO", "NWC"), ("NDHWC", "DHWIO", "NDHWC")
CONVS = {  # x, kernel, layout, options of the convolution
    "1-D": ((2, 9, 3), (3, 3, 4), N1, {}),
    "2-D": ((2, 6, 6, 3), (3, 3, 3, 4), N2, {}),
    "3-D": ((2, 4, 4, 4, 2), (3, 3, 3, 2, 3), N3, {}),
    "channels first": ((2, 3, 6, 6), (4, 3, 3, 3), ("NCHW", "OIHW", "NCHW"), {}),
    "odd layout": ((3, 6, 2, 5), (3, 4, 2, 3), ("CHNW", "IOHW", "HWCN"), {"padding": "VALID"}),
    "depthwise": ((2, 6, 6, 4), (3, 3, 1, 4), N2, {"feature_group_count": 4}),
    "multiplier 2": ((2, 6, 6, 3), (3, 3, 1, 6), N2, {"feature_group_count": 3}),
    "grouped": ((2, 6, 6, 4), (3, 3, 2, 6), N2, {"feature_group_count": 2}),
    "batch groups": ((4, 6, 6, 3), (3, 3, 3, 6), N2, {"batch_group_count": 2}),
    "transposed": (
        (2, 4, 4, 3),
        (3, 3, 3, 4),
        N2,
        {"lhs_dilation": (2, 2), "padding": [(2, 1)] * 2},
    ),
    "dilated": ((2, 8, 8, 3), (3, 3, 3, 4), N2, {"rhs_dilation": (2, 2)}),
    "strided, cropped": ((2, 9, 9, 3), (3, 3, 3, 4), N2, {"padding": [(-1, 0), (1, 0)]}),
}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", CONVS)
def test_a_norm_after_a_convolution_is_gone(name, bias):
    shape, kernel_shape, layout, options = CONVS[name]
    features = kernel_shape[layout[1].index("O")]
    axis = layout[2].index("C")
    after = norm(features, axis=axis)
    kernel, c = normal(2, *kernel_shape), normal(3, features)
    spread = [features if a == axis else 1 for a in range(len(shape))]
    options = {"padding": "SAME", "window_strides": (1,) * (len(shape) - 2)} | options
    if name == "strided, cropped":
        options["window_strides"] = (2, 1)

    def conv(x, kernel, c):
        y = lax.conv_general_dilated(x, kernel, dimension_numbers=layout, **options)
        return y + c.reshape(spread) if bias else y

    def fn(x):
        return after(conv(x, kernel, c))

    batch = layout[0].index("N")
    x = normal(4, *shape)
    folded, report = jaxbn.fold(fn, x)
    more = np.concatenate([x, 2 * x], batch)
    with jax.enable_x64(True):
        want = after.in_float64(np.asarray(conv(*map(np.float64, (more, kernel, c)))))
    oracle.assert_close(folded(more), want, TOLERANCE)
    assert affines(folded, more) == {"add": 1}
    (site,) = report.sites
    assert site.folded
    assert site.note == ("add, " if bias else "") + "sub, mul, add"
    assert site.relative <= report.tolerance == 1e-5


DOTS = {  # x, kernel, einsum, features of the norm, their axes
    "dense": ((5, 6), (6, 4), "bi,io->bo", (4,), -1),
    "tokens": ((2, 5, 6), (6, 4), "bti,io->bto", (4,), -1),
    "heads": ((2, 5, 6), (6, 2, 3), "bti,ihd->bthd", (2, 3), (2, 3)),
    "heads apart": ((2, 5, 6), (6, 2, 3), "bti,ihd->bhtd", (2, 3), (1, 3)),
    "features first": ((6, 5), (4, 6), "ib,oi->ob", (4,), 0),
    "two contracted": ((5, 2, 3), (4, 3, 2), "bij,oji->bo", (4,), -1),
    "ensemble": ((3, 5, 6), (3, 6, 4), "kbi,kio->kbo", (3, 4), (0, 2)),
    "ensemble, shuffled": ((5, 3, 6), (4, 3, 6), "bki,oki->bok", (4, 3), (1, 2)),
}


@pytest.mark.parametrize("name", DOTS)
def test_a_norm_after_a_dot_is_gone(name):
    shape, kernel_shape, formula, features, axis = DOTS[name]
    after, kernel, x = norm(*features, axis=axis), normal(2, *kernel_shape), normal(4, *shape)
    folded, report = jaxbn.fold(lambda x: after(jnp.einsum(formula, x, kernel)), x)
    want = after.in_float64(np.einsum(formula, np.float64(x), np.float64(kernel)))
    oracle.assert_close(folded(x), want, TOLERANCE)
    assert affines(folded, x) == {"add": 1}
    assert [site.folded for site in report.sites] == [True]


@pytest.mark.parametrize("seed", range(6))
def test_affines_in_any_order_between_reshapes_and_transposes(seed):
    rng = np.random.default_rng(seed)
    kernel, x = normal(seed, 3, 3, 3, 4), normal(seed + 1, 2, 6, 6, 3)
    kinds = ["+", "-", "from", "*", "/", "neg", "scalars", "move"]
    steps = [
        (kind, rng.uniform(0.3, 2, 4) * rng.choice([-1, 1], 4)) for kind in rng.choice(kinds, 9)
    ]

    def run(x, kernel):
        y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=N2)
        for kind, k in steps:
            k = jnp.asarray(k, y.dtype).reshape((1, 1, 1, 4) if y.ndim == 4 else (1, 4, 1))
            y = {
                "+": lambda y, k: k + y,
                "-": lambda y, k: y - k,
                "from": lambda y, k: k - y,
                "*": lambda y, k: jnp.broadcast_to(k, y.shape) * y,
                "/": lambda y, k: y / k,
                "neg": lambda y, k: -y,
                "scalars": lambda y, k: 0.5 * y + 1,
                "move": lambda y, k: (
                    y.reshape(-1, 36, 4).transpose(0, 2, 1)  # [B, C, H W]
                    if y.ndim == 4
                    else y[:, None].swapaxes(1, 3).reshape(-1, 6, 6, 4)
                ),
            }[kind](y, k)
        return y

    folded, report = jaxbn.fold(lambda x: run(x, kernel), x)
    with jax.enable_x64(True):
        want = np.asarray(run(np.float64(x), np.float64(kernel)))
    oracle.assert_close(folded(x), want, 4 * TOLERANCE)  # offsets may cancel
    assert set(affines(folded, x)) <= {"add"}
    assert [site.folded for site in report.sites] == [True]


# Whole networks


def randomized(tree, seed=0):
    """Every leaf random: variances positive, scales of both signs and some 0."""
    rng = np.random.default_rng(seed)

    def leaf(path, v):
        name = jax.tree_util.keystr(path)
        if "var" in name:
            return jnp.asarray(rng.uniform(0.5, 2, v.shape), v.dtype)
        value = rng.normal(size=v.shape) * (0.3 if "kernel" in name else 1)
        if "scale" in name:
            value[0] = 0
        return jnp.asarray(value, v.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


@pytest.fixture(scope="module")
def resnet():
    """fn, folded, report of a ResNet of ours."""
    model = ResNet(jaxbn.linen.BatchNorm, stages=(1, 1), width=4)
    variables = randomized(jax.eval_shape(model.init, jax.random.key(0), IMAGES))

    def fn(x):
        return model.apply(variables, x, train=False)

    return jax.jit(fn), *jaxbn.fold(fn, IMAGES)


def test_the_report_of_a_resnet_names_each_module(resnet):
    _, _, report = resnet
    assert [site.name for site in report.sites] == [
        "0 conv 3x3, 3 -> 4 ResNet/conv_init",
        "1 conv 3x3, 4 -> 4 ResNet/Block_0/Conv_0",
        "2 conv 3x3, 4 -> 4 ResNet/Block_0/Conv_1",
        "3 conv 3x3, 4 -> 8 ResNet/Block_1/Conv_0",
        "4 conv 3x3, 8 -> 8 ResNet/Block_1/Conv_1",
        "5 conv 1x1, 4 -> 8 ResNet/Block_1/conv_proj",
        "6 dense 8 -> 10 ResNet/Dense_0",
    ]
    assert [site.folded for site in report.sites] == [True] * 6 + [None]
    assert report.sites[0].note == "sub, mul, add of ResNet/bn_init"
    assert report.sites[6] == (report.sites[6].name, None, "a bias alone follows", None, None)
    assert 0 < max(site.relative for site in report.folded) <= 1e-5
    assert 0 < report.relative <= 1e-5
    lines = str(report).splitlines()
    assert len(lines) == len(report.sites) + 2
    assert lines[0].split() == [
        *("site", "folded", "what", "or", "why", "not", "absolute", "relative")
    ]
    assert lines[-1].split()[:5] == ["result", "6", "sites", "of", "7"]
    assert len({line.rstrip().rfind(" ") for line in lines[:7]}) <= 2  # columns stand in line


def test_a_resnet_folded_equals_float64_and_no_affine_is_left(resnet):
    fn, folded, _ = resnet
    x = normal(5, 5, 8, 8, 3)  # another batch size
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        model = ResNet(nn.BatchNorm, stages=(1, 1), width=4, dtype=jnp.float64)
        variables = jax.eval_shape(model.init, jax.random.key(0), np.float64(x))
        variables = jax.tree.map(lambda v: v.astype(jnp.float64), randomized(variables))
        want = np.asarray(model.apply(variables, np.float64(x), train=False))
    oracle.assert_close(folded(x), want, 1e-5)
    assert affines(fn, x)["mul"] == 6
    assert affines(folded, x) == {"add": 7}  # a bias after each convolution and dense layer
    primitives = [name for name, _ in equations(jax.make_jaxpr(folded)(x).jaxpr)]
    assert primitives.count("conv_general_dilated") == 6


def test_folded_works_under_jit_vmap_and_grad(resnet):
    fn, folded, _ = resnet
    x, dy = normal(6, 3, 2, 8, 8, 3), normal(7, 2, 10)
    oracle.assert_close(jax.jit(folded)(x[0]), np.float64(fn(x[0])), 1e-5)
    flat = np.float64(fn(x.reshape(6, 8, 8, 3))).reshape(3, 2, 10)
    oracle.assert_close(jax.vmap(folded)(x), flat, 1e-5)
    got, want = (jax.jit(jax.grad(lambda x, f=f: (f(x) * dy).sum()))(x[0]) for f in (folded, fn))
    oracle.assert_close(got, np.float64(want), 1e-5)


def test_folded_is_exported_with_a_symbolic_batch(resnet):
    fn, folded, _ = resnet
    (b,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 8, 8, 3), jnp.float32)
    exported = export.export(folded, platforms=("cpu", "cuda", "tpu"))(x)
    assert "stablehlo.rsqrt" not in exported.mlir_module()
    loaded = export.deserialize(exported.serialize())
    for rows in (1, 6):
        x = normal(rows, rows, 8, 8, 3)
        oracle.assert_close(loaded.call(x), np.float64(fn(x)), 1e-5)


def test_folded_on_a_batch_that_is_split_over_devices(resnet):
    fn, folded, _ = resnet
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,))
    x = normal(8, 8, 8, 8, 3)
    split = jax.device_put(x, NamedSharding(mesh, P("d")))
    oracle.assert_close(folded(split), np.float64(fn(x)), 1e-5)


@pytest.mark.parametrize("features", [None, "m"])
def test_weights_on_explicit_mesh_axes(features):
    """Whole on each device, or the features in parts."""
    mesh = jax.make_mesh((2, 2), ("d", "m"))
    put = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, P(*spec)))  # noqa: E731
    kernel, x = normal(0, 3, 4), normal(1, 8, 3)
    norm = Norm(
        jaxbn.Params(*normal(2, 2, 4)), jaxbn.State(normal(3, 4), normal(4, 4) ** 2, None), -1
    )

    def fn(x, kernel, norm):
        return norm(x @ kernel)

    params, state = put((norm.params, norm.state), features)
    placed = functools.partial(fn, kernel=put(kernel, None, features), norm=Norm(params, state, -1))
    folded, report = jaxbn.fold(placed, put(x, "d"))
    assert [site.folded for site in report.sites] == [True]
    oracle.assert_close(folded(put(x, "d")), np.float64(fn(x, kernel, norm)), 1e-5)


def constants(jaxpr_and_consts):
    jaxpr, consts = jaxpr_and_consts
    yield from (c for c in consts if np.ndim(c) == 4 and c.shape[0] == 3)
    for eqn in jaxpr.eqns:
        for body in bodies(eqn):
            yield from constants(body)


def test_kernels_are_folded_once_for_all_batch_sizes(resnet):
    _, folded, _ = resnet
    kernels = []
    for rows in (2, 4):
        closed = jax.make_jaxpr(folded)(normal(0, rows, 8, 8, 3))
        kernels.append([id(c) for c in constants((closed.jaxpr, closed.consts))])
    assert len(kernels[0]) == 5
    assert kernels[0] == kernels[1]


# What is read twice, and norms on the other side


def conv(x, kernel, padding="VALID"):
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=N2)


KERNEL = normal(11, 3, 3, 3, 4)
SQUARE = normal(12, 3, 3, 4, 4)


def notes(report):
    return [(site.name, site.folded, site.note) for site in report.sites]


def test_a_norm_stays_where_its_convolution_is_read_before_it():
    after = norm(4)

    def fn(x):
        y = conv(x, KERNEL)
        return jax.nn.relu(after(y)) + y

    folded, report = jaxbn.fold(fn, IMAGES)
    oracle.assert_close(folded(IMAGES), np.float64(jax.jit(fn)(IMAGES)), TOLERANCE)
    assert notes(report) == [
        ("0 conv 3x3, 3 -> 4", None, "read by sub and add"),
        (
            "1 norm of 4 channels",
            False,
            f"after conv 3x3, 3 -> 4, which is read by sub and add, before relu{ONE_AFFINE}",
        ),
    ]
    primitives = [name for name, _ in equations(jax.make_jaxpr(folded)(IMAGES).jaxpr)]
    assert primitives.count("conv_general_dilated") == 1


def test_a_norm_that_is_read_twice_is_folded_once():
    """By two convolutions, and by a residual branch."""
    after = norm(4)

    def fn(x):
        y = after(conv(x, KERNEL))
        return conv(y, SQUARE, "SAME") + conv(y, SQUARE, "SAME") * 2 + y

    folded, report = jaxbn.fold(fn, IMAGES)
    with jax.enable_x64(True):
        y = after.in_float64(np.asarray(conv(np.float64(IMAGES), np.float64(KERNEL))))
        want = np.asarray(3 * conv(y, np.float64(SQUARE), "SAME")) + y
    oracle.assert_close(folded(IMAGES), want, TOLERANCE)
    assert [site.note for site in report.sites] == ["sub, mul, add", "read by add", "mul"]
    primitives = [name for name, _ in equations(jax.make_jaxpr(folded)(IMAGES).jaxpr)]
    assert primitives.count("conv_general_dilated") == 3


def test_one_kernel_with_two_norms_becomes_two_kernels():
    first, second = norm(4, seed=1), norm(4, seed=2)
    x = normal(13, 2, 6, 6, 4)

    def fn(x):
        return second(conv(jax.nn.relu(first(conv(x, SQUARE, "SAME"))), SQUARE, "SAME"))

    folded, report = jaxbn.fold(fn, x)
    assert len(report.folded) == 2
    with jax.enable_x64(True):
        y = first.in_float64(np.asarray(conv(np.float64(x), np.float64(SQUARE), "SAME")))
        y = np.asarray(conv(np.maximum(y, 0), np.float64(SQUARE), "SAME"))
    oracle.assert_close(folded(x), second.in_float64(y), 2 * TOLERANCE)


BEFORE = {  # features of x, kernel, options
    "valid": (3, (3, 3, 3, 4), {}),
    "grouped": (4, (3, 3, 2, 6), {"feature_group_count": 2}),
    "depthwise": (4, (3, 3, 1, 8), {"feature_group_count": 4}),
    "strided, dilated": (3, (3, 3, 3, 4), {"window_strides": (2, 2), "rhs_dilation": (2, 1)}),
    "cropped": (3, (3, 3, 3, 4), {"padding": [(-1, 0), (0, -2)]}),
}


@pytest.mark.parametrize("name", BEFORE)
def test_a_norm_before_a_convolution_without_padding_is_gone(name):
    features, shape, options = BEFORE[name]
    before, kernel, x = norm(features), normal(2, *shape), normal(3, 2, 9, 9, features)
    after = norm(shape[-1], seed=5)
    options = {"window_strides": (1, 1), "padding": "VALID"} | options

    def run(x, kernel):
        return lax.conv_general_dilated(x, kernel, dimension_numbers=N2, **options)

    folded, report = jaxbn.fold(lambda x: after(run(before(x), kernel)), x)
    with jax.enable_x64(True):
        y = np.asarray(run(before.in_float64(np.float64(x)), np.float64(kernel)))
    oracle.assert_close(folded(x), after.in_float64(y), TOLERANCE)
    assert affines(folded, x) == {"add": 1}
    assert [site.note for site in report.sites] == ["sub, mul, add before; sub, mul, add"]


def test_a_norm_before_padding_stays_unless_its_offset_is_zero():
    before = norm(3)
    folded, report = jaxbn.fold(lambda x: conv(before(x), KERNEL, "SAME"), IMAGES)
    oracle.assert_close(folded(IMAGES), np.float64(conv(before(IMAGES), KERNEL, "SAME")), 1e-6)
    assert notes(report) == [
        (
            "0 norm of 3 channels",
            False,
            "after the input, before conv pads with zeros, which the offset does not reach"
            + ONE_AFFINE,
        ),
        ("1 conv 3x3, 3 -> 4", None, "read by the caller"),
    ]
    spread = functools.partial(
        lax.conv_general_dilated,
        dimension_numbers=N2,
        window_strides=(1, 1),
        padding=((0, 0), (0, 0)),
    )
    _, report = jaxbn.fold(lambda x: spread(before(x), KERNEL, lhs_dilation=(2, 2)), IMAGES)
    assert [site.folded for site in report.sites] == [False, None]
    scale = normal(4, 1, 1, 1, 3)
    folded, report = jaxbn.fold(lambda x: conv(x / scale, KERNEL, "SAME"), IMAGES)
    with jax.enable_x64(True):
        want = conv(np.float64(IMAGES) / np.float64(scale), np.float64(KERNEL), "SAME")
    oracle.assert_close(folded(IMAGES), np.asarray(want), TOLERANCE)
    assert affines(folded, IMAGES) == {}
    assert report.sites[0].note == "div before"


def test_a_norm_between_dots_of_other_axes():
    """Before a dot: folded where the dot sums over its channels, and else not."""
    x, kernel, mix = normal(1, 4, 5, 6), normal(2, 6, 3), normal(3, 5, 7)
    before = norm(6)
    folded, report = jaxbn.fold(lambda x: jnp.einsum("bti,io->bto", before(x), kernel), x)
    want = before.in_float64(np.float64(x)) @ np.float64(kernel)
    oracle.assert_close(folded(x), want, TOLERANCE)
    assert report.sites[0].note == "sub, mul, add before"
    _, report = jaxbn.fold(lambda x: jnp.einsum("bti,ts->bsi", before(x), mix), x)
    assert report.sites[0].note == f"after the input, before dot sums over other axes{ONE_AFFINE}"


def test_what_is_no_affine_of_each_channel_is_left_alone():
    """A position, an affine of the data, 1 / y, and a reshape that mixes channels."""
    position, after, x = normal(3, 1, 6, 6, 4), norm(4), normal(4, 2, 6, 6, 3)
    flat = normal(5, 1, 144)

    def fn(x):
        y = conv(x, KERNEL, "SAME") + position
        z = conv(x, KERNEL, "SAME") * jax.nn.sigmoid(y)
        w = 1 / (2 + jnp.square(after(conv(x, KERNEL, "SAME"))))
        v = conv(x, KERNEL, "SAME").reshape(-1, 144) * flat
        return y + z + w + v.reshape(y.shape)

    folded, report = jaxbn.fold(fn, x)
    oracle.assert_close(folded(x), np.float64(fn(x)), 1e-5)
    assert [site.folded for site in report.sites] == [None, None, True, None, False]


def test_a_loop_is_named_and_not_looked_into():
    kernels, after = normal(5, 3, 4, 4), norm(4)

    def fn(x):
        y, _ = lax.scan(
            lambda y, w: (jax.nn.relu(after(y @ w)), None), after(x @ kernels[0]), kernels
        )
        return y

    _, report = jaxbn.fold(fn, normal(6, 5, 4))
    assert notes(report) == [
        ("0 dense 4 -> 4", True, "sub, mul, add"),
        ("1 convolutions or dots", False, "inside scan, which is not looked into; unroll it"),
    ]


def test_a_derivative_of_its_own_is_kept():
    """That of relu at 0 is 0, where max has 1/2."""
    kernel, after = normal(5, 3, 2), norm(2)._replace(params=jaxbn.Params(None, None))
    after = after._replace(state=after.state._replace(mean=np.zeros(2, np.float32)))
    folded, _ = jaxbn.fold(lambda x: jax.nn.relu(after(x @ kernel)), normal(6, 4, 3))
    assert not jax.grad(lambda x: folded(x).sum())(np.zeros((1, 3), np.float32)).any()


def test_calls_that_hold_a_convolution_are_opened():
    after = norm(4)

    @jax.custom_vjp
    def block(x):
        return jax.checkpoint(jax.jit(lambda x: after(conv(x, KERNEL))))(x)

    block.defvjp(lambda x: (block(x), x), lambda x, dy: (dy,))
    folded, report = jaxbn.fold(lambda x: jax.nn.relu(block(x)), IMAGES)
    assert affines(folded, IMAGES) == {"add": 1}
    assert len(report.folded) == 1


# Types


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_keep_their_dtype_and_report_an_honest_error(dtype):
    """As far from the truth as fn is, to a small factor; fn rounds x, kernel and result."""
    after = norm(4)
    after = after._replace(params=after.params._replace(scale=after.params.scale + 2))
    with jax.enable_x64(dtype == "float64"):
        if dtype == "float64":
            params, state = jax.tree.map(np.float64, after[:2])
            after = Norm(params, state, -1)
        x, kernel = jnp.asarray(IMAGES, dtype), jnp.asarray(KERNEL, dtype)
        folded, report = jaxbn.fold(lambda x: after(conv(x, kernel)), x)
        got, plain = folded(x), after(conv(x, kernel))
    with jax.enable_x64(True):
        want = after.in_float64(np.asarray(conv(np.float64(x), np.float64(kernel))))
    assert got.dtype == plain.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    assert report.tolerance == {"float64": 1e-12}.get(dtype, 4 * eps)
    assert 0 < report.relative <= 2 * eps if dtype != "float64" else report.relative < 1e-14
    oracle.assert_close(got, want, oracle.tolerance(dtype, 27) + 2 * eps)


def test_a_tree_of_arguments_and_of_results():
    after, kernel = norm(4), normal(2, 3, 4)

    def fn(batch, temperature):
        y = after(batch["x"] @ kernel)
        return {"logits": y / temperature, "label": y.argmax(-1)}, batch["id"]

    x = {"x": normal(3, 5, 3), "id": np.arange(5)}
    folded, _ = jaxbn.fold(fn, x, np.float32(2))
    got, want = folded(x, np.float32(2)), fn(x, np.float32(2))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    oracle.assert_close(got[0]["logits"], np.float64(want[0]["logits"]), TOLERANCE)
    np.testing.assert_array_equal(got[1], x["id"])


# What is refused


def test_an_error_above_tolerance_names_its_site():
    """A mean a million standard deviations off: float32 has no digits left, folded or not."""
    good, bad = norm(4), norm(4, seed=2)
    bad = bad._replace(state=bad.state._replace(mean=np.float32([1e6, 0, 0, 0])))

    def fn(x):
        with jax.named_scope("stem"):
            y = jax.nn.relu(good(conv(x, KERNEL)))
        with jax.named_scope("head"):
            return bad(conv(y, SQUARE) + np.float32([1e6, 0, 0, 0]).reshape(1, 1, 1, 4))

    _, report = jaxbn.fold(fn, IMAGES, tolerance=np.inf)
    stem, head = report.sites
    assert head.relative > 1e-4 > 1e-5 > stem.relative
    with pytest.raises(ValueError) as error:
        jaxbn.fold(fn, IMAGES)
    assert str(error.value) == (
        f"fold: folding changes fn's result by {report.relative:.1e} of its largest value, and "
        f"the result of site '1 conv 3x3, 4 -> 4 head' alone, more than any other, by "
        f"{head.relative:.1e}; expected 1.0e-05 at most. A running mean far beyond its standard "
        f"deviation, or a var near 0, amplifies rounding: recalibrate the statistics, or accept "
        f"it by tolerance={max(head.relative, report.relative) * 2:.0e}."
    )


def test_a_nan_where_fn_has_none_is_an_error():
    scale = np.float32([[np.inf, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"the result of site '0 dense 3 -> 4' alone.* by inf"):
        jaxbn.fold(lambda x: x @ KERNEL[0, 0] * scale, IMAGES[0, 0])


def test_weights_that_change_after_the_fold_are_noticed():
    weights = {"kernel": normal(2, 3, 4), "norm": norm(4)}
    folded, _ = jaxbn.fold(lambda x: weights["norm"](x @ weights["kernel"]), IMAGES[0, 0])
    before = folded(IMAGES[0, 0])
    weights["norm"] = norm(4, seed=9)
    np.testing.assert_array_equal(folded(IMAGES[0, 0]), before)
    with pytest.raises(ValueError) as error:
        folded(IMAGES[0, 0, :3])
    assert str(error.value) == (
        "fold: the weights that fn closes over have changed since it was folded; fold again: "
        "folded, report = jaxbn.fold(fn, x)."
    )


def test_a_constant_may_follow_the_batch_size():
    kernel, after = normal(2, 3, 4), norm(4)

    def fn(x):
        return after(x @ kernel) * np.float32(1 / x.shape[0])

    folded, _ = jaxbn.fold(fn, IMAGES[0, 0])
    oracle.assert_close(folded(IMAGES[0, 0, :3]), np.float64(fn(IMAGES[0, 0, :3])), TOLERANCE)


KERNEL_2 = normal(1, 3, 4)
REFUSED = {
    "no function": (
        lambda: jaxbn.fold({"w": KERNEL_2}, IMAGES),
        "fold: fn is a dict, expected an inference function with its weights closed over; write "
        "jaxbn.fold(lambda x: model.apply(variables, x), x).",
    ),
    "no example": (
        lambda: jaxbn.fold(lambda: KERNEL_2),
        "fold: no example arguments, expected a batch to trace fn with; write jaxbn.fold(fn, x).",
    ),
    "no array": (
        lambda: jaxbn.fold(lambda x, mode: x, IMAGES, {"mode": "eval"}),
        "fold: example_args[1]['mode'] is a str, expected an array; close over what is none: "
        "jaxbn.fold(lambda x: fn(x, option), x).",
    ),
    "tolerance": (
        lambda: jaxbn.fold(lambda x: x, IMAGES, tolerance=0.0),
        "fold: tolerance=0.0, expected a relative error above 0; write tolerance=1e-5.",
    ),
    "weights as arguments": (
        lambda: jaxbn.fold(lambda w, x: norm(4)(x @ w), KERNEL_2, IMAGES[0, 0]),
        "fold: no convolution or dot of fn has a constant kernel (there are 1), so there is "
        "nothing to fold into; close over concrete weights and pass data alone: "
        "jaxbn.fold(lambda x: model.apply(variables, x), x).",
    ),
    "no norm": (
        lambda: jaxbn.fold(lambda x: x @ KERNEL_2 + np.ones((1, 4), np.float32), IMAGES[0, 0]),
        "fold: fn has no norm to fold: of its 1 convolutions and dots, none is followed by more "
        "than a bias; expected a network with batch norms, in inference mode.",
    ),
    "no dot": (
        lambda: jaxbn.fold(jnp.sin, IMAGES),
        "fold: fn has no norm to fold: of its 0 convolutions and dots, none is followed by more "
        "than a bias; expected a network with batch norms, in inference mode.",
    ),
    "training mode": (
        lambda: jaxbn.fold(
            lambda x: jaxbn.batch_norm(x @ KERNEL_2, *jaxbn.init(4), train=True), IMAGES[0, 0]
        ),
        "fold: a sub of shape (8, 4) normalizes by statistics of the batch, expected a function in "
        "inference mode; write train=False (jaxbn.batch_norm), use_running_average=True "
        "(linen), model.eval() (nnx), is_training=False (Haiku) or "
        "eqx.nn.inference_mode(model) (Equinox).",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_folded_is_refused(name):
    call, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert str(error.value) == message


def attention(x):  # of one example [tokens, 8]
    return jax.nn.softmax(x @ x.T) @ x


INFERENCE = {
    "layer norm": lambda x: jax.nn.standardize(x, axis=-1),
    "instance norm": lambda x: jax.nn.standardize(x, axis=1),
    "squeeze and excite": lambda x: x * jax.nn.sigmoid(x.mean(1, keepdims=True)),
    "attention": jax.vmap(attention),
    "attention of one example": lambda x: attention(x[0]),
    "mean over tokens": lambda x: x.mean(0) * 2,
    "scale of a quantizer": lambda x: x / jnp.abs(x).max(),
    "instance norm of one example": lambda x: jax.nn.standardize(x.reshape(4, 2, 40), axis=(1, 2)),
}


@pytest.mark.parametrize("name", INFERENCE)
def test_what_only_looks_like_statistics_of_the_batch_is_none(name):
    assert batch_statistics(INFERENCE[name], (normal(0, 4, 10, 8),)) is None
