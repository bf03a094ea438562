"""Builds the native library with the system's C++ compiler: `python native/build.py OUTPUT`.

setup.py calls it on a Mac; on Linux it builds what the simulated device loads (`make native`). The
library is plain C++ on torch's stable ABI, so one binary serves torch 2.10 and later, and any
Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NATIVE = Path(__file__).resolve().parent
#: The plan alone needs no torch, so it can be asked for kernels without the library.
PLAN_SOURCES = tuple(
    NATIVE / "plan" / f"{name}.cpp"
    for name in (
        "forward",
        "backward",
        "backward_cost",
        "decode",
        "dkv_parts",
        "dscore_scratch",
        "forward_parts",
        "instantiate",
        "params",
        "refusals",
        "tiles",
    )
)
SOURCES = (
    *(
        NATIVE / f"{name}.cpp"
        for name in (
            "module",
            "call",
            "attention",
            "cache",
            "checks",
            "environment",
            "flex",
            "flex_plan",
            "machine",
            "shader_library",
        )
    ),
    *PLAN_SOURCES,
    NATIVE / "plan" / "plan_cache.cpp",
)
TARGET_VERSION = "0x020a000000000000"  # torch 2.10, the oldest supported

sys.path.insert(0, str(NATIVE))
import embed_shaders  # noqa: E402


def compile_flags(torch_directory: Path) -> list[str]:
    include = torch_directory / "include"
    flags = [
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-DNDEBUG",
        "-fvisibility=hidden",
        f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
        "-DTORCH_STABLE_ONLY",
        f"-I{NATIVE}",
        f"-isystem{include}",
        f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}",
        f"-fmacro-prefix-map={include}/=",
        f"-fmacro-prefix-map={NATIVE.parent}/=",
    ]
    if sys.platform == "darwin":
        flags += ["-arch", "arm64", "-mmacosx-version-min=14.0"]
    return flags


def link_flags(torch_directory: Path) -> list[str]:
    libraries = torch_directory / "lib"
    flags = [f"-L{libraries}", "-ltorch_cpu", "-lc10", "-ldl"]
    if sys.platform == "darwin":
        # Installed beside torch in site-packages.
        return [
            "-dynamiclib",
            "-arch",
            "arm64",
            "-mmacosx-version-min=14.0",
            *flags[:3],
            "-Wl,-rpath,@loader_path/../torch/lib",
            "-Wl,-install_name,@rpath/liborchard_ops.dylib",
        ]
    return ["-shared", *flags, f"-Wl,-rpath,{libraries}"]


def compile_sources(compiler: list[str], objects: Path) -> list[Path]:
    """Compiles every source, and the shaders as text, to a file each under `objects`."""
    import torch

    flags = compile_flags(Path(torch.__file__).parent)
    objects.mkdir(parents=True, exist_ok=True)
    text = objects / "shader_text.cpp"
    text.write_text(embed_shaders.generate(), encoding="ascii")
    sources = [*SOURCES, text]

    def compile_one(source: Path) -> Path:
        target = objects / f"{source.stem}.o"
        subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


def build(output: Path, objects: Path) -> Path:
    """Compiles the native library to `output`, with object files under `objects`."""
    import torch

    compiler = os.environ.get("CXX", "c++")
    compiled = compile_sources([compiler], objects)
    output.parent.mkdir(parents=True, exist_ok=True)
    flags = link_flags(Path(torch.__file__).parent)
    linked = output.with_suffix(".partial")
    subprocess.run([compiler, *map(str, compiled), *flags, "-o", str(linked)], check=True)
    linked.replace(output)  # whole at once; a loaded copy stays intact
    return output


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print(build(target, target.parent / "objects"))
