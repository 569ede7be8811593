"""fusedopt: optimizer steps at memory bandwidth: multi-tensor launches, 8-bit states, bf16-safe parameters."""

from typing import TYPE_CHECKING

from fusedopt import rule as _rule
from fusedopt.backends.select import use_backend
from fusedopt.factory import create
from fusedopt.federated import pseudo_gradient
from fusedopt.files import latest_checkpoint, load_checkpoint, save_checkpoint
from fusedopt.formats import list_formats
from fusedopt.lora import LoraPair, lora_one_init_, lora_pairs, lora_plus_groups
from fusedopt.norms import clip_grad_norm_, global_norm
from fusedopt.numerics import NonFiniteError, check_numerics
from fusedopt.offloading import offload
from fusedopt.optimizer import FusedOptimizer
from fusedopt.precision import list_precisions
from fusedopt.prediction import predicted_weights
from fusedopt.projected_linear import projected_linear
from fusedopt.projections import (
    DCT,
    Apollo,
    ApolloMini,
    Conda,
    Frugal,
    GaLore,
    QGaLore,
    SubsetNorm,
    SubspaceMomentum,
    list_projections,
)
from fusedopt.projections.sparse_grad import GradientBasis, SparseGrad, sparse_grad_bases
from fusedopt.quantize import dequantize_blockwise, quantize_blockwise
from fusedopt.release import ReleasedGradients, release_gradients
from fusedopt.rule import list_rules
from fusedopt.rules.ranger21 import ranger21_schedule
from fusedopt.state_files import export_states, import_states
from fusedopt.states import override, state_bytes
from fusedopt.transforms import TRANSFORMS, list_transforms
from fusedopt.transforms.losses import auxiliary_backward, pcgrad
from fusedopt.transforms.private import batch_size_tests, private_gradients
from fusedopt.transforms.rates import GradES
from fusedopt.transforms.zeroth import Direction, ZerothOrder, apply_directions
from fusedopt.udog import UDoG
from fusedopt.weights import Int8Weight, quantize_weights_

_rule.scan()

from fusedopt.gauss_newton import EGN  # noqa: E402  (these step by a rule)
from fusedopt.lora_optimizers import LoFTAdamW, LoRAProAdamW  # noqa: E402
from fusedopt.mfac import MFAC  # noqa: E402
from fusedopt.model_building import SMB  # noqa: E402

if TYPE_CHECKING:  # what the two next lines find, for type checkers and editors
    from fusedopt.classes import *  # noqa: F403

globals().update({cls.__name__: cls for cls in _rule.optimizers().values()})  # one class per rule: AdamW, Lion, ...
globals().update({cls.__name__: cls for cls in TRANSFORMS})  # gradient transforms: Grokfast, OrthoGrad, ...

__version__ = "0.1.0"

__all__ = [
    *(cls.__name__ for cls in _rule.optimizers().values()),
    *(cls.__name__ for cls in TRANSFORMS),
    "DCT",
    "Apollo",
    "ApolloMini",
    "Conda",
    "Frugal",
    "Direction",
    "EGN",
    "FusedOptimizer",
    "GaLore",
    "GradES",
    "GradientBasis",
    "LoFTAdamW",
    "LoRAProAdamW",
    "LoraPair",
    "Int8Weight",
    "MFAC",
    "QGaLore",
    "NonFiniteError",
    "ReleasedGradients",
    "SMB",
    "SparseGrad",
    "UDoG",
    "SubsetNorm",
    "SubspaceMomentum",
    "ZerothOrder",
    "apply_directions",
    "auxiliary_backward",
    "batch_size_tests",
    "check_numerics",
    "clip_grad_norm_",
    "create",
    "dequantize_blockwise",
    "export_states",
    "global_norm",
    "import_states",
    "latest_checkpoint",
    "list_formats",
    "list_precisions",
    "list_projections",
    "list_rules",
    "list_transforms",
    "load_checkpoint",
    "lora_one_init_",
    "lora_pairs",
    "lora_plus_groups",
    "offload",
    "override",
    "pcgrad",
    "predicted_weights",
    "private_gradients",
    "projected_linear",
    "pseudo_gradient",
    "quantize_blockwise",
    "quantize_weights_",
    "ranger21_schedule",
    "release_gradients",
    "save_checkpoint",
    "sparse_grad_bases",
    "state_bytes",
    "use_backend",
]
