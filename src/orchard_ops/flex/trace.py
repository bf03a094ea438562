"""A user's score_mod or mask_mod as a graph of ATen operations on scalars.

The function is called once with 0-dim tensors that have no numbers, as PyTorch's own FlexAttention
calls it. What it reads from elsewhere stays in the graph as the tensor itself, which is not copied.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import linecache
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx.traceback as node_meta
from torch import Tensor
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from .arguments import OP
from .mod import Function, NotLowered
from .operations import POINTWISE
from .reductions import LAZY

_aten = torch.ops.aten
SCORE, MASK = "score", "mask"


class Traced(NamedTuple):
    """A function's graph, and what it reads from elsewhere."""

    kind: str
    """SCORE or MASK."""
    graph: GraphModule
    """([score,] b, h, q_idx, kv_idx, *captures) -> result, as torch.compile's own graphs of such
    functions."""
    joint: GraphModule
    """The same arguments -> (result, its derivative by the score); of a mask_mod (result,)."""
    captures: tuple[Tensor, ...]
    """The tensors themselves. Behind those that were given come those found in the function."""

    @property
    def inputs(self) -> int:
        """The arguments before the captures."""
        return 5 if self.kind == SCORE else 4


def trace(
    mod: Function,
    kind: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    captures: Sequence[Tensor] = (),
) -> Traced:
    """Calls mod([score,] b, h, q_idx, kv_idx, *captures) once, and gives what it computes.

    Args:
        kind: SCORE or MASK.
        device, dtype: of the query. Scores are float32, of a float64 query float64.
        captures: for a function that gets what it reads as arguments.

    Raises:
        TypeError: the function asks for the value of a tensor, or gives something else than a
            score or a bool.
        NotLowered: it changes a tensor that it captured.
    """
    assert kind in (SCORE, MASK)
    name = f"{kind}_mod"

    def joint(score: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        score = score.detach().requires_grad_()
        with torch.enable_grad(), _Tracing(device):
            result = _result(kind, mod(score.clone(), *rest), score)
            slope = None
            if result.requires_grad:
                (slope,) = torch.autograd.grad(
                    result, score, torch.ones_like(result), allow_unused=True
                )
        return result.detach(), torch.zeros_like(score) if slope is None else slope

    def seen(*arguments: Any) -> tuple[Tensor]:
        with torch.no_grad(), _Tracing(device):
            return (_result(kind, mod(*arguments), arguments[0]),)

    score_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.inference_mode(False), _fake_mode(captures):
        indices = [torch.zeros((), dtype=torch.int32, device=device) for _ in range(4)]
        score = [torch.zeros((), dtype=score_dtype, device=device)] if kind == SCORE else []
    arguments = (*score, *indices, *captures)
    try:
        with torch.inference_mode(False), node_meta.preserve_node_meta():
            graph = _make_graph(joint if kind == SCORE else seen, arguments)
    except NotLowered:
        raise
    except Exception as error:
        if "modified by an inplace operation" in str(error):
            return trace(_functional(mod, arguments, device), kind, device, dtype, captures)
        if "derivative for" in str(error):
            raise NotLowered(f"{error}{_of(error)}") from error
        if _asks_for_value(error):
            raise TypeError(
                f"{OP}: {name} must not read the value of a tensor in Python (if, while, "
                f"int(), .item()){_of(error)}: there is none before the kernel runs; use "
                "torch.where, & and |, and a captured tensor itself in the place of its value"
            ) from error
        raise
    if any(_changes(n) for n in graph.graph.nodes):
        _refuse_changed_captures(kind, graph)
        graph = _make_graph(torch.func.functionalize(graph), arguments)
    if kind == SCORE:
        _drop_own_detach(graph)
    with torch.inference_mode(False):  # a later call may be trained
        found = _lift_captures(graph, torch.device(device))
    return Traced(kind, _forward(graph), graph, (*captures, *found))


def _functional(mod: Function, arguments: Sequence[Any], device: torch.device | str) -> Function:
    """The same function without changes in place, which autograd may not be able to undo."""

    def forward(score: Tensor, *rest: Any) -> Any:
        with torch.no_grad(), _Tracing(device):
            return mod(score.clone(), *rest)

    return _make_graph(torch.func.functionalize(forward), arguments)


def _result(kind: str, result: Any, like: Tensor) -> Tensor:
    name = f"{kind}_mod"
    if kind == MASK and isinstance(result, bool):
        return torch.full((), result, dtype=torch.bool, device=like.device)
    if kind == SCORE and isinstance(result, int | float):
        return torch.full((), float(result), device=like.device)
    wanted = "a score" if kind == SCORE else "a bool"
    if not isinstance(result, Tensor):
        raise TypeError(f"{OP}: {name} must return {wanted}; got {type(result).__name__}")
    if result.dim() != 0:
        raise TypeError(
            f"{OP}: {name} must return {wanted}, a 0-dim tensor; got shape "
            f"{tuple(result.shape)}: index captured tensors with the indices that it is given"
        )
    is_right = not result.is_complex() if kind == SCORE else result.dtype == torch.bool
    if not is_right:
        raise TypeError(f"{OP}: {name} must return {wanted}; got {result.dtype}")
    return result


def _drop_own_detach(graph: GraphModule) -> None:
    """Takes the detach() out that `trace` puts round a function. Those in user code stay."""
    score = next(iter(graph.graph.nodes))
    results = graph.graph.output_node().args[0]
    assert isinstance(results, tuple | list) and isinstance(results[0], Node)
    for node in (*score.users, results[0]):
        if node.target in (_aten.detach.default, _aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def _lift_captures(graph: GraphModule, device: torch.device) -> list[Tensor]:
    """Makes arguments of the tensors in a graph. Numbers written as torch.tensor(...) stay, and
    tables written so go to the device, as they would when the code runs."""
    nodes = list(graph.graph.nodes)
    last = [n for n in nodes if n.op == "placeholder"][-1]
    made: dict[int, Node] = {}
    found: list[Tensor] = []
    for node in nodes:
        if node.op != "get_attr" or is_literal(node):
            continue
        tensor = getattr(graph, node.target)
        if id(tensor) not in made:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"capture_{len(found)}")
            last.meta = dict(node.meta)
            made[id(tensor)] = last
            found.append(tensor.to(device) if is_written(node) else tensor)
        node.replace_all_uses_with(made[id(tensor)])
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return found


def is_literal(node: Node) -> bool:
    """Whether a tensor in a graph is a number that the user's code wrote as one."""
    return is_written(node) and bool(node.meta["val"].numel() == 1)


def is_written(node: Node) -> bool:
    """Whether a tensor in a graph is one that the user's code makes of Python's numbers."""
    written = (_aten.lift_fresh_copy.default, _aten.lift_fresh.default)
    return bool(node.users) and all(n.target in written for n in node.users)


def _forward(joint: GraphModule) -> GraphModule:
    """The graph of the result alone."""
    graph = Graph()
    results: Any = graph.graph_copy(joint.graph, {})
    graph.output(results[0])
    graph.eliminate_dead_code()
    return GraphModule(joint, graph)


def _make_graph(function: Callable[..., Any], arguments: Sequence[Any]) -> GraphModule:
    return make_fx(
        function,
        decomposition_table=_decompositions(),
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )(*arguments)


def _split_with_sizes(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    """By slices, which have a text: PyTorch's own way has strides in it."""
    ends = list(itertools.accumulate(sizes, initial=0))
    return [_aten.slice(x, dim, a, b) for a, b in itertools.pairwise(ends)]


def _split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    length = x.shape[dim] if x.dim() else 1
    count = max(-(-length // size), 1) if size else 1
    sizes = [min(size, length - n * size) for n in range(count)]
    return _split_with_sizes(x, sizes, dim)


_OWN = {
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split_with_sizes,
    torch.ops.prims.copy_to.default: Tensor.copy_,  # which `functionalize` knows
}


@functools.cache
def _decompositions() -> dict[Any, Any]:
    """PyTorch's ways to take an operation apart, of all that have no text of their own."""
    known = POINTWISE.keys() | LAZY.keys()
    every = {**decomposition_table, **core_aten_decompositions(), **_OWN}
    return {
        operation: function
        for operation, function in every.items()
        if getattr(operation, "overloadpacket", None) not in known
    }


def _fake_mode(captures: Sequence[Tensor]) -> FakeTensorMode:
    for x in captures:
        mode = getattr(x, "fake_mode", None)
        if mode is not None:
            return mode
    return FakeTensorMode(allow_non_fake_inputs=True)


# ---- what user code does with the indices -------------------------------------------------------


class Indexing(TorchFunctionMode):
    """Indexing with 0-dim tensors, which PyTorch would ask for their numbers, as `aten.index`.

    On mps, which has no float64, what a function asks for in float64 is float32. While a function
    is traced it is also noted in each node which line of the user's code made it.
    """

    _traces = False

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self._narrows = torch.device(device).type == "mps"

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if self._narrows:
            func = Tensor.float if func is Tensor.double else func
            args, kwargs = (torch.utils._pytree.tree_map(_narrowed, x) for x in (args, kwargs))
        node_meta.current_meta["stack_trace"] = _line()
        if func is Tensor.__getitem__ and not kwargs:
            table, items = args
            if not self._traces:
                table = _beside(table, items)
            return _get(table, items if isinstance(items, tuple) else (items,))
        return func(*args, **(kwargs or {}))


_VALUES = (
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__bool__),
    *(Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__complex__, Tensor.equal),
    *(Tensor.allclose, Tensor.is_nonzero, torch.equal, torch.allclose, torch.is_nonzero),
)


class _ValueAsked(Exception):
    """The function asks for the value of a tensor."""


class _Tracing(Indexing):
    """A captured tensor has a value, which a later call may find changed: it is not told."""

    _traces = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in _VALUES:
            raise _ValueAsked
        return super().__torch_function__(func, types, args, kwargs)


def _narrowed(x: Any) -> Any:
    if x is torch.float64:
        return torch.float32
    if isinstance(x, Tensor) and x.dtype == torch.float64:
        return x.to(torch.float32)
    return x


def _beside(table: Tensor, items: Any) -> Tensor:
    """A table that a function writes down, where its index is, as a trace has it."""
    given = items if isinstance(items, tuple) else (items,)
    index = next((x for x in given if isinstance(x, Tensor)), table)
    return table.to(index.device) if table.device.type == "cpu" else table


def _get(table: Tensor, items: tuple) -> Tensor:
    if not any(isinstance(x, Tensor) and x.dim() == 0 and _counts(x) for x in items):
        return table[items]
    for x in items:
        if isinstance(x, Tensor) and x.dtype in (torch.uint8, torch.int8, torch.int16):
            raise TypeError(
                f"{OP}: an index is {x.dtype} ({_line()}), and PyTorch takes int32 and "
                "int64 ones alone, uint8 for a mask: convert it, as in table[index.long()]"
            )
    used = sum(1 for x in items if x is not None and x is not Ellipsis)
    rest = (slice(None),) * (table.dim() - used)
    at = next((n for n, x in enumerate(items) if x is Ellipsis), len(items))
    items = (*items[:at], *rest, *items[at + 1 :])
    whole = slice(None)
    view = table[tuple(whole if isinstance(x, Tensor) else x for x in items)]
    kept = [x for x in items if isinstance(x, Tensor | slice) or x is None]
    return _aten.index(view, [x if isinstance(x, Tensor) else None for x in kept])


def _counts(x: Tensor) -> bool:
    return not x.dtype.is_floating_point and not x.is_complex() and x.dtype != torch.bool


TORCH = inspect.getfile(torch).rpartition("/")[0] + "/"


def _line() -> str:
    """The line of code outside of PyTorch and of this file that is being run."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith(TORCH):
            text = linecache.getline(name, frame.f_lineno).strip()
            return f"{name}:{frame.f_lineno}: {text}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def place(node: Node) -> str:
    """Where in the user's code an operation comes from, in brackets; empty where it is not known.

    Of the code in a graph of torch.compile, PyTorch's own note is read.
    """
    lines = [x.strip() for x in (node.meta.get("stack_trace") or "").splitlines() if x.strip()]
    return f" ({'; '.join(lines[-2:])})" if lines else ""


def _of(error: BaseException) -> str:
    found, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name != __file__ and not name.startswith(TORCH):
            text = linecache.getline(name, trace.tb_lineno).strip()
            found = f" ({name}:{trace.tb_lineno}: {text})"
        trace = trace.tb_next
    return found


def _asks_for_value(error: BaseException) -> bool:
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    name = type(error).__name__
    if (
        isinstance(error, (_ValueAsked, GuardOnDataDependentSymNode))
        or name == "DataDependentOutputException"
    ):
        return True
    return isinstance(error, RuntimeError) and "_local_scalar_dense" in str(error)


# ---- code that works in place -------------------------------------------------------------------


def _changes(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _refuse_changed_captures(kind: str, graph: GraphModule) -> None:
    """A captured tensor stays as it is: the kernel would write to it from every thread."""
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    captured = {*placeholders[1 if kind == SCORE else 0 :]}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            captured.add(node)
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args):
            alias = argument.alias_info
            if alias is None or not isinstance(value, Node) or value not in captured:
                continue
            if alias.is_write:
                raise NotLowered(f"{node.target} changes a tensor it did not make{place(node)}")
            captured.add(node)
