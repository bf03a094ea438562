"""`python -m mutation` in tests/proof/: the campaign."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "tests", "tests/proof", "src")]
os.environ.setdefault("SIMULATOR_CACHE", str(ROOT / "build" / "mutation" / "cache"))

from mutation.runner import main  # noqa: E402

sys.exit(main())
