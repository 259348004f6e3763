"""What `preprocess` is told."""

import dataclasses

from dinalrm_jax.cli.flags import flag
from dinalrm_jax.data.config import PreparationConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """What `preprocess` is told.

    source: Directory of the dataset.
    output: Record directory to write, which must not exist.
    base_model: The SD3 pipeline with VAE and text encoders; a directory or hub id.
    dataset: Format of the source; dinalrm holds latents, the others hold images.
    encoders: What makes latents and embeddings: the base model (sd3), or built-in formulas without weights (tiny).
    text_length: T5 tokens of a prompt; words with --encoders tiny.
    text_dtype: Compute dtype of the text encoders; the VAE always computes in float32.
    buckets: Image sizes, HEIGHTxWIDTH in pixels; the defaults are the paper's.
    fit: How an image is brought to its bucket: stretch resizes it, and drops it where no bucket has its shape
        (the paper's way); crop cuts it at the centre.
    aspect_tolerance: How far the logarithm of an image's aspect may be from its bucket's, with --fit stretch.
    min_area: Drop images of fewer pixels.
    min_vote_share: Keep only rows whose winner has more than this share of the votes.
    min_confidence: Keep only rows of at least this confidence.
    max_rows_per_prompt: Keep at most so many training rows of one prompt (8 in the released code); 0 keeps all.
    holdout: Prompts to hold out where the source has no split of its own.
    benchmark_split: Which test set of GenAI-Bench to take.
    eval_pairs: Keep at most so many held-out pairs; 0 keeps all.
    seed: Seed of what is picked at random.
    images_per_shard: Images in a shard, which is what a killed run can lose of each process's work.
    prompts_per_shard: Prompts in a shard, which is what a killed run can lose of each process's work.
    batch_size: Images in a call of the VAE.
    prompt_batch_size: Prompts in a call of the text encoders.
    threads: Threads that read and decode images; their number changes no byte of the output.
    distributed: Join the other processes of this job, which are found by themselves on TPU pods, Slurm and Open MPI,
        elsewhere from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """

    source: str = flag(metavar="DIR")
    output: str = flag(metavar="DIR")
    base_model: str | None = flag(None, metavar="BASE_MODEL")
    preparation: PreparationConfig = flag(names={"encoders.kind": "encoders"})
    distributed: bool = False
