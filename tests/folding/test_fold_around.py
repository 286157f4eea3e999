"""fold around a norm: pools and means, flattens, branches, and norms that must stay."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jaxbn
from tests.folding.test_fold import ONE_AFFINE, TOLERANCE, norm
from tests.support import oracle
from tests.support.compiling import as_pasted
from tests.support.folding import IMAGES, affines, normal


@pytest.fixture(autouse=True)
def _as_pasted():
    """Flax's own avg_pool promotes types."""
    with as_pasted():
        yield


NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
KERNEL, SQUARE = normal(1, 3, 3, 3, 4), normal(2, 3, 3, 4, 4)


def conv(x, kernel, pad=0, layout=NHWC, stride=1, groups=1):
    options = {"dimension_numbers": layout, "feature_group_count": groups}
    return lax.conv_general_dilated(x, kernel, (stride, stride), [(pad, pad)] * 2, **options)


def wide(fn, *args):
    """The results of fn in float64."""
    with jax.enable_x64(True):
        return np.asarray(fn(*map(np.float64, args)))


POOLS = {  # after a convolution of [2, 6, 6, 4]; affines left
    "average": lambda y: nn.avg_pool(y, (2, 2), (2, 2)),
    "overlapping": lambda y: nn.avg_pool(y, (3, 2), (1, 2)),
    "mean": lambda y: y.mean((1, 2)),
    "sum": lambda y: y.sum((1, 2)),
    "mean of one axis": lambda y: y.mean(1),
    "two": lambda y: nn.avg_pool(y, (2, 2), (2, 2)).mean((1, 2)),
    "sum of averages": lambda y: nn.avg_pool(y, (2, 2), (2, 2)).sum(2),
}


@pytest.mark.parametrize("pool", POOLS)
def test_a_norm_after_a_pool_goes_into_the_kernel_before_it(pool):
    after = norm(4)
    folded, report = jaxbn.fold(lambda x: after(POOLS[pool](conv(x, KERNEL))), IMAGES)
    want = after.in_float64(wide(lambda x, k: POOLS[pool](conv(x, k)), IMAGES, KERNEL))
    oracle.assert_close(folded(IMAGES), want, TOLERANCE)
    assert [(site.folded, site.note) for site in report.sites] == [(True, "sub, mul, add")]
    assert affines(folded, IMAGES) == {"add": 1}
    more = np.concatenate([IMAGES, -IMAGES])
    oracle.assert_close(folded(more)[:2], want, TOLERANCE)


def test_a_pool_of_channels_first_in_bfloat16():
    x, kernel = IMAGES.transpose(0, 3, 1, 2), KERNEL.transpose(3, 2, 0, 1)
    after = norm(4, axis=1)

    def fn(x, kernel):
        return conv(x, kernel, layout=NCHW).mean((2, 3))

    halves = jnp.bfloat16(x), jnp.bfloat16(kernel)
    folded, report = jaxbn.fold(lambda x: after(fn(x, halves[1])), halves[0])
    assert report.sites[0].folded
    want = after.in_float64(wide(fn, *halves))
    # The kernel is rounded again; 27 products, one mean over 36 values in float32.
    assert folded(halves[0]).dtype == jnp.bfloat16
    oracle.assert_close(folded(halves[0]), want, 4 * oracle.tolerance("bfloat16", 27))


def test_a_norm_after_a_pool_that_pads_stays():
    after = norm(4)

    def fn(x):
        return after(nn.avg_pool(conv(x, KERNEL), (3, 3), (1, 1), "SAME"))

    folded, report = jaxbn.fold(fn, IMAGES)
    assert [site.folded for site in report.sites] == [None, False]
    assert report.sites[1].note == f"after reduce_window_sum, before the caller{ONE_AFFINE}"
    oracle.assert_close(folded(IMAGES), np.float64(fn(IMAGES)), TOLERANCE)


BEFORE = {  # between a norm of [B, 4, 4, 3] and a dense layer; its inputs
    "mean": (lambda y: y.mean((1, 2)), 3),
    "flatten": (lambda y: y.reshape(y.shape[0], -1), 48),
    "pool, flatten": (lambda y: nn.avg_pool(y, (2, 2), (2, 2)).reshape(y.shape[0], -1), 12),
    "flatten of rows": (lambda y: y.reshape(y.shape[0], 4, 12), 12),
}


