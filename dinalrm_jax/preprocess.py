"""Turns a preference dataset into records to train on.

    python -m dinalrm_jax.preprocess --dataset hpdv3 --source DIR --output DIR --base-model ID

Images go to resolution buckets and through the VAE, once each (--dataset dinalrm holds latents
already); prompts through the text encoders, once each. What cannot be used is skipped and counted by
reason; docs/data.md lists them. The work can be killed at any moment: the same command goes on with
it, and the output appears whole or not at all. On several hosts (--distributed) each process takes its
share; all of them see one file system.
"""

import signal
import sys

from absl import app, flags, logging

from dinalrm_jax.data.config import PreparationConfig
from dinalrm_jax.data.records import RecordsError
from dinalrm_jax.data.sources.datasets import preprocess
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.disk import Locked
from dinalrm_jax.mapping import ConfigError, from_mapping
from dinalrm_jax.model.tables import WeightsError

DEFAULTS = PreparationConfig("hpdv3")


def report(manifest: dict) -> str:
    """What was written and what was left out, as lines for people."""
    lines = []
    for split, by_bucket in sorted(manifest["pairs"].items()):
        sizes = ", ".join(f"{bucket}: {count}" for bucket, count in by_bucket.items())
        lines.append(f"{sum(by_bucket.values()):>9} {split} pairs ({sizes})")
    images, error = manifest["images"], manifest["images"]["float16_error"]
    stored = f"float16 changes latents by {error['largest']:.1e} at most, {error['root_mean_square']:.1e} rms"
    lines.append(f"{images['count']:>9} images ({stored})")
    lines.append(f"{manifest['prompts']:>9} prompts")
    notes = {name: count for name, count in manifest["left_out"].items() if name.startswith("note: ")}
    left_out = {name: count for name, count in manifest["left_out"].items() if name not in notes and count}
    lines.append("left out:" if left_out else "nothing was left out")
    for name, count in left_out.items():
        examples = manifest["examples"].get(name.removeprefix("image "), [])
        lines.append(f"{count:>9} {name}" + (f" ({', '.join(examples)}{', ...' * (count > 3)})" if examples else ""))
    if notes:
        lines.append("of note, and kept:")
        lines += [f"{count:>9} {name.removeprefix('note: ')}" for name, count in notes.items()]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    enable_compilation_cache()
    values = flags.FLAGS
    try:
        named = ("dataset", "text_dtype", "fit", "min_area", "min_vote_share", "min_confidence", "max_rows_per_prompt")
        named += ("holdout", "benchmark_split", "eval_pairs", "images_per_shard", "prompts_per_shard", "batch_size")
        named += ("threads", "buckets")
        config = from_mapping(
            PreparationConfig,
            {
                "encoders": {"kind": values.encoders, "text_length": values["text-length"].value},
                **{name: values[name.replace("_", "-")].value for name in named},
            },
            "preprocess",
        )
        processes.initialize(values.distributed)
        if values.distributed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the preemption service's: nothing is lost by a kill
        manifest = preprocess(values.source, values.output, config, values["base-model"].value)
    except (RecordsError, ConfigError, WeightsError, FileExistsError, Locked) as error:
        print(f"error: {error}", file=sys.stderr)
        processes.leave(2)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, and the same command goes on from there", file=sys.stderr)
        processes.leave(130)
    except OSError as error:
        print(f"error: {error}\nWhat is finished is kept; the same command goes on from there", file=sys.stderr)
        processes.leave(2)
    if processes.is_first():
        print(f"wrote {values.output}:\n{report(manifest)}")


def define_flags() -> None:
    datasets = ["hpdv3", "hpdv2", "imagereward", "genai_bench", "jsonl", "dinalrm"]
    flags.DEFINE_enum("dataset", None, datasets, "Format of the source.")
    flags.DEFINE_string("source", None, "The dataset's directory.")
    flags.DEFINE_string("output", None, "Record directory to write; must not exist.")
    flags.DEFINE_string("base-model", None, "SD3 pipeline with VAE and text encoders; directory or hub id.")
    flags.DEFINE_enum("encoders", "sd3", ["sd3", "tiny"], "The base model's, or built-in formulas without weights.")
    flags.DEFINE_integer("text-length", DEFAULTS.encoders.text_length, "T5 tokens (words for --encoders tiny).")
    flags.DEFINE_enum("text-dtype", DEFAULTS.text_dtype, ["bfloat16", "float32"], "Compute dtype of the text encoders.")
    flags.DEFINE_list("buckets", list(DEFAULTS.buckets), "Image sizes, HEIGHTxWIDTH.")
    flags.DEFINE_enum("fit", DEFAULTS.fit, ["stretch", "crop"], "How an image is brought to its bucket.")
    flags.DEFINE_integer("min-area", DEFAULTS.min_area, "Drop images of fewer pixels.")
    flags.DEFINE_float("min-vote-share", DEFAULTS.min_vote_share, "Keep rows above this share of votes.")
    flags.DEFINE_float("min-confidence", DEFAULTS.min_confidence, "Keep rows of at least this confidence.")
    flags.DEFINE_integer("max-rows-per-prompt", DEFAULTS.max_rows_per_prompt, "Keep so many rows a prompt; 0: all.")
    flags.DEFINE_integer("holdout", DEFAULTS.holdout, "Prompts held out where the source has no split.")
    flags.DEFINE_enum("benchmark-split", DEFAULTS.benchmark_split, ["test", "test_v1"], "Of GenAI-Bench.")
    flags.DEFINE_integer("eval-pairs", DEFAULTS.eval_pairs, "Keep at most so many held-out pairs; 0: all.")
    flags.DEFINE_integer("images-per-shard", DEFAULTS.images_per_shard, "What a kill can lose, a process.")
    flags.DEFINE_integer("prompts-per-shard", DEFAULTS.prompts_per_shard, "What a kill can lose, a process.")
    flags.DEFINE_integer("batch-size", DEFAULTS.batch_size, "Images a VAE call.")
    flags.DEFINE_integer("threads", DEFAULTS.threads, "That read and decode images.")
    flags.DEFINE_bool("distributed", False, processes.HELP)
    flags.mark_flags_as_required(["dataset", "source", "output"])


if __name__ == "__main__":
    define_flags()
    app.run(main)
