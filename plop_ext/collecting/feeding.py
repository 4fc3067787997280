"""Which modules read another stream than the one in which they sit: the keys and values of cross-attention."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from plop_ext.layers.streams import DECODER, OUTSIDE, TEXT

# Parameters by which transformers' blocks and attentions receive the states of an encoder or of a vision tower.
_STATES = frozenset(
    {
        "encoder_hidden_states",
        "key_value_states",
        "cross_attention_states",
        "image_hidden_states",
        "vision_hidden_states",
        "encoder_states",
        "protein_kv_states",
        "protein_key_value_states",
        "memory",
        "kv",
    }
)


class Fed:
    """The hook of a module that may be fed by another stream than the one in which it sits.

    Args:
        stream: The stream in which the module sits.

    Attributes:
        stream: As given.
        fed: Whether the module is fed by another stream; None to ask at each call (`Feeding.ask`).
        answers: The answers so far.
    """

    def __init__(self, stream: str) -> None:
        self.stream = stream
        self.fed: bool | None = False
        self.answers: set[bool] = set()


class Feeding:
    """The states of other streams that the running modules have received.

    A module is fed by another stream if its input is one of these states. Modules keep their stream, so the hooks that
    watch a block are removed once all modules inside have been called. Only a block with a module that reads both its
    own and another stream is watched further.
    """

    def __init__(self) -> None:
        self._received: list[Tensor] = []

    def ask(self, hook: Fed, x: Tensor) -> bool:
        """Return whether the input `x` of a hook's module, or what it is a view of, was received from elsewhere."""
        fed = any(x.data_ptr() == state.data_ptr() and x.numel() == state.numel() for state in self._received)
        hook.answers.add(fed)
        return fed

    @contextmanager
    def watching(self, model: nn.Module, hooks: Mapping[nn.Module, Fed]) -> Iterator[None]:
        """Watch, within the block, the modules of `model` that receive such states around modules with `hooks`."""
        accepted: dict[type, tuple[str, ...]] = {}
        with ExitStack() as stack:
            for module in model.modules():
                kind = type(module)
                if kind not in accepted:
                    accepted[kind] = _accepted(kind)
                if not accepted[kind]:
                    continue
                inside = [hooks[child] for child in module.modules() if child in hooks]
                inside = [hook for hook in inside if hook.stream in (TEXT, DECODER, OUTSIDE)]
                for hook in inside:
                    hook.fed = None
                if inside:
                    stack.enter_context(_Watch(self._received, accepted[kind], inside).attached(module))
            try:
                yield
            finally:
                self._received.clear()


class _Watch:
    """Hooks of one module, which receives states of another stream, until the modules inside have been called."""

    def __init__(self, received: list[Tensor], names: tuple[str, ...], inside: list[Fed]) -> None:
        self._received = received
        self._names = names
        self._inside = inside
        self._stack = ExitStack()
        self._depths: list[int] = []

    @contextmanager
    def attached(self, module: nn.Module) -> Iterator[None]:
        before = module.register_forward_pre_hook(self._enter, with_kwargs=True)
        after = module.register_forward_hook(self._leave, always_call=True)
        with self._stack:
            self._stack.callback(before.remove)
            self._stack.callback(after.remove)
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depths.append(len(self._received))
        values = kwargs | dict(zip(_parameters(type(module)), args, strict=False))
        self._received += [values[name] for name in self._names if isinstance(values.get(name), Tensor)]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._depths:
            del self._received[self._depths.pop() :]
        if self._depths:
            return
        for hook in self._inside:
            if len(hook.answers) == 1:
                (hook.fed,) = hook.answers
        if all(hook.fed is not None for hook in self._inside):
            self._stack.close()


def _accepted(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(name for name in _parameters(kind) if name in _STATES)


def _parameters(kind: type[nn.Module]) -> list[str]:
    """Return the names of the parameters of a module's forward, without `self`."""
    try:
        return list(inspect.signature(kind.forward).parameters)[1:]
    except (AttributeError, TypeError, ValueError):  # as of a scripted module
        return []
