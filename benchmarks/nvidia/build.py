"""Compiles every kernel variant to PTX: ``python -m benchmarks.nvidia.build``.

Needs clang 19, as the simulator does, but no GPU and nothing of NVIDIA's. Writes build/nvidia/: the
PTX of all variants in one archive, and native/plan as a library. prove.py needs nothing else.

With --speed it writes build/nvidia/speed/ instead, for speed.py: only the kernels that are timed
and PyTorch's own, an archive for each mode. With --features it writes build/nvidia/features/, for
features.py: the kernels of its comparisons at equal rate. With --caches it writes
build/nvidia/caches/: the kernels for caches that prove_caches.py runs, and those that
decode_speed.py times, with PyTorch's.
--flex makes what prove_flex.py and flex_speed.py run, with the texts of their mods.
--peers and --products make what peers_speed.py runs, others' texts from packages that are
fetched among them, and products.py.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import planner
from benchmarks.planner import compile_planner

from . import (
    append_cases,
    cache_cases,
    caches,
    cases,
    controls,
    decode_peer,
    decode_works,
    feature_works,
    few_queries,
    flex_cases,
    flex_texts,
    flex_works,
    peer,
    peers,
    products_cases,
    workloads,
)
from .flex_cases import FlexCase
from .flex_plans import FlexPlanner
from .paths import (
    CACHES_KERNELS,
    CACHES_PLANNER,
    CACHES_SOURCES,
    DECODE_KERNELS,
    FEATURES_KERNELS,
    FEATURES_PLANNER,
    FEATURES_SOURCES,
    FLEX_KERNELS,
    FLEX_PLANNER,
    FLEX_SOURCES,
    FLEX_SPEED_KERNELS,
    FLEX_SPEED_TEXTS,
    FLEX_TEXTS,
    KERNELS,
    PEERS_KERNELS,
    PEERS_PLANNER,
    PEERS_SOURCES,
    PLANNER,
    PRODUCTS_KERNELS,
    PRODUCTS_PLANNER,
    PRODUCTS_SOURCES,
    ROOT,
    SOURCES,
    SPEED_KERNELS,
    SPEED_PLANNER,
    SPEED_SOURCES,
)
from .peers.launches import Step
from .peers.packages import ALL as PACKAGES
from .peers.problems import DEFAULT_SCRATCH
from .peers.problems import problems as problems_of_peers
from .plans import Kernel, Planner, every_variant

sys.path[:0] = [str(ROOT), str(ROOT / "native")]

import embed_shaders  # noqa: E402
from simulator.engine import ptx  # noqa: E402


def build_planner(library: Path) -> Planner:
    compile_planner(library, ROOT, "-O2")
    return Planner(library)


@functools.cache
def family_text(family: str) -> str:
    """The sources are read once: somebody may edit the shaders during a long build."""
    if family in embed_shaders.FLEX_FAMILIES:
        return embed_shaders.flatten_flex(embed_shaders.FLEX_FAMILIES[family])
    return embed_shaders.flatten((embed_shaders.FAMILIES | embed_shaders.CACHE_FAMILIES)[family])


def source_of(kernel: Kernel | planner.Kernel) -> str:
    """The Metal text of one variant, as native/shader_library.cpp compiles it on a Mac."""
    return f"{family_text(kernel.family)}\n{kernel.instantiation}"


def write_archive(path: Path, texts: Iterable[tuple[str, str]]) -> None:
    """Writes an archive with one member for each (name, PTX)."""
    temporary = path.with_suffix(".part")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_LZMA) as archive:
        for name, text in texts:
            archive.writestr(f"{name}.ptx", text)
    temporary.replace(path)


def kernels_to_prove(planner: Planner, groups: Sequence[str] | None = None) -> dict[str, Kernel]:
    """What prove.py runs, by name, or what it runs for some of cases.GROUPS."""
    variants = {} if groups else every_variant(planner)
    for group in groups or cases.GROUPS:
        variants |= cases.kernels_of(planner, cases.GROUPS[group]())
    return variants


def build_kernels(variants: dict[str, Kernel], arch: str, jobs: int) -> None:
    started = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        sources = (source_of(kernel) for kernel in variants.values())
        texts = pool.map(lambda source: ptx.compile(source, arch=arch), sources)
        write_archive(KERNELS, _told(zip(variants, texts), len(variants), started))


def in_both_modes(compile_mode: Callable[[bool], str]) -> dict[str, str]:
    """The PTX by mode. compile_mode(equal_rate) makes no difference without tensor cores."""
    native = compile_mode(False)
    return {"native": native, "equal-rate": compile_mode(True) if "mma.sync" in native else native}


def build_speed_kernels(
    planner: Planner, dtypes: list[str], head_dims: list[int], backward: bool, arch: str, jobs: int
) -> int:
    """Writes the archives of both modes; gives the number of kernels."""
    chosen = list(workloads.workloads(dtypes, head_dims))
    ours = {kernel.name: kernel for work in chosen for kernel in work.plan(planner, backward)}
    theirs = sorted({work.prefill().name for work in chosen})

    def compile_ours(kernel: Kernel) -> dict[str, str]:
        source = source_of(kernel)
        return in_both_modes(lambda equal: ptx.compile(source, arch=arch, equal_rate=equal))

    def compile_theirs(name: str) -> dict[str, str]:
        options = {"arch": arch, "include_dirs": [peer.INCLUDE], "only": [name]}
        return in_both_modes(lambda equal: ptx.compile(peer.SOURCE, equal_rate=equal, **options))

    with ThreadPoolExecutor(jobs) as pool:
        texts = dict(zip(theirs, pool.map(compile_theirs, theirs)))
        texts |= zip(ours, pool.map(compile_ours, ours.values()))
    for mode, path in SPEED_KERNELS.items():
        write_archive(path, ((name, modes[mode]) for name, modes in texts.items()))
    return len(texts)


def build_equal_rate(kernels: dict[str, Kernel], archive: Path, arch: str, jobs: int) -> int:
    """Writes an archive of kernels at equal rate; gives their number."""

    def compile_one(kernel: Kernel) -> str:
        return ptx.compile(source_of(kernel), arch=arch, equal_rate=True)

    with ThreadPoolExecutor(jobs) as pool:
        write_archive(archive, zip(kernels, pool.map(compile_one, kernels.values())))
    return len(kernels)


def build_peer_kernels(planner: Planner, arch: str, jobs: int) -> int:
    """Writes the archives of both modes, ours and the peers'; gives the number of kernels."""
    ours: dict[str, Kernel] = {}
    steps: dict[str, Step] = {}
    for problem in problems_of_peers():
        used = problem.forward_kernels(planner)
        if problem.backward:
            for scratch_bytes in (DEFAULT_SCRATCH, 0):
                used = used + problem.backward_kernels(planner, scratch_bytes)
        ours |= {kernel.name: kernel for kernel in used}
        steps |= peers.steps(problem)

    def compile_ours(kernel: Kernel) -> dict[str, str]:
        source = source_of(kernel)
        return in_both_modes(lambda equal: ptx.compile(source, arch=arch, equal_rate=equal))

    def compile_theirs(step: Step) -> dict[str, str]:
        text = step.text()
        options = {"arch": arch, "only": [step.kernel], **text.options}
        return in_both_modes(lambda equal: ptx.compile(text.source, equal_rate=equal, **options))

    with ThreadPoolExecutor(jobs) as pool:
        texts = dict(zip(steps, pool.map(compile_theirs, steps.values())))
        texts |= zip(ours, pool.map(compile_ours, ours.values()))
    for mode, path in PEERS_KERNELS.items():
        write_archive(path, ((name, modes[mode]) for name, modes in texts.items()))
    return len(texts)


