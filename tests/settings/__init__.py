"""Tests of ggft.settings."""
