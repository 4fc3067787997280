"""Classes that are refused, or whose adapter cannot be trained, for a reason in another package; and open faults.

A class that passes must leave this table: the census fails on it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """What happens, and why.

    Attributes:
        message: A regular expression that the exception or the fault matches.
        reason: The reason, as the page shows it.
    """

    message: str
    reason: str


TIMM = Refusal("timm library", "needs timm, which is no dependency of this package")
NO_EMBEDDINGS = Refusal("PEFT cannot wrap", "PEFT cannot wrap it: it has no input embeddings")
REVERSIBLE = Refusal("does not require grad", "its reversible layers have no gradient unless their input has one")
UNREAD_TEXT = Refusal(
    "qformer.*no gradient", "the last layer of its query transformer computes text that nothing reads"
)
READS_STRIDE = Refusal("reads its stride", "its code reads the stride of a convolution, which PEFT's layer hides")

UPSTREAM: dict[str, Refusal] = {
    "BitForImageClassification": Refusal(
        "LoRA of a convolution by its class", "PEFT's layer would leave out the standardization of its weights"
    ),
    "IBertForMaskedLM": Refusal("its forward returns a tuple", "PEFT cannot add LoRA to an output that is a tuple"),
    "InstructBlipForConditionalGeneration": UNREAD_TEXT,
    "InstructBlipVideoForConditionalGeneration": UNREAD_TEXT,
    "MobileNetV1ForImageClassification": READS_STRIDE,
    "MobileNetV2ForImageClassification": READS_STRIDE,
    "UnlimitedOcrForConditionalGeneration": Refusal(
        "renames the values", "PEFT renames its LoRA when it loads it, and loses the values"
    ),
    "DinatForImageClassification": Refusal("natten library", "needs natten, which is no dependency of this package"),
    "FastVlmForConditionalGeneration": TIMM,
    "Gemma3nForConditionalGeneration": TIMM,
    "Gemma4UnifiedAssistantForCausalLM": Refusal(
        "shared_kv_states cannot be None", "a draft model, which runs on the keys and values of another model"
    ),
    "GraniteSpeech5ForCTC": NO_EMBEDDINGS,
    "InklingForConditionalGeneration": Refusal("scipy", "needs scipy, which is no dependency of this package"),
    "Llama4ForConditionalGeneration": Refusal("image_outputs", "its forward fails in this release"),
    "MraForMaskedLM": Refusal("no gradient", "its attention has no CPU kernel, and returns zeros"),
    "PPFormulaNetForConditionalGeneration": NO_EMBEDDINGS,
    "PerceptionLMForConditionalGeneration": TIMM,
    "ReformerForMaskedLM": REVERSIBLE,
    "ReformerModelWithLMHead": REVERSIBLE,
    "TimmWrapperForImageClassification": TIMM,
}

# Faults of this package that are not mended yet.
OPEN: dict[str, Refusal] = {}

# Classes whose tiny configuration or inputs the rule cannot make yet.
NOT_BUILT: dict[str, str] = {
    "Apertus1p5ForConditionalGeneration": "ranges of token ids depend on each other",
    "Blip2ForImageTextRetrieval": "its text is read by the query transformer",
    "DeepseekOcr2ForConditionalGeneration": "two encoders of pictures, one after another",
    "DiffusionGemmaForBlockDiffusion": "no default sizes",
    "Gemma4AssistantForCausalLM": "no valid default configuration",
    "Granite4VisionForConditionalGeneration": "windows of pictures of several layers",
    "KyutaiSpeechToTextForConditionalGeneration": "ids of several codebooks",
    "Molmo2ForConditionalGeneration": "pooling of pictures by index",
    "MuseSparkForConditionalGeneration": "sizes by stage",
    "NemotronH_Omni_Reasoning_V3": "grids of pictures of its own",
    "Nemotron3_5TranscribeForConditionalGeneration": "lengths of chunks depend on each other",
    "PI0ForConditionalGeneration": "states and actions of a robot",
    "Qwen2_5OmniForConditionalGeneration": "no forward: its thinker is examined",
    "Qwen3OmniMoeForConditionalGeneration": "no forward: its thinker is examined",
    "UdopForConditionalGeneration": "boxes of words",
    "VibeVoiceAsrForConditionalGeneration": "two tokenizers of sound",
    "VibeVoiceForConditionalGeneration": "two tokenizers of sound",
    "VoxtralRealtimeForConditionalGeneration": "a stream of sound beside the text",
}
