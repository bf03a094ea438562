"""When a verdict on a mutant still counts, and where verdicts are kept.

A verdict is of what decided it, and of nothing else:

- the words of the mutated file: comments and line breaks make no difference. Of native/plan and
  params.h, which the plan's compiler reads as one, all of them;
- of a mutant that was noticed: the words of the kernel family, or families, that its killer runs.
  Of params.h what the family's other text names: another field cannot matter to it;
- of a mutant of a shader besides: which kernels the plan gives that killer. As long as the plan's
  own words stay, so do they; where they have changed, the killers run once without a mutant, and
  kernels of the same names are the same;
- of a survivor: every family whose text includes the file, and the killers.

So a new kernel, or an edit of one, costs the mutants of its file and those that this family's
killers noticed in what it shares with others. What the killer reads of other families (dS, sums,
statistics of rows) is not among it: their own killers hold it to the reference. Nor is the killer's
text: one that is made weaker has to get another name.

`build/mutation/progress.jsonl` has a line for each mutant as soon as it has run;
`verdicts.json` beside this file is in the repository and has what counted at the end of the last
campaign, so that the next one begins there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from . import killers as killing
from .harness import ROOT, Sources
from .mutants import CACHE_FILES, FILES, Mutant
from .sites import Code

PARAMS, PLAN = "shaders/params.h", "native/plan/"
CACHE_PARAMS, CACHE_PLAN = "shaders/decode_params.h", "decode"
VERDICTS = Path(__file__).with_name("verdicts.json")
CACHE_VERDICTS = Path(__file__).with_name("verdicts_of_caches.json")
FLEX_VERDICTS = Path(__file__).with_name("verdicts_of_flex.json")
_LINE = re.compile(r'^#line 1 "(\w+\.h)"$', re.M)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_DECLARED = re.compile(r"^#define (\w+)|^\s+(\w+) = \d+,$|^\s+\w+ (\w+)(?:\[\d+\])?;$")


def changes_plan(file: str) -> bool:
    return file in (PARAMS, CACHE_PARAMS) or file.startswith(PLAN)


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant. killer and message are of the first killer that failed."""

    key: str
    status: str  # killed, compiler, hang, crash, survived; open: not all of its killers ran
    killer: str = ""
    message: str = ""
    seconds: float = 0.0
    #: Of shaders alone: the compiler made of all kernels what it makes of the original.
    same_code: bool = False

    @property
    def survived(self) -> bool:
        return self.status == "survived"


# ---- digests


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def _words(path: Path) -> list[str]:
    return Code(path.read_text(encoding="ascii")).words


def sources_digest(root: Path = ROOT, files: Sequence[str] = FILES) -> str:
    """Of the words of all that is mutated."""
    return _digest([_words(root / file) for file in files])


def killers_digest() -> str:
    here = Path(__file__).parent
    cases = ROOT / "tests" / "attention_cases.py"
    paths = [*sorted((here / "killers").glob("*.py")), here / "harness.py", cases]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def declarations(params: str) -> dict[str, list[str]]:
    """The lines of params.h by the name that they declare, without comments and spaces."""
    found: dict[str, list[str]] = {}
    for line in _COMMENT.sub("", params).splitlines():
        match = _DECLARED.match(line.rstrip())
        if match:
            name = next(name for name in match.groups() if name)
            found.setdefault(name, []).append(" ".join(line.split()))
    return found


def _named(params: str, words: Iterable[str]) -> list[str]:
    """The lines of params.h whose names are among the words, or in lines that are."""
    of_name, wanted, found = declarations(params), set(words), dict[str, list[str]]()
    while news := {name for name in wanted if name in of_name and name not in found}:
        for name in news:
            found[name] = of_name[name]
            wanted.update(word for line in of_name[name] for word in re.findall(r"\w+", line))
    return [line for name in of_name if name in found for line in of_name[name]]


