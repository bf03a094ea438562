"""The machine's name and what else a reader needs to compare two results."""

from __future__ import annotations

import os
import platform
import re
import sys

import torch

from ..place import Place, chip, sysctl, system

Description = dict[str, str | int | float]


def describe(place: Place) -> Description:
    """Chip, system, versions, and where in the machine it ran."""
    import orchard_ops

    description: Description = {
        "machine": chip(),
        "device": place.device.type,
        "kind": place.kind,
        "system": system(),
        "cpu_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),  # before the run: who else is busy
        "torch": torch.__version__,
        "python": platform.python_version(),
        "orchard_ops": orchard_ops.__version__,
    }
    if sys.platform == "darwin":
        description["memory_gib"] = int(sysctl("hw.memsize") or 0) >> 30
    if place.kind == "apple_gpu":
        description["gpu_cores"] = torch.backends.mps.get_core_count()
    return description


def where(machine: Description) -> str:
    """In one line: what a figure must say."""
    threads = machine["cpu_threads"]
    device = {
        "apple_gpu": f"GPU of {machine.get('gpu_cores', '?')} cores",
        "simulated": "SIMULATED mps device: its times say nothing about a Mac",
        "cpu": f"CPU, {threads} thread{'s' * (threads != 1)}; no Metal kernel runs there",
    }[str(machine["kind"])]
    return f"{machine['machine']} ({device}), {machine['system']}, torch {machine['torch']}"


def slug(machine: Description) -> str:
    """For file names: "apple-m2-pro-mps"."""
    suffix = "simulated" if machine["kind"] == "simulated" else machine["device"]
    return re.sub(r"[^a-z0-9]+", "-", f"{machine['machine']} {suffix}".lower()).strip("-")
