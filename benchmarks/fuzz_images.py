"""`python -m benchmarks.fuzz --mode images`: mutated pictures through preprocess's own reading, and through all of it.

Pictures of 32 to 64 pixels in the seven formats have bytes flipped, heads edited, pieces cut out, doubled or taken
from another picture. Each goes through the pass over sizes and the pass that decodes and encodes; a part of them
are written as files and preprocessed by the command. Anything but an image or a counted reason ends the program.
"""

import collections
import io
import json
import multiprocessing
import pathlib
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

from dinalrm_jax.data.config import PreparationConfig
from dinalrm_jax.data.images import FORMATS
from dinalrm_jax.data.latents import EncodedImages
from dinalrm_jax.encoders.load import TinyCodec
from dinalrm_jax.model.encoding import EncodersConfig

CONFIG = PreparationConfig(
    "hpdv3", EncodersConfig("tiny", 8), buckets=("64x64",), fit="crop", min_area=0, batch_size=1, threads=1
)
SIZE = (64, 64)
PER_TASK = 500
WORKERS = 2
PNG = b"\x89PNG\r\n\x1a\n"
HEAD = 64  # bytes, in which one mutation in three happens


def seeds() -> dict[str, list[bytes]]:
    """Good pictures of every format: colours, greys of 8 and 16 bits, palettes, transparency, EXIF, frames."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
    small = colours.resize((32, 40))
    clear = colours.copy()
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    deep = Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    frames = {"save_all": True, "append_images": [small.resize(colours.size), colours]}
    palette, grey = colours.quantize(32), colours.convert("L")
    several = {
        "PNG": [(colours, {"exif": exif}), (clear, {}), (palette, {"transparency": 3}), (deep, {}), (small, frames)],
        "JPEG": [(colours, {"exif": exif}), (grey, {}), (small, {"progressive": True}), (small.convert("CMYK"), {})],
        "WEBP": [(colours, {"exif": exif}), (clear, {"lossless": True}), (colours, frames)],
        "GIF": [(palette, {"transparency": 3}), (grey, {}), (colours, frames)],
        "BMP": [(colours, {}), (palette, {}), (grey.convert("1"), {})],
        "TIFF": [(colours, {"exif": exif, "compression": "tiff_lzw"}), (deep, {}), (small, {"compression": "jpeg"}),
                 (clear, {"compression": "tiff_adobe_deflate"}), (colours, frames)],
        "AVIF": [(colours, {"exif": exif, "speed": 10}), (clear, {"speed": 10})],
    }  # fmt: skip
    assert several.keys() == set(FORMATS)
    found = collections.defaultdict(list)
    for form, pictures in several.items():
        for picture, options in pictures:
            picture.save(buffer := io.BytesIO(), form, **options)
            found[form].append(buffer.getvalue())
    return found


def mutated(good: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """`good` with one to three changes."""
    data = bytearray(good)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(min(HEAD, len(data)) if rng.random() < 0.33 else len(data)))
        length = int(rng.integers(1, 65))
        match rng.integers(10):
            case 0 | 1 | 2:
                data[place] ^= 1 << rng.integers(8)
            case 3 | 4:
                data[place] = rng.integers(256)
            case 5:
                number = int(rng.choice([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, int(rng.integers(1 << 16))]))
                data[place : place + 4] = number.to_bytes(4, ("big", "little")[rng.integers(2)])
            case 6:
                del data[place : place + length]
            case 7:
                data[place:place] = data[place : place + length]
            case 8:
                start = int(rng.integers(len(other)))
                data[place : place + length] = other[start : start + length]
            case 9:
                del data[max(1, place) :]
        if not data:
            break
    return with_checksums(bytes(data)) if rng.random() < 0.5 else bytes(data)


def with_checksums(data: bytes) -> bytes:
    """A PNG's chunks with the checksums that belong to them, so that more than these is tested; others as they are."""
    if not data.startswith(PNG):
        return data
    out, place = bytearray(data), len(PNG)
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4])
        out[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4) if end + 4 <= len(data) else data[end:]
        place = end + 4
    return bytes(out)


