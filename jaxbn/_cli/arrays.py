"""What a checkpoint's norm layers must hold to be judged or compared."""

from collections.abc import Mapping
from typing import Any


def check_arrays(found: Mapping[str, Any]) -> None:
    """Raises unless each layer's arrays are numbers of one shape, and its count is a number."""
    import jax.numpy as jnp
    import numpy as np

    def numbers(v: Any, *kinds: Any) -> bool:
        return any(jnp.issubdtype(v.dtype, kind) for kind in kinds) and v.dtype.kind != "m"

    for name, (params, state) in found.items():
        like = "scale" if state.mean is None else "mean"
        arrays = {**params._asdict(), **state._asdict(), "count": None}
        shape = arrays[like].shape
        for field, v in arrays.items():
            if v is None:
                continue
            real = [] if field == "var" else [jnp.complexfloating]
            if not numbers(v, jnp.floating, jnp.integer, *real) or v.shape != shape:
                raise ValueError(
                    f"{field} of layer {name!r} has shape {v.shape} and dtype {v.dtype}, expected "
                    f"numbers of the {like}'s shape {shape}."
                )
            if not v.size:
                raise ValueError(
                    f"{field} of layer {name!r} has shape {shape}: it holds no number."
                )
        if (v := state.count) is None:
            continue
        if not numbers(v, jnp.floating, jnp.integer) or not v.size:
            raise ValueError(
                f"count of layer {name!r} has shape {v.shape} and dtype {v.dtype}, expected the "
                f"number of its updates."
            )
        wide = np.asarray(v, np.float64)
        if not (np.isfinite(wide) & (wide >= 0)).all():
            raise ValueError(
                f"count of layer {name!r} is {wide.min():g}, expected the number of its updates."
            )
