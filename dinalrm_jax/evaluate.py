"""Accuracy of a reward model on human preference benchmarks.

    python -m dinalrm_jax.evaluate --checkpoint C [--base-model B] --benchmark hpdv2 --data DIR

DIR holds the benchmark's published files, or, with --benchmark records, what `preprocess` made of any
dataset. Every image has noise of its own, as in the paper; a last column has the accuracy with one noise for all.
Prints a table by noise level and for the ensemble, by all four accuracy rules, and writes
report.md, results.json, scores.csv (every image at every level and seed) and plots to --output. Images
that cannot be read are left out with their pairs, and counted. On several hosts (--distributed) each
process scores its share of the rows; all of them see the files.
"""

from dinalrm_jax.cli.command import answer_help, run_command
from dinalrm_jax.cli.options import EvaluateOptions

answer_help(__name__, __doc__, EvaluateOptions)  # before the imports that take a second

import contextlib
import pathlib
import sys
from collections.abc import Callable
from typing import cast

from dinalrm_jax.data.buckets import parse_bucket
from dinalrm_jax.data.config import OpinionConfig
from dinalrm_jax.data.names import BenchmarkName
from dinalrm_jax.data.records import Records
from dinalrm_jax.data.sources.datasets import read_benchmark
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.disk import check_writable, whole_directory
from dinalrm_jax.evaluation.benchmark import Evaluation, evaluate_images, evaluate_records, rankings_of
from dinalrm_jax.evaluation.benchmark_report import write_evaluation
from dinalrm_jax.evaluation.calibration import as_markdown, calibrate, check_enough
from dinalrm_jax.noise import NoiseDraw
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.training.preflight import check_fit
from dinalrm_jax.weights.pretrained import check_native, save_calibration


def main(options: EvaluateOptions) -> None:
    """Scores, and writes what was found."""
    output = pathlib.Path(options.output or f"runs/evaluation/{options.benchmark}")
    if output.exists():
        raise FileExistsError(f"{output} exists already; choose another --output or remove it first")
    processes.initialize(options.distributed)
    enable_compilation_cache()
    score = opened(options)
    check_writable(output)
    # The output is this command's from here on, before it has computed for hours.
    with whole_directory(output) if processes.is_first() else contextlib.nullcontext() as partial:
        found = score()
        text = write_evaluation(partial, found) if processes.is_first() else ""
    if processes.is_first():
        for name, problem in sorted(found.problems.items())[:10]:
            print(f"left out: {name}: {problem}", file=sys.stderr)
        if len(found.problems) > 10:
            print(f"... and {len(found.problems) - 10} more images", file=sys.stderr)
        print(f"{text}\nwrote {output}")
        if options.calibrate:
            fitted = calibrate(found)
            beside = {"fitted_to": found.name, "pairs": fitted.fitted_to, "errors": fitted.errors}
            table = as_markdown(fitted)
            (output / "calibration.md").write_text(table)
            save_calibration(options.checkpoint, fitted.likelihood, beside)
            print(f"\n{table}\nwrote the likelihood to {options.checkpoint}")


def opened(options: EvaluateOptions) -> Callable[[], Evaluation]:
    """What scores the data that the options name; data and model are looked at here, before anything is written."""
    kinds = (False, True) if options.shared_noise else (False,)
    draws = [NoiseDraw(options.seed + number, shared) for shared in kinds for number in range(options.seeds)]
    size = parse_bucket(options.size) if options.size is not None else None
    on_records = options.benchmark == "records"
    split = options.split or ("eval" if on_records else "test")
    # What is to be scored is looked at before weights are loaded.
    data = pathlib.Path(options.data)
    records = Records(data) if on_records else None
    benchmark = None
    if not on_records:
        opinion = OpinionConfig.quality if options.quality is None else options.quality
        name = cast(BenchmarkName, options.benchmark)
        benchmark = read_benchmark(data, name, split, opinion, options.holdout or 0)
    model = RewardModel.from_pretrained(
        options.checkpoint, options.base_model, options.dtype, revision=options.revision
    )
    if options.calibrate:
        check_native(options.checkpoint)
        rankings = rankings_of(records.pairs(split)) if benchmark is None else benchmark.rankings
        check_enough(rankings, options.data)
    if on_records:
        check_fit(records, model.config.encoders, model.config.transformer, options.base_model, [split])
        return lambda: evaluate_records(model, records, split, options.levels, draws, batch_size=options.batch_size)
    return lambda: evaluate_images(model, benchmark, options.levels, draws, size=size, batch_size=options.batch_size)


if __name__ == "__main__":
    run_command(
        main,
        EvaluateOptions,
        errors=(ValueError, OSError),  # ours are ValueErrors
        interrupted="nothing was written",
        leave=processes.leave,
    )
