# To be appended to src/peft/helpers.py, without this header and the imports that are there already.
import re
from collections.abc import Iterable
from typing import Any, Callable, Optional

import torch
from torch import nn
from tqdm.auto import tqdm


class PlopSelector:
    """
    Choose LoRA targets by PLoP (Precise LoRA Placement, https://arxiv.org/abs/2506.20629).

    PLoP runs a few batches of the task's data through the model and measures, for every `nn.Linear` in the repeated
    blocks, the normalized feature norm (NFN): the mean of `||W z|| / ||z||` over the tokens, divided by `||W||_F /
    sqrt(in_features)`, its value for random inputs. A module with a low NFN treats the features of the task as noise
    and has most to learn. The scores are computed once, on first use; several selections can be made from them.

    Needs no gradients and stores no activations. If the package `plop_ext` is installed, its kernels do the same
    computation faster.

    Args:
        model (`nn.Module`):
            The base model. Its hooks, its training mode and its weights are as before afterwards.
        dataloader (`Iterable`):
            Batches of the task's data, dicts of tensors as for training. Padding is not counted if there is an
            `attention_mask`. A few dozen samples are enough for the choice of types.
        forward_fn (`Callable`, *optional*):
            Called as `forward_fn(model, batch)` for each batch. Defaults to `model(**batch)`, with the tensors of the
            batch moved to the device of the model.
        show_progress (`bool`, defaults to `True`):
            Whether to show a progress bar. Disable in CI or other non-interactive environments.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Any],
        forward_fn: Optional[Callable[[nn.Module, Any], Any]] = None,
        show_progress: bool = True,
    ):
        self.model = model
        self.dataloader = dataloader
        self.forward_fn = forward_fn
        self.show_progress = show_progress
        self._scores: Optional[dict[str, float]] = None

    def scores(self) -> dict[str, float]:
        """Return the NFN of each module, by its name."""
        if self._scores is None:
            modules = {
                name: module
                for name, module in self.model.named_modules()
                if isinstance(module, nn.Linear) and re.search(r"(^|\.)\d+\.", name)
            }
            if not modules:
                raise ValueError("The model has no `nn.Linear` in repeated blocks.")
            gains = self._gains(modules) if self.forward_fn or not _has_plop_ext() else self._gains_by_kernels()
            self._scores = {
                name: gains[name] / (module.weight.float().norm() / module.in_features**0.5).item()
                for name, module in modules.items()
                if name in gains
            }
        return self._scores

    def get_best_targets(
        self, num_types: Optional[int] = 3, num_modules: Optional[int] = None, threshold: Optional[float] = None
    ) -> list[str]:
        """
        Return the full names of the modules to adapt.

        Args:
            num_types (`int`, *optional*, defaults to 3):
                Number of module types (`q_proj`, `up_proj`, ...) with the lowest mean NFN. All modules of a type are
                returned. The paper uses 3.
            num_modules (`int`, *optional*):
                Number of single modules with the lowest NFN. Takes the place of `num_types`.
            threshold (`float`, *optional*):
                Return all single modules with at most this NFN. Takes the place of `num_types`.
        """
        if num_modules is not None and threshold is not None:
            raise ValueError("`num_modules` and `threshold` exclude each other.")
        scores = self.scores()
        if threshold is not None:
            return [name for name, nfn in scores.items() if nfn <= threshold]
        if num_modules is not None:
            lowest = set(sorted(scores, key=scores.__getitem__)[:num_modules])
            return [name for name in scores if name in lowest]
        types: dict[str, list[float]] = {}
        for name, nfn in scores.items():
            types.setdefault(_module_type(name), []).append(nfn)
        ranked = sorted(types, key=lambda label: sum(types[label]) / len(types[label]))
        return [name for name in scores if _module_type(name) in ranked[:num_types]]

    def _gains(self, modules: dict[str, nn.Module]) -> dict[str, float]:
        """Return the mean gain of each module over all tokens, with a forward hook on each."""
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in modules}
        counted: list[Optional[torch.Tensor]] = [None]

        def observe(name: str) -> Callable[..., None]:
            def hook(module: nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                feature = output if module.bias is None else output - module.bias
                norms = inputs[0].float().norm(dim=-1)
                gain = feature.float().norm(dim=-1) / norms
                valid = (norms > 0) & gain.isfinite()
                mask = counted[0]
                if mask is not None and mask.shape == gain.shape:
                    valid &= mask.to(valid.device)
                kept = gain[valid].double()
                sums[name] += torch.stack([kept.sum(), kept.new_tensor(kept.numel())]).cpu()

            return hook

        training = self.model.training
        handles = []
        try:
            handles = [module.register_forward_hook(observe(name)) for name, module in modules.items()]
            self.model.eval()
            with torch.no_grad():
                for batch in tqdm(self.dataloader, desc="Scoring modules (PLoP)", disable=not self.show_progress):
                    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
                    counted[0] = mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
                    self._forward(batch)
        finally:
            for handle in handles:
                handle.remove()
            self.model.train(training)
        return {name: (total / count).item() for name, (total, count) in sums.items() if count > 0}

    def _forward(self, batch: Any) -> None:
        if self.forward_fn is not None:
            self.forward_fn(self.model, batch)
            return
        device = next(self.model.parameters()).device
        self.model(**{key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()})

    def _gains_by_kernels(self) -> dict[str, float]:
        """Return the mean gain of each module as the kernels of `plop_ext` compute it."""
        import plop_ext

        scores = plop_ext.score(self.model, self.dataloader, stop=None, max_samples=None, progress=self.show_progress)
        return dict(zip(scores.module_names, scores.gain.tolist()))


def _has_plop_ext() -> bool:
    try:
        import plop_ext  # noqa: F401
    except ImportError:
        return False
    return True


def _module_type(name: str) -> str:
    """Return the name of a module without the indices of repeated blocks."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def find_plop_target_modules(
    model: nn.Module,
    dataloader: Iterable[Any],
    num_types: int = 3,
    forward_fn: Optional[Callable[[nn.Module, Any], Any]] = None,
    show_progress: bool = True,
) -> dict[str, Optional[list[str]]]:
    """
    Choose the targets of LoRA for a task by PLoP, in one call.

    Args:
        model (`nn.Module`):
            The base model.
        dataloader (`Iterable`):
            A few batches of the task's data.
        num_types (`int`, defaults to 3):
            Number of module types that get LoRA. Raise it if the adapted model underfits.
        forward_fn (`Callable`, *optional*):
            Called as `forward_fn(model, batch)`; see [`PlopSelector`].
        show_progress (`bool`, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `dict`: `target_modules`, the full names of the chosen modules, and `target_parameters`, which is None.
    """
    selector = PlopSelector(model, dataloader, forward_fn=forward_fn, show_progress=show_progress)
    return {"target_modules": selector.get_best_targets(num_types=num_types), "target_parameters": None}
