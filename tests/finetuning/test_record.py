"""What a run leaves beside its adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plop_ext.data import encode, load_rows
from plop_ext.data.held_out import data_hash
from plop_ext.finetuning.finetune import finetune
from plop_ext.finetuning.record import card
from plop_ext.placement.evidence import Evidence
from tests.support.tiny_lm import byte_tokenizer, placement, tiny_llama

TOKENIZER = byte_tokenizer()
QUICK: dict[str, Any] = {"max_steps": 2, "batch_size": 2, "progress": False, "r": 2, "lora_alpha": 4}


def test_the_record_says_what_the_run_depended_on_and_is_the_same_for_the_same_run(tmp_path: Path) -> None:
    model = tiny_llama()
    train = encode(load_rows("arithmetic", max_samples=8), TOKENIZER, max_length=128)
    held_out = encode(load_rows("arithmetic", split="test", max_samples=3), TOKENIZER, max_length=128)
    chosen = placement(model)
    results = [
        finetune(model, TOKENIZER, train, held_out, chosen, output_dir=tmp_path / name, **QUICK) for name in "ab"
    ]
    for name in ("result.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    record = json.loads((tmp_path / "a" / "result.json").read_text())
    assert (record["format"], record["version"]) == ("plop_ext.adapter", 2)
    assert record["model"]["class"] == "LlamaForCausalLM"
    assert record["model"]["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert record["placement"]["modules"] == list(chosen.modules) and record["placement"]["label"] == chosen.label
    assert record["data"]["train"] == {"samples": 8, "hash": data_hash(train)}
    assert record["data"]["eval"] == {"samples": 3, "hash": data_hash(held_out)}
    assert record["result"]["loss_before"] == results[0].loss_before
    assert record["result"]["loss_after"] == results[0].loss_after
    assert record["result"]["trainable_params"] == results[0].trainable_params
    assert record["settings"]["max_steps"] == 2 and record["settings"]["lora_alpha"] == 4
    assert {"plop_ext", "torch", "peft", "transformers"} <= set(record["versions"])
    words = (tmp_path / "a" / "README.md").read_text()
    assert words == card(record) and f"{results[0].loss_after:.4f} after" in words and chosen.label in words
    assert "More Information Needed" not in words


def test_names_cannot_break_the_card() -> None:
    record: dict[str, Any] = {
        "model": {"name": 'a: "b"\n---', "class": "Toy", "parameters": 1},
        "placement": {"label": "x | y", "types": ("t",), "modules": ("m",), "notes": ("one\nline",), "evidence": None},
        "data": {"train": {"samples": 1, "hash": "h"}},
        "result": {
            **{"r": 1, "trainable_params": 2, "loss_before": 1.0, "loss_after": None, "steps": 3},
            **{"learning_rate": 1e-3, "seed": 0},
        },
        "versions": {"plop_ext": "0"},
    }
    assert "| chosen from | no scores |" in card(record)
    evidence = Evidence("h", "a|b", None, 4, 9, {"t": 0.5}, ("no\nsignal",))
    record["placement"]["evidence"] = vars(evidence)
    lines = card(record).splitlines()
    assert r"| chosen from | scores h of 4 samples (9 tokens) of a\|b; NFN: t 0.500 |" in lines
    assert "- no signal" in lines
    assert lines[:5] == ["---", r'base_model: "a: \"b\"\n---"', "library_name: peft", "tags: [lora, plop]", "---"]
    assert "| placement | x \\| y: t (1 modules) |" in lines and "- one line" in lines
    assert any("1.0000 before, not finite after" in line for line in lines)
