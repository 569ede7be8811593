"""GaLore of sharded matrices (DTensor: FSDP2, tensor parallelism, hybrid meshes).

R = P^T G (left; P [rows, r]) or G P^T (right; P [r, cols]). Where processes share out the rows or columns that the projection
keeps, each projects its part of G by itself, and R, the states and the update are split like it. Where they share out those that
are projected away, each has its part of P, the parts' products are summed over these processes (one all-reduce of R), and every
one has all of R and steps it to the same bits. A refresh gathers the gradient and the old projector; each process computes the
whole new one, the same bits as one process alone, and keeps its part. So no step but a refresh sends more than R.
"""

from __future__ import annotations

from fusedopt.distributed import Sharding, add_up, is_dtensor, local, shard_of, sharded_dims, split_groups
from fusedopt.projections.basis import BasisSite


class ShardedBasisSite(BasisSite):
    """One sharded matrix. `whole` is its shape, `shape` that of this process's shard."""

    kept_exactly = False

    def __init__(self, projection, p, entry, grad_dtype, tensor_id, group, place):
        super().__init__(projection, p, entry, grad_dtype, tensor_id, group, place)
        self.sharding = Sharding(p)
        self.shape = self.sharding.local_matrix
        self.projector = projection.tensor_like(p, "projector")
        self.adders = split_groups(p, 0 if self.side == "left" else 1)

    def old_basis(self):
        stored = self.entry.stored["projector"]
        return stored.full_tensor() if is_dtensor(stored) else stored

    def set_basis(self, basis):
        self.basis().copy_(shard_of(self.projector, basis.to(self.basis().dtype)))

    def fresh_basis(self, grad, step):
        return super().fresh_basis(grad if self.projection.method == "random" else self.sharding.full(grad), step)

    def before(self, grad, step, slot, steps):
        super().before(grad, step, slot, steps)
        add_up(self.projected, self.adders)

    def project(self, grad, slot):
        if grad.numel():
            super().project(grad, slot)
        else:
            self.projected.zero_()

    def after(self, grad, slot, steps):
        if slot.param.numel():
            super().after(grad, slot, steps)


def refusal(p) -> str | None:
    """Why a DTensor has no rows or columns that processes could share out, or None."""
    split = {dim for _, dim in sharded_dims(p)}
    if split <= ({0, 1} if p.dim() == 2 else {0}) and local(p).is_contiguous():
        return None
    return f"takes matrices whose first dimension is split (of 2-D ones also the second), not {p.placements} of {p.dim()}-D ones"
