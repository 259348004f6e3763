"""Weights on disk: every layout read, written, and refused."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import zipfile

import chex
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import dinalrm_jax as dina
from dinalrm_jax import convert
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.reward import is_trainable
from dinalrm_jax.model.tables import WeightsError
from dinalrm_jax.preference import LossConfig
from dinalrm_jax.weights import pretrained, torch_file
from dinalrm_jax.weights.digest import digest
from dinalrm_jax.weights.verify import VerificationError, verify_against_released
from tests.conftest import GOLDEN, ROOT, TINY


@pytest.fixture
def released(tmp_path):
    """A writable copy of the golden model."""
    return shutil.copytree(GOLDEN, tmp_path / "released")


def load(directory, base=GOLDEN):
    return dina.RewardModel.from_pretrained(directory, base, dtype="float32")


def test_native_round_trip(golden_model, tmp_path):
    golden_model.save(tmp_path / "native")
    again = dina.RewardModel.from_pretrained(tmp_path / "native", dtype="float32")
    assert again.config == golden_model.config
    chex.assert_trees_all_equal(again.params, golden_model.params)
    with pytest.raises(FileExistsError, match="exists already"):
        golden_model.save(tmp_path / "native")


def test_the_likelihood_goes_with_the_checkpoint(golden_model, released, tmp_path):
    """Natively, exported, and by the released code's `model_type`, whose constants are in its source."""
    assert golden_model.likelihood == LossConfig(sigma_0=0.05**0.5, epsilon=1e-6)
    own = dataclasses.replace(golden_model, likelihood=LossConfig(k=1.5))
    own.save(tmp_path / "native")
    own.export_released(tmp_path / "exported")
    assert load(tmp_path / "native").likelihood == LossConfig(k=1.5)
    assert load(tmp_path / "exported").likelihood == LossConfig(k=1.5)
    config = json.loads((released / "config.json").read_text())
    for name, likelihood in {
        "bt-margin": LossConfig(name="bradley_terry", margin=1.0),
        "thurstone-constant": LossConfig(variance="constant", constant_variance=0.5, epsilon=1e-6),
        "a later one": None,
    }.items():
        config["model"]["model_type"] = name
        (released / "config.json").write_text(json.dumps(config))
        assert load(released).likelihood == likelihood


def test_what_the_released_layout_does_not_hold_is_not_exported(tmp_path):
    for config, reason in (
        (dataclasses.replace(TINY, logistic=True), "a logistic model cannot be exported"),
        (dataclasses.replace(TINY, text_taps=()), "a model without text taps cannot be exported"),
    ):
        with pytest.raises(ConfigError, match=reason):
            dina.RewardModel.init(config).export_released(tmp_path / "released")
    assert not list(tmp_path.iterdir())


def test_bfloat16_native_checkpoint(golden_model, tmp_path):
    half = dina.RewardModel.from_pretrained(GOLDEN, GOLDEN, dtype="bfloat16")
    half.save(tmp_path / "native")
    again = dina.RewardModel.from_pretrained(tmp_path / "native", dtype="bfloat16")
    chex.assert_trees_all_equal(again.params, half.params)
    assert again.execution.dtype == "bfloat16"


