"""The trees of configuration: of training, and of alignment."""

from dinalrm_jax.config.align import (
    AlignConfig,
    DPOConfig,
    FlowGRPOConfig,
    JudgeConfig,
    LPOConfig,
    NFTConfig,
    PolicyEvaluationConfig,
    ReFLConfig,
    RewardConfig,
)
from dinalrm_jax.config.train import (
    EnsembleTermConfig,
    EvaluationConfig,
    OptimizerConfig,
    ProfileConfig,
    StageConfig,
    SweepConfig,
    TrainConfig,
)

__all__ = [
    "AlignConfig",
    "DPOConfig",
    "EnsembleTermConfig",
    "EvaluationConfig",
    "FlowGRPOConfig",
    "JudgeConfig",
    "LPOConfig",
    "NFTConfig",
    "OptimizerConfig",
    "PolicyEvaluationConfig",
    "ProfileConfig",
    "ReFLConfig",
    "RewardConfig",
    "StageConfig",
    "SweepConfig",
    "TrainConfig",
]
