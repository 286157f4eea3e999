# What runs on the devices: the data, an epoch of training, the evaluation. Written once for
# one device or many: arrays carry a sharding over the mesh's one axis, "data", and jit does
# the rest. Batch norm under jit takes its statistics over the whole batch, on all devices.

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from augment import augment, normalize
from data import Data
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class Arrays(NamedTuple):
    """The data set on the devices, in bytes; rows are padded to divide over the devices."""

    train_x: jax.Array  # [N', H, W, 3] uint8, sharded over "data"
    train_y: jax.Array  # [N'] int32
    test_x: jax.Array  # [T, B, H, W, 3] uint8: T batches of B, each sharded over "data"
    test_y: jax.Array  # [T, B] int32
    test_w: jax.Array  # [T, B] float32: 1 for a test image, 0 for padding


def make_mesh(devices: int | None) -> Mesh:
    chosen = jax.devices()[:devices]
    return jax.make_mesh((len(chosen),), ("data",), axis_types=(AxisType.Auto,), devices=chosen)


def put(x, order: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """`x[order]` onto the mesh, 0 past the end; a process reads only the rows of its devices."""

    def read(index):
        rows = order[index[: order.ndim]]
        out = np.zeros((*rows.shape, *x.shape[1:]), x.dtype)
        out[rows < len(x)] = x[rows[rows < len(x)]]
        return out

    shape = (*order.shape, *x.shape[1:])
    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), read)


def put_data(data: Data, mesh: Mesh, eval_batch: int) -> Arrays:
    def padded(x, multiple):  # row numbers, up to the next multiple
        return np.arange(len(x) + -len(x) % multiple)

    def train(x):
        return put(x, padded(x, mesh.size), mesh, P("data"))

    def test(x):  # [M, ...] → [T, B, ...]
        return put(x, padded(x, eval_batch).reshape(-1, eval_batch), mesh, P(None, "data"))

    ones = np.ones(len(data.test_y), np.float32)
    x, y = train(data.train_x), train(data.train_y)
    return Arrays(x, y, test(data.test_x), test(data.test_y), test(ones))


class Loop:
    """The jitted functions of a run; `steps` is steps.Linen or steps.Nnx."""

    def __init__(self, steps, data: Data, mesh: Mesh, batch: int, dtype, cutout: int):
        self.steps, self.batch, self.dtype = steps, batch, dtype
        self.rows = len(data.train_y)  # without the padding
        self.count = self.rows // batch  # steps an epoch; what is left over waits for the next
        self.watching = {"shards": mesh.size} if mesh.size > 1 else {}
        self.scaling = {"mean": data.mean, "std": data.std}
        self.augment = partial(augment, **self.scaling, flip=data.flip, cutout=cutout)
        everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "data"))

        self.init = jax.jit(steps.init, out_shardings=everywhere)
        self.shuffle = jax.jit(self._shuffle, out_shardings=rows)
        # The state is donated: the new one is written where the old one lay.
        donating = partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
        self.train_step = donating(self._train_step)
        self.watched_step = donating(partial(self._train_step, watched=True))
        self.train_epoch = donating(self._train_epoch)
        self.eval_step = jax.jit(self._eval_step, out_shardings=everywhere)

    def _shuffle(self, key, x, y):
        """A new order of all rows: [N', ...] → [steps, B, ...]."""
        order = jax.random.permutation(key, self.rows)[: self.count * self.batch]
        order = order.reshape(self.count, self.batch)
        return x[order], y[order]

    def _train_step(self, state, key, x, y, i, watched=False):
        """Step `i` of the epoch that `x` [steps, B, H, W, 3] and `y` [steps, B] hold."""
        images = self.augment(jax.random.fold_in(key, i), x[i]).astype(self.dtype)
        state, loss, logits, seen = self.steps.train(state, images, y[i], watched, **self.watching)
        return state, (loss, jnp.mean(logits.argmax(axis=-1) == y[i])), seen

    def _train_epoch(self, state, key, x, y):
        """All steps of an epoch in one program: losses and accuracies come back as [steps]."""

        def body(state, i):
            return self._train_step(state, key, x, y, i)[:2]

        return jax.lax.scan(body, state, jnp.arange(self.count))

    def _eval_step(self, state, arrays: Arrays, i):
        """Sums over batch `i` of the test set: loss, hits and images; padding weighs 0."""
        x, y, w = arrays.test_x[i], arrays.test_y[i], arrays.test_w[i]  # [B, H, W, 3], [B], [B]
        logits = self.steps.logits(state, normalize(x, **self.scaling).astype(self.dtype))
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)[:, 0]
        hit = logits.argmax(axis=-1) == y
        return jnp.sum(w * loss), jnp.sum(jnp.where(hit, w, 0)), jnp.sum(w)

    def evaluate(self, state, arrays: Arrays) -> tuple[float, float, int]:
        """Loss and accuracy by running statistics, and the number of test images they are of."""
        batches = range(len(arrays.test_y))
        sums = [jax.device_get(self.eval_step(state, arrays, i)) for i in batches]  # [T, 3]
        loss, hits, count = np.asarray(sums, np.float64).sum(axis=0)
        return loss / count, hits / count, int(count)
