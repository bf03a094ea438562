"""What is done with a model: the columns of the matrix.

Each situation runs a model and returns what eager attention and ours must agree on. It is run on
the CPU with transformers' eager attention, and on the device with ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from families import LENGTH, Family
from torch import Tensor, nn

DROPOUT = 0.3
_TEXT = ("decoder", "encoder", "seq2seq", "images")
_ALL = (*_TEXT, "vision", "audio")

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Situation:
    """A way to use a model."""

    name: str
    says: str
    run: Callable[[Family, nn.Module, str], Results]
    kinds: tuple[str, ...]
    dropout: float = 0.0
    bfloat16: bool = False
    exact: bool = False
    """Whether the results are tokens."""


def _to(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _out(result: Any) -> Tensor:
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def _step(
    family: Family,
    model: nn.Module,
    device: str,
    inputs: dict[str, Any],
    real: Tensor | None = None,
    call: Callable | None = None,
) -> Results:
    """A forward and a backward. `real` (B, L) says which rows of the output count."""
    model.train()
    model.zero_grad()
    inputs = _to(device, inputs)
    if family.kind in ("decoder", "images"):
        inputs["use_cache"] = False
    out = _out((model if call is None else call)(**inputs)).float()
    weights = torch.sin(torch.arange(out.numel(), device=device).view_as(out) * 0.7)
    if real is not None:
        keep = real.to(device).view(*real.shape, *([1] * (out.dim() - 2)))
        out, weights = out * keep, weights * keep
    (out * weights).sum().backward()
    grads = {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **grads}


def _plain(family: Family, model: nn.Module, device: str) -> Results:
    return _step(family, model, device, family.inputs())


def _padded(side: str) -> Callable[[Family, nn.Module, str], Results]:
    def run(family: Family, model: nn.Module, device: str) -> Results:
        inputs = family.inputs()
        mask = torch.ones((2, LENGTH), dtype=torch.int64)
        if side == "right":
            mask[0, 27:] = 0
        elif side == "left":
            mask[0, :13] = 0
        else:
            mask[0, 9:13], mask[1, 30:] = 0, 0
        inputs["attention_mask"] = mask
        return _step(family, model, device, inputs, None if family.kind == "seq2seq" else mask)

    return run


def _positions() -> Tensor:
    return torch.cat([torch.arange(n) for n in (11, 1, 20, 8)])[None]


def _packed(family: Family, model: nn.Module, device: str) -> Results:
    inputs = family.inputs(batch=1)
    return _step(family, model, device, {**inputs, "position_ids": _positions()})


def _flat(family: Family, model: nn.Module, device: str) -> Results:
    """As transformers' DataCollatorWithFlattening gives batches. Eager attention gets the documents
    one by one, which is what packing means."""
    inputs, ends = family.inputs(batch=1), [0, 11, 12, 32, 40]
    if device == "cpu" and family.name == "deepseek_v32":
        return _packed(family, model, device)  # its indexer breaks ties by the place in the row
    if device == "cpu":

        def one_by_one(input_ids: Tensor, **rest: Any) -> Any:
            parts = [model(input_ids[:, a:b], **rest).logits for a, b in pairwise(ends)]
            return SimpleNamespace(logits=torch.cat(parts, 1))

        return _step(family, model, device, inputs, call=one_by_one)
    lengths = torch.tensor(ends, dtype=torch.int32)
    packing = {
        "position_ids": _positions(),
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": 20,
        "max_length_k": 20,
    }
    return _step(family, model, device, {**inputs, **packing})


def _mask4d(family: Family, model: nn.Module, device: str) -> Results:
    i = torch.arange(LENGTH)
    seen = (i[:, None] >= i) & ((i[:, None] - i) % 5 != 3)
    mask = torch.zeros((2, 1, LENGTH, LENGTH)).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask[1, :, :, 5] = torch.finfo(torch.float32).min
    mask[1, :, 5, 5] = 0.0
    given: Any = mask
    kinds = getattr(model.config, "layer_types", None)
    if family.kind == "decoder" and kinds and len(set(kinds)) > 1:
        given = {kind: mask.to(device) for kind in set(kinds)}
    return _step(family, model, device, {**family.inputs(), "attention_mask": given})


def _checkpoint(family: Family, model: nn.Module, device: str) -> Results:
    model.gradient_checkpointing_enable()
    return _plain(family, model, device)


def _autocast(family: Family, model: nn.Module, device: str) -> Results:
    with torch.autocast(device, torch.bfloat16):
        return _plain(family, model, device)


def _bfloat16(family: Family, model: nn.Module, device: str) -> Results:
    model.to(torch.bfloat16)
    inputs = {
        name: x.to(torch.bfloat16) if x.is_floating_point() else x
        for name, x in family.inputs().items()
    }
    return _step(family, model, device, inputs)


def _compiled(family: Family, model: nn.Module, device: str) -> Results:
    if device == "cpu":
        return (
            _padded("right")(family, model, device)
            if family.kind in _TEXT
            else _plain(family, model, device)
        )
    torch._dynamo.reset()
    call = torch.compile(model, backend="aot_eager")
    inputs = family.inputs()
    real = None
    if family.kind in _TEXT:
        real = torch.ones((2, LENGTH), dtype=torch.int64)
        real[0, 27:] = 0
        inputs["attention_mask"] = real
    return _step(family, model, device, inputs, None if family.kind == "seq2seq" else real, call)


@torch.no_grad()
def _chunked_prefill(family: Family, model: nn.Module, device: str) -> Results:
    """A prompt in parts of different lengths, through the cache."""
    model.eval()
    ids = family.inputs()["input_ids"].to(device)
    mask = torch.ones((2, LENGTH), dtype=torch.int64, device=device)
    mask[0, :5] = 0
    cache, outs, first = None, [], 0
    for end in (17, 18, 31, LENGTH):
        result = model(
            ids[:, first:end],
            attention_mask=mask[:, :end],
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, first:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache, first = result.past_key_values, end
        outs.append(result.logits)
    return {"out": torch.cat(outs, 1) * mask[..., None]}


@torch.no_grad()
def _last_logits(family: Family, model: nn.Module, device: str) -> Results:
    model.eval()
    inputs = _to(device, family.inputs())
    return {"out": model(**inputs, logits_to_keep=4).logits}


def _generated(**options: Any) -> Callable[[Family, nn.Module, str], Results]:
    @torch.no_grad()
    def run(family: Family, model: nn.Module, device: str) -> Results:
        model.eval()
        inputs = family.inputs(length=20)
        inputs.pop("decoder_input_ids", None)
        if "input_ids" in inputs:
            inputs["attention_mask"] = torch.ones((2, 20), dtype=torch.int64)
            inputs["attention_mask"][0, :6] = 0
        tokens = model.generate(**_to(device, inputs), max_new_tokens=8, do_sample=False, **options)
        return {"tokens": tokens}

    return run


SITUATIONS = {
    situation.name: situation
    for situation in (
        Situation("nopad", "a training step without any mask", _plain, _ALL),
        Situation(
            "right", "a training step of a batch padded on the right", _padded("right"), _TEXT
        ),
        Situation("left", "of a batch padded on the left", _padded("left"), _TEXT),
        Situation(
            "holes",
            "of a batch whose attention_mask has padding between tokens",
            _padded("holes"),
            _TEXT,
        ),
        Situation("packed", "documents packed in a row, by position_ids", _packed, ("decoder",)),
        Situation(
            "flat",
            "as DataCollatorWithFlattening gives them, against each document alone",
            _flat,
            ("decoder",),
        ),
        Situation(
            "mask4d", "a float mask (B, 1, L, L) of the user", _mask4d, ("decoder", "encoder")
        ),
        Situation(
            "dropout",
            "attention dropout, against the same dropout mask",
            _plain,
            _ALL,
            dropout=DROPOUT,
        ),
        Situation(
            "checkpoint", "gradient checkpointing, with dropout", _checkpoint, _ALL, dropout=DROPOUT
        ),
        Situation(
            "autocast",
            "bfloat16 autocast, at most three times as far from float32 as eager's",
            _autocast,
            _ALL,
            bfloat16=True,
        ),
        Situation(
            "bfloat16",
            "a model in bfloat16, judged as under autocast",
            _bfloat16,
            _ALL,
            bfloat16=True,
        ),
        Situation(
            "compile", "torch.compile (aot_eager) of a padded training step", _compiled, _ALL
        ),
        Situation(
            "chunked",
            "a left-padded prompt through the cache in four parts",
            _chunked_prefill,
            ("decoder",),
        ),
        Situation("last", "logits_to_keep=4", _last_logits, ("decoder",)),
        Situation(
            "generate",
            "greedy generation from left-padded prompts",
            _generated(),
            ("decoder", "seq2seq"),
            exact=True,
        ),
        Situation(
            "beams",
            "beam search with three beams",
            _generated(num_beams=3),
            ("decoder", "seq2seq"),
            exact=True,
        ),
        Situation(
            "static",
            "greedy generation with a static cache",
            _generated(cache_implementation="static"),
            ("decoder", "seq2seq"),
            exact=True,
        ),
    )
}
