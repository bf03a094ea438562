"""Families of transformers that choose a class of attention by the name of the implementation.

Falcon, SAM and their kin do not ask the interface that `transformers.py` registers with. Their
modeling files hold a table of classes instead, such as {"eager": A, "sdpa": B}. `serve` has our
name entered there when a model of such a file is made: for the class that calls
F.scaled_dot_product_attention, with that call answered by our attention, or else for the eager one.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

_logger = transformers.utils.logging.get_logger(__name__)

Attend = Callable[..., Any]
"""(module, *arguments of F.scaled_dot_product_attention) -> out"""


def serve(name: str, attend: Attend) -> None:
    """Has tables of classes know `name` from when a model is made. May be called again.

    transformers asks `get_correct_attn_implementation`, a public method of every model, before it
    makes a model's layers; that is where we look at the file that the model is from.
    """
    checked = getattr(PreTrainedModel, "get_correct_attn_implementation", None)
    if checked is None:
        _logger.warning(
            f'attn_implementation="{name}": transformers {transformers.__version__} does not say '
            "when it makes a model; families that choose a class by the name (Falcon, SAM) will "
            'end in a KeyError: leave these at attn_implementation="sdpa" and call '
            "orchard_ops.enable()"
        )
        return
    if hasattr(checked, "_serves_class_tables"):
        return

    @functools.wraps(checked)
    def get_correct_attn_implementation(
        self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if requested_attention == name:
            for table_name, table in tables_of(type(self)):
                _enter(name, attend, self, table_name, table)
        return checked(self, requested_attention, *args, **kwargs)

    get_correct_attn_implementation._serves_class_tables = True  # type: ignore[attr-defined]
    setattr(PreTrainedModel, checked.__name__, get_correct_attn_implementation)


def tables_of(model: type) -> Iterator[tuple[str, dict[str, type[nn.Module]]]]:
    """The tables of attention classes in the files that a class of models is from, by name."""
    files = {kind.__module__: sys.modules.get(kind.__module__) for kind in model.__mro__}
    for file in files.values():
        for name, value in vars(file).items() if file is not None else ():
            if _is_table(value):
                yield name, value


def _is_table(x: Any) -> bool:
    classes = x.values() if isinstance(x, dict) and "eager" in x else ()
    return bool(classes) and all(inspect.isclass(x) and issubclass(x, nn.Module) for x in classes)


def _enter(
    name: str, attend: Attend, model: PreTrainedModel, table_name: str, table: dict[str, Any]
) -> None:
    family = type(model).__name__
    if name not in table:
        table[name] = table["eager"]
        if "sdpa" in table:
            # Where one class is both, it looks at its config to see which it is meant to be.
            table[name] = _answering(attend, table["sdpa"], table["sdpa"] is table["eager"])
    if "sdpa" not in table:
        _logger.warning_once(
            f'attn_implementation="{name}": {family} has attention of its own only '
            f"({table_name} has {sorted(table.keys() - {name})}), which is run as it is: "
            "no Metal kernel, and memory quadratic in the length"
        )
    made = {type(module) for module in model.modules()}  # none while it is made
    others = sorted(kind.__name__ for kind in made & {*table.values()} - {table[name]})
    if others:
        _logger.warning_once(
            f'attn_implementation="{name}": the {", ".join(others)} of {family} were chosen when '
            "the model was made and stay: load the model with "
            f'attn_implementation="{name}", or call orchard_ops.enable()'
        )


@functools.cache
def _answering(attend: Attend, stock: Any, looks_at_config: bool) -> type[nn.Module]:
    """The class that calls F.scaled_dot_product_attention, which `attend` answers."""

    class Answered(stock):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(_AsSdpa(config) if looks_at_config else config, *args, **kwargs)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with _Answer(attend, self):
                return super().forward(*args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            """A class that is made has no name to load it by: its maker has one."""
            _, _, *state = super().__reduce_ex__(max(2, protocol))
            return (_blank, (attend, stock, looks_at_config), *state)

    Answered.__name__ = Answered.__qualname__ = f"Orchard{stock.__name__}"
    return Answered


def _blank(attend: Attend, stock: Any, looks_at_config: bool) -> nn.Module:
    """A module whose state is yet to come, of a class that may be made anew."""
    kind = _answering(attend, stock, looks_at_config)
    return kind.__new__(kind)


class _Answer(TorchFunctionMode):
    """Within its block F.scaled_dot_product_attention is another function's call."""

    def __init__(self, attend: Attend, module: nn.Module) -> None:
        super().__init__()
        self.attend, self.module = attend, module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return self.attend(self.module, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _AsSdpa:
    """A configuration in which the implementation is "sdpa"; all else is that of another one."""

    _attn_implementation = "sdpa"

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # while a copy is being made
            raise AttributeError(name)
        return getattr(self._config, name)
