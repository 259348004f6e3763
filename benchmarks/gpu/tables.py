"""The results of `python -m benchmarks.gpu` as tables, from the files alone."""

import json
import pathlib
import re

RESULTS = pathlib.Path(__file__).parent.parent / "results"
LABELS = {
    "score_large_batch": "score", "score_large": "score", "score_small_batch": "score", "score_small": "score",
    "gradient_large": "gradient in the latents", "ensemble_large": "ensemble of 3", "train_large": "train step, pairs",
}  # fmt: skip


def slug(name: str) -> str:
    """A machine's name as a part of a file's: "NVIDIA H100 80GB HBM3" is "nvidia_h100_80gb_hbm3"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def load() -> list[dict]:
    """The results on file, a card each."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu_*.json"))]


def all_markdown() -> str:
    """Every card's section; nothing where none was measured."""
    return "\n\n".join(map(as_markdown, load()))


def as_markdown(result: dict) -> str:
    """A table of what was timed, a line on parity, kernels, ReFL and server, and what was not measured."""
    parts = result["parts"]
    measured = {name: part for name, part in parts.items() if "not_measured" not in part}
    about = parts["device"]
    lines = [
        "| work | seconds | images a second | share of the GEMMs' rate | peak memory, GiB: here / compiled ahead | "
        "original: eager, compiled |",
        "|---|---|---|---|---|---|",
    ]
    ahead = measured.get("ahead", {}).get("needed_gib", {})
    for name, words in LABELS.items():
        if (one := measured.get(name)) is None:
            continue
        setting, seconds = one["setting"], one["seconds"]
        originals = [f"original_{setting['mode']}", f"original_{setting['mode']}_compiled"]
        theirs = [measured[other] for other in originals if other in measured and name.startswith(_timed_like(other))]
        cells = [
            f"{words}, {setting['resolution']}, batch {setting['batch']}",
            f"{seconds['median']:.4f} ({seconds['min']:.4f} to {seconds['max']:.4f})",
            f"{one['images_per_second']:.1f}",
            f"{100 * one['share_of_gemm_peak']:.0f} %",
            f"{one['peak_gib']:.1f} / " + (f"{ahead[name]:.1f}" if name in ahead else "not compiled"),
            ", ".join(f"{other['seconds']['median']:.4f} s" for other in theirs) or "not measured",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if golden := measured.get("golden"):
        lines += ["", f"Golden values, float32: largest deviation {golden['largest_float32']:.1e}."]
    for tokens, kinds in measured.get("kernels", {}).get("by_tokens", {}).items():
        shown = "; ".join(
            f"{kind} {one['forward']:.1e} and {one['gradients']:.1e}, {one['forward_ms']:.2f} and "
            f"{one['with_backward_ms']:.2f} ms"
            for kind, one in kinds.items()
        )
        lines.append(f"Attention of {tokens} tokens, deviation forward and of gradients, and time: {shown}.")
    if refl := measured.get("refl"):
        lines.append(
            f"ReFL, {refl['images']} images of {refl['resolution']}: {refl['seconds']['median']:.2f} s a step, "
            f"{refl['peak_gib']:.1f} GiB."
        )
    if served := measured.get("server"):
        lines.append(
            f"Server: {served['rows_per_second'][-1]:.1f} rows of {served['row']} a second, p99 "
            f"{served['p99_seconds']:.2f} s of {served['requests']} at once."
        )
    missing = [f"{name} ({part['not_measured']})" for name, part in parts.items() if "not_measured" in part]
    lines += [f"Not measured: {'; '.join(missing)}."] * bool(missing)
    return "\n".join([*lines, "", f"(`{result['command']}`; {about['device']}, jax {about['jax']}, {about['date']}.)"])


def _timed_like(original: str) -> str:
    """The part that does an original's work."""
    return "score_large_batch" if "score" in original else "train_large"
