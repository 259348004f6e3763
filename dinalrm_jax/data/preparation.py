"""From a source of preferences to records: sizes, buckets, latents, embeddings, pairs.

The work is cut into parts with a file as result: the sizes of some thousand images, a shard of
latents, a shard of embeddings. What a part gives depends on the source and the configuration only,
so parts are spread over processes, a killed run leaves whole parts and goes on with the others, and
the records end in the same bytes whatever happened on the way. All processes see one file system.

    OUTPUT.unfinished/plan.json     the configuration and the source that the work is for
    OUTPUT.unfinished/parts/        sizes, and what became of each shard
    OUTPUT.unfinished/records/      shards; at the end all of the records, renamed to OUTPUT
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import pathlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from dinalrm_jax.data import buckets, records
from dinalrm_jax.data.buckets import bucket_name, parse_bucket
from dinalrm_jax.data.config import PreparationConfig
from dinalrm_jax.data.latents import Found, Latents
from dinalrm_jax.data.preferences import Preference, Source, pick, select
from dinalrm_jax.data.records import ImageRecord, PairRecord, PromptRecord, RecordsError, Shard
from dinalrm_jax.data.unfinished import claim, share, what_counts, work_directory
from dinalrm_jax.devices import processes
from dinalrm_jax.disk import publish, write_json
from dinalrm_jax.encoders.load import PRECISION, PromptEncoder
from dinalrm_jax.mapping import to_mapping

SIZES_PER_PART = 4096


@dataclasses.dataclass(frozen=True)
class _ImageShard:
    """Images of one bucket, and the file they go to."""

    bucket: str
    names: tuple[str, ...]
    path: pathlib.Path


def prepare(
    source: Source,
    output: str | pathlib.Path,
    config: PreparationConfig,
    latents: Latents,
    load_prompt_encoder: Callable[[], PromptEncoder],
    prompt_fingerprint: str,
) -> dict[str, Any]:
    """Writes the records of a source, going on from what an earlier run left unfinished.

    Args:
        source: the preferences.
        output: record directory; must not exist, and the first process must hold its lock.
        config: what to keep and how to encode it.
        latents: of the source's images.
        load_prompt_encoder: called when there are prompts to encode.
        prompt_fingerprint: of that encoder.

    Returns:
        The manifest.

    Raises:
        FileExistsError: the output exists.
        RecordsError: unfinished work of another configuration or backend, or nothing left to write.
        OSError: a full disk, or a file system that fails; see to it and run again.
    """
    output = pathlib.Path(output)
    counts = Counter(source.counts)
    preferences = dict(source.preferences)
    if "train" in preferences:
        preferences["train"] = select(preferences["train"], config.min_vote_share, config.min_confidence, counts)
    if "eval" in preferences:
        strict = [row for row in preferences["eval"] if row.label != 0.5]
        counts["held-out pair that people tied"] = len(preferences["eval"]) - len(strict)
        preferences["eval"] = strict
    work = work_directory(output)
    target = work / "records"
    made_by = {"codec": latents.fingerprint, "text": prompt_fingerprint}
    made_by |= {"backend": jax.default_backend(), "precision": PRECISION}
    claim(work, config, preferences, made_by)

    sizes = _sizes(work, latents, preferences, config)
    wanted = {
        split: _limited(split, _bucketed(rows, sizes, latents, config, counts), config, counts)
        for split, rows in preferences.items()
    }
    shards = _image_shards(target, wanted, config)
    written = _encode_images(work, shards, latents)

    index: dict[tuple[str, str], int] = {}
    problems = {name: size for name, size in sizes.items() if isinstance(size, str)}
    for shard, result in zip(shards, written):
        problems |= result["failed"]  # an image of two buckets is one image
        for name in shard.names:
            if name not in result["failed"]:
                index[shard.bucket, name] = len(index)
    counts.update(f"image {problem}" for problem in problems.values())
    counts["note: image converted to RGB"] = sum(isinstance(size, list) and size[2] != "RGB" for size in sizes.values())
    pairs = {split: _surviving(rows, index, counts) for split, rows in wanted.items()}
    if empty := sorted(split for split, rows in pairs.items() if not rows):
        processes.barrier("empty")
        if processes.is_first():
            shutil.rmtree(work)
        reasons = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if count)
        raise RecordsError(f"no pairs are left for {', '.join(empty)}; left out: {reasons}")

    prompts = sorted({row.prompt for rows in pairs.values() for _, row in rows})
    prompt_shards, features = _encode_prompts(work, target, prompts, load_prompt_encoder, config)
    prompt_index = {prompt: i for i, prompt in enumerate(prompts)}

    def record(bucket: str, row: Preference) -> tuple[str, PairRecord]:
        chosen, rejected = index[bucket, row.chosen], index[bucket, row.rejected]
        return bucket, PairRecord(chosen, rejected, prompt_index[row.prompt], row.kind, row.label)

    manifest = {
        "encoders": to_mapping(config.encoders),
        **{name: value for name, value in made_by.items() if value is not None},
        "source": what_counts(config),
        "left_out": {name: count for name, count in sorted(counts.items()) if count},
        "examples": {
            problem: [name for name, found in sorted(problems.items()) if found == problem][:3]
            for problem in sorted(set(problems.values()))
        },
        "images": {
            "count": len(index),
            "by_bucket": dict(sorted(Counter(bucket for bucket, _ in index).items())),
            "float16_error": _error(written),
        },
        "prompts": len(prompts),
    }
    if processes.is_first():
        records.finish(
            target,
            image_shards=[Shard(result["records"], result["num_bytes"]) for result in written],
            prompt_shards=prompt_shards,
            prompt_features=features,
            pairs={split: [record(bucket, row) for bucket, row in rows] for split, rows in pairs.items()},
            manifest=manifest,
        )
        # Up to this line a killed run goes on from its parts; after it the records are whole.
        publish(target, output)
        shutil.rmtree(work)
    processes.barrier("records")
    return json.loads((output / "manifest.json").read_text())


# ------------------------------------------------------------------------------ what to encode


def _limited(split: str, rows, config: PreparationConfig, counts: Counter) -> list[tuple[str, Preference]]:
    """Of the usable pairs, at most so many of one training prompt, and at most so many held-out ones."""
    if split == "train":
        groups, at_most, reason = (
            [row.prompt for _, row in rows],
            config.max_rows_per_prompt,
            "beyond those of a prompt",
        )
    else:
        groups, at_most, reason = [split for _ in rows], config.eval_pairs, "beyond the held-out ones asked for"
    kept = pick(groups, at_most, config.seed)
    counts[f"pair {reason}"] += len(rows) - len(kept)
    return [rows[i] for i in kept]


def _sizes(work: pathlib.Path, latents: Latents, preferences, config: PreparationConfig) -> dict[str, Any]:
    """Every image's (height, width, mode) by name, or the reason why it has none; only headers are read."""
    names = sorted({name for rows in preferences.values() for row in rows for name in (row.chosen, row.rejected)})
    parts = [names[start : start + SIZES_PER_PART] for start in range(0, len(names), SIZES_PER_PART)]
    paths = [work / "parts" / f"sizes-{i:05d}.json" for i in range(len(parts))]
    jobs = list(zip(parts, paths))
    todo, bar = share(jobs, lambda job: job[1], lambda job: len(job[0]), "reading sizes", "image")
    with bar, ThreadPoolExecutor(config.threads) as pool:
        for part, path in todo:
            write_json(path, list(pool.map(latents.size, part)))
            bar.update(len(part))
    processes.barrier("sizes")
    return dict(zip(names, (size for path in paths for size in json.loads(path.read_text()))))


