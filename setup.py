"""Builds the Metal plugin on a Mac; elsewhere the package is pure Python with the reference."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ON_MAC = sys.platform == "darwin"


class BuildWithPlugin(build_py):
    """Adds the native library to the package directory (in place for editable installs)."""

    def run(self) -> None:
        super().run()
        if not ON_MAC:
            return
        sys.path.insert(0, str(ROOT / "native"))
        import build

        package = ROOT / "src" if self.editable_mode else Path(self.build_lib)
        build.build(package / "orchard_ops" / "liborchard_ops.dylib", ROOT / "build" / "objects")


class PlatformWheel(bdist_wheel):
    """Any Python 3, but one platform: the library has no Python symbols."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not ON_MAC

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "macosx_14_0_arm64") if ON_MAC else super().get_tag()


setup(cmdclass={"build_py": BuildWithPlugin, "bdist_wheel": PlatformWheel})
