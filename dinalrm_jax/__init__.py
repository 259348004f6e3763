"""DiNa-LRM in JAX: a diffusion-native latent reward model (arXiv 2602.11146)."""

from dinalrm_jax import noise, preference
from dinalrm_jax.model.batch import PreferenceBatch, PromptEmbeds
from dinalrm_jax.reward_model import RewardModel, normalize

__version__ = "0.1.0"

__all__ = ["PreferenceBatch", "PromptEmbeds", "RewardModel", "__version__", "noise", "normalize", "preference"]
