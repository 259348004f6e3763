"""From records to batches of preference pairs, in an order that depends on (seed, step) only."""

from collections.abc import Sequence

import grain
import numpy as np

from dinalrm_jax.data.batch import PreferenceBatch, PromptEmbeds
from dinalrm_jax.data.records import PairRecord, Records, RecordsError


class JoinedPairs:
    """Random access to pairs with their latents and embeddings."""

    def __init__(self, records: Records, split: str):
        self.records, self.rows = records, records.pairs(split)
        self.latent_shape = records.images[0].latents.shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PreferenceBatch:
        """One pair, without a batch axis, float16.

        Raises:
            RecordsError: the pair refers to a record that is not there, or its images differ in size.
        """
        row = self.rows[index]
        try:
            prompt = self.records.prompts[row.prompt]
            chosen, rejected = (self.records.images[image].latents for image in (row.chosen, row.rejected))
        except IndexError as error:
            raise RecordsError(
                f"{self.records.directory}: pair {index} refers to {error}, which is not there"
            ) from None
        if chosen.shape != self.latent_shape or rejected.shape != self.latent_shape:
            raise RecordsError(
                f"{self.records.directory}: pair {index} has latents {chosen.shape} and {rejected.shape}, the first "
                f"image {self.latent_shape}; training takes records of one size"
            )
        return PreferenceBatch(chosen, rejected, PromptEmbeds(prompt.prompt_embeds, prompt.pooled_prompt_embeds))


def training_batches(records: Records, batch_size: int, seed: int) -> grain.DatasetIterator:
    """Endless batches of the training pairs, each epoch a new permutation of all of them.

    The iterator's `get_state()` is JSON; `set_state()` continues exactly there.

    Raises:
        RecordsError: fewer pairs than a batch.
    """
    pairs = JoinedPairs(records, "train")
    if len(pairs) < batch_size:
        raise RecordsError(f"{records.directory} has {len(pairs)} training pairs, a batch takes {batch_size}")
    dataset = grain.MapDataset.source(pairs).seed(seed).shuffle().repeat().batch(batch_size, drop_remainder=True)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def distinct_rows(pairs: Sequence[PairRecord]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct (image, prompt) rows of some pairs, so that each is scored once.

    Returns:
        rows (N, 2): image and prompt indices; chosen, rejected (P,): each pair's rows among them.
    """
    chosen = np.array([(pair.chosen, pair.prompt) for pair in pairs])
    rejected = np.array([(pair.rejected, pair.prompt) for pair in pairs])
    rows, inverse = np.unique(np.concatenate([chosen, rejected]), axis=0, return_inverse=True)
    chosen_row, rejected_row = np.split(inverse.ravel(), 2)
    return rows, chosen_row, rejected_row
