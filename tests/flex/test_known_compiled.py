"""Known mods take the fixed kernels under torch.compile and torch.func too.

Where the lists say what the mask_mod says: a graph looks when it runs, once for each list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import SIMULATED
from flex_calls import pytorch_differentiates
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.nn.attention import flex_attention as pytorch
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask
from torch.utils.checkpoint import checkpoint

import orchard_ops
from orchard_ops.flex import block_lists, route

if SIMULATED:
    import simulator

BATCH, HEADS, LENGTH, WIDTH = 2, 3, 40, 16
IDS = torch.arange(LENGTH) // 9
PREFIX = torch.tensor([3, 12], dtype=torch.int32)
SLOPES = torch.tensor([0.5, 0.25, 0.125])
TABLE = torch.arange(HEADS * LENGTH * LENGTH).view(HEADS, LENGTH, LENGTH).sin()

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
"""All but that of the autograd kernel's registration, which PyTorch has for CPU and CUDA alone."""


@pytest.fixture(autouse=True)
def _on_mps_and_nothing_compiled_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for captured in ("IDS", "PREFIX", "SLOPES", "TABLE"):
        monkeypatch.setitem(globals(), captured, globals()[captured].to("mps"))
    torch._dynamo.reset()
    with fresh_cache():
        yield
    torch._dynamo.reset()


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def behind(b, h, q_idx, kv_idx):
    return q_idx - kv_idx < 7


def documents(b, h, q_idx, kv_idx):
    return IDS[q_idx] == IDS[kv_idx]


def prefix(b, h, q_idx, kv_idx):
    return (kv_idx < PREFIX[b]) | (q_idx >= kv_idx)


def capped(score, b, h, q_idx, kv_idx):
    return 4.0 * torch.tanh(score / 4.0)


def sloped(score, b, h, q_idx, kv_idx):
    return score - SLOPES[h] * (q_idx - kv_idx).abs()


def sloped_behind(score, b, h, q_idx, kv_idx):
    return score + SLOPES[h] * (kv_idx - q_idx)


def tabled(score, b, h, q_idx, kv_idx):
    return score + TABLE[h, q_idx, kv_idx]


def hidden(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx - kv_idx <= 11, score, -torch.inf)


def of_documents(score, b, h, q_idx, kv_idx):
    return torch.where(IDS[q_idx] == IDS[kv_idx], score, -torch.inf)


MASKS = {
    "causal": causal,
    "two-sided window": lambda b, h, q, kv: (q - kv).abs() <= 5,
    "sliding window": and_masks(causal, behind),
    "documents": documents,
    "causal documents": and_masks(documents, causal),
    "windowed documents": and_masks(documents, causal, behind),
    "prefix": prefix,
    "lengths": lambda b, h, q, kv: kv < PREFIX[b],
    "everything": pytorch.noop_mask,
}
SCORES = {
    "softcap": capped,
    "alibi": sloped,
    "causal alibi": sloped_behind,
    "a table": tabled,
    "a window in the score": hidden,
    "documents in the score": of_documents,
    "all": lambda s, *at: hidden(sloped(capped(s, *at), *at), *at),
}
CALLS = (
    *((None, name) for name in MASKS),
    *((name, "causal") for name in SCORES),
    ("softcap", "causal documents"),
    ("alibi", "windowed documents"),
    ("documents in the score", None),
)


def _made(mask_mod: Any, length: int = LENGTH, batch: int | None = None) -> BlockMask:
    return create_block_mask(mask_mod, batch, None, length, length, device="mps", BLOCK_SIZE=16)


def _of(score: str | None, mask: str | None) -> dict[str, Any]:
    mods: dict[str, Any] = {"score_mod": None if score is None else SCORES[score]}
    if mask is not None:
        of_rows = mask in ("prefix", "lengths")
        mods["block_mask"] = _made(MASKS[mask], batch=BATCH if of_rows else None)
    return mods


def _operands(length: int = LENGTH, heads: int = HEADS) -> list[Tensor]:
    shapes = [(BATCH, n, length, WIDTH) for n in (heads, HEADS, HEADS)]
    return [torch.randn(shape).to("mps").requires_grad_() for shape in shapes]


