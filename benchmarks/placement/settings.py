"""The sizes of the experiment: the ones that the protocol fixes, and tiny ones that show that everything runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.placement.models import MODELS, SMOKE_MODELS, Shape


@dataclass(frozen=True)
class Settings:
    """Everything that changes a figure.

    Attributes:
        models: Decoders by name.
        vocabulary: Tokens of the byte-level BPE.
        corpus_parts: Where the text comes from (`corpus.folders`).
        corpus_bytes: Most text to read.
        tokenizer_bytes: Text that the tokenizer is trained on.
        context: Tokens in a sequence of pretraining.
        pretrain_batch: Sequences in a step of pretraining.
        pretrain_rate: Peak learning rate of pretraining.
        checkpoints: Fractions of pretraining at which weights are kept.
        length: Tokens in an example of a task, prompt and answer.
        answer: Tokens in an answer, the end of text included.
        batch: Examples in a step of finetuning.
        steps: Steps of finetuning.
        validation: Examples that choose the learning rate.
        test: Examples that are reported.
        rank: Rank of the one-rank protocol, and of all-linear, whose parameters the matched protocol has.
        scale: alpha / r of every adapter.
        rates: Learning rates tried first, rising by one factor, by which the search also goes on.
        full_rates: The same for full finetuning.
        search_seeds: Seeds that choose the rate.
        seeds: Runs at the chosen rate.
        slots: Replicas trained side by side.
        rank_bins: Widths that ranks are padded to, so that few programs serve all placements.
        scored: Sequences that scores read.
        early_steps: Steps after which the early scores are taken.
        small_tokens: Models pretrained on more are tried with a subset of the triples.
        compile: Whether blocks are compiled.
    """

    models: dict[str, Shape] = field(default_factory=lambda: MODELS)
    vocabulary: int = 4096
    corpus_parts: tuple[str, ...] = ("stdlib", "purelib", "platlib", "doc")
    corpus_bytes: int = 350_000_000
    tokenizer_bytes: int = 30_000_000
    context: int = 512
    pretrain_batch: int = 64
    pretrain_rate: float = 2e-3
    checkpoints: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    length: int = 64
    answer: int = 32
    batch: int = 16
    steps: int = 300
    validation: int = 256
    test: int = 512
    rank: int = 8
    scale: float = 2.0
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    full_rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4, 8e-4)
    search_seeds: int = 3
    seeds: int = 3
    slots: int = 48
    rank_bins: tuple[int, ...] = (32, 80, 128, 256)
    scored: int = 128
    early_steps: int = 30
    small_tokens: int = 100_000_000
    compile: bool = True

    @property
    def train(self) -> int:
        """Training examples of a task: each is seen once."""
        return self.batch * self.steps

    @property
    def factor(self) -> float:
        """Between neighbouring learning rates."""
        return self.rates[1] / self.rates[0]


SMOKE = Settings(
    models=SMOKE_MODELS,
    vocabulary=384,
    corpus_parts=("stdlib",),
    corpus_bytes=300_000,
    tokenizer_bytes=100_000,
    context=32,
    pretrain_batch=4,
    checkpoints=(0.5, 1.0),
    length=96,
    answer=48,
    batch=2,
    steps=3,
    validation=4,
    test=4,
    rank=2,
    rates=(1e-3, 4e-3),
    full_rates=(1e-3, 4e-3),
    search_seeds=1,
    seeds=2,
    slots=12,
    rank_bins=(4, 16, 64),
    scored=4,
    early_steps=2,
    compile=False,
)
