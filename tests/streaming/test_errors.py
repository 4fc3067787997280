"""What a streamed run refuses: damaged checkpoints and models that do not fit, before anything is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_ext import InputError, SetupError
from plop_ext.cli.main import main
from plop_ext.models.checkpoint import Checkpoint
from plop_ext.streaming import recorders, weights
from plop_ext.streaming import score as streaming_score
from plop_ext.streaming.run import Stream
from tests.support.architectures import ARCHITECTURES
from tests.support.checkpoint import saved
from tests.support.quiet import stream_quietly
from tests.support.tiny_models import llama, token_batch

BATCH = [token_batch([30, 12])]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(llama(), tmp_path / "model")


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a refusal comes after the first computation."""
    monkeypatch.setattr(Stream, "__init__", lambda *_: pytest.fail("the run began"))


def streamed(folder: Path, **settings: Any) -> Any:
    return stream_quietly(folder, BATCH, device="cpu", **settings)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def within_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def damage_the_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:12] = b"\0\0\0\0"
    path.write_bytes(bytes(content))


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "harm, message",
    [
        (truncate, r"`\S*{name}` is truncated: \d+ bytes of \d+; download or save it again"),
        (within_the_header, r"`\S*{name}` is truncated: it ends within its header"),
        (damage_the_header, r"`\S*{name}` is no safetensors file: its header is damaged"),
        (lengthen, r"`\S*{name}` is longer than it should be"),
        (Path.unlink, r"`\S*{name}` is missing, which model.safetensors.index.json lists"),
    ],
)
def test_a_bad_shard_is_named(harm: Callable[[Path], object], message: str, model: Path) -> None:
    shard = shards(model)[-2]
    harm(shard)
    with pytest.raises(InputError, match=message.format(name=shard.name)):
        streamed(model)


@pytest.mark.usefixtures("nothing_runs")
def test_a_shard_of_another_checkpoint_lacks_what_the_index_says(model: Path) -> None:
    first, second = shards(model)[:2]
    shutil.copy(second, first)
    with pytest.raises(InputError, match=rf"`\S*{first.name}` lacks \S+, which model.safetensors.index.json lists"):
        streamed(model)


