"""LoRA adapters: GGUF, PEFT, and merging into the base model."""
