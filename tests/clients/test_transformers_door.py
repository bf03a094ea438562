"""The door itself: what it registers, what it refuses and in which words, what it never does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
from families import FAMILIES

import orchard_ops
from orchard_ops.integrations import transformers as door

L = 40
DEVICE = "mps"


def run_program(text: str) -> str:
    program = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=300
    )
    return program.stdout


def test_importing_the_package_does_not_import_transformers():
    print_them = "import sys, orchard_ops; print([m for m in sys.modules if 'transformers' in m])"
    assert run_program(print_them).strip() == "[]"


def test_one_call_registers_both_interfaces():
    names = "transformers.AttentionInterface().valid_keys(), AttentionMaskInterface().valid_keys()"
    text = f"""
import orchard_ops
orchard_ops.register_transformers()
import transformers
from transformers import AttentionMaskInterface
print([("orchard" in keys) for keys in ({names})])
"""
    assert run_program(text).strip() == "[True, True]"


def test_an_older_transformers_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    from orchard_ops.integrations import (
        transformers as present,
    )  # another test may have reloaded it

    monkeypatch.setattr(present.transformers, "__version__", "4.57.1")
    with pytest.raises(
        ImportError, match=r"needs transformers 5 or later; got 4\.57\.1: pip install"
    ):
        orchard_ops.register_transformers()


# ---- what is refused ----------------------------------------------------------------------------


class Module(nn.Module):
    """An attention module of a model."""

    is_causal = True


def call(
    module: nn.Module | None = None, q_len: int = 6, kv_len: int = 6, **options: Any
) -> Tensor:
    query = torch.ones((2, 4, q_len, 16))
    key = torch.ones((2, 2, kv_len, 16))
    mask = options.pop("attention_mask", None)
    return door.attention_forward(module or Module(), query, key, key, mask, **options)[0]


NOT_KNOWN = "passes temperature_bias, which may change what attention computes and is not known"
REFUSALS = {
    "an unknown tensor": (TypeError, NOT_KNOWN, {"temperature_bias": torch.ones(4)}),
    "an unknown number": (TypeError, "Module passes tau, which may", {"tau": 2.0}),
    "blocks of keys": (
        NotImplementedError,
        "Module chooses blocks of keys by block_indices, which are not supported: ask for",
        {"block_indices": torch.zeros((2, 1, 6, 1), dtype=torch.int64)},
    ),
    "two kinds of sinks": (
        ValueError,
        "Module passes both s_aux and sinks",
        {"s_aux": torch.zeros(4), "sinks": torch.zeros(4)},
    ),
    "a causal call whose queries stand anywhere": (
        ValueError,
        "Module is causal, has 6 queries and 9 keys and passes no mask, which leaves open where",
        {"kv_len": 9},
    ),
    "a mask of two dimensions": (
        ValueError,
        r"attention_mask must have shape \(batch or 1, heads or 1, queries, keys\) where it "
        r"reaches Module; got \(2, 6\)",
        {"attention_mask": torch.ones((2, 6))},
    ),
    "cumulative lengths of several rows": (
        ValueError,
        "cu_seq_lens_q, which describe one packed row, with a batch of 2: pack the batch",
        {"cu_seq_lens_q": torch.tensor([0, 6], dtype=torch.int32)},
    ),
    "a descriptor for other lengths": (
        ValueError,
        "Module has 6 queries and 6 keys; the mask was made for 5 and 5",
        {"attention_mask": door.attention_mask(2, 5, 5)},
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_could_be_silently_wrong_is_refused_by_name(what: str):
    kind, words, options = REFUSALS[what]
    with pytest.raises(kind, match=words) as error:
        call(**options)
    assert str(error.value).startswith('attn_implementation="orchard": ')


def test_what_models_pass_on_without_meaning_attention_is_no_error():
    """An argument that is not known is harmless where it says nothing."""
    noise = {"position_ids": torch.arange(6)[None], "output_attentions": True, "use_cache": True}
    noise |= {"tau": None, "return_weights": False, "num_items_in_batch": torch.tensor(3)}
    assert torch.equal(call(**noise), call())


def test_without_a_mask_the_module_says_whether_it_is_causal():
    free = SimpleNamespace(training=False)
    query, key, value = (torch.randn((1, 2, 6, 16)) for _ in range(3))

    def out(module: Any, **options: Any) -> Tensor:
        return door.attention_forward(module, query, key, value, None, **options)[0]

    def plain(is_causal: bool) -> Tensor:
        attend = nn.functional.scaled_dot_product_attention
        return attend(query, key, value, is_causal=is_causal).transpose(1, 2)

    torch.testing.assert_close(out(Module()), plain(True))
    torch.testing.assert_close(out(free), plain(False))  # cross attention of Mllama
    torch.testing.assert_close(out(free, is_causal=True), plain(True))
    torch.testing.assert_close(out(Module(), is_causal=False), plain(False))


# ---- what it never does -------------------------------------------------------------------------


class NoLengthByLength(TorchDispatchMode):
    """Fails where a tensor with a number for every query and key is made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for x in results if isinstance(results, tuple | list) else (results,):
            if isinstance(x, Tensor):
                assert tuple(x.shape[-2:]) != (L, L), f"{func} makes {tuple(x.shape)}"
        return results