def _bucketed(rows, sizes, latents: Latents, config: PreparationConfig, counts) -> list[tuple[str, Preference]]:
    """The pairs that have a bucket, with it; the others are counted by reason."""
    choices = [parse_bucket(name) for name in config.buckets]
    kept = []
    for row in rows:
        pair = [sizes[row.chosen], sizes[row.rejected]]
        if row.chosen == row.rejected:
            counts["pair of an image with itself"] += 1
        elif any(isinstance(size, str) for size in pair):
            counts["pair of a missing or unreadable image"] += 1
        elif any(height * width < config.min_area for height, width, _ in pair):
            counts["pair of an image too small"] += 1
        else:
            first, second = (latents.bucket((height, width), choices) for height, width, _ in pair)
            if first is None or second is None:
                counts[latents.without_bucket] += 1
            elif (bucket := buckets.align(first, second, choices, config.aspect_tolerance)) is None:
                counts["pair of different aspects"] += 1
            else:
                kept.append((bucket_name(bucket), row))
    return kept


def _image_shards(target: pathlib.Path, wanted, config: PreparationConfig) -> list[_ImageShard]:
    """Each distinct (bucket, image) once, in order, cut where the bucket changes."""
    distinct = {
        (bucket, name) for rows in wanted.values() for bucket, row in rows for name in (row.chosen, row.rejected)
    }
    by_bucket: dict[str, list[str]] = collections.defaultdict(list)
    for bucket, name in sorted(distinct):
        by_bucket[bucket].append(name)
    cuts = [
        (bucket, tuple(names[start : start + config.images_per_shard]))
        for bucket, names in by_bucket.items()
        for start in range(0, len(names), config.images_per_shard)
    ]
    return [
        _ImageShard(bucket, names, records.shard_path(target, "images", "rows", i, len(cuts)))
        for i, (bucket, names) in enumerate(cuts)
    ]


