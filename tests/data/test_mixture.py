"""Several record directories as one."""

import json
from collections import Counter

import numpy as np
import pytest

from dinalrm_jax.data import records
from dinalrm_jax.data.config import MixedConfig
from dinalrm_jax.data.loader import TrainingBatches
from dinalrm_jax.data.mixture import Mixture
from dinalrm_jax.data.records import ImageRecord, PairRecord, PromptRecord, RecordsError
from dinalrm_jax.model.encoding import EncodersConfig


def write(directory, first, count, length=3, **manifest):
    """Pairs (i, i) of images filled with `first + i`; the prompt's embedding is filled with `first`."""
    images = [ImageRecord(np.full((2, 2, 16), first + i, np.float32), f"{first + i}") for i in range(count)]
    records.write(
        directory,
        images=images,
        prompts=[PromptRecord("p", np.full((length, 5), first), np.zeros(7))],
        pairs={split: [PairRecord(i, i, 0, "kind") for i in range(count)] for split in ("train", "eval")},
        encoders=EncodersConfig("tiny", 3),
        downsampling=8,
        source={},
    )
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **manifest}))
    return str(directory)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixture")
    return write(directory / "few", 0, 4), write(directory / "many", 100, 12)


def seen(mixture, batch_size, batches):
    """How often each pair came in so many batches, each of which holds one directory's pairs."""
    loader, counts = TrainingBatches(mixture, batch_size, seed=1), Counter()
    for _ in range(batches):
        batch = next(loader)
        pairs, prompts = batch.chosen[:, 0, 0, 0].astype(int), batch.prompt.prompt_embeds[:, 0, 0].astype(int)
        assert set(prompts) == ({100} if pairs[0] >= 100 else {0}), "a pair has a prompt of its own directory"
        assert set(pairs >= 100) in ({True}, {False})
        counts.update(pairs.tolist())
    return counts


def test_a_weight_is_how_often_pairs_come_in_an_epoch(parts):
    few, many = parts
    plain = Mixture((MixedConfig(few), MixedConfig(many)))
    assert set(seen(plain, 2, 8).values()) == {1}
    weighted = Mixture((MixedConfig(few, 3.0), MixedConfig(many, 0.5)))
    counts = seen(weighted, 2, 18)  # two epochs of 4 x 3 + 12 x 0.5 pairs
    assert {counts[i] for i in range(4)} == {6}
    assert {counts[100 + i] for i in range(12)} == {1}


def test_pairs_keep_their_images_and_prompts_and_name_their_directory(parts):
    mixture = Mixture(tuple(map(MixedConfig, parts)))
    assert mixture.buckets("eval") == {"16x16 of set 0": range(4), "16x16 of set 1": range(4, 16)}
    pair = mixture.pairs("eval")[5]
    assert mixture.images[pair.chosen].latents[0, 0, 0] == 101
    assert mixture.prompts[pair.prompt].prompt_embeds[0, 0] == 100
    assert pair.kind == "many/kind"
    with pytest.raises(IndexError, match="row 16 of 16"):
        mixture.images[16]


def test_a_run_continues_on_the_same_mixture_only(parts):
    few, many = parts
    first = TrainingBatches(Mixture((MixedConfig(few, 3.0), MixedConfig(many))), 2, seed=1)
    other = TrainingBatches(Mixture((MixedConfig(few, 2.0), MixedConfig(many))), 2, seed=1)
    with pytest.raises(RecordsError, match="weights changed"):
        other.set_state(first.get_state())


def test_what_cannot_be_mixed_is_refused(parts, tmp_path):
    few, _ = parts
    longer = write(tmp_path / "longer", 0, 2, length=4)
    with pytest.raises(RecordsError, match="longer was made by other encoders than .*few"):
        Mixture((MixedConfig(few), MixedConfig(longer)))
    with pytest.raises(RecordsError, match="names one directory twice"):
        Mixture((MixedConfig(few), MixedConfig(few)))


def test_directories_of_one_name_are_told_apart_by_what_they_lie_in(tmp_path):
    """As `WORKDIR/data` of two runs."""
    parts = [write(tmp_path / run / "data", 0, 2) for run in ("one", "two")]
    pairs = Mixture(tuple(map(MixedConfig, parts))).pairs("eval")
    assert [pairs[i].kind for i in (0, 2)] == ["one-data/kind", "two-data/kind"]


@pytest.mark.parametrize("encoder", ["codec", "text"])
def test_latents_and_embeddings_of_other_encoders_are_not_mixed(tmp_path, encoder):
    one, other = (write(tmp_path / name, 0, 2, **{encoder: name}) for name in ("one", "other"))
    with pytest.raises(RecordsError, match="made by other encoders"):
        Mixture((MixedConfig(one), MixedConfig(other)))
    assert Mixture((MixedConfig(one),)).manifest[encoder] == "one"


def test_a_mixture_is_known_by_all_of_its_parts(parts, tmp_path):
    few, many = parts
    other = write(tmp_path / "other", 200, 12)
    prints = {Mixture((MixedConfig(few), MixedConfig(second))).fingerprint for second in (many, other)}
    assert len(prints) == 2
