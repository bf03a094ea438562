"""The campaign's result: on the screen, as report.json and as report.md."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Table

from .mutants import Equivalence, Mutant

if TYPE_CHECKING:
    from .verdicts import Outcome, Progress

DOCS = Path(__file__).parents[3] / "docs" / "mutation.md"
BEGIN, END = "<!-- mutation: {} -->\n", "<!-- end -->"
STATUSES = ("killed", "compiler", "hang", "crash", "equivalent", "survived")
_MEANING = {
    "killed": "a killer failed",
    "compiler": "does not compile",
    "hang": "ran into the time limit",
    "crash": "ended the process",
    "equivalent": "listed in equivalent.toml with a reason",
    "survived": "nothing noticed",
}


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[Outcome], None]]:
    columns = (
        rich_progress.TextColumn("mutants"), rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(), rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[counts]}"),
    )  # fmt: skip
    counts: Counter[str] = Counter()
    with rich_progress.Progress(*columns) as bar:
        task = bar.add_task("", total=total, counts="")

        def advance(outcome: Outcome) -> None:
            counts[outcome.status] += 1
            text = ", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s])
            bar.update(task, advance=1, counts=text)

        yield advance


class Report:
    """Mutants with their outcomes; those that have not run are counted."""

    def __init__(self, mutants: Sequence[Mutant], progress: Progress,
                 listed: Sequence[Equivalence]):  # fmt: skip
        outcomes = progress.outcomes
        self.carried, self.drawn = len(progress.carried), len(progress.drawn)
        self.again = len(progress.drawn - progress.carried)
        self.rows: list[tuple[Mutant, str, Outcome | None]] = []
        self.refuted: list[Mutant] = []  # listed as equivalent, and killed
        self.unused = list(listed)
        self.not_run = 0
        for mutant in mutants:
            outcome = outcomes.get(mutant.key)
            entries = [e for e in listed if e.covers(mutant)]
            for entry in entries:
                if entry in self.unused:
                    self.unused.remove(entry)
            if outcome is not None and not outcome.survived:
                self.rows.append((mutant, outcome.status, outcome))
                if entries:
                    self.refuted.append(mutant)
            elif entries:
                self.rows.append((mutant, "equivalent", outcome))
            elif outcome is not None:
                self.rows.append((mutant, "survived", outcome))
            else:
                self.not_run += 1
        self.reasons = Counter(
            e.reason
            for mutant, status, _ in self.rows
            if status == "equivalent"
            for e in [next(e for e in listed if e.covers(mutant))]
        )

    @property
    def survivors(self) -> list[tuple[Mutant, Outcome]]:
        return [(m, o) for m, status, o in self.rows if status == "survived" and o is not None]

    def counts(self, name: str) -> dict[str, Counter[str]]:
        """Statuses by file or by operator."""
        result: dict[str, Counter[str]] = {}
        for mutant, status, _ in self.rows:
            result.setdefault(getattr(mutant, name), Counter())[status] += 1
        return result

    def _total(self) -> Counter[str]:
        return Counter(status for _, status, _ in self.rows)

    def sentence(self, name: str) -> str:
        """What the docs say of the campaign."""
        total = self._total()
        noticed = sum(total[status] for status in ("killed", "compiler", "hang", "crash"))
        return (
            f"The campaign of {name} has {len(self.rows) + self.not_run} mutants: {noticed} are "
            f"noticed, {total['equivalent']} are listed as equivalent, {total['survived']} "
            f"survived, and {self.not_run} are open. Of those noticed {self.carried} are carried; "
            f"of {self.drawn} that were drawn among these, {self.again} have run again.\n"
        )

    def print(self) -> None:
        console = Console()
        table = Table("file", *STATUSES)
        for file, counts in sorted(self.counts("file").items()):
            table.add_row(file, *(str(counts[s]) for s in STATUSES))
        total = self._total()
        table.add_section()
        table.add_row("all", *(str(total[s]) for s in STATUSES))
        console.print(table)
        for mutant, outcome in self.survivors:
            mark = " (same machine code)" if outcome.same_code else ""
            console.print(f"survived{mark}: {mutant}", markup=False, soft_wrap=True)
        for mutant in self.refuted:
            console.print(f"not equivalent, but killed: {mutant}", markup=False, soft_wrap=True)

    def as_dict(self) -> dict:
        killers = Counter(o.killer for _, status, o in self.rows if status == "killed" and o)
        order = lambda counts: {s: counts[s] for s in STATUSES}  # noqa: E731
        return {
            "mutants": len(self.rows),
            "not_run": self.not_run,
            "carried": self.carried,
            "drawn": self.drawn,
            "again": self.again,
            "all": order(self._total()),
            "files": {k: order(v) for k, v in sorted(self.counts("file").items())},
            "operators": {k: order(v) for k, v in sorted(self.counts("operator").items())},
            "first_killer": dict(killers.most_common()),
            "equivalent": dict(self.reasons.most_common()),
            "survivors": [str(m) for m, _ in self.survivors],
        }

    def write(self, folder: Path, sources: str) -> None:
        """Into the folder; `sources` is the digest of what was mutated."""
        facts = {"sources": sources, **self.as_dict()}
        (folder / "report.json").write_text(json.dumps(facts, indent=2) + "\n")
        (folder / "report.md").write_text(self.markdown(facts))

    def markdown(self, facts: dict) -> str:
        lines = ["# Mutants of the kernels and the plan", ""]
        lines += [f"Made by `make mutants`: {facts['mutants']} mutants."]
        lines += [f"{facts['not_run']} more have not run."] * (facts["not_run"] > 0)
        if facts["carried"]:
            lines += [
                f"{facts['carried']} verdicts are of earlier sources: their functions and what "
                "noticed them are the same, but not all that surrounds them. "
                f"{facts['drawn']} were drawn at random among such verdicts, to run again; "
                f"{facts['again']} of these have."
            ]
        lines += [""]
        for kind in ("files", "operators"):
            lines += [
                f"| {kind[:-1]} | {' | '.join(STATUSES)} |",
                "|---" * (len(STATUSES) + 1) + "|",
            ]
            for name, counts in [*facts[kind].items(), ("all", facts["all"])]:
                lines.append(f"| {name} | {' | '.join(str(counts[s]) for s in STATUSES)} |")
            lines.append("")
        lines += [f"- {status}: {_MEANING[status]}" for status in STATUSES]
        lines += ["", "## Equivalent mutants", "", "| reason | mutants |", "|---|---|"]
        lines += [f"| {reason} | {n} |" for reason, n in facts["equivalent"].items()]
        lines += ["", "## Survivors", ""]
        lines += [f"- `{text}`" for text in facts["survivors"]] or ["None."]
        return "\n".join(lines) + "\n"


def in_docs(text: str, name: str) -> str:
    """What stands between the marks of a campaign."""
    begin = text.index(BEGIN.format(name)) + len(BEGIN.format(name))
    return text[begin : text.index(END, begin)]


def write_docs(name: str, sentence: str) -> None:
    text = DOCS.read_text()
    mark = BEGIN.format(name)
    DOCS.write_text(text.replace(mark + in_docs(text, name), mark + sentence, 1))
