"""The datasets by name: reading their directories, and turning them into records."""

import contextlib
import pathlib
from collections.abc import Callable

from dinalrm_jax.data.agreement import without_disagreement
from dinalrm_jax.data.config import OpinionConfig, PreparationConfig
from dinalrm_jax.data.latents import EncodedImages
from dinalrm_jax.data.mixture import AnyRecords
from dinalrm_jax.data.names import BenchmarkName
from dinalrm_jax.data.preferences import Benchmark, Source
from dinalrm_jax.data.preparation import prepare
from dinalrm_jax.data.sources import agiqa3k, dinalrm, genai_bench, hpdv2, hpdv3, imagereward, json_pairs
from dinalrm_jax.data.unfinished import check_output
from dinalrm_jax.data.views import with_views
from dinalrm_jax.devices import processes
from dinalrm_jax.disk import lock
from dinalrm_jax.encoders.load import (
    image_codec_fingerprint,
    load_image_codec,
    load_prompt_encoder,
    prompt_fingerprint,
)


def preprocess(
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    config: PreparationConfig,
    base_model: str | pathlib.Path | None = None,
) -> dict:
    """Writes the records of a dataset directory; see `data.preparation.prepare`.

    Args:
        source: the dataset's directory.
        output: record directory to write; must not exist.
        config: which dataset it is, what to keep, how to encode it.
        base_model: the SD3 pipeline whose VAE and text encoders are used.

    Raises:
        FileExistsError: the output exists.
        disk.Locked: another run is writing it.
        ConfigError, WeightsError, FileNotFoundError: no base model, or one that will not do.
        RecordsError: a source that is not what `config.dataset` says; and as for `prepare`.
    """
    output = pathlib.Path(output)
    with lock(output) if processes.is_first() else contextlib.nullcontext():
        check_output(output)
        directory = pathlib.Path(source)
        found = read_source(directory, config, base_model)
        found = without_disagreement(found, directory, config.scores, config.agree, config.ties)
        if config.views:
            found = with_views(found, config.views)
        return prepare(
            found,
            output,
            config,
            found.latents or EncodedImages(found.open, load_image_codec(config.encoders, base_model), config),
            lambda: load_prompt_encoder(config.encoders, base_model, config.text_dtype),
            prompt_fingerprint(config.encoders, base_model),
        )


def read_source(
    source: pathlib.Path, config: PreparationConfig, base_model: str | pathlib.Path | None = None
) -> Source:
    """The preferences of a dataset directory; `base_model` is what latents that it holds are said to be of.

    Raises:
        RecordsError: the directory is not what `config.dataset` says.
    """
    match config.dataset:
        case "hpdv3":
            return hpdv3.read(source)
        case "hpdv2":
            return hpdv2.read(source, config.holdout, config.ties)
        case "imagereward":
            return imagereward.read(source)
        case "genai_bench":
            return genai_bench.read(source, config.benchmark_split)
        case "jsonl":
            return json_pairs.read(source, config.holdout)
        case "agiqa3k":
            return agiqa3k.read(source, config.holdout, config.opinion)
        case "dinalrm":
            return dinalrm.read(source, config.holdout, image_codec_fingerprint(config.encoders, base_model))


def read_benchmark(
    source: pathlib.Path, name: BenchmarkName, split: str, quality: float = OpinionConfig.quality, holdout: int = 0
) -> Benchmark:
    """The test set of a dataset directory, ties and all.

    Args:
        source: the dataset's directory.
        name: of the dataset.
        split: of GenAI-Bench, "test" or "test_v1"; the others have one.
        quality: of AGIQA-3K, see `OpinionConfig`.
        holdout: of AGIQA-3K, only so many prompts: those that preprocessing holds out; 0: all.

    Raises:
        RecordsError: the directory is not what `name` says.
    """
    match name:
        case "imagereward":
            return imagereward.benchmark(source)
        case "hpdv2":
            return hpdv2.benchmark(source)
        case "hpdv3":
            return hpdv3.benchmark(source)
        case "genai_bench":
            return genai_bench.benchmark(source, split)
        case "agiqa3k":
            return agiqa3k.benchmark(source, OpinionConfig(quality), holdout)


def maker_of(records: AnyRecords) -> Callable[[str], str] | None:
    """What tells, by its name, which generator made an image of the records; None where names do not say it."""
    return agiqa3k.maker if records.manifest.get("source", {}).get("dataset") == "agiqa3k" else None
