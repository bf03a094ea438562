"""How fast attention to a cache can ask for it: ``python -m benchmarks.apple_model.decode``.

Model A (issue_model.py): exact counts of one simdgroup for a block of 16 keys, weighted with the
published rates of the Apple7/8 GPU. Beside the bytes of the block that is a rate at full issue,
which the memory of a Mac (specifications of Apple, clocks as published) has to be below for the
kernel to be bound by it. It needs the simulator's compiler, no GPU. With ``--write`` the figures go
into results/apple_model/decode.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from simulator import engine

from benchmarks.planner import CACHE_BUFFERS, ROOT, Planner, compile_planner

from .core_model import SCHEDULERS
from .counts import Counts, _counts
from .issue_model import issue

sys.path.insert(0, str(ROOT / "native"))
import embed_shaders

RECORD = ROOT / "benchmarks" / "results" / "apple_model" / "decode.json"
MADE_BY = "python -m benchmarks.apple_model.decode --write"
SHORT, LONG = 4, 8  # blocks of a simdgroup: no part has fewer
BLOCK = 16
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HOST_BUFFERS = {"query": 0, "key": 1, "value": 2, "params": 12, "alibi_slopes": 14}


class Mac(NamedTuple):
    """GB/s, cores and GHz of a GPU."""

    name: str
    bandwidth: float
    cores: int
    clock: float

    @property
    def rate(self) -> float:
        """Bytes of memory for each cycle of a core."""
        return self.bandwidth / self.cores / self.clock


MACS = (
    Mac("M1", 68.25, 8, 1.278),
    Mac("M1 Max", 409.6, 32, 1.296),
    Mac("M2", 102.4, 10, 1.398),
    Mac("M2 Ultra", 819.2, 76, 1.398),
    Mac("M3", 102.4, 10, 1.38),
    Mac("M3 Max", 409.6, 40, 1.38),
    Mac("M4", 120.0, 10, 1.47),
    Mac("M4 Max", 546.0, 40, 1.58),
)


def new_planner() -> Planner:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "plan.so")
        compile_planner(library, ROOT, "-O0", "-w")
        return Planner(library)


def count(
    planner: Planner, dtype: str, width: int, rows: int, paged: bool = False, score: str = ""
) -> Counts:
    """Of one threadgroup: `rows` query heads that share a key/value head, one query of each."""
    number = list(DTYPES).index(dtype)

    def launch(blocks: int) -> tuple:
        kv_len = 4 * BLOCK * blocks
        entries, page = (kv_len // BLOCK, BLOCK) if paged else (1, kv_len)
        places = {
            "q": ((1, rows, 1, width), (rows * width, width, width, 1), 0),
            "k": ((entries, 1, page, width), (page * width, width, width, 1), 0),
            "out": ((1, rows, 1, width), (rows * width, width, width, 1), 0),
        }
        cache = {"page_size": page, "entries": entries, "added": kv_len, "paged": paged}
        cache |= {"pages": entries, "table_row": entries} if paged else {}
        fields = {"softcap": 2.0 * ("softcap" in score), "has_alibi": "alibi" in score}
        places["v"] = places["k"]
        plan = planner.decode(places, number, cache, scale=1.0, window_right=0, **fields)
        kernel = plan.kernels[0]
        # One threadgroup takes all keys, so that each of its simdgroups has all these blocks.
        plan.params.parts = 1
        source = embed_shaders.flatten("decode.h") + "\n" + kernel.instantiation
        library = engine.compile(source, check=True)
        memory = torch.zeros(4 << 20, dtype=torch.uint8)
        params = torch.frombuffer(bytearray(plan.params), dtype=torch.uint8).clone()
        table = torch.arange(entries, dtype=torch.int32)
        tensors = dict.fromkeys([*HOST_BUFFERS, *CACHE_BUFFERS], memory)
        tensors |= {name: memory.clone() for name in ("parts", "part_sums")}
        tensors |= {"params": params, "block_table": table}
        numbers = HOST_BUFFERS | CACHE_BUFFERS
        buffers = {
            numbers[name]: engine.Buffer(x.data_ptr(), x.numel() * x.element_size())
            for name, x in tensors.items()
        }
        grid = (kernel.threads, 1, 1)
        return library.instruction_mix(kernel.name, grid, grid, buffers, workers=1)

    return _counts(launch(SHORT), launch(LONG), 4, (SHORT, LONG))


CASES = (
    *((dtype, width, 8, False, "") for dtype in DTYPES for width in (64, 128, 256)),
    *((dtype, 128, 16, False, "") for dtype in DTYPES),
    ("float16", 128, 8, True, ""),
    ("float16", 128, 8, False, "softcap alibi"),
    *((dtype, width, 8, False, "") for dtype in ("float16", "bfloat16") for width in (80, 96)),
    ("float16", 40, 8, False, ""),
    ("bfloat16", 40, 8, False, ""),
    *((dtype, width, 8, False, "") for dtype in ("float16", "bfloat16") for width in (16, 32, 48)),
)
FASTEST = max(MACS, key=lambda mac: mac.rate)  #: memory for a core


def row_of(
    planner: Planner, dtype: str, width: int, heads: int, paged: bool, score: str
) -> dict[str, Any]:
    """Cycles of a product, bytes that a block of keys reads and has in the cache, and the bytes of
    a core-cycle at full issue, and by the products alone, by those of FASTEST."""
    counts = count(planner, dtype, width, heads, paged, score)
    cycles = issue("attention_decode", counts)
    size = counts.steady["device_bytes_read"]
    return dict(
        dtype=dtype,
        head_dim=width,
        rows=heads,
        paged=paged,
        score=score,
        cycles=cycles.per_product,
        parts={k: v / cycles.products for k, v in cycles.parts.items() if v},
        bytes_read=size,
        bytes_in_cache=2 * BLOCK * width * DTYPES[dtype].itemsize,
        rate=SCHEDULERS * size / cycles.cycles / FASTEST.rate,
        # Nothing but the products of the matrix unit, of which 16 rows have twice as many.
        by_products=SCHEDULERS * size / cycles.parts["mma"] / FASTEST.rate,
    )


def record() -> list[dict[str, Any]]:
    planner = new_planner()
    return [row_of(planner, *case) for case in CASES]


def line(row: dict[str, Any]) -> str:
    words = f"{row['dtype']} D{row['head_dim']}, {row['rows']} rows"
    words += ", paged" * row["paged"] + f", {row['score']}" * bool(row["score"])
    parts = {name: round(value, 1) for name, value in row["parts"].items()}
    return (
        f"{words}: {row['cycles']:.1f} cycles a product, {row['bytes_read']:.0f} bytes a block, "
        f"{row['rate'] * FASTEST.rate:.1f} bytes a core-cycle = {row['rate']:.2f} x "
        f"{FASTEST.name}, "
        f"{row['by_products']:.2f} by its products alone; {parts}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RECORD.name}, too")
    write = parser.parse_args().write
    print("bytes of memory a core-cycle: " + ", ".join(f"{m.name} {m.rate:.1f}" for m in MACS))
    rows = record()
    if write:
        content = {"made_by": MADE_BY, "fastest": FASTEST.name, "cases": rows}
        RECORD.write_text(json.dumps(content, indent=1) + "\n")
    for row in rows:
        print(line(row))


if __name__ == "__main__":
    main()
