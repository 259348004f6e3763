"""DiNa-LRM in JAX: a diffusion-native latent reward model (arXiv 2602.11146).

Names are imported when they are first used, so that what needs no JAX, a command's --help above all, does not wait.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinalrm_jax import alignment, noise, preference, sampling
    from dinalrm_jax.evaluation.scoring import normalize
    from dinalrm_jax.generator import Generator
    from dinalrm_jax.model.batch import PreferenceBatch, PromptEmbeds
    from dinalrm_jax.reward_model import RewardModel

__version__ = "0.1.0"

__all__ = [
    "Generator",
    "PreferenceBatch",
    "PromptEmbeds",
    "RewardModel",
    "__version__",
    "alignment",
    "noise",
    "normalize",
    "preference",
    "sampling",
]

_MODULES = {
    "Generator": "dinalrm_jax.generator",
    "PreferenceBatch": "dinalrm_jax.model.batch",
    "PromptEmbeds": "dinalrm_jax.model.batch",
    "RewardModel": "dinalrm_jax.reward_model",
    "normalize": "dinalrm_jax.evaluation.scoring",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    elif name in __all__:
        value = importlib.import_module(f"dinalrm_jax.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
