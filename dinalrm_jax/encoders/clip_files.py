"""CLIP whole from its files: a directory in transformers' layout, or a torch file in open_clip's."""

import pathlib
from collections.abc import Mapping

import numpy as np

from dinalrm_jax.encoders.clip import HIGHEST_ID, CLIPTextConfig
from dinalrm_jax.encoders.clip_pair import CLIPConfig, CLIPModel, CLIPVisionConfig
from dinalrm_jax.mapping import ConfigError, from_known
from dinalrm_jax.model.parameters import Functional, functional
from dinalrm_jax.model.tables import IDENTITY, Row, Table, WeightsError, load
from dinalrm_jax.weights.files import SafetensorsDirectory, read_json

Loaded = tuple[CLIPConfig, Functional[CLIPModel], dict[str, np.ndarray]]


def load_transformers(directory: pathlib.Path) -> Loaded:
    """A CLIP's geometry, structure and arrays; what its `config.json` leaves out is transformers' own default.

    Raises:
        ConfigError: a model of another kind.
        WeightsError, FileNotFoundError: as for other weights.
    """
    path = directory / "config.json"
    values = read_json(path)
    if "text_config" not in values or "vision_config" not in values:
        raise ConfigError(f"{directory} is a {values.get('model_type')!r}, expected a CLIP with both towers")
    config = CLIPConfig(
        from_known(CLIPTextConfig, values["text_config"], f"{path}, text_config"),
        from_known(CLIPVisionConfig, values["vision_config"], f"{path}, vision_config"),
        values.get("projection_dim", CLIPConfig.projection_dim),
    )
    module = _module(config)
    unused = r".*\.position_ids"  # buffers of older files
    tensors = SafetensorsDirectory(directory, "model")
    return config, module, load(tensors, IDENTITY, module.shapes, source=str(directory), unused=unused)


# ------------------------------------------------------------------------------------------- open_clip's layout

HEAD_WIDTHS = {"image": 80, "text": 64}  # of ViT-H-14, the one that is read here: no file says them
_BLOCK = {"ln_1": "layer_norm1", "attn.out_proj": "self_attn.out_proj", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
          "mlp.c_proj": "mlp.fc2"}  # fmt: skip
_TOWERS = {"visual.transformer.resblocks": "vision_model.encoder.layers",
           "transformer.resblocks": "text_model.encoder.layers"}  # fmt: skip
OPEN_CLIP: Table = (
    Row("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    Row("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    Row("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    Row("visual.ln_pre.{}", "vision_model.pre_layrnorm.{}"),
    Row("visual.ln_post.{}", "vision_model.post_layernorm.{}"),
    Row("visual.proj", "visual_projection.weight", np.transpose, np.transpose),
    Row("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Row("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Row("ln_final.{}", "text_model.final_layer_norm.{}"),
    Row("text_projection", "text_projection.weight", np.transpose, np.transpose),
    *(
        Row(f"{file}.{{}}.{theirs}.{kind}", f"{tower}.{{}}.{ours}.{kind}")
        for file, tower in _TOWERS.items()
        for kind in ("weight", "bias")
        for theirs, ours in _BLOCK.items()
    ),
    *(
        Row(f"{file}.{{}}.attn.in_proj_{kind}[{part}]", f"{tower}.{{}}.self_attn.{part}_proj.{kind}")
        for file, tower in _TOWERS.items()
        for kind in ("weight", "bias")
        for part in "qkv"
    ),
)


def load_open_clip(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> Loaded:
    """open_clip's ViT-H-14, of the published size or smaller.

    Args:
        path: for messages.
        state: the state dict that the file holds.

    Raises:
        WeightsError: another model; every name that does not fit is listed.
    """
    config = _open_clip_config(path, state)
    module = _module(config)
    return config, module, load(_unfused(state), OPEN_CLIP, module.shapes, source=str(path))


def _open_clip_config(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> CLIPConfig:
    """The geometry that the shapes show; the exact GELU of ViT-H-14, and its images whole, as HPSv2 takes them."""
    try:
        image_width, _, patch, _ = state["visual.conv1.weight"].shape
        places, _ = state["visual.positional_embedding"].shape
        _, projection = state["visual.proj"].shape
        vocabulary, text_width = state["token_embedding.weight"].shape
        length, _ = state["positional_embedding"].shape
        inner = {tower: state[f"{tower}.0.mlp.c_fc.weight"].shape[0] for tower in _TOWERS}
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path} is no CLIP in open_clip's layout: {error}") from None
    widths = {"image": image_width, "text": text_width}
    if odd := [tower for tower, width in widths.items() if width % HEAD_WIDTHS[tower]]:
        found = ", ".join(f"its {tower} tower is {widths[tower]} wide" for tower in odd)
        raise WeightsError(f"{path} is no ViT-H-14 of open_clip, whose heads are 80 and 64 wide: {found}")
    heads = {tower: width // HEAD_WIDTHS[tower] for tower, width in widths.items()}
    image, text = (
        {"intermediate_size": inner[tower], "num_hidden_layers": _blocks(state, tower), "hidden_act": "gelu"}
        for tower in _TOWERS
    )
    vision = CLIPVisionConfig(
        image_width, num_attention_heads=heads["image"], image_size=patch * round((places - 1) ** 0.5),
        patch_size=patch, **image,
    )  # fmt: skip
    return CLIPConfig(
        CLIPTextConfig(
            vocabulary, text_width, projection_dim=projection, num_attention_heads=heads["text"],
            max_position_embeddings=length, eos_token_id=HIGHEST_ID, **text,
        ),
        vision,
        projection,
        fit="pad",
    )  # fmt: skip


def _blocks(state: Mapping[str, np.ndarray], tower: str) -> int:
    return len({name.removeprefix(f"{tower}.").partition(".")[0] for name in state if name.startswith(f"{tower}.")})


def _unfused(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With `in_proj_weight` and `in_proj_bias` in their three parts."""
    parts = {}
    for name, array in state.items():
        if name.endswith((".attn.in_proj_weight", ".attn.in_proj_bias")) and array.ndim and not len(array) % 3:
            parts |= {f"{name}[{part}]": third for part, third in zip("qkv", np.split(array, 3))}
        else:
            parts[name] = array
    return parts


def _module(config: CLIPConfig) -> Functional[CLIPModel]:
    return functional(lambda rngs: CLIPModel(config, rngs=rngs))
