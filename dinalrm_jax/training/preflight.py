"""What is checked before a run computes anything."""

from collections.abc import Sequence

from jax.sharding import Mesh

from dinalrm_jax import noise
from dinalrm_jax.config import TrainConfig
from dinalrm_jax.data.mixture import AnyRecords
from dinalrm_jax.data.records import RecordsError
from dinalrm_jax.devices.mesh import check_batch_size
from dinalrm_jax.disk import as_path, local_copy
from dinalrm_jax.encoders.pipeline import vae_fingerprint
from dinalrm_jax.encoders.taesd3 import directory_of, taesd3_fingerprint
from dinalrm_jax.mapping import from_mapping, to_mapping
from dinalrm_jax.model.backbone.family import BackboneConfig
from dinalrm_jax.model.encoding import EncodersConfig
from dinalrm_jax.model.reward import reward_functional
from dinalrm_jax.scenes.config import ScenesConfig


def check_stages(config: TrainConfig, mesh: Mesh) -> None:
    """Raises ConfigError for a model or stage that cannot run on this mesh, or samples levels that do not exist."""
    for name, stage in (("generator", config.generator), ("reward", config.reward)):
        if stage is not None:
            check_batch_size(f"{name}.batch_size", stage.batch_size, stage.micro_batches, mesh)
            noise.sampler(stage.sigma)
    check_batch_size("evaluation.batch_size", config.evaluation.batch_size, 1, mesh)
    reward_functional(config.model, config.execution).shardings(mesh)


def check_records(records: AnyRecords, config: TrainConfig, base_model: str | None) -> None:
    """Raises RecordsError unless a run can train on these records; see `check_fit`."""
    scenes = records.manifest.get("source", {}).get("scenes")
    if config.scenes is not None and (scenes is None or from_mapping(ScenesConfig, scenes) != config.scenes):
        raise RecordsError(
            f"{records.directory} holds other scenes than the config asks for: {scenes} there, "
            f"{to_mapping(config.scenes)} here; remove it, or choose another `data`"
        )
    for name, stage in (("generator", config.generator), ("reward", config.reward)):
        if stage is not None and len(records.pairs("train")) < stage.batch_size:
            raise RecordsError(
                f"{records.directory} has {len(records.pairs('train'))} training pairs, a batch of the {name} stage "
                f"takes {stage.batch_size}; set {name}.batch_size (--config.{name}.batch_size=...), and every other "
                "stage's, to a smaller number"
            )
    if not len(records.pairs("eval")):
        raise RecordsError(f"{records.directory} has no pairs in split 'eval' to evaluate on")
    check_fit(records, config.model.encoders, config.model.transformer, base_model, ("train", "eval"))


def check_fit(
    records: AnyRecords,
    encoders: EncodersConfig,
    transformer: BackboneConfig,
    base_model: str | None,
    splits: Sequence[str],
) -> None:
    """Raises RecordsError unless a model can read the splits of these records: its encoders made them, and they fit.

    Where `base_model` is a pipeline directory, the records' latents must be of its VAE.
    """
    if records.encoders != encoders:
        raise RecordsError(
            f"{records.directory} was made by other encoders than this model's: {to_mapping(records.encoders)} there, "
            f"{to_mapping(encoders)} here; preprocess again, or set model.encoders (of an alignment, text_length)"
        )
    expected = None if base_model is None else _codec_in(base_model, encoders)
    if "codec" in records.manifest and expected not in (None, records.manifest["codec"]):
        raise RecordsError(
            f"{records.directory} holds latents of another VAE ({records.manifest['codec']}) than that of "
            f"{base_model} ({expected}); preprocess again with this base model, or train on the other one"
        )
    spec = transformer.latents
    prompt, latents = records.prompts[0], records.images[0].latents
    widths = (latents.shape[-1], prompt.prompt_embeds.shape[-1], prompt.pooled_prompt_embeds.shape[-1])
    own = (spec.channels, spec.text_width, spec.pooled_width)
    if widths != own:
        raise RecordsError(
            f"{records.directory} does not fit this model: latent channels, prompt and pooled widths are {widths}, the "
            f"model takes {own}"
        )
    for split in splits:
        for rows in records.buckets(split).values():
            try:
                spec.validate(records.images[records.pairs(split)[rows.start].chosen].latents[None])
            except ValueError as error:
                raise RecordsError(f"{records.directory}: {error}") from None


def _codec_in(base_model: str, encoders: EncodersConfig) -> str | None:
    """The fingerprint of the image encoder that lies in a base model's directory; None where there is none."""
    if encoders.images is not None:
        directory = directory_of(base_model)
        return None if directory is None else taesd3_fingerprint(directory)
    vae = as_path(base_model) / "vae"
    return vae_fingerprint(local_copy(vae, ["*"])) if (vae / "config.json").is_file() else None
