"""`setup.py`: what it builds with, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.support.paths import ROOT


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`setup.py` as a module, run with a `setuptools.setup` that does nothing."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **settings: None)
    monkeypatch.setenv("PLOP_CUDA", "0")
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("plop_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def native_build(setup: ModuleType) -> ModuleType:
    """The module that `setup.py` builds with."""
    import native_build

    return native_build


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A CUDA_HOME without a compiler in it."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return tmp_path


def fake_nvcc(home: Path) -> Path:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\nprintf "compute_80\\ncompute_90\\ncompute_100\\n"\n')
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.parametrize("wish", ["0", "auto"])
def test_without_nvcc_there_are_no_cuda_kernels(
    wish: str, setup: Any, no_cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLOP_CUDA", wish)
    assert setup.find_nvcc() is None


def test_nvcc_is_found_in_cuda_home_and_not_asked_for_when_unwanted(
    setup: Any, no_cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = fake_nvcc(no_cuda)
    for wish, found in (("auto", nvcc), ("1", nvcc), ("0", None)):
        monkeypatch.setenv("PLOP_CUDA", wish)
        assert setup.find_nvcc() == found


def test_cuda_wanted_without_nvcc(setup: Any, no_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLOP_CUDA", "1")
    with pytest.raises(SystemExit, match=r"PLOP_CUDA=1 but there is no nvcc in .*: install the CUDA toolkit, or"):
        setup.find_nvcc()


@pytest.mark.parametrize("wish", ["yes", "2", "", "AUTO"])
def test_a_bad_wish(wish: str, setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLOP_CUDA", wish)
    with pytest.raises(SystemExit, match=f"PLOP_CUDA must be 0, 1 or auto, got '{wish}'"):
        setup.find_nvcc()


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"PLOP_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "1 but there is no nvcc in CUDA_HOME=/nowhere: install",
        ),
        ({"PLOP_CUDA": "maybe"}, "PLOP_CUDA must be 0, 1 or auto, got 'maybe'"),
        ({"PLOP_CUDA": "1", "CUDA_HOME": "/nowhere", "CXX": "no-such-compiler"}, "PLOP_CUDA=1 but there is no nvcc"),
        ({"PLOP_CUDA": "maybe", "CXX": "no-such-compiler"}, "PLOP_CUDA must be 0, 1 or auto, got 'maybe'"),
    ],
    ids=str,
)
def test_a_build_that_cannot_be_as_wished_fails_in_one_line(
    settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr.strip().splitlines()[-1]


def test_without_a_compiler_there_is_no_native_build_but_an_installation(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PLOP_CUDA": "auto", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert (
        "plop_ext: building without native kernels, missing a C++ compiler (g++, or the one named by CXX)"
        in done.stderr
    )
    assert "missing a C++ compiler" in (tmp_path / "plop_ext" / "without_kernels.txt").read_text()


@pytest.mark.parametrize("archs", ["8.0;9.0", "9.0", "9.0a", "9.0+PTX"])
def test_hoppers_kernels_are_built_for_hopper_alone(
    archs: str, native_build: Any, no_cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    flags, _ = native_build.arch_flags(fake_nvcc(no_cuda))
    own = ["-gencode=arch=compute_90a,code=sm_90a", "-DPLOP_SM90A"]
    assert native_build.source_flags("cuda/gated_projection_kernel.cu", flags, "12.5") == own
    assert native_build.source_flags("cuda/rotary_kernel.cu", flags, "12.5") == flags
    assert native_build.source_flags("cuda/gated_projection_kernel.cu", flags, "12.4") == flags[:1]


def test_hoppers_kernels_are_launched_as_all_others_are(
    native_build: Any, no_cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0")
    flags, _ = native_build.arch_flags(fake_nvcc(no_cuda))
    assert native_build.source_flags("gated_projection_kernel.cu", flags, "13.0")[2:] == ["-DPLOP_LAUNCHES_IN_ORDER"]


def test_without_hopper_its_source_is_compiled_once(
    native_build: Any, no_cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;10.0+PTX")
    flags, _ = native_build.arch_flags(fake_nvcc(no_cuda))
    assert native_build.source_flags("gated_projection_kernel.cu", flags, "13.0") == [
        "-gencode=arch=compute_80,code=sm_80"
    ]


def test_architectures(native_build: Any, no_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = fake_nvcc(no_cuda)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    flags, names = native_build.arch_flags(nvcc)
    assert names == "sm_80 sm_90 sm_100 compute_100"
    assert flags[0] == "-gencode=arch=compute_80,code=sm_80" and len(flags) == 4
    assert flags[-1] == "-gencode=arch=compute_100,code=compute_100"
    for listed in ("8.0;9.0+PTX", "8.0 9.0+PTX", " 8.0; 9.0+PTX "):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        assert native_build.arch_flags(nvcc)[1] == "sm_80 sm_90 compute_90"


@pytest.mark.parametrize(
    "listed, in_order",
    [("8.0+PTX", True), ("8.6+PTX 9.0", True), ("8.0;9.0", False), ("9.0a+PTX", False), ("12.0+PTX", False)],
)
def test_code_that_does_not_wait_is_never_launched_ahead(
    native_build: Any, no_cuda: Path, monkeypatch: pytest.MonkeyPatch, listed: str, in_order: bool
) -> None:
    """PTX from before Hopper may run there, without the wait that a kernel launched ahead begins with."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert ("-DPLOP_LAUNCHES_IN_ORDER" in native_build.arch_flags(fake_nvcc(no_cuda))[0]) is in_order


