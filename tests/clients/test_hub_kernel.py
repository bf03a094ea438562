"""The kernel for the Hub: loaded offline by `kernels`, and by transformers through it."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernels._rust import Digest, DigestAlgorithm, Metadata

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "nobody/orchard-ops"
START = """
import json, sys
if sys.platform != "darwin":
    import simulator
    simulator.enable()
import torch
"""


def tool():
    spec = importlib.util.spec_from_file_location("hub_kernel", ROOT / "tools" / "hub_kernel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def library() -> Path:
    inside = ROOT / "src" / "orchard_ops" / "liborchard_ops.dylib"
    return inside if sys.platform == "darwin" else ROOT / "build/native/liborchard_ops.so"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make hub-kernel` builds, with this machine's library in it."""
    directory = tmp_path_factory.mktemp("hub")
    tool().build(library(), directory)
    return directory


def run(program: str, **kernels: Path) -> dict:
    """The JSON that a program prints; `kernels` are local ones, nobody/<name>."""
    entries = (f"nobody/{name.replace('_', '-')}={path}" for name, path in kernels.items())
    variables = {
        "LOCAL_KERNELS": ":".join(entries),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:orchard", "-c", START + program],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_layout(repository: Path):
    variant = repository / "build" / "torch-metal"
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert metadata.name.python_name == "orchard_ops" and metadata.version == 1
    assert str(metadata.backend.backend_type) in ("metal", "Metal")
    assert metadata.python_depends == [] and metadata.license == "MIT"
    files = dict(Digest.hash_variant(DigestAlgorithm.SHA256, variant).files)
    files.pop("metadata.json", None)
    assert files == metadata.digest.files
    assert (variant / "orchard_ops" / library().name).read_bytes() == library().read_bytes()


def test_it_imports_itself_and_torch(repository: Path):
    allowed = {"torch", *sys.stdlib_module_names}
    for path in repository.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, path


def test_it_names_no_op_of_the_installed_package(repository: Path):
    for path in repository.rglob("*.py"):
        code = [ast.unparse(x) for x in ast.walk(ast.parse(path.read_text())) if _names_an_op(x)]
        assert not code, f"{path.name}: {code}; namespace.OPS has the ops"


def _names_an_op(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return ast.unparse(node) == "torch.ops.orchard"
    arguments = node.args if isinstance(node, ast.Call) else []
    texts = [x.value for x in arguments if isinstance(x, ast.Constant)]
    registers = isinstance(node, ast.Call) and "register" in ast.unparse(node.func)
    return registers and any(str(text).startswith("orchard::") for text in texts)


def test_the_same_sources_give_the_same_bytes(repository: Path, tmp_path: Path):
    tool().build(library(), tmp_path)
    again = "build/torch-metal/metadata.json"
    assert (tmp_path / again).read_bytes() == (repository / again).read_bytes()


def test_versions_and_the_installed_package_share_a_process(repository: Path, tmp_path: Path):
    """Each registers its ops under a name of its own and counts its own calls."""
    other = Path(shutil.copytree(ROOT / "src" / "orchard_ops", tmp_path / "orchard_ops"))
    (other / "_version.py").write_text('__version__ = "0.0.1"\n')
    second = tool()
    second.PACKAGE = other
    second.build(library(), tmp_path / "second")
    program = f"""
from kernels import get_kernel
import orchard_ops
first = get_kernel("{REPOSITORY}", version=1)
second = get_kernel("nobody/second", version=1)
q = torch.randn(1, 9, 2, 16, device="mps", requires_grad=True)
outs = []
for n, module in enumerate((first, second, orchard_ops), start=1):
    for _ in range(n):
        out = module.flash_attn_func(q, q, q, causal=True)
        out.sum().backward()
    outs.append(out.cpu())
print(json.dumps({{
    "metal": [m.stats().metal for m in (first, second, orchard_ops)],
    "versions": [second.__version__, first.__version__ == orchard_ops.__version__],
    "namespaces": len({{first.__name__, second.__name__, "orchard"}}),
    "registered": all(hasattr(getattr(torch.ops, m.__name__), "flash_attn_fwd")
                      for m in (first, second)),
    "same": all(torch.equal(x, outs[0]) for x in outs),
}}))
"""
    found = run(program, orchard_ops=repository, second=tmp_path / "second")
    counts = [{"flash_attn_fwd": n, "flash_attn_bwd": n} for n in (1, 2, 3)]
    assert found == {
        "metal": counts,
        "versions": ["0.0.1", True],
        "namespaces": 3,
        "registered": True,
        "same": True,
    }


GENERATED = f"""
from kernels import get_kernel
kernel = get_kernel("{REPOSITORY}", version=1)
torch.manual_seed(0)
q, k, v = (torch.randn(2, 24, heads, 16, device="mps") for heads in (4, 2, 2))
whole = kernel.flash_attn_func(q, k, v, causal=True)
pages = [torch.full((8, 16, 2, 16), float("nan"), device="mps") for _ in range(2)]
table = torch.tensor([[5, 2], [0, 7]], dtype=torch.int32, device="mps")
lengths = torch.zeros(2, dtype=torch.int32, device="mps")
parts = []
for begin, end in ((0, 20), (20, 21), (21, 24)):
    part = slice(begin, end)
    parts.append(kernel.flash_attn_with_kvcache(
        q[:, part], *pages, k[:, part], v[:, part], cache_seqlens=lengths, block_table=table,
        causal=True,
    ))
    lengths += end - begin
stats = kernel.stats()
explained = kernel.explain_call(
    kernel.flash_attn_with_kvcache, q[:, :1], *pages, cache_seqlens=lengths, block_table=table
)
print(json.dumps({{
    "error": (torch.cat(parts, 1) - whole).abs().max().item(),
    "metal": stats.metal,
    "reference": stats.reference,
    "path": explained.path,
    "listed": "flash_attn_with_kvcache" in kernel.__all__,
    "installed": "orchard_ops" in sys.modules,
}}))
"""


def test_generation_from_a_cache(repository: Path):
    """By FlashAttention-2's name, with the kernels of the repository: none is installed there."""
    found = run(GENERATED, orchard_ops=repository)
    assert found.pop("error") < 1e-5
    assert found == {
        "metal": {"flash_attn_fwd": 2, "flash_attn_bwd": 0, "flash_attn_decode": 2},
        "reference": {},
        "path": "metal",
        "listed": True,
        "installed": False,
    }


TRAINED = f"""
# transformers 5.24 asks for kernels 0.18.2. What it calls of it has been there before, so that an
# older release serves here where the index has no newer one.
from importlib import metadata
version_of = metadata.version
metadata.version = lambda name: "0.18.2" if name == "kernels" else version_of(name)
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)
torch.manual_seed(0)
model = LlamaForCausalLM(config).to("mps")
tokens = torch.randint(64, (2, 19), device="mps")
mask = torch.ones_like(tokens)
mask[1, 12:] = 0
labels = tokens.masked_fill(mask == 0, -100)

def step(name):
    model.set_attn_implementation(name)
    model.zero_grad()
    model(tokens, attention_mask=mask if PADDED else None, labels=labels).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).cpu()

expected, found = step("eager"), step("{REPOSITORY}")
(kernel,) = (
    module for name, module in sys.modules.items()
    if name.startswith("orchard_ops_metal") and "." not in name
)
stats = kernel.stats()
print(json.dumps({{
    "error": ((found - expected).abs().max() / expected.abs().max()).item(),
    "metal": stats.metal,
    "reference": stats.reference,
}}))
"""


@pytest.mark.parametrize("padded", (False, True), ids=("whole", "padded"))
def test_transformers_trains_with_it(repository: Path, padded: bool):
    found = run(TRAINED.replace("PADDED", str(padded)), orchard_ops=repository)
    assert found["error"] < 1e-4
    assert found["metal"] == {"flash_attn_fwd": 2, "flash_attn_bwd": 2}
    assert found["reference"] == {}
