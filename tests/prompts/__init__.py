"""Tests of ggft.prompts."""
