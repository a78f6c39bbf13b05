"""Tests of ggft.gguf."""
