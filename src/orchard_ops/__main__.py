"""``python -m orchard_ops``: commands for people. Each one imports what it needs when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .commands import endings
from .commands.arguments import (
    gibibytes,
    heads,
    mebibytes,
    positive_integer,
    seconds,
    seed,
    whole_number,
)

_STATUS = (
    "Exit status 0: {right}; 1: {wrong}; 2: it cannot run here or as asked; 3: the command itself "
    "failed; 130: interrupted; 141: its output was closed. What is done by then is kept."
)


def _bench(args: argparse.Namespace) -> int:
    from .commands.bench.command import run

    return run(args)


def _demo(args: argparse.Namespace) -> int:
    from .commands.demo import run

    return run(args)


def _doctor(args: argparse.Namespace) -> int:
    from .commands.doctor import run

    return run(args)


def _plan(args: argparse.Namespace) -> int:
    from .commands.plan_length import run

    return run(args)


def _selftest(args: argparse.Namespace) -> int:
    from .commands.selftest import run

    return run(args)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "mps", "cpu"),
        default="auto",
        help="auto: mps where there is one, else the reference on the cpu",
    )


def _case_in_words(problem: Any, lengths: Sequence[int] | None) -> str:
    """ "gpt2: B1 H12 D64 causal L1024"; without lengths if it takes the device's."""
    shape = problem.series.rsplit(" ", 1)[0]
    return shape if lengths is None else f"{shape} L{', '.join(map(str, lengths))}"


def _add_bench(commands: Any) -> None:
    from .commands.bench.cases import DTYPES, LENGTHS_OF, MASKS, MODES, PRESETS
    from .commands.bench.contenders import SDPA, SDPA_MATH

    parser = commands.add_parser(
        "bench",
        help="time and memory of the op beside SDPA on this machine",
        description="Measures forward and training (forward and backward) through the op and "
        "through F.scaled_dot_product_attention in turns, after the op's result has passed against "
        "float64. Writes CSV, JSON and plots. "
        + _STATUS.format(right="measured", wrong="a result is wrong or a call failed"),
    )
    _add_device(parser)
    parser.add_argument("--quick", action="store_true", help="one series, two lengths, few rounds")
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=tuple(PRESETS),
        metavar="NAME",
        help="kinds of attention or models, by their public configs: "
        + "; ".join(_case_in_words(p, LENGTHS_OF.get(name)) for name, p in PRESETS.items()),
    )
    parser.add_argument("--lengths", nargs="+", type=positive_integer, metavar="L")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=MODES)
    parser.add_argument(
        "--heads",
        nargs="+",
        type=heads,
        metavar="H/HKV",
        help="instead of the case's: 12 or 32/8",
    )
    parser.add_argument("--head-dims", nargs="+", type=positive_integer, metavar="D")
    parser.add_argument("--masks", nargs="+", choices=MASKS)
    parser.add_argument("--batch", type=positive_integer, default=1, help="default: %(default)s")
    parser.add_argument(
        "--against",
        nargs="+",
        choices=(SDPA, SDPA_MATH),
        default=(SDPA,),
        help=f"{SDPA}: whatever PyTorch chooses; {SDPA_MATH}: its unfused math path "
        f"(default: {SDPA})",
    )
    parser.add_argument(
        "--tiles",
        nargs="*",
        metavar="NAME",
        help="also the forward in its other tiles, all or those of these names (* and ? as in "
        "file names), and which is the fastest; measures forward unless --modes says more",
    )
    parser.add_argument(
        "--scratch",
        nargs="+",
        type=mebibytes,
        metavar="MB",
        help="also training with these budgets for the backward's scratch, 0 being the low-memory "
        "mode; measures training unless --modes says more",
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        help="time budget of a case (default: 3; 0.5 with --quick)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for the files, named after the machine (default: bench-output)",
    )
    parser.add_argument(
        "--save",
        metavar="FILE",
        help="also a report to send in, after every case: figures, chip and versions, nothing "
        "personal (benchmarks/results/community)",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="measure nothing, make the plots of this JSON file again"
    )
    parser.set_defaults(name="bench", command=_bench)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a small GPT through the op beside the same model through SDPA",
        description="Trains a byte-level GPT with grouped-query attention and attention dropout on "
        "the source of Python's standard library through torch.ops.orchard.flash_attn, beside the "
        "same model on the cpu through SDPA with the same dropout masks, and compares the losses "
        "at every step. "
        + _STATUS.format(right="they agree", wrong="they differ, or calls fell back"),
    )
    parser.add_argument("--steps", type=positive_integer, default=300, help="default: %(default)s")
    _add_device(parser)
    parser.add_argument(
        "--output",
        default="demo-output",
        metavar="DIR",
        help="folder for the figure, loss.png (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write every figure of the run to FILE")
    parser.add_argument(
        "--sample-bytes",
        type=positive_integer,
        default=240,
        metavar="N",
        help="length of the text sampled in the end (default: %(default)s)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.set_defaults(name="demo", command=_demo)


def _add_selftest(commands: Any) -> None:
    parser = commands.add_parser(
        "selftest",
        help="compare every kernel variant with float64 on this machine",
        description="Runs every kernel variant forward and backward, twice, and compares with "
        "float64 on the cpu. " + _STATUS.format(right="all are right", wrong="some are not"),
    )
    _add_device(parser)
    parser.add_argument("--quick", action="store_true", help="one variant per dtype")
    parser.add_argument(
        "--report",
        default="orchard-selftest.json",
        metavar="FILE",
        help="where the report goes (default: %(default)s)",
    )
    parser.set_defaults(name="selftest", command=_selftest)


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="is this installation in order, and what runs on Metal here?",
        description="Looks at versions, device, native library and environment, runs one small "
        "attention forward and backward, and lists which calls would run on Metal and why others "
        "would not. Takes about two seconds. "
        + _STATUS.format(right="all is in order", wrong="something is not, with what to do"),
    )
    parser.add_argument("--json", action="store_true", help="print JSON, to attach to an issue")
    parser.set_defaults(name="doctor", command=_doctor)


