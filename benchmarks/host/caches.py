"""What a token of a generation costs the host: ``python -m simulator -m benchmarks.host.caches``.

Calls for caches, and forwards of few queries, on the simulated device's recording engine: kernels
are recorded and not run. The process is pinned to one core, the calls take turns, and the least
time of each is printed, in microseconds: other work of the machine only ever adds to it. With
ORCHARD_NATIVE_LIBRARY it measures that library.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import simulator
import torch

import orchard_ops
from orchard_ops import flash_attn_with_kvcache
from orchard_ops.cache import CacheCall
from orchard_ops.ops.schema import DECODE

BATCH, SLOTS, HEADS, KV_HEADS, WIDTH, PAGE = 2, 512, 8, 2, 64, 64


def calls() -> dict[str, Callable[[], Any]]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="mps", dtype=torch.float16)

    q = draw(BATCH, 1, HEADS, WIDTH)
    new = [draw(BATCH, 1, KV_HEADS, WIDTH) for _ in range(2)]
    room = [draw(BATCH, SLOTS, KV_HEADS, WIDTH) for _ in range(2)]
    pages = [draw(BATCH * SLOTS // PAGE, PAGE, KV_HEADS, WIDTH) for _ in range(2)]
    rotary = [draw(SLOTS, WIDTH // 2) for _ in range(2)]
    table = torch.arange(len(pages[0]), device="mps", dtype=torch.int32).view(BATCH, -1)
    lengths = torch.full((BATCH,), 300, device="mps", dtype=torch.int32)
    query, key, value = (x.transpose(1, 2) for x in (q, *room))
    many = draw(BATCH, HEADS, 17, WIDTH)
    counted = itertools.cycle(range(SLOTS - 1))
    call = CacheCall(query, key, value, cache_seqlens=lengths, scale=0.125, window_right=0)

    def cached(caches: list[torch.Tensor], *more: torch.Tensor, **options: Any) -> Any:
        return flash_attn_with_kvcache(q, *caches, *more, causal=True, **options)

    return {
        "orchard::flash_attn_decode": lambda: DECODE(*call),
        "flash_attn_with_kvcache": lambda: cached(room, cache_seqlens=lengths),
        "with a new key": lambda: cached(room, *new, cache_seqlens=lengths),
        "with a new key, an int that counts": lambda: cached(
            room, *new, cache_seqlens=next(counted)
        ),
        "with a new key, rotary": lambda: cached(room, *new, *rotary, cache_seqlens=lengths),
        "with a new key, pages": lambda: cached(
            pages, *new, cache_seqlens=lengths, block_table=table
        ),
        "flash_attn, 1 query": lambda: orchard_ops.flash_attn(query, key, value, enable_gqa=True),
        "flash_attn, 17 queries (forward)": lambda: orchard_ops.flash_attn(
            many, key, value, enable_gqa=True
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3000, help="calls of each kind")
    parser.add_argument("--core", type=int, default=0, help="that the process is pinned to")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.core})
    torch.set_num_threads(1)
    with torch.no_grad(), simulator.recording(execute=False):
        todo = calls()
        least = dict.fromkeys(todo, float("inf"))
        for _ in range(arguments.repeats):
            for name, call in todo.items():
                begin = time.perf_counter_ns()
                call()
                least[name] = min(least[name], time.perf_counter_ns() - begin)
    for name, nanoseconds in least.items():
        print(f"{name}: {nanoseconds / 1e3:.1f} us")


if __name__ == "__main__":
    main()