def test_sharded_base_model(golden_model, released):
    directory = released / "transformer"
    tensors = load_file(directory / "diffusion_pytorch_model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, directory / shard)
    (directory / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    chex.assert_trees_all_equal(load(GOLDEN, released).params, golden_model.params)


def test_all_wrong_names_are_reported_at_once(released):
    """Of head, adapter and transformer together."""
    directory = released / "checkpoint"
    adapter = load_file(directory / "backbone_lora" / "adapter_model.safetensors")
    del adapter["base_model.model.transformer_blocks.1.attn2.to_k.lora_A.weight"]
    save_file(adapter, directory / "backbone_lora" / "adapter_model.safetensors")
    transformer = load_file(released / "transformer" / "diffusion_pytorch_model.safetensors")
    transformer["transformer_blocks.2.attn.to_x.weight"] = np.zeros(2, np.float32)
    transformer["norm_out.linear.weight"] = np.zeros(2, np.float32)  # beyond the kept blocks: not looked at
    save_file(transformer, released / "transformer" / "diffusion_pytorch_model.safetensors")
    head = torch.load(directory / "rm_head.pt", weights_only=True)
    del head["agg_text.bias"], head["attn1.to_q.weight"]
    head["head.weight"] = head["head.weight"][:, :-1]
    head["extra.weight"] = torch.zeros(3)
    torch.save(head, directory / "rm_head.pt")
    with pytest.raises(WeightsError) as error:
        load(released, released)
    message = str(error.value)
    assert "rm_head.pt does not hold this model's weights, 4 problems" in message
    for line in (
        "unknown: extra.weight",
        "misshapen: head.weight gives (1, 63), the model takes (1, 64)",
        "missing: agg_text.bias",
        "missing: attn1.to_q.weight",
        "missing: base_model.model.transformer_blocks.1.attn2.to_k.lora_A.weight",
        "unknown: transformer_blocks.2.attn.to_x.weight",
    ):
        assert line in message
    assert "norm_out" not in message


@pytest.mark.parametrize("missing", ["rm_head.pt", "backbone_lora/adapter_model.safetensors", "backbone_lora"])
def test_missing_files_are_errors(released, missing):
    path = released / "checkpoint" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=missing.split("/")[-1].split(".")[0]):
        load(released)


def test_truncated_files_are_errors(released):
    for path, error, message in (
        (released / "checkpoint" / "rm_head.pt", torch_file.TorchFileError, "rm_head.pt is not a torch.save file"),
        (released / "transformer" / "diffusion_pytorch_model.safetensors", WeightsError, "not a whole safetensors"),
    ):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(error, match=message):
            load(released, released)
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model"), "no 'model' section"),
        (lambda c: c["model"].update(visual_head_index=[1]), r"unknown keys \['visual_head_index'\]"),
        (lambda c: c["model"].update(num_transformer_layers=9), r"num_blocks must be in 1..6, got 9"),
        (lambda c: c["model"]["reward_head"].update(num_querys=3), "did you mean 'num_queries'"),
        (lambda c: c["model"]["reward_head"].update(dropout=0.1), "dropout must be 0"),
        (lambda c: c["model"].update(use_logistic=True), "does not hold eta3 and eta4"),
        (lambda c: c["model"].update(use_text_features=False), "use_text_features is false"),
        (lambda c: c["model"].pop("lora_config"), "model.lora_config needs r and lora_alpha"),
        (lambda c: c["model"]["lora_config"].update(dropout=0.5), "model.lora_config needs .* got"),
        (lambda c: c["model"]["lora_config"].update(r=8), r"has \(r, lora_alpha\) \(4, 8\), config.json says \(8"),
    ],
)
def test_configs_that_do_not_fit(released, change, message):
    config = json.loads((released / "config.json").read_text())
    change(config)
    (released / "config.json").write_text(json.dumps(config))
    with pytest.raises((ConfigError, WeightsError), match=message):
        load(released)


def test_other_models_are_refused(released, tmp_path, golden_model):
    path = released / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ConfigError, match="is of 'FluxTransformer2DModel', expected a diffusers SD3"):
        load(GOLDEN, released)
    with pytest.raises(ConfigError, match="name its base model"):
        dina.RewardModel.from_pretrained(GOLDEN)
    with pytest.raises(FileNotFoundError, match="no directory"):
        dina.RewardModel.from_pretrained(tmp_path / "nowhere")
    config, params = pretrained.load_backbone(GOLDEN)
    pretrained.save_backbone(config, params, tmp_path / "backbone")
    with pytest.raises(ConfigError, match="holds a backbone, expected a reward_model"):
        dina.RewardModel.from_pretrained(tmp_path / "backbone")


def run_convert(direction, *, checkpoint=None, base_model=None, output, verify=False):
    convert.convert(
        direction,
        checkpoint=checkpoint and str(checkpoint),
        base_model=base_model and str(base_model),
        output=str(output),
        dtype="float32",
        verify=verify,
    )


def test_convert_released_and_verify(golden_model, released, tmp_path, capsys):
    run_convert("released", checkpoint=GOLDEN, base_model=GOLDEN, output=tmp_path / "native", verify=True)
    assert "verified against PyTorch: largest difference" in capsys.readouterr().out
    model = dina.RewardModel.from_pretrained(tmp_path / "native", dtype="float32")
    chex.assert_trees_all_equal(model.params, golden_model.params)

    # A wrong weight does not pass: convert one head, verify against another.
    head = torch.load(released / "checkpoint" / "rm_head.pt", weights_only=True)
    head["attn2.to_k_vis.weight"] = head["attn2.to_k_vis.weight"].T.contiguous()
    torch.save(head, released / "checkpoint" / "rm_head.pt")
    with pytest.raises(VerificationError, match="does not score as"):
        verify_against_released(model.config, model.score_latents, str(released), str(GOLDEN))