def _called(function: Callable[..., Any]) -> tuple[list[Tensor], bool]:
    """What a call gives, and whether only kernels of `flash_attn` took it."""
    with orchard_ops.report(show=False) as report:
        found = function()
    assert report.count("metal") == sum(call.count for call in report.calls) > 0
    flex = [any("flex" in name for name in call.kernels) for call in report.calls]
    assert all(flex) or not any(flex)
    return found, not any(flex)


def _trained(function: Callable[..., Any], operands: list[Tensor], mods: Any) -> Callable[..., Any]:
    def call() -> list[Tensor]:
        out = function(*operands, **mods)
        return [out, *torch.autograd.grad(out.sin().sum(), operands)]

    return call


def _compiled(backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(orchard_ops.flex_attention, fullgraph=True, backend=backend, **options)


def _assert_equal(found: list[Tensor], right: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(found, right, strict=True))


# ---- the fixed kernels --------------------------------------------------------------------------


@pytest.mark.parametrize(("score", "mask"), CALLS)
def test_compiled_code_takes_the_fixed_kernels(score: str | None, mask: str | None):
    mods, operands = _of(score, mask), _operands()
    found, is_fixed = _called(_trained(_compiled(), operands, mods))
    assert is_fixed
    right, is_fixed = _called(_trained(orchard_ops.flex_attention, operands, mods))
    assert is_fixed
    _assert_equal(found, right)


def test_grouped_heads_and_lse():
    operands, mods = _operands(heads=6), _of(None, "causal documents")
    aux = {**mods, "enable_gqa": True, "return_aux": pytorch.AuxRequest(lse=True)}

    def trained(function: Any) -> Callable[..., Any]:
        def call() -> list[Tensor]:
            out, found = function(*operands, **aux)
            return [
                out,
                found.lse,
                *torch.autograd.grad(out.sin().sum() + found.lse.cos().sum(), operands),
            ]

        return call

    found, is_fixed = _called(trained(_compiled()))
    assert is_fixed
    right, is_fixed = _called(trained(orchard_ops.flex_attention))
    assert is_fixed
    _assert_equal(found[:2], right[:2])
    for x, y in zip(found[2:], right[2:]):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", ("a window in the score", "softcap", None))
def test_lse_has_its_own_unit(score: str | None):
    """The kernels hold logarithms to the base 2 where nothing but products is in a score."""
    operands, mods = _operands(), _of(score, "causal")
    mods["return_aux"] = pytorch.AuxRequest(lse=True)
    compiled, eager = (
        f(*operands, **mods)[1].lse for f in (_compiled(), orchard_ops.flex_attention)
    )
    assert torch.equal(compiled, eager)
    grads = [torch.autograd.grad(x.sin().sum(), operands[:2]) for x in (compiled, eager)]
    for x, y in zip(*grads):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_inductor_takes_them_too():
    def surrounded(*operands: Tensor, **mods: Any) -> Tensor:
        return orchard_ops.flex_attention(operands[0] * 2.0 * 0.5, *operands[1:], **mods) + 0.0

    operands, mods = _operands(), _of("softcap", "causal documents")
    compiled = torch.compile(surrounded, fullgraph=True)
    found, is_fixed = _called(_trained(compiled, operands, mods))
    assert is_fixed
    _assert_equal(found, _trained(surrounded, operands, mods)())


def test_without_a_backward():
    operands, mods = _operands(), _of("alibi", "causal documents")
    compiled = _compiled()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found, is_fixed = _called(lambda: [compiled(*operands, **mods)])
            assert is_fixed
            _assert_equal(found, [orchard_ops.flex_attention(*operands, **mods)])


def test_under_autocast():
    operands, mods = _operands(), _of("a table", "causal")
    with torch.autocast("mps", dtype=torch.bfloat16):
        found, is_fixed = _called(_trained(_compiled(), operands, mods))
        assert is_fixed and found[0].dtype == torch.bfloat16
        _assert_equal(found, _trained(orchard_ops.flex_attention, operands, mods)())


@pytest.mark.parametrize("outside", (True, False))
def test_activations_that_are_computed_again(outside: bool):
    operands, mods = _operands(), _of("softcap", "causal documents")

    def attend(*x: Tensor) -> Tensor:
        return orchard_ops.flex_attention(x[0].sin(), *x[1:], **mods)

    def again(function: Any) -> Any:
        return lambda *x: checkpoint(function, *x, use_reentrant=False)

    compiled = (
        again(torch.compile(attend, fullgraph=True, backend="aot_eager"))
        if outside
        else torch.compile(again(attend), fullgraph=True, backend="aot_eager")
    )
    found, is_fixed = _called(_trained(compiled, operands, {}))
    assert is_fixed
    _assert_equal(found, _trained(attend, operands, {})())


def test_in_the_eager_backend():
    operands, mods = _operands(), _of(None, "causal documents")
    found, is_fixed = _called(_trained(_compiled("eager"), operands, mods))
    assert is_fixed
    _assert_equal(found, _trained(orchard_ops.flex_attention, operands, mods)())


def test_an_exported_program_decides_too():
    mods = _of("softcap", "causal documents")

    class Bound(torch.nn.Module):
        def forward(self, *operands: Tensor) -> Tensor:
            return orchard_ops.flex_attention(*operands, **mods)

    operands = tuple(x.detach() for x in _operands())
    program = torch.export.export(Bound(), operands, strict=True)
    found, is_fixed = _called(lambda: [program.module()(*operands)])
    assert is_fixed
    _assert_equal(found, [orchard_ops.flex_attention(*operands, **mods)])


def test_one_graph_serves_masks_of_any_length():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(orchard_ops.flex_attention, fullgraph=True, backend=counter)
    for length in (16, 24, 33, 40):
        operands, mods = (
            _operands(length),
            {"block_mask": _made(and_masks(causal, documents), length)},
        )
        found, is_fixed = _called(_trained(compiled, operands, mods))
        assert is_fixed
        _assert_equal(found, _trained(orchard_ops.flex_attention, operands, mods)())
    assert counter.frame_count <= 2


# ---- lists that say something else --------------------------------------------------------------


def _diagonal(mask_mod: Any) -> BlockMask:
    """Only the blocks on the diagonal: less than `mask_mod`."""
    rows = torch.arange(3, dtype=torch.int32, device="mps")
    columns = rows[None, None, :, None].expand(1, 1, 3, 3).clone()
    return BlockMask.from_kv_blocks(
        torch.ones_like(rows)[None, None], columns,
        BLOCK_SIZE=16, mask_mod=mask_mod, seq_lengths=(LENGTH, LENGTH),
    )  # fmt: skip


def _by_pytorch(
    monkeypatch: pytest.MonkeyPatch, operands: list[Tensor], mask: Tensor
) -> list[Tensor]:
    """PyTorch's own function, of a mask in numbers."""
    mine = [x.detach().cpu().requires_grad_() for x in operands]
    with pytorch_differentiates(monkeypatch):
        out = pytorch.flex_attention(
            *mine, lambda s, b, h, q, kv: torch.where(mask[q, kv], s, -torch.inf)
        )
        return [out, *torch.autograd.grad(out.sin().sum(), mine)]


@pytest.mark.parametrize("backend", ("aot_eager", "eager"))
def test_lists_of_the_users_mean_what_they_say(backend: str, monkeypatch: pytest.MonkeyPatch):
    operands, mods = _operands(), {"block_mask": _diagonal(causal)}
    found, is_fixed = _called(_trained(_compiled(backend), operands, mods))
    assert not is_fixed
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    right = _by_pytorch(monkeypatch, operands, (i // 16 == j // 16) & (i >= j))
    for x, y in zip(found, right):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-5)


def test_documents_out_of_order():
    ids = torch.tensor([0, 1, 0, 2] * 10, device="mps")
    mods = {"block_mask": _made(lambda b, h, q, kv: ids[q] == ids[kv])}
    operands = _operands()
    found, is_fixed = _called(_trained(_compiled(), operands, mods))
    assert not is_fixed
    _assert_equal(found, _trained(orchard_ops.flex_attention, operands, mods)())


def test_a_graph_follows_its_lists():
    """One graph: other masks, numbers that are written to, and the right ones again."""
    operands, compiled = _operands(), _compiled()
    right, wrong = _made(causal), _diagonal(causal)
    wrong.full_kv_num_blocks = torch.zeros_like(wrong.kv_num_blocks)
    wrong.full_kv_indices = wrong.kv_indices.clone()
    for made, says in ((right, True), (wrong, False), (right, True)):
        found, is_fixed = _called(_trained(compiled, operands, {"block_mask": made}))
        assert is_fixed == says
        _assert_equal(found, _trained(orchard_ops.flex_attention, operands, {"block_mask": made})())
    kept = right.kv_num_blocks.clone()
    for numbers, says in ((kept.clamp(max=0), False), (kept, True)):
        right.kv_num_blocks.copy_(numbers)
        found, is_fixed = _called(_trained(compiled, operands, {"block_mask": right}))
        assert is_fixed == says
        _assert_equal(
            found, _trained(orchard_ops.flex_attention, operands, {"block_mask": right})()
        )


def test_a_graph_follows_its_documents():
    ids = IDS.clone()
    operands, compiled = _operands(), _compiled()
    made = _made(lambda b, h, q, kv: ids[q] == ids[kv])
    mods = {"block_mask": made}
    assert _called(_trained(compiled, operands, mods))[1]
    ids.zero_()  # the lists are the old ones
    found, is_fixed = _called(_trained(compiled, operands, mods))
    assert not is_fixed
    _assert_equal(found, _trained(orchard_ops.flex_attention, operands, mods)())


def test_the_backward_follows_its_forward(monkeypatch: pytest.MonkeyPatch):
    """Whatever would be found then."""
    operands, made = _operands(), _made(causal)
    right = _trained(orchard_ops.flex_attention, operands, {"block_mask": made})()
    compiled = _compiled()

    def call() -> list[Tensor]:
        out = compiled(*operands, block_mask=made)
        block_lists._judged._kept.clear()
        with monkeypatch.context() as patch:
            patch.setattr(block_lists, "_judge", lambda *_: False)
            return [out, *torch.autograd.grad(out.sin().sum(), operands)]

    found, is_fixed = _called(call)
    assert is_fixed
    _assert_equal(found, right)


def test_lists_that_a_graph_writes_to():
    """The numbers that the call sees are the graph's own, and those of the next call are new."""

    def call(q: Tensor, k: Tensor, v: Tensor, made: BlockMask, first: bool) -> Tensor:
        if first:
            made.kv_num_blocks.clamp_(max=1)
        out = orchard_ops.flex_attention(q, k, v, block_mask=made)
        if not first:
            made.kv_num_blocks.clamp_(max=1)
        return out

    operands = [x.detach() for x in _operands()]
    for first, answers in ((True, (False, False)), (False, (True, False))):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        made, other = _made(documents), _made(documents)
        for says in answers:
            found, is_fixed = _called(lambda: [compiled(*operands, made, first)])  # noqa: B023
            assert is_fixed == says
            right = call(*operands, other, first)
            torch.testing.assert_close(found[0], right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lists", ("right", "wrong"))
def test_opcheck(lists: str, monkeypatch: pytest.MonkeyPatch):
    given: list[tuple[Any, ...]] = []
    op, mods = route.FORWARD_OP, _of("alibi", "causal documents")
    if lists == "wrong":
        mods["block_mask"].full_kv_num_blocks.zero_()
        mods["block_mask"].kv_num_blocks.clamp_(max=1)
    monkeypatch.setattr(route, "FORWARD_OP", lambda *args: (given.append(args), op(*args))[1])
    mods["return_aux"] = pytorch.AuxRequest(lse=True)
    _compiled("eager")(*_operands(), **mods)
    for requires_grad in (True, False):
        operands = [x.requires_grad_(requires_grad) for x in (y.detach() for y in given[-1][:3])]
        args = (*operands, *given[-1][3:])
        torch.library.opcheck(op, args, test_utils=CHECKS)
    out, row_stats, choice, lse = op(*args)
    assert choice.item() == (lists == "right")
    args = (out, lse, *args[:3], out, row_stats, choice, *args[3:])
    torch.library.opcheck(torch.ops.orchard.flex_attn_known_bwd.default, args, test_utils=CHECKS)


def test_second_derivatives_are_refused():
    operands, mods = _operands(), _of(None, "causal")
    out = _compiled("eager")(*operands, **mods)
    (dq,) = torch.autograd.grad(out.square().sum(), operands[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dq.sum().backward()


def test_lists_that_a_graph_makes_are_not_looked_at():
    """Their memory is another list's next."""

    def call(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        def same(b: Any, h: Any, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return ids[q_idx] == ids[kv_idx]

        made = create_block_mask(same, None, None, LENGTH, LENGTH, device="mps", BLOCK_SIZE=16)
        return orchard_ops.flex_attention(q, k, v, block_mask=made)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    operands = _operands()
    for document in (7, 12):
        ids = torch.arange(LENGTH, device="mps") // document
        before = simulator.waits().total
        found, is_fixed = _called(lambda ids=ids: [compiled(*operands, ids)])
        assert not is_fixed and simulator.waits().total == before
        torch.testing.assert_close(found[0], call(*operands, ids), rtol=1e-5, atol=1e-5)


def test_documents_that_a_graph_makes_are_not_looked_at():
    def call(q: Tensor, k: Tensor, v: Tensor, begins: Tensor) -> Tensor:
        ids = begins.cumsum(0)

        def score(s: Tensor, b: Any, h: Any, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return torch.where(ids[q_idx] == ids[kv_idx], s, -torch.inf)

        return orchard_ops.flex_attention(q, k, v, score)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    operands = _operands()
    begins = (torch.arange(LENGTH, device="mps") % 9 == 0).int()
    found, is_fixed = _called(lambda: [compiled(*operands, begins)])
    assert not is_fixed
    torch.testing.assert_close(found[0], call(*operands, begins), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("causal", "documents"))
def test_only_the_first_call_waits(name: str):
    operands, compiled, mods = _operands(), _compiled(), _of(None, name)
    compiled(*operands, **mods)
    counts = [simulator.waits().total]
    for again in (mods, _of(None, name), mods):
        before = simulator.waits().total
        out = compiled(*operands, **again)
        torch.autograd.grad(out.sum(), operands)
        counts.append(simulator.waits().total - before)
    assert counts[1:] == [0, 1, 0]


# ---- torch.func ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("score", "mask"), (("softcap", "causal documents"), ("alibi", "prefix")))
def test_transforms_take_them_too(score: str, mask: str):
    mods, operands = _of(score, mask), [x.detach() for x in _operands()]

    def loss(*x: Tensor) -> tuple[Tensor, Tensor]:
        out = orchard_ops.flex_attention(*x, **mods)
        return out.sin().sum(), out

    def by_grad() -> list[Tensor]:
        grads, out = torch.func.grad(loss, argnums=(0, 1, 2), has_aux=True)(*operands)
        return [out, *grads]

    def by_vjp() -> list[Tensor]:
        value, pull, out = torch.func.vjp(loss, *operands, has_aux=True)
        return [out, *pull(torch.ones_like(value))]

    leaves = [x.clone().requires_grad_() for x in operands]
    right = _trained(orchard_ops.flex_attention, leaves, mods)()
    for function in (by_grad, by_vjp):
        found, is_fixed = _called(function)
        assert is_fixed
        _assert_equal(found, right)


def test_functional_call_takes_them():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(WIDTH))
            self.ids = torch.nn.Buffer(IDS.clone())

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            def score(s: Tensor, b: Any, h: Any, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
                return torch.where(self.ids[q_idx] == self.ids[kv_idx], s, -torch.inf)

            return orchard_ops.flex_attention(q @ self.weight, k, v, score, made)

    model, made = Model().to("mps"), _made(causal)
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    operands = [x.detach() for x in _operands()]

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, (weights, buffers), tuple(operands)).sin().sum()

    found, is_fixed = _called(lambda: [torch.func.grad(loss)(weights)["weight"]])
    assert is_fixed
    right = torch.autograd.grad(model(*operands).sin().sum(), model.weight)
    _assert_equal(found, list(right))


def test_mapped_operands_take_them():
    mods, operands = _of("softcap", "causal documents"), [x.detach() for x in _operands()]
    samples = [torch.stack((x, x.flip(2))) for x in operands]
    mapped = torch.func.vmap(lambda *x: orchard_ops.flex_attention(*x, **mods))
    found, is_fixed = _called(lambda: [mapped(*samples)])
    assert is_fixed
    right = [orchard_ops.flex_attention(*(x[n] for x in samples), **mods) for n in range(2)]
    _assert_equal(found, [torch.stack(right)])
