"""README's tables and sentences about losses: what formats, projections and rules do to training."""

from __future__ import annotations

import statistics

from bench.report_results import NONE, Results, listed, percent, span, table

DEMOS = {  # what is drawn and told: optimizers of a run of the demo
    "demo": ("torch AdamW", "adamw", "adamw8bit", "lion8bit"),
    "demo-muon": ("torch AdamW", "adamw", "muon"),
}
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
    return f"{table(heads, rows)}\n\nLosses are means and standard errors over {content['seeds']} seeds."


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
    size = content["size"]
    text = (
        f"Rank {content['rank']}, refreshes every {content['update_every']} steps, {size['steps']} steps of {size['batch']} "
        "windows. One small model and few steps: it shows that the methods train, that the randomised refresh gives the loss of "
        f"the full SVD ({percent(pair['change_percent'], pair['standard_error'])} seed by seed), and does not rank them."
    )
    return f"{table(['', 'seeds', 'held-out loss', 'state bytes per parameter'], rows)}\n\n{text}"


def drift(results: Results) -> str:
    """How far 8-bit runs move away from the fp32 run."""
    content = results.newest("accuracy")
    if content is None or not content.get("drift"):
        return NONE
    steps = max(map(int, content["drift"]["int8"]))
    gone = {name: f"{100 * content['drift'][name][str(steps)]:.0f} %" for name in ("int8", "int8c", "fp8")}
    return (
        f"Over {steps} steps the weights of the 8-bit runs move away from those of fp32 state by a part of the way gone: "
        f"{listed([f'{name} {share}' for name, share in gone.items()])}."
    )


def muon(results: Results) -> str:
    """Muon against AdamW in two trainings, and its step against torch's."""
    rules, demo, step = results.newest("rules"), results.demo(*DEMOS["demo-muon"]), results.newest("muon")
    if rules is None or demo is None or step is None:
        return NONE
    small = {name: rules["rules"][name]["held_out"][-1] for name in ("muon", "adamw")}
    runs = {r["name"]: r for r in demo["runs"]}
    held = {name: r["held_out"][-1] for name, r in runs.items()}
    state = {name: r["state_bytes"] / r["parameters"] for name, r in runs.items()}
    rows = {r["name"]: r for r in step["rows"]}
    mine, coded = rows["fusedopt.Muon"], rows["fusedopt.Muon, int8 momentum"]
    (steps, low), (_, high) = small["muon"], small["adamw"]
    (demo_steps, demo_low), (_, demo_high) = held["muon"], held["adamw"]
    return (
        f"Held-out losses, one seed each: {low:.2f} against {high:.2f} of AdamW after {steps} steps of `python -m bench rules`; "
        f"{demo_low:.2f} against {demo_high:.2f} after {demo_steps} steps of `python -m fusedopt demo --optim adamw,muon`, with "
        f"{state['muon']:.1f} in place of {state['adamw']:.0f} bytes of state per parameter. On a CPU a step over GPT-2's "
        f"{mine['matrices']} hidden matrices takes {mine['ratio']:.2f} times that of `torch.optim.Muon`, with int8 momentum "
        f"{coded['ratio']:.2f} times (`python -m bench muon`)."
    )


def demo(results: Results) -> str:
    """The plain demo's losses and state."""
    content = results.demo(*DEMOS["demo"])
    if content is None:
        return NONE
    runs, setup = content["runs"], content["setup"]
    parts = [f"{r['label']} {r['held_out'][-1][1]:.3f} and {r['state_bytes'] / r['parameters']:.2f}" for r in runs]
    return (
        f"Held-out loss after {setup['steps']} steps and bytes of state per parameter: {listed(parts)}. One run of the demo, "
        f"{runs[0]['parameters'] / 1e6:.1f} M parameters, seed {setup['seed']}."
    )
