"""CLIP score, PickScore, HPSv2.1 and LAION's aesthetic predictor, from their public files."""

import dataclasses
import functools
import html
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dinalrm_jax.data.images import ImageSource, read_rgb
from dinalrm_jax.devices.local import on_local_devices
from dinalrm_jax.encoders.clip_files import Loaded, load_open_clip, load_transformers
from dinalrm_jax.encoders.tokenizers import load_tokenizer
from dinalrm_jax.evaluation.judges import JudgeName
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.layers import Linear
from dinalrm_jax.model.parameters import Functional, Params, functional
from dinalrm_jax.model.tables import Row, load
from dinalrm_jax.noise import AnyArray
from dinalrm_jax.weights import torch_file
from dinalrm_jax.weights.files import resolve

HPSV2_FILE = "HPS_v2.1_compressed.pt"
TOKENIZER_FILES = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json")
FILES = ("config.json", "model*.safetensors*", *TOKENIZER_FILES)
TOKENS = 77
# Of the published head: the places of its linear layers, between which there is dropout, and how wide they are.
AESTHETIC_PLACES, AESTHETIC_WIDTHS = (0, 2, 4, 6, 7), (1024, 128, 64, 16, 1)


class AestheticHead(nnx.Module):
    """Linear layers alone (dropout is off here)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        layers: list[nnx.Module | None] = [None] * (AESTHETIC_PLACES[-1] + 1)
        for place, before, after in zip(AESTHETIC_PLACES, (width, *AESTHETIC_WIDTHS), AESTHETIC_WIDTHS):
            layers[place] = Linear(before, after, rngs=rngs)
        self.layers = nnx.List(layers)

    def __call__(self, features: jax.Array) -> jax.Array:
        """(B, width) normalised image embeddings -> (B,)."""
        for place in AESTHETIC_PLACES:
            features = self.layers[place](features)
        return features[:, 0]


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge with its weights.

    Attributes:
        kind: "clip" is `100 max(cos, 0)` (arXiv 2104.08718, without its factor of 2.5), "pickscore"
            `exp(logit_scale) cos` (arXiv 2305.01569), "hpsv2" `cos` (arXiv 2306.09341; tables of it show 100 times
            that), "aesthetic" LAION's score of about 1 to 10, of the image alone.
        score: (params, pixels, token ids) -> (B,).
        params: of the towers, and of the aesthetic head.
        tokenizer: of transformers.
    """

    kind: JudgeName
    score: Callable[[Params, AnyArray, AnyArray], jax.Array]
    params: Params
    tokenizer: Callable

    @classmethod
    def from_pretrained(
        cls,
        kind: JudgeName,
        model: str | pathlib.Path,
        head: str | pathlib.Path | None = None,
        tokenizer: str | pathlib.Path | None = None,
    ) -> "Judge":
        """Loads a judge.

        Args:
            kind: see above.
            model: a CLIP in transformers' layout, directory or hub id: openai/clip-vit-large-patch14 for "clip" and
                "aesthetic", yuvalkirstain/PickScore_v1 for "pickscore"; for "hpsv2" HPS_v2.1_compressed.pt in
                open_clip's layout, the file, a directory with it or the hub id xswu/HPSv2.
            head: of "aesthetic", sac+logos+ava1-l14-linearMSE.pth.
            tokenizer: a directory or hub id, where the model's has none (PickScore's and HPSv2's is CLIP's own,
                openai/clip-vit-large-patch14).

        Raises:
            ConfigError: a model of another kind, or without its head or tokenizer.
            WeightsError, TorchFileError, FileNotFoundError: as for other weights.
        """
        if (kind == "aesthetic") != (head is not None):
            needs = "needs its head, a file of linear layers" if head is None else "has no head"
            raise ConfigError(f"the judge {kind!r} {needs}")
        place = _hpsv2_file(model) if kind == "hpsv2" else resolve(model, FILES)
        config, module, params = _load(place)
        beside = place.parent if place.is_file() else place
        tokens = load_tokenizer(beside if tokenizer is None else resolve(tokenizer, TOKENIZER_FILES), "clip")
        top = None
        if head is not None:
            top = functional(lambda rngs: AestheticHead(config.projection_dim, rngs=rngs))
            table = (Row("layers.{}", "head.layers.{}"),)
            shapes = {f"head.{name}": shape for name, shape in top.shapes.items()}
            params |= load(torch_file.read(head), table, shapes, source=str(head))
        score = jax.jit(functools.partial(judge_score, kind, module, top))
        return cls(kind, score, on_local_devices(params, jnp.float32), tokens)

    def tokens(self, prompts: Sequence[str]) -> np.ndarray:
        """(B, 77) int32; what stands behind a prompt's end has no effect, whatever it is filled with."""
        if self.kind == "hpsv2":  # as its tokenizer; what else that mends, broken Unicode, is not mended here
            prompts = [html.unescape(html.unescape(prompt)) for prompt in prompts]
        encoded = self.tokenizer(list(prompts), padding="max_length", max_length=TOKENS, truncation=True)
        return np.asarray(encoded["input_ids"], np.int32)

    def __call__(self, prompts: Sequence[str], images: Sequence[ImageSource]) -> np.ndarray:
        """(B,) float32 of images (paths, PIL images or arrays) and a prompt each; one image at a time.

        Raises:
            ValueError: not as many prompts as images.
        """
        if len(prompts) != len(images):
            raise ValueError(f"{len(prompts)} prompts but {len(images)} images; give one prompt an image")
        scores = np.empty(len(images), np.float32)
        for place, (ids, image) in enumerate(zip(self.tokens(prompts), images)):  # which may be of many sizes
            pixels = read_rgb(image)[None].astype(np.float32) / 255
            scores[place] = self.score(self.params, pixels, ids[None])[0]
        return scores


def _hpsv2_file(model: str | pathlib.Path) -> pathlib.Path:
    file = pathlib.Path(model).expanduser()
    if not file.is_file():
        file = resolve(model, (HPSV2_FILE,)) / HPSV2_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} holds no {HPSV2_FILE}, which is what the judge 'hpsv2' reads")
    return file


def _load(place: pathlib.Path) -> Loaded:
    """A CLIP from a directory of transformers' or a file of open_clip's."""
    return load_open_clip(place, torch_file.read(place, "state_dict")) if place.is_file() else load_transformers(place)


def judge_score(kind: JudgeName, module: Functional, top: Functional | None, params: Params, pixels, ids) -> jax.Array:
    """(B,) of pixels (B, H, W, 3) in [0, 1] and token ids (B, T); `top` is the aesthetic head, under "head."."""
    own = {name: array for name, array in params.items() if not name.startswith("head.")}
    clip = module.bind(own)
    image = _unit(clip.image_features(pixels))
    if top is not None:
        return top.bind({name.removeprefix("head."): array for name, array in params.items() if name not in own})(image)
    cosine = (image * _unit(clip.text_features(ids))).sum(axis=-1)
    if kind == "clip":
        return 100 * jnp.maximum(cosine, 0)
    return jnp.exp(own["logit_scale"]) * cosine if kind == "pickscore" else cosine


def _unit(features: jax.Array) -> jax.Array:
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
