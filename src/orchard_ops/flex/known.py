"""Mods that the fixed kernels of `flash_attn` compute: windows, documents, prefixes, ALiBi, softcap
and additive tables.

A mod is recognised by its graph, never by probing it, so that the two are equal for all numbers.
Conditions on q_idx and kv_idx are read with the symbols that read the masks of transformers.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..integrations.mask_symbols import _ALWAYS, _NEVER, _UNKNOWN, Symbol
from ..key_ranges import KeyRanges
from .metal import lower, lower_graph
from .mod import NotLowered
from .trace import SCORE, Traced

_aten = torch.ops.aten
_FAR = 1 << 30
_PASSED = (_aten.clone, _aten.alias)
"""What changes nothing. detach() changes gradients."""
_AXES = ("b", "h", "q", "kv")


@dataclass
class Known:
    """A call of `flash_attn`, but for what its tensors are."""

    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    slopes: GraphModule | None = None
    """(b, h, *captures of the score) -> the slope."""
    table: tuple[int, tuple[int, ...]] | None = None
    """The number of the captured table that is added, and the axes that its dimensions are."""
    ranges: tuple[Any, ...] | None = None
    """("documents", capture), ("keys", length, shift) or ("prefix", length, shift), where a length
    is a number or ("of", capture), plus the shift."""
    causal_only: bool = False
    """Whether it is the same only where no query sees a later key."""

    def arguments(
        self,
        score_captures: Sequence[Tensor],
        mask_captures: Sequence[Tensor],
        query: Tensor,
        key: Tensor,
    ) -> dict[str, Any] | None:
        """Keyword arguments of `flash_attn` for these tensors, which may be others than those that
        were traced; None where their sizes or numbers do not allow it.

        Documents have to be in ascending order. That is looked up once for a tensor, by waiting for
        the device.
        """
        sizes = (*query.shape[:3], key.shape[2])
        found: dict[str, Any] = {
            "window_left": self.window_left,
            "window_right": self.window_right,
            "softcap": self.softcap,
        }
        if self.slopes is not None:
            slopes = _slopes(self.slopes, score_captures, sizes, query.device)
            if slopes.requires_grad and torch.is_grad_enabled():
                return None
            found["alibi_slopes"] = slopes
        if self.table is not None:
            number, axes = self.table
            mask = _spread(score_captures[number], axes, sizes)
            if mask is None or mask.device != query.device:
                return None
            found["attn_mask"] = mask
        if self.ranges is not None:
            ranges = _key_ranges(self.ranges, (*score_captures, *mask_captures), sizes, query)
            if ranges is None:
                return None
            found["key_ranges"] = ranges
        return found


def recognise(score: Traced | None, mask: Traced | None) -> Known | None:
    """What `flash_attn` has to be told to compute the same, or None where it cannot.

    Where there is a BlockMask, its lists decide what is seen: then `mask` counts only if they are
    those that `create_block_mask` makes of it, see `lists_follow`.
    """
    known = Known()
    seen = _ALWAYS
    if score is not None:
        read = _read_score(score, known)
        if read is None or not _has_own_derivative(score):
            return None
        seen = read
    if mask is not None:
        offset = 0 if score is None else len(score.captures)
        reader = _Conditions(mask, offset)
        seen = seen & reader.condition(_output(mask))
    if not _put_mask(seen, known) or (known.causal_only and known.window_right != 0):
        return None
    return known


def _output(traced: Traced) -> Node:
    result = traced.graph.graph.output_node().args[0]
    assert isinstance(result, Node)
    return result


def _has_own_derivative(score: Traced) -> bool:
    """Whether the derivative is that of the graph: a mod may detach, or have its own backward."""
    try:
        anew = lower_graph(score.graph, score.captures, SCORE)
        return anew.text == lower(score).text
    except NotLowered:
        return False


# ---- scores -------------------------------------------------------------------------------------


def _read_score(score: Traced, known: Known) -> Symbol | None:
    """Fills in what a score_mod is, and gives the condition where it is not -inf."""
    conditions = _Conditions(score, 0)
    node, seen = _passed(_output(score)), _ALWAYS
    while _packet(node) is _aten.where:
        condition, a, b = node.args
        if _constant(b) == -torch.inf:
            seen, node = seen & conditions.condition(condition), _passed(a)
        elif _constant(a) == -torch.inf:
            seen, node = seen & conditions.condition(condition, negated=True), _passed(b)
        else:
            return None
    terms, node = _terms(node, conditions.arguments[0])
    for sign, term in terms:
        if not (
            _read_alibi(sign, term, conditions, known) or _read_table(sign, term, score, known)
        ):
            return None
    if node is not conditions.arguments[0]:
        known.softcap = _cap(node, conditions.arguments[0])
        if known.softcap == 0.0:
            return None
    return seen


def _terms(node: Any, score: Node) -> tuple[list[tuple[int, Node]], Any]:
    """What is added to the score, outermost first, and the rest."""
    dependent = {score}
    for other in score.graph.nodes:
        if any(x in dependent for x in other.all_input_nodes):
            dependent.add(other)
    terms = []
    while _packet(node) in (_aten.add, _aten.sub) and node.kwargs.get("alpha", 1) == 1:
        a, b = node.args[:2]
        if not (isinstance(a, Node) and isinstance(b, Node)) or (a in dependent) == (
            b in dependent
        ):
            break
        sign = 1 if _packet(node) is _aten.add else -1
        if b in dependent:
            if sign == -1:
                break
            a, b = b, a
        terms.append((sign, b))
        node = _passed(a)
    return terms, node


def _cap(node: Any, score: Node) -> float:
    """c of c * tanh(s / c), else 0."""
    if _packet(node) is not _aten.mul:
        return 0.0
    for inner, c in (node.args[:2], node.args[1::-1]):
        inner, c = _passed(inner), _constant(c)
        if (
            _packet(inner) is not _aten.tanh
            or not isinstance(c, int | float)
            or not 1e-30 < c < 1e30
        ):
            continue
        quotient = _passed(inner.args[0])
        is_it = _packet(quotient) is _aten.div and len(quotient.args) == 2
        if is_it and _passed(quotient.args[0]) is score and _constant(quotient.args[1]) == c:
            return float(c)
    return 0.0


def _read_alibi(sign: int, term: Node, conditions: _Conditions, known: Known) -> bool:
    """Whether a term is -slope * |q_idx - kv_idx|, or that where q_idx >= kv_idx."""
    if _packet(term) is not _aten.mul or known.slopes is not None:
        return False
    for slope, distance in (term.args[:2], term.args[1::-1]):
        found = conditions.value(distance)
        if type(found) is not Symbol or not isinstance(slope, Node):
            continue
        is_distance = found.kind == "distance" and sign == -1
        is_behind = found.kind == "place" and found.parts == (sign * -1, sign, 0, None)
        if not (is_distance or is_behind):
            continue
        graph = _of_heads(slope, conditions.arguments)
        if graph is None or slope.meta["val"].dtype != torch.float32:
            continue
        known.slopes = graph
        known.causal_only = is_behind
        return True
    return False


def _of_heads(node: Node, arguments: list[Node]) -> GraphModule | None:
    """(b, h, *captures) -> the node's value, if it is a function of these alone."""
    needed: set[Node] = set()
    pending = [node]
    while pending:
        x = pending.pop()
        if x not in needed:
            needed.add(x)
            pending += x.all_input_nodes
    score, b, h, q, kv, *captures = arguments
    if needed & {score, q, kv}:
        return None
    graph = Graph()
    copies = {x: graph.placeholder(f"x{n}") for n, x in enumerate((b, h, *captures))}
    for x in node.graph.nodes:
        if x in needed and x not in copies:
            copies[x] = graph.node_copy(x, copies.__getitem__)
    graph.output(copies[node])
    owner = node.graph.owning_module
    return GraphModule(owner if owner is not None else torch.nn.Module(), graph)


