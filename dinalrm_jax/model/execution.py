"""How a model is computed, apart from what it is."""

import dataclasses
from typing import Literal

from dinalrm_jax.mapping import check_types

Dtype = Literal["float32", "bfloat16"]
DtypeOrAuto = Literal["auto", "float32", "bfloat16"]  # "auto": float32 on CPUs, bfloat16 elsewhere
Weights = Literal["auto", "float32", "bfloat16", "int8"]  # "int8": frozen matrices; the rest, and products, are "auto"
AttentionImplementation = Literal["auto", "xla", "grouped", "chunked", "splash", "cudnn"]
Layers = Literal["loop", "scan"]
Remat = Literal["none", "dots", "block", "attention"]


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How the same numbers are computed. None of these changes what a checkpoint means.

    dtype: compute dtype; frozen weights are stored in it, trainable ones in float32.
    attention: see `backbone.attention.attend`.
    layers: "loop" unrolls the blocks (fastest on CPU); "scan" stacks each run of equal blocks
        between taps and scans over it (compiles several times quicker, for GPU and TPU).
    remat: what a block keeps for its backward pass: everything ("none"), matrix products ("dots"), its inputs and
        what its attention gives ("attention"; both not on CPUs, whose compiler keeps everything then) or only its
        inputs ("block").
    """

    dtype: Dtype = "float32"
    attention: AttentionImplementation = "auto"
    layers: Layers = "loop"
    remat: Remat = "none"

    def __post_init__(self):
        check_types(self)
