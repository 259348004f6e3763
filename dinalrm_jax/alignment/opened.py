"""What a config names as rewards, opened: reward models on the policy's own backbone, and judges."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dinalrm_jax.alignment.policy import POLICY, REWARD
from dinalrm_jax.alignment.rewards import JudgeReward, LatentReward, Reward, SceneRules
from dinalrm_jax.config import AlignConfig, JudgeConfig, RewardConfig
from dinalrm_jax.devices.placement import place
from dinalrm_jax.devices.sharding import WHOLE
from dinalrm_jax.disk import as_path
from dinalrm_jax.encoders.load import ImageCodec, TinyCodec
from dinalrm_jax.evaluation.judges import JudgeName
from dinalrm_jax.evaluation.judges.clip import Judge
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.model.reward import is_trainable, reward_functional
from dinalrm_jax.reward_model import RewardModel
from dinalrm_jax.training.run_weights import open_checkpoint
from dinalrm_jax.weights.digest import digest
from dinalrm_jax.weights.files import read_json

DECODER, TOKEN_IDS = "decoder.", "token_ids."  # before the names of parameters, as POLICY and REWARD


@dataclasses.dataclass(frozen=True)
class OpenedReward:
    """A reward with what it needs.

    Attributes:
        reward: as the config has it.
        params: its frozen parameters on the mesh, by their names among all of the alignment.
        model: the reward model without its arrays, and the names of its parameters; None of a judge.
        digest: of the reward model's weights.
    """

    reward: Reward
    params: Params
    model: tuple[RewardModel, Mapping[str, str]] | None = None
    digest: str | None = None

    def at(self, sigma: tuple[float, ...]) -> Reward:
        """A reward model at other levels; a judge as it is."""
        return self.reward if self.model is None else LatentReward(*self.model, sigma)


def open_rewards(
    config: AlignConfig,
    arrays: Mapping[str, np.ndarray],
    base: Params,
    codec: ImageCodec,
    prompts: Sequence[str],
    mesh: Mesh,
) -> list[OpenedReward]:
    """The rewards of a config, the one that it names first before those that are mixed in.

    Args:
        arrays: the policy's frozen arrays on the host.
        base: the same on the mesh, which are the reward models' too.
        codec: of the policy's latents.
        prompts: all, which batches name by their numbers.

    Raises:
        ConfigError: a reward of another backbone, or rules for scenes where there are none.
        WeightsError, FileNotFoundError: as for `RewardModel.from_pretrained` and `Judge.from_pretrained`.
    """
    opened = [
        _open(config, wanted, f"{REWARD}{number}.", arrays, base, codec, prompts, mesh)
        for number, wanted in enumerate((config.reward, *config.mixed))
    ]
    read = {each.model[0].config.encoders for each in opened if each.model is not None}
    if len(read) > 1:
        raise ConfigError(
            f"the reward models read prompts by different encoders, {sorted(map(str, read))}; mix like ones"
        )
    return opened


def _open(
    config: AlignConfig,
    wanted: RewardConfig,
    prefix: str,
    arrays: Mapping[str, np.ndarray],
    base: Params,
    codec: ImageCodec,
    prompts: Sequence[str],
    mesh: Mesh,
) -> OpenedReward:
    if wanted.judge is None:
        model, weights = _load_model(config, wanted.checkpoint, arrays, base)
        names = names_in(model.params, base, prefix)
        own = {name: array for name, array in model.params.items() if is_trainable(name)}
        module = reward_functional(model.config, config.execution)
        params = {names[name]: array for name, array in place(own, np.float32, module.shardings(mesh)).items()}
        params |= {names[name]: array for name, array in model.params.items() if name not in own}
        model = dataclasses.replace(model, params={})  # the placed ones are enough
        return OpenedReward(LatentReward(model, names, wanted.sigma), params, (model, names), weights)
    if wanted.judge.kind == "scenes":
        if not isinstance(codec, TinyCodec):
            raise ConfigError(f"rules read drawn scenes, which {config.base_model} does not draw; take another judge")
        return OpenedReward(SceneRules(prompts), {})
    judge, (decode, decoder) = open_judge(wanted.judge), codec.decoder()
    dtype = config.execution.dtype

    def placed(params: Params, before: str, dtype) -> Params:
        named = {f"{before}{name}": array for name, array in params.items()}
        return place(named, dtype, dict.fromkeys(named, NamedSharding(mesh, WHOLE)))

    ids = f"{TOKEN_IDS}{prefix}"
    params = placed(decoder, DECODER, dtype) | placed(judge.params, prefix, dtype)
    params |= placed({"": jnp.asarray(judge.tokens(prompts))}, ids, np.int32)
    return OpenedReward(JudgeReward(decode, judge.score, ids, DECODER, prefix, dtype), params)


def open_judge(config: JudgeConfig) -> Judge:
    """A judge with weights; see `Judge.from_pretrained` for the errors."""
    return Judge.from_pretrained(cast(JudgeName, config.kind), config.model, config.head, config.tokenizer)


def names_in(params: Params, base: Params, prefix: str) -> dict[str, str]:
    """A reward model's names to those among all of the alignment, where the policy's frozen arrays have theirs."""
    shared = {id(array): f"{POLICY}{name}" for name, array in base.items()}
    return {name: shared.get(id(array), f"{prefix}{name}") for name, array in params.items()}


def _load_model(
    config: AlignConfig, checkpoint: str, arrays: Mapping[str, np.ndarray], base: Params
) -> tuple[RewardModel, str]:
    """A reward model on the policy's arrays, and its digest, for which the host's arrays are read: all of them."""
    model = RewardModel.loaded(open_checkpoint(checkpoint, config.base_model, config.execution, base))
    own = {name: array for name, array in model.params.items() if is_trainable(name)}
    frozen = {name: arrays[name.removeprefix("backbone.")] for name in model.params.keys() - own.keys()}
    found = digest({**frozen, **own}, is_trainable)
    said = as_path(checkpoint) / "config.json"
    weights = read_json(said).get("weights") if said.is_file() else None
    if weights is not None and weights != found:
        raise ConfigError(
            f"the reward {checkpoint} was trained on another backbone than {config.base_model}: its weights have the "
            f"digest {weights}, on this one {found}; name the base model that it was trained on"
        )
    return model, found
