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
import dataclasses
import io
import itertools
import json
import pathlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from dinalrm_jax import distributed
from dinalrm_jax.config import PreparationConfig, to_mapping
from dinalrm_jax.data import buckets, records
from dinalrm_jax.data.buckets import Size, bucket_name, parse_bucket
from dinalrm_jax.data.images import DAMAGE, map_ahead, read_rgb
from dinalrm_jax.data.preferences import Preference, Source, pick, select, stable_hash
from dinalrm_jax.data.records import ImageRecord, PairRecord, PromptRecord, RecordsError, Shard
from dinalrm_jax.disk import write_json
from dinalrm_jax.encoders import ImageCodec, PromptEncoder

SIZES_PER_PART = 4096
MISSING, UNREADABLE = "missing", "unreadable"
T, R = TypeVar("T"), TypeVar("R")


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
    codec: ImageCodec,
    load_prompt_encoder: Callable[[], PromptEncoder],
    prompt_fingerprint: str,
) -> dict[str, Any]:
    """Writes the records of a source, going on from what an earlier run left unfinished.

    Args:
        source: the preferences and their images.
        output: record directory; must not exist.
        config: what to keep and how to encode it.
        codec: of the images.
        load_prompt_encoder: called when there are prompts to encode.
        prompt_fingerprint: of that encoder.

    Returns:
        The manifest.

    Raises:
        FileExistsError: the output exists.
        RecordsError: unfinished work of another configuration, or nothing left to write.
        OSError: a full disk; free some and run again.
    """
    output = pathlib.Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists already; choose another output or remove it first")
    counts = Counter(source.counts)
    preferences = dict(source.preferences)
    if "train" in preferences:
        preferences["train"] = select(preferences["train"], config.min_vote_share, config.min_confidence, counts)
    work = output.with_name(f"{output.name}.unfinished")
    target = work / "records"
    _claim(work, config, preferences, {"codec": codec.fingerprint, "text": prompt_fingerprint})

    sizes = _sizes(work, source, preferences, config)
    wanted = {
        split: _limited(split, _bucketed(rows, sizes, config, counts), config, counts)
        for split, rows in preferences.items()
    }
    shards = _image_shards(target, wanted, config)
    written = _encode_images(work, shards, source, codec, config)

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
        distributed.barrier("empty")
        if distributed.is_first():
            shutil.rmtree(work)
        reasons = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if count)
        raise RecordsError(f"no pairs are left for {', '.join(empty)}; left out: {reasons}")

    prompts = sorted({row.prompt for rows in pairs.values() for _, row in rows})
    prompt_shards, features = _encode_prompts(work, target, prompts, load_prompt_encoder, config)
    prompt_index = {prompt: i for i, prompt in enumerate(prompts)}

    def record(bucket: str, row: Preference) -> tuple[str, PairRecord]:
        chosen, rejected = index[bucket, row.chosen], index[bucket, row.rejected]
        return bucket, PairRecord(chosen, rejected, prompt_index[row.prompt], "human")

    manifest = {
        "encoders": to_mapping(config.encoders),
        "codec": codec.fingerprint,
        "text": prompt_fingerprint,
        "source": _what_counts(config),
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
    if distributed.is_first():
        records.finish(
            target,
            image_shards=[Shard(result["records"], result["num_bytes"]) for result in written],
            prompt_shards=prompt_shards,
            prompt_features=features,
            pairs={split: [record(bucket, row) for bucket, row in rows] for split, rows in pairs.items()},
            manifest=manifest,
        )
        for leftover in target.rglob(".*.partial-*"):  # of killed processes
            leftover.unlink()
        # Up to this line a killed run goes on from its parts; after it the records are whole.
        target.replace(output)
        shutil.rmtree(work)
    distributed.barrier("records")
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


def _what_counts(config: PreparationConfig) -> dict[str, Any]:
    """The configuration without what changes no byte."""
    values = json.loads(json.dumps(to_mapping(config)))
    del values["threads"]
    return values


def _claim(work: pathlib.Path, config: PreparationConfig, preferences, encoders: dict[str, str]) -> None:
    """Makes the working directory, or checks that the one there is of the same work."""
    rows = [
        (split, row.prompt, row.chosen, row.rejected) for split in sorted(preferences) for row in preferences[split]
    ]
    plan = {
        "config": _what_counts(config),
        **encoders,
        "preferences": stable_hash(*rows).hex(),
    }
    path = work / "plan.json"
    if distributed.is_first() and not path.exists():
        for name in ("parts", "records/images", "records/prompts"):
            (work / name).mkdir(parents=True, exist_ok=True)
        write_json(path, plan)
    distributed.barrier("plan")
    found = json.loads(path.read_text())
    if found != plan:
        changed = [key for key in plan["config"] if plan["config"][key] != found.get("config", {}).get(key)]
        changed += [key for key in (*encoders, "preferences") if plan[key] != found.get(key)]
        raise RecordsError(
            f"{work} holds unfinished work of another configuration (changed: {', '.join(changed)}); restore these "
            "values to go on with it, or remove it to start anew"
        )


def _sizes(work: pathlib.Path, source: Source, preferences, config: PreparationConfig) -> dict[str, Any]:
    """Every image's (height, width, mode) by name, or MISSING or UNREADABLE; only headers are read."""
    names = sorted({name for rows in preferences.values() for row in rows for name in (row.chosen, row.rejected)})
    parts = [names[start : start + SIZES_PER_PART] for start in range(0, len(names), SIZES_PER_PART)]
    paths = [work / "parts" / f"sizes-{i:05d}.json" for i in range(len(parts))]

    def size(name: str) -> list | str:
        try:
            file = source.open(name)
        except FileNotFoundError:
            return MISSING
        try:
            with file, Image.open(file) as image:
                return [image.height, image.width, image.mode]
        except DAMAGE:
            return UNREADABLE

    jobs = list(zip(parts, paths))
    todo, bar = _share(jobs, lambda job: job[1], lambda job: len(job[0]), "reading sizes", "image")
    with bar, ThreadPoolExecutor(config.threads) as pool:
        for part, path in todo:
            write_json(path, list(pool.map(size, part)))
            bar.update(len(part))
    distributed.barrier("sizes")
    return dict(zip(names, (size for path in paths for size in json.loads(path.read_text()))))


def _bucketed(rows, sizes, config: PreparationConfig, counts: Counter) -> list[tuple[str, Preference]]:
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
            own = [_bucket((height, width), choices, config) for height, width, _ in pair]
            if None in own:
                counts["pair of an image of odd aspect"] += 1
            elif (bucket := buckets.align(*own, choices, config.aspect_tolerance)) is None:
                counts["pair of different aspects"] += 1
            else:
                kept.append((bucket_name(bucket), row))
    return kept


def _bucket(size: Size, choices: Sequence[Size], config: PreparationConfig) -> Size | None:
    if config.fit == "crop":
        return buckets.nearest_aspect(size, choices)
    return buckets.nearest(size, choices, config.aspect_tolerance)


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


def _encode_images(
    work: pathlib.Path, shards: Sequence[_ImageShard], source: Source, codec: ImageCodec, config: PreparationConfig
) -> list[dict[str, Any]]:
    """Encodes the shards that are not written yet; what became of every one, in order."""
    features = records.image_features()

    def result_path(shard: _ImageShard) -> pathlib.Path:
        return work / "parts" / f"{shard.path.name}.json"

    todo, bar = _share(shards, result_path, lambda shard: len(shard.names), "encoding images", "image")
    with bar, ThreadPoolExecutor(config.threads) as pool:
        # Threads decode ahead, across shards, while the encoder runs.
        decoded = map_ahead(
            pool,
            lambda job: _decode(source, job[1], parse_bucket(job[0].bucket), config),
            [(shard, name) for shard in todo for name in shard.names],
            ahead=4 * config.batch_size,
        )
        for shard in todo:
            failed: dict[str, str] = {}
            error = np.zeros(2)  # largest, and sum of squares, of what float16 loses
            rows = _encoded(shard, decoded, codec, config.batch_size, failed, error, bar)
            written = records.write_shard(shard.path, features, rows)
            result = {**dataclasses.asdict(written), "failed": failed, "error": error.tolist()}
            height, width = parse_bucket(shard.bucket)
            result["numbers"] = written.records * (height * width // codec.downsampling**2)
            write_json(result_path(shard), result)
    distributed.barrier("images")
    return [json.loads(result_path(shard).read_text()) for shard in shards]


def _encoded(shard, decoded, codec, batch_size, failed, error, bar) -> Iterator[ImageRecord]:
    """The shard's records; `failed` and `error` are filled on the way."""
    batch: list[tuple[str, np.ndarray, int]] = []
    for position, name in enumerate(shard.names):
        pixels, file_bytes = next(decoded)
        if isinstance(pixels, str):
            failed[name] = pixels
        else:
            batch.append((name, pixels, file_bytes))
        if len(batch) == batch_size or (batch and position == len(shard.names) - 1):
            rows = np.resize(np.arange(len(batch)), batch_size)  # one shape, one compilation, one rounding
            names = [batch[row][0] for row in rows]
            latents = codec.encode(np.stack([batch[row][1] for row in rows]), names)
            for (image_name, _, size), array in zip(batch, latents):
                difference = array - records.to_half(image_name, array).astype(np.float32)
                error[0] = max(error[0], np.abs(difference).max())
                error[1] += float(np.square(difference, dtype=np.float64).sum()) / array.shape[-1]
                yield ImageRecord(array, image_name, size)
            batch = []
        bar.update()


def _decode(source: Source, name: str, size: Size, config: PreparationConfig) -> tuple[np.ndarray | str, int]:
    """((H, W, 3) uint8, bytes of the file), or the reason why there are no pixels."""
    try:
        with source.open(name) as file:
            data = file.read()  # an error of the file system is none of the image, and ends the run
    except FileNotFoundError:
        return MISSING, 0
    try:
        return read_rgb(lambda: io.BytesIO(data), size, crop=config.fit == "crop"), len(data)
    except DAMAGE:
        return UNREADABLE, 0


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
    todo, bar = _share(jobs, lambda job: job[2], lambda job: len(job[0]), "encoding prompts", "prompt")
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
    distributed.barrier("prompts")
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


# -------------------------------------------------------------------------------------- parts


def _share(
    parts: Sequence[T], result: Callable[[T], pathlib.Path], weight: Callable[[T], int], description: str, unit: str
) -> tuple[list[T], tqdm]:
    """This process's parts that have no result yet, and a bar over its share, shown by the first process."""
    mine = [part for index, part in enumerate(parts) if index % jax.process_count() == jax.process_index()]
    todo = [part for part in mine if not result(part).exists()]
    total = sum(map(weight, mine))
    done = total - sum(map(weight, todo))
    bar = distributed.progress(total=total, initial=done, desc=description, unit=unit)
    return todo, bar
