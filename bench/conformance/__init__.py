"""What training code expects of an optimizer, asked of our classes and of every importable rival, on the CPU.

Each optimizer has a process of its own, each check a try of its own in it; a process that dies fails the check it was at and
goes on with the next. Writes the results as JSON and as a Markdown table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

from fusedopt.cli.table import replaced

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results" / "conformance.json"
LIMIT = 300  # seconds without an answer
MARKS = ("<!-- conformance: written by python -m bench conformance --readme -->", "<!-- end of conformance -->")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file; the table goes beside it as .md")
    parser.add_argument("--only", nargs="*", help="names of optimizers or packages; the answers of others stay")
    parser.add_argument("--readme", type=Path, help="a file to put the shorter table into, between its marks")
    parser.add_argument("--table", type=Path, metavar="JSON", help="make the tables from a result, without running")
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)


def all_checks() -> dict:
    """Every check by its title, in the order of the table."""
    from bench.conformance import arguments, state_dicts, stepping, tensors
    from bench.conformance.base import CHECKS

    order = [m.__name__ for m in (stepping, state_dicts, tensors, arguments)]
    return dict(sorted(CHECKS.items(), key=lambda item: order.index(item[1].__module__)))


def reason_of(error: BaseException) -> str:
    """One line about an exception."""
    from bench.conformance.base import Failed

    text = re.sub(r"\x1b\[[0-9;]*m", "", (str(error).splitlines() or [""])[0]).strip()
    text = text if isinstance(error, Failed) else f"{type(error).__name__}: {text}"
    return text if len(text) <= 160 else text[:157] + "..."


def outcome(function, subject) -> dict:
    """{"status": "pass" | "fail" | "n/a", "reason": ...} of one check."""
    from bench.conformance.base import NotMeant

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(subject)
    except NotMeant as error:
        return {"status": "n/a", "reason": str(error)}
    except Exception as error:  # whatever a rival raises is its answer
        return {"status": "fail", "reason": reason_of(error)}
    return {"status": "pass", "reason": ""}


def work(name: str, first: int) -> int:
    """Runs the checks of one optimizer from a place on, one line of JSON each."""
    import torch

    from bench.conformance.base import state_bytes_per_parameter
    from bench.conformance.subjects import all_subjects

    torch.set_num_threads(1)
    subject = all_subjects()[name]
    try:
        subject.cls()
    except Exception as error:
        print(json.dumps({"absent": reason_of(error)}), flush=True)
        return 0
    if subject.eager:
        torch.compiler.set_stance("force_eager")
    for i, (title, function) in enumerate(all_checks().items()):
        if i >= first:
            print(json.dumps({"check": title, **outcome(function, subject)}), flush=True)
    measured = {}

    def measure(s):
        measured["bytes"] = round(state_bytes_per_parameter(s), 2)

    outcome(measure, subject)
    print(json.dumps(measured), flush=True)
    return 0


def ask(name: str, titles: list[str]) -> dict:
    """All answers of one optimizer: {"checks": {title: outcome}, "bytes": float} or {"absent": reason}."""
    answers: dict = {"checks": {}}
    while True:
        first = len(answers["checks"])
        command = [sys.executable, "-m", "bench", "conformance", "--worker", name, "--first", str(first)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
            output, how = done.stdout, f"the process ended with {done.returncode}"
            code = done.returncode
        except subprocess.TimeoutExpired as error:
            output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            how, code = f"no answer in {LIMIT} s", 1
        for line in output.splitlines():
            if not line.startswith("{"):
                continue
            answer = json.loads(line)
            title = answer.pop("check", None)
            if title is None:
                answers.update(answer)
            else:
                answers["checks"][title] = answer
        if code == 0 or len(answers["checks"]) >= len(titles):
            return answers
        answers["checks"][titles[len(answers["checks"])]] = {"status": "fail", "reason": how}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# The tables


def cell(titles: dict[str, dict], title: str) -> str:
    """One package's answer to one check: of several optimizers the names of those that fail."""
    found = {name: checks[title]["status"] for name, checks in titles.items() if title in checks}
    failing = [name for name, status in found.items() if status == "fail"]
    if failing:
        return (
            "**no**"
            if len(failing) == len([s for s in found.values() if s != "n/a"])
            else f"**no** ({', '.join(failing)})"
        )
    return "yes" if "pass" in found.values() else "-"


