"""Record the arguments of each block: the rest of the model runs once, with recorders in place of the blocks.

Blocks of one model get different arguments (masks, positions, per-layer inputs), so all are recorded. A model can be
streamed if every block is called once, in order, on exactly the output of the block before it. Any other operation
between the blocks is detected here, and the model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from plop_ext.errors import InputError
from plop_ext.streaming.skeleton import ALTERNATIVE, Skeleton, output_head

_HIDDEN = "hidden_states"
_MORE = "its blocks pass on more than a hidden state"


class _StopForward(Exception):
    """The last block of interest was reached."""


@dataclass(frozen=True)
class _Kept:
    """Placeholder of tensor number `index` of a batch."""

    index: int


@dataclass(frozen=True)
class _Shared:
    """Placeholder of mutable object number `index` of a batch."""

    index: int


class _Rest:
    """Placeholder of a value that a block returns beside its hidden state; no later block may use it."""


class _Here:
    """Placeholder of the hidden state on which a block is called."""


@dataclass
class Calls:
    """The calls of all blocks in one batch.

    Attributes:
        tensors: The tensors among the arguments, each once, also if several blocks share it.
        arguments: (args, kwargs) of each block, with placeholders for tensors.
        shared: Mutable objects that one block writes and a later one reads.
    """

    tensors: list[Tensor] = field(default_factory=list)
    arguments: list[tuple[Any, Any]] = field(default_factory=list)
    shared: list[MutableMapping[Any, Any]] = field(default_factory=list)

    def call(self, block: nn.Module, index: int, hidden: Tensor, tensors: Sequence[Tensor]) -> Any:
        """Run `block`, which is number `index`, on `hidden`."""

        def restored(value: Any) -> Any:
            if isinstance(value, _Kept):
                return tensors[value.index]
            if isinstance(value, _Shared):
                return self.shared[value.index]
            if isinstance(value, _Here):
                return hidden
            return _rebuilt(value, restored)

        args, kwargs = self.arguments[index]
        return block(*restored(args), **restored(kwargs))


def record(
    run: Callable[[], object], skeleton: Skeleton, result: Result, *, to_the_end: bool = False
) -> tuple[Tensor, Calls]:
    """Run the model on one batch with recorders in place of the blocks.

    Args:
        run: Calls the model.
        skeleton: The model, with the weights that it needs before its blocks.
        result: Return format of the model's blocks.
        to_the_end: Continue after the last block that is needed, up to the output head, to detect a second call of a
            block (ALBERT runs one block many times).

    Returns:
        The hidden state on which the first block is called, and the calls.

    Raises:
        InputError: If the model cannot be streamed.
    """
    recorder = _Recorder(skeleton, result, to_the_end)
    real = list(skeleton.blocks)
    head = output_head(skeleton.model)
    handle = None if head is None else head.register_forward_pre_hook(_stop)
    try:
        for index, block in enumerate(real):
            skeleton.blocks[index] = _RecordingBlock(block, index, recorder)
        run()
    except _StopForward:
        pass
    except InputError:
        raise
    except Exception as error:
        # Errors after the last block are expected: modules there lack their weights, and the recorders' results.
        if not recorder.done:
            if any(isinstance(item, _Rest) for item in result.rest) and isinstance(error, (AttributeError, TypeError)):
                raise _unfit(skeleton, _MORE) from error
            raise
    finally:
        if handle is not None:
            handle.remove()
        for index, block in enumerate(real):
            skeleton.blocks[index] = block
    if len(recorder.calls.arguments) <= skeleton.last or recorder.first is None:
        raise _unfit(skeleton, f"block {len(recorder.calls.arguments)} of {len(real)} is never called")
    return recorder.first, recorder.calls


@dataclass(frozen=True)
class Result:
    """Return format of a block: its hidden state alone, or as the first item of a tuple or list."""

    container: type | None = None
    rest: tuple[Any, ...] = ()

    def wrap(self, hidden: Tensor) -> Any:
        """Return `hidden` in this format."""
        return hidden if self.container is None else self.container((hidden, *self.rest))

    @staticmethod
    def hidden(output: Any) -> Tensor:
        """Return the hidden state from a block's output."""
        return output if isinstance(output, Tensor) else output[0]


