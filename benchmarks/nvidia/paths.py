"""Where build.py leaves what prove.py needs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "nvidia"
KERNELS = BUILD / "kernels.zip"
PLANNER = BUILD / "libplanner.so"
SOURCES = BUILD / "sources.json"
RESULTS = ROOT / "benchmarks" / "results" / "nvidia"
