"""The rule that makes any configuration of transformers tiny: each number shrinks by the role that its name tells."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.support.census.exceptions import CHANGES

VOCAB, HIDDEN, INNER, HEADS, HEAD_DIM = 96, 32, 48, 4, 8
# Ids of text. Those below mean something in some model (padding, start, end), those above mark images and sound.
FIRST_WORD, LAST_WORD = 8, 64

# The largest value that a field keeps: by the first pattern that matches its whole name.
_LARGEST: tuple[tuple[str, int], ...] = (
    # Token ids are set by `_special`.
    # Counts of layers.
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers|num_nextn_predict_layers|\w+_layer_offset", 1),
    (r"\w*(num_\w*layers|n_layers?|num_blocks|depth|(en|de)coder_layers|layers)", 2),
    (r"\w+_(period|frequency|freq|interval|pattern|step)|num_kv_shared_layers|n_layers_per_\w+", 2),
    # Heads.
    (r"\w*(num_key_value_heads|num_kv_heads|kv_n_heads|n_kv_heads|num_key_heads|index_n_heads|o_groups)", 2),
    (r"\w*(num_\w*heads|n_heads?|attention_heads|mamba_n_heads|resampler_n_heads)", HEADS),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"index_topk", 32),
    (r"\w*(head_dim|d_head|d_kv|head_size|dim_head|dim_per_head|head_channels|attention_channels)", HEAD_DIM),
    (r"rotary_dim", 4),
    # Experts.
    (r"\w*(n_group|topk_group|num_expert_groups?|n_groups)", 2),
    (r"\w*(num_experts_per_tok\w*|topk|top_k\w*|moe_k|num_selected_experts|moe_intermediate_size_topk)", 2),
    (r"\w*(n_shared_experts|num_shared_experts)", 1),
    (r"\w*(num_local_experts|num_experts|n_routed_experts|zero_expert_num)", 4),
    # Vocabularies and tables.
    (r"type_vocab_size", 16),
    (r"\w*codebook_size", 64),
    (r"\w*vocab(_size)?\w*|num_embeddings", VOCAB),
    (r"num_position_embeddings|max_2d_position_embeddings|\w*(max_position\w*|max_seq_len\w*|n_positions|n_ctx)", 128),
    (r"num_frames|frames_per_clip", 2),
    (r"mm_tokens_per_image", 4),
    (r"num_latents|num_patches", 16),
    (r"num_self_attends_per_block", 2),
    (r"seq_length|max_source_positions|max_target_positions|max_\w*length|max_len", 128),
    # Windows of attention and chunks of a scan.
    (r"\w*(sliding_window\w*|window_size|local_attention|attention_window\w*|block_size|chunk_size|chunk_length)", 8),
    # Pictures.
    (r"\w*image_size|img_size|resolution", 16),
    (r"\w*patch_size", 4),
    # Widths.
    (r"num_channels|in_channels|in_chans|image_channels", 8),
    (r"\w*(num_mel_bins|mel_bins|feature_size|feat_size|input_feat_per_channel)", 16),
    (r"\w*(lora_rank|_rank|d_state|state_size|state_dim|time_step_rank)", 8),
    (r"\w*(intermediate|ffn|mlp_dim|d_ff|n_inner|inner_dim|ff_dim|feed_forward_size|dff|d_inner)\w*", INNER),
    (r"\w*(hidden|d_model|n_embd|emb|dim|lru_width|width|d_latents|channels|proj\w*_size|size)\w*", HIDDEN),
)
_COMPILED = tuple((re.compile(pattern), largest) for pattern, largest in _LARGEST)
_TOKEN = re.compile(r"(\w*token_(id|index|ids)|\w+_token)")
_KNOWN_TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "sep_token_id": 3,
    "forced_eos_token_id": 2,
    "forced_bos_token_id": 1,
}
_WIDTHS = re.compile(r"\w*(hidden_sizes|embed_dims?|channels|dims?|sizes_of_\w+|embed_dim\w*|conv_dim|out_channels)")
_STAGED_WIDTH = re.compile(r"\w*(embed_dim|embedding_size|hidden_size|hidden_dim|channels)")
STAGED_IMAGE = 64
_COUNT_OF_LAYERS = re.compile(r"num_hidden_layers|num_layers|n_layers?|depth|(en|de)coder_layers|layers")
_ROUND_NUMBERS = re.compile(
    r"\w*_base|\w*(ratio|scale|factor|kernel|stride|padding|dilation|eps|theta|seed|std|groups)\w*"
)
_MOST_LAYERS = 4


def tiny(config: Any, changes: Mapping[str, Any] | None = None) -> Any:
    """A configuration of the same class with small sizes.

    Args:
        config: Any configuration of transformers, as its class makes it without arguments.
        changes: Further fields to set, with dots for those of inner configurations.
    """
    changes = {**CHANGES.get(config.model_type, {}), **(changes or {})}
    own = {name: value for name, value in changes.items() if "." not in name}
    fields = {**_shrunk(config), **own}
    for name, inner in _inner(config):
        if name not in own:
            inside = {key[len(name) + 1 :]: value for key, value in changes.items() if key.startswith(name + ".")}
            fields[name] = tiny(inner, inside)
    return type(config)(**fields)


def token_id(name: str) -> int:
    """The id of a special token, the same in the model and in its inner configurations."""
    return LAST_WORD + 1 + sum(position * ord(c) for position, c in enumerate(name)) % (VOCAB - LAST_WORD - 1)


def _inner(config: Any) -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type") and not name.startswith("_"):
            yield name, value


def _shrunk(config: Any) -> dict[str, Any]:
    values = _values(config)
    kept = KeptLayers.of(values)
    staged = any(
        _WIDTHS.fullmatch(name) or name == "depths" for name, v in values.items() if isinstance(v, (list, tuple))
    )
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if kept and name in kept.counts:
            fields[name] = len(kept.indices)
        elif kept and isinstance(value, (list, tuple)) and len(value) == kept.count:
            small = [_integer(name, item) if type(item) is int else item for item in value]
            fields[name] = type(value)(small[index] for index in kept.indices)
        elif type(value) is int and staged and _STAGED_WIDTH.fullmatch(name):
            fields[name] = _width(value)
        elif type(value) is int and staged and name.endswith("image_size"):
            fields[name] = STAGED_IMAGE
        elif type(value) is int:
            fields[name] = _integer(name, value)
        elif isinstance(value, (list, tuple)):
            fields[name] = _sequence(name, value)
    for name in values:
        if name.endswith(("num_key_value_heads", "num_kv_heads")):
            alike = (name.replace("key_value", "attention"), name.replace("num_kv_heads", "num_heads"), "n_head")
            heads = next((other for other in alike if other in values and other != name), None)
            if heads is not None and (values[name] is None or values[name] >= values[heads]):
                fields[name] = fields[heads]
    if "head_dim" in values and values["head_dim"] is None:
        fields["head_dim"] = HIDDEN // HEADS
    sections = "mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ())
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(name), dict):
            fields[name] = _rope(values[name], fields.get("head_dim") or HIDDEN // HEADS, sections)
    # An outer configuration may set fields of an inner one to other values than the defaults of its class.
    wanted, defaults = {**values, **fields}, _defaults(type(config))
    inner = dict(_inner(config))
    return {
        name: v for name, v in wanted.items() if name not in inner and (name not in defaults or v != defaults[name])
    }


def _defaults(config_class: type) -> dict[str, Any]:
    try:
        return _values(config_class())
    except Exception:  # some classes have no valid defaults
        return {}


def _values(config: Any) -> dict[str, Any]:
    """The arguments of the configuration's class, with the values that they have now."""
    now, aliases = vars(config), type(config).attribute_map
    stored = {name: aliases.get(name, name) for name in inspect.signature(type(config)).parameters}
    return {name: now[key] for name, key in stored.items() if key in now}


