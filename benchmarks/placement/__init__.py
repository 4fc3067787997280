"""Does the placement help? Pretrained decoders, LoRA in every triple of module types, and what predicts the order."""
