"""The Metal kernels, compiled to PTX, on an NVIDIA GPU. See README.md."""
