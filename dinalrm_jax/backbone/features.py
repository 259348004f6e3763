"""The contract between a backbone and the reward head."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """What the head sees of a backbone.

    Attributes:
        temb: (B, D) conditioning: embedded noise level plus pooled text.
        visual: one (B, Nv, D) array per visual tap, shallow to deep.
        text: one (B, Nt, D) array per text tap; empty for a head without text.
    """

    temb: jax.Array
    visual: tuple[jax.Array, ...]
    text: tuple[jax.Array, ...]