def _read_table(sign: int, term: Node, score: Traced, known: Known) -> bool:
    """Whether a term is captured[some of b, h, q_idx, kv_idx]."""
    term = _passed(term)
    if _packet(term) is _aten._to_copy and term.meta["val"].dtype == torch.float32:
        term = _passed(term.args[0])
    if _packet(term) is not _aten.index or sign != 1 or known.table is not None:
        return False
    arguments = _arguments(score)
    source, places = _passed(term.args[0]), [_passed(x) for x in term.args[1]]  # type: ignore
    if source not in arguments[5:] or any(x not in arguments[1:5] for x in places):
        return False
    axes = tuple(arguments.index(x) - 1 for x in places)
    is_whole = len(axes) == source.meta["val"].dim() and list(axes) == sorted(set(axes))
    if not is_whole or not source.meta["val"].dtype.is_floating_point:
        return False
    known.table = (arguments.index(source) - 5, axes)
    return True


# ---- conditions ---------------------------------------------------------------------------------

_COMPARISONS: dict[Any, tuple[str, str]] = {
    _aten.lt: ("lt", "ge"),
    _aten.le: ("le", "gt"),
    _aten.gt: ("gt", "le"),
    _aten.ge: ("ge", "lt"),
}
_SWAPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
_AND = (_aten.bitwise_and, _aten.logical_and, _aten.__and__)
_OR = (_aten.bitwise_or, _aten.logical_or, _aten.__or__)
_NOT = (_aten.bitwise_not, _aten.logical_not)


