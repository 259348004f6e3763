"""AdamW with warmup, a schedule and clipping, from `OptimizerConfig`."""

import optax

from dinalrm_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate: linear warmup to the peak, then constant, or by cosine or line to zero at `steps`."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    elif config.schedule == "linear":
        after = optax.linear_schedule(config.learning_rate, 0.0, max(1, steps - config.warmup_steps))
    else:
        after = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - config.warmup_steps))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; weight decay on every parameter, as the released code has it."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate_schedule(config, steps), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay
        ),
    )