def test_absent_keys_of_a_diffusers_config_have_diffusers_defaults(released):
    """SD3-Medium's and SD3.5-Large's config.json name no dual attention; SD3.5-Medium's values are not meant."""
    from diffusers import SD3Transformer2DModel

    path = released / "transformer" / "config.json"
    path.write_text(json.dumps({"_class_name": "SD3Transformer2DModel", "num_layers": 2}))
    _, config = pretrained.read_diffusers_config(released)
    with torch.device("meta"):
        expected = dict(SD3Transformer2DModel(num_layers=2).config)
    for key, value in pretrained.to_mapping(config).items():
        assert value == (list(expected[key]) if isinstance(expected[key], tuple) else expected[key]), key


def test_command_line(tmp_path):
    """The real command: a conversion, and one-message errors with status 2 for what cannot be converted."""

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "dinalrm_jax.convert", *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    done = command("diffusers", "--base-model", GOLDEN, "--output", tmp_path / "backbone")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "backbone" / "backbone.safetensors").exists()
    again = command("diffusers", "--base-model", GOLDEN, "--output", tmp_path / "backbone")
    assert again.returncode == 2
    assert again.stderr.strip().endswith("backbone exists already; choose another output or remove it first")
    lacking = command("released", "--checkpoint", GOLDEN, "--output", tmp_path / "x")
    assert lacking.returncode != 0
    assert "released needs --base-model" in lacking.stdout + lacking.stderr


def test_scoring_needs_no_torch():
    """Released weights load and score, and training imports, where torch, diffusers and peft are not installed."""
    program = f"""
import sys
for name in ("torch", "diffusers", "peft", "transformers", "tensorflow"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np, dinalrm_jax as dina, dinalrm_jax.train, dinalrm_jax.convert, dinalrm_jax.preprocess
model = dina.RewardModel.from_pretrained({str(GOLDEN)!r}, {str(GOLDEN)!r}, dtype="float32")
prompt = dina.PromptEmbeds(np.ones((1, 3, 48), np.float32), np.ones((1, 40), np.float32))
print(model.score_latents(np.ones((1, 4, 4, 16), np.float32), prompt)[0])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.isfinite(float(done.stdout))


def test_convert_diffusers_and_back(tmp_path):
    run_convert("diffusers", base_model=GOLDEN, output=tmp_path / "backbone")
    config, params = pretrained.load_backbone(tmp_path / "backbone")
    pretrained.export_diffusers(config, params, tmp_path / "transformer")
    original = load_file(GOLDEN / "transformer" / "diffusion_pytorch_model.safetensors")
    again = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert again.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)


def test_torch_file_round_trip_and_refusal(tmp_path):
    rng = np.random.default_rng(0)
    state = {
        "a.weight": rng.standard_normal((3, 4)).astype(np.float32),
        "scalar": np.array(2.5, np.float32),
        "ids": np.arange(5),
        "half": rng.standard_normal(6).astype(np.float16),
    }
    torch_file.write(tmp_path / "ours.pt", state)
    loaded = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert list(loaded) == list(state)
    for name, tensor in loaded.items():
        np.testing.assert_array_equal(tensor.numpy(), state[name])

    # Views, transposes and shared storages as torch writes them.
    base = torch.arange(12.0).reshape(3, 4)
    theirs = {"base": base, "transposed": base.T, "slice": base[1:, 2:], "bf16": base.bfloat16()}
    torch.save(theirs, tmp_path / "theirs.pt")
    for name, array in torch_file.read(tmp_path / "theirs.pt").items():
        np.testing.assert_array_equal(array.astype(np.float32), theirs[name].float().numpy())

    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(torch_file.TorchFileError, match="no plain state dict needs"):
        torch_file.read(tmp_path / "module.pt")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(1).expand(10**9), r"shape \(1000000000,\) and strides \(0,\) has values more than once"),
        (torch.arange(6.0).as_strided((4, 3), (1, 1)), "has values more than once, as expand"),
        (torch.zeros(10**5)[:3], "storage 0 holds 100000 values, its tensors 3: they are views of a larger"),
    ],
)
def test_torch_files_whose_bytes_are_not_their_tensors(tmp_path, tensor, message):
    torch.save({"weight": tensor}, tmp_path / "odd.pt")
    with pytest.raises(torch_file.TorchFileError, match=message):
        torch_file.read(tmp_path / "odd.pt")


def test_torch_files_that_are_bombs(tmp_path):
    tensor = torch.zeros(10**5)
    torch.save({str(number): tensor[:] for number in range(17)}, tmp_path / "shared.pt")
    with pytest.raises(torch_file.TorchFileError, match="storage 0 is shared by more than 16 tensors"):
        torch_file.read(tmp_path / "shared.pt")
    torch.save({"weight": tensor}, tmp_path / "plain.pt")
    for name, change, message in (
        ("compressed", lambda data: (data, zipfile.ZIP_DEFLATED), "data/0 is compressed, which torch.save never does"),
        ("longer", lambda data: (data + bytes(4), zipfile.ZIP_STORED), "data/0 has 400004 bytes, expected 400000"),
        ("shorter", lambda data: (data[4:], zipfile.ZIP_STORED), "holds 399996 bytes, expected 100000 values"),
    ):
        with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / f"{name}.pt", "w") as changed:
            for member in plain.namelist():
                data, compression = plain.read(member), zipfile.ZIP_STORED
                if member.endswith("data/0"):
                    data, compression = change(data)
                changed.writestr(member, data, compression)
        with pytest.raises(torch_file.TorchFileError, match=message):
            torch_file.read(tmp_path / f"{name}.pt")


def test_a_revision_pins_a_hub_id(golden_model, tmp_path, monkeypatch, capsys):
    """In the hub's own cache, without a network: two commits of one repository, one of them a tag."""
    golden_model.save(tmp_path / "model")
    other = dict(golden_model.params)
    other["head.head.weight"] = other["head.head.weight"] + 1
    dataclasses.replace(golden_model, params=other).save(tmp_path / "other")
    commits = {"main": ("a" * 40, "model"), "v1": ("b" * 40, "other")}
    repository = tmp_path / "hub" / "models--org--reward"
    (repository / "refs").mkdir(parents=True)
    for reference, (commit, source) in commits.items():
        shutil.copytree(tmp_path / source, repository / "snapshots" / commit)
        (repository / "refs" / reference).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def load(revision):
        return dina.RewardModel.from_pretrained("org/reward", dtype="float32", revision=revision)

    assert load(None).digest == load("a" * 40).digest == golden_model.digest
    assert load("v1").digest == load("b" * 40).digest != golden_model.digest
    with pytest.raises(FileNotFoundError, match=r"'org/reward' at revision 'v2' could not be downloaded"):
        load("v2")
    with pytest.raises(ConfigError, match="model is a local directory, which has no revision 'v1'; leave it out"):
        dina.RewardModel.from_pretrained(tmp_path / "model", revision="v1")
    arguments = {"output": str(tmp_path / "out"), "dtype": "float32", "verify": False, "revision": "v1"}
    convert.convert("export", checkpoint="org/reward", base_model=None, **arguments)
    head = torch_file.read(tmp_path / "out" / "checkpoint" / "rm_head.pt")
    np.testing.assert_array_equal(head["head.weight"], other["head.head.weight"])