def by_package(result: dict) -> dict[str, dict[str, dict]]:
    """package -> optimizer's short name -> its checks."""
    out: dict = {}
    for name, answers in result["optimizers"].items():
        if "absent" not in answers:
            short = (
                name.removeprefix(answers["package"]).removeprefix(answers["package"].removeprefix("torch-")).strip()
            )
            out.setdefault(answers["package"], {})[short] = answers["checks"]
    return out


def table(result: dict, failed_only: bool = False) -> str:
    """Markdown: a row for each check, a column for each package; of a short one only rows that somebody fails."""
    packages = by_package(result)
    lines = [f"| | {' | '.join(packages)} |", f"|---{'|---' * len(packages)}|"]
    shown = 0
    for title in result["checks"]:
        cells = [cell(titles, title) for titles in packages.values()]
        if not failed_only or any("no" in c for c in cells):
            shown += 1
            mark = " (+)" if title in result["beyond"] else ""
            lines.append(f"| {title}{mark} | {' | '.join(cells)} |")
    passed = []
    for titles in packages.values():
        asked = [c["status"] for checks in titles.values() for c in checks.values() if c["status"] != "n/a"]
        passed.append(f"{asked.count('pass')} of {len(asked)}")
    lines.append(f"| checks passed, over {_count(packages)} | {' | '.join(passed)} |")
    bytes_of = [
        " to ".join(f"{b:.2f}" for b in sorted({min(found), max(found)})) if found else "-"
        for found in (_bytes(result, package) for package in packages)
    ]
    lines.append(f"| bytes of state for a bf16 parameter | {' | '.join(bytes_of)} |")
    if failed_only:
        lines.append("")
        lines.append(
            f"{len(result['checks']) - shown} of the {len(result['checks'])} checks are passed by all and not shown."
        )
    return "\n".join(lines)


def _count(packages: dict) -> str:
    return f"{sum(map(len, packages.values()))} optimizers"


def _bytes(result: dict, package: str) -> list[float]:
    return [a["bytes"] for a in result["optimizers"].values() if a["package"] == package and "bytes" in a]


def reasons(result: dict) -> str:
    """Every failure with its reason."""
    lines = []
    for name, answers in result["optimizers"].items():
        if "absent" in answers:
            lines.append(f"- {name}: not here ({answers['absent']})")
            continue
        failed = [(t, c["reason"]) for t, c in answers["checks"].items() if c["status"] == "fail"]
        lines.append(f"- {name}: {len(failed)} failures")
        lines += [f"  - {title}: {reason}" for title, reason in failed]
    return "\n".join(lines)


def document(result: dict) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    return (
        f"# Conformance on the CPU\n\n{versions}. A rule that torch.optim does not have answers '-' where its state dicts are "
        "asked for. (+): more than torch.optim promises. torchao runs without torch.compile here, optimi without Triton.\n\n"
        f"{table(result)}\n\n## Reasons\n\n{reasons(result)}\n"
    )


def put_into(path: Path, text: str) -> None:
    """Replaces what is between the marks of a file. Raises ValueError where they are not there."""
    try:
        path.write_text(replaced(path.read_text(), MARKS, text))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def main(args: argparse.Namespace) -> int:
    if args.worker:
        return work(args.worker, args.first)
    if args.table:
        result = json.loads(args.table.read_text())
        args.table.with_suffix(".md").write_text(document(result))
    else:
        import torch

        from bench.conformance.base import BEYOND
        from bench.conformance.subjects import all_subjects
        from bench.machine import stamp

        titles = list(all_checks())
        machine = stamp(torch.device("cpu"))
        result = {"machine": machine, "checks": titles, "beyond": sorted(BEYOND), "optimizers": {}}
        subjects = all_subjects()
        packages = dict.fromkeys(s.package for s in subjects.values())
        result["versions"] = {p: version(p) for p in packages}
        if args.only and args.out.is_file():
            result["optimizers"] = json.loads(args.out.read_text())["optimizers"]
        for name, subject in subjects.items():
            if args.only and not {name, subject.package} & set(args.only):
                continue
            start = time.perf_counter()
            answers = {"package": subject.package, **ask(name, titles)}
            result["optimizers"][name] = answers
            failed = sum(c["status"] == "fail" for c in answers["checks"].values())
            what = answers.get("absent") or f"{failed} failures"
            print(f"{name}: {what} ({time.perf_counter() - start:.0f} s)", file=sys.stderr)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(document(result))
    if args.readme:
        put_into(args.readme, table(result, failed_only=True))
    print(table(result))
    return 0
