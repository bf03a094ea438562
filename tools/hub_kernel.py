"""Builds what Hugging Face's `kernels` loads: `python tools/hub_kernel.py [--library FILE]`.

OUTPUT (build/hub-kernel by default) becomes the content of a repository of type "kernel":
build/torch-metal/ holds the package, whose ops have a namespace of their own in each version, the
native library as a file of data, and a face with the names that transformers asks for. The variant
is one without an architecture ("noarch"): one library serves torch 2.10 and later and any Python,
and Metal compiles the shaders on the user's machine, so that nothing in it goes by torch's version
or by that of macOS. The same sources and library give the same bytes.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "orchard_ops"
VARIANT = "torch-metal"
NAME = "orchard-ops"
VERSION = 1
"""The version that the Hub counts; it goes up when what the kernel offers changes."""
LEFT_OUT = ("__main__.py", "__pycache__", "commands", "integrations", "testing", "liborchard_ops.*")
"""What is for a person at a terminal, or imports more than torch, which a kernel may not."""

FACE = '''"""Exact attention on Apple GPUs, forward and backward, in memory linear in the lengths.

`flash_attn_func`, `flash_attn_varlen_func` and `flash_attn_with_kvcache` have the arguments of
FlashAttention-2.
"""

from .{package} import (
    KeyRanges,
    __version__,
    explain,
    explain_call,
    flash_attn,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    merge_attentions,
    stats,
)

__all__ = [
    "KeyRanges",
    "__version__",
    "explain",
    "explain_call",
    "flash_attn",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "merge_attentions",
    "stats",
]
'''
CARD = """---
library_name: kernels
license: mit
tags:
- kernel
---

# {name}

Exact attention for PyTorch on Apple GPUs, forward and backward, in memory linear in the lengths.

```python
AutoModelForCausalLM.from_pretrained(..., attn_implementation="<this repository>")
```
"""


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def digest(directory: Path) -> str:
    """Eight hexadecimal digits that stand for the content of a directory."""
    content = hashlib.sha256()
    for path in files_of(directory):
        data = path.read_bytes()
        content.update(f"{path.relative_to(directory)} {len(data)}\n".encode() + data)
    return content.hexdigest()[:8]


def name_the_ops(package: Path, namespace: str) -> None:
    file = package / "namespace.py"
    text, count = re.subn(r'^NAME = ".*"$', f'NAME = "{namespace}"', file.read_text(), flags=re.M)
    if count != 1:
        raise SystemExit(f"{file.name} does not say the namespace of the ops in one line")
    file.write_text(text)


def metadata(variant: Path, identity: str) -> dict[str, object]:
    def digest_of(path: Path) -> str:
        return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()

    files = {str(path.relative_to(variant)): digest_of(path) for path in files_of(variant)}
    return {
        "id": identity,
        "name": NAME,
        "version": VERSION,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "metal"},
        "digest": {"algorithm": "sha256", "files": files},
    }


def build(library: Path, output: Path) -> Path:
    """Makes the repository's content anew and returns the variant's folder."""
    shutil.rmtree(output, ignore_errors=True)
    variant = output / "build" / VARIANT
    package = variant / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns(*LEFT_OUT))
    shutil.copyfile(library, package / f"liborchard_ops{library.suffix}")
    (variant / "__init__.py").write_text(FACE.format(package=PACKAGE.name))
    shutil.copyfile(ROOT / "LICENSE", variant / "LICENSE")
    identity = f"{NAME.replace('-', '_')}_metal_{digest(variant)}"
    name_the_ops(package, identity)
    content = metadata(variant, identity)
    (variant / "metadata.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    (output / "README.md").write_text(CARD.format(name=NAME))
    return variant


def macos_library() -> Path:
    """The macOS library: what a Mac's own installation has, or the one that Linux cross-builds."""
    if sys.platform == "darwin":
        return PACKAGE / "liborchard_ops.dylib"
    sys.path.insert(0, str(ROOT / "tools" / "macos"))
    import cross_compile

    return cross_compile.build()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, help="the native library; by default macOS's")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "hub-kernel")
    arguments = parser.parse_args()
    print(build(arguments.library or macos_library(), arguments.output))


if __name__ == "__main__":
    main()
