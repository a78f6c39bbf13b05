"""GGML files from before GGUF, every version, converted to GGUF."""
