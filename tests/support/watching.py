"""Records of layers as a watched step returns them, with any numbers."""

import numpy as np

import jaxbn
from jaxbn import watch


def record_of(c, seed=0, **changes):
    r = np.random.default_rng(seed)
    arrays = {k: r.normal(size=c) for k in ("bm", "rm", "scale", "bias", "dscale", "dbias")}
    arrays |= {k: r.uniform(0.1, 4, c) for k in ("bv", "rv")}
    arrays = {k: v.astype(np.float32) for k, v in arrays.items()} | {"n": np.float32(640)} | changes
    a = arrays.__getitem__
    return watch.Record(
        jaxbn.Moments(a("n"), a("bm"), a("bv")),
        jaxbn.State(a("rm"), a("rv"), None),
        jaxbn.Params(a("scale"), a("bias")),
        jaxbn.Params(a("dscale"), a("dbias")),
    )
