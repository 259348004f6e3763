"""LoRA adapters of a whole transformer in files that PEFT and diffusers read and write.

diffusers keeps them as `pytorch_lora_weights.safetensors` ("transformer.PATH.lora_A.weight", rank and alpha in the
header), PEFT as `adapter_config.json` and `adapter_model.safetensors` ("base_model.model.PATH.lora_A.weight").
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dinalrm_jax.disk import AnyPath, whole_directory, write_json
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.backbone.family import BackboneConfig, transformer_functional
from dinalrm_jax.model.config import LoRAConfig
from dinalrm_jax.model.execution import ExecutionConfig
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.noise import AnyArray
from dinalrm_jax.weights.files import read_json

DIFFUSERS_FILE, PEFT_FILE, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json",
)  # fmt: skip
PREFIXES = ("transformer.", "base_model.model.")  # of the names in the one and in the other
FOLDER = "policy"  # in an alignment's workdir
METADATA = "lora_adapter_metadata"  # in a diffusers file's header: PEFT's config, its keys with "transformer." before
BACKBONE = "dinalrm_backbone"  # in the header: the digest of the weights that it was trained on


def save_adapter(
    output: str | AnyPath, config: LoRAConfig, adapters: Mapping[str, AnyArray], backbone: str | None = None
) -> None:
    """Writes a directory that `pipe.load_lora_weights` of diffusers and `PeftModel.from_pretrained` of PEFT read.

    The adapters stand in it twice, once for each; it is written whole or not at all.

    Args:
        output: must not exist.
        config: rank and alpha.
        adapters: "PATH.lora_A" and "PATH.lora_B" of a transformer.
        backbone: `weights.digest` of the transformer that they belong to.
    """
    targets = sorted({name.rpartition(".")[0] for name in adapters})  # each by its path: not all blocks have all
    peft = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": targets, "init_lora_weights": "gaussian"}
    header = {"format": "pt", METADATA: json.dumps({f"transformer.{key}": value for key, value in peft.items()})}
    if backbone is not None:
        header[BACKBONE] = backbone
    tensors = {f"{name}.weight": np.ascontiguousarray(array, np.float32) for name, array in adapters.items()}
    with whole_directory(output) as directory:
        for prefix, file in zip(PREFIXES, (DIFFUSERS_FILE, PEFT_FILE)):
            named = {f"{prefix}{name}": array for name, array in tensors.items()}
            save_file(named, directory / file, metadata=header)
            (directory / file).chmod(0o644)  # safetensors creates files that only their owner can read
        write_json(directory / PEFT_CONFIG, {"peft_type": "LORA", "bias": "none", **peft}, indent=1)


def load_adapter(
    path: str | pathlib.Path, transformer: BackboneConfig
) -> tuple[LoRAConfig, dict[str, np.ndarray], str | None]:
    """An adapter of this transformer, in either layout.

    Args:
        path: a directory, also the workdir of an alignment, whose `policy` is meant; or a file in either layout.
        transformer: what it must fit.

    Returns:
        Its rank and alpha; "PATH.lora_A" (rank, in) and "PATH.lora_B" (out, rank); the digest of its backbone, where
        the file says it.

    Raises:
        FileNotFoundError: there is no adapter.
        ConfigError: one of several ranks, or of a kind that this is not (DoRA, biases).
        WeightsError: a broken file, or a LoRA of another geometry; every name that does not fit is listed.
    """
    file = _adapter_file(pathlib.Path(path))
    try:
        with safe_open(file, "np") as opened:
            header, tensors = opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"{file} is not a whole safetensors file: {error}") from error
    said = json.loads(header.get(METADATA, "{}"))
    peft = {key.removeprefix("transformer."): value for key, value in said.items()}
    if file.name == PEFT_FILE:
        if not (file.parent / PEFT_CONFIG).is_file():
            raise FileNotFoundError(f"{file.parent} holds no {PEFT_CONFIG}, which says the LoRA's alpha")
        peft = read_json(file.parent / PEFT_CONFIG)
    return *_checked(tensors, peft, transformer, str(file)), header.get(BACKBONE)


def _adapter_file(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        return path
    for directory in (path, path / FOLDER):
        for name in (DIFFUSERS_FILE, PEFT_FILE):
            if (directory / name).is_file():
                return directory / name
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file or directory {path}, which was to be a LoRA or an alignment's workdir"
        )
    if (path / "tuning").is_dir():
        raise FileNotFoundError(f"{path} is an alignment that has not ended; its `{FOLDER}` is written at the end")
    raise FileNotFoundError(f"{path} holds no LoRA: neither {DIFFUSERS_FILE} nor {PEFT_FILE}")


def _checked(
    tensors: Mapping[str, np.ndarray], peft: Mapping[str, Any], transformer: BackboneConfig, file: str
) -> tuple[LoRAConfig, dict[str, np.ndarray]]:
    shapes = transformer_functional(transformer, ExecutionConfig()).shapes
    adapters, alphas, problems = {}, set(), []
    for name, array in tensors.items():
        bare = next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)
        if bare.endswith(".alpha"):  # as other trainers write it, one number a matrix
            alphas.add(float(array))
            continue
        ours = bare.removesuffix(".weight")
        stem, _, side = ours.rpartition(".")
        weight = shapes.get(f"{stem}.weight")
        if side not in ("lora_A", "lora_B") or weight is None:
            problems.append(f"unknown: {name}")
        elif array.ndim != 2 or array.shape[side == "lora_A"] != weight.shape[side == "lora_A"]:
            problems.append(f"misshapen: {name} is {array.shape}, for a matrix of {weight.shape}")
        else:
            adapters[ours] = array.astype(np.float32)
    given = {name.removesuffix(".weight") for name in tensors}
    problems += [
        f"missing: {stem}.{side}"
        for stem in {name.rpartition(".")[0] for name in adapters}
        for side in ("lora_A", "lora_B")
        if not any(name.endswith(f"{stem}.{side}") for name in given)
    ]
    if problems or not adapters:
        listing = "\n  ".join(sorted(problems)[:20]) or "no matrix at all"
        raise WeightsError(f"{file} is no LoRA of this transformer, {len(problems)} problems:\n  {listing}")
    ranks = {array.shape[0] if name.endswith("A") else array.shape[1] for name, array in adapters.items()}
    if len(ranks) > 1 or len(alphas) > 1:
        raise ConfigError(
            f"{file} has adapters of several ranks or alphas ({sorted(ranks)}, {sorted(alphas)}); this takes one"
        )
    (rank,) = ranks
    beyond = [
        key for key in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern", "modules_to_save") if peft.get(key)
    ]
    if beyond or peft.get("bias", "none") != "none":
        raise ConfigError(f"{file} is a LoRA with {', '.join(beyond) or 'biases'}, which this does not compute")
    alpha = alphas.pop() if alphas else float(peft.get("lora_alpha", rank))
    return LoRAConfig(rank, alpha), adapters
