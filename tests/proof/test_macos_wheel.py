"""The macOS wheel, cross-built on Linux: does it load into every supported torch, and is it whole?

Nothing here runs the library: docs/macos-binary.md says what that leaves open.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEV_EXTRA = "is not installed: pip install -e '.[dev]'"

if not sys.platform.startswith("linux"):
    pytest.skip("cross-building is for Linux; a Mac builds its own wheel", allow_module_level=True)
pytest.importorskip("lief", reason=f"lief {DEV_EXTRA}")
pytest.importorskip("ziglang", reason=f"ziglang {DEV_EXTRA}")
if shutil.which("ld64.lld-19") is None:
    pytest.skip("ld64.lld-19 is not installed: sh tools/system_tools.sh", allow_module_level=True)

sys.path.insert(0, str(ROOT / "tools" / "macos"))
import abi_check  # noqa: E402
import cross_compile  # noqa: E402
import mach_o  # noqa: E402
import metal_sources  # noqa: E402
import pack_wheel  # noqa: E402
from symbol_lists import SymbolList, system_list, torch_lists  # noqa: E402

from orchard_ops import __version__  # noqa: E402

TORCH = "@rpath/libtorch_cpu.dylib"
LIBCXX = "/usr/lib/libc++.1.dylib"
SET_ARG = "__ZN2at6native3mps19MetalKernelFunction6setArgEjPKvy"


@pytest.fixture(scope="module")
def library() -> Path:
    return cross_compile.build()


@pytest.fixture(scope="module")
def wheel(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_wheel.pack(library, tmp_path_factory.mktemp("wheel"))


# The binary interface


def test_every_release_and_macos_have_what_the_library_imports(library: Path) -> None:
    report = abi_check.check_file(library)
    assert report.problems == []
    assert list(report.lookups) == [f"torch-2.{minor}" for minor in range(10, 16)]
    assert set(report.imports) == {TORCH, LIBCXX, "/usr/lib/libSystem.B.dylib"}
    assert "_aoti_torch_mps_run_command_block" in report.imports[TORCH]


def test_operator_new_is_the_one_of_the_whole_process(library: Path) -> None:
    """Strings that libc++ allocates are freed here: an override must reach both or neither."""
    imports = mach_o.imports(mach_o.parse(library.read_bytes()))
    assert {"__Znwm", "__ZdlPv"} <= {needed.symbol for needed in imports if needed.shared}


def test_struct_arguments_go_through_the_shim_where_torch_has_it(library: Path) -> None:
    lookups = abi_check.check_file(library).lookups
    assert all(SET_ARG in lookups[f"torch-2.{minor}"] for minor in (10, 11, 12, 13))
    assert all("_torch_mps_set_arg_bytes" in lookups[f"torch-2.{minor}"] for minor in (14, 15))
    assert all(
        ("_torch_exception_get_what_without_backtrace" in names) == (release >= "torch-2.13")
        for release, names in lookups.items()
    )


def test_the_names_looked_up_are_those_in_the_source(library: Path) -> None:
    source = (ROOT / "native" / "shader_library.cpp").read_text()
    apple = re.sub(r"#else.*?#endif", "", source, flags=re.DOTALL)
    constants = dict(re.findall(r'(k\w+) = "(\w+)";', apple))
    arguments = re.findall(r'dlsym\(RTLD_DEFAULT, (?:"(\w+)"|(\w+))\)', apple)
    asked = {f"_{literal or constants[constant]}" for literal, constant in arguments}
    strings = mach_o.strings(mach_o.parse(library.read_bytes()))
    assert asked == set(abi_check.looked_up(strings))
    assert SET_ARG in asked


def without(symbol: str) -> Callable[[dict[str, str]], dict[str, str]]:
    return lambda symbols: {name: text for name, text in symbols.items() if name != symbol}


def redeclared(symbol: str) -> Callable[[dict[str, str]], dict[str, str]]:
    return lambda symbols: {**symbols, symbol: "AOTITorchError (int changed)"}


@pytest.mark.parametrize(
    ("label", "install_name", "change", "problem"),
    [
        (
            "torch-2.11",
            TORCH,
            without("_torch_call_dispatcher"),
            f"torch-2.11: {TORCH} does not export _torch_call_dispatcher",
        ),
        ("macos-14", LIBCXX, without("__Znwm"), f"macos-14: {LIBCXX} does not export __Znwm"),
        ("torch-2.12", TORCH, without(SET_ARG), "torch-2.12: no way to pass a struct to a kernel"),
        (
            "torch-2.15",
            TORCH,
            redeclared("_aoti_torch_mps_set_arg_tensor"),
            "_aoti_torch_mps_set_arg_tensor is not declared alike everywhere",
        ),
    ],
)
def test_a_torch_or_macos_that_differs_is_noticed(
    library: Path,
    label: str,
    install_name: str,
    change: Callable[[dict[str, str]], dict[str, str]],
    problem: str,
) -> None:
    def changed(symbols: SymbolList) -> SymbolList:
        if symbols.label != label:
            return symbols
        edited = change(symbols.libraries[install_name])
        assert edited != symbols.libraries[install_name]
        return replace(symbols, libraries={**symbols.libraries, install_name: edited})

    releases = [changed(release) for release in torch_lists()]
    report = abi_check.check(library.read_bytes(), releases, changed(system_list()))
    assert len(report.problems) == 1
    assert report.problems[0].startswith(problem)


def test_a_wrong_name_for_dlsym_is_noticed(library: Path) -> None:
    content = library.read_bytes().replace(SET_ARG[1:].encode(), SET_ARG[1:-1].encode() + b"m")
    problems = abi_check.check(content, torch_lists(), system_list()).problems
    assert f"{SET_ARG[:-1]}m is looked up, but no release exports it" in problems
    assert "torch-2.10: no way to pass a struct to a kernel" in problems


def compiled_c(text: str, output: Path) -> Path:
    source = output.with_suffix(".c")
    source.write_text(text)
    compiler = [*cross_compile.COMPILER, "-c", str(source), "-o", str(output)]
    compiler[compiler.index("c++")] = "cc"
    subprocess.run(compiler, check=True)
    return output


def test_a_library_with_unknown_imports_is_refused(tmp_path: Path) -> None:
    unknown = compiled_c(
        "int torch_no_such_function(void); int PyLong_AsLong(void);\n"
        "const char* orchard_register_ops(void) {\n"
        "  torch_no_such_function(); PyLong_AsLong(); return 0;\n}\n",
        tmp_path / "unknown.o",
    )
    with pytest.raises(subprocess.CalledProcessError):  # the stubs do not have them
        cross_compile.link([unknown], tmp_path / "refused.dylib")
    forced = tmp_path / "forced.dylib"
    cross_compile.link([unknown], forced, "-undefined", "dynamic_lookup")
    problems = abi_check.check_file(forced).problems
    for release in torch_lists():
        for symbol in ("_torch_no_such_function", "_PyLong_AsLong"):
            assert f"{release.label}: no library does not export {symbol}" in problems


def test_strings_have_apples_layout(tmp_path: Path) -> None:
    """libc++ on arm64 macOS orders the fields of std::string its own way; both sides must agree."""
    source = tmp_path / "layout.cpp"
    source.write_text("#include <string>\n")
    command = [*cross_compile.COMPILER, "-std=c++17", "-E", "-dM", str(source)]
    macros = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.search(r"^#define _LIBCPP_ABI_ALTERNATE_STRING_LAYOUT\b(?! 0)", macros, re.MULTILINE)
    assert re.search(r"^#define _LIBCPP_ABI_NAMESPACE __1$", macros, re.MULTILINE)


# The file


def test_load_commands_and_signature_are_in_order(library: Path) -> None:
    assert mach_o.problems(library) == []


@pytest.mark.parametrize("position", [0.2, 0.5, 0.8])
def test_a_changed_byte_breaks_the_signature(library: Path, position: float) -> None:
    content = bytearray(library.read_bytes())
    binary = mach_o.parse(bytes(content))
    at = int(position * len(content))
    content[at] ^= 1
    assert mach_o.signature_problems(bytes(content), binary) == [
        f"page {at // 4096} differs from its signature"
    ]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"@loader_path/../torch/lib", b"@loader_path/../torch/bin", "the only run path"),
        (b"@rpath/liborchard_ops", b"/rpath/liborchard_ops", "the install name"),
        (b"/usr/lib/libc++.1.dylib", b"/usr/lib/libc--.1.dylib", "it needs torch and system"),
        (b"register_ops", b"register_opt", "the exports are"),
    ],
)
def test_a_changed_load_command_is_noticed(
    library: Path, old: bytes, new: bytes, problem: str
) -> None:
    changed = library.read_bytes().replace(old, new)
    problems = mach_o.load_command_problems(mach_o.parse(changed))
    assert len(problems) == 1
    assert problems[0].startswith(f"not so: {problem}")


@pytest.mark.parametrize("at_load", [False, True])
def test_code_that_runs_at_load_is_noticed(tmp_path: Path, at_load: bool) -> None:
    """Nothing registers itself: Python asks first which ops the library was built for."""
    attribute = "__attribute__((constructor)) " if at_load else ""
    code = compiled_c(
        f"int started;\n{attribute}void start(void) {{ started = 1; }}\n"
        '__attribute__((visibility("default"))) int orchard_library_interface(void) '
        "{ start(); return started; }\n"
        '__attribute__((visibility("default"))) int orchard_register_ops(void) { return 0; }\n',
        tmp_path / "code.o",
    )
    cross_compile.link([code], tmp_path / "code.dylib")
    problems = mach_o.load_command_problems(mach_o.parse((tmp_path / "code.dylib").read_bytes()))
    assert ("not so: nothing runs at load" in problems) == at_load
    assert not [problem for problem in problems if "exports" in problem]


def test_the_library_holds_no_path_of_the_machine_that_built_it(library: Path) -> None:
    import torch
    import ziglang

    content = library.read_bytes()
    for directory in (ROOT, Path(torch.__file__).parent, Path(ziglang.__file__).parent):
        assert str(directory).encode() not in content


# The wheel


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path, library: Path) -> None:
    assert wheel.name == f"orchard_ops-{__version__}-py3-none-macosx_14_0_arm64.whl"
    assert pack_wheel.content_problems(wheel) == []
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("orchard_ops/liborchard_ops.dylib") == library.read_bytes()
        (info,) = (name for name in archive.namelist() if name.endswith("/WHEEL"))
        tags = archive.read(info).decode().splitlines()
        metadata = archive.read(info.replace("WHEEL", "METADATA")).decode().splitlines()
    assert "Root-Is-Purelib: false" in tags
    assert "Tag: py3-none-macosx_14_0_arm64" in tags
    assert "Requires-Dist: torch>=2.10" in metadata


def test_the_wheel_is_reproducible(library: Path, wheel: Path, tmp_path: Path) -> None:
    previous = os.umask(0o077)
    try:
        again = pack_wheel.pack(library, tmp_path)
    finally:
        os.umask(previous)
    assert again.read_bytes() == wheel.read_bytes()


@pytest.mark.parametrize(
    ("platform", "accepted"),
    [
        ("macosx_14_0_arm64", True),
        ("macosx_15_0_arm64", True),
        ("macosx_13_0_arm64", False),
        ("macosx_14_0_x86_64", False),
        (None, False),
    ],
)
def test_pip_takes_it_for_apple_silicon_only(
    wheel: Path, tmp_path: Path, platform: str | None, accepted: bool
) -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-index"]
    if platform is not None:
        command += ["--platform", platform, "--only-binary=:all:", "--target", str(tmp_path)]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
    assert (done.returncode == 0) == accepted, done.stdout + done.stderr
    assert ("is not a supported wheel on this platform" in done.stderr) != accepted


# The source distribution, and what Linux makes of it


def backend(call: str, directory: Path, output: Path) -> Path:
    """What `pip install .` and `python -m build` call, run inside `directory`."""
    code = f"import setuptools.build_meta as b; print(b.{call}({str(output)!r}))"
    environment = {key: text for key, text in os.environ.items() if not key.startswith("ORCHARD_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output / done.stdout.splitlines()[-1]


def test_the_source_distribution_builds_a_pure_wheel_on_linux(tmp_path: Path) -> None:
    checkout, output = tmp_path / "checkout", tmp_path / "output"
    checkout.mkdir()
    output.mkdir()
    pack_wheel.copy_sources(checkout)
    with tarfile.open(backend("build_sdist", checkout, output)) as archive:
        if hasattr(tarfile, "data_filter"):  # Python 3.11.4 and later
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(tmp_path)
    (unpacked,) = tmp_path.glob("orchard_ops-*")
    for directory in ("native", "shaders"):
        for path in (ROOT / directory).rglob("*"):
            if path.is_file() and path.parent.name != "__pycache__":
                assert (unpacked / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    pure = backend("build_wheel", unpacked, output)
    assert pure.name == f"orchard_ops-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(pure) as archive:
        names = archive.namelist()
    assert "orchard_ops/__init__.py" in names
    assert not [name for name in names if name.endswith((".dylib", ".so", ".cpp", ".h"))]


# The shader text for Apple's compiler


def test_every_variant_is_in_the_text_for_apples_compiler() -> None:
    texts = metal_sources.sources()
    names = {
        family.removeprefix("attention_"): set(re.findall(r'host_name\("(\w+)"\)', text))
        for family, text in texts.items()
    }
    assert {family: len(found) for family, found in names.items()} == {
        # Plain scores; values of their own width in 3 dtypes, both loads, dropout or not; the other
        # tiles of head dims 64, 96, 128 and 256; 7 kinds of score, 3 dtypes, 2 widths.
        "forward": 144 + 12 + 250 + 7 * 3 * 2,
        "backward_delta": 72 + 6 + 4 * 3 * 2,  # knows sinks, masks and ranges
        "backward_dkv": 92 + 7 * 3 + 3,  # divided groups in 3 dtypes
        "backward_dkv_pairs": 160 + 24 + 7 * 3 + 3,
        "backward_dkv_sums": 3,
        "backward_dq": 144 + 12,
        "backward_dq_from_ds": 54 + 3 * 3 * 2,  # knows masks and ranges
        "backward_dsinks": 1,
        "mask_map": 3,
    }
    assert all(text.isascii() for text in texts.values())
    assert not any('#include "' in text for text in texts.values())
    parts = metal_sources.sources(per_file=24)
    divided = [re.findall(r'host_name\("(\w+)"\)', text) for text in parts.values()]
    assert max(map(len, divided)) == 24
    assert sorted(name for part in divided for name in part) == sorted(set.union(*names.values()))
