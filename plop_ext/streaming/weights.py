"""The tensors of a checkpoint that each block needs, and their conversion to the parameters of a module.

Names and layouts in files differ from the model's (experts one by one, old prefixes, quantized parts). The loader of
transformers converts them, and accepts any subset of the tensors. Its functions are not public: `_Loading` is the only
class that uses them, and raises an error if they have changed.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext.errors import InputError, SetupError
from plop_ext.models import prefixes, quantization
from plop_ext.models.checkpoint import Checkpoint, TensorEntry
from plop_ext.models.reader import buffer_size
from plop_ext.streaming.skeleton import ALTERNATIVE, Skeleton, input_embedding, output_head

_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


@dataclass
class BlockTensors:
    """The tensors of one block, or of all that is outside of the blocks.

    Attributes:
        plain: Tensors that become parameters without conversion.
        groups: Tensors that are converted together, by the first parameter that they become.
    """

    plain: list[TensorEntry] = field(default_factory=list)
    groups: dict[str, list[TensorEntry]] = field(default_factory=dict)

    @property
    def stored_bytes(self) -> int:
        """Bytes read from the files."""
        return sum(entry.n_bytes for entry in self.all)

    @property
    def plain_bytes(self) -> int:
        """Size of the buffer for the plain tensors."""
        return buffer_size(self.plain)

    @property
    def largest_group(self) -> int:
        """Bytes of the largest group."""
        return max((buffer_size(group) for group in self.groups.values()), default=0)

    @property
    def all(self) -> list[TensorEntry]:
        """All tensors."""
        return [*self.plain, *(entry for group in self.groups.values() for entry in group)]


class Weights:
    """The tensors of a checkpoint, sorted by block.

    Args:
        skeleton: The model.
        checkpoint: Its files.

    Attributes:
        blocks: Tensors of each block, up to the last one to score.
        outside: Tensors that the model needs before its first block or after its last, without the output head.

    Raises:
        InputError: If the checkpoint lacks weights.
    """

    def __init__(self, skeleton: Skeleton, checkpoint: Checkpoint) -> None:
        self._skeleton = skeleton
        name = str(skeleton.model.name_or_path)
        self._loading = _Loading(
            skeleton, prefixes.renamings(name, checkpoint.entries, skeleton.model.state_dict().keys())
        )
        self.blocks = [BlockTensors() for _ in range(skeleton.last + 1)]
        self.outside = BlockTensors()
        covered: set[str] = set()
        head, embedding = _head_and_embedding(skeleton.model)
        heads: list[TensorEntry] = []
        unread: list[str] = []
        for entry in checkpoint.entries.values():
            target, targets, converted = self._loading.target(entry.key)
            if target is None:
                unread.append(entry.key)
                continue
            covered.update(targets)
            if target in head:
                heads.append(entry)
                continue
            block = skeleton.block_of(target)
            if block is not None and block > skeleton.last:
                continue
            if entry.dtype is None:
                raise InputError(f"`{entry.path}`: {entry.key} has the type {entry.code}, which cannot be streamed")
            part = self.outside if block is None else self.blocks[block]
            if converted:
                part.groups.setdefault(target, []).append(entry)
            else:
                part.plain.append(entry)
        if heads and embedding not in covered:  # the shared matrix is stored under the head's name only
            self.outside.plain += heads
        method = quantization.method_of(skeleton.model.config)
        quantization.refuse_unread_scales(name, unread, checkpoint.entries, method)
        self._refuse_missing(covered, head)

    def place(self, tensors: Mapping[str, Tensor], codes: Mapping[str, str]) -> None:
        """Set tensors of the checkpoint as parameters of the model, on the tensors' device."""
        self._loading.load(tensors, codes)

    def block_bytes(self, index: int) -> int:
        """Return the memory of block `index` when it is loaded."""
        return parameter_bytes(self._skeleton.blocks[index])

    def _refuse_missing(self, covered: set[str], head: set[str]) -> None:
        model, skeleton = self._skeleton.model, self._skeleton
        aliases: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.device.type == "meta":
                aliases.setdefault(id(parameter), []).append(name)
        missing = []
        for names in aliases.values():
            holders = sorted({block for block in map(skeleton.block_of, names) if block is not None})
            if len(holders) > 1 and holders[1] <= skeleton.last:
                listed = ", ".join(map(str, holders[:3]))
                raise InputError(
                    f"`{names[0]}` is shared by the blocks {listed}: a model whose blocks share weights cannot be "
                    f"streamed; {ALTERNATIVE}"
                )
            block = skeleton.block_of(names[0])
            wanted = not head.issuperset(names) and (block is None or block <= skeleton.last)
            if wanted and covered.isdisjoint(names):
                missing.append(names[0])
        if missing:
            raise InputError(
                f"the checkpoint lacks {len(missing)} of the weights of {type(model).__name__}, such as {missing[0]}; "
                "download or save it again"
            )


