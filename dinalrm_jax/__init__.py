"""DiNa-LRM in JAX: a diffusion-native latent reward model (arXiv 2602.11146)."""

from dinalrm_jax import noise, preference
from dinalrm_jax.data.batch import PreferenceBatch, PromptEmbeds
from dinalrm_jax.reward_model import RewardModel, normalize
from dinalrm_jax.version import __version__

__all__ = ["PreferenceBatch", "PromptEmbeds", "RewardModel", "__version__", "noise", "normalize", "preference"]
