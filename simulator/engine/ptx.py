"""From a Metal source to PTX, the assembly language of NVIDIA GPUs.

The same text goes through the same pre-pass as for the CPU; clang compiles it against the other
backend of include/msl (msl/ptx.h).  Each kernel becomes a PTX entry of its Metal name, whose one
parameter is msl::Arguments (msl/ptx_entry.h).  Nothing of NVIDIA's is needed to compile.

>>> text = ptx.compile(source, only=["kernel_name"])
"""

import hashlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import cache, lint, prepass
from .compiler import LANGUAGE, SEMANTICS, WARNINGS, preprocess
from .diagnostics import run_compiler
from .toolchain import CLANG, INCLUDE, run

_PTX_VERSION = "+ptx83"
# The number of `constant` in include/msl/address_spaces.h.  It only serves to make the types
# different; on the GPU it is ordinary (global) memory.
_CONSTANT, _GLOBAL = 100, 1
_MAX_THREADS = re.compile(
    r"^\.(?:visible|weak) \.global \.align 4 \.u32 (\S+)_max_threads(?: = (\d+))?;\n", re.M
)
#: tensor_core_product of ptx_simd.h: transposes `b`, and adds to `sums` the product of `a` and it.
#: The lower rows have `zeros`, and their sums, which nothing reads, lie in `unused`.
_HALF_PRODUCT = re.compile(
    r"\t// begin inline asm\n"
    r"\tmovmatrix\.sync\.aligned\.m8n8\.trans\.b16 (?P<t>%r\d+), (?P<b>%r\d+);\n"
    r"\t// end inline asm\n"
    r"(?P<moves>(?:\tmov\.(?:f32|b32) \t[^;]+;\n)*)"
    r"\t// begin inline asm\n"
    r"\t(?P<name>mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.f16\.f16\.f32) "
    r"\{(?P<sums>%f\d+,%f\d+),(?P<unused>%f\d+,%f\d+)\}, \{(?P<a>%r\d+),(?P<zeros>%r\d+)\}, "
    r"\{(?P=t)\}, \{(?P=sums),(?P=unused)\};\n"
    r"\t// end inline asm\n"
)
_LOADED_WORD = re.compile(r"\tld\.shared\.u32 \t%r\d+, \[[^\]]+\];\n")
_ENTRY_HEAD = re.compile(r"^\.visible \.entry (\S+)\([^)]*\)\n", re.M)


def compile(
    source: str,
    *,
    arch: str = "sm_90",
    include_dirs: Sequence[Path] = (),
    defines: Sequence[str] = (),
    function_constants: Mapping[str | int, object] | None = None,
    only: Sequence[str] = ("*",),
    equal_rate: bool = False,
    split_floats: bool = False,
    join_rows: bool = False,
) -> str:
    """Compiles a Metal source to PTX, or takes it from the cache.

    The arguments are those of engine.compile.  With ``equal_rate`` half precision operands of a
    matrix product are multiplied as float operands are, without tensor cores.  With
    ``split_floats`` float operands are multiplied there, too, in parts of 16 or 22 bits together.
    With ``join_rows`` two products of halves that follow each other and share the right operand are
    one on tensor cores, whose lower eight rows are otherwise unused.  Raises CompileError.
    """
    modes = ["MSL_EQUAL_RATE"] * equal_rate + ["MSL_SPLIT_FLOATS"] * split_floats
    lint.check_characters(source)
    text = preprocess(source, tuple(str(path) for path in include_dirs), tuple(defines))
    constants = {str(key): value for key, value in (function_constants or {}).items()}
    program = prepass.rewrite(text, constants, only)
    identity = hashlib.sha256(repr((program, arch, modes)).encode()).hexdigest()[:32]
    path = cache.get(f"{identity}.ptx", lambda p: p.write_text(_build(program, arch, modes)))
    text = path.read_text()
    return _join_rows(text) if join_rows else text


def _build(program: str, arch: str, modes: Sequence[str]) -> str:
    target = ["--target=nvptx64-nvidia-cuda", f"-march={arch}", "-nogpulib"]
    target += ["-Xclang", "-target-feature", "-Xclang", _PTX_VERSION]
    front = [CLANG, *LANGUAGE, *SEMANTICS, *WARNINGS, *target, "-DMSL_PTX", "-O3"]
    front += [f"-D{mode}" for mode in modes]
    front += ["-Xclang", "-disable-llvm-passes"]
    front += ["-isystem", str(INCLUDE), "-include", "msl/msl.h"]
    ir = run_compiler([*front, "-S", "-emit-llvm", "-", "-o", "-"], program).stdout
    ir = ir.replace(f"addrspace({_CONSTANT})", f"addrspace({_GLOBAL})")
    ir = ir.replace(f".p{_CONSTANT}", f".p{_GLOBAL}")  # in the names of intrinsics
    with tempfile.TemporaryDirectory(prefix="simulator-") as folder:
        output = Path(folder) / "program.ptx"
        back = [
            CLANG,
            "-x",
            "ir",
            *target,
            "-O3",
            "-ffp-contract=fast-honor-pragmas",
            "-Wno-override-module",
        ]
        run([*back, "-S", "-", "-o", str(output)], ir)
        return _limit_threads(output.read_text())


def _join_rows(text: str) -> str:
    """Gives the upper rows of a product of halves and those of the next one to one instruction."""
    pieces: list[str] = []
    end = 0  # of what the pieces have
    upper: re.Match[str] | None = None  # a product that is not in them yet
    for product in _HALF_PRODUCT.finditer(text):
        if upper and _share_rows(upper, product):
            pieces.append(text[upper.start() : upper.end("moves")])
            pieces.append(text[upper.end() : product.start()] + product["moves"])
            sums = f"{{{upper['sums']},{product['sums']}}}"
            factors = f"{{{upper['a']},{product['a']}}}, {{{upper['t']}}}"
            pieces.append(
                f"\t// begin inline asm\n\t{upper['name']} {sums}, {factors}, {sums};\n"
                "\t// end inline asm\n"
            )
            end, upper = product.end(), None
            continue
        pieces.append(text[end : product.start()])
        end, upper = product.start(), product
    return "".join([*pieces, text[end:]])


def _share_rows(upper: re.Match[str], lower: re.Match[str]) -> bool:
    """Whether the products have one right operand, and one may wait for the other.

    Between them may be moves and a word that is read from shared memory, if neither touches what
    the first product reads or writes.
    """
    between = upper.string[upper.end() : lower.start()]
    if between and not _LOADED_WORD.fullmatch(between):
        return False
    if (upper["b"], upper["zeros"]) != (lower["b"], lower["zeros"]):
        return False
    sums = {*upper["sums"].split(","), *upper["unused"].split(",")}
    touched = re.findall(r"%[rf]\d+", between + lower["moves"] + lower["sums"])
    moved = re.findall(r"%[rf]\d+", upper["moves"])
    stays = {upper["a"], upper["b"], upper["t"], *sums}
    return stays.isdisjoint(touched) and upper["b"] not in moved


def _limit_threads(text: str) -> str:
    """Turns the variables <kernel>_max_threads into .maxntid of the entries.

    The assembler needs it to know how many registers a thread may have.
    """
    limits = dict(_MAX_THREADS.findall(text))
    text = _MAX_THREADS.sub("", text)
    return _ENTRY_HEAD.sub(lambda m: f"{m[0]}.maxntid {limits[m[1]]}, 1, 1\n", text)
