"""Stand-in."""

import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention.flex_attention import _vmap_for_bhqkv


def attend(query, key, value, score_mod, mask_mod, states, q_block, kv_block, scale):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    g = query.shape[1] // max(key.shape[1], 1)
    k, v = (x.repeat_interleave(g, 1) for x in (key, value))
    s = scale * query.to(wide) @ k.to(wide).transpose(-1, -2)
    ix = [torch.arange(n, device=s.device) for n in s.shape]
    with TransformGetItemToIndex():
        if score_mod is not None:
            s = _vmap_for_bhqkv(score_mod, prefix=(0,))(s, *ix).to(wide)
        seen = torch.ones_like(s, dtype=torch.bool)
        if mask_mod is not None:
            seen = _vmap_for_bhqkv(mask_mod, prefix=())(*ix).expand_as(s)
    if states is not None:
        st = states[:, :, ix[2] // q_block][..., ix[3] // kv_block]
        seen = (st == 2) | ((st == 1) & seen)
    s = torch.where(seen, s, -torch.inf)
    out = torch._safe_softmax(s, -1) @ v.to(wide)
    dead = ~seen.any(-1)
    lse = torch.where(dead, -torch.inf, torch.where(dead[..., None], 0.0, s).logsumexp(-1))
    return out.to(query.dtype), lse