class _Loading:
    """transformers' own conversion of checkpoint names and tensors."""

    def __init__(self, skeleton: Skeleton, renamed: dict[str, str]) -> None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import (
                WeightConverter,
                WeightRenaming,
                convert_and_load_state_dict_in_model,
                rename_source_key,
            )
            from transformers.modeling_utils import LoadStateDictConfig

            parameters = inspect.signature(convert_and_load_state_dict_in_model).parameters.keys()
            if not {"model", "state_dict", "load_config"} <= parameters:
                raise ImportError("convert_and_load_state_dict_in_model has other parameters")
        except ImportError as error:
            import transformers

            raise SetupError(
                f"streaming does not know how transformers {transformers.__version__} converts checkpoints ({error}); "
                "install transformers 5.6 to 5.24"
            ) from error
        self._skeleton = skeleton
        self._model = skeleton.model
        self._config = LoadStateDictConfig
        self._convert = convert_and_load_state_dict_in_model
        # Up to transformers 5.16 the plan of tensor parallelism is an argument without a default.
        self._options: dict[str, Any] = {"tp_plan": None} if "tp_plan" in parameters else {}
        self._rename = rename_source_key
        self._new_mapping = lambda: get_model_conversion_mapping(
            self._model, key_mapping=renamed or None, hf_quantizer=skeleton.quantizer
        )
        mapping = self._new_mapping()
        self._renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        self._converters = [item for item in mapping if isinstance(item, WeightConverter)]
        self._names = self._model.state_dict()
        self._dtype_plan = self._model._get_dtype_plan(skeleton.dtype)

    def target(self, key: str) -> tuple[str | None, list[str], bool]:
        """Return the first parameter that a stored tensor is part of, all of them, and whether it is converted."""
        prefix, names = self._model.base_model_prefix, self._names
        target, pattern = self._rename(key, self._renamings, self._converters, prefix, names)
        if target not in names and key in names:
            target, pattern = self._rename(key, [], [], prefix, names)
        if target not in names:
            return None, [], False
        targets = [target]
        if pattern is not None:
            converter = next(item for item in self._converters if pattern in item.source_patterns)
            first, *others = converter.target_patterns
            targets += [target.replace(first, other) for other in others]
        return target, targets, pattern is not None

    def load(self, tensors: Mapping[str, Tensor], codes: Mapping[str, str]) -> None:
        device = next(iter(tensors.values())).device
        config = self._config(
            device_map={"": device},
            dtype=self._skeleton.dtype,
            dtype_plan=self._dtype_plan,
            hf_quantizer=self._skeleton.quantizer,
            weight_mapping=self._new_mapping(),
        )
        state = {key: _Slice(tensor, codes[key]) for key, tensor in tensors.items()}
        info, _ = self._convert(model=self._model, state_dict=state, load_config=config, **self._options)
        if info.mismatched_keys:
            key, found, wanted = sorted(info.mismatched_keys)[0]
            raise InputError(
                f"the checkpoint holds {key} as {tuple(found)}, and config.json asks for {tuple(wanted)}; "
                "download or save it again"
            )
        if info.conversion_errors:
            key, text = next(iter(info.conversion_errors.items()))
            last = text.strip().splitlines()[-1]
            raise InputError(f"transformers cannot convert the checkpoint's weights for {key}: {last}")


class _Slice:
    """A tensor with the interface of a slice of a safetensors file."""

    def __init__(self, tensor: Tensor, code: str) -> None:
        self._tensor = tensor
        self._code = code

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensor[index]

    def get_dtype(self) -> str:
        return self._code

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)


@contextmanager
def one_thread() -> Iterator[None]:
    """Make transformers convert on the calling thread within the block, because only it uses the right stream."""
    before = os.environ.get(_NO_THREADS)
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_THREADS]
        else:
            os.environ[_NO_THREADS] = before


def parameter_bytes(module: nn.Module) -> int:
    """Return the memory of the parameters of a module of the skeleton when they are loaded."""
    return sum(loaded_bytes(parameter) for parameter in module.parameters())


def loaded_bytes(parameter: nn.Parameter) -> int:
    """Return the memory of a loaded parameter, with bitsandbytes' packing and scales, which it gets on loading."""
    kind, values = type(parameter), parameter.numel()
    if not kind.__module__.startswith("bitsandbytes"):
        return values * parameter.element_size()
    if kind.__name__ == "Params4bit":
        scales = math.ceil(values / getattr(parameter, "blocksize", 64))  # float32, like the 16 values of the code
        if getattr(parameter, "compress_statistics", False):  # one-byte scales in blocks of 256, and their code
            scales = math.ceil(scales / 4) + math.ceil(scales / 256) + 256
        return math.ceil(values / 2) + 4 * (scales + 16)
    return values + 4 * parameter.shape[0]


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the memory of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def meta_left(module: nn.Module) -> str | None:
    """Return the name of a parameter on the meta device, or None."""
    return next((name for name, value in module.named_parameters() if value.device.type == "meta"), None)


def _head_and_embedding(model: Any) -> tuple[set[str], str]:
    """Return the parameter names of the output head, and the name of the embedding's matrix."""
    head, embedding = output_head(model), input_embedding(model)
    names = {id(module): name for name, module in model.named_modules()}
    head_name = names.get(id(head))
    embedding_name = names.get(id(embedding), "")
    parameters = {f"{head_name}.{name}" for name, _ in head.named_parameters()} if head is not None else set()
    return parameters, f"{embedding_name}.weight"


def on_device(module: nn.Module, device: torch.device) -> None:
    """Move the buffers that have values to `device`, in place."""
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.device.type not in ("meta", device.type):
                child._buffers[name] = buffer.to(device)
