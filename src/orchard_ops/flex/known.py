"""Mods that the fixed kernels of `flash_attn` compute: windows, documents, prefixes, ALiBi, softcap
and additive tables.

A mod is recognised by its graph, never by probing it, so that the two are equal for all numbers.
Conditions on q_idx and kv_idx are read with the symbols that read the masks of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..key_ranges import KeyRanges
from ..mask_symbols import _ALWAYS, Symbol
from .apart import apart
from .conditions import FAR, Conditions, arguments_of, constant, packet_of, passed
from .memory import ByMemory
from .metal import lower, lower_graph
from .mod import NotLowered
from .trace import SCORE, Traced

_aten = torch.ops.aten
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
        found = self.of_score(score_captures, query, key)
        rule = self.rule(score_captures, mask_captures)
        if found is None or rule is None:
            return found
        ranges = rule.key_ranges(query, key)
        return None if ranges is None else {**found, "key_ranges": ranges}

    def of_score(
        self, captures: Sequence[Tensor], query: Tensor, key: Tensor
    ) -> dict[str, Any] | None:
        """The same, all but the key ranges."""
        sizes = (*query.shape[:3], key.shape[2])
        found: dict[str, Any] = {
            "window_left": self.window_left,
            "window_right": self.window_right,
            "softcap": self.softcap,
        }
        if self.slopes is not None:
            slopes = _slopes(self.slopes, captures, sizes, query.device)
            if slopes.requires_grad and torch.is_grad_enabled():
                return None
            found["alibi_slopes"] = slopes
        if self.table is not None:
            number, axes = self.table
            mask = _spread(captures[number], axes, sizes)
            if mask is None or mask.device != query.device:
                return None
            found["attn_mask"] = mask
        return found

    def rule(
        self, score_captures: Sequence[Tensor], mask_captures: Sequence[Tensor]
    ) -> RangeRule | None:
        if self.ranges is None:
            return None
        kind, length, *shift = self.ranges
        number = shift[0] if shift else 0
        if isinstance(length, tuple):
            return RangeRule(kind, (*score_captures, *mask_captures)[length[1]], number)
        return RangeRule(kind, None, length + number)


class RangeRule(NamedTuple):
    """How key ranges are made."""

    kind: str
    """"documents", "keys" or "prefix"."""
    source: Tensor | None
    """The documents, or the lengths."""
    number: int
    """What is added to the lengths, or the length itself."""

    def key_ranges(self, query: Tensor, key: Tensor) -> KeyRanges | None:
        """None where the sizes or the numbers of `source` do not allow it."""
        batch, _, q_len, kv_len = *query.shape[:3], key.shape[2]
        source = self.source
        if self.kind == "documents":
            assert source is not None
            return _documents(source, batch, q_len, kv_len)
        if source is not None:
            if source.shape[0] < batch or source.device != query.device:
                return None
            # Ends as far as int64's are not to wrap round.
            lengths = source[:batch].to(torch.int64).clamp(-4 * FAR, 4 * FAR) + self.number
        else:
            number = min(max(self.number, 0), kv_len)
            lengths = torch.full((1,), number, dtype=torch.int64, device=query.device)
        lengths = lengths.clamp(0, kv_len)
        make: Callable[..., KeyRanges] = (
            KeyRanges.prefix_lm if self.kind == "prefix" else KeyRanges.from_lengths
        )
        return make(lengths.to(torch.int32), q_len)


def recognise(score: Traced | None, mask: Traced | None) -> Known | None:
    """What `flash_attn` has to be told to compute the same, or None where it cannot.

    Where there is a BlockMask, its lists decide what is seen: then this counts only if they say
    what `mask` says, see `lists_follow`.
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
        reader = Conditions(mask, offset)
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
    conditions = Conditions(score, 0)
    node, seen = passed(_output(score)), _ALWAYS
    while packet_of(node) is _aten.where:
        condition, a, b = node.args
        if constant(b) == -torch.inf:
            seen, node = seen & conditions.condition(condition), passed(a)
        elif constant(a) == -torch.inf:
            seen, node = seen & conditions.condition(condition, negated=True), passed(b)
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
    while packet_of(node) in (_aten.add, _aten.sub) and node.kwargs.get("alpha", 1) == 1:
        a, b = node.args[:2]
        if not (isinstance(a, Node) and isinstance(b, Node)) or (a in dependent) == (
            b in dependent
        ):
            break
        sign = 1 if packet_of(node) is _aten.add else -1
        if b in dependent:
            if sign == -1:
                break
            a, b = b, a
        terms.append((sign, b))
        node = passed(a)
    return terms, node


