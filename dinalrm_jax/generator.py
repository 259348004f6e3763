"""The handle on a generator: prompts to latents and images."""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dinalrm_jax import sampling
from dinalrm_jax.devices.local import split_locally
from dinalrm_jax.encoders.load import (
    ImageCodec,
    PromptEncoder,
    forget_prompt_encoder,
    image_codec,
    prompt_encoder,
)
from dinalrm_jax.evaluation.scoring import padded
from dinalrm_jax.model.backbone.family import BackboneConfig, transformer_functional
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.execution import DtypeOrAuto, ExecutionConfig
from dinalrm_jax.model.lora import merge
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.model.reward import chosen_dtype
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.noise import NoiseDraw, draw_noise, timestep
from dinalrm_jax.weights.adapter import load_adapter
from dinalrm_jax.weights.digest import digest
from dinalrm_jax.weights.pretrained import Origin, load_backbone, origin_of

TEXT_LENGTH = 256  # T5 tokens, as diffusers has it


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A flow-matching generator with its text encoders and VAE.

    Attributes:
        config: the transformer's geometry.
        params: of the whole transformer, a policy's adapters added in.
        execution: how it is computed.
        base_model: directory or hub id that encoders and VAE are read from, on first use.
        origin: the encoders, and the schedule, that the transformer was trained with.
    """

    config: BackboneConfig
    params: Params
    execution: ExecutionConfig
    base_model: str
    origin: Origin

    @classmethod
    def from_pretrained(
        cls,
        base_model: str | pathlib.Path,
        policy: str | pathlib.Path | None = None,
        dtype: DtypeOrAuto = "auto",
    ) -> "Generator":
        """Loads a transformer and, where one is given, adds a policy's adapters to it.

        Args:
            base_model: directory or hub id in diffusers layout, or a native backbone (WORKDIR/generator/backbone).
            policy: what `align` tuned, its workdir; or a LoRA in PEFT's or diffusers' layout, a directory or file.
            dtype: compute dtype; "auto" is float32 on CPUs and bfloat16 elsewhere.

        Raises:
            WeightsError: weights or a LoRA of another geometry, or a LoRA of another backbone.
            ConfigError: another kind of model.
            FileNotFoundError: no such directory.
        """
        execution = ExecutionConfig(dtype=chosen_dtype(dtype))
        config, params = load_backbone(base_model, execution)
        if policy is not None:
            lora, adapters, backbone = load_adapter(policy, config)
            if backbone is not None and backbone != digest(params, lambda name: False):
                raise WeightsError(
                    f"the LoRA {policy} was trained on a backbone with the digest {backbone}, {base_model} has "
                    f"{digest(params, lambda name: False)}; name the base model that it belongs to"
                )
            params = merge({**params, **jax.tree.map(jnp.asarray, adapters)}, lora)
        return cls(config, params, execution, str(base_model), origin_of(base_model))

    def sample(
        self,
        prompts: Sequence[str],
        size: tuple[int, int] | None = None,
        steps: int = 28,
        guidance: float = 4.5,
        seed: int = 0,
        noise: np.ndarray | None = None,
        negative_prompts: str | Sequence[str] | None = None,
        text_length: int | None = None,
        *,
        numbers: Sequence[int] | None = None,
        batch_size: int = 4,
        keep_encoders: bool = True,
        progress: Callable[[int], object] = lambda count: None,
    ) -> np.ndarray:
        """Clean latents by Euler's method with classifier-free guidance.

        An image depends on its prompt, the seed and how often the prompt stood before it, not on its batch.

        Args:
            prompts: B texts.
            size: (height, width) in pixels; 512 x 512, or the largest that the backbone was trained for, where it is
                not given.
            steps: of the schedule that the backbone was trained with.
            guidance: at most 1 for none, which takes half the time.
            seed: of the initial noise.
            noise: (B, H/8, W/8, C) initial latents, used as they are; `seed` is ignored.
            negative_prompts: one text, or one a prompt; the empty one where none is given.
            text_length: T5 tokens; 256, or what the backbone was trained with, where it is not given.
            numbers: of the images among those of their prompt, where these prompts are a part of more.
            batch_size: images in one program.
            keep_encoders: whether the text encoders stay loaded for the next call. All prompts are encoded before the
                first image; SD3's encoders take 10 GiB in bfloat16, which sampling then may have.
            progress: called with the number of images after every batch.

        Returns:
            (B, H/8, W/8, C) float32 clean, scaled latents, what `RewardModel.score_latents` takes.

        Raises:
            ValueError: no prompts, not as many negative prompts, guidance that ignores them, or a size or noise that
                the backbone cannot take.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}")
        if isinstance(negative_prompts, str) or negative_prompts is None:
            negative_prompts = len(prompts) * [negative_prompts or ""]
        if len(negative_prompts) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(negative_prompts)} negative prompts; give one for all")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not guidance >= 0 or (guidance <= 1 and any(negative_prompts)):
            raise ValueError(f"guidance is a number from 0 on, and above 1 for negative prompts, got {guidance}")
        shape = self._latent_shape(size) if noise is None else np.shape(noise)[1:]
        if noise is not None and len(noise) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but initial noise for {len(noise)}")
        self.config.latents.validate(np.broadcast_to(np.float32(0), (len(prompts), *shape)))
        texts = [*prompts, *(negative_prompts if guidance > 1 else ())]
        encoded = self._encoded(texts, text_length, batch_size)
        if not keep_encoders:
            forget_prompt_encoder()
        numbers = numbered(prompts) if numbers is None else numbers
        keys = NoiseDraw(seed).keys([f"{prompt}\0{number}" for prompt, number in zip(prompts, numbers, strict=True)])
        sample = sampler(self.config, self.execution, float(guidance))
        sigmas = sampling.schedule(steps, self.origin.shift)
        found = []
        for start in range(0, len(prompts), batch_size):
            rows = padded(np.arange(start, min(start + batch_size, len(prompts))), batch_size)
            embeds = _stacked(encoded[prompts[row]] for row in rows)
            negative = _stacked(encoded[negative_prompts[row]] for row in rows) if guidance > 1 else embeds
            begin = (
                draw_noise(keys[rows], (len(rows), *shape)) if noise is None else np.asarray(noise, np.float32)[rows]
            )
            latents = np.asarray(sample(self.params, *split_locally((begin, embeds, negative)), sigmas))
            count = min(batch_size, len(prompts) - start)
            found.append(latents[:count])
            progress(count)
        return np.concatenate(found)

    def decode(self, latents: np.ndarray, batch_size: int = 4) -> np.ndarray:
        """(B, H/8, W/8, C) clean, scaled latents -> (B, H, W, 3) uint8 by the VAE."""
        codec = self.image_codec
        parts = [codec.decode(latents[start : start + batch_size]) for start in range(0, len(latents), batch_size)]
        return np.concatenate(parts)

    def generate(
        self,
        prompts: Sequence[str],
        size: tuple[int, int] | None = None,
        steps: int = 28,
        guidance: float = 4.5,
        seed: int = 0,
        negative_prompts: str | Sequence[str] | None = None,
        *,
        batch_size: int = 4,
    ) -> np.ndarray:
        """Images, (B, H, W, 3) uint8: `sample`, then `decode`; arguments and errors as for `sample`."""
        latents = self.sample(
            prompts, size, steps, guidance, seed, negative_prompts=negative_prompts, batch_size=batch_size
        )
        return self.decode(latents, batch_size)

    @property
    def image_codec(self) -> ImageCodec:
        """The VAE, loaded on first use."""
        return image_codec(self.origin.encoders, self.base_model)

    def cut_prompts(self, prompts: Sequence[str], text_length: int | None = None) -> list[int]:
        """Which prompts are longer than the encoders read: what is beyond has no effect."""
        return self._prompt_encoder(text_length).longer(prompts)

    def _encoded(self, texts: Sequence[str], text_length: int | None, batch_size: int) -> dict[str, PromptEmbeds]:
        """Every text's embeddings on the host."""
        distinct, encode, found = list(dict.fromkeys(texts)), self._prompt_encoder(text_length), {}
        for start in range(0, len(distinct), batch_size):
            some = distinct[start : start + batch_size]
            rows = padded(np.arange(len(some)), batch_size)
            embeds = jax.tree.map(np.asarray, encode([some[row] for row in rows]))
            found |= {text: embeds[row] for row, text in enumerate(some)}
        return found

    def _prompt_encoder(self, text_length: int | None) -> PromptEncoder:
        encoders = self.origin.encoders
        if text_length is not None:
            encoders = dataclasses.replace(encoders, text_length=text_length)
        return prompt_encoder(encoders, self.base_model, self.execution.dtype)

    def _latent_shape(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        spec = self.config.latents
        if size is None:
            side = min(512, spec.downsampling * spec.trained_side)
            size = (side, side)
        if len(size) != 2 or any(side < spec.unit or side % spec.unit for side in size):
            raise ValueError(f"size must be (height, width) in positive multiples of {spec.unit} pixels, got {size!r}")
        return size[0] // spec.downsampling, size[1] // spec.downsampling, spec.channels


def _stacked(rows: Iterable[PromptEmbeds]) -> PromptEmbeds:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)


def numbered(prompts: Sequence[str]) -> list[int]:
    """How often each prompt stood before."""
    seen: collections.Counter[str] = collections.Counter()
    numbers = []
    for prompt in prompts:
        numbers.append(seen[prompt])
        seen[prompt] += 1
    return numbers


@functools.lru_cache(maxsize=8)
def sampler(config: BackboneConfig, execution: ExecutionConfig, guidance: float):
    """The jitted (params, noise, prompt, negative prompt, sigmas) -> clean latents."""
    transformer = transformer_functional(config, execution)

    def sample(params, noise, prompt, negative, sigmas):
        module = transformer.bind(params)

        def velocity(latents, sigma, prompt):
            return module.velocity(latents, timestep(sigma), prompt)

        return sampling.rollout(sampling.guided(velocity, prompt, negative, guidance), noise, sigmas).latents

    return jax.jit(sample)
