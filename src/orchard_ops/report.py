"""`report`: a block that lists each distinct attention call of whatever runs in it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from torch import Tensor

from . import watch
from .cache import CacheCall
from .descriptions import Description, describe, describe_cache, describe_flex, describe_sdpa
from .explain import explain_cache, explain_flat
from .ops.schema import BackwardArgs, ForwardArgs
from .scoring import NO_BACKWARD
from .training_memory import score_matrix_bytes

_DIRECTIONS = {"flash_attn_fwd": "forward", "flash_attn_bwd": "backward"}
_FLEX = {"flex_attn_fwd": "forward", "flex_attn_bwd": "backward"}
_FLEX_REFERENCE = "flex_attention"
_DECODE = "flash_attn_decode"
_SDPA = "scaled_dot_product_attention"
METAL, REFERENCE, PYTORCH = "metal", "reference", "pytorch"
NOT_SEEN = (
    "attention that never calls orchard_ops (matrix products written out, "
    "F.scaled_dot_product_attention that is not taken over), code that torch.compile wrote with "
    "cpp_wrapper or AOTInductor, and other processes"
)
"""What `report` cannot list, in words."""


@dataclass
class ReportedCall:
    """One distinct call, and how often it ran."""

    direction: str
    """ "forward", "backward", or "decode": attention of few queries to a cache."""
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    dtype: str
    device: str
    arguments: str
    """The arguments that are not the defaults, such as "causal, dropout_p 0.1"."""
    path: str
    """ "metal", "reference", or "pytorch": F.scaled_dot_product_attention was left to it."""
    kernels: tuple[str, ...]
    """The Metal kernels by the plan, but for those of flex_attention, and those that only the
    gradient of a mask needs."""
    reason: str
    """The reason for another path; empty on Metal."""
    advice: str
    """A change that would make the call run on Metal, or faster there. It may be empty."""
    count: int = 0
    bytes_not_allocated: int = 0
    """For backwards, over all of them: the softmax that PyTorch's math path would have kept for
    each since its forward, B x Hq x L x S in float32. 0 for forwards."""

    def __str__(self) -> str:
        problem = Description(
            self.query, self.key, self.value, self.dtype, self.device, self.arguments
        )
        where = "left to PyTorch" if self.path == PYTORCH else f"on {self.path}"
        lines = [f"{self.count} x {self.direction} {where}: {problem}"]
        lines += [f"    kernel: {name}" for name in self.kernels]
        for name in ("reason", "advice"):
            if getattr(self, name):
                lines.append(f"    {name}: {getattr(self, name)}")
        if self.bytes_not_allocated:
            each = size(self.bytes_not_allocated // self.count)
            lines.append(f"    not allocated: {each} for each, {size(self.bytes_not_allocated)}")
        return "\n".join(lines)


def size(num_bytes: float) -> str:
    """Bytes in words, such as "32.0 MiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"


@dataclass
class Report:
    """What the block of `report` has run so far."""

    calls: list[ReportedCall] = field(default_factory=list)
    """In the order of their first run."""

    def count(self, path: str) -> int:
        """Calls on "metal", on the "reference", or left to "pytorch"."""
        return sum(call.count for call in self.calls if call.path == path)

    @property
    def bytes_not_allocated(self) -> int:
        """The sum over all backwards, see `ReportedCall`. A step without checkpointing would have
        held those of all its layers at once."""
        return sum(call.bytes_not_allocated for call in self.calls)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"bytes_not_allocated": self.bytes_not_allocated}

    def __str__(self) -> str:
        if not self.calls:
            return f"orchard_ops: no attention call was seen. Not seen are {NOT_SEEN}."
        left = self.count(PYTORCH)
        lines = [
            f"orchard_ops: {self.count(METAL)} attention calls on Metal, "
            f"{self.count(REFERENCE)} on the reference" + (f", {left} left to PyTorch" * (left > 0))
        ]
        lines += map(str, self.calls)
        if self.bytes_not_allocated:
            lines.append(
                f"not allocated: {size(self.bytes_not_allocated)}, the softmax that PyTorch's math "
                "path keeps for each of these backwards"
            )
        return "\n".join(lines)


