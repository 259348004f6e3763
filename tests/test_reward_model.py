import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dinalrm_jax as dina
from dinalrm_jax.model.backbone.remat import _gradient_written, rematerialised
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.reward import chosen_dtype, jitted_score, reward_functional, store
from tests.conftest import GOLDEN, TINY, TINY_SD3, random_inputs


@pytest.fixture(scope="module")
def inputs():
    return random_inputs(TINY_SD3, batch=4)


def test_same_seed_same_score_whatever_the_batch(tiny_model, inputs):
    latents, _, prompt = inputs
    together = tiny_model.score_latents(latents, prompt, sigma=0.5, seed=7)
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(
        tiny_model.score_latents(latents[order], prompt[np.array(order)], 0.5, seed=7), together[order], atol=1e-5
    )
    alone = [tiny_model.score_latents(latents[i : i + 1], prompt[i : i + 1], 0.5, seed=7)[0] for i in range(4)]
    np.testing.assert_allclose(alone, together, atol=1e-5)
    assert np.abs(tiny_model.score_latents(latents, prompt, 0.5, seed=8) - together).max() > 1e-3


def test_clean_level_ignores_noise_and_levels_differ(tiny_model, inputs):
    latents, eps, prompt = inputs
    clean = tiny_model.score_latents(latents, prompt, 0.0, noise=eps)
    np.testing.assert_allclose(tiny_model.score_latents(latents, prompt, 0.0, noise=10 * eps), clean, atol=1e-5)
    assert np.abs(tiny_model.score_latents(latents, prompt, 0.4, noise=eps) - clean).max() > 1e-3
    # An ensemble of one level is that level.
    one = tiny_model.score_latents(latents, prompt, (0.4,), noise=eps)
    np.testing.assert_allclose(one, tiny_model.score_latents(latents, prompt, 0.4, noise=eps), atol=1e-5)


@pytest.mark.parametrize("sigma", [0.4, (0.2, 0.5, 0.7)])
def test_reward_fn_composes(tiny_model, inputs, sigma):
    latents, eps, prompt = inputs
    reward = tiny_model.reward_fn(sigma)
    key = jax.random.key(0)
    expected = tiny_model.score_latents(latents, prompt, sigma, seed=0)
    jitted = jax.jit(reward)
    np.testing.assert_allclose(jitted(tiny_model.params, latents, prompt, key), expected, atol=1e-5)
    given = jitted(tiny_model.params, latents, prompt, key, noise=eps)
    np.testing.assert_allclose(given, tiny_model.score_latents(latents, prompt, sigma, eps), atol=1e-5)

    # vmap over candidates for the same prompts
    candidates = jnp.stack([latents, 0.5 * latents])
    mapped = jax.jit(jax.vmap(lambda x: reward(tiny_model.params, x, prompt, key)))(candidates)
    np.testing.assert_allclose(mapped[0], expected, atol=1e-5)

    # The gradient says what a small step does, in latents and in parameters.
    def total(params, x):
        return reward(params, x, prompt, key).sum()

    by_params, by_latents = jax.jit(jax.grad(total, argnums=(0, 1)))(tiny_model.params, jnp.asarray(latents))
    direction = np.random.default_rng(0).standard_normal(latents.shape).astype(np.float32)
    step = 1e-2
    ahead, behind = (jitted(tiny_model.params, latents + s * direction, prompt, key).sum() for s in (step, -step))
    difference = ahead - behind
    # Central differences in float32 at this step carry about a per cent of rounding and curvature.
    assert float(difference) / (2 * step) == pytest.approx(float(jnp.vdot(by_latents, direction)), rel=0.05)
    assert by_params.keys() == tiny_model.params.keys()
    assert float(jnp.abs(by_params["backbone.transformer_blocks.0.attn.to_q.lora_A"]).max()) > 0


