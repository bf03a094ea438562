"""Random calls of the public op, every argument, against float64: `make fuzz`."""
