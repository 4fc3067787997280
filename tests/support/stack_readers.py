"""What training stacks make of exports, as their sources say; `tests/stacks` checks the same with their own code."""

from __future__ import annotations

import ast
import fnmatch
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml

try:
    import tomllib
except ImportError:  # before Python 3.11
    import tomli as tomllib


def call_in(text: str, function: str) -> dict[str, Any]:
    """The keyword arguments of a call in a Python file."""
    calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    found = next(node for node in calls if ast.unparse(node.func) == function)
    return {str(item.arg): ast.literal_eval(item.value) for item in found.keywords}


def words_in(text: str) -> list[str]:
    """The words of an array of Bash."""
    found = re.search(r"^PLOP=\(\n(.*)^\)", text, re.M | re.S)
    assert found is not None
    return shlex.split(found[1])


def options_in(text: str) -> dict[str, list[str]]:
    """The options of an array of Bash, with their words."""
    options: dict[str, list[str]] = {}
    for word in words_in(text):
        if word.startswith("--"):
            options[word] = []
        else:
            options[list(options)[-1]].append(word)
    return options


def _lora_config(
    keys: Mapping[str, Any], r: str, alpha: str, modules: str, *more: str, **fixed: Any
) -> dict[str, Any]:
    """Keyword arguments of `LoraConfig` from keys whose names end like its own."""
    optional = {
        field: keys[name] for name in more for field in [name.removeprefix("lora_")] if keys.get(name) is not None
    }
    return {"r": keys[r], "lora_alpha": keys[alpha], "target_modules": keys[modules], **optional, **fixed}


def _trl(text: str) -> dict[str, Any]:
    keys = yaml.safe_load(text)
    modules = keys["lora_target_modules"]
    keys["lora_target_modules"] = modules[0] if len(modules) == 1 else modules
    assert keys["use_peft"] is True
    return _lora_config(
        {"lora_dropout": 0.05, **keys},
        "lora_r",
        "lora_alpha",
        "lora_target_modules",
        "lora_target_parameters",
        lora_dropout=keys["lora_dropout"],
    )


def _axolotl(text: str) -> dict[str, Any]:
    keys = yaml.safe_load(text)
    assert keys["adapter"] == "lora" and keys["lora_target_linear"] is False
    more = ("lora_target_parameters", "lora_rank_pattern", "lora_alpha_pattern")
    return _lora_config(keys, "lora_r", "lora_alpha", "lora_target_modules", *more, lora_dropout=keys["lora_dropout"])


def _llama_factory(text: str) -> dict[str, Any]:
    keys = yaml.safe_load(text)
    targets = [item.strip() for item in keys["lora_target"].split(",")]
    return {"r": keys["lora_rank"], "lora_alpha": keys["lora_alpha"], "target_modules": targets}


def _ms_swift(text: str) -> dict[str, Any]:
    keys = yaml.safe_load(text)
    targets = keys.get("target_regex") or keys.get("target_modules", ["all-linear"])
    return {
        "r": keys["lora_rank"],
        "lora_alpha": keys["lora_alpha"],
        "target_modules": targets,
        "lora_dropout": keys.get("lora_dropout", 0.05),
        **({"target_parameters": keys["target_parameters"]} if "target_parameters" in keys else {}),
    }


def _verl(text: str) -> dict[str, Any]:
    keys = yaml.safe_load(text)["actor_rollout_ref"]["model"]
    return _lora_config(keys, "lora_rank", "lora_alpha", "target_modules", "target_parameters")


def _openrlhf(text: str) -> dict[str, Any]:
    options = options_in(text)
    return {
        "r": int(options["--ds.lora.rank"][0]),
        "lora_alpha": int(options["--ds.lora.alpha"][0]),
        "lora_dropout": float(options["--ds.lora.dropout"][0]),
        "target_modules": options["--ds.lora.target_modules"],
    }


def _diffusers(text: str) -> dict[str, Any]:
    options = options_in(text)
    return {
        "r": int(options["--rank"][0]),
        "lora_alpha": int(options["--lora_alpha"][0]),
        "lora_dropout": float(options["--lora_dropout"][0]),
        "target_modules": [layer.strip() for layer in options["--lora_layers"][0].split(",")],
    }


# Stacks that hand their configuration to PEFT: the arguments of its `LoraConfig`.
PEFT: dict[str, Callable[[str], dict[str, Any]]] = {
    "peft": lambda text: call_in(text, "LoraConfig"),
    "trl": _trl,
    "axolotl": _axolotl,
    "llama-factory": _llama_factory,
    "ms-swift": _ms_swift,
    "unsloth": lambda text: call_in(text, "FastLanguageModel.get_peft_model"),
    "verl": _verl,
    "openrlhf": _openrlhf,
    "diffusers": _diffusers,
}

Adapted = dict[str, tuple[int, float]]  # name of a module to its rank and alpha


def _nemo_automodel(text: str, names: Iterable[str]) -> Adapted:
    keys = yaml.safe_load(text)["peft"]
    patterns = [re.compile("^" + entry.replace("*", "(.*)") + "$") for entry in keys["target_modules"]]
    leaves = set(keys["target_modules"])
    return {
        name: (keys["dim"], keys["alpha"])
        for name in names
        if name.rsplit(".", 1)[-1] in leaves or any(pattern.match(name) for pattern in patterns)
    }


