"""The workflows: nothing can publish without a tag, and what they run exists.

GitHub runs them; here they are read. A rule that holds is shown to notice what breaks it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchard_ops.__main__ import build_parser

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import release_check  # noqa: E402

FOLDER = ROOT / ".github" / "workflows"
TEXTS = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.yml"))}
RELEASE = "release.yml"

_PUBLISHES = re.compile(
    r"gh-action-pypi-publish|action-gh-release|create-release|"
    r"\b(twine|uv|flit|hatch|poetry|maturin|pdm) (upload|publish)|\bgh (release|api)|git push"
)
_TAG_ALONE = "github.ref_type == 'tag'"


def jobs(workflow: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return workflow["jobs"]


def triggers(workflow: dict[Any, Any]) -> dict[str, Any]:
    found = workflow[True]  # YAML 1.1 reads the key `on` as a truth value
    if isinstance(found, dict):
        return found
    return dict.fromkeys([found] if isinstance(found, str) else found)


def _may_write(permissions: Any) -> bool:
    if isinstance(permissions, str):
        return permissions != "read-all"
    return any(value == "write" for value in (permissions or {}).values())


def can_publish(workflow: dict[str, Any], job: dict[str, Any]) -> bool:
    """Whether a job has what publishing needs: a command for it, a right to write, or a secret."""
    permissions = job.get("permissions", workflow.get("permissions"))
    text = yaml.safe_dump(job)
    return bool(
        permissions is None  # a repository's default may be to write
        or _may_write(permissions)
        or _PUBLISHES.search(text)
        or "secrets" in re.sub(r"secrets\.GITHUB_TOKEN", "", text)
    )


def _before(workflow: dict[str, Any], name: str) -> set[str]:
    """The jobs that must have succeeded before this one."""
    needs = jobs(workflow)[name].get("needs", [])
    direct = {needs} if isinstance(needs, str) else set(needs)
    return direct.union(*(_before(workflow, other) for other in direct))


def problems(texts: dict[str, str]) -> list[str]:
    """Every way in which something could be published without a tag or without its checks."""
    found = []
    for file, text in texts.items():
        workflow = yaml.safe_load(text)
        for action in re.findall(r"uses: *(\S.*)", text):
            if not re.fullmatch(r"\./\S+|[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d[\w.]*", action):
                found.append(f"{file}: {action} is not pinned by its commit")
        for name, job in jobs(workflow).items():
            if not can_publish(workflow, job):
                continue
            if triggers(workflow) != {"push": {"tags": ["v*"]}}:
                found.append(f"{file}: {name} can publish, and not only a tag starts it")
            if job.get("if") != _TAG_ALONE:
                found.append(f"{file}: {name} can publish, and does not ask for a tag itself")
            if job.get("environment") != "pypi":
                found.append(f"{file}: {name} can publish outside of the environment pypi")
            if not {"tag", "ci", "sdist", "mac-sdist"} <= _before(workflow, name):
                found.append(f"{file}: {name} can publish before the checks")
            if any("checkout" in step.get("uses", "") for step in job.get("steps", [])):
                found.append(f"{file}: {name} can publish what it builds itself")
    return found


def test_nothing_publishes_without_a_tag():
    assert problems(TEXTS) == []
    publishing = [
        (file, name)
        for file, text in TEXTS.items()
        for name, job in jobs(yaml.safe_load(text)).items()
        if can_publish(yaml.safe_load(text), job)
    ]
    assert publishing == [(RELEASE, "publish")]


PUBLISH_STEP = "      - uses: pypa/gh-action-pypi-publish@" + 40 * "0" + " # v1.13.0\n"
BREAKS = {  # file, what is replaced, by what, and the words of the problem
    "by hand": (RELEASE, "on:\n", "on:\n  workflow_dispatch:\n", "not only a tag"),
    "on a branch": (RELEASE, '    tags: ["v*"]', "    branches: [main]", "not only a tag"),
    "on any tag and a branch": (
        RELEASE,
        '    tags: ["v*"]',
        '    tags: ["v*"]\n    branches: [main]',
        "not only a tag",
    ),
    "on a schedule": (RELEASE, "on:\n", 'on:\n  schedule: [{cron: "1 1 * * *"}]\n', "not only"),
    "by another workflow": (RELEASE, "on:\n", "on:\n  workflow_call:\n", "not only a tag"),
    "without asking": (RELEASE, f"    if: {_TAG_ALONE}\n", "", "does not ask for a tag itself"),
    "asking for more or less": (RELEASE, _TAG_ALONE, f"{_TAG_ALONE} || always()", "ask for a tag"),
    "without the checks": (RELEASE, "    needs: [ci, mac-sdist]\n", "", "before the checks"),
    "without a Mac": (RELEASE, "needs: [ci, mac-sdist]", "needs: [ci, sdist]", "before the checks"),
    "outside of the environment": (RELEASE, "    environment: pypi\n", "", "environment pypi"),
    "what it builds": (
        RELEASE,
        "      id-token: write # the trusted publisher; there is no token to steal\n    steps:\n",
        "      id-token: write\n    steps:\n      - uses: actions/checkout@" + 40 * "1" + " # v5\n",
        "what it builds itself",
    ),
    "from ci": ("ci.yml", "      - run: make lint\n", PUBLISH_STEP, "not only a tag"),
    "with a command": ("ci.yml", "make lint", "twine upload dist/*", "not only a tag"),
    "with a secret": ("weekly.yml", "- run: sudo", "- run: X=${{ secrets.X }} sudo", "not only"),
    "with a right": ("weekly.yml", "contents: read", "contents: write", "not only a tag"),
    "with the default rights": (
        "weekly.yml",
        "permissions:\n  contents: read\n",
        "",
        "not only a tag",
    ),
    "by a moving action": (
        RELEASE,
        "gh-action-pypi-publish@ed0c53931b1dc9bd32cbe73a98c7f6766f8a527e # v1.13.0",
        "gh-action-pypi-publish@release/v1",
        "is not pinned",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_would_publish_otherwise_is_found(name: str):
    file, old, new, words = BREAKS[name]
    assert old in TEXTS[file]
    changed = TEXTS | {file: TEXTS[file].replace(old, new, 1)}
    assert any(words in problem for problem in problems(changed)), problems(changed)


def test_what_is_published_is_what_macs_have_loaded():
    """The artifacts of the publishing job are those that load checks have downloaded."""
    release, ci = (yaml.safe_load(TEXTS[file]) for file in (RELEASE, "ci.yml"))

    def artifacts(job: dict[str, Any], action: str) -> set[str]:
        steps = [s for s in job["steps"] if f"actions/{action}-artifact" in s.get("uses", "")]
        return {step["with"]["name"] for step in steps}

    published = artifacts(jobs(release)["publish"], "download")
    loaded = artifacts(jobs(ci)["mac-load"], "download")
    loaded |= artifacts(jobs(release)["mac-sdist"], "download")
    made = artifacts(jobs(ci)["linux"], "upload") | artifacts(jobs(release)["sdist"], "upload")
    assert published == loaded == {"wheel", "sdist"} <= made
    for job in (jobs(ci)["mac-load"], jobs(release)["mac-sdist"]):
        assert job["runs-on"].startswith(("macos", "${{ matrix.os }}"))
        assert any("native.why_not()" in step.get("run", "") for step in job["steps"])


# ---- what they run ------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, str]]:
    """(where, each line that a workflow gives to a shell)"""
    for file, text in TEXTS.items():
        for name, job in jobs(yaml.safe_load(text)).items():
            runs = [step["run"] for step in job.get("steps", []) if "run" in step]
            runs += job.get("strategy", {}).get("matrix", {}).get("run", [])
            for run in runs:
                for line in run.replace("\\\n", " ").splitlines():
                    yield f"{file}: {name}", line.strip()


COMMANDS = sorted({line for _, line in commands() if re.match(r"(make|python) ", line)})


@pytest.mark.parametrize("line", COMMANDS)
def test_what_is_run_exists(line: str, tmp_path: Path):
    program, *words = shlex.split(line)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{re.escape(words[0])}:", makefile, re.MULTILINE)
    elif words[:2] == ["-m", "orchard_ops"]:
        build_parser().parse_args(words[2:])
    elif words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests"))
    elif words[0] == "-c":
        check_program(words[1])
    else:
        assert (ROOT / words[0]).is_file()


def check_program(code: str) -> None:
    """It succeeds with the native library, and says why not without it."""
    for library, status in ((os.environ["ORCHARD_NATIVE_LIBRARY"], 0), ("/nowhere.so", 1)):
        environment = os.environ | {"ORCHARD_NATIVE_LIBRARY": library, "PYTHONPATH": str(ROOT)}
        started = "import simulator; simulator.enable()\n" + code
        done = subprocess.run(
            [sys.executable, "-c", started], env=environment, capture_output=True, text=True
        )
        if "orchard_ops" not in code:
            status = 0
        assert done.returncode == status, done.stderr
        assert status == 0 or "nowhere.so is missing" in done.stderr


# ---- the tag ------------------------------------------------------------------------------------


def checkout(
    folder: Path, version: str, section: str, open_mutants: int = 0, proof: str = "Proven."
) -> Path:
    docs = folder / "docs"
    docs.mkdir()
    (docs / "mutation.md").write_text(
        f"The campaign of caches has 9 mutants: 9 are noticed, and {open_mutants} are open.\n"
    )
    (docs / "proof.md").write_text(f"{proof}\n")
    package = folder / "src" / "orchard_ops"
    package.mkdir(parents=True)
    (package / "_version.py").write_text(f'__version__ = "{version}"\n')
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n## {section}\n\n### Added\n")
    return folder


@pytest.mark.parametrize(
    ("tag", "version", "section", "words"),
    (
        ("v0.1.0", "0.1.0", "0.1.0 (2026-12-01)", None),
        ("v0.1.0", "0.1.0", "0.1.0", None),
        ("v0.1.0.dev3", "0.1.0.dev3", "Unreleased (0.1.0)", None),
        ("v0.1.0rc1", "0.1.0rc1", "Unreleased (0.1.0)", None),
        ("v0.1.0", "0.1.0", "Unreleased (0.1.0)", "no section"),
        ("v0.1.0.dev3", "0.1.0.dev3", "Unreleased (0.2.0)", "no section"),
        ("v0.1.1", "0.1.0", "0.1.0", "it must be v0.1.0"),
        ("0.1.0", "0.1.0", "0.1.0", "it must be v0.1.0"),
        ("v0.1", "0.1", "0.1", "is not X.Y.Z"),
        ("v0.01.0", "0.01.0", "0.01.0", "is not X.Y.Z"),
    ),
)
def test_a_tag_is_the_version_and_has_a_section(
    tag: str, version: str, section: str, words: str | None, tmp_path: Path
):
    found = release_check.problems(tag, checkout(tmp_path, version, section))
    assert found == [] if words is None else any(words in problem for problem in found)


def test_a_release_has_whole_proofs(tmp_path: Path):
    """Those that stand in docs/mutation.md and docs/proof.md, in their present words."""
    sentences = re.findall(r"The campaign of .*", (ROOT / "docs" / "mutation.md").read_text())
    assert len(sentences) == 3
    folder = checkout(tmp_path, "0.1.0", "0.1.0", 7, "491 problems have run so far, none failed.")
    found = release_check.problems("v0.1.0", folder)
    assert [problem.split()[0] for problem in found] == ["7", "docs/proof.md:"]
    (folder / "docs" / "mutation.md").write_text("\n".join(sentences))
    counts = [int(re.search(r"(\d+) are open", text)[1]) for text in sentences]
    found = release_check.unfinished_proofs(folder)
    assert len(found) == sum(map(bool, counts)) + 1
    candidate = tmp_path / "candidate"
    candidate.mkdir()
    checkout(candidate, "0.1.0rc1", "0.1.0rc1", 7)
    assert release_check.problems("v0.1.0rc1", candidate) == []


def test_the_present_version_could_be_tagged():
    version = release_check.package_version(ROOT)
    assert release_check.problems(f"v{version}") == []


# ---- issue forms --------------------------------------------------------------------------------

FORMS = [p for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_every_form_asks_for_the_doctor(path: Path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"] and form["labels"]
    fields = {field["id"]: field for field in form["body"] if field["type"] != "markdown"}
    assert len(fields) == sum(field["type"] != "markdown" for field in form["body"])
    doctor = fields["doctor"]
    assert doctor["validations"]["required"]
    assert "python -m orchard_ops doctor" in doctor["attributes"]["description"]
    for command in re.findall(r"python -m orchard_ops ([\w -]+)`", path.read_text()):
        words = shlex.split(command)
        build_parser().parse_args([word for word in words if word != "--help"])


def test_there_are_forms_and_no_blank_issue():
    assert {path.stem for path in FORMS} >= {"bug", "speed", "model"}
    config = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/config.yml").read_text())
    assert config["blank_issues_enabled"] is False
