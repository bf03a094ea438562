"""Check mode: puts a call in front of every memory access, in LLVM's textual IR.

clang's own sanitizers skip address spaces other than 0, which is why this is done here.  The IR is
already optimised; the calls describe the accesses that remain.
"""

import re

from .instruction_classes import classify

_TYPE = r"(?P<type><\d+ x \w+>|\w+)"
_POINTER = r"(?P<pointer>ptr addrspace\((?P<space>[123])\) (?P<value>getelementptr.*\)|[^,]+))"
_LOAD = re.compile(
    rf"\s*%\S+ = load (?:atomic )?(?:volatile )?{_TYPE}, {_POINTER}, align (?P<align>\d+)"
)
_STORE = re.compile(rf"\s*store (?:volatile )?{_TYPE} .*?, {_POINTER}, align (?P<align>\d+)")
_ACCESS = re.compile(r"\b(?:load|store|atomicrmw|cmpxchg) .*addrspace\([123]\)")
_MEMORY_CALL = re.compile(r"@llvm\.mem(?P<what>cpy|move|set)\S*\((?P<arguments>.*)\)")
_MEMORY_ARGUMENT = re.compile(
    r"ptr (?:addrspace\((?P<space>[123])\) )?(?P<flags>.*?)(?P<value>[%@]\S+)$"
)
_DEBUG = re.compile(r", (!dbg !\d+)")
_LABEL = re.compile(r'[-\w.$"]+:')
# The library's own functions do not count as the kernel's instructions; the table of entries runs
# on no lane at all.
_LIBRARY_FUNCTION = re.compile(r"@_ZN3msl(7backend|4core)|msl_entry_\d+3runE|@msl_entries_")
# The address work of these headers, which play the hardware (counters, lanes, barriers), does not
# count either. Float operations there stand for Metal's own functions.
_LIBRARY_FILE = re.compile(r'!DIFile\(filename: "[^"]*/msl/(?:cpu_\w+|executor|simd)\.h"')
_METADATA = re.compile(r"(!\d+) = (?:distinct )?(!DI\w+\(.*)")
_FILE = re.compile(r"\bfile: (!\d+)")
_SCOPE = re.compile(r"\bscope: (!\d+)")
_ADDRESS_WORK = frozenset(["int", "imul", "idiv", "icmp", "gep", "branch"])
_BYTES = {"double": 8, "half": 2, "bfloat": 2, "float": 4, "ptr": 8}

DECLARATIONS = "\n".join(
    [
        f"declare void @msl_{access}_{space}(ptr addrspace({space}), i32, i32)"
        for access in ("load", "store")
        for space in (1, 2, 3)
    ]
    + ["declare void @msl_block(i32)", ""]
)


def size_of(type_: str) -> int:
    m = re.match(r"<(\d+) x (\w+)>", type_)
    if m:
        count, element = int(m[1]), m[2]
        return (count + 7) // 8 if element == "i1" else count * size_of(element)
    return _BYTES.get(type_) or (int(type_[1:]) + 7) // 8


def instrument(ir: str) -> tuple[str, list[dict[str, int]]]:
    """The IR with calls, and for each basic block the instructions of each class in it, loads and
    stores also by their bytes."""
    writer = _Writer(_library_locations(ir))
    for line in ir.split("\n"):
        writer.line(line)
    writer.output.append(DECLARATIONS)
    return "\n".join(writer.output), writer.blocks


def _library_locations(ir: str) -> frozenset[str]:
    """The debug locations that lie in the library's text."""
    metadata = dict(m.groups() for line in ir.split("\n") if (m := _METADATA.match(line)))
    files = {x for x, text in metadata.items() if _LIBRARY_FILE.match(text)}

    def lies_in_library(scope: str) -> bool:
        text = metadata.get(scope, "")
        file = _FILE.search(text)
        return bool(file and file[1] in files)

    locations = (
        (x, _SCOPE.search(text)) for x, text in metadata.items() if text.startswith("!DILocation(")
    )
    return frozenset(x for x, scope in locations if scope and lies_in_library(scope[1]))