def test_one_digest_for_one_models_weights(golden_model, tmp_path):
    """Whatever layout they come in and dtype they are computed in; and another where one value differs."""
    golden_model.save(tmp_path / "float32")
    half = dina.RewardModel.from_pretrained(GOLDEN, GOLDEN, dtype="bfloat16")
    half.save(tmp_path / "bfloat16")
    loads = [half] + [
        dina.RewardModel.from_pretrained(tmp_path / stored, dtype=dtype)
        for stored in ("float32", "bfloat16")
        for dtype in ("float32", "bfloat16")
    ]
    assert {model.digest for model in loads} == {golden_model.digest}
    assert re.fullmatch("[0-9a-f]{16}", golden_model.digest)
    params = {name: np.asarray(array) for name, array in golden_model.params.items()}
    found = {golden_model.digest}
    for name in ("head.head.weight", "backbone.transformer_blocks.0.attn.to_q.weight"):
        changed = params[name].copy()
        changed.flat[-1] = np.nextafter(changed.flat[-1], np.inf) if name == "head.head.weight" else 7
        found.add(digest({**params, name: changed}, is_trainable))
        found.add(digest({**params, name: params[name].reshape(-1)}, is_trainable))
    assert len(found) == 5
    one, other = ({name: params["head.head.weight"]} for name in ("head.a", "head.b"))
    assert digest(one, is_trainable) != digest(other, is_trainable)


def test_a_digest_reads_large_arrays_whole(monkeypatch):
    array = np.arange(10, dtype=np.float32)
    whole = digest({"head.a": array}, is_trainable)
    monkeypatch.setattr("dinalrm_jax.weights.digest.PART", 3)
    assert digest({"head.a": array}, is_trainable) == whole
    assert digest({"head.a": np.where(array == 9, 0, array)}, is_trainable) != whole
