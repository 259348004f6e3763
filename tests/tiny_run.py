"""A training run of seconds, for the tests: the quickstart's stages on a model of two blocks."""

from ml_collections import ConfigDict

import configs.quickstart as quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.name = "tiny"
    config.scenes.update(train_pairs=64, eval_pairs=12, image_size=32)
    config.model.transformer.update(
        num_layers=3, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16, dual_attention_layers=(0,)
    )
    config.model.update(num_blocks=2, visual_taps=(1, 2), text_taps=(1, 2))
    config.model.lora.rank = 2
    for stage in (config.generator, config.reward):
        stage.update(batch_size=8, steps=40, checkpoint_every=10, log_every=5)
    config.reward.steps = 150
    config.reward.checkpoint_every = 20
    config.reward.evaluate_every = 25
    config.evaluation.batch_size = 8
    config.mesh.data = 1
    return config
