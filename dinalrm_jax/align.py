"""Tunes a generator with a reward model: ReFL, Flow-GRPO, Diffusion-DPO, DiffusionNFT or LPO on LoRA adapters.

    python -m dinalrm_jax.align --config configs/refl.py --config.prompts prompts.txt --workdir runs/refl

Started again with the same --workdir it goes on where it stopped. WORKDIR/policy is the result, a LoRA that
`generate --policy` and diffusers read; before_after.png and pictures.png show held-out prompts with the same noise,
curves.png and policy.json the reward at other levels than its own and what the judges say, metrics.jsonl the run.
"""

from dinalrm_jax.cli.command import answer_help, quieten_writers, run_command, tell
from dinalrm_jax.cli.options import AlignOptions

answer_help(__name__, __doc__, AlignOptions)  # before the imports that take a second

import dataclasses
import hashlib

import jax
import numpy as np
from jax.sharding import Mesh

from dinalrm_jax.alignment.dpo import best_against_worst, dpo, of_judged
from dinalrm_jax.alignment.flow_grpo import flow_grpo
from dinalrm_jax.alignment.held_out import HeldOutPrompts, report
from dinalrm_jax.alignment.lpo import lpo
from dinalrm_jax.alignment.nft import nft
from dinalrm_jax.alignment.opened import open_rewards
from dinalrm_jax.alignment.policy import POLICY, Policy, PromptStream, read_prompts
from dinalrm_jax.alignment.pretraining import StreamBesideImages, with_pretraining
from dinalrm_jax.alignment.refl import refl
from dinalrm_jax.alignment.rewards import Rewards, broken_prompt
from dinalrm_jax.cli.configs import load_align
from dinalrm_jax.config import AlignConfig
from dinalrm_jax.data.records import Records
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.devices.host_memory import keep_freed_memory
from dinalrm_jax.devices.mesh import check_batch_size, make_mesh, row_devices
from dinalrm_jax.devices.placement import place
from dinalrm_jax.devices.sharding import gather
from dinalrm_jax.disk import AnyPath, as_path, is_whole, remove
from dinalrm_jax.encoders.load import Decoder, image_codec, prompt_encoder
from dinalrm_jax.encoders.taesd3 import Preview
from dinalrm_jax.mapping import ConfigError, to_mapping
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.lora import init_adapters
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.training.checkpoint import CheckpointError
from dinalrm_jax.training.loop import fit
from dinalrm_jax.training.metrics import MetricsLog, NonFiniteLoss, read_metrics
from dinalrm_jax.training.objectives import Objective
from dinalrm_jax.training.preflight import check_fit
from dinalrm_jax.training.setup import alone
from dinalrm_jax.training.step import assemble
from dinalrm_jax.training.stopping import Stopped
from dinalrm_jax.training.stream import PairStream, Stream
from dinalrm_jax.training.workdir import check_workdir, claim_workdir
from dinalrm_jax.weights import adapter
from dinalrm_jax.weights.digest import digest
from dinalrm_jax.weights.files import fingerprint
from dinalrm_jax.weights.pretrained import open_backbone, origin_of


