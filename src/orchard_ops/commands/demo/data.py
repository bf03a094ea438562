"""The text: the source of Python's standard library, which every machine that runs this has."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT_EVERY = 10
"""One file in this many is kept out of training."""


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes to judge by, from different files."""

    train: Tensor
    """(N) uint8."""
    held_out: Tensor
    """(M) uint8."""
    num_files: int
    sha256: str
    """The digest of all the text. Runs are comparable where it is the same, as with one Python
    version."""


def standard_library_files() -> list[Path]:
    """The modules at the top of the standard library, sorted by name."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    if len(files) < HELD_OUT_EVERY:
        raise FileNotFoundError(
            f"the demo trains on the source of Python's standard library, but {folder} holds "
            f"{len(files)} .py files"
        )
    return files


def indent_with_tabs(source: bytes) -> bytes:
    """Replaces each four leading spaces by a tab, so that a short context holds more code than
    indentation."""
    return re.sub(rb"(?m)^(?: {4})+", lambda spaces: b"\t" * (len(spaces[0]) // 4), source)


def load_corpus(files: list[Path] | None = None) -> Corpus:
    """Reads the files (the standard library's by default); every tenth is held out.

    Indentation is by tabs, see `indent_with_tabs`.
    """
    if files is None:
        files = standard_library_files()
    texts = [indent_with_tabs(path.read_bytes()) for path in files]
    held_out = b"".join(texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    train = b"".join(
        text for i, text in enumerate(texts) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1
    )
    return Corpus(
        torch.frombuffer(bytearray(train), dtype=torch.uint8),
        torch.frombuffer(bytearray(held_out), dtype=torch.uint8),
        len(files),
        hashlib.sha256(train + held_out).hexdigest(),
    )


def batches(
    text: Tensor, batch_size: int, context_length: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random excerpts of text (N) uint8 as (tokens, targets), each (B, L) int64 on the cpu.

    Draws from a generator of its own: the global one belongs to the dropout masks.
    """
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context_length + 1)
    while True:
        starts = torch.randint(len(text) - context_length, (batch_size, 1), generator=generator)
        excerpt = text[starts + offsets].long()
        yield excerpt[:, :-1], excerpt[:, 1:]
