"""Projections: the subspaces in which matrices are stepped, chosen with `projection=`."""

from fusedopt.projections.apollo import Apollo, ApolloMini
from fusedopt.projections.base import Projection
from fusedopt.projections.cosine import DCT
from fusedopt.projections.frugal import Frugal
from fusedopt.projections.galore import GaLore
from fusedopt.projections.qgalore import QGaLore

_projections: dict[str, type[Projection]] = {
    cls.name: cls for cls in (Apollo, ApolloMini, DCT, Frugal, GaLore, QGaLore)
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
    "Frugal",
    "GaLore",
    "Projection",
    "QGaLore",
    "get_projection",
    "list_projections",
]
