"""What people run: ``python -m orchard_ops doctor``, ``plan``, ``selftest``, ``bench``, ``demo``.

Only this folder imports `rich` and `matplotlib`; the package itself, ``doctor`` and ``plan`` need
nothing but torch.
"""
