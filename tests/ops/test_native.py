"""With and without native kernels: the same scores, and word of which kernels run. Imports stay light."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plop_ext
from plop_ext import Scores, ops
from plop_ext._version import __version__
from plop_ext.ops import native
from plop_ext.ops.native import Status
from tests.support import tiny_models
from tests.support.paths import ROOT
from tests.support.totals import assert_same_counts

SCORE = """
import sys, plop_ext
from tests.support import tiny_models
from tests.support.totals import assert_same_counts
batches = [tiny_models.token_batch([20, 31], seed=s, side=side) for s, side in enumerate(("right", "left"))]
plop_ext.score(tiny_models.llama(), batches, baseline="probe", token_step=2, progress=False).save(sys.argv[1])
"""


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, in the repository."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_pure_python_gives_the_same_scores_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    done = python(SCORE, str(path), PLOP_PURE_PYTHON="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    pure = Scores.load(path)
    assert pure.provenance["backend"] == "pytorch"
    batches = [tiny_models.token_batch([20, 31], seed=s, side=side) for s, side in enumerate(("right", "left"))]
    ours = plop_ext.score(tiny_models.llama(), batches, baseline="probe", token_step=2, progress=False)
    np.testing.assert_allclose(pure.nfn, ours.nfn, rtol=1e-5)
    assert_same_counts(pure.totals, ours.totals)


def test_pure_python_is_a_wish_and_no_warning() -> None:
    code = "import plop_ext.ops as o; print(o.STATUS.loaded, o.STATUS.reason)"
    done = python(code, PLOP_PURE_PYTHON="1")
    assert done.stdout == "False PLOP_PURE_PYTHON is set\n" and "plop_ext runs on" not in done.stderr


@pytest.mark.parametrize(
    "library, reason",
    [("missing.so", "this installation was built without native kernels"), ("damaged.so", "kernels do not load: .*")],
)
def test_a_library_that_does_not_load_is_one_warning(library: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "damaged.so").write_bytes(b"not a library")
    code = f"""
import os
from pathlib import Path
import plop_ext
from plop_ext.ops import native
os.environ["PLOP_PURE_PYTHON"] = "0"
native.LIBRARY = Path({str(tmp_path / library)!r})
print(native.load().backend("cpu"))
"""
    done = python(code, PLOP_PURE_PYTHON="1")
    assert done.returncode == 0 and done.stdout == "pytorch\n", done.stderr
    message = rf"UserWarning: plop_ext runs on its slower PyTorch kernels: .*{reason}.*; see `plop doctor`"
    assert len(re.findall(message, done.stderr)) == 1, done.stderr


def test_the_reason_of_a_failed_build_is_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLOP_PURE_PYTHON", "0")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libplop_ext.so")
    (tmp_path / "without_kernels.txt").write_text("compiling csrc/rotary.cpp failed: no space left\n")
    with pytest.warns(
        UserWarning, match=r"without native kernels \(compiling csrc/rotary.cpp failed: no space left\)"
    ):
        assert native.load().reason.endswith("no space left)")
    (tmp_path / "without_kernels.txt").unlink()
    with pytest.warns(UserWarning, match="--no-build-isolation are needed"):
        native.load()


@pytest.mark.parametrize(
    ("info", "opened"),
    [({"cuda": "13.0"}, False), ({}, False), ({"cuda": None}, True)],
    ids=["CUDA", "unknown", "CPU"],
)
def test_a_torch_for_rocm_never_gets_cuda_kernels(
    info: dict[str, str | None], opened: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its tensors have the dispatch key of CUDA's, so a library with CUDA kernels must not be loaded at all."""
    calls: list[Path] = []
    (tmp_path / "libplop_ext.so").write_bytes(b"")
    monkeypatch.setenv("PLOP_PURE_PYTHON", "0")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libplop_ext.so")
    monkeypatch.setattr(native, "build_info", lambda: info)
    monkeypatch.setattr(native, "_open", calls.append)
    monkeypatch.setattr("torch.version.hip", "6.4")
    if opened:
        native.load()
    else:
        with pytest.warns(UserWarning, match="this torch is built for ROCm, and the native kernels for CUDA"):
            assert native.load().backend("cuda") == "pytorch"
    assert bool(calls) is opened


def test_the_backend_of_a_device() -> None:
    assert Status(True, True, "").backend("cuda:1") == "native-cuda"
    assert Status(True, False, "").backend("cuda") == "pytorch"
    assert Status(True, False, "").backend("cpu") == "native-cpu"
    assert Status(True, True, "").backend("meta") == Status(False, False, "").backend("cpu") == "pytorch"


def test_build_info() -> None:
    info = plop_ext.build_info()
    if not native.LIBRARY.exists():
        assert info == {} and not ops.STATUS.loaded
        return
    assert set(info) == {"version", "cuda", "cuda_archs", "torch_target", "built_with_torch", "compiler"}
    assert info["version"] == __version__ and info["torch_target"] == "2.10"
    assert (info["cuda"] is None) == (info["cuda_archs"] == "")


def test_build_info_is_empty_without_a_build() -> None:
    code = 'import sys; sys.modules["plop_ext._C"] = None; import plop_ext; print(plop_ext.build_info())'
    assert python(code).stdout == "{}\n"


@pytest.mark.skipif(not native.LIBRARY.exists(), reason="built without native kernels")
def test_the_kernels_load_under_a_python_that_c_does_not_belong_to() -> None:
    code = 'import sys; sys.modules["plop_ext._C"] = None; import plop_ext.ops as o; print(o.STATUS.backend("cpu"))'
    done = python(code, PLOP_PURE_PYTHON="0")
    assert done.stdout == "native-cpu\n", done.stderr


HEAVY = ("transformers", "peft", "datasets", "accelerate", "rich", "matplotlib", "safetensors", "tokenizers", "pandas")


@pytest.mark.parametrize(
    "statement",
    [
        "import plop_ext",
        "from plop_ext import *",
        "from plop_ext import score, Scores, Collector, find_plop_target_modules, build_info",
        "import torch; from tests.support.tiny_models import Plain; import plop_ext;"
        "plop_ext.score(Plain(), [torch.randn(2, 20, 16)], progress=False).place(types=1).targets()",
    ],
)
def test_imports_stay_light(statement: str) -> None:
    if "*" in statement:  # `compare` and `finetune` are names too: their modules must be as light
        statement += "; score, compare, finetune"
    code = f"{statement}\nimport sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_scores_and_placements_load_no_kernels() -> None:
    """So that a machine without them can choose from a file, and is told of them only where they would run."""
    code = "import sys; from plop_ext import Scores, Placement; print('plop_ext.ops' in sys.modules)"
    assert python(code).stdout == "False\n"


def test_every_public_name_is_there_and_an_unknown_one_is_an_attribute_error() -> None:
    for name in plop_ext.__all__:
        assert getattr(plop_ext, name) is not None
    with pytest.raises(AttributeError, match="module 'plop_ext' has no attribute 'nope'"):
        plop_ext.nope  # noqa: B018
