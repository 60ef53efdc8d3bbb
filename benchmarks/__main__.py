"""Compares the speed of this repository with its peers, and writes docs/benchmarks.md, its data and its plots."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.cases import ALLOCATOR, CASES, CONTESTANTS
from benchmarks.growth import measure_growth
from benchmarks.photographs import write_photographs
from benchmarks.rounds import ROOT, measure
from xception_jax.command_line import Parser, run_main
from xception_jax.errors import InputMissingError, UsageError

DATA, REPORT, PLOT, GROWTH_PLOT = "data/benchmarks.json", "benchmarks.md", "images/benchmarks.png", "images/growth.png"
OUTPUTS = tuple(f"docs/{name}" for name in (DATA, REPORT, PLOT, GROWTH_PLOT))
"""The published report. Writing it does not make a checkout dirty."""


def _parse() -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--peers",
        default=".venv-peers/bin/python",
        help="Python interpreter with benchmarks/requirements.txt (default: %(default)s)",
    )
    parser.add_argument("--cases", metavar="NAME,...", help="measure only these cases, keep other results; see --list")
    parser.add_argument("--repeats", type=int, default=7, help="rounds per case (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds of work per round (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="directory to write to (default: docs)")
    parser.add_argument("--same_allocator", action="store_true", help="also use our allocator settings for the peers")
    parser.add_argument("--growth", action="store_true", help="measure how our cost grows with the work, not the cases")
    parser.add_argument("--report", action="store_true", help="only write the report again, from existing data")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--json", action="store_true", help="print the results (or the list) as JSON")
    return parser.parse_args()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _about() -> dict[str, Any]:
    """Returns the date, commit, hardware and command of a measurement."""
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in OUTPUTS))
    return {
        "date": datetime.date.today().isoformat(),
        "commit": f"{commit}-dirty" if changed else commit,
        "hardware": _hardware(),
        "command": shlex.join(["python", "-m", "benchmarks", *(a for a in sys.argv[1:] if not _is_private(a))]),
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _is_private(argument: str) -> bool:
    """Returns whether an argument is a local path, which must not appear in the documents."""
    return "/" in argument or argument in ("--peers", "--output")


def _hardware() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    widest = next((name for name in ("avx512f", "avx2", "avx") if name in flags), "")
    vectors = ", ".join(name for name in (widest, "amx_bf16") if name in flags)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {model} ({vectors}), {memory:.0f} GiB, {platform.system()}"


def _list(as_json: bool) -> int:
    described = {
        name: {"title": case.title, "contestants": [CONTESTANTS[c].title for c in case.contestants]}
        for name, case in CASES.items()
    }
    if as_json:
        print(json.dumps(described))
    else:
        print("\n".join(f"{name:12}{d['title']}: {', '.join(d['contestants'])}" for name, d in described.items()))
    return 0


def main() -> int:
    """Runs the benchmarks. Returns 1 if a contestant failed. A missed goal is not a failure."""
    args = _parse()
    if args.list:
        return _list(args.json)
    names = args.cases.split(",") if args.cases else list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise UsageError(f"there is no case {unknown[0]!r}", "--cases", f"choose one of {', '.join(CASES)}")
    if args.repeats < 1:
        raise UsageError(f"--repeats is {args.repeats}", "--repeats", "set it to a whole number, at least 1")

    data = args.output / DATA
    results: dict[str, Any] = json.loads(data.read_text()) if data.exists() else {"cases": {}}

    def save() -> None:
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text(json.dumps(results, indent=1) + "\n")
        (args.output / REPORT).write_text(report.markdown(results))

    about = _about()
    if args.growth:
        results["growth"] = about | {"points": measure_growth(args.seconds, _say)}
    elif not args.report:
        peers = shutil.which(args.peers)
        if peers is None:
            raise InputMissingError(
                "the environment of the peers is missing", args.peers, "run make bench, or set --peers"
            )
        with tempfile.TemporaryDirectory() as directory:
            write_photographs(directory)
            for name in names:
                _say(f"{name}: {CASES[name].title}")
                contestants = measure(
                    CASES[name],
                    os.path.abspath(peers),
                    args.repeats,
                    args.seconds,
                    _say,
                    directory,
                    ALLOCATOR if args.same_allocator else None,
                )
                results["cases"][name] = about | {"repeats": args.repeats, "contestants": contestants}
                save()  # keeps the results if a later case fails
    results["cases"] = {name: results["cases"][name] for name in CASES if name in results["cases"]}
    save()
    if results["cases"]:
        report.plot(results, args.output / PLOT)
    if results.get("growth"):
        report.plot_growth(results["growth"]["points"], args.output / GROWTH_PLOT)
    print(json.dumps(results) if args.json else report.goals_table(results))
    failed = [c for case in results["cases"].values() for c in case["contestants"].values() if "error" in c]
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
