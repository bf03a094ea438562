"""Runs a Python program with the simulated device enabled.

    python -m simulator [--check] [--strict] [--set-arg-bytes] SCRIPT [arguments...]
    python -m simulator [...] -m MODULE [arguments...]
    python -m simulator [...] -c CODE [arguments...]

--check          have the engine check memory accesses, races and so on
--strict         refuse aten operators that have no MPS kernel on a Mac
--set-arg-bytes  provide the C shim torch_mps_set_arg_bytes of torch 2.14
"""

from __future__ import annotations

import os
import runpy
import sys
import types

import simulator

_OPTIONS = {"--check", "--strict", "--set-arg-bytes"}


def main(arguments: list[str]) -> None:
    options = set()
    while arguments and arguments[0] in _OPTIONS:
        options.add(arguments.pop(0))
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(__doc__.strip())
    if arguments[0].startswith("-") and (arguments[0] not in ("-m", "-c") or len(arguments) < 2):
        sys.exit(f"simulator: cannot understand {' '.join(arguments)!r}\n\n{__doc__.strip()}")

    simulator.enable(check="--check" in options, set_arg_bytes="--set-arg-bytes" in options)
    if "--strict" in options:
        simulator.strict()

    # From here on this does what `python -m`, `python -c` and `python SCRIPT` do.
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        main_module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), main_module.__dict__)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
