"""Types of the command line's arguments. argparse names the option, the value and the type."""

from __future__ import annotations

LARGEST = 2**31 - 1
"""The largest length, count or size that is taken, which is far beyond what fits any machine."""


def positive_integer(text: str) -> int:
    number = int(text)
    if not 1 <= number <= LARGEST:
        raise ValueError(text)
    return number


def whole_number(text: str) -> int:
    number = int(text)
    if not 0 <= number <= LARGEST:
        raise ValueError(text)
    return number


def mebibytes(text: str) -> int:
    return whole_number(text)


def gibibytes(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1e6:
        raise ValueError(text)
    return number


def seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e6:
        raise ValueError(text)
    return number


def seed(text: str) -> int:
    """A seed that torch.manual_seed takes."""
    number = int(text)
    if not -(2**63) <= number < 2**64:
        raise ValueError(text)
    return number


def heads(text: str) -> tuple[int, int]:
    """ "32/8": query and key/value heads; "12": 12 of each."""
    num_heads, slash, num_kv_heads = text.partition("/")
    query_heads = positive_integer(num_heads)
    kv_heads = positive_integer(num_kv_heads) if slash else query_heads
    if query_heads % kv_heads:
        raise ValueError(text)
    return query_heads, kv_heads


for _type, _words in {
    positive_integer: "positive integer",
    whole_number: "whole number",
    mebibytes: "whole number of MiB",
    gibibytes: "number of GiB",
    seconds: "positive number",
    seed: "integer from -2^63 to 2^64 - 1",
    heads: "HEADS or HEADS/KV_HEADS",
}.items():
    _type.__name__ = _words  # argparse: "invalid positive integer value: '0'"
