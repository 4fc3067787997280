"""How far NFN is from its definition in float64 on the same inputs, and what a large bias costs in low precision.

python -m benchmarks.accuracy --output benchmarks/results/accuracy.json

The oracle multiplies the very inputs and weights of the run again, in float64. So for a bf16 model the difference is
what rounding the module's output to bf16 does to its norm, and nothing else.

plop_ext reads the feature W z off the output y = W z + bias that the forward rounded. A value y_i lies on a grid of
spacing s(y_i), and rounding adds noise of variance s^2 / 12 that is uncorrelated with W z. So the sum of squares grows
by sum_i s(y_i)^2 / 12. A mantissa uniform in log scale has E[s^2] = 0.46 eps^2 E[y^2] (eps = 2^-7 for bf16), and a
bias of c times the feature norm makes ||y||^2 = (1 + c^2) ||W z||^2, hence

    relative error of the gain = sqrt(1 + 0.46 eps^2 (1 + c^2) / 12) - 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import plop_ext
from benchmarks import results
from benchmarks.shapes import build
from plop_ext import ops, reference

BIAS_RATIOS = (0, 1, 3, 10, 30, 100)
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
# E[spacing^2] / (eps^2 E[y^2]) for a mantissa m in [1, 2) uniform in log scale: 1 / E[m^2] = 2 ln 2 / 3.
_LOG_UNIFORM = 2 * math.log(2) / 3


def batches(vocab_size: int, quick: bool) -> list[dict[str, Tensor]]:
    """Return two padded batches of random tokens."""
    size, tokens = (2, 48) if quick else (8, 128)
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(2):
        ids = torch.randint(0, vocab_size, (size, tokens), generator=generator)
        lengths = torch.randint(tokens // 2, tokens + 1, (size, 1), generator=generator)
        found.append({"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths).long()})
    return found


def model_errors(model: nn.Module, data: list[dict[str, Tensor]], modules: str = "") -> dict[str, float]:
    """Return the relative error of each module's NFN against the oracle, for modules with `modules` in their name."""
    scores = plop_ext.score(model, data, max_samples=None, progress=False)
    names = [name for name in scores.module_names if modules in name]
    oracle = reference.nfn(model, data, names)
    measured = dict(zip(scores.module_names, scores.nfn.tolist(), strict=True))
    return {name: measured[name] / oracle[name] - 1 for name in names}


def model_row(case: str, dtype: str, errors: dict[str, float]) -> results.Row:
    worst = max(errors, key=lambda name: abs(errors[name]))
    return {
        "case": case,
        "dtype": dtype,
        "modules": len(errors),
        "max_relative_error": abs(errors[worst]),
        "worst_module": worst,
        "mean_relative_error": sum(errors.values()) / len(errors),
    }


def predicted_error(dtype: torch.dtype, bias_ratio: float) -> float:
    """Return the closed form above."""
    return math.sqrt(1 + _LOG_UNIFORM * torch.finfo(dtype).eps ** 2 * (1 + bias_ratio**2) / 12) - 1


def spacing_error(outputs: Tensor, feature_sumsq: Tensor) -> float:
    """Return the same prediction from the grid that the outputs really lie on: no assumption about their mantissas."""
    exponent = torch.frexp(outputs.double()).exponent - 1
    spacing = torch.where(outputs == 0, 0.0, torch.finfo(outputs.dtype).eps * torch.exp2(exponent.double()))
    return float(((1 + spacing.square().sum(-1) / 12 / feature_sumsq).sqrt() - 1).mean())


def linear_row(bias_ratio: float, name: str, tokens: int) -> results.Row:
    """Error of the mean gain of one linear layer whose bias has `bias_ratio` times the norm of its features."""
    dtype = LOW_PRECISION[name]
    in_features, out_features = 1024, 256
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(out_features, in_features, generator=generator) / in_features**0.5).to(dtype)
    inputs = torch.randn(tokens, in_features, generator=generator).to(dtype)
    features = inputs.double() @ weight.double().T
    direction = torch.randn(out_features, generator=generator)
    norm = features.norm(dim=-1).mean()
    bias = (direction / direction.norm() * norm * bias_ratio).to(dtype)
    outputs = nn.functional.linear(inputs, weight, bias)

    s_in, s_out = torch.empty(tokens), torch.empty(tokens)
    ops.row_sumsq_(s_in, inputs)
    ops.row_sumsq_(s_out, outputs, bias)
    gain = (s_out.double() / s_in.double()).sqrt().mean()
    oracle = reference.token_gains(weight, inputs).mean()
    return {
        "case": "linear, bias",
        "dtype": name,
        "bias_ratio": bias_ratio,
        "relative_error": float(gain / oracle - 1),
        "predicted": predicted_error(dtype, bias_ratio),
        "predicted_from_spacing": spacing_error(outputs, features.square().sum(-1)),
    }


def scale_key_biases(model: nn.Module, data: list[dict[str, Tensor]], ratio: float) -> None:
    """Give each `k_proj` a bias of `ratio` times its mean feature norm, layer after layer as the data flows."""
    generator = torch.Generator().manual_seed(4)

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        features = args[0].float() @ module.weight.float().T  # type: ignore[operator]
        direction = torch.randn(features.shape[-1], generator=generator)
        scale = ratio * features.norm(dim=-1).mean() / direction.norm()
        module.bias.data.copy_(direction * scale)  # type: ignore[operator]

    handles = [
        module.register_forward_pre_hook(hook) for name, module in model.named_modules() if name.endswith("k_proj")
    ]
    try:
        with torch.no_grad():
            model(**data[0], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__, device="cpu")
    args = results.parse(parser, argv)
    if args.device.type != "cpu":
        parser.error("--device: the oracle runs on the CPU, and so does this script")
    sizes = {} if args.quick else {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    data = batches(256, args.quick)
    rows = []
    for name, dtype in {"fp32": torch.float32, **LOW_PRECISION}.items():
        rows.append(model_row("llama", name, model_errors(build("tiny", sizes, dtype=dtype), data)))
    ratios = (0, 100) if args.quick else BIAS_RATIOS
    for ratio in ratios:
        model = build("tiny", {"model_type": "qwen2", **sizes}, dtype=torch.bfloat16)
        scale_key_biases(model, data, ratio)
        row = model_row("qwen2, k_proj bias", "bf16", model_errors(model, data, "k_proj"))
        rows.append({**row, "bias_ratio": ratio, "predicted": predicted_error(torch.bfloat16, ratio)})
    rows += [linear_row(ratio, name, 64 if args.quick else 4096) for name in LOW_PRECISION for ratio in ratios]
    for row in rows:
        texts = {key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()}
        print(", ".join(f"{key} {text}" for key, text in texts.items()))
    results.save(args, "accuracy", rows)


if __name__ == "__main__":
    main()