@pytest.mark.parametrize("name", BEFORE)
def test_a_norm_before_a_mean_or_a_flatten_goes_into_the_dense_layer(name):
    between, n = BEFORE[name]
    before, kernel, bias = norm(3), normal(3, n, 5), normal(4, 5)
    x = normal(5, 3, 4, 4, 3)

    def fn(x):
        return between(before(jnp.tanh(x))) @ kernel + bias

    folded, report = jaxbn.fold(fn, x)
    want = wide(between, before.in_float64(np.tanh(np.float64(x)))) @ np.float64(kernel) + bias
    oracle.assert_close(folded(x), want, TOLERANCE)
    # The mean divides by a number, not by one for each channel.
    assert affines(folded, x) == {"add": 1}
    assert [site.note for site in report.sites] == ["sub, mul, add before; add"]
    sizes = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), 4, 4, 3), np.float32)
    served = export.export(jax.jit(folded))(sizes)
    oracle.assert_close(served.call(x[:2]), want[:2], TOLERANCE)


def test_what_a_flatten_mixes_is_named_by_its_own_channels():
    before = norm(3)
    _, report = jaxbn.fold(lambda x: jnp.tanh(before(x).reshape(2, -1)), IMAGES)
    assert report.sites[0].name == "0 norm of 3 channels"


def test_a_norm_that_stays_is_one_affine_where_that_is_exact():
    """`x * s + b` cancels at large means: there the norm runs as it is written."""
    stays = norm(3)
    far = stays._replace(state=jaxbn.State(np.float32([3e4, 0, 0]), np.ones(3, "f"), None))
    for layer, left in ((stays, {"mul": 1, "add": 1}), (far, {"sub": 1, "mul": 1, "add": 1})):
        x = IMAGES + layer.state.mean
        folded, report = jaxbn.fold(lambda x, layer=layer: jax.nn.relu(layer(x)), x)
        oracle.assert_close(folded(x), np.maximum(layer.in_float64(np.float64(x)), 0), 1e-5)
        assert affines(folded, x) == left
        (site,) = report.sites
        assert site.note.endswith(ONE_AFFINE) == (layer is stays)
        assert (site.relative is not None) == (layer is stays)
        assert report.relative <= report.tolerance


@jax.custom_vjp
def fused(x, mean, rstd):
    return jax.nn.relu((x - mean) * rstd)


fused.defvjp(lambda *a: (fused(*a), a), lambda a, g: (g, None, None))


def test_a_norm_inside_a_call_with_its_own_derivative_is_named():
    mean, rstd = normal(6, 4)[None, None, None], np.ones((1, 1, 1, 4), np.float32)
    folded, report = jaxbn.fold(lambda x: fused(conv(x, KERNEL), mean, rstd), IMAGES)
    assert [(site.name, site.folded, site.note) for site in report.sites] == [
        ("0 conv 3x3, 3 -> 4", None, "read by fused"),
        (
            "1 norm of 4 channels",
            False,
            "inside custom_vjp fused, whose derivative folding would lose; write the norm outside "
            "of it",
        ),
    ]
    want = jax.jit(lambda x: fused(conv(x, KERNEL), mean, rstd))(IMAGES)
    np.testing.assert_array_equal(folded(IMAGES), want)


# Branches

X4 = normal(7, 2, 6, 6, 4)
ONE, ROW, GROUPED = normal(8, 1, 1, 4, 4), normal(9, 1, 3, 4, 4), normal(10, 3, 3, 2, 4)
BRANCHES = {  # branches of X4, each a function of x and of the kernels, and how many
    "3x3, 1x1, identity": ([(SQUARE, 1), (ONE, 0), None], {}),
    "1x1 first": ([(ONE, 0), (SQUARE, 1)], {}),
    "identity first": ([None, (SQUARE, 1)], {}),
    "strided": ([(SQUARE, 1), (ONE, 0)], {"stride": 2}),
    "grouped": ([(GROUPED, 1), None], {"groups": 2}),
}


