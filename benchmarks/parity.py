"""How closely this agrees with the released PyTorch code: the largest differences on the golden model.

    python -m benchmarks.parity

The golden model (tests/golden/released-tiny) is a tiny random one in the released layout with the
released code's own outputs. Errors are absolute for scores, taps and velocity, and relative to the
largest entry for gradients. The last lines compare bfloat16 compute with float32, and a row's score in
batches of different size.
"""

import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import dinalrm_jax as dina
from dinalrm_jax import noise
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.preference import LossConfig, pair_loss
from dinalrm_jax.weights.pretrained import load_backbone

GOLDEN = pathlib.Path(__file__).parent.parent / "tests" / "golden" / "released-tiny"
RELEASED_LOSS = LossConfig(sigma_0=0.05**0.5, epsilon=1e-6)


def deviations() -> Iterator[tuple[str, float]]:
    """What is compared, and the largest difference; with a matmul precision of "highest", without which GPUs round."""
    cases = dict(np.load(GOLDEN / "cases.npz"))
    latents, rejected, eps, velocity, grad_latents = (
        jnp.asarray(cases[name].transpose(0, 2, 3, 1))
        for name in ("latents_chosen", "latents_rejected", "noise", "velocity_base", "grad_latents")
    )
    sigma = jnp.asarray(cases["sigma"])
    prompt = dina.PromptEmbeds(*(jnp.asarray(cases[name]) for name in ("encoder_hidden_states", "pooled_projections")))
    model = dina.RewardModel.from_pretrained(GOLDEN, GOLDEN, dtype="float32")
    module = reward_functional(model.config, model.execution)
    bound = module.bind(model.params)

    features = jax.jit(bound.features)(latents, prompt, sigma, eps)
    score = jax.jit(bound)
    taps = [(features.visual[i], cases[f"visual_{tap}"]) for i, tap in enumerate((1, 3, 5))]
    taps += [(features.text[i], cases[f"text_{tap}"]) for i, tap in enumerate((1, 3, 5))]
    yield ("temb and taps", max(error(ours, theirs) for ours, theirs in [*taps, (features.temb, cases["temb"])]))
    scores = [(score(latents, prompt, sigma, eps), cases["score_chosen"][:, 0])]
    scores += [(score(rejected, prompt, sigma, eps), cases["score_reject"][:, 0])]
    yield ("scores", max(error(ours, theirs) for ours, theirs in scores))
    levels = cases["ensemble_sigmas"].tolist()
    yield ("ensemble", error(model.score_latents(latents, prompt, levels, eps), cases["score_ensemble"][:, 0]))
    config, params = load_backbone(GOLDEN)
    noisy = noise.add_noise(latents, sigma, eps)
    whole = transformer_functional(config, model.execution).bind(params)
    yield (
        "velocity of the whole transformer",
        error(jax.jit(whole.velocity)(noisy, noise.timestep(sigma), prompt), velocity),
    )
    gradient = jax.jit(jax.grad(lambda x: bound(x, prompt, sigma, eps).sum()))(latents)
    yield ("gradient in latents (relative)", relative(gradient, grad_latents))

    def loss(trainable):
        at = module.bind({**model.params, **trainable})
        return pair_loss(at(latents, prompt, sigma, eps), at(rejected, prompt, sigma, eps), sigma, RELEASED_LOSS).mean()

    gradients = jax.jit(jax.grad(loss))({name: array for name, array in model.params.items() if is_trainable(name)})
    errors = []
    for key in cases:
        ours = key.removeprefix("grad:").replace("backbone.base_model.model.", "backbone.")
        ours = ours.replace(".default.weight", "").replace("reward_head.", "head.")
        if key.startswith("grad:"):
            errors.append(relative(gradients[ours], cases[key]))
    yield (f"gradients in {len(errors)} LoRA and head weights (relative)", max(errors))

    half = dina.RewardModel.from_pretrained(GOLDEN, GOLDEN, dtype="bfloat16")
    both = jnp.concatenate([latents, rejected]), jax.tree.map(lambda x: jnp.concatenate([x, x]), prompt)
    for level in (0.4, (0.2, 0.5, 0.7)):
        exact, rounded = (m.score_latents(*both, level) for m in (model, half))
        yield (
            f"bfloat16 against float32, sigma {level}, scores {exact.min():.2f} to {exact.max():.2f}",
            error(exact, rounded),
        )

    rows = len(both[0])
    for name, m in (("float32", model), ("bfloat16", half)):
        together = m.score_latents(*both, 0.4)
        parts = [m.score_latents(both[0][r : r + n], both[1][r : r + n], 0.4)[0] for r in range(rows) for n in (1, 2)]
        yield (
            f"a row alone and first of two against the row in a batch of {rows}, {name}",
            error(parts, np.repeat(together, 2)),
        )


def error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())


def relative(ours, theirs) -> float:
    return error(ours, theirs) / float(np.abs(theirs).max())


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, float32, matmul precision highest")
    for name, value in deviations():
        print(f"  {value:.1e}  {name}", flush=True)


if __name__ == "__main__":
    main()
