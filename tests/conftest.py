"""Test session setup: Triton kernels run under the interpreter where there is no GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Workers of pytest-xdist share the cores: with more threads than cores, every parallel region waits for a time slice, and small
# tensors take up to 40 times as long. Tests of several threads set their number themselves.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))

from oracles.stand_in import stand_in_hessian, stand_in_loss  # noqa: E402

import fusedopt  # noqa: E402, F401  (torch and the environment come first)
from fusedopt.curvature import EstimatesHessian  # noqa: E402
from fusedopt.losses import TakesLoss  # noqa: E402


@pytest.fixture(autouse=True)
def stand_in(request, monkeypatch):
    """Rules that read the loss or the Hessian get one where a test gives none: most tests step every class alike."""
    if "own_loss" not in request.keywords:
        params = lambda opt: [p for group in opt.param_groups for p in group["params"]]  # noqa: E731
        monkeypatch.setattr(TakesLoss, "_without_loss", lambda opt: stand_in_loss(params(opt)))
        monkeypatch.setattr(EstimatesHessian, "_without_estimates", give_estimates)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def give_estimates(opt, owners):
    for tensor_id, p, group in owners:
        opt.put_estimate(tensor_id, p, group, stand_in_hessian(p))