@pytest.mark.parametrize("attention", ["auto", "xla"])
def test_a_gradient_has_a_forward_mode_and_the_function_on_a_cpu_has_none(tiny_model, inputs, attention):
    latents, _, prompt = inputs
    latents = jnp.asarray(latents)
    reward = dataclasses.replace(tiny_model, execution=ExecutionConfig(attention=attention)).reward_fn(0.4)

    def total(x):
        return reward(tiny_model.params, x, prompt, jax.random.key(0)).sum()

    direction = jnp.asarray(np.random.default_rng(0).standard_normal(latents.shape), jnp.float32)
    gradient = jax.jit(jax.grad(total))
    _, along = jax.jvp(gradient, (latents,), (direction,))
    difference = (gradient(latents + 1e-2 * direction) - gradient(latents - 1e-2 * direction)) / 2e-2
    # As above: about half a per cent of rounding and curvature.
    assert float(jnp.linalg.norm(along - difference)) < 0.02 * float(jnp.linalg.norm(difference))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(total, (latents,), (direction,))


def test_keys_per_row_draw_noise_per_row(tiny_model, inputs):
    latents, _, prompt = inputs
    reward = jax.jit(tiny_model.reward_fn(0.5))
    keys = jax.random.split(jax.random.key(1), 4)
    rows = reward(tiny_model.params, latents, prompt, keys)
    for i in range(4):
        one = reward(tiny_model.params, latents[i : i + 1], prompt[i : i + 1], keys[i])
        np.testing.assert_allclose(rows[i], one[0], atol=1e-5)
    old_style = reward(tiny_model.params, latents, prompt, jax.random.PRNGKey(5))
    np.testing.assert_allclose(old_style, reward(tiny_model.params, latents, prompt, jax.random.key(5)), atol=1e-6)


def test_reward_is_the_same_on_a_sharded_batch(tiny_model, inputs):
    latents, eps, prompt = inputs
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.device_put((jnp.asarray(latents), prompt, jnp.asarray(eps)), rows)
    params = jax.device_put(tiny_model.params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    scores = jax.jit(tiny_model.reward_fn(0.4))(params, sharded[0], sharded[1], jax.random.key(0), noise=sharded[2])
    assert len(scores.sharding.device_set) == 4
    np.testing.assert_allclose(scores, tiny_model.score_latents(latents, prompt, 0.4, eps), atol=1e-5)


def test_reward_under_shard_map(tiny_model, inputs):
    """Each device scores its own rows; one key gives every row the same noise, wherever it lies."""
    latents, _, prompt = inputs
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        tiny_model.reward_fn(0.4), mesh=mesh, in_specs=(whole, rows, rows, whole), out_specs=rows, check_vma=False
    )
    scores = jax.jit(mapped)(tiny_model.params, jnp.asarray(latents), prompt, jax.random.key(0))
    np.testing.assert_allclose(scores, tiny_model.score_latents(latents, prompt, 0.4, seed=0), atol=1e-5)


def test_bfloat16_keeps_the_order(golden_model, cases, golden_prompt):
    """Scores well apart keep their order; the deviation itself is measured in docs/measured.md."""
    assert dina.RewardModel.from_pretrained(GOLDEN, GOLDEN).execution.dtype == "float32"  # on this CPU
    assert (chosen_dtype("auto", half_arrays := {"weight": jnp.zeros(1, "bfloat16")}), chosen_dtype("auto")) == (
        "bfloat16", "float32",
    )  # fmt: skip
    assert chosen_dtype("float32", half_arrays) == "float32"
    half = dina.RewardModel.from_pretrained(GOLDEN, GOLDEN, dtype="bfloat16")
    assert half.params["backbone.context_embedder.weight"].dtype == jnp.bfloat16
    assert half.params["head.head.weight"].dtype == jnp.float32
    latents = np.concatenate([cases["latents_chosen"], cases["latents_rejected"]])
    prompt = jax.tree.map(lambda x: jnp.concatenate([x, x]), golden_prompt)
    exact, rounded = (model.score_latents(latents, prompt, 0.4) for model in (golden_model, half))
    assert np.abs(exact - rounded).max() < 0.1
    apart = exact[:, None] - exact[None] > 0.5
    assert apart.sum() >= 4
    assert (rounded[:, None] > rounded[None])[apart].all()


