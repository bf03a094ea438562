"""The traces of mods, kept between calls.

A trace is found again by what the mod is and reads (closure.py). The tensors that it reads are
those of the present call.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.forward_ad import unpack_dual
from torch.fx import Graph, GraphModule

from ..ops.kernels import no_autocast
from . import closure
from .apart import apart
from .arguments import OP
from .known import Known, recognise
from .metal import lower
from .mod import Mod, NotLowered
from .trace import TORCH, Traced, is_written, trace

_MOST_KEPT = 256
_functorch = torch._C._functorch


@dataclass(eq=False)
class Kept:
    """A trace, and what has been made of it."""

    traced: Traced
    sources: tuple[int | Tensor, ...]
    """Of each captured tensor: its place among those that the mod reads, or itself, where the mod
    makes it."""
    texts: dict[int, Mod | NotLowered] = field(default_factory=dict)
    """By the number of the first capture. The captures of such a Mod are their places among those
    of the trace."""

    known: WeakKeyDictionary[Kept, Known | None] = field(default_factory=WeakKeyDictionary)
    """With each mask_mod, or by itself under its own name: the call of `flash_attn` that computes
    the same, if there is one. A mask_mod that is traced in every call is a new one in each."""
    lasts: bool = True
    """Whether other calls find it. Else not all of what the mod reads is known."""
    told: Callable[[Mod], None] | None = None
    """Is told of the texts."""

    def mod(self, first_capture: int) -> Mod:
        found = self.texts.get(first_capture)
        if found is None:
            found = self._lower(first_capture)
            self.texts[first_capture] = found
            if self.told is not None and isinstance(found, Mod):
                self.told(found)
        if isinstance(found, NotLowered):
            raise found
        return found

    def _lower(self, first_capture: int) -> Mod | NotLowered:
        try:
            with apart():
                mod = lower(self.traced, first_capture)
        except NotLowered as error:
            return error
        places = {id(x): n for n, x in enumerate(self.traced.captures)}
        return mod._replace(captures=tuple(places[id(x)] for x in mod.captures))


@dataclass
class Use:
    """A mod in one call."""

    kind: str
    function: Callable[..., Any]
    """([score,] b, h, q_idx, kv_idx) -> result, with everything captured."""
    kept: Kept | None
    """None where torch.func transforms what the mod reads: it was not traced."""
    captures: tuple[Tensor, ...]

    @property
    def traced(self) -> Traced:
        assert self.kept is not None
        return self.kept.traced

    def mod(self, first_capture: int) -> Mod:
        """Metal, and what it reads.

        Raises:
            NotLowered: the mod has no text.
        """
        assert self.kept is not None
        mod = self.kept.mod(first_capture)
        return mod._replace(captures=tuple(self.captures[n] for n in mod.captures))


def known_call(score: Use | None, mask: Use | None) -> Known | None:
    """What `flash_attn` has to be told to compute the same, see `known.recognise`."""
    one, other = (None if use is None else use.kept for use in (score, mask))
    if one is None and other is None:
        return Known()
    first = one or other
    assert first is not None
    memory, second = first.known, other or first
    if second not in memory:  # which holds it, so that it stays
        with apart():
            known = recognise(*(None if x is None else x.traced for x in (one, other)))
        memory[second] = known
    return memory[second]


_lock = threading.Lock()
_of_functions: OrderedDict[tuple[Any, ...], Kept] = OrderedDict()
_of_graphs: WeakKeyDictionary[GraphModule, dict[tuple[Any, ...], Kept]] = WeakKeyDictionary()
"""They go with the compiled code that has them."""


def _remember(kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    with _lock:
        kept[key] = value
        while len(kept) > _MOST_KEPT:
            kept.popitem(last=False)


_MOST_UNSAID = 16
_texts_of: WeakKeyDictionary[CodeType, set[Any]] = WeakKeyDictionary()
"""Of each function's code: what has been made of it, see `_count`."""
_KERNELS = (
    "has become {} different kernels, since numbers of Python that it reads change. Each is "
    "compiled by itself, which takes long, and kept as long as the process lives: capture what "
    "changes as a 0-dim tensor"
)
_TRACES = (
    "has been traced in {} calls, since it reads something in a way that is not followed (an "
    "object's __getitem__, a property, an import), which takes long: read it before the function "
    "is made, and capture the tensor"
)


def _code_of(mod: Callable[..., Any]) -> CodeType | None:
    """None of PyTorch's own functions: what `and_masks` gives has one code for all."""
    while isinstance(mod, functools.partial):
        mod = mod.func
    code = getattr(mod, "__code__", None) or getattr(type(mod).__call__, "__code__", None)
    return None if code is None or code.co_filename.startswith(TORCH) else code


