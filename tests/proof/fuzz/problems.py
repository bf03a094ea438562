"""The kinds of calls that are drawn, and how an example that was kept is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st

from .caches import CacheExample, cache_examples, check_cache
from .examples import Example, check, examples
from .flex import FlexExample, check_flex, flex_examples
from .pages import PagesExample, check_pages, pages_examples
from .trees import TreesExample, check_trees, trees_examples

AnyExample = Example | CacheExample | PagesExample | FlexExample | TreesExample


class Problem(NamedTuple):
    examples: Callable[[], st.SearchStrategy[Any]]
    check: Callable[[Any], str]
    """Runs a call and judges it; which path it took."""
    batch: int = 100
    """Examples between two looks at the clock."""


PROBLEMS = {
    "attention": Problem(examples, check),
    "cache": Problem(cache_examples, check_cache),
    "pages": Problem(pages_examples, check_pages),
    "flex": Problem(flex_examples, check_flex),
    "trees": Problem(trees_examples, check_trees, 10),
}
"""flash_attn with its gradients, flash_attn_with_kvcache, flash_attn_varlen_func with pages,
flex_attention with its gradients, and the Metal text of functions (by the engine of the simulator).
"""
_KINDS: dict[str, Any] = {
    "cache": CacheExample,
    "pages": PagesExample,
    "flex": FlexExample,
    "trees": TreesExample,
}


def name_of(example: AnyExample) -> str:
    return next((name for name, kind in _KINDS.items() if type(example) is kind), "attention")


def from_json(text: str) -> AnyExample:
    fields = json.loads(text)
    name = fields.pop("problem", "attention")
    if name == "attention":
        return Example.from_json(text)
    return _KINDS[name].from_fields(fields)


def check_any(example: AnyExample) -> str:
    return PROBLEMS[name_of(example)].check(example)


__all__ = ["PROBLEMS", "AnyExample", "check_any", "from_json", "name_of"]
