"""Models as people have them: found, checked before anything is allocated, loaded with their tokenizer."""

from plop_ext.models.load import load_model

__all__ = ["load_model"]
