"""Every generated section of README by its name, and the tables of GPUs and memory: what stands between two marks there."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench import cases
from bench.gpu_table import GPUS
from bench.predict import measured
from bench.report_losses import accuracy, demo, drift, muon, projections
from bench.report_results import NONE, Results, table
from bench.report_sentences import lowrank, offload, releasing, resuming, scaling, single
from bench.report_steps import by_case, halves, label, limits, of_provider, rivals, size, speed
from fusedopt.cli.estimate import Choice, Model, choices

SEVEN_B = "llama2_7b"
SHOWN = f"{SEVEN_B}:bf16"  # of the predictions; the files have the others


# GPUs


def gpu(results: Results) -> str:
    """Measured on a GPU, against torch fused of the same round; or that nothing was."""
    documents = results.same("run", lambda d: d["machine"]["device"] == "cuda")
    if not documents:
        return "There are no GPU measurements yet; `python -m bench gpu` makes them, `python -m bench report DIR` puts them here."
    name = documents[-1]["machine"]["gpu"]["name"]
    texts = [f"Measured on {name}, torch {documents[-1]['machine']['versions']['torch']}:"]
    for case_name, records in {**by_case(documents, "float32"), **by_case(documents, "bfloat16")}.items():
        rows = []
        for provider in dict.fromkeys(r["provider"] for case in records for r in case["results"]):
            for r in of_provider(records, provider):
                ratio = "-" if r["ratio"] is None else f"{r['ratio']['median']:.2f}"
                rows.append([label(provider), f"{r['ms']['median']:.3f}", ratio, f"{r['share_of_copy']['median']:.0%}"])
        heads = [f"{case_name}: {size(records[0])}", "measured ms", "to torch fused", "of the copy bandwidth"]
        texts.append(table(heads, rows))
    return "\n\n".join(texts)


def prediction(results: Results) -> str:
    """Predicted milliseconds and limits of one case by GPU, with a column of measured ones for each GPU that has any."""
    documents = {d["gpu"]["name"]: d for d in results.all("prediction")}
    documents = {name: documents[name] for name in GPUS if name in documents}
    if not documents:
        return NONE
    texts = []
    for case in dict.fromkeys(row["case"] for d in documents.values() for row in d["rows"] if row["case"] == SHOWN):
        heads, columns = [f"predicted ms and limit: {case}", "bytes per parameter"], []
        names: dict[str, float] = {}
        for name, content in documents.items():
            rows = {row["provider"]: row for row in content["rows"] if row["case"] == case}
            names |= {p.split("/", 1)[1]: row["bytes_per_parameter"] for p, row in rows.items()}
            backends = ("cuda", "triton") if content is next(iter(documents.values())) else ("cuda",)
            times = measured(GPUS[name], [path for path, _ in results.files])
            for backend in backends:
                heads.append(f"{GPUS[name].model}, {backend.upper() if backend == 'cuda' else 'Triton'}")
                columns.append({p: _predicted(rows.get(f"fusedopt-{backend}/{p}")) for p in names})
                here = {p: times.get((case, f"fusedopt-{backend}/{p}")) for p in names}
                if any(value is not None for value in here.values()):
                    heads.append(f"measured ms, {heads[-1]}")
                    columns.append({p: "-" if value is None else f"{value:.3g}" for p, value in here.items()})
        cells = [
            [label(f"fusedopt-cpu/{p}").removeprefix("fusedopt "), f"{moved:.2f}", *(column[p] for column in columns)]
            for p, moved in names.items()
        ]
        texts.append(table(heads, cells))
    return "\n\n".join(texts)


def kernels(results: Results) -> str:
    """Of every step kernel for bf16 parameters, compiled for an H200: registers, programs, bytes in flight, instructions."""
    content = next((d for d in results.all("prediction") if d["gpu"]["name"] == "h200"), None)
    if content is None:
        return NONE
    rows = []
    for row in content["rows"]:
        if row["case"] == SHOWN:
            times = row["limits_ms"]
            shares = [f"{times[name] / times['memory']:.0%}" for name in ("issue", "integer", "special")]
            rows.append([
                row["provider"].removeprefix("fusedopt-"), f"{row['registers']}", f"{row['programs_per_sm']}",
                f"{row['bytes_in_flight_per_sm'] / 1024:.0f}", f"{row['bytes_per_parameter']:.2f}",
                f"{row['instructions_per_parameter']:.1f}", *shares, row["limit"],
            ])  # fmt: skip
    heads = ["kernel", "registers", "programs per SM", "KB in flight per SM", "bytes per parameter", "instructions per parameter",
             "issue slots", "integer unit", "special functions", "limit"]  # fmt: skip
    return table(heads, rows)


def _predicted(row: dict | None) -> str:
    return "-" if row is None else f"{row['predicted_ms']:.3g}, {row['limit']}"


# Memory


def seven_b() -> tuple[str, list[Choice]]:
    """Bytes of training a 7B model in bf16, computed by the formulas of `fusedopt estimate`; (its name, choices)."""
    (case,) = cases.select([f"{SEVEN_B}:bf16"])
    meta = [torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta")) for shape in case.shapes]
    names = ["galore_adamw8bit", "muon"]
    model = Model(f"Llama 2 7B, {case.elements / 1e9:.2f}e9 parameters", meta, [], [meta[0], meta[-1]])
    return model.name, choices(model, names[:1], precision="stochastic")


def memory(results: Results) -> str:
    name, found = seven_b()
    rows = [
        [f"`{c.name}`" if not c.name.startswith("torch") else c.name, c.params,
         *(f"{x / 2**30:.1f}" if x else "-" for x in (c.weights, c.gradients, c.master, c.states, c.total))]
        for c in found
    ]  # fmt: skip
    heads = f"{name}: computed, GiB|weights in|weights|gradients|master|states|total".split("|")
    return table(heads, rows)


SECTIONS: dict[str, Callable[[Results], str]] = {
    "demo": demo,
    "muon": muon,
    "speed": speed,
    "rivals": rivals,
    "limits": limits,
    "bf16-speed": halves,
    "scaling": scaling,
    "gpu": gpu,
    "prediction": prediction,
    "kernels": kernels,
    "memory": memory,
    "accuracy": accuracy,
    "drift": drift,
    "projections": projections,
    "lowrank": lowrank,
    "offload": offload,
    "kill-resume": resuming,
    "release": releasing,
    "single": single,
}