class _Writer:
    def __init__(self, library_locations: frozenset[str]) -> None:
        self.library_locations = library_locations
        self.output: list[str] = []
        self.blocks: list[dict[str, int]] = []
        self.counted = False  # inside a function of the program
        self.at_block_start = False
        self.temporaries = 0

    def line(self, line: str) -> None:
        if line.startswith("define "):
            self.counted = not _LIBRARY_FUNCTION.search(line)
            self.at_block_start = self.counted
        elif line.startswith("}"):
            self.counted = self.at_block_start = False
        elif line.startswith("  "):
            self.instruction(line)
        elif _LABEL.match(line):
            self.at_block_start = self.counted
        self.output.append(line)

    def instruction(self, line: str) -> None:
        if self.at_block_start and " = phi " not in line:
            self.at_block_start = False
            self.call("msl_block", f"i32 {len(self.blocks)}", line)
            self.blocks.append({})
        if self.counted and not self.at_block_start:
            found = classify(line)
            if found and not (found[0] in _ADDRESS_WORK and self.of_library(line)):
                self.count(*found)
        if "addrspace(" in line:
            self.access(line)

    def of_library(self, line: str) -> bool:
        debug = _DEBUG.search(line)
        return bool(debug and debug[1].removeprefix("!dbg ") in self.library_locations)

    def count(self, class_: str, number: int) -> None:
        block = self.blocks[-1]
        block[class_] = block.get(class_, 0) + number

    def access(self, line: str) -> None:
        load = _LOAD.match(line)
        m = load or _STORE.match(line)
        if m:
            if self.counted and not self.at_block_start:
                kind = classify(line)
                assert kind
                self.count(f"{kind[0]}:{size_of(m['type'])}", 1)
            # A program-scope constant by name needs no check.
            if not (m["space"] == "2" and m["value"].startswith("@")):
                name = f"msl_{'load' if load else 'store'}_{m['space']}"
                size = size_of(m["type"])
                self.call(name, f"{m['pointer']}, i32 {size}, i32 {m['align']}", line)
        elif "@llvm.mem" in line:
            self.memory_call(line)
        elif _ACCESS.search(line):
            raise RuntimeError(f"check mode does not understand this access: {line.strip()}")

    def memory_call(self, line: str) -> None:
        """memcpy and memmove: the target, then the source; memset: the target."""
        m = _MEMORY_CALL.search(line)
        arguments = _split(m["arguments"])
        length = arguments[2].removeprefix("i64 ")
        if length.startswith("%"):
            self.temporaries += 1
            short = f"%msl.length.{self.temporaries}"
            self.output.append(f"  {short} = trunc i64 {length} to i32")
            length = short
        pointers = arguments[:1] if m["what"] == "set" else arguments[:2]
        for name, argument in zip(("store", "load"), pointers, strict=False):
            p = _MEMORY_ARGUMENT.match(argument)
            if not p or not p["space"] or (p["space"] == "2" and p["value"].startswith("@")):
                continue
            align = re.search(r"align (\d+)", p["flags"])
            pointer = f"ptr addrspace({p['space']}) {p['value']}"
            known = align[1] if align else "1"
            self.call(f"msl_{name}_{p['space']}", f"{pointer}, i32 {length}, i32 {known}", line)

    def call(self, function: str, arguments: str, line: str) -> None:
        """Adds the debug location of the instruction that follows."""
        debug = _DEBUG.search(line)
        location = f", {debug[1]}" if debug else ""
        self.output.append(f"  call void @{function}({arguments}){location}")


def _split(arguments: str) -> list[str]:
    """Splits at top-level commas."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(arguments):
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append(arguments[start:i].strip())
            start = i + 1
    return [*parts, arguments[start:].strip()]
