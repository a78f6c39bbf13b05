"""Data files to tokenized examples, steps and micro-batches."""
