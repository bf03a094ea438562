"""``python -m benchmarks.nvidia.peers`` fetches the packages that hold the peers' kernels."""

from __future__ import annotations

from .packages import ALL

if __name__ == "__main__":
    for package in ALL:
        package.fetch()
        print(package.identity(), flush=True)
