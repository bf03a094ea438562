"""Mutation testing of the Metal kernels and the plan: see docs/mutation.md."""