@pytest.mark.usefixtures("nothing_runs")
def test_missing_weights_are_named(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    gone = content["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    content["weight_map"] = {key: name for key, name in content["weight_map"].items() if name != gone}
    index.write_text(json.dumps(content))
    (model / gone).unlink()
    with pytest.raises(
        InputError, match=r"the checkpoint lacks \d+ of the weights of LlamaForCausalLM, such as model"
    ):
        streamed(model)


def test_a_weight_of_another_shape(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(
        InputError, match=r"the checkpoint holds \S+ as \([\d, ]+\), and config.json asks for \([\d, ]+\)"
    ):
        streamed(model)


@pytest.mark.usefixtures("nothing_runs")
def test_a_checkpoint_that_is_no_safetensors(model: Path) -> None:
    for path in (*shards(model), model / "model.safetensors.index.json"):
        path.unlink()
    torch.save({}, model / "pytorch_model.bin")
    with pytest.raises(
        InputError, match=r"holds neither model.safetensors nor .*save it again with `save_pretrained`"
    ):
        streamed(model)


def test_a_damaged_index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match=r"`\S*index.json` is damaged"):
        Checkpoint(model)


ADVICE = 'load it with `device_map="auto"` and give it to `plop_ext.score` instead'


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "name, include, reason",
    [
        ("t5", None, r"the layers to score are in 2 lists of blocks \(decoder.block, encoder.block\)"),
        ("llama", ["lm_head"], "`lm_head` is in no list of repeated blocks: it cannot be streamed"),
    ],
)
def test_layers_outside_of_one_list_of_blocks(name: str, include: Any, reason: str, tmp_path: Path) -> None:
    case = ARCHITECTURES[name]
    folder = saved(case.build(), tmp_path)
    with pytest.raises(InputError, match=reason) as caught:
        stream_quietly(folder, [case.batch()], device="cpu", include=include)
    assert str(caught.value).endswith(ADVICE)


def test_blocks_that_hand_on_more_than_a_hidden_state(tmp_path: Path) -> None:
    """T5's blocks hand their position bias to the next."""
    case = ARCHITECTURES["t5"]
    folder = saved(case.build(), tmp_path)
    names = [name for name, module in case.build().named_modules() if isinstance(module, nn.Linear)]
    encoder = [name for name in names if name.startswith("encoder.block")]
    with pytest.raises(InputError, match="cannot be streamed: its blocks pass on more than a hidden state") as caught:
        stream_quietly(folder, [case.batch()], device="cpu", include=encoder)
    assert str(caught.value).endswith(ADVICE)


class _Model(nn.Module):
    """Runs its blocks as `order` says, and may do something between them."""

    def __init__(self, order: tuple[int, ...], between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.order, self.between = order, between

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.between(self.blocks[index](x))
        return x


@pytest.mark.parametrize(
    "order, between, reason",
    [
        ((0, 1, 2), lambda x: x + 1, "it changes the hidden state between blocks 0 and 1"),
        ((0, 1, 2), lambda x: x.add_(1), "it changes the hidden state between blocks 0 and 1"),
        ((0, 0, 1, 2), lambda x: x, "its blocks are not called once each in order: 0 instead of 1"),
        ((0, 2), lambda x: x, "its blocks are not called once each in order: 2 instead of 1"),
        ((0, 1), lambda x: x, "block 2 of 3 is never called"),
        ((0, 1, 2, 0), lambda x: x, "block 0 is called more than once"),
        ((0, 1, 2, 2), lambda x: x, "block 2 is called more than once"),
    ],
)
def test_models_that_do_not_fit(order: tuple[int, ...], between: Callable[[Tensor], Tensor], reason: str) -> None:
    from plop_ext.layers import discover
    from plop_ext.streaming.skeleton import Skeleton

    model = _Model(order, between)
    skeleton = Skeleton(model, torch.float32, None, "blocks", model.blocks, discover(model), 2, ())
    real = list(model.blocks)
    with pytest.raises(InputError, match=f"_Model cannot be streamed: {reason}"):
        recorders.record(lambda: model(torch.ones(1, 4)), skeleton, recorders.Result(), to_the_end=True)
    assert list(model.blocks) == real


def test_what_works_in_place_after_the_blocks_changes_nothing() -> None:
    from plop_ext.layers import discover
    from plop_ext.streaming.skeleton import Skeleton

    model = _Model((0, 1, 2), lambda x: x)
    skeleton = Skeleton(model, torch.float32, None, "blocks", model.blocks, discover(model), 2, ())
    first, calls = recorders.record(
        lambda: model(torch.ones(1, 4)).add_(1), skeleton, recorders.Result(), to_the_end=True
    )
    assert torch.equal(first, torch.ones(1, 4)) and len(calls.arguments) == 3


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(llama(num_hidden_layers=4), tmp_path)
    weight_map = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    last = model / weight_map["model.layers.3.mlp.up_proj.weight"]
    place = weights.Weights.place

    def shrink(self: Any, *args: Any) -> None:
        last.write_bytes(b"")
        place(self, *args)

    monkeypatch.setattr(weights.Weights, "place", shrink)
    with pytest.raises(InputError, match=rf"`\S*{last.name}` became shorter while it was read"):
        streamed(model)


def test_an_unknown_version_of_transformers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import core_model_loading

    monkeypatch.delattr(core_model_loading, "convert_and_load_state_dict_in_model")
    with pytest.raises(SetupError, match=r"does not know how transformers .* converts checkpoints"):
        streamed(model)


def test_a_dry_run_downloads_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a hub that holds the weights twice."""
    import fnmatch

    whole, local, fetched = saved(llama(), tmp_path / "whole"), tmp_path / "local", set[str]()
    local.mkdir()
    (whole / "consolidated.00.safetensors").write_bytes(b"")

    def download(repository: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for path in whole.iterdir():
            allowed, ignored = (
                any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
                for patterns in (allow_patterns, ignore_patterns)
            )
            if allowed and not ignored:
                fetched.add(path.name)
                (local / path.name).write_bytes(path.read_bytes())
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert main(["score", "someone/llama", "arithmetic", "--stream", "--dry-run", "--device", "cpu"]) == 0
    assert "least memory budget" in capsys.readouterr().out
    assert {"config.json", "model.safetensors.index.json"} <= fetched
    assert not any(name.endswith(".safetensors") for name in fetched)
    assert streaming_score.streamed_source("someone/llama").folder == local
    shards = {path.name for path in whole.glob("model-*.safetensors")}
    assert len(shards) > 1 and {name for name in fetched if name.endswith(".safetensors")} == shards


@pytest.mark.parametrize("budget", ["much", "0GiB", "-1", "6 gallons", ""])
def test_a_budget_that_is_no_size(budget: str, model: Path) -> None:
    with pytest.raises(InputError, match=r"`memory_budget` must be a size .6GiB, 500MB., got"):
        streamed(model, memory_budget=budget)


def test_a_checkpoint_without_a_tokenizer(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(model), "arithmetic", "--device", "cpu", "--stream"]) == 2
    assert "the tokenizer cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dry-run"], "`--dry-run` needs --stream"),
        (["--memory-budget", "1GiB"], "`--memory-budget` needs --stream"),
        (["--stream", "--compat", "paper-script"], "`--compat` scores the output head"),
        (["--stream", "--resume"], "`--resume` needs `--output`, the file of the run to continue"),
        (["--stream", "--stop", "settled"], "`--stop` ends a run between two batches"),
        (["--stream", "--dry-run", "--samples", "0"], "must be at least 1"),
    ],
)
def test_mistakes_at_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "plop-tiny", "arithmetic", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_blocks_that_share_weights(tmp_path: Path, nothing_runs: None) -> None:
    from transformers import AutoModelForCausalLM, Zamba2Config

    config = Zamba2Config(
        **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "mamba_d_state": 8, "n_mamba_heads": 4},
        **{"mamba_headdim": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "attention_head_dim": 32},
        **{"intermediate_size": 32, "mamba_ngroups": 1, "num_mem_blocks": 1, "adapter_rank": 4, "chunk_size": 16},
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    )
    folder = saved(AutoModelForCausalLM.from_config(config), tmp_path / "zamba2")
    with pytest.raises(InputError, match=r"is shared by the blocks 1, 3: a model whose blocks share weights cannot"):
        streamed(folder)
