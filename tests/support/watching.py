"""Records of layers as a watched step returns them, with any numbers."""

import numpy as np

import jaxbn
from jaxbn import health, watch


def record_of(c, seed=0, **changes):
    r = np.random.default_rng(seed)
    arrays = {k: r.normal(size=c) for k in ("bm", "rm", "scale", "bias", "dscale", "dbias")}
    arrays |= {k: r.uniform(0.1, 4, c) for k in ("bv", "rv")}
    arrays = {k: v.astype(np.float32) for k, v in arrays.items()} | {"n": np.float32(640)} | changes
    a = arrays.__getitem__
    of_shards = [jaxbn.Moments(np.full((3, 4), 8.0), *r.uniform(1, 2, (2, 3, 4))) for _ in range(2)]
    return watch.Record(
        jaxbn.Moments(a("n"), a("bm"), a("bv")),
        jaxbn.State(a("rm"), a("rv"), None),
        jaxbn.Params(a("scale"), a("bias")),
        jaxbn.Params(a("dscale"), a("dbias")),
        health.Shards(*of_shards),
        watch.Kernel(np.float32(4), np.float32(3)),
    )
