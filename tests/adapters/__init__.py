"""Tests of ggft.adapters."""