def learn_result(run: Callable[[], object], skeleton: Skeleton, first: nn.Module) -> Result:
    """Run the model up to and including its first block, which is loaded, to find the return format of blocks."""
    outputs: list[Any] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        raise _StopForward

    real = skeleton.blocks[0]
    skeleton.blocks[0] = first
    handle = first.register_forward_hook(stop)
    try:
        run()
    except _StopForward:
        pass
    finally:
        handle.remove()
        skeleton.blocks[0] = real
    if not outputs:
        raise _unfit(skeleton, "its first block is never called")
    output = outputs[0]
    if isinstance(output, Tensor):
        return Result()
    if not isinstance(output, (tuple, list)) or not output or not isinstance(output[0], Tensor):
        raise _unfit(skeleton, f"its blocks return {type(output).__name__}, not a hidden state")
    rest = (item if item is None or isinstance(item, (bool, int, float)) else _Rest() for item in output[1:])
    return Result(type(output), tuple(rest))


def _stop(module: nn.Module, args: Any) -> None:
    raise _StopForward


class _Recorder:
    def __init__(self, skeleton: Skeleton, result: Result, to_the_end: bool) -> None:
        self.skeleton = skeleton
        self.to_the_end = to_the_end
        self.done = False
        self.result = result
        self.calls = Calls()
        self.first: Tensor | None = None
        self._last: Tensor | None = None
        self._version: int | None = None
        self._places: dict[int, int] = {}

    def called(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.done:
            if index <= self.skeleton.last:
                raise _unfit(self.skeleton, f"block {index} is called more than once")
            return self.result.wrap(args[0] if args else kwargs[_HIDDEN])
        expected = len(self.calls.arguments)
        if index != expected:
            raise _unfit(self.skeleton, f"its blocks are not called once each in order: {index} instead of {expected}")
        hidden = args[0] if args else kwargs.get(_HIDDEN)
        if not isinstance(hidden, Tensor):
            raise _unfit(self.skeleton, "its blocks are not called on a hidden state")
        version = None if hidden.is_inference() else hidden._version  # one more for each change in place
        if self._last is not None and (hidden is not self._last or version != self._version):
            raise _unfit(self.skeleton, f"it changes the hidden state between blocks {index - 1} and {index}")
        self.first = hidden if self.first is None else self.first
        kept = tuple(self._stripped(value) for value in args[1:])
        named = {name: self._stripped(value) for name, value in kwargs.items() if args or name != _HIDDEN}
        if any(value is hidden for value in self.calls.tensors):
            raise _unfit(self.skeleton, "its blocks get the hidden state twice, and the second may be an earlier one")
        if args:
            self.calls.arguments.append(((_Here(), *kept), named))
        else:
            self.calls.arguments.append(((), {**named, _HIDDEN: _Here()}))
        self.done = index == self.skeleton.last
        if self.done and not self.to_the_end:
            raise _StopForward
        if self.done:  # modules after the blocks may work in place, and `first` is this tensor
            return self.result.wrap(hidden.clone())
        self._last, self._version = hidden, version
        return self.result.wrap(hidden)

    def _stripped(self, value: Any) -> Any:
        """Return `value` with placeholders for its tensors."""
        if isinstance(value, Tensor):
            if id(value) not in self._places:
                self._places[id(value)] = len(self.calls.tensors)
                self.calls.tensors.append(value)
            return _Kept(self._places[id(value)])
        if isinstance(value, _Rest):
            raise _unfit(self.skeleton, _MORE)
        if isinstance(value, MutableMapping) and not value:
            known = next((i for i, item in enumerate(self.calls.shared) if item is value), None)
            if known is None:
                known = len(self.calls.shared)
                self.calls.shared.append(value)
            return _Shared(known)
        return _rebuilt(value, self._stripped)


class _RecordingBlock(nn.Module):
    """Replaces a block: records its call, returns the hidden state unchanged, and forwards attribute access to it.

    `isinstance` answers as for the block, because hybrid models choose a mask by the class of a block.
    """

    def __init__(self, real: nn.Module, index: int, recorder: _Recorder) -> None:
        super().__init__()
        self.__dict__["_real"] = real
        self.index = index
        self.recorder = recorder

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        return type(self.__dict__["_real"])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_real"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.recorder.called(self.index, args, kwargs)


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a tuple, list or non-empty dict with changed items, and any other value unchanged."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(change(item) for item in value))
    if type(value) in (tuple, list):
        return type(value)(change(item) for item in value)
    if type(value) is dict and value:
        return {key: change(item) for key, item in value.items()}
    return value


def _unfit(skeleton: Skeleton, reason: str) -> InputError:
    name = type(skeleton.model).__name__
    return InputError(f"{name} cannot be streamed: {reason}; {ALTERNATIVE}")
