"""Projections: the subspaces in which matrices are stepped, chosen with `projection=`."""

from fusedopt.projections.apollo import Apollo, ApolloMini
from fusedopt.projections.base import Projection
from fusedopt.projections.conda import Conda
from fusedopt.projections.cosine import DCT
from fusedopt.projections.frugal import Frugal
from fusedopt.projections.galore import GaLore
from fusedopt.projections.qgalore import QGaLore
from fusedopt.projections.subset_norm import SubsetNorm
from fusedopt.projections.subspace_momentum import SubspaceMomentum

_projections: dict[str, type[Projection]] = {
    cls.name: cls for cls in (Apollo, ApolloMini, Conda, DCT, Frugal, GaLore, QGaLore, SubsetNorm, SubspaceMomentum)
}


def list_projections() -> list[str]:
    """Names of the projections, as in `describe()` and in names such as "galore_adamw"."""
    return sorted(_projections)


def get_projection(name: str) -> type[Projection]:
    return _projections[name]


__all__ = [
    "DCT",
    "Apollo",
    "ApolloMini",
    "Conda",
    "Frugal",
    "GaLore",
    "Projection",
    "QGaLore",
    "SubsetNorm",
    "SubspaceMomentum",
    "get_projection",
    "list_projections",
]
