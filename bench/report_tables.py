"""Tables and sentences of README as Markdown, each a function of the result files: what stands between two marks there."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import cases
from bench.gpu_table import GPUS
from bench.predict import measured
from fusedopt.cli.estimate import Choice, Model, choices

NONE = "No results of this yet."
BEYOND_CACHE = 1e6  # elements of a case whose times are those of memory
SEVEN_B = "llama2_7b"
SHOWN = f"{SEVEN_B}:bf16"  # of the predictions; the files have the others


@dataclass
class Results:
    """Every result file of some folders by its kind, older ones first."""

    files: list[tuple[Path, dict]] = field(default_factory=list)

    @staticmethod
    def of(paths: Iterable[Path]) -> Results:
        found = []
        for path in paths:
            try:
                content = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if isinstance(content, dict) and "machine" in content and not content.get("dry_run"):
                found.append((path, content))
        return Results(sorted(found, key=lambda item: item[1]["machine"].get("date", "")))

    def all(self, kind: str) -> list[dict]:
        return [content for _, content in self.files if content.get("kind") == kind]

    def newest(self, kind: str) -> dict | None:
        return next(iter(reversed(self.all(kind))), None)

    def same(self, kind: str, accept: Callable[[dict], bool]) -> list[dict]:
        """Those of a kind that are accepted and were made by the same commit on the same processor as the newest of them."""
        found = [content for content in self.all(kind) if accept(content)]
        stamp = lambda content: [content["machine"].get(name) for name in ("commit", "processor", "threads")]  # noqa: E731
        return [content for content in found if stamp(content) == stamp(found[-1])]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return (
        "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
        .replace("|  |", "| |")
        .replace(" --- ", "---")
    )


def span(values: Iterable[float], form: str = ".2f", unit: str = "") -> str:
    """ "0.99 to 1.01", or one number where both read alike."""
    ordered = sorted(values)
    texts = [format(x, form) for x in (ordered[0], ordered[-1])]
    return (texts[0] if texts[0] == texts[1] else " to ".join(texts)) + unit


def percent(change: float, error: float | None = None) -> str:
    return f"{change:+.2f} +- {error:.2f} %" if error else f"{change:+.1f} %"


# Steps on a CPU

PACKAGES = {"heavyball": "HeavyBall", 
    "deepspeed": "DeepSpeed", "bitsandbytes": "bitsandbytes", "torchao": "torchao", "optimi": "optimi",
    "lion_pytorch": "lion-pytorch", "pytorch_optimizer": "pytorch_optimizer", "torch": "torch",
}  # fmt: skip
RULES = {"adamw": "AdamW", "lion": "Lion", "sgd": "SGD with momentum", "lamb": "LAMB"}


def label(name: str) -> str:
    """ "fusedopt-cpu/adamw/int8+sr" -> "fusedopt AdamW, int8 state, stochastic"."""
    package, rule, variant = name.split("/")
    if not package.startswith("fusedopt"):
        return f"{PACKAGES.get(package, package)} {RULES.get(rule, rule)}, {variant}"
    form, _, precision = variant.partition("+")
    backend = package.removeprefix("fusedopt-")
    text = f"fusedopt{'' if backend == 'cpu' else f' {backend}'} {RULES[rule]}, {form} state"
    return text + (f", {'stochastic' if precision == 'sr' else precision}" if precision else "")


def on_cpu(content: dict) -> bool:
    machine = content["machine"]
    return machine["device"] == "cpu" and not machine.get("isa_asked") and not content.get("dry_run")


def with_rivals(content: dict) -> bool:
    """Whether a run on a CPU measured the packages that are slower by far, which others leave out."""
    measured = [r["provider"] for case in content["cases"] for r in case["results"] if r["status"] == "ok"]
    return on_cpu(content) and any(name.startswith("torchao/") for name in measured)


def plain_cpu(content: dict) -> bool:
    return on_cpu(content) and not with_rivals(content)


def by_case(documents: list[dict], dtype: str) -> dict[str, list[dict]]:
    """Case -> its records of all documents, of parameters of a dtype."""
    out: dict[str, list[dict]] = {}
    for content in documents:
        for case in content["cases"]:
            if case["param_dtype"] == dtype:
                out.setdefault(case["case"], []).append(case)
    return out


def of_provider(records: list[dict], provider: str) -> list[dict]:
    return [r for case in records for r in case["results"] if r["provider"] == provider and r["status"] == "ok"]


def size(case: dict) -> str:
    """ "67M in 1 tensor", "1000 tensors of 64"."""
    n, tensors = case["elements"], case["tensors"]
    if n < 1e6 and n % tensors == 0:
        return f"{tensors} tensors of {n // tensors}"
    return f"{n / 1e6:.0f}M in {tensors} tensor{'s' if tensors > 1 else ''}"


def _runs(results: Results, dtype: str, accept=plain_cpu) -> list[dict]:
    return results.same("run", lambda d: accept(d) and any(c["param_dtype"] == dtype for c in d["cases"]))


def _ratio_rows(found: dict[str, list[dict]]) -> list[list[str]]:
    """Each provider's ratios to torch fused by case, and the shares of the in-place bandwidth where memory decides."""
    order = dict.fromkeys(r["provider"] for records in found.values() for case in records for r in case["results"])
    rows = []
    for provider in order:
        mine = {name: of_provider(records, provider) for name, records in found.items()}
        if provider.startswith("torch/") and provider.endswith("/fused") or not any(mine.values()):
            continue
        cells, shares, key = [], [], []
        for name, rs in mine.items():
            ratios = [r["ratio"]["median"] for r in rs if r["ratio"]]
            cells.append(span(ratios) if ratios else "-")
            key += ratios[:1]
            if found[name][0]["elements"] >= BEYOND_CACHE:
                shares.append(span([100 * r["share_of_stream"]["median"] for r in rs], ".0f", " %") if rs else "-")
        rows.append((not provider.startswith("fusedopt"), [label(provider), *cells, " / ".join(shares)]))
    return [cells for _, cells in sorted(rows, key=lambda row: row[0])]