def cache_calls() -> Iterator[caches.Call]:
    """All that prove_caches.py runs, without operands."""
    problems = (*cache_cases.GROUPS.values(), append_cases.appends)
    for case in itertools.chain.from_iterable(group() for group in problems):
        yield case.shaped()
    yield from map(few_queries.shaped, few_queries.forwards())
    for case in cache_cases.small():
        yield case.shaped()


def decode_kernels(of: caches.CachePlanner) -> dict[str, planner.Kernel]:
    """What decode_speed.py times, but for PyTorch's, by name."""
    return caches.kernels_of(of, (work.shaped() for work in decode_works.works()))


def build_cache_kernels(of: caches.CachePlanner, arch: str, jobs: int) -> int:
    """Writes the archives of prove_caches.py and decode_speed.py; gives the number of kernels."""
    proven, timed = caches.kernels_of(of, cache_calls()), decode_kernels(of)
    theirs = sorted(
        {
            step.name
            for work in decode_works.works()
            if work.has_peer
            for step in decode_peer.steps(*work.operands("meta"))
        }
    )

    def compile_peer(name: str) -> str:
        include = [peer.INCLUDE]
        return ptx.compile(decode_peer.SOURCE, arch=arch, include_dirs=include, only=[name])

    def compile_in_mode(kernel: planner.Kernel, **mode: bool) -> str:
        return ptx.compile(source_of(kernel), arch=arch, **mode)

    with ThreadPoolExecutor(jobs) as pool:
        native = functools.partial(compile_in_mode, split_floats=False)
        write_archive(CACHES_KERNELS, zip(proven, pool.map(native, proven.values())))
        joined = functools.partial(compile_in_mode, split_floats=False, join_rows=True)
        ours = zip(timed, pool.map(joined, timed.values()))
        peers = zip(theirs, pool.map(compile_peer, theirs))
        write_archive(DECODE_KERNELS["native"], itertools.chain(ours, peers))
        on_cores = functools.partial(compile_in_mode, split_floats=True)
        ours = zip(timed, pool.map(on_cores, timed.values()))
        write_archive(DECODE_KERNELS["tensor-cores"], ours)
    return len(proven) + 2 * len(timed) + len(theirs)


