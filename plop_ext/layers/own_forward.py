"""Modules of a linear kind with a forward of their own, which need not multiply by their weight.

A class is not a forward: subclasses of `nn.Linear` and `nn.Conv2d` standardize or fake-quantize the weight, pad the
input, work block by block, return a tuple. A small random input tells how such a module has to be read:

1. Its output is that of its kind: as any module of the kind.
2. It computes one product with a matrix of the weight's shape, of its own input: by this product (`ProductAdapter`).
3. It is linear in its input otherwise: by its response to the identity (`ResponseAdapter`).
4. It computes one product of a changed input, such as a clipped one: by this product.

Anything else is reported by name. A module that cannot be called with an input alone is read by the product with its
unchanged weight.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from plop_ext import ops
from plop_ext.layers.adapter import LayerAdapter, Unsupported, register_adapter
from plop_ext.layers.attributes import attribute, tensor
from plop_ext.layers.conv import CONVOLUTIONS, ConvAdapter
from plop_ext.layers.linear import LinearAdapter, TransposedLinearAdapter
from plop_ext.layers.offload import weights_in_place
from plop_ext.layers.opaque import LINEAR_TOLERANCE, OpaqueAdapter
from plop_ext.layers.product_adapter import (
    OWN_FORWARD,
    ProductAdapter,
    UnreadableAdapter,
    close,
    kernel_of,
    returns_product,
)
from plop_ext.layers.products import Product, observe, shares_memory
from plop_ext.layers.sharded import division_of, why_not_readable, without_style

_KNOWN = {kind.forward for kind in (nn.Linear, *CONVOLUTIONS)}
_LINEAR, _TRANSPOSED, _CONV = LinearAdapter(), TransposedLinearAdapter(), ConvAdapter()
_TOKENS = 2
# Factors on the random input. A forward that clips or quantizes its input is another function at one of them.
_SCALES = (1.0, 100.0)


@dataclass(frozen=True)
class _Call:
    """A forward on a small random input z: its result, and its product with a matrix of the weight's shape."""

    z: Tensor
    result: Any
    product: Product | None


@register_adapter
class OwnForwardAdapter(LayerAdapter):
    """Decides how a module with a forward of its own is read."""

    kind = OWN_FORWARD
    priority = -5  # before the adapters of the kinds

    def matches(self, module: nn.Module) -> bool:
        return _plain_adapter(module) is not None and has_own_forward(module)

    def for_module(self, module: nn.Module) -> LayerAdapter:
        plain = _plain_adapter(module)
        assert plain is not None
        if tensor(module, "weight") is None or why_not_readable(module):
            return plain  # whose `check` gives the reason
        if division_of(module) is not None:  # a trial would run the collectives of the forward
            return ProductAdapter(plain)
        with weights_in_place(module), _undisturbed(module):
            return _adapter_for(plain, module)

    def features(self, module: nn.Module) -> tuple[int, int]:
        return self.for_module(module).features(module)


class ResponseAdapter(OpaqueAdapter):
    """A module that is linear in its input, but scales its input or output, or multiplies in code of its own.

    Args:
        plain: Adapter of the module's kind.
    """

    kind = OWN_FORWARD

    def __init__(self, plain: LayerAdapter) -> None:
        self._plain = plain

    def features(self, module: nn.Module) -> tuple[int, int]:
        return self._plain.features(module)

    def bias(self, module: nn.Module) -> Tensor | None:
        """Return the response to zeros, which need not be the parameter."""
        kernel = kernel_of(self._plain, module)
        with _undisturbed(module):
            return self.probe(module, torch.zeros(1, kernel.shape[1], dtype=kernel.dtype, device=kernel.device))[0]

    def against_lora(self, module: nn.Module) -> str:
        return self._plain.against_lora(module)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a call of the module runs other code than that of its kind."""
    called = vars(module).get("_old_forward") or vars(module).get("forward")  # accelerate keeps what it wraps
    function: Any = type(module).forward if called is None else without_style(called)
    for wrapper in ("_torchdynamo_orig_callable", "__func__"):
        function = getattr(function, wrapper, function)
    base = next((kind for kind in CONVOLUTIONS if isinstance(module, kind)), None)
    if base is not None and cast(Any, type(module))._conv_forward is not cast(Any, base)._conv_forward:
        return True
    transposed = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return function not in _KNOWN and function is not getattr(transposed, "forward", None)


def _plain_adapter(module: nn.Module) -> LayerAdapter | None:
    """Return the adapter of the module's kind, which holds a floating-point weight as its sizes say."""
    found = next((plain for plain in (_LINEAR, _TRANSPOSED, _CONV) if plain.matches(module)), None)
    if found is not None:
        return found
    weight = tensor(module, "weight")
    sizes = (attribute(module, "out_features"), attribute(module, "in_features"))
    is_matrix = type(weight) is nn.Parameter and weight.dtype in ops.FLOATS and tuple(weight.shape) == sizes
    return _LINEAR if is_matrix and not list(module.children()) else None


def _adapter_for(plain: LayerAdapter, module: nn.Module) -> LayerAdapter:
    """Return the adapter that reads a module with a forward of its own; see the head of this file."""
    weight = kernel_of(plain, module)
    has_values = weight.device.type != "meta"
    if has_values and _computes_its_kind(plain, module):
        return plain
    call = _try(plain, module)
    if call is None:
        return ProductAdapter(plain)
    is_linear = has_values and plain is not _CONV and _is_linear(plain, module)
    product = call.product
    if product is None:
        return ResponseAdapter(plain) if is_linear else UnreadableAdapter(plain)
    by_product = ProductAdapter(plain, product.groups, partial(_matrix, plain), _against_lora(plain, module, call))
    if not has_values:  # as in a streamed run, which asks again once the module is loaded
        result = call.result
        unchanged = isinstance(result, Tensor) and product.groups == 1 and result.numel() == product.y.numel()
        pairs = ((product.weight, weight), (product.x, call.z), (product.y, result)) if unchanged else ()
        return plain if pairs and all(shares_memory(*pair) for pair in pairs) else by_product
    returned = returns_product(module, call.result, product)
    of_input = plain is _CONV or (product.x.numel() == call.z.numel() and close(product.x, call.z))
    if returned and (of_input or not is_linear):
        return by_product
    return ResponseAdapter(plain) if is_linear else UnreadableAdapter(plain)


