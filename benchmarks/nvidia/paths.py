"""Where build.py leaves what the programs for the GPU need."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "nvidia"
KERNELS = BUILD / "kernels.zip"
PLANNER = BUILD / "libplanner.so"
SOURCES = BUILD / "sources.json"

SPEED = BUILD / "speed"
SPEED_KERNELS = {mode: SPEED / f"{mode}.zip" for mode in ("native", "equal-rate")}
SPEED_PLANNER = SPEED / "libplanner.so"
SPEED_SOURCES = SPEED / "sources.json"

FEATURES = BUILD / "features"
FEATURES_KERNELS = FEATURES / "equal-rate.zip"
FEATURES_PLANNER = FEATURES / "libplanner.so"
FEATURES_SOURCES = FEATURES / "sources.json"

CACHES = BUILD / "caches"
CACHES_KERNELS = CACHES / "kernels.zip"
CACHES_PLANNER = CACHES / "libplanner.so"
CACHES_SOURCES = CACHES / "sources.json"
DECODE_KERNELS = {mode: CACHES / f"{mode}.zip" for mode in ("native", "tensor-cores")}

PEERS = BUILD / "peers"
PEERS_KERNELS = {mode: PEERS / f"{mode}.zip" for mode in ("native", "equal-rate")}
PEERS_PLANNER = PEERS / "libplanner.so"
PEERS_SOURCES = PEERS / "sources.json"

PRODUCTS = BUILD / "products"
PRODUCTS_KERNELS = PRODUCTS / "equal-rate.zip"
PRODUCTS_PLANNER = PRODUCTS / "libplanner.so"
PRODUCTS_SOURCES = PRODUCTS / "sources.json"

FLEX = BUILD / "flex"
FLEX_KERNELS = FLEX / "kernels.zip"
FLEX_SPEED_KERNELS = FLEX / "equal-rate.zip"
FLEX_PLANNER = FLEX / "libplanner.so"
FLEX_SOURCES = FLEX / "sources.json"
FLEX_TEXTS = FLEX / "texts.json"
FLEX_SPEED_TEXTS = FLEX / "timed.json"

RESULTS = ROOT / "benchmarks" / "results" / "nvidia"
