"""Applies mutants, one process for each, and sees which killer fails first.

A worker keeps a copy of shaders/ and native/, writes one mutated file into it at a time and forks:
the child starts with torch, the references and the engine loaded, so that a mutant costs little
more than compiling a kernel or two. Results are appended to build/mutation/progress.jsonl; what is
there already and still counts (verdicts.py) is not run again, but for those that are drawn to be
confirmed. What killed a mutant of earlier sources goes first now, then what killed others of its
function.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import random
import select
import shutil
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import MappingProxyType

from simulator import engine
from simulator.engine import compiler

from . import killers as killing
from . import report
from .harness import ROOT, Sources
from .mutants import CACHE_FILES, FILES, FLEX_FILES, Mutant, all_mutants, equivalences
from .verdicts import (
    CACHE_VERDICTS,
    FLEX_VERDICTS,
    VERDICTS,
    Outcome,
    Present,
    Progress,
    changes_plan,
    sources_digest,
)

FOLDER = ROOT / "build" / "mutation"
CAMPAIGNS = {"": "kernels and plan", "caches": "caches", "flex": "functions"}
LAUNCH_LIMIT = 20.0  # seconds; launches take some milliseconds, and a busy machine some more
COMPILE_LIMIT = 25.0  # several times what a family's kernels take


def relevant(mutant: Mutant, original: Original) -> list:
    """The killers that a mutant can fail, in order.

    Of a shader first those whose kernels hold an instruction of the mutated statement, then all
    others whose text includes the file: a statement may leave no instruction of its own (a type, a
    constant, a call that is inlined, a branch that is never taken before it is mutated).
    """
    if changes_plan(mutant.file):
        return list(killing.killers())
    name, (first, last) = Path(mutant.file).name, mutant.lines
    places = {(name, line) for line in range(first, last + 1)}
    families = original.families[mutant.file]
    able = [k for k in killing.killers() if k.family in families]
    return sorted(able, key=lambda k: not original.holds(k.name, places))


# ---- the child: one mutant


class _Unchanged(BaseException):
    """A killer has been given what it is given without a mutant, so that it passes."""


def _judge(tests: Sequence, sources: Sources, tell, observed: Mapping[str, str]) -> None:
    """Runs killers until one fails; tells about each step.

    observed: what each of them is given in all without a mutant (Sources.observed).
    """
    uses, kernels, seen = {}, {}, {}
    for test in tests:
        tell({"step": "compile", "killer": test.name})

        def note(step: str, test=test) -> None:
            tell({"step": step, "killer": test.name})
            if sources.observed == observed.get(test.name):
                raise _Unchanged

        sources.observed = ""
        try:
            test.run(sources, note)
        except _Unchanged:
            pass
        except engine.CompileError as error:
            tell({"status": "compiler", "killer": test.name, "message": _short(error)})
            return
        except Exception as error:
            tell({"status": "killed", "killer": test.name, "message": _short(error)})
            return
        seen[test.name] = sources.observed
        kernels[test.name] = killing.used_kernels()
        uses[test.name] = killing.used_libraries()
    paths = [str(path) for path in killing.library_paths()]
    code = killing.machine_code()
    facts = {"code": code, "libraries": paths, "uses": uses, "kernels": kernels, "observed": seen}
    tell({"status": "survived", **facts})


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def run_mutant(
    tests: Sequence, sources: Sources, keep: Collection[str] | None = (),
    observed: Mapping[str, str] = MappingProxyType({}),
) -> dict:  # fmt: skip
    """In a process of its own; a hang or a crash ends with it.

    Of the compiled libraries only those in `keep` stay in the engine's cache (None: all), which
    other workers may be using.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # with its compilers, which would outlive it
        os.close(read)
        running = ""
        with os.fdopen(write, "w") as pipe:

            def tell(message: dict) -> None:
                nonlocal running
                running = message.get("killer", running)
                pipe.write(json.dumps(message) + "\n")
                pipe.flush()

            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                _judge(tests, sources, tell, observed)
            except SystemError as error:  # the interpreter's memory was written: a crash as well
                tell({"status": "crash", "killer": running, "message": _short(error)})
            except BaseException as error:  # of the tool itself, no verdict on the mutant
                tell({"status": "broken", "message": f"{type(error).__name__}: {error}"})
            finally:
                if keep is not None:
                    killing.forget_libraries(keep)
                pipe.flush()
                os._exit(0)
    os.close(write)
    try:
        return _listen(read, child)
    finally:
        os.close(read)


