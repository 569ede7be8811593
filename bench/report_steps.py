"""README's tables of steps on a CPU: the newest measurement of every case and provider against torch's fused step.

A newest measurement is that of the last run that has it, with the other runs of the same commit on the same machine as a range.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.cases import MODELS
from bench.providers import PROVIDERS
from bench.providers import baseline as torch_step
from bench.report_results import NONE, Results, hardware, listed, span, stamp, table

BEYOND_CACHE = 1e6  # elements of a case whose times are those of memory
DEEPSPEED = "deepspeed/adamw/cpu"
PACKAGES = {"heavyball": "HeavyBall",
    "deepspeed": "DeepSpeed", "bitsandbytes": "bitsandbytes", "torchao": "torchao", "optimi": "optimi",
    "lion_pytorch": "lion-pytorch", "pytorch_optimizer": "pytorch_optimizer", "torch": "torch",
}  # fmt: skip
RULES = {"adamw": "AdamW", "lion": "Lion", "sgd": "SGD with momentum", "lamb": "LAMB"}
NAMES = {"gpt2_124m": "GPT-2", "bert_large": "BERT-large", "vit_h": "ViT-H", "llama3_1b": "Llama 3", "llama2_7b": "Llama 2",
         "llama3_8b": "Llama 3"}  # fmt: skip


def label(name: str) -> str:
    """ "fusedopt-cpu/adamw/int8+sr" -> "fusedopt AdamW, int8 state, stochastic"."""
    package, rule, variant = name.split("/")
    if not package.startswith("fusedopt"):
        return f"{PACKAGES.get(package, package)} {RULES.get(rule, rule)}, {variant}"
    form, _, precision = variant.partition("+")
    backend = package.removeprefix("fusedopt-")
    text = f"fusedopt{'' if backend == 'cpu' else f' {backend}'} {RULES[rule]}, {form} state"
    return text + (f", {'stochastic' if precision == 'sr' else precision}" if precision else "")


def size(case: dict) -> str:
    """ "67M in 1 tensor", "1000 tensors of 64", "GPT-2, 124M in 148 tensors"."""
    n, tensors = case["elements"], case["tensors"]
    if n < 1e6 and n % tensors == 0:
        return f"{tensors} tensors of {n // tensors}"
    name, _, layers = case["case"].partition(":")[0].partition("@")
    elements = f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.0f}M"
    text = f"{elements} in {tensors} tensor{'s' if tensors > 1 else ''}"
    return f"{NAMES[name]}{f' ({layers} layers)' if layers else ''}, {text}" if name in NAMES else text


def ours(provider: str) -> bool:
    return provider.startswith("fusedopt")


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


@dataclass
class Column:
    """One case: of each provider (document, record of the case, record of the provider), the newest measurement's."""

    case: dict
    entries: dict[str, list[tuple[dict, dict, dict]]] = field(default_factory=dict)

    def records(self, provider: str) -> list[dict]:
        return [r for _, _, r in self.entries.get(provider, [])]

    def earlier(self, provider: str) -> bool:
        """Whether a provider was left out of the newest run of the case."""
        newest = max(
            (d for entries in self.entries.values() for d, _, _ in entries), key=lambda d: d["machine"]["date"]
        )
        return stamp(self.entries[provider][-1][0]) != stamp(newest)

    def ratios(self, provider: str) -> list[float]:
        """Times relative to torch's fused step of the same rounds, or where both did not fit into memory together of other
        rounds of the same run."""
        out = []
        for _, case, r in self.entries.get(provider, []):
            base = next(iter(of_provider([case], torch_step(r["rule"]))), None)
            if r["ratio"]:
                out.append(r["ratio"]["median"])
            elif base:
                out.append(r["ms"]["median"] / base["ms"]["median"])
        return out

    def apart(self, provider: str) -> bool:
        """Whether its ratio is one of different rounds."""
        return any(r["ratio"] is None for r in self.records(provider))

    def cell(self, provider: str) -> str:
        values = self.ratios(provider)
        return "-" if not values else f"{'~' * self.apart(provider)}{span(values)}{'*' * self.earlier(provider)}"

    @property
    def beyond_cache(self) -> bool:
        return self.case["elements"] >= BEYOND_CACHE


def on_cpu(content: dict) -> bool:
    machine = content["machine"]
    return machine["device"] == "cpu" and not machine.get("isa_asked")


