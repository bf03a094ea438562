"""A slice of `make fuzz`, and every example that has failed once."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.examples import Example, check, examples, is_known
from hypothesis import HealthCheck, given, settings

REGRESSIONS = sorted((Path(__file__).parent / "fuzz" / "regressions").glob("*.json"))


NOT_MENDED = ("43f6271889da",)
"""See `is_known`."""


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda p: p.stem)
def test_regression(path: Path, request: pytest.FixtureRequest):
    example = Example.from_json(path.read_text())
    if path.stem not in NOT_MENDED:
        check(example)
        return
    request.applymarker(pytest.mark.xfail(strict=True, raises=AssertionError, reason="not mended"))
    try:
        check(example)
    except AssertionError as error:
        if is_known(example, error):
            raise
        pytest.fail(f"not what is known: {error}", pytrace=False)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(example=examples())
def test_every_argument(example: Example):
    assert check(Example.from_json(example.to_json())) in ("metal", "reference")