def _listen(read: int, child: int) -> dict:
    text, last, limit = b"", {"killer": ""}, COMPILE_LIMIT
    while True:
        ready, _, _ = select.select([read], [], [], limit)
        data = os.read(read, 65536) if ready else b""
        if not ready:
            os.killpg(child, signal.SIGKILL)
        if not data:
            _, status = os.waitpid(child, 0)
            if last.get("status") == "broken":
                raise RuntimeError(f"mutation: a mutant could not be judged: {last['message']}")
            if "status" in last:
                return last
            kind = "hang" if not ready else "crash"
            return {"status": kind, "killer": last["killer"], "message": f"exit status {status}"}
        *lines, text = (text + data).split(b"\n")
        if lines:
            last = json.loads(lines[-1])
            limit = COMPILE_LIMIT if last.get("step") == "compile" else LAUNCH_LIMIT


# ---- a worker


@dataclass(frozen=True)
class Original:
    """What the killers compile without a mutant."""

    code: dict[str, str]  # digests by kernel
    libraries: frozenset[str]  # paths in the engine's cache
    uses: dict[str, list[str]]  # those of each killer, by its name
    families: dict[str, set[str]]  # whose text includes a file
    lines: dict[str, frozenset[tuple[str, int]]]  # of the shaders, in each library
    kernels: dict[str, str] = field(default_factory=dict)  # digests of their names, by killer
    observed: dict[str, str] = field(default_factory=dict)  # Sources.observed, by killer

    def holds(self, killer: str, places: Collection[tuple[str, int]]) -> bool:
        """Whether a kernel of the killer has an instruction of one of the lines (file, line)."""
        return any(not self.lines[path].isdisjoint(places) for path in self.uses[killer])


