"""Gradient transforms for any rule: `AdamW(..., gradient_transforms=[Grokfast(), OrthoGrad()])`. See base.py."""

from fusedopt.transforms.base import Transform
from fusedopt.transforms.clipping import AdaptiveClip, ClipComponents, ClipFraction, ClipValue
from fusedopt.transforms.critical import CriticalMomenta
from fusedopt.transforms.filters import Grokfast, GrokfastMA
from fusedopt.transforms.fisher import InverseFisher
from fusedopt.transforms.lora import LoRAOne, LoRAPro
from fusedopt.transforms.losses import Bloop
from fusedopt.transforms.masking import Cautious, GradientGrouping
from fusedopt.transforms.normalising import Centralize, Normalize, UnitNorm
from fusedopt.transforms.orthogonal import OrthoGrad
from fusedopt.transforms.private import ErrorFeedback, PrivacyNoise
from fusedopt.transforms.rates import Hypergradient
from fusedopt.transforms.tangent import TangentProjection
from fusedopt.transforms.wrappers import LAWN, Layca, Lookahead, NormLoss, QuantizationPull, StableDecay

TRANSFORMS = (
    Grokfast, GrokfastMA, OrthoGrad, ClipValue, ClipFraction, ClipComponents, AdaptiveClip, Centralize, Normalize, UnitNorm,
    Lookahead, LAWN, Layca, TangentProjection, QuantizationPull, NormLoss, StableDecay, Hypergradient, Bloop, PrivacyNoise,
    ErrorFeedback, Cautious, GradientGrouping, CriticalMomenta, LoRAPro, LoRAOne, InverseFisher,
)  # fmt: skip

__all__ = ["TRANSFORMS", "Transform", "list_transforms", *(cls.__name__ for cls in TRANSFORMS)]


def list_transforms() -> list[str]:
    """Class names of the gradient transforms."""
    return sorted(cls.__name__ for cls in TRANSFORMS)


def state_names() -> tuple[str, ...]:
    """Names of everything that gradient transforms keep in a parameter's state dict."""
    return tuple(name for cls in TRANSFORMS for name in cls.names())
