"""Matrices that are scored but are no place for LoRA: those that cannot learn, and those that wire the model.

Each entry of the table names matrices by the class that holds them and by their attribute in it. An entry without
attributes stands for everything within the class. Patterns are those of `fnmatch`, on the class's own name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

INDEXER = "it only chooses the tokens that attention reads, so no gradient reaches it"
PATCHER = "it only chooses where patches of bytes end, so no gradient reaches it"
PAST_THE_ADAPTER = "in training, a fused kernel reads its weight past the adapter"
CLAMPED = "the forward clamps its weight, past the adapter"
ALTUP = "it mixes the copies of the residual stream (AltUp)"
HYPER_CONNECTION = "it mixes the residual streams (hyper-connections)"
LAUREL = "it is one of the two low-rank factors of a residual connection (LAuReL)"
PER_LAYER_INPUT = "it gates the per-layer embeddings"
DECAY = "it sets the decay and the write strength of a linear attention"
OUTPUT_GATE = "it is one of the two low-rank factors of an output gate"
HEAD_GATE = "it has one output per head, which gates the head"
COMPRESSOR = "it pools tokens for sparse attention"
POSITION = "it chooses or weighs positions"
CONVOLUTION_TAPS = "it computes the taps of a convolution"
OWN_ADAPTER = "it is a low-rank adapter of the model's own"
NORM_GATE = "it computes the scale of a norm"
MESSAGE_GATE = "it weighs the passes of a loop"
ROUTER_PART = "it is part of a router: an adapter on it would change the choice of experts"
SINGLE_OUTPUT = "it has a single output, as gates have"


@dataclass(frozen=True)
class NoPlace:
    """One entry: the matrices that `owners` hold as `attributes` are no place for LoRA.

    Attributes:
        owners: Patterns of the names of classes.
        attributes: Patterns of attributes; empty for everything within such a class.
        reason: Why, as a sentence about the matrix.
    """

    owners: tuple[str, ...]
    attributes: tuple[str, ...]
    reason: str

    def names(self, owner: str, attribute: str) -> bool:
        """Return whether the entry stands for what an instance of class `owner` holds as `attribute`."""
        held = not self.attributes or any(fnmatchcase(attribute, pattern) for pattern in self.attributes)
        return held and any(fnmatchcase(owner, pattern) for pattern in self.owners)


TABLE = (
    NoPlace(("*Indexer", "*IndexerScorer"), (), INDEXER),
    NoPlace(("BltPatcher",), (), PATCHER),
    NoPlace(("MambaMixer", "FalconMambaMixer"), ("out_proj", "x_proj"), PAST_THE_ADAPTER),
    NoPlace(
        ("*Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "Zamba2MambaMixer"),
        ("out_proj",),
        PAST_THE_ADAPTER,
    ),
    NoPlace(("*AltUp",), ("correction_coefs",), CLAMPED),
    NoPlace(("*AltUp",), (), ALTUP),
    NoPlace(("Gemma3nTextModel",), ("altup_projections", "altup_unembed_projections"), ALTUP),
    NoPlace(("*LaurelBlock",), (), LAUREL),
    NoPlace(("*GatedResidual",), (), HYPER_CONNECTION),
    NoPlace(("*TextDecoderLayer", "*PLEBlock"), ("per_layer_input_gate", "per_layer_projection"), PER_LAYER_INPUT),
    NoPlace(("*GatedDeltaNet",), ("in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj"), DECAY),
    NoPlace(("*DeltaAttention", "*TextLinearAttention"), ("b_proj",), DECAY),
    NoPlace(("*ForgetGate",), (), DECAY),
    NoPlace(("*DeltaAttention", "*TextLinearAttention"), ("g_a_proj", "g_b_proj"), OUTPUT_GATE),
    NoPlace(("BailingHybridAttention", "Dots3NoteTextAttention", "Lfm3Attention"), ("g_proj",), HEAD_GATE),
    NoPlace(("DogeAttention",), ("dt_proj",), HEAD_GATE),
    NoPlace(("xLSTMLayer",), ("igate_preact", "fgate_preact", "ifgate_preact"), HEAD_GATE),
    NoPlace(("Inkling2*Attention",), ("sink_proj",), HEAD_GATE),
    NoPlace(("*Compressor",), ("kv_proj", "gate_proj"), COMPRESSOR),
    NoPlace(("WavLMAttention",), ("gru_rel_pos_linear",), POSITION),
    NoPlace(("Swin*Attention",), ("continuous_position_bias_mlp",), POSITION),
    NoPlace(("*MultiscaleDeformableAttention",), ("sampling_offsets", "attention_weights"), POSITION),
    NoPlace(("*DynamicShortConvolution",), ("weight_proj",), CONVOLUTION_TAPS),
    NoPlace(("ConvBertSelfAttention",), ("conv_kernel_layer",), CONVOLUTION_TAPS),
    NoPlace(("Zamba2*",), ("*_adapter_list",), OWN_ADAPTER),
    NoPlace(("*GateMLP",), (), NORM_GATE),
    NoPlace(("*AdaRmsNorm",), (), NORM_GATE),
    NoPlace(("*MessageGate",), (), MESSAGE_GATE),
    NoPlace(("*Router", "*RouterMLP"), (), ROUTER_PART),
)


def reason_against(ancestry: Iterable[tuple[str, str]]) -> str:
    """Return why a matrix is no place for LoRA; empty if it is a candidate.

    Args:
        ancestry: Each step from the model to the matrix: the name of a class, and the attribute that leads on. The
            last step of a query projection is ("LlamaAttention", "q_proj").
    """
    return next((reason for step in ancestry if (reason := _reason(*step))), "")


@cache
def _reason(owner: str, attribute: str) -> str:
    return next((entry.reason for entry in TABLE if entry.names(owner, attribute)), "")