def _prime_rl(text: str, names: Iterable[str]) -> Adapted:
    keys = tomllib.loads(text)["model"]["lora"]
    entries = keys["target_modules"]
    return {
        name: (keys["rank"], keys["alpha"])
        for name in names
        if any(re.search(entry, name) if re.search(r"[.*+?^$\[\]{}|()\\]", entry) else entry in name.split(".")
               for entry in entries)
    }  # fmt: skip


def _mlx_lm(text: str, names: Iterable[str]) -> Adapted:
    keys = yaml.safe_load(text)["lora_parameters"]
    return {
        name: (keys["rank"], keys["scale"] * keys["rank"])
        for name in names
        if name in keys["keys"] or re.sub(r"^(?:.*\.)?layers\.\d+\.", "", name) in keys["keys"]
    }


def _lycoris(text: str, names: Iterable[str]) -> Adapted:
    keys = tomllib.loads(text)
    assert keys["use_fnmatch"] is True
    assert keys["target_module"] == keys["unet_target_module"] == keys["text_encoder_target_module"] == []
    found: Adapted = {}
    for name in names:
        for pattern, options in keys["name_algo_map"].items():
            if fnmatch.fnmatch(name, pattern):
                found.setdefault(name, (options["dim"], options["alpha"]))
    return found


def _kohya(text: str, names: Iterable[str]) -> Adapted:
    keys = tomllib.loads(text)
    key, _, pairs = keys["network_args"][0].partition("=")
    assert key == "network_reg_dims" and keys["network_dim"] == 0
    ranks = {pattern.strip(): int(rank) for pattern, rank in (pair.split("=", 1) for pair in pairs.split(","))}
    found: Adapted = {}
    for name in names:
        for pattern, rank in ranks.items():
            if re.search(pattern, f"lora_unet.{name}".replace(".", "_")):
                found.setdefault(name, (rank, keys["network_alpha"]))
    return found


def _musubi(text: str, names: Iterable[str]) -> Adapted:
    keys = tomllib.loads(text)
    patterns = {key: ast.literal_eval(value) for key, value in (item.split("=", 1) for item in keys["network_args"])}

    def matches(key: str, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in patterns[key])

    rank = (keys["network_dim"], keys["network_alpha"])
    return {name: rank for name in names if not matches("exclude_patterns", name) or matches("include_patterns", name)}


_MEGATRON = {
    "self_attn.q_proj": ("self_attention.linear_qkv", "linear_q"),
    "self_attn.k_proj": ("self_attention.linear_qkv", "linear_k"),
    "self_attn.v_proj": ("self_attention.linear_qkv", "linear_v"),
    "self_attn.o_proj": ("self_attention.linear_proj", "linear_proj"),
    "mlp.gate_proj": ("mlp.linear_fc1", "linear_fc1_gate"),
    "mlp.up_proj": ("mlp.linear_fc1", "linear_fc1_up"),
    "mlp.down_proj": ("mlp.linear_fc2", "linear_fc2"),
}
_FUSED = {
    "linear_q": "linear_qkv",
    "linear_k": "linear_qkv",
    "linear_v": "linear_qkv",
    "linear_fc1_up": "linear_fc1",
    "linear_fc1_gate": "linear_fc1",
}


def _canonical(keys: Mapping[str, Any], names: Iterable[str]) -> Adapted:
    """Megatron-Bridge's canonical LoRA: the first pattern that matches a fused module says which parts get LoRA."""
    mapping: dict[str, set[str]] = {}
    for target in keys["target_modules"]:
        part = next((part for part in _FUSED if target.endswith(part)), target)
        mapping.setdefault(target.replace(part, _FUSED.get(part, part)), set()).add(part)
    found: Adapted = {}
    for name in names:
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if block is None or block[2] not in _MEGATRON:
            continue
        module, part = _MEGATRON[block[2]]
        full = f"decoder.layers.{block[1]}.{module}"
        for pattern, parts in mapping.items():
            if full.rsplit(".", 1)[-1] == pattern or re.match("^" + pattern.replace("*", "(.*)") + "$", full):
                if part in parts or part not in _FUSED:
                    found[name] = (keys.get("dim", keys.get("rank")), keys["alpha"])
                break
    return found


def _verl_megatron(text: str, names: Iterable[str]) -> Adapted:
    keys = yaml.safe_load(text)["actor_rollout_ref"]["model"]["lora"]
    assert keys["type"] == "canonical_lora"
    return _canonical(keys, names)


def _torchtune(text: str, names: Iterable[str]) -> Adapted:
    keys = yaml.safe_load(text)["model"]
    found: Adapted = {}
    for name in names:
        leaf = name.rsplit(".", 1)[-1]
        attention = {"o_proj": "output_proj"}.get(leaf, leaf) in keys["lora_attn_modules"]
        mlp = keys["apply_lora_to_mlp"] and leaf in ("gate_proj", "up_proj", "down_proj")
        if attention or mlp or (keys["apply_lora_to_output"] and name == "lm_head"):
            found[name] = (keys["lora_rank"], keys["lora_alpha"])
    return found


# Stacks with a rule of their own: the modules that get LoRA, among those of a model.
OWN: dict[str, Callable[[str, Iterable[str]], Adapted]] = {
    "kohya": _kohya,
    "lycoris": _lycoris,
    "megatron-bridge": lambda text, names: _canonical(call_in(text, "CanonicalLoRA"), names),
    "mlx-lm": _mlx_lm,
    "musubi": _musubi,
    "nemo-automodel": _nemo_automodel,
    "prime-rl": _prime_rl,
    "torchtune": _torchtune,
    "verl-megatron": _verl_megatron,
}