def columns(results: Results, dtype: str, accept: Callable[[dict], bool] = on_cpu) -> list[Column]:
    """Every case of a dtype that was measured whole, in the order of the registry of cases."""
    found: dict[str, Column] = {}
    for content in filter(accept, results.all("run")):
        for case in content["cases"]:
            if case["param_dtype"] != dtype or "<" in case["case"]:
                continue
            column = found.setdefault(case["case"], Column(case))
            for r in case["results"]:
                if r["status"] == "ok":
                    before = column.entries.get(r["provider"], [])
                    again = before and stamp(before[-1][0]) == stamp(content)
                    column.entries[r["provider"]] = [*(before if again else []), (content, case, r)]
    order = {name: i for i, name in enumerate(MODELS)}
    rank = lambda column: order.get(column.case["case"].partition(":")[0].partition("@")[0], len(order))  # noqa: E731
    return sorted(found.values(), key=rank)


def providers(found: list[Column]) -> list[str]:
    """Those measured in any column: ours first, each in the order of the registry."""
    order = {name: i for i, name in enumerate(PROVIDERS)}
    names = dict.fromkeys(name for column in found for name in column.entries)
    return sorted(names, key=lambda name: (not ours(name), order.get(name, len(order))))


def baseline(provider: str) -> bool:
    return provider.startswith("torch/") and provider.endswith("/fused")


def sources(found: list[Column]) -> str:
    """ "From 3 runs on AMD EPYC, 2 threads, AVX512, torch 2.13.0; an in-place add reached 59 to 66 GB/s." """
    used = {id(d): d for c in found for entries in c.entries.values() for d, _, _ in entries}
    machines: dict[str, int] = {}
    for content in used.values():
        machines[hardware(content)] = machines.get(hardware(content), 0) + 1
    where = [f"{n} run{'s' if n > 1 else ''} on {name}" for name, n in machines.items()]
    cases = {id(case): case for c in found for entries in c.entries.values() for _, case, _ in entries}
    streams = [g["stream_gb_per_s"]["median"] for case in cases.values() for g in case["groups"]]
    dates = sorted({d["machine"]["date"][:10] for d in used.values()})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    alone = any(c.apart(name) and c.ratios(name) for c in found for name in c.entries)
    starred = any(c.earlier(name) for c in found for name in c.entries)
    return (
        f"The newest measurement of each, from {listed(where)} ({when}); an in-place add reached {span(streams, '.0f')} GB/s."
        + " Cells with * are of an earlier run than others of their column." * starred
        + " ~: of other rounds of the same run than torch's step, beside which it did not fit into memory." * alone
    )


def _ratio_table(found: list[Column], head: str, accept: Callable[[str], bool]) -> str:
    rows = []
    for provider in filter(accept, providers(found)):
        cells = [column.cell(provider) for column in found]
        if any(cell != "-" for cell in cells):
            rows.append([label(provider), *cells])
    return table([head, *(size(column.case) for column in found)], rows)


def speed(results: Results) -> str:
    """Our steps, and DeepSpeed's, which is written for CPUs as ours are."""
    found = columns(results, "float32")
    if not found:
        return NONE
    rows = _ratio_table(found, "fp32 parameters and gradients", lambda name: ours(name) or name == DEEPSPEED)
    text = sources(found)
    slow = columns(results, "float32", lambda d: d["machine"].get("isa_asked") == "avx2")
    if slow:
        pairs = [(name, slow[0].ratios(name)) for name in providers(slow) if ours(name) and "/adamw/" in name]
        coded = ", ".join(f"{name.split('/')[2]} {span(values)}" for name, values in pairs if values)
        text += f" With AVX2 on the same machine AdamW takes, {size(slow[0].case)}: {coded}."
    return f"{rows}\n\n{text}"


def rivals(results: Results) -> str:
    """Every other package that steps CPU tensors, and where one is ahead of us."""
    found = columns(results, "float32")
    if not found:
        return NONE
    rows = _ratio_table(found, "fp32 parameters and gradients", lambda name: not ours(name) and not baseline(name))
    return f"{rows}\n\n{ahead(found + columns(results, 'bfloat16'))}"


