"""Tunes a generator with a reward model: ReFL, Flow-GRPO, Diffusion-DPO or DiffusionNFT on LoRA adapters.

    python -m dinalrm_jax.align --config configs/refl.py --config.prompts prompts.txt --workdir runs/refl

Started again with the same --workdir it goes on where it stopped. WORKDIR/policy is the result, a LoRA that
`generate --policy` and diffusers read; before_after.png and pictures.png show held-out prompts with the same noise,
curves.png and policy.json the reward at levels that did not train and what the judges say, metrics.jsonl the run.
"""

from dinalrm_jax.cli.command import answer_help, quieten_writers, run_command, tell
from dinalrm_jax.cli.options import AlignOptions

answer_help(__name__, __doc__, AlignOptions)  # before the imports that take a second

import dataclasses
import hashlib
from collections.abc import Sequence

import jax
import numpy as np

from dinalrm_jax.alignment.dpo import best_against_worst, dpo
from dinalrm_jax.alignment.flow_grpo import flow_grpo
from dinalrm_jax.alignment.held_out import HeldOutPrompts, report
from dinalrm_jax.alignment.nft import nft
from dinalrm_jax.alignment.policy import POLICY, REWARD, Policy, PromptStream, read_prompts
from dinalrm_jax.alignment.refl import refl
from dinalrm_jax.alignment.rewards import LatentReward, Reward, Rewards, SceneRules
from dinalrm_jax.cli.configs import load_align
from dinalrm_jax.config import AlignConfig
from dinalrm_jax.data.records import Records
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.devices.mesh import check_batch_size, make_mesh
from dinalrm_jax.devices.placement import place
from dinalrm_jax.devices.sharding import gather
from dinalrm_jax.disk import AnyPath, as_path, is_whole, remove
from dinalrm_jax.encoders.load import image_codec, prompt_encoder
from dinalrm_jax.mapping import ConfigError, to_mapping
from dinalrm_jax.model.backbone.family import transformer_functional
from dinalrm_jax.model.lora import init_adapters
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.training.checkpoint import CheckpointError
from dinalrm_jax.training.loop import fit
from dinalrm_jax.training.metrics import MetricsLog, NonFiniteLoss, read_metrics
from dinalrm_jax.training.objectives import Objective
from dinalrm_jax.training.run_weights import open_checkpoint
from dinalrm_jax.training.setup import alone
from dinalrm_jax.training.step import assemble
from dinalrm_jax.training.stopping import Stopped
from dinalrm_jax.training.stream import PairStream, Stream
from dinalrm_jax.training.workdir import check_workdir, claim_workdir
from dinalrm_jax.weights.adapter import save_adapter
from dinalrm_jax.weights.digest import digest
from dinalrm_jax.weights.files import fingerprint, read_json
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
        check_batch_size("tuning.batch_size", config.tuning.batch_size, config.tuning.micro_batches, mesh)
        parts = config.group * config.updates * mesh.shape["data"]
        if config.tuning.batch_size % parts:
            raise ConfigError(
                f"tuning.batch_size {config.tuning.batch_size} must be a multiple of group x updates x mesh.data = "
                f"{config.group} x {config.updates} x {mesh.shape['data']}: a prompt's images lie together"
            )
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
        wanted_rewards = (config.reward, *config.mixed)
        models = [
            None if wanted.checkpoint is None else load_reward(config, wanted.checkpoint, base)
            for wanted in wanted_rewards
        ]
        for model in filter(None, models):
            module = reward_functional(model.config, config.execution)
            own = {name: array for name, array in model.params.items() if is_trainable(name)}
            held = {**model.params, **place(own, np.float32, module.shardings(mesh))}
            frozen |= {f"{prefix_of(model, models)}{name}": array for name, array in held.items()}

        # Rewards: what trains, and the first reward model at levels that do not.
        members: dict[str, tuple[Reward, float]] = {}
        for number, (wanted, model) in enumerate(zip(wanted_rewards, models)):
            reward = SceneRules(prompts) if model is None else latent_reward(model, wanted.sigma, models)
            members[f"reward_{number + 1}" if number else "reward"] = reward, wanted.weight
        rewards = Rewards(members)
        trained_on, _ = members["reward"]
        watched: Reward = SceneRules(held_out)
        if isinstance(trained_on, SceneRules):
            trained_on = watched  # of the held-out captions, whose numbers are others
        model = next(filter(None, models), None)
        if model is not None:
            watched = latent_reward(model, config.evaluation.sigma, models)

        # Prompts, or pairs, and the objective over them.
        encoders = origin.encoders
        if encoders.kind == "sd3":
            encoders = dataclasses.replace(encoders, text_length=config.text_length)
        encode = prompt_encoder(encoders, config.base_model, config.execution.dtype)
        read_by_reward = encoders if model is None else model.config.encoders
        encode_for_reward = prompt_encoder(read_by_reward, config.base_model, config.execution.dtype)
        tuning, collection = config.tuning, None
        objective: Objective
        stream: Stream = PromptStream(
            prompts, encode, encode_for_reward, tuning.batch_size, config.group, config.seed, mesh
        )
        if config.refl is not None:
            objective = refl(policy, rewards, config.refl, config.reference_weight)
        elif config.flow_grpo is not None:
            collection, objective = flow_grpo(policy, rewards, config.flow_grpo, config.reference_weight)
        elif config.nft is not None:
            collection, objective = nft(policy, rewards, config.nft, config.reference_weight, tuning.sigma)
        else:
            objective = dpo(policy, config.dpo, tuning.sigma)
            if config.dpo.records is None:
                collection = best_against_worst(policy, rewards, config.dpo)
            else:
                records = Records(config.dpo.records)
                stream = PairStream("tuning", records, tuning.batch_size, config.seed, mesh)

        # Adapters, and the loop that trains everything here.
        texts = hashlib.sha256("\n".join(prompts + held_out).encode()).hexdigest()[:16]
        inputs = {"prompts": texts, "base_model": fingerprint(arrays)}
        inputs |= {name: model.digest for name, model in zip(members, models) if model is not None}
        name = claim_workdir(workdir, config, inputs)
        first = init_adapters(tuned.shapes, config.lora, config.seed)
        adapters = place(first, np.float32, {name: shardings[name] for name in first})
        adapters = {f"{POLICY}{name}": array for name, array in adapters.items()}
        codec = image_codec(origin.encoders, config.base_model)
        watch = HeldOutPrompts(
            config, policy, frozen, trained_on, watched, held_out, encode, encode_for_reward, codec, mesh,
            workdir / "pictures",
        )  # fmt: skip
        before = watch.samples(adapters)
        assembled = assemble(objective, adapters, frozen, tuning, mesh, seed=config.seed, collection=collection)
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

        # The result: what a judge found best, or where none watched, the last state.
        judge = watch.headline if config.evaluation.judges else None
        if judge is not None:
            state = best.restore(state)
        after, result = watch.samples(state.result), gather(state.result)
        if processes.is_first():
            named = {name.removeprefix(POLICY): array for name, array in result.items()}
            if is_whole(workdir / "policy"):  # of fewer steps, or of this very end
                remove(workdir / "policy")
            save_adapter(workdir / "policy", config.lora, named, digest(base, lambda name: False))
            rows = [row for row in read_metrics(workdir, "tuning") if watch.headline in row]
            print(report(workdir, held_out, before, after, rows, codec, config.evaluation.images, judge))
        processes.barrier("policy")