def _work(tasks, results, original: Original, first: int | None) -> None:
    """Mutants from one queue, their outcomes to the other.

    Of a mutant's killers the `first` ones run (None: all). One that they leave is "open".
    """
    baseline = Sources().compile_plan()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        root = Path(folder)
        for name in ("shaders", "native"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for mutant, suspects in iter(tasks.get, None):
            began = time.monotonic()
            path = root / mutant.file
            text = path.read_text(encoding="ascii")
            path.write_text(mutant.apply(text), encoding="ascii")
            own_plan = changes_plan(mutant.file)
            sources = Sources(root, None if own_plan else baseline)
            tests = relevant(mutant, original)
            places = {name: place for place, name in enumerate(suspects)}
            tests = sorted(tests, key=lambda test: places.get(test.name, len(places)))
            try:
                found = run_mutant(tests[:first], sources, original.libraries, original.observed)
            finally:
                path.write_text(text, encoding="ascii")
            if found["status"] == "survived" and len(tests[:first]) < len(tests):
                found["status"] = "open"
            same = not own_plan and found.get("code", {}).items() <= original.code.items()
            seconds = round(time.monotonic() - began, 2)
            results.put(
                Outcome(
                    mutant.key, found["status"], found.get("killer", ""),
                    found.get("message", ""), seconds, found["status"] == "survived" and same,
                )
            )  # fmt: skip


# ---- the campaign


class Suspects:
    """The killers that go first: a mutant's own of earlier sources, and those that have noticed
    the most mutants of its function, and of its file, for their time.
    """

    WIDTH = 6  # so many of a function, and of a file

    def __init__(self, earlier: dict[str, str]):
        self._earlier = earlier
        self._kills: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        self._seconds: dict[str, float] = {}  # the shortest run that ended with a killer

    def learn(self, mutant: Mutant, outcome: Outcome) -> None:
        if not outcome.killer or outcome.status == "compiler":
            return
        for place in (mutant.file, mutant.function), (mutant.file,):
            self._kills[place][outcome.killer] += 1
        known = self._seconds.get(outcome.killer, outcome.seconds)
        self._seconds[outcome.killer] = min(known, outcome.seconds)

    def of(self, mutant: Mutant) -> list[str]:
        names = [self._earlier[mutant.key]] if mutant.key in self._earlier else []
        for place in (mutant.file, mutant.function), (mutant.file,):
            kills = self._kills[place]
            best = sorted(kills, key=lambda name: (self._seconds[name] + 0.1) / kills[name])
            names += best[: self.WIDTH]
        return list(dict.fromkeys(names))


class Workers:
    """Processes that run mutants; iterating gives their outcomes."""

    def __init__(
        self,
        mutants: Sequence[Mutant],
        suspects: Suspects,
        jobs: int,
        original: Original,
        first: int | None = None,
    ):
        context = multiprocessing.get_context("fork")
        self.tasks, self.results = context.Queue(), context.Queue()
        self.waiting = list(reversed(mutants))
        self.running: dict[str, Mutant] = {}
        self.suspects = suspects
        self.processes = [
            context.Process(
                target=_work, args=(self.tasks, self.results, original, first), daemon=True
            )
            for _ in range(jobs)
        ]
        for process in self.processes:  # first, as putting starts a thread
            process.start()
        for _ in range(2 * jobs):  # not all of them, since what is learned orders the later ones
            self._give()

    def _give(self) -> None:
        if self.waiting:
            mutant = self.waiting.pop()
            self.running[mutant.key] = mutant
            self.tasks.put((mutant, self.suspects.of(mutant)))

    def __iter__(self) -> Iterator[Outcome]:
        while self.running:
            outcome = self._next()
            self.suspects.learn(self.running.pop(outcome.key), outcome)
            self._give()
            yield outcome
        for _ in self.processes:
            self.tasks.put(None)
        for process in self.processes:
            process.join()

    def _next(self) -> Outcome:
        while True:
            with contextlib.suppress(queue.Empty):
                return self.results.get(timeout=5.0)
            if any(process.exitcode for process in self.processes):
                raise SystemExit("a worker ended early; what it said is above")


def prepare(jobs: int = 1) -> Original:
    """What the forked processes share, and what the killers compile without a mutant.

    Fails if a killer fails without a mutant.
    """
    import torch

    torch.set_num_threads(1)  # no threads: the workers are forked
    compiler.runtime()
    compiler.precompiled_header(False)
    compiler.precompiled_header(True)
    killing.prepare()
    # In children as well: launching starts threads, which a fork would lose. Each runs a part.
    tests = list(killing.killers())
    random.Random(2).shuffle(tests)  # so that the parts take equally long
    with ThreadPool(jobs) as pool:
        parts = pool.map(
            lambda part: run_mutant(tests[part::jobs], Sources(), keep=None), range(jobs)
        )
    code: dict[str, str] = {}
    libraries: set[str] = set()
    uses: dict[str, list[str]] = {}
    kernels: dict[str, str] = {}
    observed: dict[str, str] = {}
    for found in parts:
        if found["status"] != "survived":
            raise SystemExit(f"without a mutant, {found['killer']} fails: {found['message']}")
        code |= found["code"]
        libraries |= set(found["libraries"])
        uses |= found["uses"]
        kernels |= found["kernels"]
        observed |= found["observed"]
    paths = sorted({path for used in uses.values() for path in used})
    with multiprocessing.get_context("fork").Pool(jobs) as processes:
        lines = dict(zip(paths, processes.map(killing.lines_of, paths, chunksize=1)))
    families = Present(mutated=(*FILES, *CACHE_FILES, *FLEX_FILES)).families
    return Original(code, frozenset(libraries), uses, families, lines, kernels, observed)


def files_of(arguments: argparse.Namespace) -> Sequence[str]:
    """What is mutated."""
    return FLEX_FILES if arguments.flex else CACHE_FILES if arguments.caches else FILES


def selected(arguments: argparse.Namespace) -> list[Mutant]:
    mutants = [
        m for m in all_mutants(ROOT, files_of(arguments))
        if (not arguments.files or any(name in m.file for name in arguments.files))
        and (not arguments.operators or m.operator in arguments.operators)
        and (not arguments.match or arguments.match in str(m))
    ]  # fmt: skip
    if arguments.sample and arguments.sample < len(mutants):
        mutants = random.Random(0).sample(mutants, arguments.sample)
    return mutants


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mutation", description=__doc__)
    parser.add_argument("files", nargs="*", help="only files whose path contains one of these")
    parser.add_argument("--operators", nargs="+", help="only these operators")
    parser.add_argument("--match", help="only mutants whose description contains this")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn at random")
    parser.add_argument("-j", "--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--first", type=int, help="only so many killers of each mutant: what they leave runs later"
    )
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    parser.add_argument(
        "--equivalents", action="store_true", help="run those listed as equivalent too"
    )
    parser.add_argument("--report", action="store_true", help="run none: report what has run")
    parser.add_argument(
        "--caches", action="store_true", help="those of the ops for caches, by their own killers"
    )
    parser.add_argument(
        "--flex", action="store_true", help="those of scores that are functions, the same way"
    )
    arguments = parser.parse_args(argv)
    if arguments.caches:
        killing.use_those_of_caches()
    if arguments.flex:
        killing.use_those_of_flex()
    mutants = selected(arguments)
    if arguments.list:
        print(*mutants, sep="\n")
        return 0
    files = files_of(arguments)
    listed = [entry for entry in equivalences() if entry.file in files]
    FOLDER.mkdir(parents=True, exist_ok=True)
    everything = all_mutants(ROOT, files)
    own = "flex" if arguments.flex else "caches" if arguments.caches else ""
    log = FOLDER / (f"progress-{own}.jsonl" if own else "progress.jsonl")
    kept = {"flex": FLEX_VERDICTS, "caches": CACHE_VERDICTS}.get(own, VERDICTS)
    progress = Progress(log, everything, Present(mutated=files), kept)
    original = prepare(arguments.jobs) if progress.hangs_on_kernels() else None
    if original:
        progress.decide(original.kernels)
    known = {m.key for m in mutants if any(e.covers(m) for e in listed)}
    todo = [
        m for m in mutants
        if (m.key not in progress.outcomes or m.key in progress.drawn & progress.carried)
        and (arguments.equivalents or m.key not in known)
    ]  # fmt: skip
    asked: set[str] = set()
    while todo and not arguments.report:
        asked |= {mutant.key for mutant in todo}
        random.Random(1).shuffle(todo)  # so that the time left can be told
        suspects = Suspects(progress.suspects)
        for mutant in mutants:
            if mutant.key in progress.outcomes:
                suspects.learn(mutant, progress.outcomes[mutant.key])
        if original is None:
            original = prepare(arguments.jobs)
            progress.decide(original.kernels)
        workers = Workers(todo, suspects, arguments.jobs, original, arguments.first)
        with report.progress_bar(len(todo)) as advance:
            for outcome in workers:
                if outcome.status != "open":
                    progress.add(outcome)
                advance(outcome)
        todo = [m for m in mutants if m.key in progress.doubted() - asked]
    result = report.Report(mutants, progress, listed)
    result.print()
    if mutants == everything:
        if not own:
            result.write(Path(__file__).parent, sources_digest())
        progress.keep()
        name = CAMPAIGNS[own]
        report.write_docs(name, result.sentence(name))
    return 1 if result.survivors else 0
