"""The tokenizer of a model, as its files describe it, with a token to pad with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from plop_ext.models.code import Trust
from plop_ext.models.explained import explained
from plop_ext.models.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(source: Source, config: Any, trust: Trust) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    An adapter's own tokenizer is preferred to that of its base model. The special tokens that the tokenizer's files
    leave out are those of config.json. A tokenizer without a padding token pads with its end-of-sequence token, or
    else with token 0: padding is masked.

    Args:
        source: The files.
        config: The model's configuration.
        trust: Whether code of the checkpoint may run.

    Raises:
        InputError: If there is no tokenizer, or it is damaged.
        SetupError: If it needs a package that is missing.
    """
    import transformers

    folder, options = source.folder, dict(source.gguf_option)
    if source.adapter is not None and _has_tokenizer(source.adapter):
        folder, options = source.adapter, {}
    elif source.gguf is None and folder.name.startswith("checkpoint-") and not _has_tokenizer(folder):
        folder = folder.parent if _has_tokenizer(folder.parent) else folder  # where trainers may leave it
    with explained(source.name, "tokenizer"):
        if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
            # Without a class in tokenizer_config.json, transformers takes that of the model's type, whose own rules
            # would replace those in tokenizer.json.
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=trust.given, **options
            )
    _fill_special_tokens(tokenizer, config)
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FILES)


def _fill_special_tokens(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Set the special tokens that are missing to those of the configuration."""
    text = config.get_text_config(decoder=True)
    for role in ("bos", "eos", "pad"):
        if getattr(tokenizer, f"{role}_token") is None:
            _set(tokenizer, role, _token_id(config, text, role))
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        _set(tokenizer, "pad", 0)


def _token_id(config: Any, text: Any, role: str) -> int | None:
    for part in (config, text):
        found = getattr(part, f"{role}_token_id", None)
        if isinstance(found, (list, tuple)) and found:
            found = found[0]
        if isinstance(found, int):
            return found
    return None


def _set(tokenizer: PreTrainedTokenizerBase, role: str, token_id: int | None) -> None:
    if token_id is None or not 0 <= token_id < len(tokenizer):
        return
    token = tokenizer.convert_ids_to_tokens(token_id)
    if isinstance(token, str):
        setattr(tokenizer, f"{role}_token", token)
