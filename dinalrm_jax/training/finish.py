"""What a run leaves when it is through: its model, and its report."""

from dinalrm_jax.devices import processes
from dinalrm_jax.devices.sharding import gather
from dinalrm_jax.disk import Mirror, as_path, is_whole, move
from dinalrm_jax.encoders.load import load_image_codec
from dinalrm_jax.encoders.taesd3 import directory_of
from dinalrm_jax.evaluation.controls import BLANK, EXCHANGED, no_prompt, record_controls
from dinalrm_jax.evaluation.pairs import PairScorer, PairScores
from dinalrm_jax.evaluation.run_report import write_report
from dinalrm_jax.evaluation.scoring import Level
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.noise import NoiseDraw
from dinalrm_jax.training.checkpoint import BestCheckpoint
from dinalrm_jax.training.metrics import read_metrics
from dinalrm_jax.training.setup import Setup
from dinalrm_jax.weights.files import read_json
from dinalrm_jax.weights.pretrained import save_reward_model


def save_model(setup: Setup, params: Params, step: int) -> None:
    """Writes the model of a finished run, unless it is there; that of a shorter run keeps its step in its name."""
    directory = setup.workdir / "model"
    found = read_json(directory / "config.json").get("step") if is_whole(directory) else None
    processes.barrier("model looked for")  # before the first process moves it
    if found == step:
        return
    if found is not None:
        if processes.is_first():
            move(directory, directory.with_name(f"{directory.name}_step_{found}"))
        processes.barrier("shorter model renamed")
    whole = gather(params)
    if processes.is_first():
        save_reward_model(directory, setup.config.model, whole, setup.config.loss, setup.image_sizes, step)


def report(setup: Setup, scorer: PairScorer, params: Params, best: BestCheckpoint) -> PairScores:
    """Scores the held-out pairs at many levels, and writes what the run leaves for people."""
    config, workdir = setup.config, setup.workdir
    singles = sorted({*config.evaluation.report, config.evaluation.sigma, *config.evaluation.levels})
    levels: tuple[Level, ...] = (*singles, config.evaluation.ensemble)
    scorer.compile(params, levels)
    control, blank = scorer.with_prompts_exchanged(), no_prompt(setup.records.encoders, setup.base_model)
    total = (2 * len(levels) + (blank is not None)) * scorer.row_count()
    total += 0 if control is None else len(levels) * control.row_count()
    with processes.progress(total=total, desc="held-out pairs", unit="image") as bar:
        own, same = (NoiseDraw(config.evaluation.seed, shared) for shared in (False, True))
        scores = scorer.run(params, levels, own, bar.update)
        shared = scorer.run(params, levels, same, bar.update)
        exchanged = None if control is None else control.run(params, levels, own, bar.update)
        headline = config.evaluation.sigma
        unread = None if blank is None else scorer.with_prompt(blank).run(params, (headline,), own, bar.update)
    if processes.is_first():
        encoders, pipeline = setup.records.encoders, setup.base_model
        # A VAE or TAESD3 draws the records' images; without one there is no contact sheet.
        if encoders.images is not None:
            drawn = pipeline is not None and directory_of(pipeline) is not None
        else:
            drawn = encoders.kind != "sd3" or (pipeline is not None and (as_path(pipeline) / "vae").is_dir())
        controls = record_controls(setup.records, scorer.pairs)
        controls |= {name: one.of_pairs(headline) for name, one in ((EXCHANGED, exchanged), (BLANK, unread)) if one}
        with Mirror(workdir / "report") as directory:
            text = write_report(
                directory,
                setup.records,
                scores,
                shared,
                exchanged,
                controls=controls,
                headline=headline,
                history=read_metrics(workdir, "reward"),
                codec=load_image_codec(encoders, pipeline) if drawn else None,
                weights=read_json(workdir / "model" / "config.json")["weights"],
                best=(best.step, best.accuracy),
                note="rehearsal: the base model's weights are noise, its VAE's too" if config.rehearsal else None,
            )
        print(f"\n{text}\nmodel: {workdir / 'model'}   report and plots: {workdir / 'report'}")
    processes.barrier("report")
    return scores
