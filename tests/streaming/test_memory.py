"""The memory budget: what is refused, what is kept, where hidden states go, and the plan that says so beforehand."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plop_ext import InputError, memory, quantities
from plop_ext.cli.main import main
from plop_ext.models import reader
from plop_ext.models.checkpoint import Checkpoint
from plop_ext.models.reader import Reader
from plop_ext.models.source import find
from plop_ext.streaming import plan, recorders, skeleton
from plop_ext.streaming import score as streaming_score
from plop_ext.streaming.store import Store
from plop_ext.streaming.weights import Weights
from tests.support.architectures import ARCHITECTURES
from tests.support.checkpoint import saved
from tests.support.paths import ROOT
from tests.support.quiet import stream_quietly
from tests.support.tiny_models import gemma3, llama, qwen2, token_batch

BATCHES = [token_batch([30, 12], side="left"), token_batch([17], seed=1)]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "text, size",
    [("6GiB", 6 << 30), ("1.5 gib", 3 << 29), ("500MB", 500_000_000), ("2k", 2000), ("4096", 4096), (7, 7)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert quantities.size(text, "memory_budget") == size


def test_peak_rss_sees_what_was_held_for_a_moment() -> None:
    if not memory.reset_peak_rss():
        pytest.skip("this system does not reset the peak")
    before = memory.peak_rss()
    torch.ones(64 << 20, dtype=torch.uint8)
    assert memory.peak_rss() - before >= 60 << 20
    assert memory.rss() <= memory.peak_rss()


def test_a_budget_too_small_is_refused_with_one_that_is_enough(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path)
    with pytest.raises(InputError, match=r"`memory_budget` of 10.0 MiB is too small .* at least \d+MiB") as caught:
        stream_quietly(folder, BATCHES, device="cpu", memory_budget="10MiB")
    named = re.search(r"needs at least (\d+MiB)", str(caught.value))
    assert named is not None
    scores = stream_quietly(folder, BATCHES, device="cpu", memory_budget=named[1])
    streaming = scores.provenance["streaming"]
    assert streaming["peak_rss"] <= quantities.size(named[1], "x") == streaming["memory_budget"]


def test_without_a_budget_too_little_free_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(llama(), tmp_path)
    monkeypatch.setattr(memory, "available_ram", lambda: 100 << 20)
    with pytest.raises(InputError, match=r"need \d+.* of RAM, and 80.0 MiB may be used \(80 % of the free memory"):
        stream_quietly(folder, BATCHES, device="cpu")


def test_rooms_without_a_budget_on_a_device(tmp_path: Path) -> None:
    figures, cuda = streaming_plan(saved(llama(), tmp_path), "cpu", BATCHES), torch.device("cuda")
    ram = figures.ram_least(cuda, 0)
    assert figures.rooms_in_free(cuda, figures.device_least + 5, ram + 7) == (5, 7)
    with pytest.raises(InputError, match="of device memory, and"):
        figures.rooms_in_free(cuda, figures.device_least - 1, ram)


def test_pages_of_files_count_as_free_under_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (
        ("max", "1000\n"),
        ("current", "900\n"),
        ("stat", "anon 300\nactive_file 400\ninactive_file 200\n"),
    ):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "_LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "none")))
    monkeypatch.setattr(memory, "_USAGES", (str(tmp_path / "memory.current"), str(tmp_path / "none")))
    assert memory.available_ram() == 700


def test_hidden_states_on_disk_give_the_same_scores(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(gemma3(), tmp_path)
    whole = stream_quietly(folder, BATCHES, device=device)
    assert whole.provenance["streaming"]["hidden_kept"]["disk"] == 0
    monkeypatch.setattr(streaming_score, "_rooms", lambda *_: (0, 0))
    spilled = stream_quietly(folder, BATCHES, device=device)
    kept = spilled.provenance["streaming"]["hidden_kept"]
    assert kept["device"] == kept["RAM"] == 0 and kept["disk"] >= (2 * 30 + 17) * 32 * 4
    np.testing.assert_array_equal(spilled.totals, whole.totals)


@pytest.mark.gpu
def test_hidden_states_in_ram_give_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(gemma3(), tmp_path)
    whole = stream_quietly(folder, BATCHES, device="cuda")
    monkeypatch.setattr(streaming_score, "_rooms", lambda *_: (0, 1 << 30))
    spilled = stream_quietly(folder, BATCHES, device="cuda")
    kept = spilled.provenance["streaming"]["hidden_kept"]
    assert kept["device"] == kept["disk"] == 0 and kept["RAM"] > 0
    np.testing.assert_array_equal(spilled.totals, whole.totals)


@pytest.mark.gpu
def test_device_memory_stays_below_the_least_that_is_named(tmp_path: Path) -> None:
    model = llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, vocab_size=512)
    folder = saved(model.to(torch.bfloat16), tmp_path, "40MB")
    batches = [token_batch([128] * 4, seed=seed) for seed in range(8)]
    gc.collect()
    held = torch.cuda.memory_allocated()  # by tests that ran before this one in the same process
    for _ in range(2):  # the first run makes workspaces of cuBLAS
        scores = stream_quietly(folder, batches, device="cuda")
    streaming = scores.provenance["streaming"]
    least = streaming_plan(folder, "cuda", batches).device_least
    assert streaming["peak_device"] - held <= least + streaming["hidden"]
    block = sum(weight.numel() for weight in model.model.layers[0].parameters()) * 2
    assert streaming["peak_device"] - held >= 2 * block


def streaming_plan(folder: Path, device: str, batches: list[dict[str, torch.Tensor]], **settings: Any) -> plan.Plan:
    checkpoint = Checkpoint(folder)
    source = find(str(folder))
    model = skeleton.build(source, checkpoint, dtype="auto", device=torch.device(device), **settings)
    extents = [plan.Extent(*batch["input_ids"].shape) for batch in batches]
    return plan.make(model, Weights(model, checkpoint), extents, torch.device(device))


def test_the_store_fills_device_then_ram_then_disk(tmp_path: Path) -> None:
    store = Store(CPU, 100, 0, tmp_path)
    small, large = torch.arange(20, dtype=torch.int32), torch.arange(60, dtype=torch.int32)[10:40]
    store.put("a", [small])
    store.put("b", [large, small])
    assert store.most == {"device": 80, "RAM": 0, "disk": 200}
    (file,) = tmp_path.rglob("*.pt")
    assert file.stat().st_size < 60 * 4 + 2500  # a view is not written with all of its storage
    for name, expected in (("a", [small]), ("b", [large, small])):
        for found, wanted in zip(store.get(name), expected, strict=True):
            assert torch.equal(found, wanted)
    store.put("b", [small[:5]])
    assert not list(tmp_path.rglob("*.pt")) and torch.equal(store.get("b")[0], small[:5])
    store.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_the_reader_cuts_and_joins_tensors_of_any_size(
    chunk: int, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr(reader, "CHUNK", chunk)
    tensors = {
        "large": torch.randn(33, 17),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "half": torch.randn(5).to(torch.bfloat16),
        "codes": torch.arange(300, dtype=torch.uint8),
    }
    for number, names in enumerate((["large", "none"], ["scalar", "half", "codes"])):
        part = {name: tensors[name] for name in names}
        save_file(part, tmp_path / f"model-{number}.safetensors")
    index = {"weight_map": {name: f"model-{0 if name in ('large', 'none') else 1}.safetensors" for name in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    entries = list(Checkpoint(tmp_path).entries.values())
    source = Reader(device)
    try:
        buffer = torch.empty(reader.buffer_size(entries), dtype=torch.uint8, device=device)
        found = source.read(entries, buffer)
        if source.stream is not None:
            source.stream.synchronize()
    finally:
        source.close()
    assert source.bytes_read == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].cpu(), tensor), name
        assert found[name].data_ptr() % 16 == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3"])
def test_a_plan_from_the_configuration_alone_is_that_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    case = ARCHITECTURES[name]
    folder = saved(case.build(), tmp_path)
    full = streaming_plan(folder, "cpu", [case.batch()])
    model = skeleton.build(find(str(folder)), None, dtype="auto", device=CPU)
    bare = plan.make(model, None, [plan.Extent(*case.batch()["input_ids"].shape)], CPU)
    assert (bare.read, bare.outside, bare.hidden, bare.flops) == (full.read, full.outside, full.hidden, full.flops)
    blocks = case.build().get_submodule(model.prefix)
    expected = [sum(weight.numel() * 4 for weight in block.parameters()) for block in blocks]
    assert bare.block == max(expected) and full.block >= bare.block


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_layers_that_are_not_scored_take_memory_all_the_same(name: str, tmp_path: Path) -> None:
    case = ARCHITECTURES[name]
    folder = saved(case.build(), tmp_path)
    whole = streaming_plan(folder, "cpu", [case.batch()])
    part = streaming_plan(folder, "cpu", [case.batch()], include=["v_proj"])
    assert (part.activations, part.flops, part.block) == (whole.activations, whole.flops, whole.block)
    assert part.totals < whole.totals


def test_flops_are_those_of_the_matrix_products(tmp_path: Path) -> None:
    folder = saved(qwen2(), tmp_path)
    macs = sum(m.in_features * m.out_features for m in qwen2().model.layers.modules() if hasattr(m, "in_features"))
    assert streaming_plan(folder, "cpu", BATCHES).flops == 2 * macs * (2 * 30 + 17)


@pytest.mark.parametrize("shape", ["llama-3.1-70b", "llama-3.1-405b"])
def test_the_command_plans_large_shapes_from_their_configuration(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.make_checkpoint import make

    make(shape, tmp_path, config_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    arguments = ["score", str(tmp_path), "arithmetic", "--stream", "--dry-run", "--device", "cpu"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    billions = {"llama-3.1-70b": 70.55, "llama-3.1-405b": 405.85}[shape]
    head = 128256 * {"llama-3.1-70b": 8192, "llama-3.1-405b": 16384}[shape] / 1e9
    read = re.search(r"bytes read\s*│\s*([\d.]+) GB", printed)
    assert read is not None and float(read[1]) == pytest.approx(2 * (billions - head), rel=2e-3)
    for line in ("largest block", "least memory budget", "disk read, measured", "expected time"):
        assert line in printed
    assert main([*arguments, "--memory-budget", "1GiB"]) == 2
    assert "it needs at least" in capsys.readouterr().err


def test_the_command_prints_the_peaks(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["score", "plop-tiny", "arithmetic", "--stream", "--quiet", "--device", "cpu", "--samples", "2"]
    assert main([*arguments, "--memory-budget", "8GiB"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"peak RAM [\d.]+ [MG]iB; budget 8.00 GiB; hidden states: .* on device; .* read in", printed)
    assert "v_proj" in printed


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_only_two_blocks_are_ever_alive(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python's collector of cycles does not come in time: memory of a device must not wait for it."""
    import gc
    import weakref

    from plop_ext.streaming import blocks

    alive: list[weakref.ref[Any]] = []
    most = 0
    load = blocks.BlockLoader._load

    def counted(self: Any, *args: Any) -> Any:
        nonlocal most
        loaded = load(self, *args)
        alive.append(weakref.ref(loaded.module))
        most = max(most, sum(reference() is not None for reference in alive))
        return loaded

    monkeypatch.setattr(blocks.BlockLoader, "_load", counted)
    case = ARCHITECTURES[name]
    config = case.build().config
    config.num_hidden_layers = 6
    folder = saved(type(case.build())(config), tmp_path)
    gc.disable()
    try:
        stream_quietly(folder, [case.batch()], device="cpu")
    finally:
        gc.enable()
    assert len(alive) == 6 and most <= 2


def test_results_of_blocks_keep_their_container() -> None:
    hidden = torch.ones(2)
    assert recorders.Result().wrap(hidden) is hidden
    wrapped = recorders.Result(tuple, (None,)).wrap(hidden)
    assert wrapped[0] is hidden and wrapped[1] is None and recorders.Result.hidden(wrapped) is hidden


@pytest.mark.parametrize("megabytes, fits", [(10, True), (400, False)])
def test_the_limit_of_the_benchmark_is_a_hard_one(megabytes: int, fits: bool) -> None:
    import os

    from benchmarks import limited

    code = f"held = bytearray({megabytes} << 20)"
    status, kind = limited.run([sys.executable, "-S", "-c", code], 200 << 20, cwd=ROOT, env=os.environ)
    assert (status == 0) is fits, kind


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, plop_ext; plop_ext.score_streaming; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