def prefix_of(model: RewardModel, models: Sequence[RewardModel | None]) -> str:
    """Before the names of this reward model's parameters, which lie in one dict with the policy's."""
    return f"{REWARD}{[each is model for each in models].index(True)}."


def latent_reward(model: RewardModel, sigma: tuple[float, ...], models: Sequence[RewardModel | None]) -> LatentReward:
    """A reward model at one level, or at an ensemble of several."""
    return LatentReward(model.reward_fn(sigma if len(sigma) > 1 else sigma[0]), prefix_of(model, models))


def load_reward(config: AlignConfig, checkpoint: str, base: Params) -> RewardModel:
    """A reward model on the policy's own arrays.

    Raises:
        ConfigError: one that was trained on another backbone.
        WeightsError, FileNotFoundError: as for `RewardModel.from_pretrained`.
    """
    model = RewardModel.loaded(open_checkpoint(checkpoint, config.base_model, config.execution, base))
    said = as_path(checkpoint) / "config.json"
    weights = read_json(said).get("weights") if said.is_file() else None
    if weights is not None and weights != model.digest:
        raise ConfigError(
            f"the reward {checkpoint} was trained on another backbone than {config.base_model}: its weights have the "
            f"digest {weights}, on this one {model.digest}; name the base model that it was trained on"
        )
    return model


def main(options: AlignOptions) -> int:
    """The alignment that the config describes; a signal's status where one stopped it."""
    quieten_writers()
    enable_compilation_cache()
    config = load_align(options.config, options.overrides)
    workdir = as_path(options.workdir or f"runs/{config.name}")
    processes.initialize(options.distributed)
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