def _computes_its_kind(plain: LayerAdapter, module: nn.Module) -> bool:
    """Return whether the forward returns what that of its kind would."""
    for scale in _SCALES:
        z = scale * next(_inputs(plain, module))
        try:
            output, expected = _forward(module, z), _plain_forward(plain, module, z)
        except Exception:  # code that this package does not know, which may need more than an input
            return False
        if not (isinstance(output, Tensor) and output.shape == expected.shape and close(output, expected)):
            return False
    return True


def _plain_forward(plain: LayerAdapter, module: nn.Module, z: Tensor) -> Tensor:
    layer: Any = module
    if plain is not _CONV:
        return functional.linear(z, plain.weight_rows(module), layer.bias)
    base: Any = next(kind for kind in CONVOLUTIONS if isinstance(module, kind))
    return base._conv_forward(layer, z, layer.weight, layer.bias)


def _try(plain: LayerAdapter, module: nn.Module) -> _Call | None:
    """Call the forward on inputs of one shape after the other, until it computes a product.

    Returns:
        The call with the product; otherwise the first that raised nothing, or None.
    """
    first = None
    for z in _inputs(plain, module):
        try:
            result, product = observe(kernel_of(plain, module), partial(_forward, module, z))
        except Exception:
            continue
        call = _Call(z, result, product)
        if product is not None:
            return call
        first = first or call
    return first


def _inputs(plain: LayerAdapter, module: nn.Module) -> Iterator[Tensor]:
    """Yield inputs of the shapes that the module may take: tokens, tokens in groups; images, channels last."""
    layer: Any = module
    in_features, out_features = plain.features(module)
    if plain is _CONV:
        sizes = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        image = [dilation * (size - 1) + 1 + stride for size, dilation, stride in sizes]
        yield _random(plain, module, 1, layer.in_channels, *image)
        yield _random(plain, module, 1, *image, layer.in_channels)
        return
    yield _random(plain, module, _TOKENS, in_features)
    for groups in range(2, out_features + 1):
        if out_features % groups == 0:
            yield _random(plain, module, _TOKENS, groups, in_features)


def _random(plain: LayerAdapter, module: nn.Module, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(kernel_of(plain, module).device, plain.dtype(module))


def _forward(module: nn.Module, z: Tensor) -> Any:
    """Call the forward without hooks; under accelerate's offload, that of the module itself."""
    forward = vars(module).get("_old_forward") or module.forward
    return getattr(forward, "_torchdynamo_orig_callable", forward)(z)


def _matrix(plain: LayerAdapter, module: nn.Module) -> Tensor:
    """Return W as the forward of the module applies it."""
    with torch.no_grad(), _undisturbed(module):
        call = _try(plain, module)
    if call is None or call.product is None:
        raise Unsupported("its own forward could be tried when the module was found, and cannot be now")
    return call.product.weight


def _against_lora(plain: LayerAdapter, module: nn.Module, call: _Call) -> str:
    """Return why PEFT cannot add LoRA beside the forward; empty if it can, or the adapter of the kind says so."""
    if call.product is not None and call.product.groups > 1:
        return "PEFT cannot adapt a block-diagonal weight"
    if not isinstance(call.result, Tensor):
        return f"PEFT adds LoRA to the output, and its forward returns a {type(call.result).__name__}"
    try:
        fits = call.result.shape == _plain_forward(plain, module, call.z).shape
    except RuntimeError:  # an image with its channels last
        fits = False
    return "" if fits else "PEFT adds LoRA to the output, and its forward returns another shape than LoRA"


def _is_linear(plain: LayerAdapter, module: nn.Module) -> bool:
    """Return whether the forward is linear in each row, up to a constant, at small and at large inputs."""
    z = next(_inputs(plain, module))
    large = _SCALES[-1] * z.flip(0)
    try:
        outputs = [_forward(module, x) for x in (torch.zeros_like(z), z, large, z + large)]
        alone = _forward(module, z[:1])
    except Exception:
        return False
    rows = (len(z), plain.features(module)[1])
    if not all(isinstance(output, Tensor) and output.shape == rows for output in outputs):
        return False
    zero, small, big, both = (output.double() for output in outputs)
    adds = bool((both - small - big + zero).norm() <= LINEAR_TOLERANCE * (both - zero).norm())
    return adds and bool((alone.double() - small[:1]).norm() <= LINEAR_TOLERANCE * (small - zero).norm())


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Run the block in eval mode, and restore training mode, buffers and random state after it."""
    modes = [(member, member.training) for member in module.modules()]
    buffers = [
        (member, name, buffer, buffer.detach().clone())
        for member in module.modules()
        for name, buffer in member._buffers.items()
        if buffer is not None and buffer.device.type != "meta"
    ]
    devices = sorted({buffer.device.index for buffer in module.parameters() if buffer.device.type == "cuda"})
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for member, training in modes:
            member.training = training
        with torch.no_grad():
            for member, name, buffer, values in buffers:
                member._buffers[name] = buffer
                if buffer.shape != values.shape:  # as an observer of quantization-aware training does
                    buffer.resize_(values.shape)
                buffer.copy_(values)
