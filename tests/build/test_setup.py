"""`setup.py`: what it builds with, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
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
        [sys.executable, "setup.py", "-q", "--version"],
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


@pytest.mark.parametrize("archs", ["8.0;9.0", "9.0", "9.0a", "9.0+PTX"])
def test_hoppers_kernels_are_built_for_hopper_alone(
    archs: str, setup: Any, no_cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    flags, _ = setup.arch_flags(fake_nvcc(no_cuda))
    own = ["-gencode=arch=compute_90a,code=sm_90a", "-DPLOP_SM90A"]
    assert setup.source_flags("cuda/gated_projection_kernel.cu", flags, "12.5") == own
    assert setup.source_flags("cuda/rotary_kernel.cu", flags, "12.5") == flags
    assert setup.source_flags("cuda/gated_projection_kernel.cu", flags, "12.4") == flags[:1]


def test_hoppers_kernels_are_launched_as_all_others_are(
    setup: Any, no_cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0")
    flags, _ = setup.arch_flags(fake_nvcc(no_cuda))
    assert setup.source_flags("gated_projection_kernel.cu", flags, "13.0")[2:] == ["-DPLOP_LAUNCHES_IN_ORDER"]


def test_without_hopper_its_source_is_compiled_once(
    setup: Any, no_cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;10.0+PTX")
    flags, _ = setup.arch_flags(fake_nvcc(no_cuda))
    assert setup.source_flags("gated_projection_kernel.cu", flags, "13.0") == ["-gencode=arch=compute_80,code=sm_80"]


def test_architectures(setup: Any, no_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = fake_nvcc(no_cuda)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    flags, names = setup.arch_flags(nvcc)
    assert names == "sm_80 sm_90 sm_100 compute_100"
    assert flags[0] == "-gencode=arch=compute_80,code=sm_80" and len(flags) == 4
    assert flags[-1] == "-gencode=arch=compute_100,code=compute_100"
    for listed in ("8.0;9.0+PTX", "8.0 9.0+PTX", " 8.0; 9.0+PTX "):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        assert setup.arch_flags(nvcc)[1] == "sm_80 sm_90 compute_90"


@pytest.mark.parametrize(
    "listed, in_order",
    [("8.0+PTX", True), ("8.6+PTX 9.0", True), ("8.0;9.0", False), ("9.0a+PTX", False), ("12.0+PTX", False)],
)
def test_code_that_does_not_wait_is_never_launched_ahead(
    setup: Any, no_cuda: Path, monkeypatch: pytest.MonkeyPatch, listed: str, in_order: bool
) -> None:
    """PTX from before Hopper may run there, without the wait that a kernel launched ahead begins with."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert ("-DPLOP_LAUNCHES_IN_ORDER" in setup.arch_flags(fake_nvcc(no_cuda))[0]) is in_order


def test_every_source_is_built_and_shipped(setup: Any) -> None:
    listed = {f"csrc/{name}" for name in (*setup.KERNEL_SOURCES, *setup.CUDA_SOURCES)} | {"csrc/python/module.cpp"}
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


@pytest.mark.slow
def test_the_kernels_compile_without_cuda_and_without_a_warning(tmp_path: Path) -> None:
    places = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *places]
    environment = {**os.environ, "PLOP_CUDA": "0", "DEBUG": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    built = {path.name.partition(".")[0] for path in (tmp_path / "lib/plop_ext").iterdir()}
    assert built == {"_C", "libplop_ext"}
