"""The attention kernels against plain attention; Pallas' runs in interpret mode, cuDNN's is lowered only."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters.partial_eval import dce_jaxpr
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, Mesh

from dinalrm_jax.devices.chips import unchecked_cudnn
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.backbone.attention import attend, check_kernel, chunked, cudnn, grouped, kernel_for, splash
from dinalrm_jax.model.backbone.attention.per_device import SAVED
from dinalrm_jax.model.backbone.remat import POLICIES

KERNELS = {
    "grouped": grouped.attend,
    "chunked": chunked.attend,
    "splash": functools.partial(splash.attend, interpret=True),
}


def plain(query, key, value):
    """In float32, as the formula has it."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision="highest") / np.sqrt(query.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), value, precision="highest")


def arrays(rows=2, queries=300, keys=300, heads=4, dim=64, dtype="float32", seed=0):
    """Query, key, value and the weights of a loss; some rows of logits are sharp, some flat."""
    rng = np.random.default_rng(seed)
    shapes = [(rows, n, heads, dim) for n in (queries, keys, keys, queries)]
    query, key, value, weights = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    query *= rng.uniform(0.1, 3, (rows, queries, heads, 1))
    return [jnp.asarray(x, dtype) for x in (query, key, value)], jnp.asarray(weights)


def outcome(kernel, inputs, weights):
    """What it gives, and the gradients of a weighted sum of it."""

    def loss(*inputs):
        out = kernel(*inputs).astype(jnp.float32)
        return (out * weights).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [out, *gradients]


def assert_close(ours, theirs, tolerance):
    for mine, wanted in zip(ours, theirs, strict=True):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(mine.astype(jnp.float32) / scale, wanted / scale, atol=tolerance)


# float32: sums in another order. bfloat16: its weights and logits' gradients are rounded, of 2^-8 each.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (7, 700), (513, 90)])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_attention(name, queries, keys, dtype, tolerance):
    inputs, weights = arrays(queries=queries, keys=keys, heads=3, dtype=dtype)
    widened = [x.astype(jnp.float32) for x in inputs]
    ours, theirs = outcome(KERNELS[name], inputs, weights), outcome(plain, widened, weights)
    assert_close(ours, theirs, tolerance)
    assert KERNELS[name](*inputs).dtype == dtype


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_under_vmap(name):
    """As an ensemble of noise levels runs them, keys and values shared by the levels or not."""
    (query, key, value), _ = arrays(queries=40, keys=40)
    levels = jnp.stack([query, 0.5 * query, -query])
    theirs = jnp.stack([plain(query, key, value) for query in levels])
    np.testing.assert_allclose(jax.vmap(KERNELS[name], (0, None, None))(levels, key, value), theirs, atol=1e-5)
    every = jax.vmap(KERNELS[name])(levels, jnp.stack(3 * [key]), jnp.stack(3 * [value]))
    np.testing.assert_allclose(every, theirs, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 2), (1, 2, 2)])
@pytest.mark.parametrize("rows", [4, 3])  # three are not divided by the mesh: every device has them all
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_on_a_mesh(name, rows, shape):
    inputs, weights = arrays(rows=rows, queries=70, keys=70)
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "tensor"), axis_types=3 * (AxisType.Auto,))
    with jax.set_mesh(mesh):
        ours = outcome(KERNELS[name], inputs, weights)
    assert_close(ours, outcome(plain, inputs, weights), 1e-5)


def test_heads_that_a_mesh_does_not_divide():
    inputs, _ = arrays(heads=3, queries=8, keys=8)
    mesh = Mesh(
        np.array(jax.devices()[:2]).reshape(1, 1, 2), ("data", "fsdp", "tensor"), axis_types=3 * (AxisType.Auto,)
    )
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match="3 heads do not divide over mesh.tensor = 2"):
        jax.jit(KERNELS["splash"])(*inputs)


def test_a_kernel_within_the_callers_own_shard_map():
    """An axis that is his already is left to him."""
    inputs, _ = arrays(rows=4, queries=20, keys=20)
    mesh = Mesh(
        np.array(jax.devices()[:4]).reshape(2, 1, 2), ("data", "fsdp", "tensor"), axis_types=3 * (AxisType.Auto,)
    )
    spec = jax.P("data")
    mapped = jax.shard_map(
        KERNELS["splash"], in_specs=(spec,) * 3, out_specs=spec, axis_names={"data"}, check_vma=False
    )
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(mapped)(*inputs), plain(*inputs), atol=1e-5)


def test_what_auto_is():
    assert kernel_for("cpu", "bfloat16") == kernel_for("cpu", "float32") == "grouped"
    assert kernel_for("tpu", "bfloat16") == kernel_for("tpu", "float32") == "splash"
    assert (kernel_for("gpu", "bfloat16"), kernel_for("gpu", "float32")) == ("cudnn", "chunked")


