"""When a verdict on a mutant still counts, and where verdicts are kept.

A verdict is of the present sources as long as what decided it stays, and that is:

- the words of the mutated file: comments and line breaks make no difference. Of native/plan and
  params.h, which the plan's compiler reads as one, all of them;
- of a mutant that was noticed: the words of the kernel family, or families, that its killer runs.
  Of params.h what the family's other text names: another field cannot matter to it;
- of a mutant of a shader besides: which kernels the plan gives that killer. As long as the plan's
  own words stay, so do they; where they have changed, the killers run once without a mutant, and
  kernels of the same names are the same;
- of a survivor: every family whose text includes the file, and the killers.

What the killer reads of other families (dS, sums, statistics of rows) is not among it: their own
killers hold it to the reference. Nor is the killer's text: one that is made weaker has to get
another name.

A verdict that is no longer of the present sources is carried on, if the mutant was noticed, its
killer is still there, and so are the words of the mutated function. Of those that are carried a
campaign draws some at random (`drawn`) and runs them again: if one of them is no longer noticed,
all that are carried in its function run again. So an edit of a kernel costs the mutants of the
functions that it changes, and a sample of the rest.

`build/mutation/progress.jsonl` has a line for each mutant as soon as it has run;
`verdicts.json` beside this file is in the repository and has what counted at the end of the last
campaign, so that the next one begins there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

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
LEAST_DRAWN, SHARE_DRAWN = 400, 10
"""Of the verdicts that are carried so many run again, or one of so many if that is more."""
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


def _functions(path: Path) -> dict[str, str]:
    """Digests of the words of a file's functions; "" has what is outside of them."""
    code, words = Code(path.read_text(encoding="ascii")), dict[str, list[str]]()
    for word, function in zip(code.words, code.functions):
        words.setdefault(function, []).append(word)
    return {function: _digest(found) for function, found in words.items()}