class _Collector:
    """Makes a `Report` of the calls that it is told of."""

    def __init__(self) -> None:
        self.report = Report()
        self._lock = threading.Lock()
        self._entries: dict[tuple[Any, ...], ReportedCall] = {}

    def __call__(self, op: str, args: tuple[Any, ...], reference: str | None) -> None:
        if op == _SDPA:
            self._left_to_pytorch(args, str(reference))
        if op == _DECODE:
            self._decode(CacheCall(*args), reference)
        if op in _FLEX:
            self._flex(_FLEX[op], _described_flex(op, args), None)
        if op == _FLEX_REFERENCE:
            self._flex("forward", args[0], reference)
        if op not in _DIRECTIONS:
            return
        reader: Any = BackwardArgs if op == "flash_attn_bwd" else ForwardArgs
        call = reader.read(args)
        problem = describe(call.query, call.key, call.value, call.scoring)
        tensors = (call.query, call.key, call.value, *call.scoring)
        layouts = tuple(_layout(x) for x in tensors if isinstance(x, Tensor))
        alone = call.scoring.key_span == NO_BACKWARD  # which may run on other kernels
        with self._lock:
            entry = self._entries.get((op, problem, layouts, alone, reference))
            if entry is None:
                entry = self._new(op, problem, call, reference)
                self._entries[op, problem, layouts, alone, reference] = entry
            entry.count += 1
            if entry.direction == "backward":
                batch, num_heads, q_len, _ = problem.query
                scores = score_matrix_bytes(batch, num_heads, q_len, problem.key[2])
                entry.bytes_not_allocated += scores

    def _decode(self, call: CacheCall, reference: str | None) -> None:
        path, reason = (METAL, "") if reference is None else (REFERENCE, reference)
        with self._lock:
            kernels = explain_cache(call).kernels if reference is None else ()
            listed = ReportedCall("decode", *describe_cache(call), path, kernels, reason, "")
            self._listed(listed).count += 1

    def _flex(self, direction: str, problem: Description, reference: str | None) -> None:
        path = METAL if reference is None else REFERENCE
        with self._lock:
            entry = self._listed(ReportedCall(direction, *problem, path, (), reference or "", ""))
            entry.count += 1
            if direction == "backward":
                batch, num_heads, q_len, _ = problem.query
                scores = score_matrix_bytes(batch, num_heads, q_len, problem.key[2])
                entry.bytes_not_allocated += scores

    def _left_to_pytorch(self, args: tuple[Any, ...], reason: str) -> None:
        problem = describe_sdpa(*args)
        with self._lock:
            self._listed(ReportedCall("forward", *problem, PYTORCH, (), reason, "")).count += 1

    def _listed(self, call: ReportedCall) -> ReportedCall:
        """The entry that says the same, in another layout perhaps, or this one as a new entry."""
        for other in self.report.calls:
            if _same(other, call):
                return other
        self.report.calls.append(call)
        return call

    def _new(self, op: str, problem: Description, call: Any, reference: str | None) -> ReportedCall:
        direction = _DIRECTIONS[op]
        found = explain_flat(call.query, call.key, call.value, *call.scoring, call.impl)
        kernels: tuple[str, ...] = ()
        if reference is None:
            kernels = found.forward_kernels if direction == "forward" else found.backward_kernels
        # The advice of a plan that Metal takes is about speed there.
        advice = found.advice if (reference is None) == (found.path == "metal") else ""
        path, reason = (METAL, "") if reference is None else (REFERENCE, reference)
        return self._listed(ReportedCall(direction, *problem, path, kernels, reason, advice))


def _described_flex(op: str, args: tuple[Any, ...]) -> Description:
    operands, results = (args[2:5], 2) if op == "flex_attn_bwd" else (args[:3], 0)
    *_, score, mask, scale = args[: 3 + 2 * results + 7]
    return describe_flex(*operands, bool(score), bool(mask), scale)


def _layout(x: Tensor) -> tuple[Any, ...]:
    return (x.stride(), x.storage_offset() * x.element_size() % 16)


def _same(one: ReportedCall, other: ReportedCall) -> bool:
    uncounted = {"count": 0, "bytes_not_allocated": 0}
    return vars(one) | uncounted == vars(other) | uncounted


@contextmanager
def report(file: TextIO | None = None, *, show: bool = True) -> Iterator[Report]:
    """Lists each distinct attention call of this package that runs in the block, on any thread.

    ::

        with orchard_ops.report() as r:
            loss = model(tokens).loss
            loss.backward()
        assert r.count("reference") == 0

    The list has a call's shapes, dtype and arguments, its path with the kernels, or the reason for
    the reference with advice, how often it ran, and what PyTorch's math path would have kept for
    its backward. It sees forwards and backwards, whatever calls them: the functions of this
    package, `torch.ops.orchard`, F.scaled_dot_product_attention where it is taken over, autograd,
    checkpointing, `torch.compile` and `torch.func`. A backward is counted where it runs, so the
    block must hold it. Calls that the takeover leaves to PyTorch are listed with the reason, their
    backwards are not; one that compiled code holds is listed when it is traced.

    It does not see attention that never calls this package, code that torch.compile wrote with
    cpp_wrapper or AOTInductor, and other processes.

    Args:
        file: where the list is printed when the block ends; None is sys.stdout.
        show: False prints nothing; the list is in what the block gets.
    """
    collector = _Collector()
    try:
        with watch.watching(collector):
            yield collector.report
    finally:
        if show:
            print(collector.report, file=file or sys.stdout)
