"""The public handle on a reward model and its weights."""

import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dinalrm_jax.data.images import ImageSource, read_rgb
from dinalrm_jax.encoders.load import ImageCodec, image_codec, prompt_encoder
from dinalrm_jax.evaluation.scoring import Level, ranks, score_images
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model import lora
from dinalrm_jax.model.batch import PromptEmbeds
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.execution import ExecutionConfig, Weights
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.model.quantization import holds_int8, quantized
from dinalrm_jax.model.reward import check_levels, chosen_dtype, is_trainable, jitted_score, reward_functional, store
from dinalrm_jax.noise import NoiseDraw, draw_noise, seed_key
from dinalrm_jax.preference import LossConfig
from dinalrm_jax.training.run_weights import open_checkpoint
from dinalrm_jax.weights.digest import digest
from dinalrm_jax.weights.pretrained import PretrainedModel, export_released, save_reward_model

FAR = 2.0  # times the area of every training size, or as small a part of it


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A reward model with its weights.

    Attributes:
        config: what the model is.
        params: named arrays, a pytree; what `reward_fn` takes.
        execution: how it is computed; `dataclasses.replace(model, execution=...)` changes it, but does not bring back
            digits that weights lost when they were loaded.
        base_model: where text encoders and VAE are read from when they are first used.
        likelihood: what makes probabilities of scores: what it was trained with or, where `evaluate --calibrate` fitted
            one afterwards, that; None where it is not known.
        image_sizes: (height, width) in pixels that it was trained on; empty where that is not known.
        fast_vae: TAESD3, which encodes images in the place of SD3's VAE: a directory or hub id; None: the VAE does.
    """

    config: RewardModelConfig
    params: Params = dataclasses.field(repr=False)
    execution: ExecutionConfig = ExecutionConfig()
    base_model: str | pathlib.Path | None = None
    likelihood: LossConfig | None = None
    image_sizes: tuple[tuple[int, int], ...] = ()
    fast_vae: str | pathlib.Path | None = None

    def __post_init__(self):
        if self.fast_vae is not None and self.config.encoders.kind != "sd3":
            kind = self.config.encoders.kind
            raise ConfigError(f"fast_vae stands in for SD3's VAE, but this model's encoders are {kind!r}; leave it out")
        wanted = jnp.dtype(self.execution.dtype)
        rounded = [name for name, array in self.params.items() if array.dtype.itemsize < wanted.itemsize]
        if rounded:
            dtype = self.params[rounded[0]].dtype
            raise ValueError(
                f"execution.dtype is {wanted}, but {len(rounded)} weights are held in {dtype} ({rounded[0]} is one); "
                f"load the model again with dtype={str(wanted)!r}"
            )

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | pathlib.Path,
        base_model: str | pathlib.Path | None = None,
        dtype: Weights = "auto",
        backbone: Params | None = None,
        revision: str | None = None,
        fast_vae: str | pathlib.Path | None = None,
    ) -> "RewardModel":
        """Loads a native checkpoint, one of a training run, or a released one together with its base model.

        Args:
            checkpoint: directory or hub id, native or in the released layout; or a run's WORKDIR/reward/best/STEP or
                WORKDIR/reward/checkpoints/STEP.
            base_model: directory or hub id in diffusers layout; required for the released layout. Of a
                native checkpoint, which holds its backbone, only text encoders and VAE are read from it.
            dtype: compute dtype; frozen weights are stored in it, LoRA and head in float32. "auto" is that of the
                given backbone or, without one, float32 on CPUs, which compute it as fast, and bfloat16 elsewhere.
                "int8" holds frozen matrices in int8 and computes in the latter; such a model cannot be saved.
            backbone: a whole transformer's parameters (`weights.pretrained.load_backbone`), on the device in
                `dtype`, as a policy has them. The frozen part is taken from them as it is: nothing is read or
                held twice. They must be those that the checkpoint was trained on.
            revision: of a checkpoint that is a hub id: a commit, tag or branch. (A base model is pinned by
                a directory.)
            fast_vae: encode images by TAESD3 in the place of the VAE: faster, and scores differ a little
                (docs/scoring.md).

        Raises:
            WeightsError: a missing, unknown or misshapen weight; all of them are listed.
            ConfigError: a configuration of another kind of model, or a directory's revision.
            FileNotFoundError: not a checkpoint, with what was looked for.
        """
        if dtype == "int8" and backbone is not None:
            raise ConfigError(
                "a given backbone is used as it is; int8 weights are read from a checkpoint: leave one out"
            )
        execution = ExecutionConfig(dtype=chosen_dtype(dtype, backbone))
        model = cls.loaded(open_checkpoint(checkpoint, base_model, execution, backbone, revision))
        model = dataclasses.replace(model, fast_vae=fast_vae)
        if dtype != "int8":
            return model
        return dataclasses.replace(model, params=quantized(model.params, lambda name: not is_trainable(name)))

    @classmethod
    def loaded(cls, opened: PretrainedModel) -> "RewardModel":
        """An open checkpoint with its weights read."""
        return cls(
            opened.config,
            opened.params,
            opened.execution,
            opened.base_model,
            opened.likelihood,
            opened.image_sizes,
        )

    @classmethod
    def init(cls, config: RewardModelConfig, execution: ExecutionConfig = ExecutionConfig(), seed: int = 0):
        """A model with random weights, as training starts."""
        params = reward_functional(config, execution).init(seed)
        return cls(config, store(params, execution), execution)

    def save(self, output: str | pathlib.Path, step: int | None = None) -> None:
        """Writes a native checkpoint, whole or not at all; `step` is the training step that it is of."""
        self._check_whole("saved")
        save_reward_model(output, self.config, self.params, self.likelihood, self.image_sizes, step)

    def export_released(self, output: str | pathlib.Path) -> None:
        """Writes LoRA and head in the released layout; raises ConfigError for a model that it cannot hold."""
        self._check_whole("exported")
        export_released(output, self.config, self.params, self.likelihood)

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits that name these weights, whatever layout and dtype they came in; see `weights.digest`.

        (int8 rounds weights, so a model that has it is another one.)
        """
        return digest(self.params, is_trainable)

    def reward_fn(self, sigma: float | Sequence[float] = 0.4) -> Callable[..., jax.Array]:
        """The reward as a pure function, safe under jit, grad, vmap and shard_map.

        Args:
            sigma: the noise level in [0, 1], or several for the token-level ensemble.

        Returns:
            `f(params, latents, prompt, key, noise=None) -> (B,) float32`, differentiable in
            `latents` and `params`. `latents` (B, H, W, C) are clean and scaled. A single `key` gives
            every row the same noise, so that a row's score does not depend on its batch; B keys
            give each row its own. `noise`, like latents, is used as it is and `key` is ignored. On CPUs, in
            bfloat16 and with an attention other than "xla" gradients are of our making: `jax.jvp` of the function
            does not work then; of its gradient it does in float32 without rematerialisation.
        """
        levels = check_levels(sigma)
        module, spec = reward_functional(self.config, self.execution), self.config.transformer.latents

        def reward(params: Params, latents: jax.Array, prompt: PromptEmbeds, key, noise=None) -> jax.Array:
            _check_prompt(prompt)
            spec.validate_rows(latents, prompt)
            if noise is not None and noise.shape != latents.shape:
                raise ValueError(f"noise must have the latents' shape {latents.shape}, got {noise.shape}")
            eps = draw_noise(key, latents.shape) if noise is None else noise
            return module.bind(params).score(latents, prompt, jnp.asarray(levels), eps)

        return reward

    def score_latents(
        self,
        latents: jax.typing.ArrayLike,
        prompt: PromptEmbeds,
        sigma: float | Sequence[float] = 0.4,
        noise: jax.typing.ArrayLike | None = None,
        seed: int | Sequence[int] = 0,
    ) -> np.ndarray:
        """Raw scores of clean latents.

        Args:
            latents: (B, H/8, W/8, 16), channels last, clean, scaled as the VAE's posterior sample
                is for SD3.5: `(z - shift) scale`.
            prompt: B encoded prompts.
            sigma: a noise level in [0, 1], or a sequence for the token-level ensemble.
            noise: (B, H/8, W/8, 16), used as it is; None draws it from `seed`, the same for every row.
            seed: of the noise; or B seeds, one a row. Any integer of 64 bits.

        Returns:
            (B,) float32.

        Raises:
            ValueError: a wrong shape, a level outside [0, 1], or a value that is not finite.
        """
        levels = check_levels(sigma)
        _check_prompt(prompt)
        latents, prompt = jnp.asarray(latents), jax.tree.map(jnp.asarray, prompt)
        self.config.transformer.latents.validate_rows(latents, prompt)
        self._warn_of_size((latents.shape[1], latents.shape[2]))
        if noise is not None and np.shape(noise) != latents.shape:
            raise ValueError(f"noise must have the latents' shape {latents.shape}, got {np.shape(noise)}")
        arrays = {"latents": latents, "prompt_embeds": prompt.prompt_embeds, "noise": noise}
        arrays["pooled_prompt_embeds"] = prompt.pooled_prompt_embeds
        for name, array in arrays.items():
            if array is not None and not np.isfinite(bad := np.asarray(array, np.float32)).all():
                rows = np.flatnonzero(~np.isfinite(bad).reshape(len(bad), -1).all(axis=1))
                raise ValueError(f"{name} holds NaN or infinity in rows {rows.tolist()}; scores would be meaningless")
        if np.shape(seed) not in ((), (len(latents),)):
            raise ValueError(f"{len(latents)} latents but {np.size(seed)} seeds; give one for all, or one a row")
        eps = draw_noise(seed_key(seed), latents.shape) if noise is None else jnp.asarray(noise)
        return np.asarray(jitted_score(self.config, self.execution)(self.params, latents, prompt, levels, eps))

    def _check_whole(self, what: str) -> None:
        if holds_int8(self.params):
            raise ValueError(f"int8 weights are rounded, and are not {what}; load the model with another dtype")

    def _warn_of_size(self, sides: tuple[int, int]) -> None:
        """Says where latents are far from what the model has seen: its scores of them have another scale."""
        unit = self.config.transformer.latents.downsampling
        area = unit**2 * sides[0] * sides[1]
        if self.image_sizes and all(
            max(area, height * width) > FAR * min(area, height * width) for height, width in self.image_sizes
        ):
            trained = ", ".join(f"{height}x{width}" for height, width in self.image_sizes)
            warnings.warn(
                f"latents of {unit * sides[0]}x{unit * sides[1]} pixels, but this model was trained at {trained}; its "
                "scores there have another scale",
                stacklevel=3,
            )

    def encode_prompt(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Prompts to embeddings, by this model's text encoders (`config.encoders`).

        They are loaded from `base_model` on first use and kept, in the compute dtype. Each distinct
        number of prompts compiles once.

        Raises:
            ValueError: not a list of texts.
            ConfigError, WeightsError, FileNotFoundError: no base model, or one that is not an SD3 pipeline.
        """
        _check_list("prompts", "text", prompts)
        return prompt_encoder(self.config.encoders, self.base_model, self.execution.dtype)(list(prompts))

    def encode_image(self, images: Sequence[ImageSource], size: tuple[int, int] | None = None) -> np.ndarray:
        """Images to clean, scaled latents, by this model's VAE: the mode of its posterior.

        Args:
            images: PIL images, (H, W, 3) uint8 arrays or paths; see `data.images` for what they become.
            size: (height, width) in pixels to resize to (Lanczos), multiples of 16; None: as they
                are, which must be one size for all.

        Returns:
            (B, H/8, W/8, 16) float32.

        Raises:
            ValueError: sizes that differ, or that latents cannot have; an image that cannot be read.
            ConfigError, WeightsError, FileNotFoundError: as for `encode_prompt`.
        """
        _check_list("images", "image", images)
        if size is not None and (not isinstance(size, Sequence) or len(size) != 2):
            raise ValueError(f"size must be (height, width) in pixels, got {size!r}")
        pixels = [read_rgb(image, size) for image in images]
        sizes = list(dict.fromkeys(f"{array.shape[0]}x{array.shape[1]}" for array in pixels))
        if len(sizes) > 1:
            raise ValueError(
                f"images have different sizes: {', '.join(sizes)}; give size=(height, width), or one call each"
            )
        unit = self.config.transformer.latents.unit
        if pixels[0].shape[0] % unit or pixels[0].shape[1] % unit:
            raise ValueError(f"{sizes[0]} pixels is not a multiple of {unit} on both sides; give size=(height, width)")
        return self.image_codec.encode(np.stack(pixels))

    @property
    def image_codec(self) -> ImageCodec:
        """This model's VAE, loaded on first use; errors as for `encode_prompt`."""
        if self.fast_vae is not None:
            return image_codec(dataclasses.replace(self.config.encoders, images="taesd3"), self.fast_vae)
        return image_codec(self.config.encoders, self.base_model)

    def score(
        self,
        prompts: str | Sequence[str],
        images: Sequence[ImageSource],
        sigma: float | Sequence[float] = 0.4,
        seed: int = 0,
        *,
        samples: int = 1,
        size: tuple[int, int] | None = None,
        batch_size: int = 8,
    ) -> list[float]:
        """Raw scores of images under prompts, by this model's own text encoders and VAE.

        Any number of images of any sizes: those of one size are put into batches; the order stays.

        Args:
            prompts: one an image, or one text for all.
            images: PIL images, (H, W, 3) uint8 arrays or paths.
            sigma: a noise level in [0, 1], or a sequence for the token-level ensemble.
            seed: of the noise.
            samples: average over so many draws of the noise, of `seed`, `seed + 1` ...
            size: (height, width) that all images are resized to; None: their own shape, at the area of the nearest
                training size where the model knows its own (`image_sizes`); else see `data.images.scoring_size`.
            batch_size: images in one program.

        Returns:
            One score an image, also of a single one.

        Raises:
            ValueError: not lists, or not as many prompts as images; an image that cannot be read, all of
                them named.
            ConfigError, WeightsError, FileNotFoundError: as for `encode_prompt`.
        """
        _check_list("images", "image", images)
        prompts = len(images) * [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, Sequence) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be one text, or a list of one an image, got {prompts!r}")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        draws = [NoiseDraw(seed + number, shared=True) for number in range(samples)]
        found = score_images(self, prompts, images, [cast(Level, sigma)], draws, size=size, batch_size=batch_size)
        if found.problems:
            lines = "\n  ".join(f"images[{index}]: {problem}" for index, problem in sorted(found.problems.items()))
            raise ValueError(f"{len(found.problems)} of {len(images)} images cannot be read:\n  {lines}")
        return found.scores[:, 0].mean(axis=1).tolist()

    def rank(
        self,
        prompt: str,
        images: Sequence[ImageSource],
        sigma: float | Sequence[float] = 0.4,
        seed: int = 0,
        *,
        samples: int = 1,
        size: tuple[int, int] | None = None,
        batch_size: int = 8,
    ) -> tuple[list[int], list[float]]:
        """Images of one prompt from best to worst.

        Args and errors: as for `score`.

        Returns:
            Ranks (1 is the best; equal scores share the better rank) and scores, both in the images' order.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"rank compares images of one prompt, a text; got {prompt!r}")
        scores = self.score(prompt, images, sigma, seed, samples=samples, size=size, batch_size=batch_size)
        return ranks(scores), scores

    def merge_lora(self) -> "RewardModel":
        """The same model with its adapters added into the weights: fewer products a call, no training."""
        if self.config.lora is None:
            raise ValueError("this model has no LoRA adapters to merge")
        self._check_whole("merged into")
        config = dataclasses.replace(self.config, lora=None)
        return dataclasses.replace(self, config=config, params=lora.merge(self.params, self.config.lora))


def _check_prompt(prompt: PromptEmbeds) -> None:
    if not isinstance(prompt, PromptEmbeds):
        raise TypeError(
            f"prompt must be PromptEmbeds, got {type(prompt).__name__}; encode_prompt makes them of a list of texts"
        )


def _check_list(name: str, kind: str, values: Sequence) -> None:
    if isinstance(values, (str, pathlib.Path, Image.Image)) or not len(values):
        raise ValueError(
            f"{name} must be a list of at least one {kind}, got {values!r}; for one: [{name.removesuffix('s')}]"
        )
