"""The report behind opt.plan().explain(): buckets, backends, formats, launches, products, bytes per step, reasons."""

from __future__ import annotations

from fusedopt.abi import Phase
from fusedopt.rule import get_rule
from fusedopt.states import option_overrides
from fusedopt.transforms import base as transforms


def bytes_per_step(bucket, phase: Phase) -> float:
    """Bytes a launch must move: every stream once per read and once per write."""
    key, rule = bucket.key, bucket.slots[0].rule
    n = sum(s.target.numel() for s in bucket.slots)
    p, g = key.param_dtype.itemsize, key.grad_dtype.itemsize
    states = sum(f.bytes_per_element for f in bucket.slots[0].formats)
    if phase == Phase.DIRECTION:  # the update takes the parameter's place and is not read
        return n * (g + p + 2 * states)
    if phase == Phase.NORM:
        return n * (g + (p if rule.takes_norms else 0))
    read, written = bucket.slots[0].precision.traffic(key.param_dtype)
    return n * (read + g + states + (0 if phase == Phase.PROBE else written + states))


def _low_rank(site) -> str:
    return " x ".join(map(str, site.update.shape)) if site.launched else "itself"


class PlanReport:
    """A plan as numbers and text."""

    def __init__(self, opt, plan):
        self._name, self._plan = type(opt).__name__, plan

    @property
    def buckets(self) -> list[dict]:
        """One dict per bucket: device, backend, rule, dtypes, formats, precision, tensors, elements, launches, bytes, reasons.

        With clipping, projected parameters are in a second one, for the norm of their full gradients.
        """
        out = []
        for device in self._plan.devices:
            for bucket in (*device.buckets, *device.wholes):
                phases = [ph for ph in bucket.works if ph != Phase.NORM or bucket in device.normed]
                key = bucket.key
                out.append({
                    "device": str(key.device), "backend": key.backend, "rule": key.rule,
                    "param_dtype": str(key.param_dtype).removeprefix("torch."),
                    "grad_dtype": str(key.grad_dtype).removeprefix("torch."),
                    "formats": dict(zip(bucket.slots[0].rule.state_names, key.formats, strict=True)),
                    "precision": key.precision, "aligned": key.aligned, "tensors": len(bucket.slots),
                    "elements": sum(s.target.numel() for s in bucket.slots),
                    "phases": [ph.name.lower() for ph in phases],
                    "launches": len(phases) if bucket.native else 0,
                    "bytes": sum(bytes_per_step(bucket, ph) for ph in phases),
                    "reasons": sorted({r for s in bucket.slots for r in s.reasons}),
                })  # fmt: skip
        return out

    @property
    def operations(self) -> list[dict]:
        """What is done for each projected or factored parameter by itself, beside the launches, in a step between two
        refreshes: one dict per device, backend and kind, with name, count, elements and bytes."""
        found: dict[tuple, dict] = {}
        for slot in self._plan.slots:
            for name, moved in [] if slot.site is None else slot.site.operations(slot):
                key = (str(slot.param.device), slot.key.backend, name)
                start = {"device": key[0], "backend": key[1], "name": name, "count": 0, "elements": 0, "bytes": 0.0}
                entry = found.setdefault(key, start)
                entry["count"] += 1
                entry["elements"] += slot.param.numel()
                entry["bytes"] += moved
        return list(found.values())

    @property
    def launches(self) -> int:
        """Launches of one step that many tensors share; `operations` come on top."""
        return sum(b["launches"] for b in self.buckets)

    @property
    def bytes(self) -> float:
        """Bytes one step must move, between two refreshes."""
        return sum(entry["bytes"] for entry in (*self.buckets, *self.operations))

    def _alone(self) -> list[str]:
        """Tensors that a projection steps by itself, in pieces: they share no launches, and are in no bucket."""
        found: dict[tuple, int] = {}
        for slot in self._plan.slots:
            if slot.site is not None and not slot.site.launched:
                formats = ", ".join(f"{s} {f.name}" for s, f in zip(slot.rule.state_names, slot.formats, strict=True))
                key = (slot.param.device, slot.key.backend, slot.site.projection.name, slot.param.dtype,
                       slot.precision.name, formats or "no full-size states")  # fmt: skip
                found[key] = found.get(key, 0) + 1
        return [
            f"  {device} {backend}: {name}, p {str(dtype).removeprefix('torch.')} ({precision}), {formats}; {count} tensors "
            "stepped one by one, in pieces"
            for (device, backend, name, dtype, precision, formats), count in found.items()
        ]

    def _notes(self) -> list[str]:
        notes = []
        for slot in self._plan.slots:
            what = f"parameter {slot.tensor_id} {tuple(slot.owner.shape)}"
            wanted = self._plan.opt.param_groups[slot.group]
            small = slot.owner.numel() < wanted["min_quantized_numel"]
            asked = wanted["state_format"]
            if small and asked != "fp32" and slot.rule.states and all(f.name == "fp32" for f in slot.formats):
                notes.append(
                    f"{what}: fp32 states, fewer than min_quantized_numel={wanted['min_quantized_numel']} elements"
                )
            if options := option_overrides(slot.owner):
                notes.append(f"{what}: overridden, {', '.join(f'{k}={v!r}' for k, v in options.items())}")
            projection = self._plan.opt.projection_for(slot.owner, wanted)
            asked = option_overrides(slot.owner).get("projection", wanted["projection"])
            if projection is not None:
                shape = slot.site.shape
                notes.append(
                    f"{what}: projected by {projection.name}, {shape[0]} x {shape[1]} to {_low_rank(slot.site)}"
                )
            elif asked is not None:
                notes.append(f"{what}: not projected, {asked.refuses(slot.owner)}")
            if slot in self._plan.gapped:
                notes.append(f"{what}: a view with gaps, stepped through a dense copy")
            elif slot.copy_grad:
                notes.append(f"{what}: gradient copied to the parameter's strides {slot.owner.stride()} each step")
        return notes

    def explain(self) -> str:
        """A table of the buckets, totals, and every reason for a fallback."""
        alone = sum(o["count"] for o in self.operations)
        more = f" and {alone} operations of single tensors" if alone else ""
        lines = [f"{self._name}: {self.launches} launches{more}, {self.bytes / 1e6:.3f} MB per step"]
        if self._plan.opt.gradient_transforms:
            listed = ", ".join(map(repr, self._plan.opt.gradient_transforms))
            size = transforms.state_bytes(self._plan.opt) / 1e6
            lines.append(
                f"  before these, gradients are copied to fp32 and changed by {listed}; not counted here; their states take "
                f"{size:.3f} MB"
            )
        for b in self.buckets:
            formats = ", ".join(f"{k} {v}" for k, v in b["formats"].items()) or "no states"
            lines.append(
                f"  {b['device']} {b['backend']}: {b['rule']}, p {b['param_dtype']} ({b['precision']}), g {b['grad_dtype']}, "
                f"{formats}; {b['tensors']} tensors, {b['elements']} elements"
                f"{'' if b['aligned'] else ', not 16-byte aligned'}; phases {'+'.join(b['phases'])}, {b['bytes'] / 1e6:.3f} MB"
            )
            lines += [f"    not {reason}" for reason in b["reasons"]]
            if wide := [state.name for state in get_rule(b["rule"]).states if state.wide]:
                lines.append(f"    {', '.join(wide)}: fp32 in every state_format, others round small increments away")
        lines += [
            f"  {o['device']} {o['backend']}: {o['name']}, one for each of {o['count']} tensors, {o['elements']} elements; "
            f"{o['bytes'] / 1e6:.3f} MB"
            for o in self.operations
        ]
        lines += self._alone()
        notes = self._notes()
        lines += [f"  {note}" for note in notes[:20]]
        if len(notes) > 20:
            lines.append(f"  ... and {len(notes) - 20} more")
        return "\n".join(lines)

    __str__ = explain
