"""`find_plop_target_modules`: scores and placement in one call, in the form of PEFT's own helpers."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from torch import nn

from plop_ext._warnings import warn
from plop_ext.arguments import check_flags, check_type
from plop_ext.errors import InputError
from plop_ext.layers import at_rest, discover_whole, runnable, stage_of
from plop_ext.preserve import evaluating, random_state
from plop_ext.score_data import check_number_of_types
from plop_ext.scoring.inputs import take_model
from plop_ext.scoring.score import score
from plop_ext.statistics import StopRule

_ARGUMENTS = frozenset(inspect.signature(score).parameters)


def find_plop_target_modules(
    model: nn.Module | str | os.PathLike[str],
    dataloader: Iterable[Any] | str | os.PathLike[str],
    types: int | str | Sequence[str] | None = None,
    *,
    modules: int | float | str | None = None,
    max_nfn: float | None = None,
    ranks: str | None = None,
    max_params: int | float | str | None = None,
    show_progress: bool = True,
    **score_kwargs: Any,
) -> dict[str, Any]:
    """Score `model` and return keyword arguments for `LoraConfig(**targets)` that select the lowest module types.

    Args:
        model: As for `score`.
        dataloader: As for `score`.
        types: Number of module types to select (default 3), their names, or `"auto"`, as for `Scores.place`. The
            default stop rule waits for the same number of types.
        modules: Select single modules instead of types, as for `Scores.place`.
        max_nfn: Select all single modules with an NFN of at most this, as for `Scores.place`.
        ranks: `"inverse-nfn"`: a separate rank for each module, as for `Scores.place`.
        max_params: Limit on the trainable parameters, as for `Scores.place`; it sets `ranks`.
        show_progress: Show progress bars.
        **score_kwargs: Further arguments of `score`, such as `tokenizer`.

    Returns:
        `target_modules`, full names, and `target_parameters`, which is None if there are none. With `ranks`, also
        `rank_pattern` and `alpha_pattern`, with the rank of every module. A warning gives each difference between the
        selection and what PEFT can adapt, such as a packed weight of which one part was selected.

    Raises:
        InputError: As `score` and `Scores.place`. More types than the model has are refused before it runs.

    Example:
        >>> targets = plop_ext.find_plop_target_modules(model, dataloader, types=3)
        >>> model = peft.get_peft_model(model, peft.LoraConfig(r=16, **targets))
    """
    unknown = sorted(set(score_kwargs) - _ARGUMENTS)
    if unknown:
        raise InputError(f"`{unknown[0]}` is no argument of `find_plop_target_modules`, or of `score`")
    check_flags(show_progress=show_progress)
    if max_params is not None and ranks is None:
        raise InputError("`max_params` sets the rank, which `LoraConfig` takes from you; give `ranks` too")
    score_kwargs.setdefault("progress", show_progress)
    if types is not None:
        check_type((str, Integral, Sequence), "a number, 'auto' or names of types", types=types)
    model, tokenizer = take_model(model, score_kwargs.get("tokenizer"))
    if tokenizer is not None:
        score_kwargs["tokenizer"] = tokenizer
    number = int(types) if isinstance(types, Integral) and not isinstance(types, bool) else None
    if number is not None and number > 0 and score_kwargs.get("compat") is None:
        options = {name: score_kwargs[name] for name in ("include", "exclude", "scope") if name in score_kwargs}
        inner = runnable(model)
        with random_state(), evaluating(model), at_rest(inner):
            found = discover_whole(inner, stage_of(inner), **options)
        check_number_of_types(number, len({layer.type for layer in found.layers if not layer.no_place}))
    stop = score_kwargs.get("stop", "auto")
    by_default = score_kwargs.get("max_samples", "auto") == "auto" and score_kwargs.get("compat") is None
    settles = stop == "settled" or (stop == "auto" and by_default)
    if settles and number is not None and number > 0:
        score_kwargs["stop"] = StopRule(types=number)
    scores = score(model, dataloader, **score_kwargs)
    placement = scores.place(types=types, modules=modules, max_nfn=max_nfn, ranks=ranks, max_params=max_params)
    for note in placement.notes:
        warn(note)
    return placement.targets()