def branched(branches, options):
    norms = [norm(4, seed=i) for i in range(len(branches))]

    def fn(x):
        parts = [
            after(x if branch is None else conv(x, *branch, **options))
            for after, branch in zip(norms, branches, strict=True)
        ]
        return jax.nn.relu(sum(parts[1:], parts[0]))

    def exact(x):
        parts = [
            after.in_float64(
                x if b is None else wide(lambda x, k, b=b: conv(x, k, b[1], **options), x, b[0])
            )
            for after, b in zip(norms, branches, strict=True)
        ]
        return np.maximum(sum(parts), 0)

    return fn, exact


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_become_one_convolution(name):
    branches, options = BRANCHES[name]
    fn, exact = branched(branches, options)
    folded, report = jaxbn.fold(fn, X4, merge_branches=True)
    oracle.assert_close(folded(X4), exact(np.float64(X4)), 2 * TOLERANCE)
    (site,) = report.sites
    assert site.folded
    assert site.note.startswith(f"{len(branches)} branches; ")
    assert str(jax.make_jaxpr(folded)(X4)).count("conv_general_dilated[") == 1
    assert affines(folded, X4) == {"add": 1}


def test_branches_stay_apart_unless_they_are_one_convolution():
    a, b = norm(4, seed=1), norm(4, seed=2)

    def of(branch, **options):
        fn = lambda x: jax.nn.relu(a(conv(x, SQUARE, 1)) + b(branch(x)))  # noqa: E731
        folded, report = jaxbn.fold(fn, X4, **options)
        oracle.assert_close(folded(X4), np.float64(fn(X4)), 2 * TOLERANCE)
        return len(report.sites)

    assert of(lambda x: conv(x, ONE)) == 2
    merge = {"merge_branches": True}
    assert of(lambda x: conv(x, ONE), **merge) == 1
    assert of(lambda x: conv(jnp.tanh(x), ONE), **merge) == 2  # of another value
    assert of(jnp.tanh, **merge) == 2
    dilated = {"dimension_numbers": NHWC, "rhs_dilation": (2, 2), "padding": [(2, 2)] * 2}
    wider = lambda x: lax.conv_general_dilated(x, SQUARE, (1, 1), **dilated)  # noqa: E731
    assert of(wider, **merge) == 2
    shifted = {"dimension_numbers": NHWC, "padding": [(0, 2)] * 2}
    corner = lambda x: lax.conv_general_dilated(x, SQUARE, (1, 1), **shifted)  # noqa: E731
    assert of(corner, **merge) == 2


# Concatenations

WIDE = normal(11, 3, 3, 3, 2)


@pytest.mark.parametrize("axis", [-1, 1])
def test_a_norm_after_a_concatenation_goes_into_every_kernel(axis):
    """Of channels: each kernel takes its own share. Of rows of the image: each takes the norm."""
    other = WIDE if axis == -1 else normal(12, 3, 3, 3, 4)
    after = norm(6 if axis == -1 else 4)

    def joined(x, a, b):
        return jnp.concatenate([conv(x, a), conv(jnp.tanh(x), b)], axis)

    folded, report = jaxbn.fold(lambda x: after(joined(x, KERNEL, other)), IMAGES)
    want = after.in_float64(wide(joined, IMAGES, KERNEL, other))
    oracle.assert_close(folded(IMAGES), want, TOLERANCE)
    assert [(site.folded, site.note) for site in report.sites] == [(True, "sub, mul, add")] * 2
    assert max(site.relative for site in report.sites) <= report.tolerance
    assert affines(folded, IMAGES) == {"add": 2}


def test_a_concatenation_with_another_reader_or_other_parts_stays():
    after = norm(7)

    def fn(x):
        y = jnp.concatenate([conv(x, KERNEL), x[:, 1:-1, 1:-1]], -1)
        return jax.nn.relu(after(y))

    folded, report = jaxbn.fold(fn, IMAGES)
    oracle.assert_close(folded(IMAGES), np.float64(fn(IMAGES)), TOLERANCE)
    assert [site.folded for site in report.sites] == [None, False]

    after = norm(6)

    def twice(x):
        y = jnp.concatenate([conv(x, KERNEL), conv(x, WIDE)], -1)
        return jax.nn.relu(after(y)) + y

    folded, report = jaxbn.fold(twice, IMAGES)
    oracle.assert_close(folded(IMAGES), np.float64(twice(IMAGES)), TOLERANCE)
    assert [site.folded for site in report.sites] == [None, None, False]


