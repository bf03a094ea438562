"""The machine in words, for every command: what a reader needs to compare two results."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from .. import native
from .place import Place

Description = dict[str, str | int | float]


def sysctl(name: str) -> str:
    """A value of macOS, or "" if it has none of this name."""
    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def chip() -> str:
    """The chip's name, such as "Apple M2 Pro", or the model of the CPU."""
    if sys.platform == "darwin":
        return sysctl("machdep.cpu.brand_string") or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def system() -> str:
    """The system's name, with the version on a Mac ("macOS 15.5") and without it elsewhere, where
    the release of the kernel would tell which host this is."""
    return f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.system()


def memory_bytes() -> int:
    """The machine's memory; 0 if the system does not say."""
    if sys.platform == "darwin":
        return int(sysctl("hw.memsize") or 0)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


def software() -> Description:
    """The versions that a result depends on, and whether there are Metal kernels."""
    import orchard_ops

    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "orchard_ops": orchard_ops.__version__,
        "native_library": native.why_not() or "loaded",
    }


def host() -> Description:
    """Chip, system, threads, load and versions: what does not depend on the device."""
    description: Description = {
        "machine": chip(),
        "architecture": platform.machine(),
        "system": system(),
        "cpus": os.cpu_count() or 1,
        "cpu_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),  # before the run: who else is busy
        **software(),
    }
    memory = memory_bytes()
    if memory:
        description["memory_gib"] = memory >> 30
    model = sysctl("hw.model") if sys.platform == "darwin" else ""
    if model:
        description["model"] = model
    return description


def describe(place: Place) -> Description:
    """The host, and the device of it on which the run takes place."""
    description = host() | {
        "device": place.device.type,
        "kind": place.kind,
        "description": place.description,
    }
    if place.kind == "apple_gpu":
        description["gpu_cores"] = torch.backends.mps.get_core_count()
    return description


def where(machine: Description) -> str:
    """One line about the machine, which every figure carries."""
    threads = machine["cpu_threads"]
    device = {
        "apple_gpu": f"GPU of {machine.get('gpu_cores', '?')} cores",
        "simulated": "SIMULATED mps device: its times say nothing about a Mac",
        "cpu": f"CPU, {threads} thread{'s' * (threads != 1)}; no Metal kernel runs there",
    }[str(machine["kind"])]
    return f"{machine['machine']} ({device}), {machine['system']}, torch {machine['torch']}"


def slug(machine: Description) -> str:
    """The machine's name in file names, such as "apple-m2-pro-mps"."""
    suffix = "simulated" if machine["kind"] == "simulated" else machine["device"]
    return re.sub(r"[^a-z0-9]+", "-", f"{machine['machine']} {suffix}".lower()).strip("-")
