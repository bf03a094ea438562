"""Builds the Metal plugin on a Mac; elsewhere the package is pure Python with the reference.

ORCHARD_PREBUILT_LIBRARY names a macOS library built elsewhere: the wheel is then a Mac's, whatever
builds it (tools/macos/pack_wheel.py).
"""

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PREBUILT = os.environ.get("ORCHARD_PREBUILT_LIBRARY")
FOR_MAC = sys.platform == "darwin" or bool(PREBUILT)


class BuildWithPlugin(build_py):
    """Adds the native library to the package directory (in place for editable installs)."""

    def run(self) -> None:
        super().run()
        if not FOR_MAC:
            return
        package = ROOT / "src" if self.editable_mode else Path(self.build_lib)
        library = package / "orchard_ops" / "liborchard_ops.dylib"
        if PREBUILT:
            library.write_bytes(Path(PREBUILT).read_bytes())
            return
        sys.path.insert(0, str(ROOT / "native"))
        import build

        build.build(library, ROOT / "build" / "objects")


class PlatformDistribution(Distribution):
    """Installs as a compiled package where it has the library."""

    def has_ext_modules(self) -> bool:
        return FOR_MAC


class PlatformWheel(bdist_wheel):
    """Any Python 3, but one platform: the library has no Python symbols."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "macosx_14_0_arm64") if FOR_MAC else super().get_tag()


setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithPlugin, "bdist_wheel": PlatformWheel},
)
