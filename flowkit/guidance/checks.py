"""Numbers that a user gives to a guidance method."""

from __future__ import annotations

import math
from typing import Any


def number(name: str, value: Any, cure: str) -> float:  # noqa: ANN401
    """Returns an argument as a float, which may be infinite.

    Args:
        name: of the argument.
        value: a number of Python, NumPy or torch.
        cure: end of the error message.

    Raises:
        TypeError: for what is not one number.
        ValueError: for NaN.
    """
    try:
        result = None if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        result = None
    if result is None:
        raise TypeError(f"{name} must be one number, got {value!r}; {cure}")
    if math.isnan(result):
        raise ValueError(f"{name} must not be NaN; {cure}")
    return result


def finite(name: str, value: Any, cure: str) -> float:  # noqa: ANN401
    """Returns an argument as a finite float.

    Args:
        name: of the argument.
        value: a number of Python, NumPy or torch.
        cure: end of the error message.

    Raises:
        TypeError: for what is not one number.
        ValueError: for NaN or infinity.
    """
    result = number(name, value, cure)
    if math.isinf(result):
        raise ValueError(f"{name} must be finite, got {result}; {cure}")
    return result
