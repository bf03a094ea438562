"""The repository that `make hub-kernel` builds, with this machine's library in it."""

import os
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
LIBRARY = (
    ROOT / "src" / "orchard_ops" / "liborchard_ops.dylib"
    if sys.platform == "darwin"
    else ROOT / "build" / "native" / "liborchard_ops.so"
)

folder = Path(tempfile.mkdtemp())
runpy.run_path(str(ROOT / "tools" / "hub_kernel.py"))["build"](LIBRARY, folder)
os.environ["LOCAL_KERNELS"] = f"nobody/orchard-ops={folder}"