def _count(code: CodeType | None, kind: str, what: Any, message: str) -> None:
    """Notes what has been made of a function, and says once that it is much."""
    if code is None:
        return
    with _lock:
        made = _texts_of.setdefault(code, set())
        if len(made) == _MOST_UNSAID or what in made:
            return
        made.add(what)
        count = len(made)
    if count == _MOST_UNSAID:
        warnings.warn(
            f"{OP}: {kind}_mod {code.co_qualname} ({code.co_filename}:"
            f"{code.co_firstlineno}) {message.format(count)}",
            stacklevel=2,
        )


def of_function(mod: Callable[..., Any], kind: str, query: Tensor) -> Use:
    """A mod of eager code."""
    snapshot = closure.snapshot(mod)
    if _is_transformed(kind, snapshot):
        return Use(kind, mod, None, () if snapshot is None else snapshot.tensors)
    if snapshot is None:
        _count(_code_of(mod), kind, object(), _TRACES)
        traced = _trace(mod, kind, query)
        captures = _without_gradient(kind, traced.captures)
        return Use(kind, mod, Kept(traced, (), lasts=False), captures)
    # What PyTorch makes of integers that are divided depends on its default.
    key = (kind, query.dtype, query.device, torch.get_default_dtype(), snapshot.key)
    kept = _of_functions.get(key)
    if kept is None:
        traced = _trace(mod, kind, query)
        places = {id(x): n for n, x in enumerate(snapshot.tensors)}
        if not all(id(x) in places or y for x, y in zip(traced.captures, _written(traced))):
            # Read by unknown ways, or what a transform has wrapped and does not follow.
            captures = _without_gradient(kind, traced.captures)
            return Use(kind, mod, Kept(traced, ()), captures)
        kept = Kept(_lightened(traced), tuple(places.get(id(x), x) for x in traced.captures))
        code = _code_of(mod)
        kept.told = lambda text: _count(code, kind, hash(text.text), _KERNELS)
        _remember(_of_functions, key, kept)
    captures = tuple(snapshot.tensors[x] if isinstance(x, int) else x for x in kept.sources)
    return Use(kind, mod, kept, _without_gradient(kind, captures))


