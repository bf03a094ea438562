"""All mutants of the sources, and the list of those known to be equivalent."""

from __future__ import annotations

import hashlib
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .operators import OPERATORS
from .sites import Code

FILES = (
    *(f"shaders/{name}.h" for name in (
        "backward_delta", "backward_dkv", "backward_dkv_pairs", "backward_dkv_sums",
        "backward_dmask",
        "backward_dmask_from_ds", "backward_dmask_rows", "backward_dmask_sum",
        "backward_dmask_sum_keys", "backward_dq", "backward_dq_from_ds", "backward_dsinks",
        "dkv_parts", "dropout", "dscore", "forward", "forward_merge", "forward_parts",
        "hidden_blocks", "key_sums", "keys", "loader", "long_sum", "mask_gradient", "mask_map",
        "mask_sharers", "masks", "params", "philox", "ranges", "scores", "softmax", "staging",
        "sum_parts", "tile",
    )),
    *(f"native/plan/{name}.cpp" for name in (
        "backward", "backward_cost", "dkv_parts", "dscore_scratch", "forward", "forward_parts",
        "instantiate", "params", "refusals", "tiles",
    )),
)  # fmt: skip
CACHE_FILES = (
    *(f"shaders/{name}.h" for name in (
        "append", "cache", "decode", "decode_merge", "decode_params", "joined_row",
    )),
    "native/plan/decode.cpp",
)  # fmt: skip
"""Of the ops for caches, which have killers and a campaign of their own (`--caches`)."""
FLEX_FILES = tuple(
    f"shaders/flex_{name}.h" for name in ("arithmetic", "captures", "map", "params", "scores")
)
"""Of scores that are functions, the same way (`--flex`)."""
EQUIVALENT = Path(__file__).with_name("equivalent.toml")


@dataclass(frozen=True)
class Mutant:
    """One change. `before` and `after` are the statement that it is in, in one line."""

    file: str
    function: str
    operator: str
    before: str
    after: str
    ordinal: int  # among those of the same function that read the same
    line: int
    begin: int  # offsets of the replaced text
    end: int
    text: str
    lines: tuple[int, int]  # of the statement: its first and last

    @cached_property
    def key(self) -> str:
        """Identity that survives edits elsewhere in the file."""
        parts = (self.file, self.function, self.before, self.after, str(self.ordinal))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def apply(self, original: str) -> str:
        return f"{original[: self.begin]}{self.text}{original[self.end :]}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.operator}: {self.before}  ->  {self.after}"


def mutants_of(file: str, text: str) -> Iterator[Mutant]:
    code = Code(text)
    seen: set[tuple[int, int, str]] = set()
    count: Counter[tuple[str, str, str]] = Counter()
    for name, operator in OPERATORS.items():
        for edit in operator(code):
            place = (code.begin[edit.begin], code.end[edit.end - 1], edit.text)
            if place in seen or edit.text == code.text(edit.begin, edit.end):
                continue
            seen.add(place)
            begin, end = code.segment(edit.begin)
            end = max(end, edit.end)
            before = code.normalised(begin, end)
            after = code.normalised(begin, end, edit)
            function = code.functions[edit.begin]
            same = (function, before, after)
            count[same] += 1
            yield Mutant(
                file, function, name, before, after, count[same], code.line(edit.begin),
                place[0], place[1], edit.text, (code.line(begin), code.line(end - 1)),
            )  # fmt: skip


def all_mutants(root: Path, files: tuple[str, ...] = FILES) -> list[Mutant]:
    return [
        mutant
        for file in files
        for mutant in mutants_of(file, (root / file).read_text(encoding="ascii"))
    ]


@dataclass(frozen=True)
class Equivalence:
    """An entry of equivalent.toml."""

    file: str
    function: str
    reason: str
    changes: frozenset[tuple[str, str]]  # (before, after)
    ordinal: int | None = None  # of several places in the function that read the same

    def covers(self, mutant: Mutant) -> bool:
        return (
            self.file == mutant.file
            and self.function == mutant.function
            and (mutant.before, mutant.after) in self.changes
            and self.ordinal in (None, mutant.ordinal)
        )


def equivalences() -> list[Equivalence]:
    entries = tomllib.loads(EQUIVALENT.read_text())["equivalent"]
    return [
        Equivalence(
            entry["file"], entry["function"], entry["reason"],
            frozenset((entry["before"], after) for after in entry["after"]),
            entry.get("ordinal"),
        )
        for entry in entries
    ]  # fmt: skip
