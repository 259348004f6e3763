"""Mutants of the method's formulas: noise, losses, head, adapters."""

from benchmarks.mutants import Mutant

LOSSES, NOISE, HEAD = "tests/test_preference.py", "tests/test_noise.py", "tests/model/test_head.py"
GOLDEN = "tests/test_golden.py -k"
PREFERENCE, LEVELS = "dinalrm_jax/preference.py", "dinalrm_jax/noise.py"
HEAD_FILE, MODEL = "dinalrm_jax/model/head.py", "dinalrm_jax/model/reward.py"

MUTANTS = [
    Mutant("the variance ignores k", PREFERENCE, "return k * jnp.square", "return jnp.square", LOSSES),
    Mutant("the variance ignores sigma_0", PREFERENCE, "jnp.float32)) + sigma_0**2", "jnp.float32))", LOSSES),
    Mutant("one image's variance instead of two", PREFERENCE, "jnp.sqrt(2 * jnp", "jnp.sqrt(jnp", LOSSES),
    Mutant(
        "the margin's sign",
        PREFERENCE,
        "difference = jnp.asarray(chosen, jnp.float32) - jnp.asarray(rejected, jnp.float32)",
        "difference = jnp.asarray(rejected, jnp.float32) - jnp.asarray(chosen, jnp.float32)",
        LOSSES,
    ),
    Mutant("fidelity without its root", PREFERENCE, "jnp.exp(0.5 * log_ndtr(z))", "jnp.exp(log_ndtr(z))", LOSSES),
    Mutant(
        "Bradley and Terry's margin is added",
        PREFERENCE,
        "jax.nn.softplus(margin - (",
        "jax.nn.softplus(-margin - (",
        f"{GOLDEN} released_losses",
    ),
    Mutant("a constant variance is calibrated", PREFERENCE, 'config.variance == "constant"', "False", LOSSES),
    Mutant("an ensemble's variance is its first level's", PREFERENCE, "variance.mean(axis=0)", "variance[0]",
           "tests/training/test_objectives.py -k ensemble"),
    Mutant("the likelihood's probability ignores its name", PREFERENCE, 'if config.name == "bradley_terry":\n        return jax.nn.sigmoid',
           "if False:\n        return jax.nn.sigmoid", LOSSES),
    Mutant("noise and latents change places", LEVELS, "(1 - sigma) * latents + sigma * noise",
           "sigma * latents + (1 - sigma) * noise", NOISE),
    Mutant("the timestep is sigma", LEVELS, "return 1000.0 * jnp", "return jnp", NOISE),
    Mutant("power draws uniform levels", LEVELS, "jax.random.uniform(key, shape) ** exponent",
           "jax.random.uniform(key, shape)", NOISE),
    Mutant("the logit's mean is dropped", LEVELS, "jax.nn.sigmoid(mean + std", "jax.nn.sigmoid(std", NOISE),
    Mutant("levels out of the schedule's order", LEVELS, "jnp.arange(num_train_timesteps, 0, -1",
           "jnp.arange(num_train_timesteps - 1, -1, -1", NOISE),
    Mutant("values are not gated", HEAD_FILE, "weights = weights * gates", "weights = weights + 0 * gates",
           f"{GOLDEN} level_per_row"),
    Mutant("FiLM scales by gamma alone", HEAD_FILE, "hidden * (1 + gamma)", "hidden * gamma", HEAD),
    Mutant("no layer embedding", HEAD_FILE, "self.layer_embed[...]))", "0 * self.layer_embed[...]))", HEAD),
    Mutant("text is not attended to", HEAD_FILE, "if text is not None:\n            attended", "if False:\n            attended", HEAD),
    Mutant("no scale of the head's logits", HEAD_FILE, "* dim**-0.5", "* 1.0", HEAD),
    Mutant("the value's bias is dropped", HEAD_FILE, "[..., None] * bias", "[..., None] * 0 * bias", HEAD),
    Mutant("the second attention is left out", HEAD_FILE, "queries = self.attn2(queries, image)\n",
           "queries = queries + 0 * self.attn2(queries, image)\n", HEAD),
    Mutant("the sum of the queries' scores", HEAD_FILE, "[..., 0].mean(axis=-1)", "[..., 0].sum(axis=-1)", HEAD),
    Mutant("the head's GELU is the backbone's", HEAD_FILE, "approximate=False", "approximate=True", HEAD),
    Mutant("all single levels are scored at 0.4", MODEL, "self(latents, prompt, jnp.broadcast_to(levels, latents.shape[0]), eps)",
           "self(latents, prompt, jnp.broadcast_to(0.4 + 0 * levels, latents.shape[0]), eps)", f"{GOLDEN} ensemble"),
    Mutant("the ensemble has one level's tokens", MODEL, "self.head.score(_join_levels(image), None if",
           "self.head.score(image[0], None if", f"{GOLDEN} ensemble"),
    Mutant("the logistic's steepness is fixed", MODEL, "jnp.abs(self.eta4[...])", "0.15", "tests/test_reward_model.py -k logistic"),
    Mutant("adapters without their scale", "dinalrm_jax/model/layers.py", "y += self.lora_scale * _project",
           "y += _project", f"{GOLDEN} level_per_row"),
    Mutant("merging forgets the scale", "dinalrm_jax/model/lora.py", "+ scale * update", "+ update", f"{GOLDEN} merged"),
    Mutant("queries and keys are not normed", "dinalrm_jax/model/backbone/mmdit.py", "return x if norm is None else norm(x)",
           "return x", f"{GOLDEN} taps"),
    Mutant("taps are those of one block before", "dinalrm_jax/model/backbone/sd3/transformer.py",
           "visual[stop], textual[stop] = image, text", "visual[stop], textual[stop] = visual[start], textual[start]",
           f"{GOLDEN} taps"),
    Mutant("patches are put together transposed", "dinalrm_jax/model/backbone/sd3/transformer.py", "patches.transpose(0, 1, 3, 2, 4, 5)",
           "patches.transpose(0, 1, 4, 2, 3, 5)", f"{GOLDEN} velocity"),
]  # fmt: skip
