"""From a Metal source to a shared library in the cache.

1. clang -E with the program's own include directories.  Metal's headers are empty there, so the
   text holds nothing but the program.  Line markers stay: every message names the original file and
   line.
2. The pre-pass (lint and rewriting).
3. clang with include/msl as a precompiled header, straight to an object.  In check mode: to LLVM
   IR, which instrument.py extends by a call for each memory access, then to an object.
4. ld.  The runtime is a library of its own, loaded once.
"""

import functools
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import cache, instrument, lint, prepass
from .diagnostics import clean, run_compiler
from .errors import CompileError
from .toolchain import (
    CLANG,
    ENGINE,
    INCLUDE,
    LINKER,
    RUNTIME,
    TARGET,
    run,
)

LANGUAGE = ["-x", "c++", "-std=c++20", "-nostdinc"]
METAL_VERSION = 320
PREDEFINED = [
    "-D__METAL__",
    f"-D__METAL_VERSION__={METAL_VERSION}",
    "-D__METAL_MACOS__",
    "-D__HAVE_BFLOAT__",
    # Function constants become constexpr variables, see prepass/function_constants.py.
    "-Dis_function_constant_defined(x)=msl_defined_##x",
]
SEMANTICS = [
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-threadsafe-statics",
    "-ffp-contract=fast-honor-pragmas",
    # half and bfloat are rounded after every operation, as on a GPU.
    *("-Xclang", "-ffloat16-excess-precision=none"),
    *("-Xclang", "-fbfloat16-excess-precision=none"),
    "-fno-strict-aliasing",
    # Lanes meet at call sites: a simdgroup operation must not be duplicated into branches.
    *("-Xclang", "-fconvergent-functions"),
]
CODE = [
    *TARGET,
    "-gline-tables-only",
    "-fdebug-compilation-dir=.",
    # The return address of a call into the runtime must lie in the calling function.
    "-fno-optimize-sibling-calls",
]
WARNINGS = [
    "-Wno-unknown-attributes",
    "-Wno-unused-value",
    "-Wno-vla-cxx-extension",
    "-Wno-pass-failed",
    "-Wno-psabi",
    "-Wno-duplicate-decl-specifier",
    # Metal 4 is C++17 and Metal 3 is C++14 with some later features.
    "-Wpre-c++17-compat",
    "-Werror=pre-c++20-compat",
]
# Without a check a misaligned vector access must not fault: let clang assume no more than a
# scalar's alignment (which the atomic operations need).
PLAIN = ["-O2", "-fmax-type-align=4"]
CHECKED = [
    "-O2",
    "-DMSL_CHECK",
    # Accesses should stay as the program wrote them.
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-fsanitize=array-bounds,shift,integer-divide-by-zero",
    "-fstrict-flex-arrays=3",  # the last array of a struct has bounds too
    "-fsanitize-minimal-runtime",
]


@dataclass(frozen=True)
class Options:
    """How a source is compiled."""

    check: bool
    include_dirs: tuple[str, ...] = ()
    defines: tuple[str, ...] = ()
    constants: tuple[tuple[str, object], ...] = ()
    only: tuple[str, ...] = ("*",)


def runtime() -> Path:
    """The executor, as a shared library."""

    def make(path: Path) -> None:
        sources = [str(p) for p in sorted(RUNTIME.glob("*.cpp"))]
        command = [CLANG, "-x", "c++", "-std=c++20", "-O2", "-shared", *TARGET, *sources]
        run([*command, "-o", str(path), "-lstdc++", "-lm", "-lpthread", "-ldl"])

    return cache.get("runtime.so", make)


def _language(check: bool) -> list[str]:
    return [*LANGUAGE, *SEMANTICS, *CODE, *WARNINGS, *(CHECKED if check else PLAIN)]


def precompiled_header(check: bool) -> Path:
    def make(path: Path) -> None:
        command = [CLANG, *_language(check), "-isystem", str(INCLUDE)]
        # The header is made from one preprocessed text, macros included. clang would refuse a
        # header made from files as soon as one of them is edited during a test run.
        text = run([*command, "-E", "-dD", "-"], "#include <msl/msl.h>\n").stdout
        run([*command, "-x", "c++-header", "-", "-o", str(path)], text)

    return cache.get("checked.pch" if check else "plain.pch", make)


@functools.lru_cache(maxsize=8)
def preprocess(source: str, include_dirs: tuple[str, ...], defines: tuple[str, ...]) -> str:
    """Remembers the latest results: included files are taken not to change within a process."""
    command = [CLANG, *LANGUAGE, "-E", "-isystem", str(INCLUDE), *PREDEFINED]
    command += [f"-I{path}" for path in include_dirs]
    command += [f"-D{define}" for define in defines]
    return run_compiler([*command, "-"], '#line 1 "program_source"\n' + source).stdout


