"""Files, processes, signals, progress and messages: what knows nothing of models."""