def drawn(carried: Collection[str], sources: str) -> set[str]:
    """Those of the carried verdicts, by the keys of their mutants, that have to be confirmed: the
    same ones whenever a campaign goes on, and others for other sources.
    """
    count = min(len(carried), max(LEAST_DRAWN, len(carried) // SHARE_DRAWN))
    return set(sorted(carried, key=lambda key: _digest([sources, key]))[:count])


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
    def functions(self) -> dict[str, dict[str, str]]:
        return {file: _functions(self.root / file) for file in self.mutated}

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

    def stamp(self, file: str, function: str, outcome: Outcome) -> dict[str, str]:
        """What a verdict from now is of."""
        words = self.functions[file].get(function, "")
        stamp = {"function": words, "file": self.files[file], "plan": self.plan}
        if outcome.survived:
            families = set(self.texts) if changes_plan(file) else self.families[file]
            stamp["text"] = _text(sorted(families), self.texts)
            return stamp if outcome.same_code else stamp | {"killers": self.killers}
        stamp["text"] = _text(self.families_of[outcome.killer], self.texts)
        return stamp | {"kernels": self.kernels.get(outcome.killer, "")}

    def standing(
        self, file: str, function: str, outcome: Outcome, stamp: Mapping[str, str]
    ) -> Literal["present", "carried", ""]:
        """What a verdict with this stamp is worth now."""
        if not outcome.survived and outcome.killer not in self.families_of:
            return ""
        now = self.stamp(file, function, outcome)
        same = {name for name in now if stamp.get(name) == now[name]}
        if set(now) - same <= {"plan", "kernels"} and (
            "plan" in same or self._same_kernels(stamp, now)
        ):
            return "present"
        return "carried" if "function" in same and not outcome.survived else ""

    @staticmethod
    def _same_kernels(stamp: Mapping[str, str], now: Mapping[str, str]) -> bool:
        return bool(stamp.get("kernels")) and stamp["kernels"] == now.get("kernels")


# ---- on disk


@dataclass
class _Record:
    outcome: Outcome
    stamp: dict[str, str]


class Progress:
    """The last verdict on each mutant. `outcomes` are of those that count, `carried` the keys of
    those among them that are of earlier sources, and `drawn` the keys of those that a campaign has
    to confirm.
    """

    def __init__(self, path: Path, mutants: Iterable[Mutant], present: Present,
                 kept: Path = VERDICTS):  # fmt: skip
        self.path, self.present, self.kept = path, present, kept
        self.outcomes: dict[str, Outcome] = {}
        self.carried: set[str] = set()
        self.drawn: set[str] = set()
        #: The last killer of each mutant, of whatever sources.
        self.suspects: dict[str, str] = {}
        self._mutants = {mutant.key: mutant for mutant in mutants}
        self._last_sources = ""  # of the campaign that the repository has
        self._records: dict[str, list[_Record]] = {}  # in the repository
        self._news: dict[str, list[_Record]] = {}  # of the present campaign
        for outcome, stamp in self._from_repository():
            self._learn(outcome, stamp, self._records)
        for outcome, stamp in self._from_build():
            self._learn(outcome, stamp, self._news)
        self.decide()

    def _learn(
        self, outcome: Outcome, stamp: dict[str, str], records: dict[str, list[_Record]]
    ) -> None:
        if outcome.killer:
            self.suspects[outcome.key] = outcome.killer
        if outcome.key in self._mutants:
            records.setdefault(outcome.key, []).append(_Record(outcome, stamp))

    def decide(self, kernels: Mapping[str, str] | None = None) -> None:
        """Sees what counts, with the kernels of each killer where they have been looked at."""
        if kernels is not None:
            self.present.kernels = dict(kernels)
        self.outcomes, self.carried = {}, set()
        self._weigh(self._records)
        if self._last_sources != self.present.sources:
            self.drawn = drawn(self.carried, self.present.sources)
        self._weigh(self._news)

    def _weigh(self, records: Mapping[str, list[_Record]]) -> None:
        for key, of_one in records.items():
            for record in of_one:
                standing = self._standing(record)
                if standing == "present":
                    self.outcomes[key] = record.outcome
                    self.carried.discard(key)
                elif standing == "carried" and key not in self.outcomes:
                    self.outcomes[key] = record.outcome
                    self.carried.add(key)

    def _standing(self, record: _Record) -> str:
        mutant = self._mutants[record.outcome.key]
        return self.present.standing(mutant.file, mutant.function, record.outcome, record.stamp)

    def hangs_on_kernels(self) -> bool:
        """Whether some verdicts are of the present sources only if killers still launch the same
        kernels.
        """
        return any(
            record.stamp.get("kernels") and record.stamp["plan"] != self.present.plan
            for records in (self._records, self._news)
            for key, of_one in records.items()
            if key not in self.outcomes or key in self.carried
            for record in of_one
        )

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.key] = outcome
        self.carried.discard(outcome.key)
        mutant = self._mutants[outcome.key]
        stamp = self.present.stamp(mutant.file, mutant.function, outcome)
        with self.path.open("a") as file:
            file.write(json.dumps({**outcome.__dict__, "stamp": stamp}) + "\n")

    def doubted(self) -> set[str]:
        """The carried ones in functions of which a mutant that was drawn is no longer noticed."""
        places = {
            (self._mutants[key].file, self._mutants[key].function)
            for key in self.drawn
            if key in self.outcomes and self.outcomes[key].survived
        }
        return {
            key
            for key in self.carried
            if (self._mutants[key].file, self._mutants[key].function) in places
        }

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
        self._last_sources, self.drawn = kept["sources"], set(kept["drawn"].split())
        for entry in (*kept["verdicts"], *kept["carried"]):
            for key in entry["mutants"].split():
                mutant = self._mutants.get(key)
                if mutant is None:
                    continue
                file, function = mutant.file, mutant.function
                stamp = {"function": kept["functions"][file].get(function, "")}
                if "families" in entry:
                    stamp |= {
                        "file": kept["files"][file],
                        "text": _text(entry["families"], kept["texts"]),
                        "plan": kept["plan"],
                        "kernels": kept["kernels"].get(entry["killer"], ""),
                    }
                yield Outcome(key, entry["status"], entry["killer"]), stamp
        for entry in kept["earlier"]:
            self.suspects |= dict.fromkeys(entry["mutants"].split(), entry["killer"])

    def keep(self) -> None:
        """Writes what counts, but for survivors, into the repository; of the others that have been
        noticed once, by what.
        """
        present = self.present
        groups = dict[tuple[str, str, str, str], list[str]]()
        for key, mutant in self._mutants.items():
            outcome = self.outcomes.get(key)
            if outcome is not None and not outcome.survived:
                part = "carried" if key in self.carried else "verdicts"
                place = part, mutant.file, outcome.killer, outcome.status
            elif outcome is None and key in self.suspects:
                place = "earlier", mutant.file, self.suspects[key], ""
            else:
                continue
            groups.setdefault(place, []).append(key)
        named = {killer for part, _, killer, _ in groups if part == "verdicts"}
        facts = {
            "sources": present.sources,
            "plan": present.plan,
            "files": present.files,
            "functions": present.functions,
            "texts": dict(sorted(present.texts.items())),
            "kernels": {k: x for k, x in sorted(present.kernels.items()) if k in named},
            "drawn": " ".join(sorted(self.drawn)),
        }
        lists: dict[str, list[str]] = {"verdicts": [], "carried": [], "earlier": []}
        for (part, file, killer, status), keys in sorted(groups.items()):
            entry = {"file": file, "killer": killer, "status": status,
                     "mutants": " ".join(sorted(keys))}  # fmt: skip
            if part == "verdicts":
                entry["families"] = present.families_of[killer]
            lists[part].append(f"  {json.dumps(entry)}")
        text = json.dumps(facts, indent=1).removesuffix("\n}")
        for part, lines in lists.items():
            text += f',\n "{part}": [\n' + ",\n".join(lines) + "\n ]"
        self.kept.write_text(text + "\n}\n")