class _Conditions:
    """Reads numbers and conditions of a graph as symbols. What it does not know is unknown."""

    def __init__(self, traced: Traced, first_capture: int) -> None:
        self.traced = traced
        self.arguments = _arguments(traced)
        b, _, q, kv, *captures = self.arguments[traced.inputs - 4 :]
        self._batch, self._captures = b, captures
        self._numbers = {x: ("of", first_capture + n) for n, x in enumerate(captures)}
        self._places = {
            q: Symbol("place", 1, 0, 0, None),
            kv: Symbol("place", 0, 1, 0, None),
        }

    def value(self, node: Any) -> Any:
        """A number, a symbol of one, or unknown."""
        if not isinstance(node, Node):
            return node
        node = _passed(node)
        if node in self._places:
            return self._places[node]
        packet = _packet(node)
        if packet is _aten._to_copy and node.meta["val"].dtype in (torch.int32, torch.int64):
            return self.value(node.args[0])
        if packet is _aten.abs:
            return _within(abs(self._symbol(node.args[0])))
        if packet in (_aten.add, _aten.sub) and node.kwargs.get("alpha", 1) == 1:
            a, b = map(self.value, node.args[:2])
            return _within(a + b if packet is _aten.add else a - b)
        if packet is _aten.neg:
            return _within(-self._symbol(node.args[0]))
        if packet is _aten.index:
            return self._read(node)
        found = _constant(node)
        return _UNKNOWN if found is None else found

    def _symbol(self, node: Any) -> Symbol:
        found = self.value(node)
        return found if type(found) is Symbol else _UNKNOWN

    def _read(self, node: Node) -> Symbol:
        source, places = _passed(node.args[0]), [_passed(x) for x in node.args[1]]  # type: ignore
        if source not in self._numbers or source.meta["val"].dtype not in _INTEGERS:
            return _UNKNOWN
        table = self._numbers[source]
        if source.meta["val"].dim() != len(places):
            return _UNKNOWN
        if places == [self._batch]:
            return Symbol("entry", table)
        place = self.value(places[-1])
        if len(places) > 2 or (len(places) == 2 and places[0] is not self._batch):
            return _UNKNOWN
        if type(place) is not Symbol or place.parts not in ((1, 0, 0, None), (0, 1, 0, None)):
            return _UNKNOWN
        return Symbol("number", table, *place.parts[:2])

    def condition(self, node: Any, negated: bool = False) -> Symbol:
        node = _passed(node)
        packet = _packet(node)
        if packet in _NOT:
            return self.condition(node.args[0], not negated)
        if packet in _AND + _OR:
            a, b = (self.condition(x, negated) for x in node.args[:2])
            return a & b if (packet in _AND) != negated else a | b
        if packet in _COMPARISONS:
            return self._compared(_COMPARISONS[packet][negated], *map(self.value, node.args[:2]))
        if packet is _aten.eq and not negated:
            a, b = map(self.value, node.args[:2])
            return a == b if type(a) is Symbol else _UNKNOWN
        found = _constant(node)
        if found is None:
            return _UNKNOWN
        return _ALWAYS if bool(found) != negated else _NEVER

    def _compared(self, name: str, a: Any, b: Any) -> Symbol:
        if type(a) is not Symbol or (a.kind == "entry" and type(b) is Symbol):
            if type(b) is not Symbol:
                return _UNKNOWN
            a, b, name = b, a, _SWAPPED[name]
        if type(b) is float:
            return _UNKNOWN
        is_key = a.kind == "place" and a.parts[:2] == (0, 1) and a.parts[3] is None
        if is_key and name in ("lt", "le"):
            length = b.parts[0] if type(b) is Symbol and b.kind == "entry" else b
            if type(length) is not Symbol:  # keys before a length
                return Symbol("keys", length, (name == "le") - a.parts[2])
        return getattr(operator, name)(a, b)


_INTEGERS = (torch.int16, torch.int32, torch.int64, torch.uint8, torch.int8)


