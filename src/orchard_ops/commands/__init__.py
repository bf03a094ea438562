"""What people run: ``python -m orchard_ops bench``, ``demo`` and ``selftest``.

Only this folder imports `rich` and `matplotlib`; the package itself needs nothing but torch.
"""