def test_a_bias_after_a_concatenation_is_no_norm():
    bias = normal(13, 1, 1, 1, 6)

    def fn(x):
        return jnp.concatenate([conv(x, KERNEL), conv(x, WIDE)], -1) + bias

    with pytest.raises(ValueError, match="fn has no norm to fold"):
        jaxbn.fold(fn, IMAGES)


# Splits

SPLIT_WIDE = normal(13, 3, 3, 3, 7)


def split(y, axis=-1):
    return jnp.split(y, [4, 6], axis)


@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["channels last", "channels first"])
def test_a_norm_after_a_split_goes_into_its_share_of_the_kernel(layout):
    """Two parts of three have a norm; the kernel of the third is as it was."""
    axis = layout[2].index("C")
    x = np.moveaxis(IMAGES, -1, axis)
    kernel = SPLIT_WIDE.transpose([NHWC[1].index(letter) for letter in layout[1]])
    first, last = norm(4, axis=axis), norm(1, axis=axis, seed=2)

    def parts(x, kernel):
        return split(conv(x, kernel, layout=layout), axis)

    def fn(x):
        a, b, c = parts(x, kernel)
        return jax.nn.relu(first(a)), jnp.tanh(b) * b, last(c)

    folded, report = jaxbn.fold(fn, x)
    with jax.enable_x64(True):
        a, b, c = map(np.asarray, parts(np.float64(x), np.float64(kernel)))
    want = np.maximum(first.in_float64(a), 0), np.tanh(b) * b, last.in_float64(c)
    for y, expected in zip(folded(x), want, strict=True):
        oracle.assert_close(y, expected, TOLERANCE)
    (site,) = report.sites
    assert (site.folded, site.note) == (True, "sub, mul, add, sub, mul, add")
    assert site.relative <= report.tolerance
    assert affines(folded, x) == {"add": 1}


def test_a_norm_after_a_split_in_bfloat16():
    """Each part goes to float32 and back; 27 products, and the kernel is rounded again."""
    halves, first = (jnp.bfloat16(IMAGES), jnp.bfloat16(SPLIT_WIDE)), norm(4)

    def parts(x, kernel):
        return split(conv(x, kernel))

    def fn(x):
        a, b, _ = parts(x, halves[1])
        return first(a), b

    folded, report = jaxbn.fold(fn, halves[0])
    assert [site.folded for site in report.sites] == [True]
    with jax.enable_x64(True):
        want = first.in_float64(np.asarray(parts(*map(np.float64, halves))[0]))
    y, b = folded(halves[0])
    assert y.dtype == b.dtype == jnp.bfloat16
    oracle.assert_close(y, want, 4 * oracle.tolerance("bfloat16", 27))


SPLITS_THAT_STAY = {  # the parts → the results; the affine of what else reads, or is no channel
    "another reader": lambda a, b, c: (norm(4)(a), a, b, c),
    "no norm": lambda a, b, c: (jax.nn.relu(a), b, c),
    "a bias alone": lambda a, b, c: (a + normal(1, 4), b, c),
    "of the image": lambda a, b, c: (a * normal(1, 1, 6, 1, 1), b, c),
}


@pytest.mark.parametrize("name", SPLITS_THAT_STAY)
def test_a_split_that_stays(name):
    def fn(x):
        return SPLITS_THAT_STAY[name](*split(conv(x, SPLIT_WIDE)))

    beside = norm(4)  # so that there is something to fold
    folded, report = jaxbn.fold(lambda x: (fn(x), beside(conv(x, KERNEL))), IMAGES)
    got, want = folded(IMAGES)[0], fn(IMAGES)
    for y, expected in zip(got, want, strict=True):
        oracle.assert_close(y, np.float64(expected), TOLERANCE)
    assert [site.folded for site in report.sites if "7" in site.name] == [None]