def flex_problems() -> Iterator[FlexCase]:
    """All that prove_flex.py runs whose mods have texts."""
    for group in flex_cases.GROUPS.values():
        yield from group()
    yield from flex_cases.small()
    for _, case, _ in controls.disturbed_parameters_of_flex():
        yield case


def build_flex_kernels(of: FlexPlanner, arch: str, jobs: int, only: str) -> int:
    """Writes the texts of mods, and the archives; gives the number of kernels."""
    texts = {str(case): flex_texts.entry_of(case) for case in flex_problems()}
    FLEX_TEXTS.write_text(json.dumps(texts, indent=1) + "\n")
    FLEX_SPEED_TEXTS.write_text(json.dumps(flex_works.texts(), indent=1) + "\n")
    proven: dict[str, Kernel | planner.Kernel] = {}
    for case in flex_problems():
        planned = flex_cases.on_meta(case)
        tables = planned.tables()
        functions = planned.functions(tables)
        mods = flex_texts.mods_of(texts[str(case)], functions, tables)
        proven |= flex_cases.kernels_of(of, case, mods)
    for trained in flex_cases.trained():
        proven |= trained.kernels(Planner(of.library))
    timed = flex_works.kernels(of)
    started = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        for path, kernels, equal_rate in (
            (FLEX_SPEED_KERNELS, timed, True),
            (FLEX_KERNELS, proven, False),
        ):
            chosen = {name: kernel for name, kernel in kernels.items() if only in name}
            options = {"arch": arch, "equal_rate": equal_rate}
            sources = map(source_of, chosen.values())
            compiled = pool.map(lambda source, given=options: ptx.compile(source, **given), sources)
            write_archive(path, _told(zip(chosen, compiled), len(chosen), started))
    return len(proven) + len(timed)


def _told(
    texts: Iterable[tuple[str, str]], count: int, started: float
) -> Iterator[tuple[str, str]]:
    for done, text in enumerate(texts, 1):
        yield text
        if done % 24 == 0 or done == count:
            print(f"{done} of {count}, {time.monotonic() - started:.0f} s", flush=True)


