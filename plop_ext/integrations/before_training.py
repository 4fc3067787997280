"""`score_trainer`: scores on a trainer's own data, before its optimizer exists."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from plop_ext.arguments import check_choice, shown
from plop_ext.errors import InputError
from plop_ext.integrations.trainer_data import Peeked
from plop_ext.preserve import evaluating, random_state
from plop_ext.scoring.score import score

if TYPE_CHECKING:
    from plop_ext.scores import Scores

# The classes of trainers by package, most special first, with the module that reads their data.
_STACKS = {
    "lightning.Trainer": "lightning",
    "pytorch_lightning.Trainer": "lightning",
    "trl.GRPOTrainer": "trl_grpo",
    "trl.RLOOTrainer": "trl_grpo",
    "trl.DPOTrainer": "trl_pairs",
    "trl.RewardTrainer": "trl_pairs",
    "trl.SFTTrainer": "hf_trainer",
    "transformers.Trainer": "hf_trainer",
}
_OPTIONS = frozenset(inspect.signature(score).parameters) - {"model", "dataloader", "tokenizer", "mask"}


def score_trainer(
    trainer: Any,
    model: Any = None,
    data: Any = None,
    *,
    mask: str | None = None,
    rows: str = "chosen",
    **options: Any,
) -> Scores:
    """Score the model of a trainer on the batches that it will train on.

    Call it after the trainer is constructed and before it trains: LoRA has to be in place before the optimizer
    exists. Then construct the trainer that trains, with `peft_config=placement.lora_config(...)`. Model, random
    states, dataloaders and metrics of the trainer are as before.

    Args:
        trainer: A `Trainer` of transformers; `SFTTrainer`, `DPOTrainer`, `RewardTrainer` or `GRPOTrainer` of TRL; or
            a `Trainer` of Lightning, for instance in `LightningModule.setup`. GRPO generates completions of the
            trainer's prompts, and calls the reward functions, and so does RLOO.
        model: The Lightning module, if `trainer` does not fit one yet.
        data: The datamodule or dataloader, if a Lightning trainer does not fit one yet.
        mask: Tokens that count, as for `score`. Default: those of the loss (`"completion"`) if the batches mark them,
            otherwise all but padding (`"attention"`).
        rows: In pairs of preferences: `"chosen"`, `"rejected"` or `"both"`, which count as two samples.
        **options: Further arguments of `score`, such as `max_samples`, `token_step` or `scope`.

    Raises:
        InputError: If `trainer` is of another class, runs in several processes or has trained already, or as `score`.
        SetupError: If the installed TRL generates completions in an unknown way.

    Example:
        >>> placement = score_trainer(trainer).place(types=3)
        >>> config = placement.lora_config(r=16, task_type="CAUSAL_LM")  # `peft_config` of the trainer that trains
    """
    check_choice(("chosen", "rejected", "both"), rows=rows)
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise InputError(f"`{unknown[0]}` is no argument of `score_trainer`, or of `score`")
    stack = _stack_of(trainer)
    if stack is None:
        raise InputError(
            f"`trainer` must be a Trainer of transformers, TRL or Lightning, got {shown(trainer)}; give your own "
            "loop's dataloader to `score`"
        )
    given = {name: value for name, value in {"module": model, "data": data}.items() if value is not None}
    if given and stack != "lightning":
        raise InputError("`model` and `data` come from `trainer`, unless it is one of Lightning; leave them out")
    reader = importlib.import_module(f"plop_ext.integrations.{stack}")
    with reader.left_alone(trainer), random_state():
        found = reader.data_of(trainer, rows, **given)
        with evaluating(found.model):  # completions are written for the first batch, too
            batches = Peeked(found.batches)
        mask = mask or ("completion" if batches.marks_completions else "attention")
        return score(found.model, batches, mask=mask, **options)


def _stack_of(trainer: Any) -> str | None:
    """Return the module that reads a trainer's data; None for a trainer of no known stack.

    Raises:
        InputError: If it is a trainer of TRL whose batches are not those of its model.
    """
    kinds = [f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(trainer).__mro__]
    of_trl = next((kind for kind in kinds if kind.startswith("trl.")), None)
    if of_trl is not None and of_trl not in _STACKS:
        known = ", ".join(kind.removeprefix("trl.") for kind in _STACKS if kind.startswith("trl."))
        raise InputError(
            f"`trainer` is a {of_trl.removeprefix('trl.')}, whose batches are not those of its model; `score_trainer` "
            f"reads {known}; give rows of your data to `score`"
        )
    return next((stack for kind, stack in _STACKS.items() if kind in kinds), None)
