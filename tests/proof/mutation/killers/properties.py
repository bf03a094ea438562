"""What tests that are written out share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..harness import Guarded, Sources, launch, with_seed
from .attention import F32, Attention, dense
from .compiled import compile_kernel


@dataclass(frozen=True)
class Property:
    """A test that is written out below."""

    name: str
    family: str | None
    test: Callable[..., None]
    beside: tuple[str, ...] = ()  # other families whose kernels it launches from the sources

    def run(self, sources: Sources, note: Callable[[str], None] = lambda _: None) -> None:
        self.test(sources, note) if self.family else self.test(sources)


@dataclass(frozen=True)
class Given(Attention):
    """As Attention with given operands; the test compares the results."""

    operands: tuple[Tensor, ...] = ()

    def results(self, sources: Sources, note: Callable[[str], None], inputs: dict[str, Tensor],
                out: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:  # fmt: skip
        x = {name: Guarded.like(t, "dense") for name, t in inputs.items() if t.dim() == 4}
        x.setdefault("out", x["query"])
        x.setdefault("dout", x["query"])
        kernel, params = self._plan(sources, x)
        library = compile_kernel(sources, self.family, kernel, self.check)
        note("compiled")
        x |= {name: Guarded.like(t[None], "dense") for name, t in inputs.items() if t.dim() == 3}
        results = {
            n: Guarded(s, dense(s), F32 if n == "row_stats" else self.case.dtype)
            for n, s in out.items()
        }
        strides = {n: dense(s) for n, s in out.items() if n != "row_stats"}
        block = with_seed(params, **strides)
        launch(library, kernel, sources.buffers, block, {n: x[n] for n in x if n not in out},
               results, workers=1)  # fmt: skip
        return {name: y.tensor for name, y in results.items()}
