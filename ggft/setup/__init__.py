"""A model and data opened for a run, and settings turned into an open engine."""
