"""The kernels whose scores are functions speak Apple's dialect, as test_shader_dialect.py asks."""

from __future__ import annotations

import pytest

pytest.importorskip("simulator", reason="the dialect is checked with the simulator's compiler")

from dialect import check, vocabulary
from dialect.rules import threadgroup_bytes
from mutation.harness import Sources
from mutation.killers import flex
from test_shader_dialect import ACCEPTED

pytestmark = pytest.mark.skipif(
    not vocabulary.headers(), reason="this torch has no Metal headers to compare with"
)

#: For every family, one with captures or a mask: each text has its own functions.
CASES = {
    "flex map: other blocks": False,
    "flex attention_forward: captures": True,
    "flex attention_backward_dq: score and mask": True,
    "flex attention_backward_dkv: other states": True,
    "flex pairs: states": True,
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_wrong_with_the_shaders(name: str):
    (killer,) = (x for x in flex.killers() if x.name == name)
    sources = Sources()
    kernel, _ = killer.kernel(sources)
    functions, start, line = kernel["instantiation"].partition("template [[host_name")
    text, lines = sources.text(killer.family) + functions, [start + line]
    unexpected = [str(f) for f in check(text, lines) if f.message not in ACCEPTED]
    assert not unexpected, "\n".join(unexpected)
    (size,) = threadgroup_bytes(text, lines).values()
    assert (size > 0) == CASES[name] and size <= 32 * 1024