def _cpu_table(documents: list[dict]) -> tuple[str, str]:
    """A table of fp32 parameters, and the bandwidth of its rounds, such as "59 to 66 GB/s"."""
    found = by_case(documents, "float32")
    heads = [
        "fp32 parameters and gradients",
        *(size(records[0]) for records in found.values()),
        "of in-place bandwidth",
    ]
    streams = [g["stream_gb_per_s"]["median"] for rs in found.values() for c in rs for g in c["groups"]]
    return table(heads, _ratio_rows(found)), f"{span(streams, '.0f')} GB/s"


def speed(results: Results) -> str:
    documents = _runs(results, "float32")
    if not documents:
        return NONE
    rows, stream = _cpu_table(documents)
    machine = documents[-1]["machine"]
    text = (
        f"{len(documents)} run{'s' if len(documents) > 1 else ''} on {machine['processor']}, {machine['threads']} threads, "
        f"{machine['isa']}, torch {machine['versions']['torch']}; the in-place add reached {stream}."
    )
    slow = _runs(results, "float32", lambda d: d["machine"].get("isa_asked") == "avx2")
    if slow:
        case = slow[-1]["cases"][0]
        ratios = [(r["provider"].split("/")[2], r["ratio"]["median"]) for r in case["results"] if r["status"] == "ok"]
        coded = ", ".join(f"{name} {value:.2f}" for name, value in ratios if name not in ("fused", "cpu"))
        text += f" With AVX2 on the same machine AdamW takes, {size(case)}: {coded}."
    return f"{rows}\n\n{text}"


def rivals(results: Results) -> str:
    """Every package that steps CPU tensors, in one run."""
    documents = _runs(results, "float32", with_rivals)
    if not documents:
        return NONE
    rows, stream = _cpu_table(documents)
    return f"{rows}\n\nThe in-place add reached {stream} in these rounds."


def halves(results: Results) -> str:
    """bf16 parameters: against DeepSpeed's step, which keeps fp32 states as ours does, or torch's, which does not."""
    documents = _runs(results, "bfloat16")
    if not documents:
        return NONE
    found = by_case(documents, "bfloat16")
    rival = "deepspeed/adamw/cpu"
    heads = ["AdamW, bf16 parameters and gradients"]
    heads += [f"{size(records[0])}, to {to}" for to in ("torch fused", "DeepSpeed") for records in found.values()]
    order = dict.fromkeys(r["provider"] for records in found.values() for case in records for r in case["results"])
    rows = []
    for provider in order:
        if provider.startswith("torch/") or not provider.split("/")[1] == "adamw":
            continue
        first, second = [], []
        for records in found.values():
            rs = [
                (r, next(iter(of_provider([case], rival)), None))
                for case in records
                for r in of_provider([case], provider)
            ]
            first.append(span([r["ratio"]["median"] for r, _ in rs]) if rs else "-")
            pairs = [statistics.median(a / b for a, b in zip(r["rounds_ms"], base["rounds_ms"], strict=True))
                     for r, base in rs if base and len(r["rounds_ms"]) == len(base["rounds_ms"])]  # fmt: skip
            second.append(span(pairs) if pairs else "-")
        rows.append([label(provider), *first, *second])
    return f"{table(heads, rows)}\n\ntorch's fused step keeps bf16 states here: 14 bytes per parameter against 22."


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


# Losses