def _text(families: Iterable[str], texts: Mapping[str, str]) -> str:
    return " ".join(texts[family] for family in families)


class Present:
    """The sources and killers as they are. `kernels` are the names of those that each killer
    launches, by its name, where they are known. `mutated` are FILES, or CACHE_FILES: the plan of
    the others does not read those.
    """

    def __init__(self, root: Path = ROOT, killers: Sequence | None = None,
                 mutated: Sequence[str] = FILES):  # fmt: skip
        self.root, self.mutated = root, mutated
        tests = killing.killers() if killers is None else killers
        self.families_of: dict[str, tuple[str, ...]] = {  # by the name of a killer
            k.name: (k.family, *getattr(k, "beside", ())) if k.family else () for k in tests
        }
        self.kernels: dict[str, str] = {}

    @cached_property
    def sources(self) -> str:
        return sources_digest(self.root, self.mutated)

    @cached_property
    def killers(self) -> str:
        return killers_digest()

    @cached_property
    def plan(self) -> str:
        folder = self.root / PLAN
        files = sorted(path for path in folder.glob("*.*") if path.stem != "plan_cache")
        if self.mutated is CACHE_FILES:
            files.append(self.root / CACHE_PARAMS)
        else:
            files = [path for path in files if path.stem != CACHE_PLAN]
        return _digest([_words(path) for path in (*files, self.root / PARAMS)])

    @cached_property
    def files(self) -> dict[str, str]:
        own = {f: _digest(_words(self.root / f)) for f in self.mutated if not changes_plan(f)}
        return {file: own.get(file, self.plan) for file in self.mutated}

    @cached_property
    def headers(self) -> dict[str, list[str]]:
        """The files of a family's text."""
        families = {family for of_one in self.families_of.values() for family in of_one}
        sources = Sources(self.root)
        return {f: [f"shaders/{x}" for x in _LINE.findall(sources.text(f))] for f in families}

    @cached_property
    def families(self) -> dict[str, set[str]]:
        """Those whose text includes a file."""
        return {f: {x for x, names in self.headers.items() if f in names} for f in self.mutated}

    @cached_property
    def texts(self) -> dict[str, str]:
        params = (self.root / PARAMS).read_text(encoding="ascii")
        found = {}
        for family, names in self.headers.items():
            words = [_words(self.root / name) for name in names if name != PARAMS]
            found[family] = _digest([*words, _named(params, (w for ws in words for w in ws))])
        return found

    def stamp(self, file: str, outcome: Outcome) -> dict[str, str]:
        """What a verdict from now is of."""
        stamp = {"file": self.files[file], "plan": self.plan}
        if outcome.survived:
            families = set(self.texts) if changes_plan(file) else self.families[file]
            stamp["text"] = _text(sorted(families), self.texts)
            return stamp if outcome.same_code else stamp | {"killers": self.killers}
        stamp["text"] = _text(self.families_of[outcome.killer], self.texts)
        return stamp | {"kernels": self.kernels.get(outcome.killer, "")}

    def counts(self, file: str, outcome: Outcome, stamp: Mapping[str, str]) -> bool:
        if not outcome.survived and outcome.killer not in self.families_of:
            return False
        now = self.stamp(file, outcome)
        if "sources" in stamp:  # of all that is mutated
            killers = stamp["killers"] if "killers" in now else ""
            return stamp["sources"] == self.sources and killers == now.get("killers", "")
        if any(stamp.get(name) != now[name] for name in now if name not in ("plan", "kernels")):
            return False
        return stamp["plan"] == now["plan"] or self._same_kernels(stamp, now)

    @staticmethod
    def _same_kernels(stamp: Mapping[str, str], now: Mapping[str, str]) -> bool:
        return bool(stamp.get("kernels")) and stamp["kernels"] == now.get("kernels")


# ---- on disk


@dataclass
class _Record:
    file: str
    outcome: Outcome
    stamp: dict[str, str]


