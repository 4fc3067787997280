"""`auto_lora`: from a model and task data to a model with LoRA where PLoP places it, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from plop_ext.arguments import check_type, check_whole
from plop_ext.errors import InputError
from plop_ext.layers import base_model
from plop_ext.placement.ranks import DEFAULT_RANK
from plop_ext.scoring.score import score

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

# PEFT's task by the end of the class name; a sequence classifier's head is then trained too.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def auto_lora(
    model: nn.Module,
    data: Iterable[Any] | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    r: int | None = None,
    types: int | str | Sequence[str] | None = None,
    max_params: int | float | str | None = None,
    lora: Mapping[str, Any] | None = None,
    **score_options: Any,
) -> PeftModel:
    """Score `model` on `data`, place LoRA on the lowest module types, and return the adapted model, verified.

    Use `score`, `Scores.place` and `Placement.lora_config` instead if you want to see or keep the scores.

    Args:
        model: A model without adapters. PEFT changes it in place.
        data: Batches, rows, texts, or the name of a data set, as for `score`.
        tokenizer: Tokenizer of the model, if `data` holds rows or texts.
        r: Rank. Default 16, or the largest that fits `max_params`.
        types: Number of module types (default 3), their names, or `"auto"`, as for `Scores.place`.
        max_params: Limit on the trainable parameters, as for `Scores.place`.
        lora: Further fields of `peft.LoraConfig`, such as `{"lora_alpha": 32, "lora_dropout": 0.05}`. `task_type`
            follows from the class of the model unless you give it.
        **score_options: Further arguments of `score`, such as `mask="completion"` or `max_samples`.

    Returns:
        The result of `peft.get_peft_model`, in the training mode that `model` had.

    Raises:
        InputError: As `score`, `Scores.place` and `Placement.lora_config`, or if the model has adapters already.
        SetupError: If PEFT is not installed.
    """
    check_type(nn.Module, "a torch module", model=model)
    check_type((Mapping, type(None)), "a dict of fields of LoraConfig", lora=lora)
    check_whole(r=r)
    if base_model(model) is not model and hasattr(model, "peft_config"):
        raise InputError("`model` has adapters already; merge or unload them first")
    scores = score(model, data, tokenizer, **score_options)
    placement = scores.place(types=types, r=r or (DEFAULT_RANK if max_params is None else None), max_params=max_params)
    fields = dict(lora or {})
    task = next((task for end, task in _TASKS.items() if type(model).__name__.endswith(end)), None)
    if task is not None:
        fields.setdefault("task_type", task)
    config = placement.lora_config(**fields)
    from peft import get_peft_model

    training = {module: module.training for module in model.modules()}
    adapted = get_peft_model(model, config)
    placement.verify(adapted)
    adapted.train(training[model])
    for module in list(adapted.modules()):
        wrapped = getattr(module, "base_layer", None)
        if wrapped in training:
            module.train(training[wrapped])
    for module, mode in training.items():
        module.training = mode
    return adapted