def _integer(name: str, value: int) -> int:
    if _TOKEN.fullmatch(name):
        return value if value < 0 else _KNOWN_TOKENS.get(name, token_id(name))
    if value <= 0 or _ROUND_NUMBERS.fullmatch(name):
        return value
    return next((min(value, largest) for pattern, largest in _COMPILED if pattern.fullmatch(name)), value)


def _width(value: int) -> int:
    """Widths of a model of stages: equal ones stay equal under any name, and all are multiples of 8."""
    return value if value <= 8 else 8 * -(-value // 64)


def _sequence(name: str, value: Sequence[Any]) -> Any:
    if not value or not all(type(item) is int for item in value):
        return value
    kind = type(value)
    if re.fullmatch(r"\w*(depths|blocks|layers|num_blocks|blocks_per_stage)", name):
        return kind(min(item, 1) for item in value)
    if re.fullmatch(r"\w*(indices|indexes|layer_ids|idx)", name):
        return kind(range(min(len(value), 2)))
    if _WIDTHS.fullmatch(name):
        return kind(_width(item) for item in value)
    if re.fullmatch(r"\w*heads", name):
        return kind(max(1, item // min(value)) for item in value)
    if name.endswith("image_size"):
        return kind(STAGED_IMAGE for _ in value)
    return kind(_integer(name, item) for item in value)


def _rope(value: dict[str, Any], width: int, sections: bool) -> dict[str, Any]:
    """Frequencies by section, and factors by frequency, that fit the width of a head."""
    if any(isinstance(item, dict) for item in value.values()):  # by type of layer
        return {name: _rope(item, width, sections) if isinstance(item, dict) else item for name, item in value.items()}
    half = int(width * (value.get("partial_rotary_factor") or 1.0)) // 2
    small = {**value}
    if sections or len(value.get("mrope_section", ())) == 3:
        small["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    for name in ("long_factor", "short_factor"):
        if name in value:
            small[name] = list(value[name])[:half]
    return small


@dataclass
class KeptLayers:
    """The layers to keep: the first of each kind, where lists with an entry per layer tell kinds apart.

    Attributes:
        count: The number of layers of the original.
        counts: Names of the fields that hold it.
        indices: The layers to keep.
    """

    count: int
    counts: set[str]
    indices: list[int]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> KeptLayers | None:
        counts = {k: v for k, v in values.items() if _COUNT_OF_LAYERS.fullmatch(k) and type(v) is int and v > 4}
        lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) in counts.values()]
        if not lists:
            return None
        count = len(lists[0])
        columns = [column for column in lists if len(column) == count]
        first: dict[str, int] = {}
        for index in range(count):
            first.setdefault(str([column[index] for column in columns]), index)
        indices = sorted(first.values())[:_MOST_LAYERS]
        names = {name for name, value in counts.items() if value == count}
        return cls(count, names, indices * 2 if len(indices) == 1 else indices)
