"""README's sentences with measured numbers: resuming, gradient release, offload, projected steps."""

from __future__ import annotations

from bench.report_results import NONE, Results, hardware, span, table
from bench.report_steps import label


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


def single(results: Results) -> str:
    """An optimizer for each parameter, as torchtune builds them."""
    content = results.newest("release")
    if content is None:
        return NONE
    rows = {r["name"]: r for r in content["parts"]["single"]}

    def pair(name: str) -> list[str]:
        return [f"{rows[name][key]['median']:.1f}" for key in ("construction_ratio", "step_ratio")]

    (build, step), (fused_build, fused_step) = pair("fusedopt AdamW"), pair("torch AdamW fused")
    return (
        f"One optimizer per parameter, as torchtune builds them, works: construction takes {build} times torch.optim.AdamW's, a "
        f"step {step} times (torch's fused: {fused_build} and {fused_step})."
    )


def offload(results: Results) -> str:
    content = results.newest("offload")
    if content is None:
        return NONE
    memory = {(r["kind"], r["name"]): r for r in content["parts"]["memory"]}
    file = {(r["kind"], r["pages"]): r for r in content["parts"]["file"]}
    kinds = ("fp32", "bf16 + int8")
    mb = [f"{memory[kind, 'step_on cpu']['state_bytes'] / 1e6:.0f} MB" for kind in kinds]
    host = [memory[kind, "step_on cpu"]["ratio"]["median"] for kind in kinds]
    disk, cached = ([file[kind, pages] for kind in kinds] for pages in ("disk", "cached"))
    reads = [f"{r['step_to_io']['median']:.1f}" for r in disk]
    rate = [f"{r['io_bytes_per_second']['median'] / 1e9:.1f}" for r in disk]
    mapped = [f"{r['mapped_to_staged']['median']:.1f}" for r in disk]
    share = content["settings"]["memory_limit"] / memory["fp32", "step_on cpu"]["state_bytes"]
    return (
        f"`python -m bench offload`, one run on {hardware(content)}, busy with other work, with states of {mb[0]} (fp32) and "
        f"{mb[1]} (int8, bf16 parameters) and {share:.0%} of the fp32 states as staging: states in host memory, stepped on the "
        f"CPU, take {span(host)} times an ordinary step. From a file that is really read from and written to the disk, a step "
        f"takes {reads[0]} (fp32) and {reads[1]} (int8) times its reads and writes alone, at {rate[0]} and {rate[1]} GB/s. "
        f"Stepping states where they are mapped takes {mapped[0]} and {mapped[1]} times as long as that; with the pages already "
        f"in memory it takes {span(r['mapped_to_staged']['median'] for r in cached)} of the time."
    )


STEPS = {
    "fusedopt/galore_adamw": "fusedopt GaLore AdamW", "fusedopt/galore_adamw8bit": "fusedopt GaLore AdamW, int8 state",
    "fusedopt/galore_adamw+sr": "fusedopt GaLore AdamW, stochastic", "galore-torch/galore_adamw": "galore-torch GaLore AdamW",
    "torch.mm, the products alone": "the two products alone, by torch.mm",
}  # fmt: skip
MEDIUM = ", medium"  # of a name: measured with torch.set_float32_matmul_precision("medium")


def lowrank(results: Results) -> str:
    """Projected steps between refreshes, refreshes, and what both allocate."""
    documents = results.same("lowrank", lambda d: set(d["parts"]) >= {"step", "refresh", "extra", "stagger", "linear"})
    if not documents:
        return NONE

    def of(part: str, **want) -> list[dict]:
        rows = [row for d in documents for row in d["parts"].get(part, [])]
        return [row for row in rows if all(row.get(key) == value for key, value in want.items())]

    kinds = list(dict.fromkeys((row["dtype"], *row["shape"]) for row in of("step")))
    rows = []
    for name, text in STEPS.items():
        for suffix, how in (("", ""), (MEDIUM, "; fp32 factors rounded to bf16")):
            found = [of("step", name=name + suffix, dtype=dtype, shape=[a, b]) for dtype, a, b in kinds]
            if any(found):
                ratios = [span([r["to_torch_fused"]["median"] for r in rs], ".1f") if rs else "-" for rs in found]
                rows.append([text + how, *ratios])
    (rank,) = {row["rank"] for row in of("step")}
    heads = [f"rank {rank}, time to torch's fused AdamW", *(f"{dtype}, {a} x {b}" for dtype, a, b in kinds)]
    warm = {tuple(r["shape"]): of("refresh", name="randomised, warm start", dtype="fp32", shape=r["shape"])
            for r in of("refresh")}  # fmt: skip
    refresh = ", ".join(
        f"{span([r['svd_over_this'] for r in rs], '.0f')} times at {a} x {b}" for (a, b), rs in warm.items()
    )
    between, during = (of("extra", what=what, dtype="fp32") for what in ("between refreshes", "refresh"))
    longest = {name: span([r["typical_longest_over_median"] for r in of("stagger", name=name)], ".1f")
               for name in ("randomized, staggered", "randomized, all at once")}  # fmt: skip
    layers = of("stagger")[0]["layers"]
    full, linear = of("linear", name="full gradients")[0], of("linear", name="projected_linear")[0]
    during_mb, share = [r["bytes"] / 1e6 for r in during], [100 * r["share_of_parameter"] for r in during]
    size, before, after = full["size"], full["gradient_bytes"] / 1e6, linear["gradient_bytes"] / 1e6
    text = (
        f"{len(documents)} run{'s' if len(documents) > 1 else ''} of `python -m bench lowrank` on {hardware(documents[-1])}. "
        "Between refreshes a step is two matrix products against one pass over memory; factors are rounded to bf16 after "
        f"`torch.set_float32_matmul_precision('medium')`. A warm refresh is faster than the full SVD, {refresh} (fp32). Between "
        f"refreshes a step allocates {span([r['bytes'] for r in between], '.0f')} bytes; a refresh takes {span(during_mb, '.1f')} "
        f"MB, sketch and projected gradient included, {span(share, '.0f')} % of the matrix. With {layers} matrices the typical "
        f"longest step is {longest['randomized, staggered']} times the median, against {longest['randomized, all at once']} with "
        f"all refreshes at once. `projected_linear` brings the gradients of {full['layers']} layers of {size} x {size} from "
        f"{before:.0f} to {after:.1f} MB."
    )
    return f"{table(heads, rows)}\n\n{text}"


def scaling(results: Results) -> str:
    """What a further tensor costs, and what a further thread brings."""
    content = results.newest("scaling")
    if content is None:
        return NONE
    ms = {(p["sweep"], p["x"], p["provider"]): p["ms"]["median"] for p in content["points"] if "ms" in p}
    providers = dict.fromkeys(provider for _, _, provider in ms)

    def ends(sweep: str) -> list[int]:
        """The largest x of a sweep after the one before it."""
        return sorted({x for s, x, _ in ms if s == sweep})[-2:]

    (few, many), threads = ends("tensors"), ends("threads")
    tensor = {p: 1e3 * (ms["tensors", many, p] - ms["tensors", few, p]) / (many - few) for p in providers}
    thread = {p: ms["threads", threads[-1], p] / ms["threads", threads[0], p] for p in providers}
    cells = [f"{label(p)}: {tensor[p]:.1f} and {thread[p]:.2f}" for p in providers]
    return (
        f"Microseconds that a further tensor costs (from {few} to {many} tensors of the same elements), and the time with "
        f"{threads[-1]} threads to that with {threads[0]}: {'; '.join(cells)} (`python -m bench scaling`, one run on "
        f"{hardware(content)})."
    )
