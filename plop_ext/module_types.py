"""Module types: the name of a module without its layer index, its role where a name has several, and its family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from plop_ext.arguments import check_type, shown
from plop_ext.errors import InputError

# Between the label of a type and its role. No name of a module holds it, and no shell reads it.
_ROLE = "@"
_ATTENTION_PARTS = ("attn", "attention", "selfattention", "encdecattention", "mixer")
_ATTENTION_LEAVES = {
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "qkv_proj",
    "out_proj",
    "c_attn",
    "query_key_value",
    "Wqkv",
}
_MLP_PARTS = ("mlp", "ffn", "feed_forward", "feedforward", "experts", "intermediate", "output", "densereludense")
_MLP_LEAVES = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "w1", "w2", "w3", "wi", "wo"}


@dataclass(frozen=True)
class ModulePath:
    """A parsed module name.

    Attributes:
        name: Full module name.
        layer: Index of the outermost repeated block that holds the module, or None.
        type_path: The name without the indices of repeated blocks; modules of one type share it.
        in_block: The part of `type_path` below the innermost repeated block; all of it if there is none.
    """

    name: str
    layer: int | None
    type_path: str
    in_block: str


def module_path(name: str, lists: Collection[str]) -> ModulePath:
    """Parse a module name.

    A number is a block index if its parent is an `nn.ModuleList`, or if more of the name follows it. A number at the
    end below an `nn.Sequential` is the position of the module, which defines its role, and is kept.

    Args:
        name: Full module name.
        lists: Full names of all `nn.ModuleList`s of the model.
    """
    parts = name.split(".")
    kept: list[str] = []
    layer: int | None = None
    last_index = -1
    for position, part in enumerate(parts):
        if part.isdigit() and (position + 1 < len(parts) or ".".join(parts[:position]) in lists):
            layer = int(part) if layer is None else layer
            last_index = len(kept)
        else:
            kept.append(part)
    in_block = kept[last_index:] if 0 <= last_index < len(kept) else kept
    return ModulePath(name, layer, ".".join(kept) or name, ".".join(in_block) or name)


def label_types(paths: Sequence[ModulePath]) -> list[str]:
    """Label each module's type by its shortest suffix that no other type shares.

    The whole path inside the block is also a label if it belongs to a single type: BERT's `output.dense` beside
    `attention.output.dense`.

    Returns:
        One label per path, in order; two paths get the same label if and only if they share `type_path`.
    """
    blocks = {path.type_path: path.in_block for path in paths}
    shared: Counter[str] = Counter()
    for type_path in blocks:
        shared.update(suffixes(type_path))
    whole = Counter(blocks.values())
    labels: dict[str, str] = {}
    for type_path, in_block in blocks.items():
        labels[type_path] = next(
            suffix
            for suffix in suffixes(type_path)
            if shared[suffix] == 1 or (suffix == in_block and whole[suffix] == 1) or suffix == type_path
        )
    return [labels[path.type_path] for path in paths]


def with_role(label: str, role: str) -> str:
    """Return the label of a type with its role, as `q_proj@linear_attention`; without one, the label."""
    return f"{label}{_ROLE}{role}" if role else label


def without_role(label: str) -> str:
    """Return the label of a type without its role."""
    return label.partition(_ROLE)[0]


def as_patterns(patterns: str | Sequence[str], argument: str) -> tuple[str, ...]:
    """Return the suffixes that `include` or `exclude` (the `argument`) names; a string is a single suffix."""
    check_type((str, Iterable), "a name or names of modules", **{argument: patterns})
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise InputError(f"`{argument}` must hold names, got {shown(pattern)}")
    return listed


def suffixes(path: str) -> list[str]:
    """Return the suffixes of a dotted path, shortest first.

    PEFT adapts a module if one of them is an entry of `target_modules`.
    """
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def family(type_label: str, name: str) -> str:
    """Return `"attention"`, `"mlp"` or `"other"`, by the usual names of such modules.

    Args:
        type_label: Label of the type.
        name: Full name of one of its modules, whose enclosing block often tells more than the label.
    """
    leaf = without_role(type_label).rsplit(".", 1)[-1]
    parts = [part.lower() for part in name.split(".")[:-1]]
    if leaf in _MLP_LEAVES:
        return "mlp"
    if leaf in _ATTENTION_LEAVES or any(word in part for part in parts for word in _ATTENTION_PARTS):
        return "attention"
    if any(part == word or part.endswith("_" + word) for part in parts for word in _MLP_PARTS):
        return "mlp"
    return "other"
