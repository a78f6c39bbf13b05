"""ggft: fine-tune a language model on the quantized GGUF file that you already have.

    import ggft

    model = ggft.open_model("smollm2-135m-instruct")
    data = ggft.load_data(model, "train.json", val_split=0.1)
    result = ggft.train(model, data, rank=8)
    print(result.verdict.text, ggft.evaluate(model, data, adapter=result.adapter).loss)
    result.adapter.save("adapter.gguf")
    ggft.merge(model, result.adapter, "merged.gguf")

These are the functions that the commands call. Each is imported when it is first asked for, so that
`import ggft` takes no time.

Commands run native code in a child process; here it runs in yours. What is known to stop llama.cpp
is refused with an InputError, but a damaged model that passes these checks may end your program.
Give a file that you do not trust to a command first: `ggft generate hi -m FILE --max-tokens 1`.
"""

from __future__ import annotations

import importlib
import os

# As typing has it; importing that would take half of the time in which Ctrl-C is not heard yet.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from ggft.adapters.adapter import Adapter as Adapter
    from ggft.recipes.merge import merge as merge
    from ggft.setup.inputs import BaseModel as BaseModel
    from ggft.setup.inputs import Data as Data
    from ggft.setup.inputs import load_data as load_data
    from ggft.setup.inputs import open_model as open_model
    from ggft.system.errors import GgftError as GgftError
    from ggft.system.errors import InputError as InputError
    from ggft.system.errors import Interrupted as Interrupted
    from ggft.system.errors import NetworkError as NetworkError
    from ggft.system.errors import NumericError as NumericError
    from ggft.system.errors import ResourceError as ResourceError
    from ggft.training.callbacks import Callback as Callback
    from ggft.training.callbacks import Step as Step
    from ggft.training.callbacks import TensorBoard as TensorBoard
    from ggft.training.callbacks import WandB as WandB
    from ggft.training.evaluation import Evaluation as Evaluation
    from ggft.training.evaluation import evaluate as evaluate
    from ggft.training.train import TrainingResult as TrainingResult
    from ggft.training.train import train as train

__version__ = "0.1.0"

_HOMES = {
    "adapters.adapter": ("Adapter",),
    "recipes.merge": ("merge",),
    "setup.inputs": ("BaseModel", "Data", "load_data", "open_model"),
    "system.errors": (
        "GgftError", "InputError", "Interrupted", "NetworkError", "NumericError", "ResourceError",
    ),
    "training.callbacks": ("Callback", "Step", "TensorBoard", "WandB"),
    "training.evaluation": ("Evaluation", "evaluate"),
    "training.train": ("TrainingResult", "train"),
}  # fmt: skip
__all__ = [name for names in _HOMES.values() for name in names]


if not TYPE_CHECKING:  # where a name that is not there should be an error

    def __getattr__(name: str) -> object:
        """Import what is public when it is first asked for."""
        for home, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(f"ggft.{home}"), name)
        raise AttributeError(f"module 'ggft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "OMP_WAIT_POLICY" not in os.environ:
    # GNU OpenMP threads spin for milliseconds at each node's end: then a busy machine makes no
    # progress: with other programs running, training was measured 5 times slower; a short spin
    # costs an idle machine 4%. Read when libgomp is loaded, so it stands before every import.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
