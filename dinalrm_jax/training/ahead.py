"""What runs ahead of the training loop: compilation of every bucket, and the way of batches to the mesh."""

import collections
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
from jax.sharding import Mesh

from dinalrm_jax import distributed
from dinalrm_jax.compilation import return_freed_memory
from dinalrm_jax.data.batch import PreferenceBatch
from dinalrm_jax.data.loader import JoinedPairs, TrainingBatches
from dinalrm_jax.data.records import Records
from dinalrm_jax.parameters import Params
from dinalrm_jax.training.sharding import put_rows, row_sharded
from dinalrm_jax.training.step import TrainState


def batch_shapes(records: Records, batch_size: int, mesh: Mesh) -> dict[tuple[int, ...], PreferenceBatch]:
    """An abstract batch of every training bucket, by the shape of its latents."""
    pairs = JoinedPairs(records, "train")
    firsts = [pairs[rows.start] for rows in records.buckets("train").values()]
    shapes = {}
    for pair in firsts:
        batch = jax.tree.map(lambda x: row_sharded((batch_size, *x.shape), x.dtype, mesh), pair)
        shapes[batch.chosen.shape] = batch
    return shapes


def compile_ahead(
    step_fn: jax.stages.Wrapped,
    state: TrainState,
    frozen: Params,
    shapes: Mapping[tuple[int, ...], PreferenceBatch],
    mesh: Mesh,
) -> tuple[dict[tuple[int, ...], jax.stages.Compiled], dict[tuple[int, ...], float]]:
    """The step compiled for every bucket before the first one runs, several at a time, and its FLOPs."""
    with (
        jax.set_mesh(mesh),
        distributed.progress(total=len(shapes), desc="compiling buckets", unit="bucket") as bar,
        ThreadPoolExecutor(4) as pool,
    ):

        def compile_one(lowered):
            compiled = lowered.compile()
            bar.update()
            return compiled

        lowered = {shape: step_fn.lower(state, frozen, batch) for shape, batch in shapes.items()}
        # In order on several processes, which must agree on the programs' numbering.
        workers = pool.map if jax.process_count() == 1 else map
        compiled = dict(zip(lowered, workers(compile_one, lowered.values())))
    return_freed_memory()
    return compiled, {shape: float((step.cost_analysis() or {}).get("flops", 0.0)) for shape, step in lowered.items()}


def compile_if_it_fits(
    lowered: jax.stages.Lowered, fits: Callable[[jax.stages.Compiled], bool]
) -> jax.stages.Compiled | None:
    """The program, or None where the compiler or `fits` says that it needs more memory than there is."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return compiled if fits(compiled) else None


def fits_beside(compiled: jax.stages.Compiled) -> bool:
    """Whether a device has room for a program's temporaries and results beside what it holds now.

    True where the device does not say how much memory it has (a CPU), or the compiler how much a program needs.
    """
    stats, analysis = jax.local_devices()[0].memory_stats() or {}, compiled.memory_analysis()
    if "bytes_limit" not in stats or analysis is None:
        return True
    return stats["bytes_in_use"] + analysis.temp_size_in_bytes + analysis.output_size_in_bytes <= stats["bytes_limit"]


def on_device(batches: TrainingBatches, batch_size: int, mesh: Mesh) -> Iterator[tuple[PreferenceBatch, dict]]:
    """Batches on the mesh, the next one on its way while one is used; with the loader's state after each."""
    waiting = collections.deque()
    for rows in batches:
        waiting.append((put_rows(rows, batch_size, mesh), batches.get_state()))
        if len(waiting) == 2:
            yield waiting.popleft()
