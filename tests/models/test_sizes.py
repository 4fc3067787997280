"""A config.json that asks for too much fails at once, before anything of that size is made."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_ext import memory
from plop_ext.cli.main import main
from plop_ext.errors import InputError
from plop_ext.models import load_model
from plop_ext.models.sizes import check_files
from plop_ext.scores import Scores
from tests.support.edited_checkpoint import edit_config, write_llama
from tests.support.quiet import stream_quietly
from tests.support.tiny_models import token_batch

BATCH = [token_batch([12, 7])]
AT_ONCE = 5.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 10**9, r"describes a model of [\d,]{15,} weights, and the checkpoint's files hold 0.1 MiB"),
        ("hidden_size", 10**19, r"config.json cannot be used"),
        ("intermediate_size", 10**10, r"describes a model of [\d,]{13,} weights"),
        ("vocab_size", 10**11, r"describes a model of [\d,]{13,} weights"),
        ("num_hidden_layers", 10**9, r"asks for num_hidden_layers=1000000000, and the checkpoint holds 21 tensors"),
        ("hidden_size", -32, r"config.json cannot be used"),
        ("num_attention_heads", 0, r"config.json cannot be used"),
        ("hidden_size", "large", r"config.json cannot be used"),
    ],
)
def test_sizes_beyond_the_files_fail_at_once(field: str, value: Any, message: str, folder: Path) -> None:
    edit_config(folder, **{field: value})
    before = memory.peak_rss()
    started = time.perf_counter()
    with pytest.raises(InputError, match=message) as caught:
        load_model(str(folder), device="cpu")
    assert time.perf_counter() - started < AT_ONCE and memory.peak_rss() - before < 200 << 20
    assert "\n" not in str(caught.value)
    started = time.perf_counter()
    with pytest.raises(InputError) as caught:
        stream_quietly(folder, BATCH, device="cpu")
    assert time.perf_counter() - started < AT_ONCE and memory.peak_rss() - before < 200 << 20
    assert "\n" not in str(caught.value)


def test_a_dry_run_of_a_config_alone_does_not_build_a_million_layers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").unlink()
    edit_config(folder, num_hidden_layers=10**6)
    assert main(["score", str(folder), "arithmetic", "--stream", "--dry-run", "--device", "cpu"]) == 2
    assert "asks for num_hidden_layers=1000000, and no model has as many" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "width"), [("auto", 2), ("float32", 4)])
def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    dtype: str, width: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model(str(folder), device="cpu")
    size = width * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(memory, "available_ram", lambda: size)
    assert load_model(str(folder), device="cpu", dtype=dtype)[0].device.type == "cpu"
    monkeypatch.setattr(memory, "available_ram", lambda: size - 1)
    monkeypatch.setattr(type(model), "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(
        InputError, match=r"takes 0.\d MiB of memory, and 0.\d MiB are free on cpu; .*plop score --str"
    ):
        load_model(str(folder), device="cpu", dtype=dtype)


def test_training_on_a_cpu_is_counted_in_float32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(str(folder), device="cpu")
    size = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(memory, "available_ram", lambda: 3 * size)
    load_model(str(folder), device="cpu")
    with pytest.raises(InputError, match="free on cpu"):
        load_model(str(folder), device="cpu", for_training=True)


def test_formats_of_few_bits_and_tied_weights_are_not_too_small() -> None:
    """A complete checkpoint is never refused: no format stores less than a bit for a weight."""
    from plop_ext.models.checkpoint import TensorEntry

    model = torch.nn.Linear(64, 64, bias=False, device="meta")
    entry = TensorEntry("weight", Path("model.safetensors"), 0, 64 * 64 // 8, torch.uint8, "U8", (512,))
    check_files("m", model, {"weight": entry})
    with pytest.raises(InputError, match="describes a model of 4,096 weights"):
        check_files(
            "m", model, {"weight": TensorEntry("weight", Path(), 0, 64 * 64 // 8 - 1, torch.uint8, "U8", (511,))}
        )


@pytest.mark.parametrize(
    ("total", "options", "streams"),
    [
        (1000, [], True),
        (1000, ["--samples", "2"], True),
        (1 << 40, [], False),  # then it is other processes that take the memory, and the user may end them
        (1000, ["--stop", "settled"], False),
        (1000, ["--settle-types", "2"], False),
        (1000, ["--compat", "paper-script"], False),
        (1000, ["--fast"], False),
    ],
)
def test_a_model_larger_than_the_device_is_streamed_unless_an_option_needs_it_in_memory(
    total: int,
    options: list[str],
    streams: bool,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("plop_ext.models.sizes._memory", lambda device: (1000, total))
    output = tmp_path.with_suffix(".json")  # beside the model, whose files the scores are of
    code = main(["score", str(folder), "arithmetic", "--device", "cpu", "-q", "-o", str(output), *options])
    printed = capsys.readouterr().err
    assert code == (0 if streams else 2)
    if streams:
        assert caplog.text.count("is larger than the memory of the device, and is scored block by block") == 1
        assert "streaming" in Scores.load(output).provenance
        again = ["score", str(folder), "arithmetic", "--device", "cpu", "-q", "-o", str(output), *options, "--resume"]
        assert main(again) == 0 and "is finished" in capsys.readouterr().err
    else:
        assert "of memory, and 0.0 MiB are free on cpu; choose another" in printed and not output.exists()
