"""Time and memory of the op beside PyTorch's SDPA. `python -m orchard_ops bench` is command.py.

Nothing else is imported here: the command line asks `cases` and `contenders` for its choices.
"""
