# From bytes to what the network sees, inside jit, on whatever devices the batch lies.

import jax
import jax.numpy as jnp

SHARE = 8  # a random crop may wander by this part of a side: 4 of 32 pixels


def normalize(images, mean, std):
    """uint8 [B, H, W, 3] → float32, mean 0 and sd 1 per channel over the training set."""
    mean = jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, 3)
    std = jnp.asarray(std, jnp.float32).reshape(1, 1, 1, 3)
    return (images.astype(jnp.float32) - mean) / std


def augment(key, images, mean, std, *, flip: bool, cutout: int):
    """Random crop, flip and cutout, then `normalize`: [B, H, W, 3] uint8 → float32."""
    crop_key, flip_key, cutout_key = jax.random.split(key, 3)
    images = random_crop(crop_key, images)  # [B, H, W, 3] uint8
    if flip:
        images = random_flip(flip_key, images)
    images = normalize(images, mean, std)  # [B, H, W, 3] float32
    if cutout:
        images = random_cutout(cutout_key, images, cutout)
    return images


def random_crop(key, images):
    b, h, w, c = images.shape
    rows, columns = h // SHARE, w // SHARE
    pad = ((0, 0), (rows, rows), (columns, columns), (0, 0))
    padded = jnp.pad(images, pad, mode="reflect")  # [B, 40, 40, 3] of [B, 32, 32, 3]
    ends = jnp.broadcast_to(jnp.array([[2 * rows + 1, 2 * columns + 1]]), (b, 2))
    corners = jax.random.randint(key, (b, 2), 0, ends)  # [B, 2]

    def cut(image, corner):  # [40, 40, 3], [2] → [32, 32, 3]
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (h, w, c))

    return jax.vmap(cut)(padded, corners)


def random_flip(key, images):
    mirror = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirror, images[:, :, ::-1], images)


def random_cutout(key, images, size: int):
    """A square of size x size pixels becomes 0, the mean; it may hang over the edge."""
    b, h, w, _ = images.shape
    row_key, column_key = jax.random.split(key)

    def stripe(key, n):  # [B, n] bool: `size` neighbours around a random centre
        start = jax.random.randint(key, (b, 1), 0, n) - size // 2
        i = jnp.arange(n)[None, :]
        return (i >= start) & (i < start + size)

    hole = stripe(row_key, h)[:, :, None] & stripe(column_key, w)[:, None, :]  # [B, h, w]
    return jnp.where(hole[..., None], 0.0, images)
