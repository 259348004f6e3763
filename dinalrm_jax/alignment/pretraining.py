"""A policy's loss as a generator beside its alignment, which keeps what no reward sees; docs/method.md, Alignment."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from dinalrm_jax.alignment.policy import POLICY, Policy, PromptBatch, PromptStream, own_params
from dinalrm_jax.model.batch import PreferenceBatch
from dinalrm_jax.model.parameters import Params
from dinalrm_jax.noise import SigmaConfig
from dinalrm_jax.training.objectives import Objective, flow_matching_objective
from dinalrm_jax.training.stream import Form, PairStream

AGAIN = 1  # folded into a row's key for what the images' levels and noise are drawn from


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BesideImages:
    """B prompts, and as many images with captions of their own."""

    batch: PromptBatch
    images: PreferenceBatch


def with_pretraining(
    objective: Objective[PromptBatch], policy: Policy, weight: float, sigma: SigmaConfig
) -> Objective[BesideImages]:
    """`(loss + weight generator's loss) / (1 + weight)`, the second one of the pairs' chosen images."""
    generating = flow_matching_objective(policy.tuned, sigma)

    def both(params: Params, beside: BesideImages, keys: jax.Array):
        losses, metrics = objective(params, beside.batch, keys)
        again = jax.vmap(jax.random.fold_in, (0, None))(keys, AGAIN)
        error, _ = generating(own_params(params, POLICY), beside.images, again)
        return (losses + weight * error) / (1 + weight), metrics | {"pretraining_loss": error}

    return both


class StreamBesideImages:
    """Batches of prompts and of images side by side: a `training.stream.Stream`."""

    def __init__(self, prompts: PromptStream, images: PairStream):
        self._prompts, self._images = prompts, images
        (batch,) = prompts.forms.values()
        self.units: Mapping[str, int] = prompts.units
        self.forms: Mapping[Form, BesideImages] = {
            form: BesideImages(batch, pairs) for form, pairs in images.forms.items()
        }

    def restore(self, position: Mapping[str, Any]) -> None:
        self._prompts.restore(position["prompts"])
        self._images.restore(position["images"])

    def __iter__(self) -> Iterator[tuple[Form, BesideImages, dict[str, Any]]]:
        for (_, batch, before), (form, pairs, after) in zip(self._prompts, self._images):
            yield form, BesideImages(batch, pairs), {"prompts": before, "images": after}
