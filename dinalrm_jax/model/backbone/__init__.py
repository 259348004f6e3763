"""The backbone families. A new one is a file or folder here, and a line below."""

from dinalrm_jax.model.backbone import sd3
from dinalrm_jax.model.backbone.family import register

register(sd3.FAMILY)
