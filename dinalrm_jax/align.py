"""Tunes a generator with a reward model: ReFL or Flow-GRPO on LoRA adapters.

    python -m dinalrm_jax.align --config configs/refl.py --config.prompts prompts.txt --workdir runs/refl

Started again with the same --workdir it goes on where it stopped. WORKDIR/policy is the result, a LoRA that
`generate --policy` and diffusers read; before_after.png shows held-out prompts with the same noise, policy.json the
reward at levels that did not train, metrics.jsonl the run.
"""

from dinalrm_jax.cli.command import answer_help, quieten_writers, run_command, tell
from dinalrm_jax.cli.options import AlignOptions

answer_help(__name__, __doc__, AlignOptions)  # before the imports that take a second

import dataclasses
import hashlib
import pathlib
import shutil

import jax
import numpy as np

from dinalrm_jax.alignment.flow_grpo import flow_grpo_objective
from dinalrm_jax.alignment.held_out import HeldOutPrompts, report
from dinalrm_jax.alignment.policy import POLICY, REWARD, Policy, PromptStream, Reward, read_prompts
from dinalrm_jax.alignment.refl import refl_objective
from dinalrm_jax.cli.configs import load_align
from dinalrm_jax.config import AlignConfig
from dinalrm_jax.devices import processes
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.devices.mesh import check_batch_size, make_mesh
from dinalrm_jax.devices.placement import place
from dinalrm_jax.devices.sharding import gather
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
from dinalrm_jax.training.metrics import MetricsLog, NonFiniteLoss
from dinalrm_jax.training.run_weights import open_checkpoint
from dinalrm_jax.training.setup import alone
from dinalrm_jax.training.step import assemble
from dinalrm_jax.training.stopping import Stopped
from dinalrm_jax.training.workdir import check_workdir, claim_workdir
from dinalrm_jax.weights.adapter import save_adapter
from dinalrm_jax.weights.digest import digest
from dinalrm_jax.weights.files import fingerprint, read_json
from dinalrm_jax.weights.pretrained import open_backbone, origin_of


def run(config: AlignConfig, workdir: pathlib.Path) -> None:
    """Tunes one policy; on a workdir with an unfinished run it goes on there.

    Raises:
        ConfigError, WeightsError, FileNotFoundError: before anything is trained.
        Stopped: on SIGTERM or Ctrl-C, after saving.
        NonFiniteLoss: the last good checkpoint is kept.
    """
    with alone(workdir):
        check_workdir(workdir, config, {})
        mesh = make_mesh(config.mesh)
        group = 1 if config.flow_grpo is None else config.flow_grpo.group
        check_batch_size("tuning.batch_size", config.tuning.batch_size, config.tuning.micro_batches, mesh)
        if config.tuning.batch_size % (group * mesh.shape["data"]):
            raise ConfigError(
                f"tuning.batch_size {config.tuning.batch_size} must be a multiple of flow_grpo.group x mesh.data = "
                f"{group} x {mesh.shape['data']}: a prompt's images lie at one place along data"
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
        model = load_reward(config, base)
        module = reward_functional(model.config, config.execution)
        own = {name: array for name, array in model.params.items() if is_trainable(name)}
        held = {**model.params, **place(own, np.float32, module.shardings(mesh))}
        frozen = {f"{POLICY}{name}": array for name, array in base.items()}
        frozen |= {f"{REWARD}{name}": array for name, array in held.items()}

        # Rewards: what trains, and the same model at levels that do not.
        levels = config.reward.sigma if len(config.reward.sigma) > 1 else config.reward.sigma[0]
        reward = Reward(model.reward_fn(levels), config.reward.scale)
        watched = Reward(model.reward_fn(config.evaluation.sigma), config.reward.scale)
        if config.refl is not None:
            objective = refl_objective(policy, reward, config.refl, config.reference_weight)
        else:
            objective = flow_grpo_objective(policy, reward, config.flow_grpo, config.reference_weight)

        # Prompts, adapters, and the loop that trains everything here.
        encoders = origin.encoders
        if encoders.kind == "sd3":
            encoders = dataclasses.replace(encoders, text_length=config.text_length)
        encode = prompt_encoder(encoders, config.base_model, config.execution.dtype)
        encode_for_reward = prompt_encoder(model.config.encoders, config.base_model, config.execution.dtype)
        stream = PromptStream(prompts, encode, encode_for_reward, config.tuning.batch_size, group, config.seed, mesh)
        texts = hashlib.sha256("\n".join(prompts + held_out).encode()).hexdigest()[:16]
        name = claim_workdir(
            workdir, config, {"prompts": texts, "base_model": fingerprint(arrays), "reward": model.digest}
        )
        first = init_adapters(tuned.shapes, config.lora, config.seed)
        adapters = place(first, np.float32, {name: shardings[name] for name in first})
        adapters = {f"{POLICY}{name}": array for name, array in adapters.items()}
        watch = HeldOutPrompts(config, policy, frozen, reward, watched, held_out, encode, encode_for_reward, mesh)
        before = watch.samples(adapters)
        state, _ = fit(
            "tuning",
            config.tuning,
            assemble(objective, adapters, frozen, config.tuning, mesh, seed=config.seed),
            stream,
            workdir=workdir,
            open_log=lambda stage: MetricsLog(
                workdir, stage, project=config.wandb_project, run=name, config=to_mapping(config)
            ),
            held_out=watch,
            profile=config.profile,
        )
        after, result = watch.samples(state.result), gather(state.result)
        if processes.is_first():
            named = {name.removeprefix(POLICY): array for name, array in result.items()}
            if (workdir / "policy").exists():  # of fewer steps, or of this very end
                shutil.rmtree(workdir / "policy")
            save_adapter(workdir / "policy", config.lora, named, digest(base, lambda name: False))
            codec = image_codec(origin.encoders, config.base_model)
            print(report(workdir, held_out, before, after, codec, config.evaluation.images))
        processes.barrier("policy")


def load_reward(config: AlignConfig, base: Params) -> RewardModel:
    """The reward model on the policy's own arrays.

    Raises:
        ConfigError: one that was trained on another backbone.
        WeightsError, FileNotFoundError: as for `RewardModel.from_pretrained`.
    """
    checkpoint = config.reward.checkpoint
    model = RewardModel.loaded(open_checkpoint(checkpoint, config.base_model, config.execution, base))
    said = pathlib.Path(checkpoint) / "config.json"
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
    workdir = pathlib.Path(options.workdir or f"runs/{config.name}")
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
