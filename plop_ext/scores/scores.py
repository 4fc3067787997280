"""`Scores`: the result of a scoring run, with placing, merging, saving and loading, without a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plop_ext.arguments import check_type
from plop_ext.files import uncollected
from plop_ext.placement import Placement, select
from plop_ext.score_data import ScoreData, paper_script
from plop_ext.scores import file, merging, shown
from plop_ext.tables import data_frame

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False, repr=False)
class Scores(ScoreData):
    """NFN of every scored module of a model on a data sample: ranks types, places LoRA, merges, saves.

    The fields and the figures derived from them are those of `plop_ext.score_data.ScoreData`.
    """

    def __repr__(self) -> str:
        return shown.line(self)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: NFN by type, and by layer and type as a heatmap."""
        return shown.html(self)

    def to_pandas(self) -> DataFrame:
        """Return a table with one row per module: name, type, layer, NFN, gain, baseline, tokens and sizes.

        Raises:
            SetupError: If pandas is not installed.
        """
        return data_frame(shown.rows(self))

    def metrics(self, prefix: str = "plop/") -> dict[str, float]:
        """Return NFN by type, samples and tokens by name, for `wandb.log`, `mlflow.log_metrics`, `trackio.log`, ...

        Args:
            prefix: Start of every name.
        """
        check_type(str, "the start of a name", prefix=prefix)
        return shown.metrics(self, prefix)

    @classmethod
    def merge(cls, parts: Sequence[Scores], order: str = "given") -> Scores:
        """Merge runs over different samples of the same model.

        A sample is identified by its id and the `data_name` of its run: id 3 in two data sets means two samples.
        Experts to which too few tokens were routed in each run are scored if all runs together have enough.

        Args:
            parts: Scores of the same modules at the same settings, such as those of the shards of a data set.
            order: Order of the samples: `"given"`, one run after the other; or `"ids"`, by data set in the order
                given, and by id within it. Statistics resample by position: with `"ids"`, the scores of a data set
                are bitwise identical however it was cut into shards.

        Raises:
            InputError: If models or settings differ, or a sample is in two runs; the error names the difference.
        """
        return merging.merge(cls, parts, order)

    def place(
        self,
        types: int | str | Sequence[str] | None = None,
        *,
        modules: int | float | str | None = None,
        max_nfn: float | None = None,
        strategy: str = "lowest",
        seed: int = 0,
        r: int | None = None,
        ranks: str | None = None,
        max_params: int | float | str | None = None,
        max_memory: int | float | str | None = None,
        batch: int = 8,
        seq: int = 1024,
        ignore_nonfinite: bool = False,
        serve: str | None = None,
    ) -> Placement:
        """Choose where LoRA goes. Give at most one of `types`, `modules` and `max_nfn`.

        Only candidates compete: matrices that cannot learn, or that wire the model, are scored but never chosen
        (`no_place_by_type`). To make them candidates, name them in `include` of `score`.

        Args:
            types: Number of module types (default 3, as in the paper), their labels, or `"auto"`: the number nearest
                to 3 at which the choice is stable under resampling; if there is none, 3 or the largest number within
                the budget (`plop_ext.statistics.auto_k`). A label without its role stands for all roles: `q_proj` for
                `q_proj@linear_attention` and `q_proj@full_attention`.
            modules: Choose single modules instead of types: their number (int), or a fraction of all modules (float
                in (0, 1]).
            max_nfn: Choose all single modules with an NFN of at most `max_nfn`.
            strategy: Order of the choice. `"lowest"`: lowest NFN first; `"inverse"`: highest first, as an ablation;
                `"random"`: a random order. `"attention"`, `"mlp"` and `"all"` choose all types of this kind,
                independent of their scores.
            seed: Seed of `"random"`.
            r: LoRA rank. Default 16, or the largest that fits the budget.
            ranks: `"inverse-nfn"`: a separate rank for each module, in proportion to 1 / NFN, at the same number of
                parameters. By default all modules share one rank, which every serving engine accepts.
            max_params: Limit on the trainable parameters (int), or a fraction of the model's (float below 1).
            max_memory: Limit on the bytes that training adds (`Placement.cost`) (int), or a fraction of the bytes of
                the model's weights (float below 1).
            batch: Samples in a training step, for `max_memory`.
            seq: Tokens in a sample, for `max_memory`.
            ignore_nonfinite: Place although weights or activations of the model are NaN or infinite
                (`Scores.nonfinite`), for instance because 16-bit activations overflow in a few tokens.
            serve: Inference engine that has to serve the adapter: `"vllm"`, `"sglang"` or `"llama.cpp"`. The nearest
                placement that it can serve is chosen, and the differences are among the notes
                (`Placement.servable`).

        Returns:
            The placement, ready for `Placement.lora_config`.

        Raises:
            InputError: If the model has NaN or infinite values, if the arguments exclude each other, if a number is
                out of range, if a label is unknown, if no placement fits the budget, or if the scores carry no signal
                and you gave no number. With a number, a warning is issued instead.
        """
        with uncollected():  # 100,000 modules are a million objects, none of them garbage
            return select(
                self,
                types=types,
                modules=modules,
                max_nfn=max_nfn,
                strategy=strategy,
                seed=seed,
                r=r,
                ranks=ranks,
                max_params=max_params,
                max_memory=max_memory,
                batch=batch,
                seq=seq,
                ignore_nonfinite=ignore_nonfinite,
                serve=serve,
            )

    def paper_metrics(self) -> dict[str, dict[str, float]]:
        r"""Compute `actual` and `random` of each module at the published script's scale: gain over RMS(W) and over K.

        Raises:
            InputError: If the weight norms are unknown.
        """
        return paper_script.metrics(self.modules, self.gain)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write totals, scores by type, statistics and provenance as JSON to `path` atomically.

        Args:
            path: File to write. A symbolic link is followed; a device or a pipe is written to.
            overwrite: Replace any file. By default only an earlier file of the same kind is replaced.

        Raises:
            InputError: If `path` cannot be written, or is a file of another kind and `overwrite` is false.
        """
        file.write(self, path, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read a file that `save` wrote.

        Raises:
            InputError: If the file is missing, is no scores file, or has another version.
        """
        return file.read(cls, path)