def run(config: AlignConfig, workdir: AnyPath) -> None:
    """Tunes one policy; on a workdir with an unfinished run it goes on there.

    Raises:
        ConfigError, WeightsError, FileNotFoundError: before anything is trained.
        Stopped: on SIGTERM or Ctrl-C, after saving.
        NonFiniteLoss: the last good checkpoint is kept.
    """
    with alone(workdir):
        check_workdir(workdir, config, {})
        mesh = make_mesh(config.mesh)
        check_batch(config, mesh)
        prompts, held_out = read_prompts(config)

        # The generator, once for the policy, its reference and the reward.
        transformer, arrays = open_backbone(config.base_model)
        origin, spec = origin_of(config.base_model), transformer.latents
        tuned = transformer_functional(transformer, config.execution, lora=config.lora)
        shardings = tuned.shardings(mesh)
        base = place(arrays, config.execution.dtype, {name: shardings[name] for name in arrays})
        if config.height % spec.unit or config.width % spec.unit:
            raise ConfigError(
                f"height and width must be multiples of {spec.unit}, got {config.height} and {config.width}"
            )
        shape = (config.height // spec.downsampling, config.width // spec.downsampling, spec.channels)
        spec.validate(np.broadcast_to(np.float32(0), (1, *shape)))
        policy = Policy(tuned, transformer_functional(transformer, config.execution), shape, origin.shift)
        frozen = {f"{POLICY}{name}": array for name, array in base.items()}
        codec = image_codec(origin.encoders, config.base_model)

        # Rewards: what trains, and the first reward model at levels that do not.
        opened = open_rewards(config, arrays, base, codec, prompts + held_out, mesh)
        for each in opened:
            frozen |= each.params
        names = ["reward", *(f"reward_{number + 2}" for number in range(len(config.mixed)))]
        weights = [config.reward.weight, *(mixed.weight for mixed in config.mixed)]
        members = {name: (each.reward, weight) for name, each, weight in zip(names, opened, weights)}
        rewards = Rewards(members, config.reward_noises, by_error=config.reference_scale == "error")
        watched = next((each for each in opened if each.model is not None), opened[0])
        model = watched.model and watched.model[0]

        # Prompts, or pairs, and the objective over them.
        encoders = origin.encoders
        if encoders.kind == "sd3":
            encoders = dataclasses.replace(encoders, text_length=config.text_length)
        encode = prompt_encoder(encoders, config.base_model, config.execution.dtype)
        read_by_reward = encoders if model is None else model.config.encoders
        encode_for_reward = prompt_encoder(read_by_reward, config.base_model, config.execution.dtype)
        tuning, collection, records = config.tuning, None, None
        objective: Objective
        asked = PromptStream(prompts, encode, encode_for_reward, tuning.batch_size, config.group, config.seed, mesh)
        stream: Stream = asked
        if config.refl is not None:
            objective = refl(policy, rewards, config.refl, config.reference_weight)
            if config.refl.pretraining is not None:
                records = Records(config.refl.pretraining)
                check_fit(records, encoders, transformer, config.base_model, ("train",))
                objective = with_pretraining(objective, policy, config.refl.pretraining_weight, tuning.sigma)
                images = PairStream("pretraining", records, tuning.batch_size, config.seed, mesh)
                stream = StreamBesideImages(asked, images)
        elif config.flow_grpo is not None:
            collection, objective = flow_grpo(policy, rewards, config.flow_grpo, config.reference_weight)
        elif config.lpo is not None:
            collection, objective = lpo(policy, rewards, config.lpo)
        elif config.nft is not None:
            collection, objective = nft(policy, rewards, config.nft, config.reference_weight, tuning.sigma)
        else:
            objective = dpo(policy, config.dpo, tuning.sigma)
            if config.dpo.records is None:
                collection, objective = best_against_worst(policy, rewards, config.dpo), of_judged(objective)
            else:
                records = Records(config.dpo.records)
                check_fit(records, encoders, transformer, config.base_model, ("train",))
                stream = PairStream("tuning", records, tuning.batch_size, config.seed, mesh)

        # Adapters, and the loop that trains everything here.
        texts = hashlib.sha256("\n".join(prompts + held_out).encode()).hexdigest()[:16]
        inputs = {"prompts": texts, "base_model": fingerprint(arrays)}
        inputs |= {name: each.digest for name, each in zip(names, opened) if each.digest is not None}
        if config.lpo is not None:
            inputs["likelihood"] = str(opened[0].model[0].likelihood)  # which may be fitted meanwhile
        inputs |= {} if records is None else {"records": records.fingerprint}
        name = claim_workdir(workdir, config, inputs)
        first = init_adapters(tuned.shapes, config.lora, config.seed)
        adapters = place(first, np.float32, {name: shardings[name] for name in first})
        adapters = {f"{POLICY}{name}": array for name, array in adapters.items()}
        drawer: Decoder = codec if config.evaluation.preview is None else Preview(config.evaluation.preview)
        watch = HeldOutPrompts(
            config, policy, frozen, opened[0].reward, watched.at(config.evaluation.sigma), held_out, len(prompts),
            encode, encode_for_reward, codec, drawer, mesh, workdir / "pictures",
        )  # fmt: skip
        before = watch.samples(adapters)
        assembled = assemble(objective, adapters, frozen, tuning, mesh, seed=config.seed, collection=collection)
        try:
            state, best = fit(
                "tuning",
                tuning,
                assembled,
                stream,
                workdir=workdir,
                open_log=lambda stage: MetricsLog(
                    workdir, stage, project=config.wandb_project, run=name, config=to_mapping(config)
                ),
                held_out=watch,
                profile=config.profile,
            )
        except NonFiniteLoss as error:
            if (said := broken_prompt(error.metrics, prompts)) is None:
                raise
            raise NonFiniteLoss(f"{said} (seed {config.seed}): {error}", error.metrics) from error

        # The result: what a judge found best, or where none watched, the last state.
        judge = watch.headline if config.evaluation.judges else None
        if judge is not None:
            state = best.restore(state)
        after, result = watch.samples(state.result), gather(state.result)
        if processes.is_first():
            named = {name.removeprefix(POLICY): array for name, array in result.items()}
            if is_whole(workdir / adapter.FOLDER):  # of fewer steps, or of this very end
                remove(workdir / adapter.FOLDER)
            adapter.save_adapter(workdir / adapter.FOLDER, config.lora, named, digest(arrays, lambda name: False))
            rows = [row for row in read_metrics(workdir, "tuning") if watch.headline in row]
            if config.lpo is not None and not any(row.get("kept") for row in read_metrics(workdir, "tuning")):
                tell("no pair was kept: lpo.threshold is above what the reward is sure of, and nothing was learned")
            print(report(workdir, held_out, before, after, rows, drawer, config.evaluation.images, judge))
        processes.barrier("policy")


def check_batch(config: AlignConfig, mesh: Mesh) -> None:
    """Raises ConfigError unless a step's prompts, and the rows of each of its updates, divide over the mesh."""
    tuning, data = config.tuning, mesh.shape["data"]
    check_batch_size("tuning.batch_size", tuning.batch_size, tuning.micro_batches, mesh)
    if tuning.batch_size % (config.group * config.updates * data):
        raise ConfigError(
            f"tuning.batch_size {tuning.batch_size} must be a multiple of group x updates x mesh.data = "
            f"{config.group} x {config.updates} x {data}: a prompt's images lie together"
        )
    rows = tuning.batch_size // (config.group if config.dpo is not None else 1) // config.updates
    unit = tuning.micro_batches * row_devices(mesh)
    if rows % unit:
        raise ConfigError(
            f"an update has {rows} rows of tuning.batch_size {tuning.batch_size}, which must be a multiple of "
            f"micro_batches x mesh.data x mesh.fsdp = {unit}"
        )


def main(options: AlignOptions) -> int:
    """The alignment that the config describes; a signal's status where one stopped it."""
    quieten_writers()
    config = load_align(options.config, options.overrides)
    workdir = as_path(options.workdir or f"runs/{config.name}")
    keep_freed_memory()
    processes.initialize(options.distributed)
    enable_compilation_cache(workdir)
    processes.say(f"{config.name}: jax {jax.__version__} on {processes.devices()}, writing to {workdir}")
    try:
        run(config, workdir)
    except Stopped as stop:
        if processes.is_first():
            tell(str(stop))
        return 128 + stop.number
    return 0


if __name__ == "__main__":
    known = (ConfigError, WeightsError, CheckpointError, NonFiniteLoss, OSError, ValueError)
    saved = "the last checkpoint is whole; start the same command again to go on"
    run_command(main, AlignOptions, errors=known, interrupted=saved, leave=processes.leave)