class Progress:
    """The last verdict on each mutant. `outcomes` are of those that count."""

    def __init__(self, path: Path, mutants: Iterable[Mutant], present: Present,
                 kept: Path = VERDICTS):  # fmt: skip
        self.path, self.present, self.kept = path, present, kept
        self.outcomes: dict[str, Outcome] = {}
        #: The last killer of each mutant, of whatever sources.
        self.suspects: dict[str, str] = {}
        self._records: dict[str, list[_Record]] = {}
        self._file_of = {mutant.key: mutant.file for mutant in mutants}
        for outcome, stamp in (*self._from_repository(), *self._from_build()):
            self._learn(outcome, stamp)
        self.decide()

    def _learn(self, outcome: Outcome, stamp: dict[str, str]) -> None:
        if outcome.killer:
            self.suspects[outcome.key] = outcome.killer
        if outcome.key in self._file_of:
            record = _Record(self._file_of[outcome.key], outcome, stamp)
            self._records.setdefault(outcome.key, []).append(record)

    def decide(self, kernels: Mapping[str, str] | None = None) -> None:
        """Sees what counts, with the kernels of each killer where they have been looked at."""
        if kernels is not None:
            self.present.kernels = dict(kernels)
        self.outcomes = {
            record.outcome.key: record.outcome
            for records in self._records.values()
            for record in records
            if self.present.counts(record.file, record.outcome, record.stamp)
        }

    def hangs_on_kernels(self) -> bool:
        """Whether some verdicts count only if killers still launch the same kernels."""
        return any(
            record.stamp.get("kernels") and record.stamp["plan"] != self.present.plan
            for key, records in self._records.items()
            if key not in self.outcomes
            for record in records
        )

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.key] = outcome
        stamp = self.present.stamp(self._file_of[outcome.key], outcome)
        with self.path.open("a") as file:
            file.write(json.dumps({**outcome.__dict__, "stamp": stamp}) + "\n")

    def _from_build(self) -> Iterable[tuple[Outcome, dict[str, str]]]:
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            record = json.loads(line)
            stamp = record.pop("stamp")
            yield Outcome(**record), stamp

    def _from_repository(self) -> Iterable[tuple[Outcome, dict[str, str]]]:
        if not self.kept.exists():
            return
        kept = json.loads(self.kept.read_text())
        if kept["plan"] == self.present.plan:
            self.present.kernels = kept["kernels"]
        for entry in kept["verdicts"]:
            killer, file = entry["killer"], entry["file"]
            stamp = {
                "file": kept["files"][file],
                "text": _text(entry["families"], kept["texts"]),
                "plan": kept["plan"],
                "kernels": kept["kernels"].get(killer, ""),
            }
            for key in entry["mutants"].split():
                yield Outcome(key, entry["status"], killer), stamp

    def keep(self) -> None:
        """Writes what counts, but for survivors, into the repository."""
        present, grouped = self.present, dict[tuple[str, str, str], list[str]]()
        for key, outcome in self.outcomes.items():
            if not outcome.survived:
                place = self._file_of[key], outcome.killer, outcome.status
                grouped.setdefault(place, []).append(key)
        named = {killer for _, killer, _ in grouped}
        facts = {
            "sources": present.sources,
            "plan": present.plan,
            "files": present.files,
            "texts": dict(sorted(present.texts.items())),
            "kernels": {k: x for k, x in sorted(present.kernels.items()) if k in named},
        }
        entries = [
            {"file": file, "families": present.families_of[killer], "killer": killer,
             "status": status, "mutants": " ".join(sorted(keys))}
            for (file, killer, status), keys in sorted(grouped.items())
        ]  # fmt: skip
        head = json.dumps(facts, indent=1).removesuffix("\n}")
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
        self.kept.write_text(f'{head},\n "verdicts": [\n{lines}\n ]\n}}\n')
