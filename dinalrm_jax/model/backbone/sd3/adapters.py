"""The projections of an SD3 backbone that LoRA adapts: all of its attention's, as the released code does."""

from dinalrm_jax.model.backbone.sd3.transformer import SD3Transformer
from dinalrm_jax.model.layers import Linear

IMAGE_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def adapted(backbone: SD3Transformer, with_last_text: bool) -> list[Linear]:
    """The projections, block by block; those of the last block's text side where something reads that stream."""
    blocks, found = backbone.transformer_blocks, []
    for index, block in enumerate(blocks):
        targets = [(block.attn, IMAGE_TARGETS)]
        if with_last_text or index < len(blocks) - 1:
            targets.append((block.attn, TEXT_TARGETS))
        if block.attn2 is not None:
            targets.append((block.attn2, IMAGE_TARGETS))
        for attention, names in targets:
            found += [attention.to_out[0] if name == "to_out.0" else getattr(attention, name) for name in names]
    return [projection for projection in found if projection is not None]


def peft_targets(num_blocks: int, with_last_text: bool) -> tuple[list[str], list[str] | None]:
    """The same by PEFT's names: `target_modules` and `exclude_modules` of an `adapter_config.json`."""
    unread = [f"transformer_blocks.{num_blocks - 1}.attn.{name}" for name in TEXT_TARGETS]
    return [*IMAGE_TARGETS, *TEXT_TARGETS], None if with_last_text else unread
