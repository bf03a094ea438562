"""Classes of LLVM instructions, for Library.instruction_mix."""

import re

_INSTRUCTION = re.compile(r"\s*(?:%\S+ = )?(?:tail |notail |musttail )?(\w+)(.*)")
_VECTOR = re.compile(r"<(\d+) x ")
_SPACE = re.compile(r"addrspace\((\d)\)")
_FLOAT_RANGE = re.compile(r"llvm\.(max|min)num")
_INTEGER_CALL = re.compile(r"llvm\.(smax|smin|umax|umin|abs)")

_CLASSES = {
    "fmul": "fmul",
    "fadd": "fadd",
    "fsub": "fadd",
    "fneg": "fadd",
    "fdiv": "fdiv",
    "frem": "fdiv",
    "fcmp": "fcmp",
    "fpext": "fcvt",
    "fptrunc": "fcvt",
    "sitofp": "icvt",
    "uitofp": "icvt",
    "fptosi": "icvt",
    "fptoui": "icvt",
    **dict.fromkeys(["add", "sub", "shl", "lshr", "ashr", "and", "or", "xor"], "int"),
    "mul": "imul",
    **dict.fromkeys(["sdiv", "udiv", "srem", "urem"], "idiv"),
    "icmp": "icmp",
    "select": "select",
    "getelementptr": "gep",
}
# Loads and stores by address space; everything else is a lane's private memory.
_LOADS = {"1": "load_device", "2": "load_constant", "3": "load_threadgroup"}
_STORES = {"1": "store_device", "3": "store_threadgroup"}


def classify(line: str) -> tuple[str, int] | None:
    """The class of an instruction and the number of scalars it works on; None if not counted."""
    m = _INSTRUCTION.match(line)
    if not m:
        return None
    opcode, rest = m.groups()
    if opcode in ("load", "store"):
        space = _SPACE.search(rest)
        names = _LOADS if opcode == "load" else _STORES
        return (names.get(space[1], "private") if space else "private"), 1
    vector = _VECTOR.search(rest.split("(")[0])
    width = int(vector[1]) if vector else 1
    if opcode == "call":
        if "llvm.fm" in rest:  # fma, fmuladd
            return "fma", width
        if _FLOAT_RANGE.search(rest):
            return "fminmax", width
        return ("int", width) if _INTEGER_CALL.search(rest) else None
    if opcode == "br":
        return ("branch", 1) if " i1 " in rest else None
    return (_CLASSES[opcode], width) if opcode in _CLASSES else None
