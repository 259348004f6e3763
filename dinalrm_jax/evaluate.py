"""Accuracy of a reward model on human preference benchmarks.

    python -m dinalrm_jax.evaluate --checkpoint C [--base-model B] --benchmark hpdv2 --data DIR

DIR holds the benchmark's published files, or, with --benchmark records, what `preprocess` made of any
dataset. Every image has noise of its own, as in the paper; a last column has the accuracy with one noise for all.
Prints a table by noise level and for the ensemble, by all four accuracy rules, and writes
report.md, results.json, scores.csv (every image at every level and seed) and plots to --output. Images
that cannot be read are left out with their pairs, and counted. On several hosts (--distributed) each
process scores its share; all of them see the files.
"""

import contextlib
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from dinalrm_jax.data.buckets import parse_bucket
from dinalrm_jax.data.records import Records
from dinalrm_jax.data.sources.datasets import read_benchmark
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.disk import check_writable, whole_directory
from dinalrm_jax.evaluation.benchmark import Evaluation, evaluate_images, evaluate_records
from dinalrm_jax.evaluation.benchmark_report import write_evaluation
from dinalrm_jax.evaluation.scoring import Level
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.noise import NoiseDraw
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.training.preflight import check_fit

BENCHMARKS = ("imagereward", "hpdv2", "hpdv3", "genai_bench", "records")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    enable_compilation_cache()
    values = flags.FLAGS
    try:
        levels = [float(sigma) for sigma in values.sigma]
        levels += [tuple(map(float, values.ensemble))] if values.ensemble else []
        kinds = (False, True) if values["shared-noise"].value else (False,)
        draws = [NoiseDraw(values.seed + number, shared) for shared in kinds for number in range(values.seeds)]
        output = pathlib.Path(values.output or f"runs/evaluation/{values.benchmark}")
        if output.exists():
            raise FileExistsError(f"{output} exists already; choose another --output or remove it first")
        check_writable(output)
        if values.split is not None and values.benchmark not in ("genai_bench", "records"):
            raise ConfigError(f"--split goes with genai_bench and records; {values.benchmark} has one test set")
        if values.size is not None and values.benchmark == "records":
            raise ConfigError("--size goes with images; records have the sizes they were made with")
        processes.initialize(values.distributed)
        # The output is this command's from here on, before it has computed for hours.
        with whole_directory(output) if processes.is_first() else contextlib.nullcontext() as partial:
            found = evaluate(values, levels, draws)
            text = write_evaluation(partial, found) if processes.is_first() else ""
    except (ValueError, OSError) as error:  # ours are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        processes.leave(2)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        processes.leave(130)
    if processes.is_first():
        for name, problem in sorted(found.problems.items())[:10]:
            print(f"left out: {name}: {problem}", file=sys.stderr)
        if len(found.problems) > 10:
            print(f"... and {len(found.problems) - 10} more images", file=sys.stderr)
        print(f"{text}\nwrote {output}")


def evaluate(values: flags.FlagValues, levels: Sequence[Level], draws: Sequence[NoiseDraw]) -> Evaluation:
    """Scores what the flags name."""
    base_model, batch_size = values["base-model"].value, values["batch-size"].value
    if values.benchmark == "records":
        records, split = Records(values.data), values.split or "eval"
        model = RewardModel.from_pretrained(values.checkpoint, base_model, values.dtype, revision=values.revision)
        check_fit(records, model.config, base_model, [split])
        return evaluate_records(model, records, split, levels, draws, batch_size=batch_size)
    size = parse_bucket(values.size) if values.size is not None else None
    benchmark = read_benchmark(pathlib.Path(values.data), values.benchmark, values.split or "test")
    model = RewardModel.from_pretrained(values.checkpoint, base_model, values.dtype, revision=values.revision)
    return evaluate_images(model, benchmark, levels, draws, size=size, batch_size=batch_size)


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Checkpoint, released, native or of a training run: a directory or hub id.")
    flags.DEFINE_string("revision", None, "Commit, tag or branch of a checkpoint that is a hub id.")
    flags.DEFINE_string("base-model", None, "SD3 pipeline with VAE and text encoders; directory or hub id.")
    flags.DEFINE_enum("benchmark", None, BENCHMARKS, "Format of the data.")
    flags.DEFINE_string("data", None, "The benchmark's directory.")
    flags.DEFINE_string(
        "split", None, "GenAI-Bench: test (the default) or test_v1; records: train or eval (the default)."
    )
    flags.DEFINE_list("sigma", ["0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8"], "Single noise levels.")
    flags.DEFINE_list("ensemble", ["0.2", "0.5", "0.7"], "Levels of the token-level ensemble; empty for none.")
    flags.DEFINE_integer("seed", 0, "Of the first noise draw.")
    flags.DEFINE_integer("seeds", 1, "Noise draws, seed, seed + 1 ...; the table has their spread.", 1)
    flags.DEFINE_bool("shared-noise", True, "Also score with one noise for all images; takes twice the time.")
    flags.DEFINE_string("size", None, "HEIGHTxWIDTH to resize all images to; else their own, large ones scaled down.")
    flags.DEFINE_integer("batch-size", 8, "Images in one program.", 1)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Compute dtype.")
    flags.DEFINE_string("output", None, "Directory to write; must not exist. runs/evaluation/BENCHMARK if not given.")
    flags.DEFINE_bool("distributed", False, processes.HELP)
    flags.mark_flags_as_required(["checkpoint", "benchmark", "data"])


if __name__ == "__main__":
    define_flags()
    app.run(main)
