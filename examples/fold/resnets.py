# One ResNet as Flax, Haiku, Equinox and jaxbn write it. Each function here makes the network, gives
# it the weights and statistics of a trained one, and returns it as a function of x [B, H, W, 3]:
# all that fold needs to know. train=True leaves the norms in training mode, which fold refuses.

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbn

CONVS = ((3, 8, 3, 1), (8, 16, 3, 2), (16, 16, 3, 1), (8, 16, 1, 2))  # in, out, window, stride


def resnet(conv, norm, dense, x, space=(1, 2)):  # a stem, and a block with a projected shortcut
    x = jax.nn.relu(norm(0, conv(0, x)))  # [B, H, W, 8]
    y = jax.nn.relu(norm(1, conv(1, x)))  # [B, H/2, W/2, 16]
    y = norm(2, conv(2, y)) + norm(3, conv(3, x))
    return dense(jax.nn.relu(y).mean(space))  # [B, 10]


def trained(shapes):  # weights and statistics of these shapes, such as no initializer gives
    rng = np.random.default_rng(0)

    def leaf(v):
        if isinstance(v, jax.ShapeDtypeStruct):
            return jnp.asarray(rng.uniform(0.1, 0.3, v.shape), v.dtype)
        return v

    return jax.tree.map(leaf, shapes)


def linen(norm, x, train=False):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            def conv(i, x):
                _, f, k, s = CONVS[i]
                return nn.Conv(f, (k, k), s, use_bias=False, name=f"conv{i}")(x)

            def normed(i, x):
                return norm(use_running_average=not train, name=f"norm{i}")(x)

            return resnet(conv, normed, nn.Dense(10), x)

    variables = trained(jax.eval_shape(Net().init, jax.random.key(0), x))
    return lambda x: Net().apply(variables, x, mutable=["batch_stats"])[0]


def of_nnx(norm, x, train=False):
    def make():
        rngs = nnx.Rngs(0)
        convs = [nnx.Conv(n, f, (k, k), s, use_bias=False, rngs=rngs) for n, f, k, s in CONVS]
        norms = [norm(f, use_running_average=not train, rngs=rngs) for _, f, _, _ in CONVS]
        return nnx.List([*convs, *norms, nnx.Linear(16, 10, rngs=rngs)])

    layers = nnx.eval_shape(make)
    nnx.update(layers, trained(nnx.state(layers)))
    return lambda x: resnet(lambda i, x: layers[i](x), lambda i, x: layers[4 + i](x), layers[8], x)


def haiku(x, train=False):
    def net(x, train):
        def conv(i, x):
            _, f, k, s = CONVS[i]
            return hk.Conv2D(f, k, s, with_bias=False, name=f"conv{i}")(x)

        def norm(i, x):
            return hk.BatchNorm(True, True, 0.9, name=f"norm{i}")(x, is_training=train)

        return resnet(conv, norm, hk.Linear(10), x)

    net = hk.without_apply_rng(hk.transform_with_state(net))
    params, state = trained(jax.eval_shape(lambda k: net.init(k, x, True), jax.random.key(0)))
    return lambda x: net.apply(params, state, x, train)[0]


def equinox(x, train=False):  # one image, channels first, as its modules take it; so vmap
    keys = jax.random.split(jax.random.key(0), 5)

    def make():
        options = {"padding": "SAME", "use_bias": False}
        convs = [
            eqx.nn.Conv2d(n, f, k, s, **options, key=key)
            for (n, f, k, s), key in zip(CONVS, keys[1:], strict=True)
        ]
        norms = [eqx.nn.BatchNorm(f, "batch", mode="batch") for _, f, _, _ in CONVS]
        return [*convs, *norms, eqx.nn.Linear(16, 10, key=keys[0])]

    layers, state = trained(eqx.filter_eval_shape(eqx.nn.make_with_state(make)))
    layers = eqx.nn.inference_mode(layers, not train)

    def one(x, state):
        def norm(i, x):
            nonlocal state  # each norm takes what the one before it returned
            x, state = layers[4 + i](x, state)
            return x

        return resnet(lambda i, x: layers[i](x), norm, layers[8], jnp.moveaxis(x, -1, 0), (1, 2))

    return lambda x: jax.vmap(one, (0, None), axis_name="batch")(x, state)


def networks(x, train=False):  # by library
    return {
        "Flax linen": linen(nn.BatchNorm, x, train),
        "Flax nnx": of_nnx(nnx.BatchNorm, x, train),
        "jaxbn linen": linen(jaxbn.linen.BatchNorm, x, train),
        "jaxbn nnx": of_nnx(jaxbn.nnx.BatchNorm, x, train),
        "Haiku": haiku(x, train),
        "Equinox": equinox(x, train),
    }