def test_kernels_that_are_not_there():
    inputs, _ = arrays(queries=8, keys=8)
    with pytest.raises(ConfigError, match=r'"splash" runs on TPUs, this is compiled for a CPU; use "auto"'):
        attend(*inputs, "splash")
    with pytest.raises(ConfigError, match=r'"cudnn" runs on GPUs, this is compiled for a CPU.*here "grouped"'):
        attend(*inputs, "cudnn")
    with pytest.raises(ConfigError, match=r'computes in 16 bits, not in float32; use "auto" or "chunked"'):
        check_kernel("cudnn", "gpu", "float32")
    check_kernel("cudnn", "gpu", "bfloat16")


def forward_calls(kernel, policy, primitive):
    """How often the gradient of a rematerialised layer calls a kernel's forward pass."""
    inputs, weights = arrays(queries=128, keys=128, dtype="bfloat16")

    def layer(query, key, value):
        return kernel(2 * query, key, value)

    def loss(*inputs):
        return (jax.checkpoint(layer, policy=POLICIES[policy])(*inputs).astype(jnp.float32) * weights).sum()

    with unchecked_cudnn():
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*inputs).jaxpr
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # what nobody reads, a compiler leaves out too
    names = []

    def collect(jaxpr):
        for equation in jaxpr.eqns:
            names.append(f"{equation.primitive.name} {equation.params.get('name')}")
            for sub in jaxprs_in_params(equation.params):
                collect(sub)

    collect(jaxpr)
    return sum(primitive in name for name in names)


@pytest.mark.parametrize(
    ("kernel", "primitive"),
    [
        (splash.attend, "pallas_call splash_mha_fwd"),
        (cudnn.attend, "dot_product_attention_fwd_wrapper"),
        (chunked.attend, "exp "),
    ],
)
def test_no_attention_is_computed_twice_where_its_output_is_kept(kernel, primitive):
    kept, again = (forward_calls(kernel, policy, primitive) for policy in ("attention", "block"))
    # (chunked: the weights of the forward pass, and those that the backward pass makes of their logarithm.)
    assert kept == (2 if primitive == "exp " else 1)
    assert again == kept + 1


def test_what_is_kept_has_its_name():
    """And keeping it changes no bit of a gradient."""
    inputs, weights = arrays(queries=60, keys=60)
    for kernel in (chunked.attend, grouped.attend):
        whole = outcome(kernel, inputs, weights)
        kept = outcome(
            jax.checkpoint(kernel, policy=jax.checkpoint_policies.save_only_these_names(SAVED)), inputs, weights
        )
        for mine, wanted in zip(kept, whole, strict=True):
            np.testing.assert_array_equal(mine, wanted)


@pytest.mark.parametrize(
    ("kernel", "platform", "called"), [(splash.attend, "tpu", "tpu_custom_call"), (cudnn.attend, "cuda", "fmhaSoftmax")]
)
@pytest.mark.parametrize("tokens", [1229, 4301])  # 512 and 1024 pixels, with 205 of text: odd
def test_kernels_lower_for_their_platform(kernel, platform, called, tokens):
    shape = jax.ShapeDtypeStruct((2, tokens, 24, 64), jnp.bfloat16)

    def derived(query, key, value):
        return jax.grad(lambda *x: (kernel(*x).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2))(query, key, value)

    with unchecked_cudnn():
        for function in (kernel, derived, jax.vmap(derived)):
            if function not in (kernel, derived):
                shape = jax.ShapeDtypeStruct((3, *shape.shape), shape.dtype)
            exported = jax.export.export(
                jax.jit(function), platforms=[platform], disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(c)
                for c in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")]
            )(shape, shape, shape)  # fmt: skip
            assert called in exported.mlir_module()


COMPILES = """
import os
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
from dinalrm_jax.devices.chips import Target
from dinalrm_jax.devices.mesh import MeshConfig, make_mesh
from dinalrm_jax.devices.sharding import row_sharded
from dinalrm_jax.model.backbone.attention import attend

for chip in ("v5e", "v5e:4", "v6e", "v5p"):
    target = Target.parse(chip)
    mesh = make_mesh(MeshConfig(), target.devices())
    shape = row_sharded((2 * target.count, 4301, 24, 64), jnp.bfloat16, mesh)
    derived = jax.grad(lambda *x: attend(*x, "auto").astype(jnp.float32).sum(), argnums=(0, 1, 2))
    with jax.set_mesh(mesh):
        text = jax.jit(derived).lower(shape, shape, shape).compile().as_text()
    print(chip, text.count('custom_call_target="tpu_custom_call"'))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles for TPUs with libtpu: pip install it")
def test_attention_compiles_for_tpus():
    """Forward and the two parts of the backward pass: their tiles fit the chips' memories."""
    done = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:4] == ["v5e 3", "v5e:4 3", "v6e 3", "v5p 3"]
