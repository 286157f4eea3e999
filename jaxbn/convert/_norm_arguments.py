"""Arguments of PyTorch's batch norm in Flax's terms: momentum, epsilon, unbiased."""

from typing import Any

from jaxbn._op.arguments.values import check_real


def norm_arguments(momentum: float | None = 0.1, eps: float = 1e-5) -> dict[str, Any]:
    """The arguments with which jaxbn's `BatchNorm` trains as PyTorch's does.

    For `jaxbn.linen.BatchNorm` and `jaxbn.nnx.BatchNorm`. PyTorch's momentum is the weight of the
    new value; Flax's is the weight of the old value. PyTorch multiplies the variance by n / (n - 1)
    before it enters the running variance; Flax does so with unbiased=True.

    Args:
      momentum: PyTorch's momentum; None is the cumulative average in both.
      eps: PyTorch's eps.

    Raises:
      ValueError: momentum is not in [0, 1], or eps is negative.

    >>> from jaxbn import convert
    >>> convert.norm_arguments()
    {'momentum': 0.9, 'epsilon': 1e-05, 'unbiased': True}
    """
    return torch_arguments("norm_arguments", momentum, eps)


def torch_arguments(call: str, momentum: float | None, eps: float) -> dict[str, Any]:
    """As `norm_arguments`; the errors name the call."""
    if momentum is not None:
        expected = "PyTorch's, in [0, 1], or None for the cumulative average"
        check_real(call, "momentum", momentum, lambda v: 0 <= v <= 1, expected, "0.1")
    check_real(call, "eps", eps, lambda v: v >= 0, "at least 0", "1e-5")
    return {"momentum": one_minus(momentum), "epsilon": eps, "unbiased": True}


def one_minus(momentum: float | None) -> float | None:
    """The weight of the new value ↔ that of the old. Rounded: 1 - 0.9 is 0.09999999999999998."""
    return None if momentum is None else round(1 - momentum, 12)
