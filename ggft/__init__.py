"""ggft: fine-tune a language model on the quantized GGUF file that you already have."""

__version__ = "0.1.0"
