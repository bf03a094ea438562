"""Describes where a run takes place and what its kernels are made from."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from orchard_ops.commands.machine import software


def describe(sources: Path) -> dict[str, object]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        **software(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "sources": json.loads(sources.read_text()),
    }