def examples(task: int, count: int):
    """(format, bytes) of the mutated pictures of a task."""
    rng, good = np.random.default_rng(task), seeds()
    every = [data for some in good.values() for data in some]
    for number in range(count):
        form = FORMATS[number % len(FORMATS)]
        data = good[form][rng.integers(len(good[form]))]
        same = rng.random() < 0.5
        other = good[form][rng.integers(len(good[form]))] if same else every[rng.integers(len(every))]
        yield form, mutated(data, other, rng)


def decode_task(task: int) -> tuple[Counter, float, int]:
    """What became of a task's pictures, the seconds that the slowest took, and the process's memory afterwards."""
    counts, slowest, current = Counter(), 0.0, b""
    images = EncodedImages(lambda _: io.BytesIO(current), TinyCodec(), CONFIG)
    for form, current in examples(task, PER_TASK):  # noqa: B007  # `images` reads it
        started = time.perf_counter()
        found = images.size("")
        if not isinstance(found, str):
            height, width, _ = found
            assert height > 0 < width
            ((found, _),) = images.read([(SIZE, [""])])
        slowest = max(slowest, time.perf_counter() - started)
        if not isinstance(found, str):
            assert found.shape == (8, 8, 16) and np.isfinite(found).all()  # noqa: PT018
        counts[form, found if isinstance(found, str) else "an image"] += 1
    return counts, slowest, psutil.Process().memory_info().rss


def decode_many(count: int) -> None:
    tasks, counts, slowest, memory = -(-count // PER_TASK), Counter(), 0.0, []
    started = time.perf_counter()
    # A process that a decoder ends ends the pool, and so this program.
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        for found, seconds, rss in tqdm(pool.map(decode_task, range(tasks)), total=tasks, desc="decoding", unit="task"):
            counts += found
            slowest = max(slowest, seconds)
            memory.append(rss / 2**20)
    minutes = (time.perf_counter() - started) / 60
    print(f"decoded {counts.total()} mutated pictures with {WORKERS} processes in {minutes:.1f} minutes")
    reasons = sorted({reason for _, reason in counts})
    print(f"| format | {' | '.join(reasons)} |\n|---{'|---' * len(reasons)}|")
    for form in FORMATS:
        print(f"| {form} | " + " | ".join(str(counts[form, reason]) for reason in reasons) + " |")
    middle = len(memory) // 2
    print(
        f"the slowest took {1000 * slowest:.0f} ms; a process held {max(memory[:middle]):.0f} MiB at most in the first "
        f"half, {max(memory[middle:]):.0f} in the second"
    )


def preprocess_many(count: int) -> None:
    """Every mutated picture against a good one; each pair is kept or counted."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        root = pathlib.Path(name)
        (root / "source" / "images").mkdir(parents=True)
        (root / "source" / "images" / "good.png").write_bytes(seeds()["PNG"][0])
        with (root / "source" / "pairs.jsonl").open("w") as lines:
            for number, (form, data) in enumerate(examples(1_000_000, count)):
                path = f"images/{number:05}.{form.lower()}"
                (root / "source" / path).write_bytes(data)
                row = {"prompt": f"prompt {number % 50}", "chosen": path, "rejected": "images/good.png"}
                lines.write(json.dumps(row) + "\n")
        command = [sys.executable, "-m", "dinalrm_jax.preprocess", "--dataset=jsonl", f"--source={root / 'source'}"]
        command += [f"--output={root / 'out'}", "--encoders=tiny", "--buckets=64x64", "--fit=crop", "--min-area=0"]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(f"preprocess ended with {done.returncode}:\n{done.stderr[-3000:]}")
        manifest = json.loads((root / "out" / "manifest.json").read_text())
    kept = sum(sum(split.values()) for split in manifest["pairs"].values())
    lost = {reason: number for reason, number in manifest["left_out"].items() if reason.startswith("image ")}
    print(f"preprocessed {count} mutated files in {seconds:.0f} s: {kept} images kept, left out {lost}")
    assert kept + sum(lost.values()) == count, "an image is neither kept nor counted"
    said = done.stderr.replace("\r", "\n").splitlines()
    assert not any("PIL" in line or "Traceback" in line for line in said), done.stderr
