"""HPDv3's path from images to a trained model on real pictures, disturbed and undisturbed.

    python -m benchmarks.rehearsal [--source ../shared/data/hpdv2_subset] [--workdir /tmp/rehearsal]

Builds an HPDv3-layout dataset of the real HPDv2 images (rankings to pairs; some files removed,
truncated, made grey, shrunk or cropped to odd aspects), then preprocesses it with a random tiny SD3
pipeline, trains configs/hpdv3.py:smoke's model on it and reports - once undisturbed, and once killed
twice with SIGKILL in preprocessing and twice in training. Compares the records, the model and the
report byte by byte and prints what was left out beside what was damaged.
"""

import filecmp
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

from absl import app, flags
from PIL import Image

from dinalrm_jax.data.sources import hpdv2
from dinalrm_jax.scenes import rehearsal

DAMAGES = ("missing", "truncated", "grey", "tiny", "odd aspect")


def build(source: pathlib.Path, target: pathlib.Path) -> Counter:
    """Writes the dataset to `target`; how many images were damaged in each way."""
    preferences = hpdv2.read(source, holdout=10).preferences
    names = sorted({name for rows in preferences.values() for row in rows for name in (row.chosen, row.rejected)})
    every = len(names) // (2 * len(DAMAGES))  # two images of each kind, spread over the prompts
    damage = {name: DAMAGES[i % len(DAMAGES)] for i, name in enumerate(names[::every][: 2 * len(DAMAGES)])}
    (target / "images").mkdir(parents=True)
    renamed = {name: f"images/{pathlib.Path(name).stem}.jpg" for name in names}
    for name in names:
        write_image(source / name, target / renamed[name], damage.get(name))
    for file, split in (("train.json", "train"), ("test.json", "eval")):
        rows = [{"prompt": row.prompt, "path1": renamed[row.chosen], "path2": renamed[row.rejected],
                 "model1": "hpdv2", "model2": "hpdv2", "choice_dist": None, "confidence": None}
                for row in preferences[split]]  # fmt: skip
        (target / file).write_text(json.dumps(rows))
    return Counter(damage.values())


def write_image(source: pathlib.Path, target: pathlib.Path, damage: str | None) -> None:
    if damage == "missing":
        return
    data = source.read_bytes()
    if damage == "truncated":
        data = data[: len(data) // 2]
    target.write_bytes(data)
    if damage not in (None, "truncated"):
        with Image.open(source) as image:
            changed = image.convert("RGB")
        if damage == "grey":
            changed = changed.convert("L")
        elif damage == "tiny":
            changed = changed.resize((60, 60))
        elif damage == "odd aspect":
            changed = changed.crop((0, 0, changed.width, changed.height // 3))
        changed.save(target)


def commands(root: pathlib.Path, name: str) -> tuple[list[str], list[str]]:
    """Preprocessing and training of the run `name`."""
    preprocess = [
        "dinalrm_jax.preprocess", "--dataset=hpdv3", f"--source={root / 'HPDv3'}", f"--output={root / name / 'data'}",
        f"--base-model={root / 'sd3'}", "--buckets=64x64,96x64,64x96", "--images-per-shard=32", "--prompts-per-shard=8",
        "--text-dtype=float32",
    ]  # fmt: skip
    train = [
        "dinalrm_jax.train", "--config=benchmarks/rehearsal_run.py", f"--workdir={root / name / 'run'}",
        f"--config.data={root / name / 'data'}", f"--config.base_model={root / 'sd3'}",
    ]  # fmt: skip
    return preprocess, train


def run_whole(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def run_and_kill(command: list[str], reached) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip
    while not reached():
        if process.poll() is not None:
            raise SystemExit(f"finished before it could be killed: {' '.join(command)}")
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def files(directory: pathlib.Path, pattern: str) -> int:
    return len(list(directory.glob(pattern)))


def logged(run: pathlib.Path, step: int) -> bool:
    path = run / "metrics.jsonl"
    lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return any(json.loads(line)["step"] >= step for line in lines)


def same(left: pathlib.Path, right: pathlib.Path) -> str:
    names = sorted(str(path.relative_to(left)) for path in left.rglob("*") if path.is_file())
    others = sorted(str(path.relative_to(right)) for path in right.rglob("*") if path.is_file())
    _, different, errors = filecmp.cmpfiles(left, right, names, shallow=False)
    if names != others or different or errors:
        return f"DIFFERENT: {different or errors or set(names) ^ set(others)}"
    return f"identical, {len(names)} files"


def main(_) -> None:
    root = pathlib.Path(flags.FLAGS.workdir)
    shutil.rmtree(root, ignore_errors=True)
    damage = build(pathlib.Path(flags.FLAGS.source), root / "HPDv3")
    rehearsal.write_pipeline(root / "sd3")
    preprocess, train = commands(root, "undisturbed")
    print(f"undisturbed: preprocess {run_whole(preprocess):.0f} s, train and report {run_whole(train):.0f} s")

    preprocess, train = commands(root, "disturbed")
    parts, run = root / "disturbed" / "data.unfinished" / "parts", root / "disturbed" / "run"
    for pattern, count in (("images-*.json", 3), ("prompts-*.json", 2)):
        run_and_kill(preprocess, lambda pattern=pattern, count=count: files(parts, pattern) >= count)
        print(f"killed preprocessing after {files(parts, 'images-*.json')} shards of images, "
              f"{files(parts, 'prompts-*.json')} of prompts")  # fmt: skip
    run_whole(preprocess)
    for step in (15, 45):
        run_and_kill(train, lambda step=step: logged(run, step))
        print(f"killed training after step {step}")
    run_whole(train)

    manifest = json.loads((root / "disturbed" / "data" / "manifest.json").read_text())
    print("damaged images: " + ", ".join(f"{count} {kind}" for kind, count in damage.items()))
    print("preprocessing counted:")
    for name, count in manifest["left_out"].items():
        print(f"{count:>6} {name}")
    print(f"pairs: {manifest['pairs']}, float16 error of latents: {manifest['images']['float16_error']}")
    for part in ("data", "run/model", "run/report"):
        print(f"{part}: {same(root / 'undisturbed' / part, root / 'disturbed' / part)}")


if __name__ == "__main__":
    flags.DEFINE_string("source", "../shared/data/hpdv2_subset", "HPDv2 directory with the real images.")
    flags.DEFINE_string("workdir", "/tmp/rehearsal", "Removed and written anew.")
    app.run(main)