def test_every_source_is_built_and_shipped(native_build: Any) -> None:
    listed = {f"csrc/{name}" for name in (*native_build.KERNEL_SOURCES, *native_build.CUDA_SOURCES)} | {
        "csrc/python/module.cpp"
    }
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")}
    assert listed == there
    assert "graft csrc" in (ROOT / "MANIFEST.in").read_text()


@pytest.mark.parametrize("chosen", ["inplace", "editable_mode"])
def test_an_editable_install_and_an_inplace_build_share_their_objects(setup: Any, chosen: str) -> None:
    from setuptools import Distribution

    command = setup.BuildNative(Distribution({"name": "plop_ext"}))
    setattr(command, chosen, True)
    command.build_temp = "a temporary folder"
    command.finalize_options()
    assert command.inplace and Path(command.build_temp) == ROOT / "build" / "inplace"


def test_a_wheel_is_built_where_setuptools_says(setup: Any) -> None:
    from setuptools import Distribution

    command = setup.BuildNative(Distribution({"name": "plop_ext"}))
    command.build_temp = "a temporary folder"
    command.finalize_options()
    assert command.build_temp == "a temporary folder"


COMPILER = """#!/bin/sh
# As a compiler does, but the outputs are empty; fails where it is told to.
for argument in "$@"; do
  case "$argument" in {fails_at}) echo "{message}" >&2; exit 1;; esac
  case "$argument" in --version) echo "release 13.0, V13.0"; exit 0;; esac
  case "$argument" in --list-gpu-arch) echo "compute_80"; exit 0;; esac
done
while [ $# -gt 0 ]; do
  case "$1" in -o) : > "$2";; -MF) echo "$0:" > "$2";; esac
  shift
done
"""