class NoWait(NoLengthByLength):
    """Fails also where the CPU would wait for the GPU. (transformers itself waits, to see whether
    position_ids are packed.)"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._opname not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), func
        return super().__torch_dispatch__(func, types, args, kwargs)


def masked_arguments(kind: str) -> dict[str, Any]:
    ids = torch.randint(3, 64, (2, L), device=DEVICE)
    mask = torch.ones((2, L), dtype=torch.int64, device=DEVICE)
    mask[0, :9] = 0
    if kind == "packed":
        return {"input_ids": ids, "position_ids": torch.arange(L, device=DEVICE) % 16}
    return {"input_ids": ids} | ({"attention_mask": mask} if kind == "padded" else {})


@pytest.mark.parametrize("kind", ("plain", "padded", "packed"))
@pytest.mark.parametrize(
    "family", ("llama", "mistral", "gemma3", "llama4", "gpt_oss", "modernbert")
)
def test_no_tensor_of_all_queries_and_keys_is_made(family: str, kind: str):
    model = FAMILIES[family].make("orchard").to(DEVICE)
    arguments = masked_arguments(kind)
    if family == "modernbert" and kind == "packed":
        del arguments["position_ids"]
    if "position_ids" in arguments:
        arguments["position_ids"] = arguments["position_ids"].expand(2, -1)
    with NoLengthByLength():
        result = model(**arguments)
        out = result.logits if hasattr(result, "logits") else result.last_hidden_state
        out.sum().backward()


@pytest.mark.parametrize("family", ("gemma3", "gemma3_images"))
def test_compiled_graphs_make_none_either(family: str):
    """Image blocks in a window among them."""
    shapes: list[tuple[int, ...]] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        values = (node.meta.get("example_value") for node in graph.graph.nodes)
        shapes.extend(tuple(x.shape) for x in values if isinstance(x, Tensor))
        return graph.forward

    model = FAMILIES[family].make("orchard").to(DEVICE)
    inputs = {name: x.to(DEVICE) for name, x in FAMILIES[family].inputs().items()}
    inputs["attention_mask"] = masked_arguments("padded")["attention_mask"]
    torch._dynamo.reset()
    torch.compile(model, backend=look)(**inputs, use_cache=False)
    assert (2, L, 64) in shapes
    assert not [shape for shape in shapes if shape[-2:] == (L, L)]


@pytest.mark.parametrize("window", (None, 8))
@pytest.mark.parametrize("padded", (False, True))
def test_neither_mask_nor_layer_waits(window: int | None, padded: bool):
    masking = transformers.masking_utils
    function = (
        masking.causal_mask_function
        if window is None
        else masking.sliding_window_causal_mask_function(window)
    )
    q, k, v = (torch.randn((2, 4, L, 16), device=DEVICE, requires_grad=True) for _ in range(3))
    tokens = torch.ones((2, L), dtype=torch.bool, device=DEVICE) if padded else None
    module = Module()
    with NoWait():
        mask = door.attention_mask(
            2, L, L, mask_function=function, attention_mask=tokens, device=DEVICE
        )
        out, _ = door.attention_forward(module, q, k, v, mask)
        out.sum().backward()


# ---- other ways to a model ----------------------------------------------------------------------


def test_the_name_may_be_set_after_loading():
    family = FAMILIES["llama"]
    model, other = family.make("eager"), family.make("orchard")
    model.set_attn_implementation("orchard")
    inputs = family.inputs()
    assert torch.equal(model(**inputs).logits, other(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("window", (None, 8))
def test_inductor_takes_the_ranges_of_packed_rows(window: int | None):
    """Its lowering inlines what depends on what; a long chain of choices takes it for ever."""
    masking = transformers.masking_utils

    def ranges(position_ids: Tensor, documents: Tensor) -> Tensor:
        base = masking.causal_mask_function
        if window is not None:
            base = masking.sliding_window_causal_mask_function(window)
        function = masking.and_masks(
            masking.remap_positions_for_packed_sequence(base, position_ids),
            masking.packed_sequence_mask_function(documents),
        )
        mask = door.attention_mask(1, L, L, mask_function=function)
        assert mask is not None and mask.visibility.ranges is not None
        return mask.visibility.to_bool()

    position_ids = (torch.arange(L) % 16)[None]
    documents = (torch.arange(L) // 16)[None]
    torch._dynamo.reset()
    compiled = torch.compile(ranges, fullgraph=True)
    assert torch.equal(compiled(position_ids, documents), ranges(position_ids, documents))


def test_a_compiled_layer_takes_the_mask_of_an_eager_model():
    """Regional compilation: the descriptor goes into a graph that others have not made."""
    family = FAMILIES["mistral"]
    model, other = family.make("orchard"), family.make("eager")
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    mask = torch.ones((2, L), dtype=torch.int64)
    mask[0, 30:] = 0
    inputs = family.inputs() | {"attention_mask": mask}
    found, expected = (m(**inputs, use_cache=False).logits for m in (model, other))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


# ---- calls of the attention function without a mask


def test_a_window_without_a_mask_counts():
    module = nn.Module().eval()
    module.is_causal = True
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    far = torch.arange(16)[:, None] - torch.arange(16)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, (far >= 0) & (far < 3))
    out, _ = door.attention_forward(module, q, k, v, None, sliding_window=3)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    module.is_causal = False
    with pytest.raises(NotImplementedError, match="sliding_window=3 without a mask"):
        door.attention_forward(module, q, k, v, None, sliding_window=3)


def test_lengths_of_queries_alone_are_not_those_of_more_keys():
    module = nn.Module().eval()
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 8, 8)
    mask = door.attention_mask(1, 5, 8, q_offset=3, dtype=torch.float32)
    ends = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="pass cu_seq_lens_k too"):
        door.attention_forward(module, q, k, k, mask, cu_seq_lens_q=ends)


@pytest.mark.parametrize("offset", (0, 5))
def test_sinks_of_queries_take_probability(offset: int):
    """Inkling 2 has a sink for every query. Queries that see no key remain 0, with a gradient."""
    masking = transformers.masking_utils
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 4, n, 16, generator=generator) for n in (9, 9 + offset, 9 + offset)]
    leaves += [torch.randn(2, 4, 9, 1, generator=generator)]
    tokens = torch.ones((2, 9 + offset), dtype=torch.bool)
    tokens[0, : offset + 3] = False
    window = masking.sliding_window_causal_mask_function(4)
    mask = door.attention_mask(
        2, 9, 9 + offset, q_offset=offset, mask_function=window, attention_mask=tokens
    )
    seen = mask.visibility.to_bool()
    module = Module().eval()

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return door.attention_forward(module, q, k, v, mask, sinks=sinks)[0].transpose(1, 2)

    def eager(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        scores = (q @ k.mT / 4).masked_fill(~seen, -torch.inf)
        return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1] @ v

    results = []
    for function in (attend, eager):
        inputs = [x.clone().requires_grad_() for x in leaves]
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    assert not seen[0, 0, 0].any()
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)
