"""Momentum and epsilon: theirs in ours."""

from typing import Any


def norm_arguments(momentum: float | None = 0.1, eps: float = 1e-5) -> dict[str, Any]:
    """The arguments of `jaxbn.linen.BatchNorm` and `jaxbn.nnx.BatchNorm` that equal PyTorch's.

    PyTorch's momentum is the weight of the new value, here it is that of the old; PyTorch's running
    variance takes n / (n - 1).

    Args:
      momentum: PyTorch's; None is the cumulative average in both.
      eps: PyTorch's.

    Raises:
      ValueError: momentum is not in [0, 1], or eps is negative.

    >>> from jaxbn import convert
    >>> convert.norm_arguments()
    {'momentum': 0.9, 'epsilon': 1e-05, 'unbiased': True}
    """
    return torch_arguments("norm_arguments", momentum, eps)


def torch_arguments(call: str, momentum: float | None, eps: float) -> dict[str, Any]:
    """PyTorch's momentum and eps in Flax's terms, or an error that names the call."""
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(
            f"{call}: momentum={momentum!r}, expected PyTorch's, in [0, 1], or None for "
            f"the cumulative average; write momentum=0.1."
        )
    if not eps >= 0:
        raise ValueError(f"{call}: eps={eps!r}, expected at least 0; write eps=1e-5.")
    return {"momentum": one_minus(momentum), "epsilon": eps, "unbiased": True}


def one_minus(momentum: float | None) -> float | None:
    """Weight of the new value ↔ of the old; 1 - 0.9 is 0.09999999999999998 in floating point."""
    return None if momentum is None else round(1 - momentum, 12)
