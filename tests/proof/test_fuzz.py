"""A slice of `make fuzz`, and every example that has failed once."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.caches import CacheExample
from fuzz.examples import Example
from fuzz.flex import FlexExample
from fuzz.pages import PagesExample
from fuzz.problems import PROBLEMS, AnyExample, check_any, from_json
from fuzz.trees import TreesExample
from hypothesis import HealthCheck, given, settings

REGRESSIONS = sorted((Path(__file__).parent / "fuzz" / "regressions").glob("*.json"))


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda p: p.stem)
def test_regression(path: Path):
    check_any(from_json(path.read_text()))


SLICE = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


def check_as_kept(example: AnyExample) -> None:
    """A failing example can be kept and read again."""
    read = from_json(example.to_json())
    assert read == example
    assert check_any(read) in ("metal", "reference", "refused")


@settings(max_examples=100, **SLICE)
@given(example=PROBLEMS["attention"].examples())
def test_every_argument(example: Example):
    check_as_kept(example)


@settings(max_examples=10, **SLICE)
@given(example=PROBLEMS["cache"].examples())
def test_every_argument_of_a_cache(example: CacheExample):
    check_as_kept(example)


@settings(max_examples=10, **SLICE)
@given(example=PROBLEMS["pages"].examples())
def test_every_argument_with_pages(example: PagesExample):
    check_as_kept(example)


@settings(max_examples=5, **SLICE)
@given(example=PROBLEMS["flex"].examples())
def test_every_argument_of_flex_attention(example: FlexExample):
    check_as_kept(example)


@settings(max_examples=1, **SLICE)
@given(example=PROBLEMS["trees"].examples())
def test_trees_of_operations(example: TreesExample):
    check_as_kept(example)
