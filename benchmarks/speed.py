"""The speed results of record: measured into `benchmarks/results/*.json`, shown in docs/measured.md.

    python -m benchmarks.speed --measure cpu --reference PATH   # a quarter of an hour on an idle machine
    python -m benchmarks.speed

PATH is a checkout of HKUST-C4G/diffusion-rm. Each result comes from one process of `python -m dinalrm_jax.benchmark`,
whose flags are in `SETS`; `--only NAME` measures one again.
"""

import json
import pathlib
import subprocess
import sys

from absl import app, flags

from dinalrm_jax.evaluation.plots import INK, WORSE, new_figure, save

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
DOCUMENT, PLOT = HERE.parent / "docs" / "measured.md", HERE.parent / "docs" / "speed.png"
START, END = "<!-- speed: python -m benchmarks.speed -->", "<!-- end of speed -->"

# What is measured: flags of the benchmark command. The original does the same work in turn, but does not load.
SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "score_256": ("--mode=score",),
        "score_512": ("--mode=score", "--resolution=512"),
        "score_256_merged": ("--mode=score", "--merged"),
        "ensemble_256": ("--mode=ensemble",),
        "gradient_256": ("--mode=gradient", "--repeats=8"),
        "gradient_256_remat": ("--mode=gradient", "--remat=block"),
        "gradient_512_remat": ("--mode=gradient", "--resolution=512", "--remat=block", "--repeats=1"),
        "train_256": ("--mode=train", "--repeats=6"),
        "train_256_remat": ("--mode=train", "--remat=block", "--repeats=2"),
        "image_512": ("--mode=image", "--resolution=512"),
        "load": ("--mode=load", "--dtype=bfloat16"),
    },
    "intel": {
        "score_256": ("--mode=score",),
        "ensemble_256": ("--mode=ensemble",),
        "gradient_256": ("--mode=gradient", "--repeats=6"),
        "gradient_512_remat": ("--mode=gradient", "--resolution=512", "--remat=block", "--repeats=2"),
        "gradient_512_remat_attention": ("--mode=gradient", "--resolution=512", "--remat=attention", "--repeats=2"),
        "train_256": ("--mode=train", "--repeats=6"),
    },
}


def measure(machine: str, only: str | None, reference: str) -> None:
    """Runs a set, one process after another; what fails is named at the end, and the others stay."""
    failed = []
    for name, options in SETS[machine].items():
        if only not in (None, name):
            continue
        command = [sys.executable, "-m", "dinalrm_jax.benchmark", "--repeats=4", *options]
        command += [f"--reference={reference}"] * (name != "load") + [f"--output={RESULTS / f'{machine}_{name}.json'}"]
        print(f"+ {' '.join(command)}", flush=True)
        if subprocess.run(command).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


def load(machine: str) -> dict[str, dict]:
    """The results of a set that are on file, in its order."""
    paths = {name: RESULTS / f"{machine}_{name}.json" for name in SETS[machine]}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def label(setting: dict) -> str:
    """A result's work in words."""
    words = {
        "score": "score", "ensemble": "ensemble of 3", "gradient": "gradient in the latents", "train": "train step",
        "image": "VAE, pixels to latents", "text": "text encoders",
    }  # fmt: skip
    text = f"{words[setting['mode']]}, {setting['resolution']}"
    text += f", batch {setting['batch']}" * (setting["batch"] > 1)
    text += ", LoRA merged" * setting["merged"] + {
        "block": ", rematerialised",
        "attention": ", rematerialised but attention",
    }.get(setting["remat"], "")
    return text


