"""Writes shader_text.cpp: each kernel family's Metal source, includes inlined, as C++ strings.

The text goes to Metal's run-time compiler, which sees no files; #line keeps its diagnostics
pointing at shaders/*.h.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

SHADERS = Path(__file__).resolve().parent.parent / "shaders"
FAMILIES = {
    "attention_mask_map": "mask_map.h",
    "attention_forward": "forward.h",
    "attention_forward_merge": "forward_merge.h",
    "attention_backward_delta": "backward_delta.h",
    "attention_backward_dkv": "backward_dkv.h",
    "attention_backward_dkv_pairs": "backward_dkv_pairs.h",
    "attention_backward_dkv_sums": "backward_dkv_sums.h",
    "attention_backward_dq": "backward_dq.h",
    "attention_backward_dq_from_ds": "backward_dq_from_ds.h",
    "attention_backward_dmask": "backward_dmask.h",
    "attention_backward_dmask_from_ds": "backward_dmask_from_ds.h",
    "attention_backward_dmask_rows": "backward_dmask_rows.h",
    "attention_backward_dmask_sum": "backward_dmask_sum.h",
    "attention_backward_dmask_sum_keys": "backward_dmask_sum_keys.h",
    "attention_backward_dsinks": "backward_dsinks.h",
}
CACHE_FAMILIES = {
    "attention_append": "append.h",
    "attention_decode": "decode.h",
    "attention_decode_merge": "decode_merge.h",
}
FLEX_FAMILIES = {
    "attention_flex_map": "flex_map.h",
    "attention_forward_flex": "forward.h",
    "attention_backward_dkv_flex": "backward_dkv.h",
    "attention_backward_dkv_pairs_flex": "backward_dkv_pairs.h",
    "attention_backward_dq_flex": "backward_dq.h",
}
"""The kernels whose scores are given as functions (shaders/flex_scores.h). All but the first are
ordinary ones whose text has captured tensors besides, by `_FLEX_LINES`."""

_CAPTURES = tuple(f"capture{n}" for n in range(8))
_FLEX_LINES = {
    "struct ScoreBuffers {": (
        '#include "flex_captures.h"',
        "struct ScoreBuffers {",
        "  FlexCaptures captures;",
    ),
    "    constant AttentionParams& params [[buffer(kBufferParams)]],": (
        "    constant FlexParams& flex [[buffer(kBufferParams)]],",
        *(
            f"    const device uchar* {capture} [[buffer(kBufferCapture{n})]],"
            for n, capture in enumerate(_CAPTURES)
        ),
    ),
    "    ushort lane [[thread_index_in_simdgroup]]) {": (
        "    ushort lane [[thread_index_in_simdgroup]]) {",
        "  constant AttentionParams& params = flex.attention;",
    ),
    "  const ScoreBuffers buffers = score_buffers(attn_mask, alibi_slopes);": (
        "  ScoreBuffers buffers = score_buffers(attn_mask, alibi_slopes);",
        f"  buffers.captures = flex_captures({', '.join(_CAPTURES)}, flex);",
    ),
}
"""Lines of the ordinary kernels, and what stands in their place in the flex texts. attn_mask is
block_states there."""

_LITERAL_LIMIT = 8000  # compilers cap the length of one literal

_INCLUDE = re.compile(r'^#include "(\w+\.h)"$')
_LINE = re.compile(r'^#line (\d+) "(\w+\.h)"$')


def flatten(name: str, seen: set[str] | None = None) -> str:
    """The text of shaders/<name> with every quoted include in place of its directive, once."""
    seen = set() if seen is None else seen
    seen.add(name)
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate((SHADERS / name).read_text(encoding="ascii").splitlines(), 1):
        include = _INCLUDE.match(line)
        if include:
            if include[1] not in seen:
                lines += [flatten(include[1], seen), f'#line {number + 1} "{name}"']
            else:
                lines.append("")
        else:
            lines.append("" if line == "#pragma once" else line)
    return "\n".join(lines)


def flatten_flex(name: str) -> str:
    """The text of a kernel of FLEX_FAMILIES, with shaders/flex_scores.h behind it."""
    seen: set[str] = set()
    replaced: set[str] = set()
    lines: list[str] = []
    file, number = name, 0
    for line in flatten(name, seen).split("\n"):
        number += 1
        marker = _LINE.match(line)
        if marker:
            file, number = marker[2], int(marker[1]) - 1
        instead = _FLEX_LINES.get(line) if not file.startswith("flex_") else None
        if instead is None:
            lines.append(line)
            continue
        if line in replaced:
            raise ValueError(f"{name}: a line that the flex text replaces comes twice: {line}")
        replaced.add(line)
        for new in instead:
            include = _INCLUDE.match(new)
            if not include:
                lines.append(new)
            elif include[1] not in seen:
                lines += [flatten(include[1], seen), f'#line {number} "{file}"']
        lines.append(f'#line {number + 1} "{file}"')
    missing = set() if name.startswith("flex_") else set(_FLEX_LINES) - replaced
    if missing:
        raise ValueError(f"{name}: lines that the flex text replaces are gone: {sorted(missing)}")
    if "flex_scores.h" not in seen:
        lines.append(flatten("flex_scores.h", seen))
    return "\n".join(lines)


def _literals(text: str) -> str:
    parts = [text[i : i + _LITERAL_LIMIT] for i in range(0, len(text), _LITERAL_LIMIT)]
    return "\n    ".join(f'R"METAL({part})METAL"' for part in parts)


def generate() -> str:
    """The C++ source that defines orchard::shader_text."""
    texts = {family: flatten(header) for family, header in (FAMILIES | CACHE_FAMILIES).items()}
    texts |= {family: flatten_flex(header) for family, header in FLEX_FAMILIES.items()}
    entries = ",\n".join(
        f'  {{"{family}",\n    {_literals(text + chr(10))}}}' for family, text in texts.items()
    )
    return (
        "// Generated by native/embed_shaders.py.\n"
        '#include "shader_text.h"\n\n#include <map>\n\nnamespace orchard {\n\n'
        "const std::string& shader_text(const std::string& family) {\n"
        "  static const auto& texts = *new std::map<std::string, std::string>{\n"
        f"{entries}\n  }};\n  return texts.at(family);\n}}\n\n}}  // namespace orchard\n"
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(generate(), encoding="ascii")
