"""docs/support.md is what the plan, the reference and the compiler answer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import support_matrix  # noqa: E402

TESTS = ROOT / "tests" / "attention"


def test_the_page_is_what_the_script_makes():
    assert support_matrix.PAGE.read_text() == support_matrix.page(), (
        "run tools/support_matrix.py with the native library"
    )


@pytest.mark.parametrize("feature", support_matrix.FEATURES, ids=lambda x: x.name)
def test_its_tests_exist(feature: support_matrix.Feature):
    assert all((TESTS / f"test_{name}.py").exists() for name in feature.tests)


@pytest.mark.parametrize("feature", support_matrix.CACHE_FEATURES, ids=lambda x: x.name)
def test_the_tests_of_caches_exist(feature: support_matrix.CacheFeature):
    assert feature.tests and all((TESTS / f"test_{name}.py").exists() for name in feature.tests)


def test_every_reason_of_the_plan_for_caches_is_listed():
    text = (ROOT / "native" / "plan" / "decode.cpp").read_text()
    found = text[text.index("void refuse_cache(") : text.index("void fill_cache_params(")]
    reasons = {x.split('"')[1] for x in found.splitlines() if "plan.refusal = " in x}
    assert reasons and reasons == {ask().refusal for ask in support_matrix.CACHE_LIMITS}


def test_every_reason_of_the_plan_is_listed():
    """But for those of dtypes that flash_attn casts."""
    text = (ROOT / "native" / "plan" / "refusals.cpp").read_text()
    table = text[text.index("kReasons[]") : text.index("}  // namespace\n\nvoid")]
    reasons = {x.split('"')[1] for x in table.splitlines() if x.startswith('    {"')}
    listed = {support_matrix.plan_of(*call()).refusal for call in support_matrix.LIMITS}
    cast = {
        "attn_mask is of another dtype than bool, float32 and query's",
        "alibi_slopes or sinks are not float32",
    }
    assert reasons - cast == listed
