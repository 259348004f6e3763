"""Makes hpsv2.npz: what the published HPSv2 code computes, with a small random model.

    pip install hpsv2==1.2.0 torchvision timm ftfy clint && python -m tests.golden.hpsv2

Weights are drawn here, by name, and are not stored; the tests draw the same. hpsv2 1.2.0 comes without CLIP's
vocabulary, bpe_simple_vocab_16e6.txt.gz, which goes beside its open_clip/tokenizer.py. (Beside a torch for CPUs, PyPI's
torchvision has no compiled part, which nothing here needs.)
"""

import json
import pathlib

import numpy as np

PATH = pathlib.Path(__file__).with_suffix(".npz")
VOCABULARY, SIDE = 120, 42
PROMPTS = [
    "A Red FOX, in the snow!!",
    "caf\u00e9 &amp;amp; cr\u00e8me  br\u00fbl\u00e9e (1970s)",
    80 * "very " + "long, isn't it",
    "\u96ea 3d-render",
]
VISION = {"layers": 2, "width": 160, "head_width": 80, "patch_size": 14, "image_size": SIDE}
TEXT = {"context_length": 77, "vocab_size": VOCABULARY, "width": 128, "heads": 2, "layers": 3}


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A state dict in open_clip's names."""
    rng = np.random.default_rng(0)
    return {
        name: np.asarray(rng.standard_normal(shape) * (0.5 if len(shape) < 2 else shape[-1] ** -0.5), np.float32)
        for name, shape in sorted(shapes.items())
    }


def read_shapes(lines: np.ndarray) -> dict[str, tuple[int, ...]]:
    """Of lines as `written` makes them."""
    return {name: tuple(json.loads(shape)) for name, shape in (line.split(" ", 1) for line in lines)}


def written(model) -> list[str]:
    return [f"{name} {list(array.shape)}" for name, array in model.state_dict().items()]


def main() -> None:
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    import hpsv2.src.open_clip as open_clip
    from hpsv2.src.open_clip.model import CLIP
    from hpsv2.src.open_clip.tokenizer import tokenize
    from hpsv2.src.open_clip.transform import image_transform
    from PIL import Image

    model = CLIP(24, VISION, TEXT, output_dict=True).eval()
    shapes = {name: tuple(array.shape) for name, array in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights(shapes).items()})
    configs = pathlib.Path(open_clip.__file__).parent / "model_configs"
    with torch.device("meta"):
        full = CLIP(**json.loads((configs / "ViT-H-14.json").read_text()))

    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((30, 50), (90, 70), (20, 33))]
    ids = np.zeros((len(images), 77), np.int64)
    for row, length in zip(ids, (5, 77, 12)):
        row[:length] = [VOCABULARY - 2, *rng.integers(1, VOCABULARY - 2, length - 2), VOCABULARY - 1]
    prepare = image_transform(SIDE, is_train=False, resize_longest_max=True)
    pixels = torch.stack([prepare(Image.fromarray(image)) for image in images])
    with torch.no_grad():
        out = model(pixels, torch.from_numpy(ids))  # then what hpsv2.img_score does
        scores = torch.diagonal(out["image_features"] @ out["text_features"].T)
    np.savez_compressed(
        PATH,
        **{f"image_{number}": image for number, image in enumerate(images)},
        ids=ids,
        pixels=pixels.numpy().transpose(0, 2, 3, 1),
        scores=scores.numpy(),
        tokens=tokenize(PROMPTS).numpy(),
        tiny=written(model),
        full=written(full),
    )
    print(scores.numpy())


if __name__ == "__main__":
    main()
