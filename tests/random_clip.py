"""A random CLIP in transformers' layout, for the judges."""

import pathlib

import torch
import transformers


def write_clip(
    directory: pathlib.Path, activation: str, pipeline: pathlib.Path, seed: int = 0
) -> transformers.CLIPModel:
    """Saves it with the tokenizer of a pipeline, as published ones are."""
    torch.manual_seed(seed)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    end = tokenizer.eos_token_id  # at which the text tower is read: else all prompts would be one
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "vocab_size": 49408, "hidden_act": activation, "eos_token_id": end,
            "bos_token_id": tokenizer.bos_token_id}  # fmt: skip
    vision = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3,
              "image_size": 42, "patch_size": 14, "hidden_act": activation}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.normal_(std=0.5 if parameter.ndim < 2 else 0.5 * parameter[0].numel() ** -0.5)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def tokenizer_of(directory: pathlib.Path) -> transformers.CLIPTokenizer:
    return transformers.CLIPTokenizer.from_pretrained(directory)
