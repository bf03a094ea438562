"""The peers' kernels without a GPU: each text, launched on the CPU engine, against float64."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from simulator import engine

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.nvidia import peer, peers, reference  # noqa: E402
from benchmarks.nvidia.driver import Launch  # noqa: E402
from benchmarks.nvidia.peers import contenders, gate, packages  # noqa: E402
from benchmarks.nvidia.peers.problems import Problem, problems  # noqa: E402

# They are downloads, which a test run does not make.
fetched = pytest.mark.skipif(
    not all(package.is_here for package in packages.ALL),
    reason=f"the peers' packages are not in build/peers: `{packages.COMMAND}` fetches them",
)


class Engine:
    """driver.Kernels on the CPU engine: the texts of steps, on CPU tensors."""

    def __init__(self, steps):
        self._steps = steps

    def prepare(self, name, groups, threads, buffers, params):
        text = self._steps[name].text()
        library = engine.compile(text.source, only=[name], **text.options)
        group = (*threads, 1, 1)[:3]
        grid = tuple(n * m for n, m in zip(groups, group))
        value = torch.frombuffer(bytearray(params[1]), dtype=torch.uint8).clone()
        tensors = {**buffers, params[0]: value}

        def start():
            bound = {i: engine.Buffer(x.data_ptr(), x.nbytes, True) for i, x in tensors.items()}
            library.launch(name, grid, group, bound)

        return Launch(name, start)


def small(problem: Problem) -> Problem:
    """Three blocks of 32 rows, one key/value head."""
    return replace(problem, length=96, batch=1, num_heads=problem.group, num_kv_heads=1)


def operands(problem: Problem) -> contenders.Operands:
    """With out and row_stats by float64 mathematics."""
    x = contenders.Operands(problem, "cpu")
    q, k, v, dout = (x.tensors[name] for name in ("q", "k", "v", "dout"))
    exact = reference.attention(q, k, v, dout, None, problem.scoring(), torch.float64)
    log2 = (exact.lse / torch.log(torch.tensor(2.0, dtype=torch.float64))).float()
    x.take(exact.out.to(q.dtype), torch.stack((log2, torch.zeros_like(log2)), -1))
    return x


CASES = {
    f"{p.dtype}-d{p.head_dim}-{p.mask}" + f"-group{p.group}" * (p.group > 1): small(p)
    for p in problems()
    if p.batch == 1
}


@fetched
@pytest.mark.parametrize("case", CASES)
def test_peers_agree_with_float64(case):
    problem = CASES[case]
    x = operands(problem)
    gates = {rounded: gate.Gate(problem, x.tensors, rounded) for rounded in (False, True)}
    found = list(peers.entrants(problem))
    assert {"PyTorch", "MLX"} & {entrant.peer for entrant in found}
    for entrant in found:
        steps = {step.kernel: step for step in entrant.steps}
        contender = contenders.of_entrant(Engine(steps), x, entrant, "both", None)
        contender.start()
        errors, _ = gates[entrant.rounded_query].check(contender.results, strict=False)
        assert errors.keys() >= ({"dq", "dk", "dv"} if entrant.backward else {"out"})
