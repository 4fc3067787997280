"""Code that a checkpoint brings: it runs only if the user says so, no question is asked, and one line says it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_ext.cli.main import build_parser, main
from plop_ext.errors import InputError
from plop_ext.models import load_model
from plop_ext.models.code import ask_for_trust
from tests.support.edited_checkpoint import edit_config, write_llama
from tests.support.quiet import quietly, stream_quietly
from tests.support.tiny_lm import tiny_llama
from tests.support.tiny_models import token_batch

BATCH = [token_batch([30, 25])]
CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig

Path({canary!r}).write_text("ran")

class OwnConfig(LlamaConfig):
    model_type = "own-llama"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(autouse=True, scope="module")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copies of the checkpoints' code are imported from a temporary folder."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(autouse=True)
def no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def bring_code(folder: Path, canary: Path, model_type: str = "own-llama") -> Path:
    """Make a checkpoint of one that needs code of its own, or that brings code though it needs none."""
    (folder / "configuration_own.py").write_text(CONFIGURATION.format(canary=str(canary)))
    (folder / "modeling_own.py").write_text(MODELING)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    names = {"OwnForCausalLM": "own-llama", "LlamaForCausalLM": "llama"}
    declared = next(name for name, of in names.items() if of == model_type)
    edit_config(folder, model_type=model_type, auto_map=auto_map, architectures=[declared])
    return folder


@pytest.fixture
def own(tmp_path: Path, canary: Path) -> Path:
    return bring_code(write_llama(tmp_path / "own"), canary)


def test_a_model_that_needs_its_code_is_refused_in_one_line(own: Path, canary: Path, capfd: Any) -> None:
    for load in (lambda: load_model(str(own), device="cpu"), lambda: stream_quietly(own, BATCH, device="cpu")):
        with pytest.raises(
            InputError, match=r"brings code of its own \(configuration_own.py, modeling_own.py\)"
        ) as caught:
            load()
        assert str(caught.value).endswith("then allow it to run with `trust_remote_code`")
    assert not canary.exists() and capfd.readouterr() == ("", "")


def test_code_that_is_trusted_runs_and_is_said(own: Path, canary: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = load_model(str(own), device="cpu", trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM" and canary.read_text() == "ran"
    expected = tiny_llama(torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (
        record.getMessage()
        == f"{own} brings code of its own, which runs as you asked: configuration_own.py, modeling_own.py"
    )
    scores = quietly(model, BATCH)
    streamed = stream_quietly(own, BATCH, device="cpu", trust_remote_code=True)
    assert streamed.nfn.tolist() == scores.nfn.tolist()


def test_code_that_is_not_needed_does_not_run_and_is_said(
    tmp_path: Path, canary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bring_code(write_llama(tmp_path / "llama"), canary, model_type="llama")
    model, _ = load_model(str(folder), device="cpu")
    assert type(model).__module__.startswith("transformers.") and not canary.exists()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "which does not run: transformers has this model" in record.getMessage()


def test_a_tokenizer_that_needs_its_code(tmp_path: Path, canary: Path) -> None:
    folder = write_llama(tmp_path)
    (folder / "tokenization_own.py").write_text(f"from pathlib import Path; Path({str(canary)!r}).write_text('ran')")
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    auto_map = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    path.write_text(json.dumps({**content, "tokenizer_class": "OwnTokenizer", "auto_map": auto_map}))
    with pytest.raises(InputError, match="the tokenizer cannot be loaded without code that the checkpoint brings"):
        load_model(str(folder), device="cpu")
    assert not canary.exists()


@pytest.mark.parametrize(
    "auto_map",
    [
        ["tokenization_x.A", None],
        {"AutoTokenizer": ["tokenization_x.A", None]},
        {"AutoModel": "owner/name--tokenization_x.A"},
    ],
    ids=str,
)
def test_every_form_of_a_reference_is_seen(auto_map: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (module,) = ask_for_trust("m", tmp_path, True).asked
    assert module.endswith("tokenization_x")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"auto_map": 3}', '{"auto_map": {"AutoModel": 3}}', "null"])
def test_a_damaged_file_asks_for_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    assert ask_for_trust("m", tmp_path, False).asked == ()


def test_no_pickle_runs(tmp_path: Path, canary: Path) -> None:
    """Not those of transformers' loader, nor the ones that are read for names and sizes."""

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.write_text, (canary, "ran"))

    folder = write_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="the weights cannot be loaded"):
        load_model(str(folder), device="cpu")
    assert not canary.exists()


def test_the_option_of_the_command(
    own: Path, canary: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    command = ["score", str(own), "arithmetic", "--samples", "4", "--device", "cpu"]
    assert main(command) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("then allow it to run with `--trust-remote-code`")
    assert not canary.exists()
    for stream in ([], ["--stream"]):
        caplog.clear()
        assert main([*command, *stream, "--trust-remote-code"]) == 0, capsys.readouterr().err
        assert sum("which runs as you asked" in record.getMessage() for record in caplog.records) == 1


def test_every_command_that_loads_a_model_has_the_option() -> None:
    _, commands = build_parser()
    named = {name: {action.dest for action in parser._actions} for name, parser in commands.items()}
    loading = {name for name, arguments in named.items() if "model" in arguments}
    assert {"score", "finetune", "compare"} <= loading
    assert all("trust_remote_code" in named[name] for name in loading)
