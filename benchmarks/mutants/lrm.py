"""Mutants of LRM, of the pairs that it trains on, and of LPO."""

from benchmarks.mutants import Mutant

HEAD, LOSS, OBJECTIVE = "dinalrm_jax/model/lrm.py", "dinalrm_jax/preference.py", "dinalrm_jax/training/objectives.py"
AGREEMENT, LOADER, LPO = "dinalrm_jax/data/agreement.py", "dinalrm_jax/data/loader.py", "dinalrm_jax/alignment/lpo.py"
SAMPLING, REWARDS = "dinalrm_jax/sampling.py", "dinalrm_jax/alignment/rewards.py"
OF_HEAD, OF_PAIRS, OF_LPO = "tests/model/test_lrm.py", "tests/data/test_agreement.py", "tests/alignment/test_lpo.py"
OF_OBJECTIVE, OF_REPORTS = "tests/training/test_objectives.py -k labels", "tests/evaluation/test_pairs.py -k exchanged"

MUTANTS = [
    Mutant("features are enhanced the wrong way", HEAD, "guidance * (conditional - unconditional)",
           "guidance * (unconditional - conditional)", OF_HEAD),
    Mutant("every tap is enhanced", HEAD, "shallow, deepest = [tap[::2] for tap in pooled[:-1]], pooled[-1]",
           "shallow, deepest = [enhanced(tap[::2], tap[1::2], self.guidance) for tap in pooled[:-1]], pooled[-1]", OF_HEAD),
    Mutant("prompt and empty prompt change places", HEAD, "jnp.stack([given.astype(one.dtype), jnp.broadcast_to(one, given.shape)], axis=1)",
           "jnp.stack([jnp.broadcast_to(one, given.shape), given.astype(one.dtype)], axis=1)", OF_HEAD),
    Mutant("the scale is its logarithm", HEAD, "jnp.exp(self.log_scale[...])", "self.log_scale[...]", OF_HEAD),
    Mutant("a score without the image's norm", HEAD, "(unit(image) * unit(text))", "(image * unit(text))", OF_HEAD),
    Mutant("a tie costs log 2", LOSS, "jnp.where(label == 0.5, jnp.log(2.0), 0.0)", "0.0", OF_HEAD),
    Mutant("weights that grow with a prompt's pairs", LOSS, "inverse = 1 / counts", "inverse = 1.0 * counts", OF_HEAD),
    Mutant("labels are not read", OBJECTIVE, "preference.pair_loss(chosen, rejected, levels, loss, batch.certainty), batch), metrics",
           "preference.pair_loss(chosen, rejected, levels, loss), batch), metrics", OF_OBJECTIVE),
    Mutant("the ensemble's loss has no weights", OBJECTIVE, "together = _weighed(preference.pair_loss(chosen, rejected, levels, loss, batch.certainty), batch)",
           "together = preference.pair_loss(chosen, rejected, levels, loss, batch.certainty)", OF_OBJECTIVE),
    Mutant("weights are of another place", LOADER, "prompt_weights(self.counts[batch])[self.rows[place]]",
           "prompt_weights(self.counts[batch])[place]", OF_PAIRS),
    Mutant("records forget ties", "dinalrm_jax/data/preparation.py", 'row.kind, row.label)', 'row.kind)', OF_PAIRS),
    Mutant("ties are kept by sign", "dinalrm_jax/data/config.py", "return abs(gap) < self.tie if tied", "return gap < self.tie if tied", OF_PAIRS),
    Mutant("rules let the equal pass", "dinalrm_jax/data/config.py", "else gap > self.win", "else gap >= self.win", OF_PAIRS),
    Mutant("scores are joined by image alone", AGREEMENT, 'key = row.get("prompt") or None, _within', "key = None, _within", OF_PAIRS),
    Mutant("held-out ties stay", AGREEMENT, 'keeps_ties = ties and split == "train"', "keeps_ties = ties", OF_PAIRS),
    Mutant("prompts are exchanged with themselves", "dinalrm_jax/evaluation/controls.py", "(place + len(distinct) // 2) % len(distinct)", "place", OF_REPORTS),
    Mutant("ddim's noise is too large", SAMPLING, "std = a * following *", "std = a *", "tests/test_sampling.py -k ddim"),
    Mutant("ddim's coefficient comes from its deviation", SAMPLING, "rest = following * jnp.sqrt(1 - a**2 * (1 - share))",
           "rest = jnp.sqrt(following**2 - std**2)", "tests/test_sampling.py -k ddim"),
    Mutant("LPO goes on from the best", LPO, "return found[places, chosen], (*pair", "return found[places, best], (*pair", OF_LPO),
    Mutant("outcomes are scored at the level before", LPO, 'config.scored_at == "next")]', 'config.scored_at == "current")]', OF_LPO),
    Mutant("a jump along the step before", LPO, "reached = jnp.repeat(sigmas[step + 1]", "reached = jnp.repeat(sigmas[step]", OF_LPO),
    Mutant("every step's jumps have one noise", LPO, "own = jax.vmap(jax.random.fold_in, (0, None))(reward_keys, step)", "own = reward_keys", OF_LPO),
    Mutant("clean outcomes are as sure as noisy ones", LPO, "level = jnp.sqrt(jnp.mean(jnp.square(jnp.asarray(reward.sigma))))", "level = sigmas[step + 1]", OF_LPO),
    Mutant("clean outcomes train at no level", "dinalrm_jax/config/align.py", 'if self.lpo.scored_at != "clean":', "if True:", OF_LPO),
    Mutant("losers are the worst kept", LPO, "best, worst = scores.argmax(axis=1), scores.argmin(axis=1)",
           "worst, best = scores.argmax(axis=1), scores.argmin(axis=1)", OF_LPO),
    Mutant("pairs that are not kept are learned", LPO, "(*pairs, kept.astype(jnp.float32))", "(*pairs, jnp.ones(kept.shape))", OF_LPO),
    Mutant("kept pairs stand last", LPO, "jnp.argsort(order - kept, axis=1)", "jnp.argsort(order + kept, axis=1)", OF_LPO),
    Mutant("an update's pairs count by trajectory", LPO, "(trajectories / jnp.maximum(pairs, 1))[part][:, None]", "1.0", OF_LPO),
    Mutant("winners are pushed down", LPO, "return -jax.nn.log_sigmoid(beta * (winner - loser))", "return -jax.nn.log_sigmoid(beta * (loser - winner))",
           OF_LPO),
    Mutant("a likelihood that is not the model's", REWARDS, 'self.model.likelihood or LossConfig("bradley_terry")', 'LossConfig("bradley_terry")', OF_LPO),
    Mutant("a NaN at one step is a pair less", LPO, 'jnp.where(finite.all(axis=1), raw["reward"], jnp.nan)', 'raw["reward"]', OF_LPO),
    Mutant("scalars become vectors on disk", "dinalrm_jax/weights/files.py", 'np.asarray(tensor, order="C")', "np.ascontiguousarray(tensor)", OF_HEAD),
]  # fmt: skip
