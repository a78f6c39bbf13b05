"""Tests of ggft.llama."""
