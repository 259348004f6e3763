"""What the tests of several algorithms do."""

import jax


def velocities(policy, params):
    """The policy's and the reference's, compiled."""
    return (
        jax.jit(lambda x, sigma, prompt: policy.velocity(params)(x, sigma, prompt)),
        jax.jit(lambda x, sigma, prompt: policy.reference(params)(x, sigma, prompt)),
    )


def collected(algorithm, params, batch, keys):
    """What a step collects before its updates, and its objective of it."""
    collection, objective = algorithm
    return jax.jit(lambda params: collection.together(collection.rows(params, batch, keys)))(params), objective


def trained(params):
    return {name: array for name, array in params.items() if ".lora_" in name and name.startswith("policy.")}
