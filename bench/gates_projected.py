"""Launches, products and bytes per step of projected and factored optimizers, as planned and as counted, without a clock."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch

import fusedopt
from bench import cases
from fusedopt.backends.select import get_backend
from fusedopt.projections import ops

SIZE, RANK = 512, 128  # r / m = 1/4
NEVER = 10**9
# Bytes per parameter of a bf16 matrix, r / m = 1/4, with bf16 and with int8 states: (name, options, physical limits, and what
# this design moves more). Limits: each full-size stream once, the states and the update's low-rank factor once each way.
RHO = RANK / SIZE
THROUGH_MEMORY = 4 * RHO  # R is written by the projection and read by the launch of directions
PROJECTOR = 4 * RHO  # of a square matrix, read by two products; of an m x n one with m < n, m/n of it
PACKED = 2 * (0.5 + 5 / 256) * RHO
LOW_RANK = {"bf16": 12 * RHO, "int8": (4 + 4 * (1 + 4 / 256)) * RHO}
BYTES = (
    ("galore_adamw", {"rank": RANK, "update_every": NEVER}, 6.0, THROUGH_MEMORY + PROJECTOR,
     "R goes through memory (1.0), two products read the projector (1.0)"),
    ("qgalore_adamw", {"rank": RANK, "update_every": NEVER}, 6.0, THROUGH_MEMORY + PACKED,
     "R goes through memory (1.0), two products read the int4 projector"),
    ("frugal_adamw", {"density": RHO, "update_every": NEVER}, 8.0, THROUGH_MEMORY + PROJECTOR + 2 * RHO,
     "R goes through memory (1.0) and into the second product (0.5), two products read the projector (1.0)"),
    ("dct_adamw", {"rank": RANK, "update_every": NEVER}, 6.0, THROUGH_MEMORY + 1.5 * PROJECTOR,
     "R goes through memory (1.0), the columns are made (0.5) and read by two products (1.0)"),
    ("apollo_adamw", {"rank": RANK, "update_every": NEVER}, 8.0, 2.0 + THROUGH_MEMORY + PROJECTOR + 2 * RHO,
     "norms read G again (2.0), R (0.5); R goes through memory (1.0), the projector is drawn and read (1.0)"),
)  # fmt: skip
FULL_SIZE = {"galore_adamw": 6, "qgalore_adamw": 6, "dct_adamw": 6, "apollo_adamw": 10, "apollo_mini_adamw": 10}
FACTORED = (
    ("adafactor", {"scale_parameter": False, "relative_step": False, "lr": 1e-3}, 10.0),
    ("adafactor", {}, 12.0),  # and reads the weights for their size
    ("microadam", {"lr": 1e-3}, 7.5),
)


def matrices(shapes, dtype: torch.dtype, device) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.full(shape, 0.5, dtype=dtype, device=device)) for shape in shapes]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    return params


def planned(name: str, options: dict, form: str | None = None, size: int = SIZE, device="cpu") -> float:
    """Bytes per parameter that the plan of one bf16 matrix counts."""
    more = {} if form is None else {"state_format": form, "min_quantized_numel": 0}
    (p,) = matrices([(size, size)], torch.bfloat16, device)
    return fusedopt.create(name, [p], **options, **more).plan().bytes / p.numel()


def bytes_rows(device) -> list[tuple[str, float, float, str]]:
    """(what, bytes per parameter, limit, note)."""
    rows = []
    for name, options, full, more, why in BYTES:
        for form, low_rank in LOW_RANK.items():
            limit = full + low_rank
            found = planned(name, options, form, device=device)
            what = f"{name} {form} states, p and g bf16, rank m/4"
            rows.append((what, found, limit + more, f"physical limit {limit:.2f}: {why}"))
    for name, limit in FULL_SIZE.items():
        options = {} if name == "apollo_mini_adamw" else {"rank": 1}
        rows.append((f"{name} rank 1, p and g bf16: full-size streams", planned(name, options, device=device), limit + 0.15,
                     "G once, p once each way" if limit == 6 else "G three times, p once each way"))  # fmt: skip
    for name, options, limit in FACTORED:
        rows.append((f"{name}{' relative' if not options else ''}, p and g bf16", planned(name, options, device=device),
                     limit + 0.05, ""))  # fmt: skip
    return rows


@contextlib.contextmanager
def products_counted() -> Iterator[Counter]:
    """Counts projections and updates of single tensors inside the context."""
    counts: Counter = Counter()

    def counting(name, work):
        def call(*args):
            counts[name] += 1
            return work(*args)

        return call

    with (
        mock.patch.object(ops, "project", counting("projection", ops.project)),
        mock.patch.object(ops, "apply", counting("update", ops.apply)),
    ):
        yield counts


def launch_rows(backend: str, device, counted, elements: int) -> list[tuple[str, str, str]]:
    """(what, counted, expected) of the 291 tensors of Llama 2 7B: one launch of directions for all projected ones, one for
    all others, one product to project each and one to update it; with clipping a norm of either kind more."""
    shapes = cases.select(["llama2_7b"])[0].shrunk(elements).shapes
    projected = sum(len(shape) == 2 for shape in shapes)
    rows = []
    for form in ("fp32", "int8"):
        for clip in (None, 1.0):
            params = matrices(shapes, torch.float32, device)
            projection = fusedopt.GaLore(rank=2, update_every=NEVER, method="random")
            opt = fusedopt.AdamW(params, projection=projection, state_format=form, min_quantized_numel=0, backend=backend,
                                 clip_grad_norm=clip)  # fmt: skip
            opt.step()
            report = opt.plan()
            with counted(get_backend(backend)) as phases, products_counted() as products:
                opt.step()
            plan = Counter(phase for bucket in report.buckets for phase in bucket["phases"])
            plan.update({o["name"]: o["count"] for o in report.operations})
            found = Counter(phase.name.lower() for phase in phases) + products
            expected = Counter(direction=1, fused=1, projection=projected, update=projected)
            expected += Counter(norm=2 if clip else 0)
            what = f"{backend} galore_adamw {form}, {len(shapes)} tensors{', clip' if clip else ''}"
            rows += [(f"{what}: counted", found, expected), (f"{what}: planned", plan, expected)]
    return [(what, _text(found), _text(expected)) for what, found, expected in rows]


def _text(counts: Counter) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
