"""CLIP score, PickScore and LAION's aesthetic predictor, from their public files."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dinalrm_jax.data.images import ImageSource, read_rgb
from dinalrm_jax.devices.local import on_local_devices
from dinalrm_jax.encoders.clip import CLIPTextConfig
from dinalrm_jax.encoders.clip_pair import CLIPConfig, CLIPModel, CLIPVisionConfig
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.layers import Linear
from dinalrm_jax.model.parameters import Functional, Params, functional
from dinalrm_jax.model.tables import IDENTITY, Row, load
from dinalrm_jax.noise import AnyArray
from dinalrm_jax.weights import torch_file
from dinalrm_jax.weights.files import SafetensorsDirectory, read_json, resolve

Kind = Literal["clip", "pickscore", "aesthetic"]
FILES = ("config.json", "model.safetensors", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json")
AESTHETIC_WIDTHS = (1024, 128, 64, 16, 1)


class AestheticHead(nnx.Module):
    """Linear layers alone (the published one has dropout between them, which is off here)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        layers: list[nnx.Module | None] = [None] * 8
        for place, (before, after) in zip((0, 2, 4, 6, 7), zip((width, *AESTHETIC_WIDTHS), AESTHETIC_WIDTHS)):
            layers[place] = Linear(before, after, rngs=rngs)
        self.layers = nnx.List(layers)

    def __call__(self, features: jax.Array) -> jax.Array:
        """(B, width) normalised image embeddings -> (B,)."""
        for place in (0, 2, 4, 6, 7):
            features = self.layers[place](features)
        return features[:, 0]


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge with its weights.

    Attributes:
        kind: "clip" is `100 max(cos, 0)` (arXiv 2104.08718, without its factor of 2.5), "pickscore"
            `exp(logit_scale) cos` (arXiv 2305.01569), "aesthetic" LAION's score of about 1 to 10, of the image alone.
        score: (params, pixels, token ids) -> (B,).
        params: of the towers, and of the aesthetic head.
        tokenizer: of transformers.
    """

    kind: Kind
    score: Callable[[Params, AnyArray, AnyArray], jax.Array]
    params: Params
    tokenizer: Callable

    @classmethod
    def from_pretrained(
        cls,
        kind: Kind,
        model: str | pathlib.Path,
        head: str | pathlib.Path | None = None,
        tokenizer: str | pathlib.Path | None = None,
    ) -> "Judge":
        """Loads a judge.

        Args:
            kind: see above.
            model: a CLIP in transformers' layout, directory or hub id: openai/clip-vit-large-patch14 for "clip" and
                "aesthetic", yuvalkirstain/PickScore_v1 for "pickscore".
            head: of "aesthetic", sac+logos+ava1-l14-linearMSE.pth.
            tokenizer: a directory or hub id, where the model's has none (PickScore's is CLIP's own).

        Raises:
            ConfigError: a model of another kind, or without its head or tokenizer.
            WeightsError, FileNotFoundError: as for other weights.
        """
        if (kind == "aesthetic") != (head is not None):
            needs = "needs its head, a file of linear layers" if head is None else "has no head"
            raise ConfigError(f"the judge {kind!r} {needs}")
        directory = resolve(model, FILES)
        config = read_config(directory)
        module = functional(lambda rngs: CLIPModel(config, rngs=rngs))
        unused = r".*\.position_ids"  # buffers of older files
        params = load(
            SafetensorsDirectory(directory, "model"), IDENTITY, module.shapes, source=str(directory), unused=unused
        )
        top = None
        if head is not None:
            top = functional(lambda rngs: AestheticHead(config.projection_dim, rngs=rngs))
            table = (Row("layers.{}", "head.layers.{}"),)
            shapes = {f"head.{name}": shape for name, shape in top.shapes.items()}
            params |= load(torch_file.read(head), table, shapes, source=str(head))
        score = jax.jit(functools.partial(_score, kind, module, top))
        return cls(kind, score, on_local_devices(params, jnp.float32), _tokenizer(tokenizer or directory))

    def __call__(self, prompts: Sequence[str], images: Sequence[ImageSource]) -> np.ndarray:
        """(B,) float32 of images (paths, PIL images or arrays) and a prompt each; one image at a time.

        Raises:
            ValueError: not as many prompts as images.
        """
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts but {len(images)} images; give one prompt an image")
        ids = self.tokenizer(list(prompts), padding="max_length", max_length=77, truncation=True)["input_ids"]
        scores = np.empty(len(images), np.float32)
        for place, image in enumerate(images):  # which may be of many sizes
            pixels = read_rgb(image)[None].astype(np.float32) / 255
            scores[place] = self.score(self.params, pixels, np.asarray(ids[place : place + 1], np.int32))[0]
        return scores


def read_config(directory: pathlib.Path) -> CLIPConfig:
    """A CLIP's geometry in transformers' `config.json`; what it leaves out is transformers' own default."""
    values = read_json(directory / "config.json")
    if "text_config" not in values or "vision_config" not in values:
        raise ConfigError(f"{directory} is a {values.get('model_type')!r}, expected a CLIP with both towers")

    def tower(cls, section):
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in section.items() if key in known})

    return CLIPConfig(
        tower(CLIPTextConfig, values["text_config"]),
        tower(CLIPVisionConfig, values["vision_config"]),
        values.get("projection_dim", CLIPConfig.projection_dim),
    )


def _score(kind: Kind, module: Functional, top: Functional | None, params: Params, pixels, ids) -> jax.Array:
    own = {name: array for name, array in params.items() if not name.startswith("head.")}
    clip = module.bind(own)
    image = _unit(clip.image_features(pixels))
    if top is not None:
        return top.bind({name.removeprefix("head."): array for name, array in params.items() if name not in own})(image)
    cosine = (image * _unit(clip.text_features(ids))).sum(axis=-1)
    return 100 * jnp.maximum(cosine, 0) if kind == "clip" else jnp.exp(own["logit_scale"]) * cosine


def _unit(features: jax.Array) -> jax.Array:
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def _tokenizer(source: str | pathlib.Path) -> Callable:
    from transformers import CLIPTokenizer  # slow to import

    directory = resolve(source, FILES)
    try:
        return CLIPTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{directory} holds no CLIP tokenizer; name one with tokenizer=...: {error}") from error
