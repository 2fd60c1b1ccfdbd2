"""What a network predicts, and the only conversions between those predictions.

On a path ``x = alpha x0 + sigma eps`` every common output is one linear combination of data and noise, ``raw = A x0 + B eps``.
With ``x`` that makes two equations in two unknowns, so for ``det = alpha B - sigma A``

    x0 = (B x - sigma raw) / det,        eps = (alpha raw - A x) / det,

and any wanted ``M = P x0 + Q eps`` is ``M = p x + q raw`` with two numbers a level.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Prediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "edm", "edm_v"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def pair(prediction: str, alpha: float, sigma: float, sigma_data: float = 0.5) -> tuple[float, float]:
    """Returns (A, B) of ``raw = A x0 + B eps``.

    ``epsilon`` (0, 1); ``sample`` (1, 0); ``v_prediction`` (-sigma, alpha) (Salimans & Ho 2022, appendix D);
    ``flow_prediction`` (-1, 1), the velocity ``eps - x0`` of the straight path; ``edm`` and ``edm_v`` are the raw network
    F of Karras et al. 2022, table 1, ``x0_hat = c_skip x + c_out F`` with ``c_out > 0`` and, for ``edm_v``, ``c_out < 0``.

    Args:
        prediction: one of `PREDICTIONS`.
        alpha: signal level of the path, >= 0.
        sigma: noise level of the path, >= 0.
        sigma_data: standard deviation of the data, > 0; read by ``edm`` and ``edm_v`` only.

    Raises:
        ValueError: for an unknown prediction.
    """
    match prediction:
        case "epsilon":
            return 0.0, 1.0
        case "sample":
            return 1.0, 0.0
        case "v_prediction":
            return -sigma, alpha
        case "flow_prediction":
            return -1.0, 1.0
        case "edm" | "edm_v":
            total = math.hypot(sigma, sigma_data)
            sign = 1.0 if prediction == "edm" else -1.0
            return sign * sigma / (sigma_data * total), -sign * sigma_data / total
    raise ValueError(f"unknown prediction type {prediction!r}; choose one of {', '.join(PREDICTIONS)}")


def row(
    prediction: str,
    wanted: tuple[float, float],
    alpha: float,
    sigma: float,
    sigma_data: float = 0.5,
) -> tuple[float, float]:
    """Returns (p, q) such that the wanted ``P x0 + Q eps`` is ``p x + q raw``.

    Args:
        prediction: what ``raw`` is, one of `PREDICTIONS`.
        wanted: (P, Q).
        alpha: signal level, >= 0.
        sigma: noise level, >= 0.
        sigma_data: standard deviation of the data, for the EDM predictions.

    Raises:
        ValueError: where the prediction does not determine the wanted combination: epsilon at alpha = 0 says nothing about
            x0, x0 at sigma = 0 nothing about eps.
    """
    a, b = pair(prediction, alpha, sigma, sigma_data)
    big_p, big_q = wanted
    det = alpha * b - sigma * a
    if abs(det) < 1e-300:
        # The combination may still be the raw output itself, whatever x is.
        scale = big_q / b if b else big_p / a
        if (big_p, big_q) == (scale * a, scale * b):
            return 0.0, scale
        raise ValueError(
            f"a model with prediction type {prediction!r} does not determine the sample at alpha = {alpha:g}, "
            f"sigma = {sigma:g}; start below pure noise, or use a checkpoint that predicts v, x0 or flow velocity"
        )
    return (big_p * b - big_q * a) / det, (big_q * alpha - big_p * sigma) / det


def convert(
    raw: Tensor,
    x: Tensor,
    alpha: float,
    sigma: float,
    source: str,
    target: str,
    sigma_data: float = 0.5,
) -> Tensor:
    """Converts a network output from one prediction type to another.

    Args:
        raw: the output, any shape.
        x: the noisy sample in the path's coordinates, same shape.
        alpha: signal level, >= 0.
        sigma: noise level, >= 0.
        source: prediction type of ``raw``.
        target: prediction type wanted.
        sigma_data: standard deviation of the data, for the EDM predictions.

    Returns:
        The converted output, same shape.

    Raises:
        ValueError: for an unknown type, or where ``source`` does not determine ``target`` at this level.
    """
    p, q = row(source, pair(target, alpha, sigma, sigma_data), alpha, sigma, sigma_data)
    return p * x + q * raw