def _cap(node: Any, score: Node) -> float:
    """c of c * tanh(s / c), else 0."""
    if packet_of(node) is not _aten.mul:
        return 0.0
    for inner, c in (node.args[:2], node.args[1::-1]):
        inner, c = passed(inner), constant(c)
        if (
            packet_of(inner) is not _aten.tanh
            or not isinstance(c, int | float)
            or not 1e-30 < c < 1e30
        ):
            continue
        quotient = passed(inner.args[0])
        is_it = packet_of(quotient) is _aten.div and len(quotient.args) == 2
        if is_it and passed(quotient.args[0]) is score and constant(quotient.args[1]) == c:
            return float(c)
    return 0.0


def _read_alibi(sign: int, term: Node, conditions: Conditions, known: Known) -> bool:
    """Whether a term is -slope * |q_idx - kv_idx|, or that where q_idx >= kv_idx."""
    if packet_of(term) is not _aten.mul or known.slopes is not None:
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
    term = passed(term)
    if packet_of(term) is _aten._to_copy and term.meta["val"].dtype == torch.float32:
        term = passed(term.args[0])
    if packet_of(term) is not _aten.index or sign != 1 or known.table is not None:
        return False
    arguments = arguments_of(score)
    source, places = passed(term.args[0]), [passed(x) for x in term.args[1]]  # type: ignore
    if source not in arguments[5:] or any(x not in arguments[1:5] for x in places):
        return False
    axes = tuple(arguments.index(x) - 1 for x in places)
    is_whole = len(axes) == source.meta["val"].dim() and list(axes) == sorted(set(axes))
    if not is_whole or not source.meta["val"].dtype.is_floating_point:
        return False
    known.table = (arguments.index(source) - 5, axes)
    return True


# ---- masks --------------------------------------------------------------------------------------


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
        if bound is not None and abs(bound) >= FAR:
            return False
    if (low is not None and low > 0) or (high is not None and high < 0):
        return False
    known.window_left = -1 if low is None else -low
    known.window_right = -1 if high is None else high
    return True


_PREFIX = ["keys", "band"]


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


_made_of: ByMemory[KeyRanges | None] = ByMemory()
_ascending: ByMemory[bool] = ByMemory()


def _documents(ids: Tensor, batch: int, q_len: int, kv_len: int) -> KeyRanges | None:
    if ids.shape[-1] < max(q_len, kv_len) or (ids.dim() == 2 and ids.shape[0] < batch):
        return None
    if torch.compiler.is_compiling():
        return None  # the numbers are not there yet

    count = batch if ids.dim() == 2 else 1

    def ascends() -> bool:
        with apart():
            return bool((ids[..., 1:] >= ids[..., :-1]).all())

    def make() -> KeyRanges | None:
        if not _ascending.find((ids,), (), ascends):
            return None
        with torch.inference_mode(False), torch.no_grad(), apart():  # a later call may be trained
            rows = ids[:count] if ids.dim() == 2 else ids.unsqueeze(0)
            of_keys, of_queries = rows[:, :kv_len].contiguous(), rows[:, :q_len].contiguous()
            begin = torch.searchsorted(of_keys, of_queries, out_int32=True)
            end = torch.searchsorted(of_keys, of_queries, right=True, out_int32=True)
            position = torch.arange(q_len, dtype=torch.int32, device=ids.device).expand_as(begin)
            columns = (begin, end, position, torch.zeros_like(begin))
            return KeyRanges(torch.stack(columns, -1).unsqueeze(1), 0, has_prefix=False)

    return _made_of.find((ids,), (count, q_len, kv_len), make)