def _without_gradient(kind: str, captures: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a mask_mod reads may be trained elsewhere; what it sees has no derivative."""
    if kind == "score" or not any(x.requires_grad for x in captures):
        return captures
    return tuple(x.detach() for x in captures)


def _is_transformed(kind: str, snapshot: closure.Snapshot | None) -> bool:
    """Whether torch.func transforms what a mod reads. A trace, which is made apart from transforms,
    has the tensors within, and what is computed of them reaches no transform."""
    if not torch._C._are_functorch_transforms_active():
        return False
    if snapshot is None:
        return True  # one cannot tell
    return any(_is_followed(kind, x) for x in snapshot.tensors)


def _is_followed(kind: str, x: Tensor) -> bool:
    """Whether a transform maps a tensor or, of a score_mod, differentiates by it."""
    while True:
        if _functorch.is_batchedtensor(x):
            return True
        if kind == "score" and (x.requires_grad or unpack_dual(x).tangent is not None):
            return _functorch.is_functorch_wrapped_tensor(x)
        if not _functorch.is_functorch_wrapped_tensor(x):
            return False
        x = _functorch.get_unwrapped(x)


def of_graph(graph: GraphModule, kind: str, query: Tensor, captures: Sequence[Any]) -> Use:
    """A mod that torch.compile has traced: it takes what it captures as arguments behind the
    others. A number that the compiler has not fixed is one of them."""
    graph, numbers = _numbers_as_tensors(graph, 5 if kind == "score" else 4)
    tensors = tuple(_as_tensor(x, query, n in numbers) for n, x in enumerate(captures))
    sizes = tuple((x.dtype, tuple(_known_size(n) for n in x.shape)) for x in tensors)
    key = (kind, query.dtype, query.device, sizes)
    known = _of_graphs.setdefault(graph, {})
    kept = known.get(key)
    if kept is None:
        with apart(), FakeTensorMode(allow_non_fake_inputs=True):
            stand_ins = [
                torch.empty(shape, dtype=x.dtype, device=x.device)
                for x, (_, shape) in zip(tensors, sizes)
            ]
        try:
            with _tracing(), apart(), no_autocast(query):
                traced = trace(graph, kind, query.device, query.dtype, stand_ins)
        except (TypeError, AttributeError) as error:
            if all(isinstance(x, Tensor) for x in captures) and not numbers:
                raise
            raise TypeError(
                f"{OP}: {kind}_mod reads a number of Python that torch.compile has not fixed, and "
                "does with it what has no text where it is a 0-dim tensor; got "
                f"{type(error).__name__}: {error}: compute with the number before the mod is made, "
                "or let the mod read a 0-dim tensor, whose value may change"
            ) from error
        made = traced.captures[len(stand_ins) :]
        if made:
            raise TypeError(
                f"{OP}: {kind}_mod writes a table down, of shape {tuple(made[0].shape)}, "
                "which torch.compile does not carry into the graph: make that tensor outside of "
                "the function"
            )
        kept = known[key] = Kept(traced, (*range(len(stand_ins)), *made))
    arguments = tuple(tensors[n] if n in numbers else x for n, x in enumerate(captures))

    def function(*indices: Any) -> Tensor:
        return graph(*indices, *arguments)

    used = tuple(tensors[x] if type(x) is int else x for x in kept.sources)
    return Use(kind, function, kept, _without_gradient(kind, used))  # type: ignore[arg-type]


def _tracing() -> AbstractContextManager[Any]:
    """PyTorch's tracer keeps what it traces in globals of the process, as torch.compile does, which
    calls `of_graph` while it holds this lock: with a lock of our own, two threads could wait for
    each other."""
    from torch._dynamo.convert_frame import compile_lock  # takes about as long as torch

    return compile_lock


def _written(traced: Traced) -> list[bool]:
    """Of each captured tensor, whether the mod makes it of Python's numbers."""
    placeholders = [n for n in traced.joint.graph.nodes if n.op == "placeholder"]
    return [is_written(n) for n in placeholders[traced.inputs :]]


def _trace(mod: Callable[..., Any], kind: str, query: Tensor) -> Traced:
    try:
        with _tracing(), apart(), no_autocast(query):
            return trace(mod, kind, query.device, query.dtype)
    except NotLowered as error:  # the reference could not run it either
        raise TypeError(
            f"{OP}: {kind}_mod: {error}: fill tensors before the call, and detach() the "
            "score where an operation has no derivative"
        ) from error


def _lightened(traced: Traced) -> Traced:
    """The same trace, without the captured tensors themselves: it may outlive them by far."""
    held = {id(x) for x in traced.captures}
    for module in (traced.graph, traced.joint):
        for names in (vars(module), module._buffers, module._parameters):
            for name in [n for n, x in names.items() if isinstance(x, Tensor) and id(x) in held]:
                del names[name]
    with apart():
        empty = (torch.empty(x.shape, dtype=x.dtype, device="meta") for x in traced.captures)
        return traced._replace(captures=tuple(empty))


class _Rewritten(NamedTuple):
    graph: GraphModule | None
    """None where the graph stays as it is."""
    numbers: frozenset[int]
    """Which of the captures are Python's numbers."""


_rewritten: WeakKeyDictionary[GraphModule, _Rewritten] = WeakKeyDictionary()


def _numbers_as_tensors(graph: GraphModule, inputs: int) -> tuple[GraphModule, frozenset[int]]:
    """The graph with tensors in the place of Python floats that torch.compile has not fixed, and
    which captures those are. Such a float comes as a tensor of the CPU, and the graph reads its
    value, which is not there when kernels are made."""
    found = _rewritten.get(graph)
    if found is None:
        own, numbers = Graph(), set()
        own.output(own.graph_copy(graph.graph, {}))
        captured = [n for n in own.nodes if n.op == "placeholder"][inputs:]
        for place, node in enumerate(captured):
            reads = list(node.users)
            if reads and all(n.op == "call_method" and n.target == "item" for n in reads):
                numbers.add(place)
                for read in reads:
                    read.replace_all_uses_with(node)
                    own.erase_node(read)
        made = GraphModule(graph, own) if numbers else None
        found = _rewritten[graph] = _Rewritten(made, frozenset(numbers))
    return found.graph or graph, found.numbers


def _as_tensor(x: Any, query: Tensor, is_number: bool) -> Tensor:
    """What a mod reads: a tensor as it is, and a number as one of the query's device."""
    real = torch.float64 if query.dtype == torch.float64 else torch.float32
    if isinstance(x, Tensor):
        return x.to(query.device, real) if is_number else x
    is_real = isinstance(x, (float, torch.SymFloat))
    return torch.full((), x, dtype=real if is_real else torch.int64, device=query.device)


def _known_size(n: Any) -> int:
    """The example's size, where the compiler leaves it open: texts do not depend on it."""
    return n if type(n) is int else n.node.hint
