"""Scores and ranks image files.

    python -m dinalrm_jax.score --checkpoint C [--base-model B] --prompt "a red fox" fox_1.png fox_2.png directory/

Prints a table, best image first; --json, --csv and --sheet (a contact sheet in rank order) write files, and
`--json -` and `--csv -` print to standard output instead of the table. With --prompt-file, a text file, its
one line is the prompt of all images, or each line that of one image, and images are ranked within their
prompt; images that `generate` wrote say their prompts themselves. A file that cannot be read is reported and
the others are scored; the exit status is 1 then.
"""

from dinalrm_jax.cli.command import answer_help, run_command
from dinalrm_jax.cli.options import ScoreOptions

answer_help(__name__, __doc__, ScoreOptions)  # before the imports that take a second

from tqdm import tqdm

from dinalrm_jax.cli.images import check_outputs, find_images, prompts_of, write_ranking
from dinalrm_jax.data.buckets import parse_bucket
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.evaluation.ranking import scored_rows
from dinalrm_jax.evaluation.scoring import score_images
from dinalrm_jax.noise import NoiseDraw
from dinalrm_jax.reward_model import RewardModel


def main(options: ScoreOptions) -> int:
    """Scores what the options name; 1 where a file could not be read."""
    check_outputs(options)
    images = find_images(options.images)
    prompts = prompts_of(options, images)
    size = parse_bucket(options.size) if options.size is not None else None
    enable_compilation_cache()
    model = RewardModel.from_pretrained(
        options.checkpoint, options.base_model, options.dtype, revision=options.revision, fast_vae=options.fast_vae
    )
    with tqdm(total=len(images), desc="scoring", unit="image", disable=len(images) < 2) as bar:
        found = score_images(
            model,
            prompts,
            images,
            [options.level],
            [NoiseDraw(options.seed + number, shared=True) for number in range(options.samples)],
            size=size,
            batch_size=options.batch_size,
            progress=bar.update,
        )
    return write_ranking(options, images, scored_rows(prompts, images, found), found.problems)


if __name__ == "__main__":
    # Ours are ValueErrors.
    run_command(main, ScoreOptions, errors=(ValueError, OSError), interrupted="nothing was written")
