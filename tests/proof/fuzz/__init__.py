"""Random calls of the public functions, every argument, against float64: `make fuzz`."""
