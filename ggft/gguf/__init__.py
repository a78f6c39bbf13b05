"""GGUF files: read, checked, described and written."""
