"""M-FAC: Frantar, Kurtic and Alistarh (arXiv 2107.03356): SGD with gradients preconditioned by the inverse empirical Fisher matrix
of a window of them (fusedopt/transforms/fisher.py)."""

from __future__ import annotations

from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_nonnegative
from fusedopt.rule import Rule
from fusedopt.rules.sgd import SGD
from fusedopt.transforms.base import listed
from fusedopt.transforms.fisher import InverseFisher


class MFAC(FusedOptimizer):
    """M-FAC: u = (damping I + (1 / window) G^T G)^-1 g, where the rows of G are the last `window` gradients with g itself, over all
    tensors; b = momentum b + u (b = u at the first step); p -= lr b.

    For models small enough that a window of gradients fits beside them, where second-order steps pay off. G takes window x
    parameters x 4 bytes: 100 GB for 25 million parameters and the paper's window; bf16 half, int8 a quarter, and a window of 64
    a sixteenth of that. A step passes twice over it.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, a float or a 1-element tensor. A first step is about lr window / |g| long.
        momentum: 0 keeps no state for it.
        weight_decay: L2 coefficient, of u: it is not preconditioned.
        decoupled_weight_decay: p -= lr weight_decay p instead.
        window, damping, history_format: see `InverseFisher`.
        **options: shared options, see `FusedOptimizer`. state_format is that of the momentum; clip_grad_norm clips u, and
            gradient_transforms act before the window sees gradients. No gradient release or offload, and no DTensors.

    Steps whose gradients are not all finite are left out: nothing changes, and metrics count them as skipped. Without
    capturable=True a step waits for that. The learning rate may follow any schedule; G holds plain gradients.

    Raises:
        ValueError: a hyperparameter is out of range.
    Source: arXiv 2107.03356, with the products of all pairs of rows in place of its recursion; the steps are the same.
    """

    decay_mode = "coupled"
    torch_counts_steps = False

    def __init__(
        self,
        params,
        lr=1e-3,
        momentum=0.0,
        weight_decay=0.0,
        decoupled_weight_decay=False,
        window=1024,
        damping=1e-5,
        history_format="fp32",
        gradient_transforms=(),
        **options,
    ):
        check_nonnegative(momentum, "momentum value")
        fisher = InverseFisher(window, damping, history_format)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": 0.0,
            "nesterov": False,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, gradient_transforms=(*listed(gradient_transforms), fisher), **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return SGD.rule_for(group)
