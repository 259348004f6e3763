"""Ranks image files by judges that are not the reward.

    python -m dinalrm_jax.judge --judge pickscore --model yuvalkirstain/PickScore_v1 \\
        --tokenizer openai/clip-vit-large-patch14 --prompt "a red fox" fox_1.png fox_2.png directory/

    clip        CLIP score, 100 max(cos, 0); --model openai/clip-vit-large-patch14
    pickscore   PickScore; --model yuvalkirstain/PickScore_v1, with CLIP's --tokenizer
    hpsv2       HPSv2.1; --model xswu/HPSv2 or HPS_v2.1_compressed.pt, with CLIP's --tokenizer
    aesthetic   LAION's predictor, which reads no prompt; --model openai/clip-vit-large-patch14, with its --head
    scenes      rules that read a drawn scene: count, color, shape and position of its caption, each from 0 to 1,
                and as score their mean

Files, prompts and outputs are those of `score`; images that `generate` wrote say their prompts themselves.
"""

from dinalrm_jax.cli.command import answer_help, run_command
from dinalrm_jax.cli.options import JudgeOptions

answer_help(__name__, __doc__, JudgeOptions)  # before the imports that take a second

import dataclasses
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from dinalrm_jax.cli.images import check_outputs, find_images, prompts_of, write_ranking
from dinalrm_jax.data.files import ImageProblem
from dinalrm_jax.data.images import read_rgb
from dinalrm_jax.devices.compilation import enable_compilation_cache
from dinalrm_jax.evaluation.judges.clip import Judge
from dinalrm_jax.evaluation.ranking import RankedImage, in_order
from dinalrm_jax.scenes import draw
from dinalrm_jax.scenes.verify import verify


@dataclasses.dataclass(frozen=True)
class VerifiedImage(RankedImage):
    """By the rules for drawn scenes; see `scenes.verify.Verdict`."""

    count: float
    color: float
    shape: float
    position: float


def judged(
    prompts: list[str], images: list[str], judge: Callable[[str, str], tuple[float, ...]]
) -> tuple[dict[int, tuple[float, ...]], dict[int, str]]:
    """A judge's values of every image that could be read, by the image's index, and of the others why not."""
    values, problems = {}, {}
    for index in tqdm(range(len(images)), desc="judging", unit="image", disable=len(images) < 2):
        try:
            values[index] = judge(prompts[index], images[index])
        except ImageProblem as problem:
            problems[index] = str(problem)
    return values, problems


def by_rules(prompt: str, image: str) -> tuple[float, ...]:
    """The share of its caption that an image shows, and that of each respect."""
    verdict = verify(prompt, read_rgb(image))
    return verdict.share, *dataclasses.astuple(verdict)


def main(options: JudgeOptions) -> int:
    """Ranks what the options name; 1 where a file could not be read."""
    check_outputs(options)
    images = find_images(options.images)
    prompts = len(images) * [""] if options.judge == "aesthetic" else prompts_of(options, images)
    kind: type[RankedImage] = RankedImage
    if options.judge == "scenes":
        for prompt in filter(None, prompts):
            draw.parse(prompt)  # which says what is no caption, before any image is read
        kind, judge = VerifiedImage, by_rules
    else:
        enable_compilation_cache()
        loaded = Judge.from_pretrained(options.judge, options.model, options.head, options.tokenizer)

        def judge(prompt: str, image: str) -> tuple[float, ...]:
            return (float(loaded([prompt], [image])[0]),)

    values, problems = judged(prompts, images, judge)
    scores = [values[index][0] if index in values else np.nan for index in range(len(images))]
    rows = [kind(rank, scores[i], images[i], prompts[i], *values[i][1:]) for rank, i in in_order(prompts, scores)]
    return write_ranking(options, images, rows, problems)


if __name__ == "__main__":
    # Ours are ValueErrors.
    run_command(main, JudgeOptions, errors=(ValueError, OSError), interrupted="nothing was written")