def _within(x: Any) -> Any:
    """x, where int32 holds it for every length."""
    if type(x) is not Symbol or x.kind != "place":
        return x
    a, b, c, _ = x.parts
    return x if abs(a) + abs(b) <= 2 and abs(c) < _FAR else _UNKNOWN


def _put_mask(seen: Symbol, known: Known) -> bool:
    """Fills in what a condition is."""
    if seen is _ALWAYS:
        return True
    low: int | None = None
    high: int | None = None
    for part in seen.parts if seen.kind == "and" else (seen,):
        if part.kind == "band" and part.parts[2] is None:
            more, less, _ = part.parts
            low = more if low is None else low if more is None else max(low, more)
            high = less if high is None else high if less is None else min(high, less)
            continue
        if known.ranges is not None:
            return False
        if part.kind == "same":
            known.ranges = ("documents", part.parts[0])
        elif part.kind == "keys":
            known.ranges = ("keys", *part.parts)
        elif part.kind == "or" and [x.kind for x in part.parts] in (_PREFIX, _PREFIX[::-1]):
            keys, band = sorted(part.parts, key=lambda x: x.kind != "keys")
            if band.parts != (None, 0, None) or seen.kind == "and":
                return False  # another window would cut the prefix
            known.ranges = ("prefix", *keys.parts)
        else:
            return False
    for bound in (low, high):
        if bound is not None and abs(bound) >= _FAR:
            return False
    if (low is not None and low > 0) or (high is not None and high < 0):
        return False
    known.window_left = -1 if low is None else -low
    known.window_right = -1 if high is None else high
    return True


_PREFIX = ["keys", "band"]


# ---- graphs -------------------------------------------------------------------------------------


def _arguments(traced: Traced) -> list[Node]:
    return [n for n in traced.graph.graph.nodes if n.op == "placeholder"]


def _packet(node: Any) -> Any:
    return getattr(getattr(node, "target", None), "overloadpacket", None)


def _passed(node: Any) -> Any:
    while _packet(node) in _PASSED:
        node = node.args[0]
    return node


def _constant(node: Any) -> Any:
    """The number that a node is, or None."""
    if not isinstance(node, Node):
        return node
    node = _passed(node)
    packet = _packet(node)
    if packet is _aten.scalar_tensor:
        return node.args[0]
    if packet in (_aten.full, _aten.full_like) and not isinstance(node.args[1], Node):
        return node.args[1]
    if packet in (_aten.new_ones, _aten.ones, _aten.ones_like):
        return 1
    if packet in (_aten.new_zeros, _aten.zeros, _aten.zeros_like):
        return 0
    return None


# ---- the tensors of a call ----------------------------------------------------------------------


def _slopes(
    graph: GraphModule, captures: Sequence[Tensor], sizes: Sequence[int], device: torch.device
) -> Tensor:
    """(Hq) or (B, Hq)."""
    b, h = (torch.arange(n, dtype=torch.int32, device=device) for n in sizes[:2])
    others = [None] * len(captures)
    of_head = torch.vmap(graph, in_dims=(None, 0, *others))
    uses_batch = bool(next(iter(graph.graph.nodes)).users)
    if not uses_batch:
        return of_head(b[:1].squeeze(0), h, *captures)
    return torch.vmap(of_head, in_dims=(0, None, *others))(b, h, *captures)


def _spread(table: Tensor, axes: Sequence[int], sizes: Sequence[int]) -> Tensor | None:
    """A table as (1 or B, 1 or Hq, 1 or L, 1 or S), without a copy."""
    for dim, axis in enumerate(axes):
        if table.shape[dim] < sizes[axis]:
            return None
        table = table.narrow(dim, 0, sizes[axis])
    for axis in range(4):
        if axis not in axes:
            table = table.unsqueeze(axis)
    return table


def _key_ranges(
    ranges: tuple[Any, ...], captures: Sequence[Tensor], sizes: Sequence[int], query: Tensor
) -> KeyRanges | None:
    kind, length, *shift = ranges
    batch, _, q_len, kv_len = sizes
    if kind == "documents":
        return _documents(captures[length[1]], batch, q_len, kv_len)
    if isinstance(length, tuple):
        table = captures[length[1]]
        if table.shape[0] < batch or table.device != query.device:
            return None
        lengths = table[:batch].to(torch.int64) + shift[0]
    else:
        number = min(max(length + shift[0], 0), kv_len)
        lengths = torch.full((1,), number, dtype=torch.int64, device=query.device)
    lengths = lengths.clamp(0, kv_len)
    make: Callable[..., KeyRanges] = (
        KeyRanges.prefix_lm if kind == "prefix" else KeyRanges.from_lengths
    )
    return make(lengths.to(torch.int32), q_len)