def build(source: str, options: Options) -> Path:
    """The library of a source; its facts lie beside it in a .json file."""
    lint.check_characters(source)
    text = None
    if options.include_dirs:  # the included files decide as well
        text = preprocess(source, options.include_dirs, options.defines)
    identity = repr((options, source if text is None else text))
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]

    def make(path: Path) -> None:
        if text is None:
            program = translate(source, options)
        else:
            program = prepass.rewrite(text, dict(options.constants), options.only)
        facts = _compile(program, options.check, path)
        # The facts come first: a library in the cache is complete.
        cache.get(f"{name}.json", lambda p: p.write_text(json.dumps(facts)) and None)

    return cache.get(f"{name}.so", make)


#: The last lines of a source, where they instantiate kernels and nothing else.
_INSTANTIATIONS = re.compile(
    r'(?:^template \[\[host_name\("\w+"\)\]\] \[\[kernel\]\] [^;#"\n]+;\n*)+\Z', re.M
)
_MACRO = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)", re.M)
_LINE = re.compile(r'^#line (\d+) "(.*)"\n', re.M)


def translate(source: str, options: Options) -> str:
    """The C++ of a source that includes no files of the program's own.

    Many sources differ in the kernels that they instantiate alone; what is in front of these is
    preprocessed and rewritten once.
    """
    own = _INSTANTIATIONS.search(source)
    if own and not options.constants and options.only == ("*",):
        common = source[: own.start()]
        macros = {*_MACRO.findall(common), *(define.split("=")[0] for define in options.defines)}
        if macros.isdisjoint(re.findall(r"\w+", own[0])):
            text = preprocess(common, (), options.defines)
            return prepass.rewrite_instantiations(text, _line_marker(common) + own[0])
    text = preprocess(source, (), options.defines)
    return prepass.rewrite(text, dict(options.constants), options.only)


def _line_marker(text: str) -> str:
    """Of the line behind a text, as the preprocessor would write it."""
    line, file, end = 1, "program_source", 0
    for directive in _LINE.finditer(text):
        line, file, end = int(directive[1]), directive[2], directive.end()
    return f'# {line + text.count(chr(10), end)} "{file}"\n'


def facts_of(library: Path) -> dict:
    return json.loads(library.with_suffix(".json").read_text())


def _compile(program: str, check: bool, output: Path) -> dict:
    command = [CLANG, *_language(check), "-include-pch", str(precompiled_header(check)), "-"]
    with tempfile.TemporaryDirectory(prefix="simulator-") as folder:
        obj = f"{folder}/program.o"
        if check:
            result = run_compiler([*command, "-S", "-emit-llvm", "-o", "-"], program)
            text, blocks = instrument.instrument(result.stdout)
            # The first pass has optimised the code, so only code generation is left.
            back = [CLANG, "-x", "ir", "-O1", "-Xclang", "-disable-llvm-passes", *TARGET]
            run([*back, "-Wno-override-module", "-c", "-", "-o", obj], text)
        else:
            result = run_compiler([*command, "-c", "-o", obj], program)
            blocks = []
        run([LINKER, "-shared", "-Bsymbolic", obj, "-o", str(output)])
    warnings = [line for line in clean(result.stderr).splitlines() if "warning:" in line]
    return {"warnings": list(dict.fromkeys(warnings)), "blocks": blocks}


# ---- ahead of time


def compile_many(
    sources: Sequence[str],
    *,
    check: bool = False,
    include_dirs: Sequence[Path] = (),
    defines: Sequence[str] = (),
    jobs: int = 2,
) -> list[CompileError | None]:
    """Fills the disk cache from ``jobs`` processes.

    Returns the error of each source, or None; a later compile() of a faulty source raises it again.
    """
    if not sources:
        return []
    runtime()
    precompiled_header(check)
    jobs = min(jobs, len(sources))
    workers = []
    for k in range(jobs):
        request = {
            "sources": list(sources[k::jobs]),
            "check": check,
            "include_dirs": [str(path) for path in include_dirs],
            "defines": list(defines),
        }
        workers.append(_start_worker(request))
    errors: list[CompileError | None] = [None] * len(sources)
    for k, worker in enumerate(workers):
        output, diagnostics = worker.communicate()
        if worker.returncode:
            raise RuntimeError(diagnostics)
        for j, message in enumerate(json.loads(output)):
            errors[k + j * jobs] = CompileError(message) if message else None
    return errors


def _start_worker(request: dict) -> subprocess.Popen:
    code = f"import sys; sys.path.insert(0, {str(ENGINE.parents[1])!r})\n"
    code += "from simulator.engine.compiler import serve; serve()"
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    # The worker reads everything before it writes, so this cannot block for long.
    worker.stdin.write(json.dumps(request) + "\n")
    worker.stdin.flush()
    return worker


def serve() -> None:
    """A worker of compile_many: reads one request, writes one message (or null) for each source."""
    request = json.loads(sys.stdin.readline())
    options = Options(request["check"], tuple(request["include_dirs"]), tuple(request["defines"]))
    messages = []
    for source in request["sources"]:
        try:
            build(source, options)
            messages.append(None)
        except CompileError as error:
            messages.append(str(error))
    print(json.dumps(messages))