def write_sources(path: Path, families: Iterable[str] = (), **more: str) -> None:
    """A description of what the kernels of these families are made from, for the result."""
    paths = ["shaders", "native/plan"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    digest = hashlib.sha256()
    for family in families or embed_shaders.FAMILIES:
        digest.update(family_text(family).encode())
    sources = {
        "commit": git("rev-parse", "--short=12", "HEAD") or "unknown",
        "edited": bool(git("status", "--porcelain", "--", *paths)),
        "digest": digest.hexdigest()[:12],
        **more,
    }
    path.write_text(json.dumps(sources) + "\n")


def build_equal_rate_for(
    planner: Path,
    sources: Path,
    chosen: Callable[[Planner], dict[str, Kernel]],
    archive: Path,
    options: argparse.Namespace,
) -> None:
    """The kernels that a program chooses, at equal rate, with planner and sources beside them."""
    planner.parent.mkdir(parents=True, exist_ok=True)
    write_sources(sources)
    started = time.monotonic()
    kernels = chosen(build_planner(planner))
    count = build_equal_rate(kernels, archive, options.arch, options.jobs)
    print(f"{planner.parent}: {count} kernels, {time.monotonic() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="sm_90", help="the GPU's architecture or an older one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument(
        "--groups", nargs="+", choices=cases.GROUPS, help="only the kernels of these groups"
    )
    parser.add_argument(
        "--speed", action="store_true", help="for speed.py; --only forward leaves out the backward"
    )
    parser.add_argument("--features", action="store_true", help="for features.py")
    parser.add_argument(
        "--caches", action="store_true", help="for prove_caches.py and decode_speed.py"
    )
    parser.add_argument("--flex", action="store_true", help="for prove_flex.py and flex_speed.py")
    parser.add_argument("--peers", action="store_true", help="for peers_speed.py")
    parser.add_argument("--products", action="store_true", help="for products.py")
    workloads.add_options(parser)
    options = parser.parse_args()
    if options.speed:
        if options.only not in ("", "forward"):
            parser.error("with --speed, --only must be forward")
        SPEED_PLANNER.parent.mkdir(parents=True, exist_ok=True)
        write_sources(SPEED_SOURCES, peer=peer.check_header())
        started = time.monotonic()
        count = build_speed_kernels(
            build_planner(SPEED_PLANNER),
            options.dtypes,
            options.head_dims,
            options.only != "forward",
            options.arch,
            options.jobs,
        )
        print(f"{SPEED_PLANNER.parent}: {count} kernels, {time.monotonic() - started:.0f} s")
        return
    if options.caches:
        CACHES_PLANNER.parent.mkdir(parents=True, exist_ok=True)
        write_sources(CACHES_SOURCES, embed_shaders.CACHE_FAMILIES, peer=decode_peer.check_header())
        started = time.monotonic()
        compile_planner(CACHES_PLANNER, ROOT, "-O2")
        of = caches.CachePlanner(CACHES_PLANNER)
        count = build_cache_kernels(of, options.arch, options.jobs)
        print(f"{CACHES_PLANNER.parent}: {count} kernels, {time.monotonic() - started:.0f} s")
        return
    if options.flex:
        FLEX_PLANNER.parent.mkdir(parents=True, exist_ok=True)
        write_sources(FLEX_SOURCES, embed_shaders.FLEX_FAMILIES)
        started = time.monotonic()
        compile_planner(FLEX_PLANNER, ROOT, "-O2")
        flex_planner = FlexPlanner(FLEX_PLANNER)
        count = build_flex_kernels(flex_planner, options.arch, options.jobs, options.only)
        print(f"{FLEX_PLANNER.parent}: {count} kernels, {time.monotonic() - started:.0f} s")
        return
    if options.features:
        build_equal_rate_for(
            FEATURES_PLANNER, FEATURES_SOURCES, feature_works.kernels, FEATURES_KERNELS, options
        )
        return
    if options.products:
        build_equal_rate_for(
            PRODUCTS_PLANNER, PRODUCTS_SOURCES, products_cases.kernels, PRODUCTS_KERNELS, options
        )
        return
    if options.peers:
        PEERS_PLANNER.parent.mkdir(parents=True, exist_ok=True)
        for package in PACKAGES:
            package.fetch()
        of_packages = ", ".join(package.identity() for package in PACKAGES)
        write_sources(PEERS_SOURCES, peer=peer.check_header(), peers=of_packages)
        started = time.monotonic()
        count = build_peer_kernels(build_planner(PEERS_PLANNER), options.arch, options.jobs)
        print(f"{PEERS_PLANNER.parent}: {count} kernels, {time.monotonic() - started:.0f} s")
        return
    PLANNER.parent.mkdir(parents=True, exist_ok=True)
    planner = build_planner(PLANNER)
    variants = kernels_to_prove(planner, options.groups)
    write_sources(SOURCES)
    chosen = {name: kernel for name, kernel in variants.items() if options.only in name}
    build_kernels(chosen, options.arch, options.jobs)
    print(f"{KERNELS}: {len(chosen)} kernels, {KERNELS.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
