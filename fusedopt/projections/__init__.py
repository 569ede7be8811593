"""Projections: the subspaces in which matrices are stepped, chosen with `projection=`."""

from fusedopt.projections.base import Projection
from fusedopt.projections.galore import GaLore

_projections: dict[str, type[Projection]] = {cls.name: cls for cls in (GaLore,)}


def list_projections() -> list[str]:
    """Names of the projections, as in `describe()` and in names such as "galore_adamw"."""
    return sorted(_projections)


def get_projection(name: str) -> type[Projection]:
    return _projections[name]


__all__ = ["GaLore", "Projection", "get_projection", "list_projections"]