def as_markdown(results: dict[str, dict]) -> str:
    """The table of one machine's results, a line on loading, and the conditions."""
    if not results:
        return ""
    lines = [
        "| work | here | original | its time over ours | share of the GEMMs' rate | peak memory, here / original | "
        "trace and compile |",
        "|---|---|---|---|---|---|---|",
    ]
    compared = [result for result in results.values() if "reference" in result]
    for result in compared:
        theirs = result["reference"]
        peaks = f"{_gib(result['peak_bytes'])} / {_gib(theirs['peak_bytes'])} GiB"
        in_blocks = result["gflop"]["cost_model"] is not None
        cells = [
            label(result["setting"]),
            _seconds(result["seconds"]),
            _seconds(theirs["seconds"]) + ", compiled" * theirs["compiled"],
            f"{result['ratio']:.2f}",
            f"{100 * result['share_of_gemm_peak']:.0f} %" if in_blocks else "",
            f"{peaks} ({result['peak_bytes'] / theirs['peak_bytes']:.2f})",
            f"{result['trace_seconds'] + result['compile_seconds']:.1f} s",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if loading := results.get("load"):
        lines += [
            "",
            f"Loading {loading['file_bytes'] / 1e9:.2f} GB of float32 to {loading['setting']['dtype']} takes "
            f"{_seconds(loading['seconds'])}; reading the same bytes from the page cache "
            f"{_seconds(loading['read_seconds'])}: {loading['times_reading']:.2f} times. Resident memory peaks at "
            f"{_gib(loading['peak_bytes'])} GiB, the mapped files, which the system takes back at will, among it.",
        ]
    dates = sorted({result["date"] for result in results.values()})
    machines = dict.fromkeys(
        f"jax {r['versions']['jax']} and torch {r['reference']['torch']} on {r['machine']['device']}, "
        f"{r['machine']['cores']} cores, {r['machine']['processor']}, {r['setting']['dtype']}"
        for r in compared
    )
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return "\n".join([*lines, "", f"({'; '.join(machines)}; {when}.)"])


def _seconds(spread: dict[str, float]) -> str:
    if spread["calls"] == 1:
        return f"{spread['median']:.2f} s"
    return f"{spread['median']:.2f} s ({spread['min']:.2f} to {spread['max']:.2f})"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"


def with_section(document: str, text: str) -> str:
    """The document with `text` between its two marks."""
    head, rest = document.split(START)
    return f"{head}{START}\n{text}\n{END}{rest.split(END)[1]}"


def all_markdown() -> str:
    """A table for each machine that has results."""
    return "\n\n".join(filter(None, (as_markdown(load(machine)) for machine in SETS)))


def draw(results: dict[str, dict], path: pathlib.Path) -> None:
    """Seconds and peak memory of both, side by side."""
    compared = [result for result in results.values() if "reference" in result]
    figure = new_figure(9, 0.5 + 0.42 * len(compared))
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(compared))
    for axes, unit, ours, theirs in (
        (left, "seconds a call", [r["seconds"]["median"] for r in compared],
         [r["reference"]["seconds"]["median"] for r in compared]),
        (right, "peak memory, GiB", [r["peak_bytes"] / 2**30 for r in compared],
         [r["reference"]["peak_bytes"] / 2**30 for r in compared]),
    ):  # fmt: skip
        axes.barh([place - 0.2 for place in places], ours, 0.38, color=INK, label="dinalrm_jax")
        axes.barh([place + 0.2 for place in places], theirs, 0.38, color=WORSE, alpha=0.55, label="PyTorch original")
        axes.set(xlabel=unit)
        axes.spines[["top", "right"]].set_visible(False)
    for place, result in zip(places, compared):
        for offset, seconds in ((-0.2, result["seconds"]), (0.2, result["reference"]["seconds"])):
            left.plot([seconds["min"], seconds["max"]], 2 * [place + offset], color="#999999", linewidth=1.2)
    left.set_yticks(list(places), [label(result["setting"]) for result in compared], fontsize=8)
    left.invert_yaxis()
    right.legend(frameon=False, fontsize=8)
    save(figure, path)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    values = flags.FLAGS
    if values.measure is not None:
        if values.reference is None:
            raise app.UsageError("--measure needs --reference, a checkout of HKUST-C4G/diffusion-rm")
        if values.only not in (None, *SETS[values.measure]):
            raise app.UsageError(f"--only is one of {', '.join(SETS[values.measure])}")
        measure(values.measure, values.only, values.reference)
    text = all_markdown()
    DOCUMENT.write_text(with_section(DOCUMENT.read_text(), text))
    draw(load("cpu"), PLOT)
    print(text)


if __name__ == "__main__":
    flags.DEFINE_enum("measure", None, list(SETS), "A set to measure first.")
    flags.DEFINE_string("only", None, "One result of it.")
    flags.DEFINE_string("reference", None, "A checkout of HKUST-C4G/diffusion-rm.")
    app.run(main)
