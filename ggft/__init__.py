"""ggft: fine-tune a language model on the quantized GGUF file that you already have."""

import os

__version__ = "0.1.0"

if "OMP_WAIT_POLICY" not in os.environ:
    # GNU OpenMP threads spin for milliseconds at each node's end: then a busy machine makes no
    # progress: with other programs running, training was measured 5 times slower; a short spin
    # costs an idle machine 4%. Read when libgomp is loaded, so it stands before every import.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
