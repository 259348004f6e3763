"""Compilation of a stage's step for all forms of its batches, before the first one runs."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax

from dinalrm_jax.devices import processes
from dinalrm_jax.devices.host_memory import return_freed_memory
from dinalrm_jax.training.objectives import Objective
from dinalrm_jax.training.step import AssembledStep, model_flops
from dinalrm_jax.training.stream import Form

B = TypeVar("B")


def compile_ahead(
    assembled: AssembledStep[B], forms: Mapping[Form, B], plain: Objective[B] | None = None
) -> dict[Form, tuple[jax.stages.Compiled, float]]:
    """The step compiled for every form of batch, several at a time, with the FLOPs of one call.

    Args:
        assembled: the step.
        forms: abstract batches.
        plain: the same objective without rematerialisation and loops, whose FLOPs are the model's; None: they are
            not known, and 0. (XLA counts a loop once, whatever runs in it.)
    """
    with (
        processes.progress(total=len(forms), desc="compiling buckets", unit="bucket") as bar,
        ThreadPoolExecutor(4) as pool,
    ):

        def compile_one(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
            compiled = lowered.compile()
            bar.update()
            return compiled

        lowered = {form: assembled.lower(batch) for form, batch in forms.items()}
        # In order on several processes, which must agree on the programs' numbering.
        workers = pool.map if jax.process_count() == 1 else map
        compiled = list(workers(compile_one, lowered.values()))
    return_freed_memory()
    if plain is None:
        flops = [0.0 for _ in lowered]
    else:
        flops = [model_flops(plain, assembled.state.params, assembled.frozen, batch) for batch in forms.values()]
    return dict(zip(lowered, zip(compiled, flops)))
