"""PyTorch's prefill_attention: of the torch that is installed, and of a later release.

The launch is that of ``..peer``. The later text differs in more than its 64-bit strides: it keeps
the query as it is and scales the scores, so that it needs no allowance for a rounded query.
PyTorch has no backward kernel, and this one writes no lse. Its decode kernels are another story.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from .. import peer
from .launches import Entrant, Step, Text
from .packages import LATER_TORCH
from .problems import Problem

INSTALLED = "2.13.0"
"""The release whose parameters ``..peer`` mirrors; peer.check_header says if another is there."""
_int32, _int64 = ctypes.c_int32, ctypes.c_int64


class LaterParams(ctypes.Structure):
    """PrefillAttnParams since torch 2.14"""

    _fields_ = [
        *[(name, _int32) for name in ("batch", "num_heads", "head_dim", "q_len", "kv_len")],
        ("group", _int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *[(name, _int64 * 3) for name in ("q", "k", "v", "out")],
    ]

    @classmethod
    def of(cls, params: peer.Params) -> LaterParams:
        values = []
        for name, kind in cls._fields_:
            value = getattr(params, name)
            values.append(value if kind in (_int32, ctypes.c_float) else (_int64 * 3)(*value))
        return cls(*values)


_NAME, _LATER_NAME = "prefill_attention_", "prefill_attention_2_14_"
_HEADER = "ATen/native/mps/kernels/PrefillAttention.h"


def _text() -> Text:
    return Text(peer.SOURCE, {"include_dirs": [peer.INCLUDE]})


def _later_text() -> Text:
    """Its kernels get names of their own; nothing else is changed."""
    edited = LATER_TORCH.edited("torch/include", _HEADER, {f'"{_NAME}"': f'"{_LATER_NAME}"'})
    return Text(peer.SOURCE, {"include_dirs": [edited, LATER_TORCH.file("torch/include")]})


def entrants(problem: Problem) -> Iterator[Entrant]:
    if problem.head_dim not in peer.HEAD_DIMS or problem.window:
        return
    q, k, v, _ = problem.operands("meta").values()
    plan = peer.prefill(q, k, v, q, problem.scale, problem.causal)
    buffers = {peer.BUFFERS[name]: name for name in ("q", "k", "v", "out")}
    index = peer.BUFFERS["params"]
    for later in (False, True):
        params = LaterParams.of(plan.params) if later else plan.params
        step = Step(
            "forward",
            plan.name.replace(_NAME, _LATER_NAME) if later else plan.name,
            plan.groups,
            plan.threads,
            buffers,
            ("out",),
            (index, params),
            _later_text if later else _text,
        )
        release = LATER_TORCH.version if later else INSTALLED
        yield Entrant(
            "PyTorch", release.rpartition(".")[0], False, (step,), rounded_query=not later
        )
