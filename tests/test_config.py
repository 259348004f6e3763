import pytest
from ml_collections import ConfigDict

from configs import ablation, hpdv2, hpdv3, quickstart
from dinalrm_jax.config import StageConfig, SweepConfig, TrainConfig
from dinalrm_jax.mapping import ConfigError, from_mapping, to_mapping
from dinalrm_jax.model.backbone.sd3.config import SD3Config
from dinalrm_jax.model.config import RewardModelConfig
from dinalrm_jax.model.execution import ExecutionConfig


def quick(**changes) -> ConfigDict:
    config = quickstart.get_config()
    config.update(changes)
    return config


def test_shipped_configs_are_valid():
    assert from_mapping(TrainConfig, quickstart.get_config()).name == "quickstart"
    assert from_mapping(TrainConfig, hpdv2.get_config()).data is None
    sweep = from_mapping(SweepConfig, ablation.get_config())
    assert len({run.name for run in sweep.runs}) == len(sweep.runs) >= 5
    assert from_mapping(SweepConfig, to_mapping(sweep)) == sweep


def test_mapping_round_trip():
    config = from_mapping(TrainConfig, quickstart.get_config())
    assert from_mapping(TrainConfig, to_mapping(config)) == config
    assert config.model.visual_taps == (1, 3, 5)


def test_unknown_keys_name_the_nearest():
    config = quick()
    config.reward.optimizer.learning_rte = 1e-3
    with pytest.raises(
        ConfigError, match=r"reward.optimizer.learning_rte is not a known key; did you mean 'learning_rate'"
    ):
        from_mapping(TrainConfig, config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("reward.optimizer.learning_rate", "5e-5", r"learning_rate must be float, got str '5e-5'"),
        ("reward.optimizer.schedule", "cosin", "did you mean 'cosine'"),
        ("reward.steps", 0, "config.reward: steps must be at least 1, got 0"),
        ("model.text_taps", (1, 9), r"config.model: text_taps must be increasing numbers in 0..5, got \(1, 9\)"),
        ("model.text_taps", 3, "config.model.text_taps must be a sequence"),
        ("model.lora.rank", 0, "config.model.lora: a LoRA rank is at least 1"),
        ("loss", "nll", "config.loss must be a mapping of LossConfig's keys"),
    ],
)
def test_bad_values_say_where_and_why(path, value, message):
    config = quick()
    with config.ignore_type():
        *parents, key = path.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[key] = value
    with pytest.raises(ConfigError, match=message):
        from_mapping(TrainConfig, config)


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match=r"stage lacks batch_size \(needed by StageConfig\)"):
        from_mapping(StageConfig, {}, "stage")


def test_defaults_are_the_published_model():
    config = RewardModelConfig()
    assert config.transformer == SD3Config()
    assert (config.transformer.inner_dim, config.num_blocks, config.visual_taps) == (1536, 12, (4, 8, 12))
    assert config.lora.scale == 2.0


def test_execution_is_checked_where_it_is_made():
    with pytest.raises(ConfigError, match="remat is 'blocks'; did you mean 'block'"):
        ExecutionConfig(remat="blocks")
    with pytest.raises(ConfigError, match="dtype is 'fp16'; expected one of 'float32', 'bfloat16'"):
        ExecutionConfig(dtype="fp16")


def test_last_text_stream_cannot_be_tapped():
    with pytest.raises(ConfigError, match="text_taps names layer 24, after which the transformer has no text stream"):
        RewardModelConfig(num_blocks=24, text_taps=(24,))


@pytest.mark.parametrize(("variant", "width", "layers"), [("sd3_medium", 1536, 24), ("sd35_large", 2432, 38)])
def test_the_experiment_on_siblings(variant, width, layers):
    config = from_mapping(TrainConfig, hpdv3.get_config(variant))
    assert (config.name, config.model.transformer.width) == (f"hpdv3_{variant}", width)
    assert (config.model.transformer.num_layers, config.model.num_blocks) == (layers, 12)
    with pytest.raises(ValueError, match="knows the variants :smoke, :sd3_medium, :sd35_large, not :sd4"):
        hpdv3.get_config("sd4")
