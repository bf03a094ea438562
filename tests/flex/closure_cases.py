"""What a mod reads, found in the byte code of the Python that runs this file: `python
closure_cases.py closure.py`. It stands in for torch, so that a bare Python is enough.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types


class Tensor:
    def __init__(self, shape=(3,)):
        self.shape, self.dtype, self.device, self.requires_grad = shape, "float32", "mps", False

    def __getitem__(self, index):
        return self


class Module:
    pass


def _stand_in() -> None:
    torch, ops, nn = (types.ModuleType(name) for name in ("torch", "torch._ops", "torch.nn"))
    torch.Tensor, torch.dtype, torch.device = Tensor, type("dtype", (), {}), type("device", (), {})
    ops.OpOverloadPacket, nn.Module = type("OpOverloadPacket", (), {}), Module
    torch._ops, torch.nn = ops, nn
    sys.modules.update({"torch": torch, "torch._ops": ops, "torch.nn": nn})


def _closure(path: str):
    spec = importlib.util.spec_from_file_location("closure", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["closure"] = module
    spec.loader.exec_module(module)
    return module


TABLE, NUMBER = Tensor(), 1.0


def of_globals():
    def mod(score, b, h, q, kv):
        return score + TABLE[h] * NUMBER

    return mod


def of_cells(table, number):
    def mod(score, b, h, q, kv):
        doubled = number * 2
        return score + table[h] * doubled

    return mod


def of_inner_functions(table, number):
    def mod(score, b, h, q, kv):
        def inner(x):
            return x + table[h] * number

        return inner(score) + (lambda x: table[x])(kv)

    return mod


def of_defaults(table, number):
    def mod(score, b, h, q, kv, *, own=table, scale=number):
        return score + own[h] * scale

    return mod


class Owner:
    def __init__(self, table, number):
        self.table, self.number = table, number

    def mod(self, score, b, h, q, kv):
        scale = 2.0
        found = self.table[h] * scale
        x = y = kv
        return score + found * self.number + x - y

    def comprehend(self, score, b, h, q, kv):
        """On one line, as newer Pythons join instructions."""
        return [score for gain in (1, 2) if self.table[h] * self.number * gain]

    def __call__(self, score, b, h, q, kv):
        place = kv if NUMBER else q
        return score + self.table[place] * self.number


def of_owner(table, number):
    owner = Owner(table, number)

    def mod(score, b, h, q, kv):
        return score + owner.table[h] * owner.number

    return mod


MAKERS = {
    "cells": of_cells,
    "inner functions": of_inner_functions,
    "defaults": of_defaults,
    "an object": of_owner,
    "a method": lambda table, number: Owner(table, number).mod,
    "a method with a comprehension": lambda table, number: Owner(table, number).comprehend,
    "an object that is called": Owner,
    "a partial function": lambda table, number: functools.partial(Owner.mod, Owner(table, number)),
}
MAY_BE_REFUSED = ("a partial function", "a method with a comprehension")


def refused_import(score, b, h, q, kv):
    import math

    return score * math.pi


def refused_global(score, b, h, q, kv):
    global NUMBER
    NUMBER = 2.0
    return score


def refused_builtin(score, b, h, q, kv):
    return score * globals()["NUMBER"]


class _Base:
    gain = 2.0


class _Derived(_Base):
    def mod(self, score, b, h, q, kv):
        return score * super().gain


def main(path: str) -> None:
    _stand_in()
    snapshot = _closure(path).snapshot
    one, other, longer = Tensor(), Tensor(), Tensor((4,))
    for name, make in MAKERS.items():
        first, again, number, shape = (
            snapshot(make(*given))
            for given in ((one, 1.0), (other, 1.0), (one, 2.0), (longer, 1.0))
        )
        if first is None and name in MAY_BE_REFUSED:
            continue
        assert first is not None, f"{name}: it is not followed"
        assert first.tensors == (one,) and again.tensors == (other,), f"{name}: its tensor"
        assert first.key == again.key, f"{name}: another tensor of the kind is the same trace"
        assert first.key != number.key, f"{name}: a number has changed"
        assert first.key != shape.key, f"{name}: a shape has changed"
    before = snapshot(of_globals())
    globals()["NUMBER"] = 3.0
    assert before.tensors == (TABLE,) and before.key != snapshot(of_globals()).key, "globals"
    for function in (refused_import, refused_global, refused_builtin, _Derived().mod):
        assert snapshot(function) is None, f"{function}: it is followed"
    print(f"closures are read on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main(sys.argv[1])
