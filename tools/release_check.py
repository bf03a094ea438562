"""Whether a tag may become a release: `release_check.py v0.1.0`.

The tag must be the version of the package, and the changelog must have a section for it, which for
a development release (0.1.0.dev3) or a candidate (0.1.0rc1) may still be "Unreleased (0.1.0)". Any
other release has whole proofs of its kernels: no mutant is open, no problem of the GPU's is left.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)((\.dev|rc)(0|[1-9]\d*))?")


def package_version(root: Path) -> str:
    text = (root / "src" / "orchard_ops" / "_version.py").read_text()
    found = re.fullmatch(r'__version__ = "([^"]+)"\n', text)
    if found is None:
        raise SystemExit("src/orchard_ops/_version.py does not hold one version")
    return found[1]


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """What stands against a release under this tag."""
    version = package_version(root)
    found = []
    parts = _VERSION.fullmatch(version)
    if parts is None:
        found.append(f"the version {version} is not X.Y.Z, X.Y.Z.devN or X.Y.ZrcN")
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, and the version is {version}: it must be v{version}")
    sections = re.findall(r"^## (.+)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    base = ".".join(parts.groups()[:3]) if parts else version
    unfinished = parts is not None and parts[4] is not None
    wanted = [rf"{re.escape(version)}( \(\d{{4}}-\d\d-\d\d\))?"]
    if unfinished:
        wanted.append(rf"Unreleased \({re.escape(base)}\)")
    if not any(re.fullmatch(pattern, section) for pattern in wanted for section in sections):
        found.append(f'CHANGELOG.md has no section "## {version} (DATE)"; it has {sections}')
    return found if unfinished else found + unfinished_proofs(root)


def unfinished_proofs(root: Path) -> list[str]:
    """What docs/mutation.md and docs/proof.md, which tests hold to the records, leave open."""
    sentences = re.findall(
        r"campaign of (.+?) has .*? and (\d+) are open", (root / "docs" / "mutation.md").read_text()
    )
    found = [f"{n} mutants of {name} have not run" for name, n in sentences if int(n)]
    if not sentences:
        found.append("docs/mutation.md counts no mutants")
    if re.search(r"problems have run so far", (root / "docs" / "proof.md").read_text()):
        found.append("docs/proof.md: problems of the GPU's proof are left")
    return found


def main() -> int:
    if len(sys.argv) != 2:
        raise SystemExit("usage: release_check.py TAG")
    found = problems(sys.argv[1])
    for problem in found:
        print(problem, file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