def _add_plan(commands: Any) -> None:
    from .training_memory import ITEMSIZE

    parser = commands.add_parser(
        "plan",
        help="how long a sequence fits into memory in training",
        description="Computes the memory that attention takes in a training step, beside "
        "F.scaled_dot_product_attention, whose math path keeps the scores of every layer, and the "
        "longest sequence that fits. Runs nothing.",
    )
    parser.add_argument("--layers", type=positive_integer, required=True)
    parser.add_argument(
        "--heads", type=heads, required=True, metavar="H/HKV", help="such as 12 or 32/8"
    )
    parser.add_argument("--head-dim", type=positive_integer, required=True, metavar="D")
    parser.add_argument(
        "--dtype", choices=tuple(ITEMSIZE), default="bfloat16", help="default: %(default)s"
    )
    parser.add_argument("--batch", type=positive_integer, default=1, help="default: %(default)s")
    parser.add_argument("--full", action="store_true", help="not causal")
    parser.add_argument(
        "--checkpoint",
        action="store_true",
        help="each layer is checkpointed, so that only its input is kept",
    )
    parser.add_argument(
        "--ram",
        type=gibibytes,
        metavar="GIB",
        help="memory (default: what Metal recommends as the most, or this machine's)",
    )
    parser.add_argument(
        "--reserved",
        type=gibibytes,
        default=0.0,
        metavar="GIB",
        help="of it for weights, gradients, optimizer and everything else (default: 0)",
    )
    parser.add_argument(
        "--rest-per-token",
        type=whole_number,
        default=0,
        metavar="BYTES",
        help="what the rest of a layer keeps for each token (default: 0)",
    )
    parser.add_argument(
        "--scratch",
        type=mebibytes,
        metavar="MB",
        help="the backward's scratch (default: ORCHARD_BACKWARD_SCRATCH_MB, or what a machine of "
        "that memory has)",
    )
    parser.add_argument("--lengths", nargs="+", type=positive_integer, metavar="L")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(name="plan", command=_plan)


def build_parser() -> argparse.ArgumentParser:
    """The command line. Its parsers set `command`: from parsed arguments to an exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m orchard_ops", description="Exact attention for PyTorch on Apple GPUs."
    )
    commands = parser.add_subparsers(title="commands")
    for add in (_add_doctor, _add_plan, _add_selftest, _add_bench, _add_demo):
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "command"):
        parser.print_help()
        return 0
    return endings.exit_status(args.name, lambda: args.command(args))


if __name__ == "__main__":
    sys.exit(main())
