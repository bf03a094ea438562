"""What a call costs the host: `python -m simulator -m benchmarks.host.measure`."""
