"""Which noise goes with which data: independent, or by optimal transport within each batch.

Of a batch of noise ``eps_i`` and data ``x_j``, transport takes the permutation p that minimises ``sum_j |eps_p(j) - x_j|^2``
(Tong et al. 2023, arXiv 2302.00482; Pooladian et al. 2023, arXiv 2304.14772): paths cross less, so the trained flow is straighter.
A permutation uses each noise and each image once; pairs drawn from the plan with replacement miss some and repeat others.

Transport among all rows makes noise depend on the condition, which it does not when samples are drawn, and conditional samples get
worse. So noise is only exchanged among rows of one condition: for each of them it stays standard normal.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

COUPLINGS = ("independent", "ot", "sinkhorn")


def check(name: str) -> None:
    """Refuses a coupling that is unknown, or whose library is missing.

    Raises:
        ImportError: without the extra.
        ValueError: for an unknown name.
    """
    if name not in COUPLINGS:
        raise ValueError(f"unknown coupling {name!r}; choose {', '.join(COUPLINGS)}")
    if name != "independent":
        try:
            import ot  # noqa: F401
        except ImportError as error:
            raise ImportError(f"coupling {name!r} needs POT: pip install 'flowkit-diffusion[ot]'") from error


def couple(
    name: str, noise: Tensor, data: Tensor, groups: Tensor | None = None, *, seed: int = 0, entropy: float = 0.05
) -> Tensor:
    """Returns the permutation p that pairs ``noise[p]`` with ``data``.

    Args:
        name: "independent" (the noise as it is), "ot" (the exact assignment), or "sinkhorn" (drawn without replacement from the
            plan with an entropic penalty, so between the other two).
        noise: (B, ...).
        data: (B, ...), of the whole batch, so that nothing depends on the number of processes.
        groups: number of each row's condition, (B,): noise stays within a group. None means one group.
        seed: of the draw of "sinkhorn".
        entropy: weight of the entropy of "sinkhorn", as a share of the mean cost; below 0.01 the plan is not found in full.

    Returns:
        int64 (B,), on the CPU.

    Raises:
        ImportError: without the extra.
        ValueError: for an unknown name, batches of different shapes, or values that are not finite.
    """
    check(name)
    if noise.shape != data.shape:
        raise ValueError(f"noise of shape {tuple(noise.shape)} does not pair with data of {tuple(data.shape)}")
    found = torch.arange(len(data))
    if name == "independent":
        return found
    eps, x = (v.detach().flatten(1).to("cpu", torch.float64) for v in (noise, data))
    if not (eps.isfinite().all() and x.isfinite().all()):
        raise ValueError("a batch to couple holds NaN or infinity; look at the images first")
    groups = torch.zeros(len(data)) if groups is None else groups.cpu()
    generator = Generator().manual_seed(seed)
    for group in groups.unique():
        (rows,) = torch.nonzero(groups == group, as_tuple=True)
        cost = torch.cdist(x[rows], eps[rows]).square()
        found[rows] = rows[_assigned(cost) if name == "ot" else _drawn(cost, entropy, generator)]
    return found


def _assigned(cost: Tensor) -> Tensor:
    """The cheapest permutation, by the library's exact assignment: the column of each row."""
    from scipy.optimize import linear_sum_assignment  # comes with POT

    return torch.as_tensor(linear_sum_assignment(cost.numpy())[1])


def _drawn(cost: Tensor, entropy: float, generator: Generator) -> Tensor:
    """A permutation from the entropic plan: rows in random order choose among the columns that are left."""
    import ot

    mean = float(cost.mean()) or 1.0
    weights = torch.full((len(cost),), 1 / len(cost), dtype=cost.dtype)
    # In logarithms, or a small entropy underflows; what has not converged is a little off the plan, and a permutation still.
    plan = ot.sinkhorn(weights, weights, cost, entropy * mean, method="sinkhorn_log", numItermax=200, warn=False)
    found, free = torch.empty(len(cost), dtype=torch.int64), torch.ones_like(weights)
    for row in torch.randperm(len(cost), generator=generator).tolist():
        shares = plan[row] * free
        column = int(torch.multinomial(shares if shares.sum() > 0 else free, 1, generator=generator))
        found[row], free[column] = column, 0
    return found
