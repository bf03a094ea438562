"""Compiles every kernel variant to PTX: ``python -m benchmarks.nvidia.build``.

Needs clang 19, as the simulator does, but no GPU and nothing of NVIDIA's. Writes build/nvidia/: the
PTX of all variants in one archive, and native/plan.cpp as a library. prove.py needs nothing else.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .paths import BUILD, KERNELS, PLANNER, ROOT, SOURCES
from .plans import Kernel, Planner, every_variant

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "native")]

import embed_shaders  # noqa: E402
from simulator.engine import ptx  # noqa: E402


def build_planner(library: Path) -> Planner:
    sources = [ROOT / "benchmarks" / "nvidia" / "plan_bridge.cpp", ROOT / "native" / "plan.cpp"]
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", *map(str, sources)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return Planner(library)


@functools.cache
def family_text(family: str) -> str:
    """Read once: somebody may edit the shaders during a long build."""
    return embed_shaders.flatten(embed_shaders.FAMILIES[family])


def source_of(kernel: Kernel) -> str:
    """The Metal text of one variant, as native/shader_library.cpp compiles it on a Mac."""
    return f"{family_text(kernel.family)}\n{kernel.instantiation}"


def build_kernels(variants: dict[str, Kernel], arch: str, jobs: int) -> None:
    def compile_one(kernel: Kernel) -> tuple[str, str]:
        return kernel.name, ptx.compile(source_of(kernel), arch=arch)

    temporary = KERNELS.with_suffix(".part")
    started = time.monotonic()
    with (
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_LZMA) as archive,
        ThreadPoolExecutor(jobs) as pool,
    ):
        for done, (name, text) in enumerate(pool.map(compile_one, variants.values()), 1):
            archive.writestr(f"{name}.ptx", text)
            if done % 24 == 0 or done == len(variants):
                print(f"{done} of {len(variants)}, {time.monotonic() - started:.0f} s", flush=True)
    temporary.replace(KERNELS)


def write_sources() -> None:
    """What the kernels are made from, for the result."""
    paths = ["shaders", "native/plan.cpp", "native/plan.h"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    digest = hashlib.sha256()
    for family in embed_shaders.FAMILIES:
        digest.update(family_text(family).encode())
    sources = {
        "commit": git("rev-parse", "--short=12", "HEAD") or "unknown",
        "edited": bool(git("status", "--porcelain", "--", *paths)),
        "digest": digest.hexdigest()[:12],
    }
    SOURCES.write_text(json.dumps(sources) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="sm_90", help="the GPU's architecture or an older one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="variants whose name contains this")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    variants = every_variant(build_planner(PLANNER))
    write_sources()
    chosen = {name: kernel for name, kernel in variants.items() if options.only in name}
    build_kernels(chosen, options.arch, options.jobs)
    print(f"{KERNELS}: {len(chosen)} kernels, {KERNELS.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
