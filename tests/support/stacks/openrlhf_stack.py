"""OpenRLHF: the options of its command for supervised finetuning."""

from __future__ import annotations

import argparse
import ast
import importlib.util
from datetime import datetime
from pathlib import Path
from typing import Any

from peft import LoraConfig

from tests.support.stack_readers import words_in
from tests.support.stacks import Adapted
from tests.support.stacks.by_peft import by_config


def adapted(path: str) -> Adapted:
    lora = _parsed(words_in(Path(path).read_text(encoding="utf-8"))).ds.lora
    return by_config(
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=lora.target_modules,
            lora_dropout=lora.dropout,
            bias="none",
        ),
        path,
    )


def _parsed(words: list[str]) -> Any:
    """Run the part of its command that declares the options; the rest needs DeepSpeed."""
    package = importlib.util.find_spec("openrlhf")
    assert package is not None and package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0])
    tree = ast.parse((folder / "cli" / "train_sft.py").read_text(encoding="utf-8"))
    main = next(node for node in tree.body if isinstance(node, ast.If))
    declared = [node for node in main.body if ast.unparse(node).startswith(("parser = ", "parser.add_argument"))]
    space: dict[str, Any] = {"argparse": argparse, "datetime": datetime}
    exec(compile(ast.Module(declared, []), "train_sft.py", "exec"), space)
    nested: dict[str, Any] = {}
    exec((folder / "utils" / "config.py").read_text(encoding="utf-8"), nested)
    return nested["hierarchize"](space["parser"].parse_args(words))