FORMATS = {
    "int8": "int8 state", "int8c": "int8c state", "fp8": "fp8 state", "int4": "int4 state",
    "bitsandbytes 8-bit": "bitsandbytes, 8 bits", "torchao 4-bit": "torchao, 4 bits",
    "bf16 nearest": "bf16 weights, nearest", "bf16 stochastic": "bf16 weights, stochastic",
    "bf16 split24": "bf16 weights, split24", "bf16 split24, 8bit": "bf16 weights, split24, int8 state",
}  # fmt: skip


def accuracy(results: Results) -> str:
    content = results.newest("accuracy")
    if content is None:
        return NONE
    rows = []
    for key, text in FORMATS.items():
        losses = [content["losses"][part].get(key) for part in ("demo", "small")]
        cells = ["" if r is None else percent(r["change_percent"], r["standard_error"]) for r in losses]
        errors = [[r["update"] for r in content["moments"] if (r["format"], r["kind"]) == (key, kind)]
                  for kind in dict.fromkeys(r["kind"] for r in content["moments"])]  # fmt: skip
        means = [100 * statistics.fmean(values) for values in errors if values]
        cells.append(span(means, ".2g") if means else "")
        mixed = content["spread"].get(key, {}).get("1.0")
        rows.append([text, *cells, f"{100 * mixed:.2g}" if mixed and means else ""])
    heads = ["AdamW", "demo's model, 240 steps", "0.27 M parameters, 500 steps", "update, % rms", "mixed scales, % rms"]
    return table(heads, rows)


def projections(results: Results) -> str:
    content = results.newest("lowrank_accuracy")
    if content is None:
        return NONE
    rows = []
    for name, r in content["losses"].items():
        seeds = len(r["held_out"])
        change = f"{r['mean']:.3f}" if name == "AdamW" else percent(r["change_percent"], r["standard_error"])
        rows.append([name, str(seeds), change, f"{r['state_bytes']:.2f}"])
    pair = content["losses"]["GaLore"]["against_svd"]
    text = (
        "One small model and few steps: it shows that the methods train, that the randomised refresh gives the loss of the full "
        f"SVD ({percent(pair['change_percent'], pair['standard_error'])} seed by seed), and does not rank them."
    )
    return f"{table(['', 'seeds', 'held-out loss', 'state bytes per parameter'], rows)}\n\n{text}"


# Sentences


def resuming(results: Results) -> str:
    content = results.newest("kill-resume")
    if content is None:
        return NONE
    s = content["summary"]
    return (
        f"`python -m bench kill-resume` killed {s['runs']} runs with SIGKILL at random points ({s['kills']} times, "
        f"{s['kills_while_saving']} of them while saving): {s['equal_to_uninterrupted']} of {s['runs']} ended with the bits of an "
        "uninterrupted run, and every resume started at the last complete checkpoint."
    )


def releasing(results: Results) -> str:
    content = results.newest("release")
    if content is None:
        return NONE
    memory_of = {r["name"]: r for r in content["parts"]["memory"]}
    time = {r["name"]: r["ratio_to_ordinary"] for r in content["parts"]["time"]}
    full, half, equal = (memory_of[n] for n in ("decoder", "decoder, bf16 weights", "equal matrices"))

    def mb(n: float) -> str:
        return f"{n / 1e6:.1f}"

    time = {name: value["median"] if isinstance(value, dict) else value for name, value in time.items()}
    size = f"{full['gradient_bytes'] / 4e6:.0f} M fp32 weights in {full['tensors']} tensors"
    return (
        f"With a decoder of {size} the peak of backward and step falls from {mb(full['ordinary_bytes'])} to "
        f"{mb(full['released_bytes'])} MB, by {mb(full['saved_bytes'])} of the {mb(full['wanted_bytes'])} MB of gradients without "
        f"the largest, in {full['launches']} launches; with bf16 weights from {mb(half['ordinary_bytes'])} to "
        f"{mb(half['released_bytes'])}. Where all matrices are equally large, the first gradient meets all activations: "
        f"{mb(equal['saved_bytes'])} of {mb(equal['wanted_bytes'])} MB. With 200 tiny tensors, where only host time counts, a "
        f"released iteration takes {time['fusedopt released']:.2f} times an ordinary one if gradients are collected, and "
        f"{time['fusedopt released, no collecting']:.1f} times if each tensor is stepped by itself (`python -m bench release`, "
        "medians on one thread of a busy machine)."
    )


SECTIONS: dict[str, Callable[[Results], str]] = {
    "speed": speed,
    "rivals": rivals,
    "bf16-speed": halves,
    "gpu": gpu,
    "prediction": prediction,
    "kernels": kernels,
    "memory": memory,
    "accuracy": accuracy,
    "projections": projections,
    "kill-resume": resuming,
    "release": releasing,
}