def test_logistic_squash():
    config = dataclasses.replace(TINY, logistic=True)
    model = dina.RewardModel.init(config)
    plain = dina.RewardModel(TINY, {k: v for k, v in model.params.items() if not k.startswith("eta")})
    latents, eps, prompt = random_inputs(TINY_SD3)
    raw = plain.score_latents(latents, prompt, 0.4, eps)
    # e1 = 2, e2 = -2, e3 = 0, e4 = 0.15 (docs/method.md, Head)
    expected = 4 / (1 + np.exp(-raw / (0.15 + 1e-6))) - 2
    np.testing.assert_allclose(model.score_latents(latents, prompt, 0.4, eps), expected, atol=1e-5)
    learned = dina.RewardModel(config, {**model.params, "eta3": jnp.array(0.2), "eta4": jnp.array(-0.4)})
    expected = 4 / (1 + np.exp(-(raw - 0.2) / (0.4 + 1e-6))) - 2
    np.testing.assert_allclose(learned.score_latents(latents, prompt, 0.4, eps), expected, atol=1e-5)


def test_normalize():
    np.testing.assert_allclose(dina.normalize(np.array([-10.0, 0.0, 5.0])), [0.0, 1.0, 1.5])


def bad(change):
    """(latents, prompt, sigma, noise) with one thing wrong."""
    latents, eps, prompt = random_inputs(TINY_SD3)
    values = {"latents": latents, "prompt": prompt, "sigma": 0.4, "noise": eps}
    values.update(change(values))
    return values


