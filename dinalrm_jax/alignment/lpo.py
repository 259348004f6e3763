"""LPO (arXiv 2502.01051): outcomes of one sampling step are compared by a reward, noisy or not; docs/lrm_lpo.md."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from dinalrm_jax import sampling
from dinalrm_jax.alignment.policy import Policy, PromptBatch, like, norm_ratio, row_randomness
from dinalrm_jax.alignment.rewards import BROKEN, LatentReward, Rewards
from dinalrm_jax.config import LPOConfig
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.noise import AnyArray, draw_noise
from dinalrm_jax.training.objectives import Objective, sigma_bins
from dinalrm_jax.training.step import Collection


def lpo_threshold(stds: Float[AnyArray, " steps"], low: float, high: float) -> Float[Array, " steps"]:
    """What a pair's probabilities must differ by: `low` at the step of least noise, `high` at that of most, affine.

    Where all steps have the same noise, up to rounding, it is `low` everywhere.
    """
    stds = jnp.asarray(stds)
    span = stds.max() - stds.min()
    even = span <= 1e-4 * stds.max()
    return low + jnp.where(even, 0.0, (stds - stds.min()) / jnp.where(even, 1.0, span)) * (high - low)


def lpo_pairs(
    scores: Float[AnyArray, "k b"], threshold: Float[AnyArray, " b"]
) -> tuple[Int[Array, " b"], Int[Array, " b"], Bool[Array, " b"]]:
    """The best and the worst of K candidates, and whether they differ enough to be a pair.

    Args:
        scores: (K, B), of Bradley and Terry's likelihood.
        threshold: (B,) of the difference of the two's softmax, `tanh((best - worst) / 2)`.

    Returns:
        (winner, loser, kept): (B,) indices of candidates, and booleans.
    """
    scores = jnp.asarray(scores)
    gap = jnp.tanh((scores.max(axis=0) - scores.min(axis=0)) / 2)
    return scores.argmax(axis=0), scores.argmin(axis=0), gap > jnp.asarray(threshold)


def lpo_loss(
    log_ratio_winner: Float[AnyArray, " b"],
    log_ratio_loser: Float[AnyArray, " b"],
    beta: float = 500.0,
    epsilon: float = 0.1,
) -> Float[Array, ""]:
    """`-log sigmoid(beta (log r_winner - log r_loser))`, ratios clipped to `1 +- epsilon` each; a mean.

    Args:
        log_ratio_winner, log_ratio_loser: (B,) log-probabilities of the step under the policy less those under the
            reference. One beyond the clip has no gradient.
    """
    return lpo_losses(log_ratio_winner, log_ratio_loser, beta, epsilon).mean()


def lpo_losses(log_ratio_winner: AnyArray, log_ratio_loser: AnyArray, beta: float, epsilon: float) -> jax.Array:
    """(B,) of `lpo_loss`. The logarithm is clipped, as a ratio far off would overflow."""
    least, most = math.log(1 - epsilon), math.log(1 + epsilon)
    winner, loser = (jnp.clip(jnp.asarray(ratio), least, most) for ratio in (log_ratio_winner, log_ratio_loser))
    return -jax.nn.log_sigmoid(beta * (winner - loser))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepPairs:
    """What LPO learns from: B trajectories, n pairs of each; a place may hold none.

    Attributes:
        batch: the prompts.
        step: (B, n) which of the sampler's steps a pair is of.
        latents: (B, n, H, W, C) before the step.
        winner, loser: (B, n, H, W, C) two of its outcomes.
        weight: (B, n) of a pair in the loss of its update, 0 where there is none; a mean over rows of sums over pairs
            is the mean over the update's pairs.
        metrics: (B, ..) logged.
    """

    batch: PromptBatch
    step: jax.Array
    latents: jax.Array
    winner: jax.Array
    loser: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


def lpo(policy: Policy, rewards: Rewards, config: LPOConfig) -> tuple[Collection, Objective[StepPairs]]:
    """Pairs of outcomes of single steps, and the clipped loss of their log-ratios against the reference.

    At every step but the last, which has no noise, `candidates` outcomes are drawn of one state and scored as they
    are, noisy, or by their jumps to clean latents. The reward's own likelihood says how sure it is that the best one
    beats the worst: a pair is kept where twice that probability less 1 exceeds the step's threshold. The trajectory
    goes on from any of the candidates.

    A row is a trajectory, `config.pairs` of whose pairs, kept ones first, are learned from: the shapes do not depend on
    how many were kept.
    """
    reward = rewards.members["reward"][0]
    assert isinstance(reward, LatentReward)  # the config says so
    sigmas = jnp.asarray(policy.schedule(config.steps))
    noisy_steps = config.steps - 1
    unit = jnp.zeros((noisy_steps, 1))
    stds = sampling.transition(config.kind, unit, unit, sigmas[:-2], sigmas[1:-1], config.noise_level, sigmas[1]).std
    thresholds = lpo_threshold(stds, *config.threshold)

    def outcome(x: jax.Array, velocity: jax.Array, step: jax.Array) -> sampling.Transition:
        """Of the steps (B,)."""
        sigma, following = sigmas[step], sigmas[step + 1]
        return sampling.transition(config.kind, x, velocity, sigma, following, config.noise_level, sigmas[1])

    def rows(params: Params, batch: PromptBatch, keys: jax.Array) -> StepPairs:
        noise_keys, step_keys, pick_keys, reward_keys = row_randomness(keys, 4)
        guided = sampling.guided(policy.velocity(params), batch.prompt, batch.negative, config.guidance)
        count = config.candidates
        repeated = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), batch)
        places = jnp.arange(len(keys))

        def scored(outcomes: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Scores of outcomes (B K, H, W, C) of one step, and the level that the reward is told."""
            if config.scored_at != "clean":
                level = sigmas[step + (config.scored_at == "next")]
                return reward.at_level(params, outcomes, repeated, jnp.repeat(level, len(outcomes))), level
            reached = jnp.repeat(sigmas[step + 1], len(outcomes))
            onward = sampling.guided(policy.velocity(params), repeated.prompt, repeated.negative, config.guidance)
            jumped = sampling.clean(outcomes, onward(outcomes, reached), reached)
            # One noise for a state's outcomes: what differs is what they show.
            own = jax.vmap(jax.random.fold_in, (0, None))(reward_keys, step)
            level = jnp.sqrt(jnp.mean(jnp.square(jnp.asarray(reward.sigma))))  # whose variance is the levels' mean
            return reward(params, jumped, repeated, jnp.repeat(own, count)), level

        def advance(x: jax.Array, step: jax.Array):
            here = jnp.full(len(keys), step)
            t = outcome(x, guided(x, sigmas[here]), here)
            z_keys, next_keys = row_randomness(jax.vmap(jax.random.fold_in, (0, None))(step_keys, step), 2)
            z = jax.vmap(lambda key: jax.random.normal(key, (count, *policy.shape)))(z_keys)
            found = t.mean[:, None] + like(t.std, z) * z  # (B, K, H, W, C)
            scores, level = scored(found.reshape(-1, *policy.shape), step)
            scores = scores.reshape(-1, count)
            best, worst = scores.argmax(axis=1), scores.argmin(axis=1)
            sure = 2 * reward.preferred(scores[places, best], scores[places, worst], level) - 1
            chosen = jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(next_keys)
            pair = here, x, found[places, best], found[places, worst], sure > thresholds[here]
            return found[places, chosen], (*pair, jnp.isfinite(scores).all(axis=1))

        start = draw_noise(noise_keys, (len(keys), *policy.shape))
        x, pairs = jax.lax.scan(advance, start, jnp.arange(noisy_steps))
        *pairs, kept, finite = jax.tree.map(lambda array: array.swapaxes(0, 1), pairs)
        last = jnp.full(len(keys), sigmas[-2])
        clean = sampling.clean(x, guided(x, last), last)
        raw = rewards(params, clean, batch, reward_keys)
        raw |= {"reward": jnp.where(finite.all(axis=1), raw["reward"], jnp.nan)}

        # Kept pairs first, in any order.
        order = jax.vmap(lambda key: jax.random.uniform(key, (noisy_steps,)))(pick_keys)
        taken = jnp.argsort(order - kept, axis=1)[:, : config.pairs]
        step, latents, winner, loser, weight = jax.tree.map(
            lambda array: jax.vmap(lambda row, places: row[places])(array, taken), (*pairs, kept.astype(jnp.float32))
        )
        in_bin = sigma_bins(sigmas[:-2] if config.scored_at == "current" else sigmas[1:-1])
        metrics = rewards.metrics(raw, batch) | {
            "kept": kept.mean(axis=1),
            "share_by_sigma": jnp.broadcast_to(in_bin.mean(axis=0), (len(keys), in_bin.shape[1])),
            "kept_by_sigma": (kept[..., None] * in_bin).mean(axis=1),
        }
        return StepPairs(batch, step, latents, winner, loser, weight, metrics)

    def together(found: StepPairs) -> StepPairs:
        part = jnp.arange(len(found.weight)) % config.updates  # as `training.step` cuts rows into updates
        pairs = jax.ops.segment_sum(found.weight.sum(axis=1), part, config.updates)
        trajectories = len(part) // config.updates
        if "data" in jax.sharding.get_abstract_mesh().manual_axes:
            pairs = jax.lax.psum(pairs, "data")
            trajectories *= jax.lax.axis_size("data")
        weight = found.weight * (trajectories / jnp.maximum(pairs, 1))[part][:, None]
        return dataclasses.replace(found, weight=weight)

    def objective(params: Params, found: StepPairs, keys: jax.Array):
        batch = found.batch
        guided = sampling.guided(policy.velocity(params), batch.prompt, batch.negative, config.guidance)
        reference_of = sampling.guided(policy.reference(params), batch.prompt, batch.negative, config.guidance)

        def of_pair(pair):
            step, x, winner, loser, weight = pair
            velocity, reference = guided(x, sigmas[step]), reference_of(x, sigmas[step])
            t, wanted = outcome(x, velocity, step), outcome(x, reference, step)
            ratios = [sampling.log_ratio(config.kind, t, wanted.mean, after) for after in (winner, loser)]
            loss = lpo_losses(*ratios, config.beta, config.epsilon)
            beyond = jnp.stack([jnp.abs(jnp.expm1(ratio)) > config.epsilon for ratio in ratios]).mean(axis=0)
            of_kept = loss, (ratios[0] > ratios[1]).astype(jnp.float32), beyond
            return jax.tree.map(lambda values: weight * values, of_kept), norm_ratio(velocity, reference)

        pairs = jax.tree.map(
            lambda x: x.swapaxes(0, 1), (found.step, found.latents, found.winner, found.loser, found.weight)
        )
        # A pair's forward pass is computed again for its gradient: that of all pairs at once would be kept otherwise.
        (loss, accuracy, clipped), ratio = jax.lax.map(jax.checkpoint(of_pair), pairs)
        metrics = found.metrics | {
            "accuracy": accuracy.sum(axis=0),
            "clipped": clipped.sum(axis=0),
            "velocity_ratio": ratio.mean(axis=0),
        }
        return jnp.where(found.metrics[BROKEN] > 0, jnp.nan, loss.sum(axis=0)), metrics

    return Collection(rows, together, config.updates), objective
