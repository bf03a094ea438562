"""The packages whose kernels are run: ``python -m benchmarks.nvidia.peers`` fetches them.

pip downloads each from the package index into build/peers/, and what is read of it is unpacked
there. Nothing of them is part of this repository, and none is installed.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..paths import ROOT

FOLDER = ROOT / "build" / "peers"
COMMAND = "python -m benchmarks.nvidia.peers"
_MACOS = [f"--platform=macosx_{version}_0_arm64" for version in (15, 14)]


@dataclass(frozen=True)
class Package:
    """A release, the options by which pip finds its file on any machine, and what is unpacked."""

    name: str
    version: str
    options: tuple[str, ...]
    members: tuple[str, ...]
    #: pip asks an sdist for its metadata, which takes its build backend
    backend: str = ""

    @property
    def folder(self) -> Path:
        return FOLDER / f"{self.name}-{self.version}"

    @property
    def is_here(self) -> bool:
        return (self.folder / "DIGEST").exists()

    def file(self, path: str) -> Path:
        """A file of it.

        Raises:
            FileNotFoundError: it was not fetched, or this release has no such file.
        """
        if not self.is_here:
            raise FileNotFoundError(
                f"{self.name} {self.version} is not in {FOLDER}: fetch it with `{COMMAND}`"
            )
        found = self.folder / path
        if not found.exists():
            raise FileNotFoundError(f"{self.name} {self.version} has no {path}")
        return found

    def edited(self, root: str, path: str, changes: dict[str, str]) -> Path:
        """A folder that holds one header with changes, to stand before ``root`` among includes.

        Raises:
            ValueError: this release's header has not what is to be changed.
        """
        text = self.file(f"{root}/{path}").read_text()
        for old, new in changes.items():
            if old not in text:
                raise ValueError(f"{self.name} {self.version}: {path} has no {old!r}")
            text = text.replace(old, new)
        edited = self.folder / "edited" / path
        edited.parent.mkdir(parents=True, exist_ok=True)
        part = edited.with_suffix(f".{os.getpid()}")
        part.write_text(text)
        part.replace(edited)  # another process may be reading it
        return self.folder / "edited"

    def identity(self) -> str:
        """Name, version and the first digits of the archive's digest."""
        return f"{self.name} {self.version} ({self.file('DIGEST').read_text()[:12]})"

    def fetch(self) -> None:
        if self.is_here:
            return
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as name:
            environment = dict(os.environ)
            if self.backend:
                backend = f"{name}/backend"
                _pip(["install", f"--target={backend}", self.backend], environment)
                environment["PYTHONPATH"] = backend
            destination = f"--dest={name}/archive"
            release = f"{self.name}=={self.version}"
            _pip(["download", "--no-deps", *self.options, destination, release], environment)
            (archive,) = Path(name, "archive").iterdir()
            _unpack(archive, self.folder, self.members)
            digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        (self.folder / "DIGEST").write_text(digest)


def _pip(arguments: list[str], environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *arguments]
    subprocess.run(command, check=True, env=environment)


def _unpack(archive: Path, folder: Path, members: tuple[str, ...]) -> None:
    """The members that match one of the patterns; ``*`` matches folders too."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = [n for n in wheel.namelist() if _wanted(n, members)]
            wheel.extractall(folder, names)
        return
    with tarfile.open(archive) as sdist:
        for member in sdist.getmembers():
            _, _, member.name = member.name.partition("/")  # without the folder of the release
            if member.isfile() and _wanted(member.name, members):
                sdist.extract(member, folder, filter="data")


def _wanted(name: str, members: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in members)


_WHEEL = "--only-binary=:all:"
MLX = Package(
    "mlx-metal",
    "0.32.4",
    (_WHEEL, *_MACOS),
    ("mlx/include/mlx/backend/metal/kernels/steel/*",),
)
MLX_MFA = Package(
    "mlx-mfa",
    "2.64.0",
    ("--no-binary=mlx-mfa", "--no-build-isolation"),
    ("csrc/*.cpp", "csrc/*.h*"),
    backend="scikit-build-core",
)
MLX_TRAIN_PERF = Package(
    "mlx-train-perf", "0.9.1", (_WHEEL,), ("mlx_train_perf/attention/kernel/source.py",)
)
LATER_TORCH = Package(
    "torch",
    "2.14.1",
    (_WHEEL, *_MACOS, "--python-version=3.11", "--implementation=cp"),
    ("torch/include/ATen/native/mps/kernels/*Attention.h", "torch/include/c10/metal/*"),
)
ALL = (MLX, MLX_MFA, MLX_TRAIN_PERF, LATER_TORCH)
