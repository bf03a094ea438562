"""``python -m orchard_ops doctor``: is this installation in order, and what runs on Metal here?

It needs nothing but torch, and runs one small attention forward and backward. `selftest` runs every
kernel variant.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .. import native, plan
from ..ops import schema
from ..takeover import switch
from . import endings, kernel_check, machine, probes, variables
from .findings import FAULT, GOOD, NOTE, Finding
from .place import Place, find_place

_OLDEST_MACOS = (14, 0)


@dataclass
class Diagnosis:
    """Everything that the command prints."""

    machine: machine.Description
    findings: list[Finding] = field(default_factory=list)
    takeover: str = ""
    calls: list[probes.Answer] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return all(finding.state != FAULT for finding in self.findings)

    @property
    def verdict(self) -> str:
        faults = [finding.name for finding in self.findings if finding.state == FAULT]
        if faults:
            return f"not in order: {', '.join(faults)}"
        return {
            "apple_gpu": "in order: attention runs on Metal",
            "simulated": "in order: attention runs on the simulated device",
            "cpu": "in order, without an Apple GPU: attention runs on the reference",
        }[str(self.machine["kind"])]

    def as_dict(self) -> dict[str, Any]:
        return {"healthy": self.healthy, "verdict": self.verdict} | asdict(self)

    def __str__(self) -> str:
        lines = [
            f"doctor on {machine.where(self.machine)}",
            f"orchard_ops {self.machine['orchard_ops']}, Python {self.machine['python']}",
            "",
        ]
        for finding in self.findings:
            lines.append(f"{finding.state:>5}  {finding.name}: {finding.found}")
            if finding.remedy:
                lines.append(f"       -> {finding.remedy}")
        lines += ["", f"F.scaled_dot_product_attention: {self.takeover}", ""]
        lines += self._calls()
        lines += ["", self.verdict]
        if not self.healthy:
            lines.append("If this is no help, docs/reporting-a-bug.md says how to report it.")
        return "\n".join(lines)

    def _calls(self) -> list[str]:
        """The calls by where they would run, those of one reason together."""
        if not self.calls:
            return ["which calls would run where: not asked, since the device does not compute"]
        lines = ["which calls would run where:"]
        for path, why in dict.fromkeys((call.path, call.why) for call in self.calls):
            alike = [call.call for call in self.calls if (call.path, call.why) == (path, why)]
            lines += [f"  {path}{f': {why}' if why else ''}", *(f"    {words}" for words in alike)]
        return lines


def run(args: argparse.Namespace) -> int:
    """The command, with arguments as ``__main__`` parses them.

    Returns:
        The exit status: `endings.RIGHT`, or `endings.WRONG` if something is not in order.
    """
    diagnosis = diagnose()
    print(json.dumps(diagnosis.as_dict(), indent=1) if args.json else diagnosis)
    return endings.RIGHT if diagnosis.healthy else endings.WRONG


def diagnose() -> Diagnosis:
    """Looks at everything, whatever an earlier look has found."""
    place = find_place("auto")
    diagnosis = Diagnosis(machine.describe(place), takeover=takeover())
    device = _device(place)
    diagnosis.findings += [_system(), device, _library(place), *variables.findings()]
    if diagnosis.healthy:
        diagnosis.findings.append(_kernels(place))
    else:
        diagnosis.findings.append(Finding("kernels", NOTE, "not run, because of the faults above"))
    if device.state != FAULT or place.kind == "cpu":
        diagnosis.calls = probes.answers(place.device)
    return diagnosis


def takeover() -> str:
    """Whether F.scaled_dot_product_attention is taken over in this process, and how to do it."""
    if switch.active():
        return "taken over on mps"
    return "PyTorch's own, until orchard_ops.enable() or a block of orchard_ops.sdpa()"


def _system() -> Finding:
    """The system and the architecture that torch and the library are made for."""
    found = f"{machine.system()}, {platform.machine()}, torch {torch.__version__}"
    if sys.platform != "darwin":
        return Finding("system", GOOD, found)
    if platform.machine() != "arm64":
        return Finding(
            "system",
            FAULT,
            f"{found}: this Python is built for Intel",
            "install a Python for Apple silicon (arm64) and make the environment anew with it",
        )
    version = tuple(int(part) for part in platform.mac_ver()[0].split(".")[:2])
    if version < _OLDEST_MACOS:
        return Finding("system", FAULT, found, "update to macOS 14 or later")
    return Finding("system", GOOD, found)


def _device(place: Place) -> Finding:
    """Whether there is an mps device, and whether it computes."""
    if place.kind == "cpu":
        if sys.platform != "darwin":
            return Finding("device", NOTE, "no mps device: there is one on Macs alone")
        built = torch.backends.mps.is_built()
        return Finding(
            "device",
            FAULT,
            "this torch finds no mps device",
            "this machine gives no GPU to programs, as virtual machines do: run on the Mac itself"
            if built
            else "this torch is built without mps: install torch from PyPI",
        )
    try:
        answer = str(torch.ones(4, device=place.device).add(1).sum().item())
    except RuntimeError as error:
        answer = str(error).split("\n")[0]
    if answer != "8.0":
        return Finding(
            "device",
            FAULT,
            f"{place.description} does not compute: {answer}",
            "virtual machines show such a device: run on the Mac itself; else restart the Mac",
        )
    return Finding("device", GOOD, place.description)


def _library(place: Place) -> Finding:
    """Whether the native library is loaded and speaks as the package does."""
    missing = native.why_not()
    if missing is None:
        interface = schema.INTERFACE.partition(":")[0].removeprefix("orchard_ops ")
        widths = plan.head_dims()
        return Finding(
            "native library", GOOD, f"loaded, {interface}, head dims in {len(widths)} widths"
        )
    if place.kind == "cpu" and not native.is_expected():
        return Finding("native library", NOTE, missing)
    return Finding(
        "native library",
        FAULT,
        missing,
        "unset ORCHARD_NATIVE_LIBRARY, or build that file again"
        if native.is_overridden()
        else "pip install --force-reinstall --no-deps orchard-ops",
    )


def _kernels(place: Place) -> Finding:
    """One small training step of attention against float64."""
    variant = next(v for v in kernel_check.variants(quick=True) if not v.way)
    impl = "auto" if place.kind == "cpu" else "metal"
    outcome = kernel_check.check(variant, place.device, impl)
    where = "the reference" if place.kind == "cpu" else "Metal"
    if outcome.passed:
        return Finding("kernels", GOOD, f"{variant} on {where} agrees with float64")
    return Finding(
        "kernels",
        FAULT,
        f"{variant} on {where}: {outcome.message}",
        "run python -m orchard_ops selftest, and report it with both outputs",
    )