def _documents(ids: Tensor, batch: int, q_len: int, kv_len: int) -> KeyRanges | None:
    if ids.shape[-1] < max(q_len, kv_len) or not _ascends(ids):
        return None
    if ids.dim() == 2 and ids.shape[0] < batch:
        return None
    ids = ids[:batch] if ids.dim() == 2 else ids.unsqueeze(0)
    of_keys, of_queries = ids[:, :kv_len].contiguous(), ids[:, :q_len].contiguous()
    begin = torch.searchsorted(of_keys, of_queries, out_int32=True)
    end = torch.searchsorted(of_keys, of_queries, right=True, out_int32=True)
    position = torch.arange(q_len, dtype=torch.int32, device=ids.device).expand_as(begin)
    columns = (begin, end, position, torch.zeros_like(begin))
    return KeyRanges(torch.stack(columns, -1).unsqueeze(1), 0, has_prefix=False)


_ascending: weakref.WeakKeyDictionary[Any, tuple[int, bool]] = weakref.WeakKeyDictionary()


def _ascends(ids: Tensor) -> bool:
    """Whether each row is in ascending order, as far as that may be asked."""
    if torch.compiler.is_compiling() or type(ids) not in (Tensor, torch.nn.Parameter):
        return False
    storage, version = ids.untyped_storage(), ids._version
    known = _ascending.get(storage)
    key = hash((version, ids.storage_offset(), ids.shape, ids.stride()))
    if known is None or known[0] != key:
        known = (key, bool((ids[..., 1:] >= ids[..., :-1]).all()))
        _ascending[storage] = known
    return known[1]


# ---- the lists of a BlockMask -------------------------------------------------------------------

_followed: weakref.WeakKeyDictionary[Any, tuple[Any, bool]] = weakref.WeakKeyDictionary()


def lists_follow(block_mask: Any, mask: Traced, captures: Sequence[Tensor], query: Tensor) -> bool:
    """Whether a BlockMask sees what its mask_mod says, for each of the query's batches and heads.

    Its lists are made anew and compared, once for each object, the present numbers of the lists and
    of what the mask_mod captured: that waits for the device. A BlockMask of other lists than
    `create_block_mask` makes means what they say.
    """
    b, h = _arguments(mask)[:2]
    for node, lists, present in zip((b, h), block_mask.kv_num_blocks.shape, query.shape):
        if node.users and lists != present:
            return False
    key = (
        tuple((id(x), x._version) for x in (*_lists(block_mask), *captures)),
        tuple(block_mask.seq_lengths),
        tuple(block_mask.BLOCK_SIZE),
    )
    known = _followed.get(block_mask)
    if known is None or known[0] != key:
        known = (key, _follow(block_mask))
        _followed[block_mask] = known
    return known[1]


def _lists(block_mask: Any) -> Iterator[Tensor]:
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        found = getattr(block_mask, name)
        if found is not None:
            yield found


def _follow(block_mask: Any) -> bool:
    from torch.nn.attention.flex_attention import create_block_mask

    batch, heads = block_mask.kv_num_blocks.shape[:2]
    q_len, kv_len = block_mask.seq_lengths
    anew = create_block_mask(
        block_mask.mask_mod,
        *(batch, heads, q_len, kv_len),
        device=block_mask.kv_num_blocks.device,
        BLOCK_SIZE=tuple(block_mask.BLOCK_SIZE),
    )
    for own, other in zip(_listed(block_mask), _listed(anew)):
        if own.shape != other.shape or not torch.equal(own, other):
            return False
    return True


def _listed(block_mask: Any) -> tuple[Tensor, Tensor]:
    """Which blocks are listed, and which as full: (B, H, blocks of queries, blocks of keys)."""
    partial = _dense(block_mask.kv_num_blocks, block_mask.kv_indices)
    if block_mask.full_kv_num_blocks is None:
        return partial, torch.zeros_like(partial)
    full = _dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    return partial | full, full


def _dense(counts: Tensor, indices: Tensor) -> Tensor:
    blocks = indices.shape[-1]
    is_listed = torch.arange(blocks, device=indices.device) < counts.unsqueeze(-1)
    places = torch.where(is_listed, indices.long(), blocks)
    dense = torch.zeros((*indices.shape[:-1], blocks + 1), dtype=torch.bool, device=indices.device)
    return dense.scatter_(-1, places, True)[..., :blocks]