def with_nan(array, row):
    array = np.array(array)
    array[row] = np.nan
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {"latents": v["latents"][0]}, r"must be \(batch, height, width, 16\), got rank 3"),
        (lambda v: {"latents": v["latents"].transpose(0, 3, 1, 2)}, r"channels-first \(NCHW\).*transpose\(0, 2, 3"),
        (lambda v: {"latents": v["latents"][..., :4]}, "have 4 channels, the model takes 16"),
        (lambda v: {"latents": v["latents"][:, :7]}, "latent height 7 is not a positive multiple of the patch size 2"),
        (lambda v: {"latents": np.zeros((2, 8, 26, 16))}, "latent width 26 exceeds the position table, 24"),
        (lambda v: {"prompt": v["prompt"][:1]}, "2 latents but 1 rows of prompt_embeds.*one prompt per image"),
        (
            lambda v: {"prompt": dataclasses.replace(v["prompt"], prompt_embeds=v["prompt"].prompt_embeds[..., :8])},
            r"prompt_embeds must be \(batch, tokens, 24\)",
        ),
        (lambda v: {"sigma": 1.5}, r"sigma must lie in \[0, 1\].*got 1.5"),
        (lambda v: {"sigma": (0.2, -0.1)}, r"sigma must lie in \[0, 1\]"),
        (lambda v: {"sigma": ()}, "non-empty sequence"),
        (lambda v: {"latents": with_nan(v["latents"], 1)}, r"latents holds NaN or infinity in rows \[1\]"),
        (lambda v: {"noise": with_nan(v["noise"], 0)}, r"noise holds NaN or infinity in rows \[0\]"),
        (lambda v: {"noise": v["noise"][:1]}, "noise must have the latents' shape"),
        (
            lambda v: {"prompt": jax.tree.map(lambda x: with_nan(x, 1), v["prompt"])},
            r"prompt_embeds holds NaN or infinity in rows \[1\]",
        ),
        (
            lambda v: {"prompt": dataclasses.replace(v["prompt"], pooled_prompt_embeds=np.zeros((2, 21)))},
            r"pooled_prompt_embeds must be \(batch, 20\)",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(tiny_model, change, message):
    values = bad(change)
    with pytest.raises(ValueError, match=message):
        tiny_model.score_latents(**values)


def test_reward_fn_checks_shapes_while_tracing(tiny_model):
    latents, _, prompt = random_inputs(TINY_SD3)
    with pytest.raises(ValueError, match="channels-first"):
        jax.jit(tiny_model.reward_fn())(tiny_model.params, latents.transpose(0, 3, 1, 2), prompt, jax.random.key(0))
    params = {name: array for name, array in tiny_model.params.items() if "context_embedder" not in name}
    with pytest.raises(ValueError, match=r"of another model: missing \['backbone.context_embedder.bias'"):
        tiny_model.reward_fn()(params, latents, prompt, jax.random.key(0))


def test_one_compilation_per_shape(tiny_model):
    latents, _, prompt = random_inputs(TINY_SD3, batch=3)
    jitted = jitted_score(tiny_model.config, tiny_model.execution)
    before = jitted._cache_size()
    for sigma in (0.1, 0.2, 0.3):
        tiny_model.score_latents(latents, prompt, sigma)
    assert jitted._cache_size() == before + 1
    tiny_model.score_latents(latents[:, :4], prompt, 0.3)
    assert jitted._cache_size() == before + 2


def test_scan_and_remat_do_what_they_say():
    """Six blocks of one shape, taps 2, 4 and 6: three runs of two, each one a scan; and memory bought with work."""
    transformer = dataclasses.replace(TINY_SD3, num_layers=7, dual_attention_layers=())
    config = RewardModelConfig(transformer, num_blocks=6, visual_taps=(2, 4, 6), text_taps=(2, 4, 6), lora=None)
    latents, eps, prompt = random_inputs(transformer)
    scans, flops, memory = {}, {}, {}
    for layers, remat in (("loop", "none"), ("loop", "block"), ("scan", "none"), ("scan", "block")):
        module = reward_functional(config, ExecutionConfig(layers=layers, remat=remat))
        gradient = jax.grad(lambda x, params, *rest, module=module: module.bind(params)(x, *rest).sum())
        traced = jax.jit(gradient).trace(latents, module.shapes, prompt, jnp.zeros(len(latents)), eps)
        compiled = traced.lower().compile()
        scans[layers, remat] = len(re.findall(r"= scan\[", str(traced.jaxpr)))
        flops[layers, remat] = compiled.cost_analysis()["flops"]
        memory[layers, remat] = compiled.memory_analysis().temp_size_in_bytes
    assert scans == {("loop", "none"): 0, ("loop", "block"): 0, ("scan", "none"): 6, ("scan", "block"): 6}
    assert memory["loop", "block"] < 0.4 * memory["loop", "none"]
    assert memory["scan", "block"] < 0.5 * memory["scan", "none"]
    # A forward and a backward pass of the blocks become two and one; a little lies outside of them.
    assert 1.25 < flops["loop", "block"] / flops["loop", "none"] < 1.5


def test_a_gradient_is_summed_once_however_many_blocks_follow():
    """Fused into its users, the sum over all later blocks gave an operation 33, 75 and 118 operands."""
    widest = {}
    for blocks in (2, 4, 6):
        transformer = dataclasses.replace(TINY_SD3, num_layers=blocks + 1, dual_attention_layers=())
        config = dataclasses.replace(
            TINY, transformer=transformer, num_blocks=blocks, visual_taps=(blocks,), text_taps=(blocks,)
        )
        module, (latents, eps, prompt) = reward_functional(config, ExecutionConfig()), random_inputs(transformer)
        lora = {name: shape for name, shape in module.shapes.items() if ".lora_" in name}
        gradient = jax.grad(lambda lora, params, *rest, module=module: module.bind(params | lora)(*rest).sum())
        arguments = (lora, module.shapes, latents, prompt, jnp.zeros(len(latents)), eps)
        text = jax.jit(gradient).lower(*arguments).compile().as_text()
        widest[blocks] = max(len(operands.split(",")) for operands in re.findall(r" fusion\(([^)]*)\)", text))
    assert 1 < widest[2] == widest[4] == widest[6], widest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_written_gradient_keeps_its_bits(dtype):
    numbers = np.random.default_rng(0).standard_normal((3, 41, 8)) * 10.0 ** np.arange(-28, 4, 4)
    gradient = jnp.asarray(numbers, dtype).at[0, 0].set(jnp.asarray([0.0, -0.0, jnp.inf, -jnp.inf, 1, -1, 3, 7], dtype))
    written = jax.jit(lambda g: jax.vjp(_gradient_written, jnp.zeros_like(g))[1](g)[0])(gradient)
    np.testing.assert_array_equal(np.asarray(written).view(np.uint8), np.asarray(gradient).view(np.uint8))


def test_elsewhere_blocks_are_rematerialised_by_jax(monkeypatch):
    """Whose barriers other compilers keep. The primitive prints as "checkpoint" or "remat2", by version."""
    monkeypatch.setattr("dinalrm_jax.model.backbone.remat.platform", lambda: "tpu")
    module = reward_functional(TINY, ExecutionConfig(remat="block"))
    latents, eps, prompt = random_inputs(TINY_SD3)
    jaxpr = jax.make_jaxpr(lambda p, *x: module.bind(p)(*x))(module.shapes, latents, prompt, jnp.zeros(2), eps)
    assert len(re.findall(r"= (checkpoint|remat2?)\[", str(jaxpr))) == TINY.num_blocks


def test_what_each_policy_computes_again(monkeypatch):
    """Products of a layer and its gradient by the weight; "block" does the first again."""
    monkeypatch.setattr("dinalrm_jax.model.backbone.remat.platform", lambda: "tpu")

    def products(remat):
        block = rematerialised(lambda state, image, text, temb: (jnp.sin(image @ state), text), remat)
        gradient = jax.grad(lambda w: block(w, jnp.ones((2, 3)), jnp.ones(2), None)[0].sum())
        return str(jax.make_jaxpr(gradient)(jnp.ones((3, 3)))).count("dot_general")

    assert {remat: products(remat) for remat in ("none", "dots", "block")} == {"none": 2, "dots": 2, "block": 3}


def test_the_text_stream_is_computed_again_too():
    def memory(remat):
        block = rematerialised(lambda w, image, text, temb: (image, jnp.tanh(text @ w) @ w.T), remat)

        def loss(w, text):
            image = jnp.ones((2, 2))
            for _ in range(6):
                image, text = block(w, image, text, None)
            return text.sum() + image.sum()

        lowered = jax.jit(jax.grad(loss)).lower(jnp.ones((16, 1024)), jnp.ones((512, 16)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert memory("block") < 0.6 * memory("none")


def test_remat_does_not_change_what_trains(tiny_model):
    """Adapters within rematerialised blocks, weights around them frozen."""
    latents, eps, prompt = random_inputs(TINY_SD3)
    lora = {name: array for name, array in tiny_model.params.items() if ".lora_" in name}
    gradients = {}
    for remat in ("none", "block"):
        module = reward_functional(TINY, ExecutionConfig(remat=remat))

        def total(lora, module=module):
            return module.bind(tiny_model.params | lora)(latents, prompt, jnp.full(2, 0.4), eps).sum()

        gradients[remat] = jax.jit(jax.grad(total))(lora)
    for name, expected in gradients["none"].items():
        np.testing.assert_allclose(gradients["block"][name], expected, atol=1e-5, err_msg=name)
        assert np.any(expected), name


def test_scan_and_remat_do_not_change_scores(tiny_model):
    latents, eps, prompt = random_inputs(TINY_SD3)
    expected = tiny_model.score_latents(latents, prompt, (0.2, 0.6), eps)
    for layers, remat in (("scan", "none"), ("scan", "block"), ("loop", "dots")):
        model = dataclasses.replace(tiny_model, execution=ExecutionConfig(layers=layers, remat=remat))
        np.testing.assert_allclose(model.score_latents(latents, prompt, (0.2, 0.6), eps), expected, atol=1e-5)


def test_digits_that_weights_lost_do_not_come_back_in_silence(tiny_model):
    half = dataclasses.replace(tiny_model, execution=ExecutionConfig("bfloat16"))  # computed so, held in float32
    assert half.score_latents(*_scored(), sigma=0.4).shape == (2,)
    rounded = dina.RewardModel(TINY, store(tiny_model.params, half.execution), half.execution)
    with pytest.raises(
        ValueError, match="execution.dtype is float32, but .* weights are held in bfloat16 .*dtype='float32'"
    ):
        dataclasses.replace(rounded, execution=ExecutionConfig("float32"))


def test_what_is_not_a_prompt_or_a_key_is_named(tiny_model):
    latents, prompt = _scored()
    with pytest.raises(TypeError, match="prompt must be PromptEmbeds, got str; encode_prompt makes them"):
        tiny_model.score_latents(latents, "a red fox")
    reward = tiny_model.reward_fn()
    with pytest.raises(TypeError, match="prompt must be PromptEmbeds, got list"):
        reward(tiny_model.params, latents, ["a red fox"], jax.random.key(0))
    with pytest.raises(TypeError, match="key must be a random key, got 3; .*jax.random.key"):
        reward(tiny_model.params, latents, prompt, 3)
    with pytest.raises(ValueError, match="latents look channels-first"):
        reward(tiny_model.params, latents.transpose(0, 3, 1, 2), prompt, jax.random.key(0))


def _scored():
    latents, _, prompt = random_inputs(TINY_SD3)
    return latents, prompt
