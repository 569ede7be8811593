"""Optimizers that step the two factors of LoRA adapters together: LoRA-Pro (arXiv 2407.18242) and LoFT (arXiv 2505.21289)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fusedopt.checks import describe
from fusedopt.lora import LoraPair, as_pairs
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_betas, check_nonnegative
from fusedopt.projections.loft import LOFT_OTHERS, LoftPair
from fusedopt.projections.lora_pro import LoraProPair
from fusedopt.projections.paired import PairProjection
from fusedopt.rule import Rule
from fusedopt.rules.adam import ADAM


class StepsPairs(FusedOptimizer):
    """Base: pairs of factors go through `pair_projection`, all other parameters through the rule."""

    decay_mode = "decoupled"
    splits_models = True
    steps_together = True
    pair_projection: type[PairProjection]
    pairs: tuple[LoraPair, ...] = ()

    def __init__(self, params, pairs: Iterable[LoraPair] | None, defaults: dict, **options):
        name = type(self).__name__
        if isinstance(params, torch.nn.Module):
            pairs = as_pairs(params if pairs is None else pairs)
            params = [(n, p) for n, p in params.named_parameters() if p.requires_grad]
        elif pairs is None:
            raise ValueError(f"{name}: parameters do not say which are factors of one adapter: give it the model, or pairs= of "
                             "fusedopt.lora_pairs(model).")  # fmt: skip
        if options.get("projection") is not None:
            raise ValueError(f"{name}: it steps adapters by their pairs, so it takes no projection. Use AdamW for one.")
        if options.get("differentiable"):
            raise ValueError(f"{name}: differentiable=True is not supported. Use AdamW with fused=False.")
        self.pairs = as_pairs(pairs)
        super().__init__(params, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return ADAM

    def projection_for(self, p: torch.Tensor, group: dict) -> PairProjection | None:
        if self._roles is None:
            roles = ((x, pair, role) for pair in self.pairs for x, role in ((pair.A, "A"), (pair.B, "B")))
            self._roles = {id(x): self.pair_projection(pair, role) for x, pair, role in roles}
        return self._roles.get(id(p))

    _roles: dict[int, PairProjection] | None = None

    def _check_projection(self, group) -> None:
        if group["projection"] is not None:
            raise ValueError(
                f"{type(self).__name__}: it steps adapters by their pairs, so no group takes a projection."
            )

    def _step_tensors(self, params: list[torch.Tensor], grads: list[torch.Tensor | None]) -> None:
        place = {id(p): i for i, p in enumerate(params)}
        if not any(id(x) in place for pair in self.pairs for x in (pair.A, pair.B)):
            raise RuntimeError(
                f"{type(self).__name__}: none of its pairs is among its parameters. Something has replaced them (FSDP, DeepSpeed): "
                "make the optimizer of the parameters that are there, or use AdamW."
            )
        for pair in self.pairs:
            a, b = (place.get(id(x)) for x in (pair.A, pair.B))
            live = [i for i in (a, b) if i is not None and grads[i] is not None]
            if len(live) == 1:
                what = describe(type(self).__name__, live[0], params[live[0]])
                raise RuntimeError(
                    f"{what} is a factor of {pair.name!r}, whose other factor has no gradient or is not this optimizer's. Train "
                    "both, or leave the pair out: pairs=lora_pairs(model, filter=...)."
                )
            if not live:
                continue
            what = f"{describe(type(self).__name__, live[0], params[live[0]])}: the other factor of {pair.name!r}"
            if pair.A.device != pair.B.device:
                raise RuntimeError(f"{what} is on {pair.B.device}. Put them on one device.")
            if len({torch.float64 in (params[i].dtype, g.dtype) for i in live if (g := grads[i]) is not None}) > 1:
                raise RuntimeError(f"{what} is {pair.B.dtype}: float64 goes with float64 only. Give both one dtype.")
        super()._step_tensors(params, grads)


class LoRAProAdamW(StepsPairs):
    """LoRA-Pro with AdamW's moments of the full weight: with t_A, t_B the factor gradients of `LoRAPro`, m and v of the full
    gradient s (B t_A + t_B A) [m, n], and N = m_hat / (sqrt(v_hat) + eps), the factors step by LoRA-Pro's gradients of N:
    A -= lr t_A(N), B -= lr t_B(N), both with decoupled weight decay. Parameters that are no factors are stepped by AdamW.

    When to use it: to come near full fine-tuning with LoRA where the state of full-size moments has room (state_format="int8": 2
    bytes for each element of the adapted weights); the learning rate is that of full fine-tuning. Else `LoRAPro` with SGD.

    Args:
        params: a model, of which all trainable parameters are taken, or (named) parameters or groups of them with `pairs`.
        lr: learning rate, a float or a 1-element tensor; groups may differ in it (lora_plus_groups).
        betas: decay rates of the first and second moment, those of factor B's group.
        eps: added to the denominator.
        weight_decay: decoupled, of the factors themselves.
        damping: of the inverses of B^T B and A A^T, as in `LoRAPro`; of factor B's group.
        pairs: of `lora_pairs(model)`; those of the model by default.
        **options: shared options, see `FusedOptimizer`; state_format is that of the moments, clip_grad_norm clips the gradients of
            the factors. No projection, offload, gradient release, DTensor or differentiable=True.

    The moments of a pair lie in the state of its B. Nothing of full size is made in a step: rows go through small buffers.

    Raises:
        ValueError: a hyperparameter is out of range, or pairs are missing. RuntimeError at the step: one factor of a pair has a
        gradient and the other has none; nothing has been changed then.
    Source: arXiv 2407.18242, algorithm 2; s is each adapter's own, which the authors' code fixes at 2.
    """

    pair_projection = LoraProPair

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, damping=1e-8, *, pairs=None,
                 **options):  # fmt: skip
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        check_nonnegative(damping, "damping")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "damping": damping}
        super().__init__(params, pairs, defaults, **options)


class LoFTAdamW(StepsPairs):
    """LoFT: AdamW of the full weight, done on its factors. Of A, with C = (B^T B + damping_a)^-1 and B_old the B of the last call:
        g = C g_A / s,  R = C B^T B_old,  m = beta1 R m + (1 - beta1) g,
        P_j = beta2 R P_j R^T + (1 - beta2) g_j g_j^T of each column j,
        U = B m / (sqrt(V / c2) + eps) with V_ij = b_i^T P_j b_i,  A -= lr C B^T U / (c1 s) + weight_decay A,
    and of B the same with rows, C = (A A^T + damping_b)^-1 and A_old. c1, c2 are Adam's bias corrections. Odd calls move B, even
    calls A; the states of both follow at every call. Parameters that are no factors are stepped by Adam at every call.

    When to use it: for LoRA that ends where full fine-tuning does, without state of the full size: r (r + 2) numbers for each row
    and column of a weight. `LoRAProAdamW` keeps full-size moments, and moves both factors at each step.

    Args:
        params: a model, of which all trainable parameters are taken, or (named) parameters or groups of them with `pairs`.
        lr: learning rate of the full weight, a float or a 1-element tensor.
        betas: decay rates of the first and second moment. eps: added to the denominator.
        weight_decay: NOT multiplied by lr: the share of itself that a parameter loses each time it is moved, so 0.01 is strong. As
            in the authors' code; lr times AdamW's weight_decay decays about as AdamW does.
        alternate: move one factor a call; False moves both.
        damping_a, damping_b: of C, as in the authors' code.
        use_scale: s is the adapter's scale, so that lr is that of full fine-tuning; False takes 1, as the authors' code does.
        transposed_calibration: the authors' code's R^T P R (for B likewise) in place of R P R^T. Only for comparisons with it.
        pairs: of `lora_pairs(model)`; those of the model by default.
        **options: shared options, see `FusedOptimizer`; state_format is that of parameters that are no factors, clip_grad_norm
            clips the gradients of the factors (the authors clip by those of the full weight). No projection, offload, gradient
            release, DTensor or differentiable=True.

    Both factors of a call see each other as they were before it; in the authors' code B sees the A that the call has just moved.

    Raises:
        ValueError: a hyperparameter is out of range, or pairs are missing. RuntimeError at the step: one factor of a pair has a
        gradient and the other has none; nothing has been changed then.
    Source: arXiv 2505.21289, and its code for the numbers.
    """

    pair_projection = LoftPair

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.01, *, alternate=True, damping_a=1e-6,
                 damping_b=1e-8, use_scale=True, transposed_calibration=False, pairs=None, **options):  # fmt: skip
        check_betas(betas, options)
        check_nonnegative(eps, "epsilon value")
        check_nonnegative(damping_a, "damping_a")
        check_nonnegative(damping_b, "damping_b")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alternate": bool(alternate),
            "damping_a": damping_a,
            "damping_b": damping_b,
            "use_scale": bool(use_scale),
            "transposed_calibration": bool(transposed_calibration),
        }
        super().__init__(params, pairs, defaults, **options)

    @classmethod
    def rule_for(cls, group) -> Rule:
        return LOFT_OTHERS