def _surviving(rows, index, counts: Counter) -> list[tuple[str, Preference]]:
    kept = [(bucket, row) for bucket, row in rows if (bucket, row.chosen) in index and (bucket, row.rejected) in index]
    if len(kept) < len(rows):
        counts["pair of a missing or unreadable image"] += len(rows) - len(kept)
    return kept


# ----------------------------------------------------------------------------------- encoding


def _encode_images(work: pathlib.Path, shards: Sequence[_ImageShard], latents: Latents) -> list[dict[str, Any]]:
    """Writes the shards that are not written yet; what became of every one, in order."""
    features = records.image_features()

    def result_path(shard: _ImageShard) -> pathlib.Path:
        return work / "parts" / f"{shard.path.name}.json"

    todo, bar = share(shards, result_path, lambda shard: len(shard.names), "encoding images", "image")
    stream = latents.read([(parse_bucket(shard.bucket), shard.names) for shard in todo])
    with bar, contextlib.closing(stream):
        for shard in todo:
            failed: dict[str, str] = {}
            error = np.zeros(2)  # largest, and sum of squares, of what float16 loses
            rows = _image_records(shard.names, stream, failed, error, bar)
            written = records.write_shard(shard.path, features, rows)
            result = {**dataclasses.asdict(written), "failed": failed, "error": error.tolist()}
            height, width = parse_bucket(shard.bucket)
            result["numbers"] = written.records * (height * width // latents.downsampling**2)
            write_json(result_path(shard), result)
    processes.barrier("images")
    return [json.loads(result_path(shard).read_text()) for shard in shards]


def _image_records(names: Sequence[str], stream: Iterator[Found], failed, error, bar) -> Iterator[ImageRecord]:
    """A shard's records; `failed` and `error` are filled on the way."""
    for name, (array, file_bytes) in zip(names, stream):
        if isinstance(array, str):
            failed[name] = array
        else:
            difference = array - records.to_half(name, array).astype(np.float32)
            error[0] = max(error[0], np.abs(difference).max())
            error[1] += float(np.square(difference, dtype=np.float64).sum()) / array.shape[-1]
            yield ImageRecord(array, name, file_bytes)
        bar.update()


def _error(written: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What storing latents in float16 changed: largest and root mean square."""
    numbers = sum(result["numbers"] for result in written)
    squares = sum(result["error"][1] for result in written)
    return {
        "largest": max(result["error"][0] for result in written),
        "root_mean_square": (squares / numbers) ** 0.5 if numbers else 0.0,
    }


def _encode_prompts(
    work: pathlib.Path,
    target: pathlib.Path,
    prompts: Sequence[str],
    load_encoder: Callable[[], PromptEncoder],
    config: PreparationConfig,
) -> tuple[list[Shard], Any]:
    """Writes the shards of embeddings that are not there yet; all shards, and the records' features."""
    size = config.prompts_per_shard
    parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    paths = [records.shard_path(target, "prompts", "rows", i, len(parts)) for i in range(len(parts))]
    results = [work / "parts" / f"{path.name}.json" for path in paths]
    jobs = list(zip(parts, paths, results))
    todo, bar = share(jobs, lambda job: job[2], lambda job: len(job[0]), "encoding prompts", "prompt")
    encoder = None
    with bar:
        for part, path, result in todo:
            encoder = encoder or load_encoder()
            rows = _embedded(part, encoder, config.prompt_batch_size, bar)
            first = next(rows)
            features = records.prompt_features(first)
            written = records.write_shard(path, features, itertools.chain([first], rows))
            shapes = [first.prompt_embeds.shape, first.pooled_prompt_embeds.shape]
            write_json(result, {**dataclasses.asdict(written), "shapes": shapes})
    processes.barrier("prompts")
    found = [json.loads(path.read_text()) for path in results]
    embeds, pooled = (np.zeros(shape) for shape in found[0]["shapes"])
    features = records.prompt_features(PromptRecord("", embeds, pooled))
    return [Shard(result["records"], result["num_bytes"]) for result in found], features


def _embedded(prompts: Sequence[str], encoder: PromptEncoder, batch_size: int, bar) -> Iterator[PromptRecord]:
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        padded = batch + (batch_size - len(batch)) * [""]
        embeds = jax.tree.map(np.asarray, encoder(padded))
        for row, prompt in enumerate(batch):
            yield PromptRecord(prompt, embeds.prompt_embeds[row], embeds.pooled_prompt_embeds[row])
        bar.update(len(batch))


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
