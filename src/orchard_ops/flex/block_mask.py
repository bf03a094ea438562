"""Stand-in."""

import torch


def block_states(n, i, fn, fi, nq, nk):
    out = torch.zeros((*n.shape[:2], nq, nk), dtype=torch.uint8, device=n.device)
    for v, a, b in ((1, n, i), (2, fn, fi)):
        if a is None:
            continue
        a, b = a[:, :, :nq], b[:, :, :nq]
        ar = torch.arange(b.shape[-1], device=n.device)
        valid = ar < a[..., None]
        idx = torch.where(valid, b, nk).long()
        pad = torch.zeros((*n.shape[:2], nq, nk + 1), dtype=torch.uint8, device=n.device)
        pad = pad.scatter(-1, idx, torch.full_like(idx, v, dtype=torch.uint8))
        out = torch.maximum(out, pad[..., :nk])
    return out
