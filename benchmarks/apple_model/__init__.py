"""Predicts the speed of kernels on Apple GPUs from exact counts; see docs/apple-model.md."""
