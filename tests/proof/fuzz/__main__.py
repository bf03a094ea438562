"""`python -m fuzz --minutes N [--of PROBLEM ...]`: draws calls for so long; keeps what fails."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import simulator

if sys.platform != "darwin":
    simulator.enable()

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from rich.console import Console

from .problems import PROBLEMS, AnyExample, check_any, name_of

REGRESSIONS = Path(__file__).parent / "regressions"
_DEFAULT = [x for x in PROBLEMS if x != "trees" or sys.platform != "darwin"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--of", nargs="+", choices=tuple(PROBLEMS), default=_DEFAULT, metavar="PROBLEM",
        help="in turns: %(choices)s; default: all, on a Mac without trees",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="in the simulator's check mode")
    parser.add_argument("--json", metavar="FILE", help="add this run to the list in FILE")
    args = parser.parse_args()
    if sys.platform != "darwin":
        simulator.check(args.check)
    console = Console()
    paths: Counter[str] = Counter()
    problems: Counter[str] = Counter()
    started, failure, batches = time.monotonic(), None, 0
    last: list[AnyExample] = []

    while failure is None and time.monotonic() - started < args.minutes * 60:
        of = args.of[batches % len(args.of)]

        @hypothesis_seed(args.seed * 1_000_003 + batches)
        @settings(
            max_examples=PROBLEMS[of].batch, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(example=PROBLEMS[of].examples())
        def run(example: AnyExample) -> None:
            last[:] = [example]
            paths[check_any(example)] += 1
            problems[name_of(example)] += 1

        try:
            run()
        except Exception as error:
            if not last:  # nothing was drawn
                raise
            failure = error
        batches += 1
        minutes = (time.monotonic() - started) / 60
        console.print(f"{minutes:5.1f} min: {dict(problems)}, {dict(paths)}", highlight=False)

    result = {
        "examples": sum(paths.values()),
        "by_path": dict(paths),
        "by_problem": dict(problems),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "seed": args.seed,
        "check_mode": args.check,
        "survived": failure is None,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": "Apple GPU" if sys.platform == "darwin" else "simulated mps device and the cpu",
        "date": datetime.now(UTC).date().isoformat(),
    }
    if args.json:
        record = Path(args.json)
        runs = json.loads(record.read_text()) if record.exists() else []
        record.write_text(json.dumps([*runs, result], indent=1) + "\n")
    if failure is None:
        console.print(f"survived {result['examples']} examples in {result['minutes']} minutes")
        return 0
    text = last[0].to_json()  # hypothesis ends on the smallest failing example
    path = REGRESSIONS / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    REGRESSIONS.mkdir(exist_ok=True)
    path.write_text(text + "\n")
    console.print(f"[red]FAILED[/red], kept as {path}:\n{failure}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