class Build:
    """A build in temporary folders, with made-up compilers."""

    def __init__(self, setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
        self.setup, self.tmp_path, self.monkeypatch, self.capfd = setup, tmp_path, monkeypatch, capfd
        self.package = tmp_path / "lib" / "plop_ext"
        self.temp = tmp_path / "temp"
        self.set(DEBUG="0", PLOP_CUDA="0", CUDA_HOME=str(tmp_path / "cuda"), TORCH_CUDA_ARCH_LIST="8.0")

    def set(self, **settings: str) -> None:
        for name, value in settings.items():
            self.monkeypatch.setenv(name, value)

    def compiler(self, place: str, fails_at: str = "nothing", message: str = "") -> None:
        path = self.tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(COMPILER.format(fails_at=fails_at, message=message))
        path.chmod(0o755)
        if place == "c++":
            self.set(CXX=str(path))

    def run(self, verbose: bool = False) -> list[str]:
        """Build; return what was printed to stderr."""
        from setuptools import Distribution

        command = self.setup.BuildNative(Distribution({"name": "plop_ext"}))
        command.build_temp, command.build_lib, command.verbose = str(self.temp), str(self.tmp_path / "lib"), verbose
        command.extensions = [self.setup.Extension("plop_ext._C", ["csrc/python/module.cpp"])]
        command.ensure_finalized()
        self.capfd.readouterr()
        command.run()
        return self.capfd.readouterr().err.strip().splitlines()

    def files(self) -> set[str]:
        return {path.name.partition(".")[0] for path in self.package.iterdir()}


@pytest.fixture
def build(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Build:
    return Build(setup, tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize(
    ("fails_at", "message", "reason"),
    [
        (
            "*/row_sumsq.cpp",
            "row_sumsq.cpp:3:10: fatal error: torch/csrc/stable/library.h: No such file or directory",
            "compiling csrc/row_sumsq.cpp failed: torch/csrc/stable/library.h: No such file or directory",
        ),
        (
            "--no-as-needed",
            "ld: unknown option: --no-as-needed",
            "linking libplop_ext.so failed: unknown option: --no-as-needed",
        ),
        ("*/module.cpp", "killed", "compiling csrc/python/module.cpp failed: killed"),
    ],
    ids=["no headers", "a Mac's linker", "killed"],
)
def test_a_step_that_fails_leaves_an_installation_without_kernels(
    fails_at: str, message: str, reason: str, build: Build
) -> None:
    """One line gives the reason, the log has the rest, and what an earlier build left is removed."""
    build.compiler("c++", fails_at, message)
    build.package.mkdir(parents=True)
    (build.package / "libplop_ext.so").write_bytes(b"of before")
    (line,) = build.run()
    assert line.startswith(f"plop_ext: building without native kernels, {reason} (log: ")
    assert message in Path(line.rpartition("(log: ")[2].removesuffix(")")).read_text()
    assert build.files() == {"without_kernels"}
    assert (build.package / "without_kernels.txt").read_text().strip() in line
    build.compiler("c++")
    assert build.run() == [] and build.files() == {"libplop_ext", "_C"}


def test_a_failure_without_a_word_among_others(build: Build) -> None:
    build.set(CXX="/bin/false")
    (line,) = build.run()
    assert re.search(r"kernels, compiling csrc/\S+.cpp failed: no reason given \(log: ", line)


@pytest.mark.parametrize("settings", [{"PLOP_CUDA": "1"}, {"PLOP_CUDA": "0", "DEBUG": "1"}], ids=str)
def test_who_insists_gets_an_error_in_one_line(settings: dict[str, str], build: Build) -> None:
    build.compiler("c++", "*/rotary.cpp", "rotary.cpp:1: error: no")
    build.compiler("cuda/bin/nvcc")
    build.set(**settings)
    with pytest.raises(SystemExit, match=r"^plop_ext: compiling csrc/rotary.cpp failed: no \(log: \S+\)$"):
        build.run()
    assert build.files() == set()


def test_where_only_cuda_fails_there_are_cpu_kernels(build: Build) -> None:
    build.compiler("c++")
    build.compiler("cuda/bin/nvcc", "*.cu", "nvcc fatal error: unsupported GNU version")
    build.set(PLOP_CUDA="auto")
    (line,) = build.run()
    assert line.startswith("plop_ext: building without CUDA kernels: compiling csrc/cuda/")
    assert "unsupported GNU version" in line and build.files() == {"libplop_ext", "_C"}


def test_a_folder_that_cannot_be_written_is_a_reason(build: Build) -> None:
    build.compiler("c++")
    build.temp.write_text("a file where the objects should go")
    assert build.run() == [f"plop_ext: building without native kernels, File exists ({build.temp})"]
    assert build.files() == {"without_kernels"}


def test_a_build_prints_a_line_per_step(build: Build, native_build: Any) -> None:
    build.compiler("c++")
    steps = build.run(verbose=True)
    assert len(steps) == len(native_build.KERNEL_SOURCES) + 2
    assert all(re.fullmatch(r"\[\d+/\d+\] (compiling csrc/\S+|linking libplop_ext.so)", step) for step in steps)


@pytest.mark.parametrize(
    ("version", "rocm"),
    [("hip: Optional[str] = '6.4.4'", True), ("hip = None", False), ("hip: str | None = None", False)],
)
def test_a_torch_for_rocm_gets_no_cuda_kernels(
    version: str, rocm: bool, setup: Any, no_cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = fake_nvcc(no_cuda)
    (no_cuda / "version.py").write_text(f"cuda = None\n{version}\n")
    torch = SimpleNamespace(origin=str(no_cuda / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: torch)
    monkeypatch.setenv("PLOP_CUDA", "auto")
    assert setup.find_nvcc() == (None if rocm else nvcc)
    monkeypatch.setenv("PLOP_CUDA", "1")
    if rocm:
        with pytest.raises(SystemExit, match="this torch is built for ROCm: install a torch for CUDA, or set PLOP_"):
            setup.find_nvcc()


@pytest.mark.slow
def test_the_kernels_compile_without_cuda_and_without_a_warning(tmp_path: Path) -> None:
    places = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *places]
    environment = {**os.environ, "PLOP_CUDA": "0", "DEBUG": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    built = {path.name.partition(".")[0] for path in (tmp_path / "lib/plop_ext").iterdir()}
    assert built == {"_C", "libplop_ext"}