def kind(column: Column, provider: str) -> tuple | None:
    """The rule of a provider and the bytes of an element of its states (1.0 for 8 bits with scales)."""
    known = PROVIDERS.get(provider)
    if known is None:
        return None
    own = 2 if column.case["param_dtype"] == "bfloat16" else 4
    width = own if known.width is None else known.width
    return known.rule, round(width, 1)


def faster(column: Column) -> list[tuple[str, float, float]]:
    """(provider, its ratio, our best) of others that are faster than our best step of the same rule with states of the same
    size. A measured tie in the two decimals that the tables show is no lead."""
    best = {n: round(statistics.median(column.ratios(n)), 2) for n in column.entries if column.ratios(n)}
    out = []
    for name, ratio in best.items():
        mine = [r for n, r in best.items() if ours(n) and kind(column, n) == kind(column, name)]
        if not ours(name) and mine and ratio < min(mine):
            out.append((name, ratio, min(mine)))
    return out


def ahead(found: list[Column]) -> str:
    cells: dict[str, list[str]] = {}
    for column in found:
        dtype = ", bf16" if column.case["param_dtype"] == "bfloat16" else ""
        for name, ratio, mine in faster(column):
            alike = [n for n in column.entries if kind(column, n) == kind(column, name)]
            near = "~" * any(column.apart(n) for n in alike)
            cells.setdefault(name, []).append(f"{size(column.case)}{dtype}: {near}{ratio:.2f} against {near}{mine:.2f}")
    if not cells:
        return "None is faster here than our step of the same rule with states of the same size."
    names = [f"{label(name)} ({'; '.join(texts)})" for name, texts in cells.items()]
    return f"Faster than our step of the same rule with states of the same size: {listed(names)}."


def limits(results: Results) -> str:
    """Shares of the measured bandwidth, and what a step costs in memory and host time, of every package."""
    found = columns(results, "float32")
    if not found:
        return NONE
    large = [column for column in found if column.beyond_cache]
    tiny = [column for column in found if not column.beyond_cache]
    rows = []
    for name in providers(found):
        shares = [[100 * r["share_of_stream"]["median"] for r in c.records(name)] for c in large]
        extra = [
            r["extra_bytes"] / c.case["elements"]
            for c in large
            for r in c.records(name)
            if r["extra_bytes"] is not None
        ]
        host = [r["host_us_per_tensor"]["median"] for c in tiny for r in c.records(name)]
        rows.append([
            label(name), *(span(values, ".0f", " %") if values else "-" for values in shares),
            f"{max(extra):.1f}" if extra else "-", span(host, ".1f") if host else "-",
        ])  # fmt: skip
    heads = [
        "share of the in-place bandwidth",
        *(size(column.case) for column in large),
        "extra bytes per parameter in a step",
    ]
    return table([*heads, ", ".join(["host microseconds per tensor", *(size(c.case) for c in tiny)])], rows)


def halves(results: Results) -> str:
    """bf16 parameters: against torch's step and DeepSpeed's, which keeps fp32 states as ours does."""
    found = columns(results, "bfloat16")
    if not found:
        return NONE
    rows = []
    for name in providers(found):
        cells = [_pair(column, name) for column in found]
        if not baseline(name) and any(cell != "-" for cell in cells):
            rows.append([label(name), *cells])
    heads = ["bf16 parameters and gradients", *(size(column.case) for column in found)]
    return (
        f"{table(heads, rows)}\n\nTime relative to torch's fused step, which keeps bf16 states (14 bytes per parameter against 22 "
        f"with fp32 states), and after the stroke of AdamW to DeepSpeed's, which keeps fp32 ones. {sources(found)}"
    )


def _pair(column: Column, provider: str) -> str:
    """ "1.10 / 1.02": to torch fused, and round by round to DeepSpeed's AdamW where that was measured in the same rounds."""
    if not column.ratios(provider):
        return "-"
    pairs = []
    for _, case, r in column.entries[provider]:
        base = next(iter(of_provider([case], DEEPSPEED)), None)
        if base and r["rule"] == base["rule"] and together(case, r, base):
            pairs.append(statistics.median(a / b for a, b in zip(r["rounds_ms"], base["rounds_ms"], strict=True)))
    return column.cell(provider) + (f" / {span(pairs)}" if pairs else "")


def together(case: dict, a: dict, b: dict) -> bool:
    """Whether two providers of a case were measured in the same rounds."""
    return len(case["groups"]) == 1 or (a.get("group") is not None and a.get("group") == b.get("group"))
