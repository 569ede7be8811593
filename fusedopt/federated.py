"""The server of federated learning: the clients' mean change as the gradient of any rule (arXiv 2003.00295, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch


@torch.no_grad()
def pseudo_gradient(
    params: Iterable[torch.Tensor],
    client_params: Iterable[Iterable[torch.Tensor]],
    weights: Sequence[float] | None = None,
) -> None:
    """Sets p.grad = p - (weighted mean of the clients' p) for the server's parameters, in place of any gradient there is.

    A step of `FedAdam`, `FedYogi`, `FedAdagrad`, or of SGD (lr=1 is plain averaging), then moves the server.

    Args:
        params: the server's parameters, as clients had them before their round.
        client_params: the parameters of each client after it, in the order and shapes of the server's, on any device. A client
            may be a generator: one client's parameters are looked at before the next one's.
        weights: one number for each client, not negative, e.g. its number of examples; None for equal weights.
    Differences are summed in fp32 (fp64 of fp64 parameters), one sum beside each parameter.
    Raises ValueError: no client, weights that do not fit, or a client with other parameters; no gradient is set then.
    Source: arXiv 2003.00295, algorithm 1.
    """
    params, clients = list(params), list(client_params)
    if not clients:
        raise ValueError("pseudo_gradient: there is no client; client_params is a list with the parameters of each")
    shares = _shares(weights, len(clients))
    totals = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
    for number, (client, share) in enumerate(zip(clients, shares, strict=True)):
        client = list(client)
        if len(client) != len(params):
            raise ValueError(f"pseudo_gradient: client {number} has {len(client)} parameters, the server {len(params)}")
        for i, (total, p, theirs) in enumerate(zip(totals, params, client, strict=True)):
            if theirs.shape != p.shape:
                raise ValueError(
                    f"pseudo_gradient: parameter {i} of client {number} has shape {tuple(theirs.shape)}, the server's "
                    f"{tuple(p.shape)}"
                )
            total.add_(p.to(total.dtype) - theirs.detach().to(total), alpha=share)
    for p, total in zip(params, totals, strict=True):
        p.grad = total.to(p.dtype)


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    weights = [float(w) for w in weights]
    if len(weights) != count:
        raise ValueError(f"pseudo_gradient: {len(weights)} weights for {count} clients")
    if not all(w >= 0 and math.isfinite(w) for w in weights) or not sum(weights) > 0:
        raise ValueError(f"pseudo_gradient: weights {weights}; they are 0 or more, and not all 0")
    return [w / sum(weights) for w in weights]
