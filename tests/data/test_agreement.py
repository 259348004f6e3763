"""Filtering by scores that agree with people, from files to records and to a batch's labels and weights."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from dinalrm_jax.data.config import PUBLISHED, PreparationConfig, parse_rules
from dinalrm_jax.data.loader import TrainingBatches
from dinalrm_jax.data.records import Records, RecordsError
from dinalrm_jax.data.sources.datasets import preprocess
from dinalrm_jax.mapping import ConfigError
from dinalrm_jax.model.encoding import EncodersConfig

# chosen, rejected, label; scores (aesthetic, clip, vqa) of image n are SCORES[n].
PAIRS = [
    ("a", 0, 1, 1.0),  # better by all
    ("a", 2, 1, 1.0),  # 0.4 worse by aesthetics, which strategy 2 lets pass
    ("a", 3, 1, 1.0),  # worse by clip
    ("b", 4, 5, 0.5),  # a tie, near by all
    ("b", 4, 6, 0.5),  # a tie, far apart by vqa, in the other direction
    ("b", 0, 6, 1.0),  # better by clip, equal by vqa
    ("c", 0, 5, 1.0),  # worse by vqa: image 0 shows little of this prompt
]
SCORES = {
    0: (6.0, 0.30, 0.9), 1: (5.0, 0.20, 0.5), 2: (4.6, 0.25, 0.7), 3: (6.0, 0.19, 0.9),
    4: (5.0, 0.20, 0.5), 5: (5.1, 0.21, 0.52), 6: (5.0, 0.20, 0.9),
}  # fmt: skip
OF_PROMPT = {("c", 0): 0.1}  # vqa of an image that depends on the prompt
CONFIG = PreparationConfig("jsonl", EncodersConfig("tiny", 8), buckets=("32x32",), min_area=1, threads=1, holdout=1)


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "source"
    directory.mkdir()
    rows = [
        {"prompt": prompt, "chosen": f"{chosen}.png", "rejected": f"{rejected}.png", "label": label, "split": "train"}
        for prompt, chosen, rejected, label in PAIRS
    ]
    held_out = [{"prompt": "e", "chosen": "3.png", "rejected": "1.png", "label": label} for label in (1, 0.5)]
    rows += [row | {"split": "eval"} for row in held_out]
    (directory / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rng = np.random.default_rng(0)
    for number in SCORES:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(directory / f"{number}.png")
    return directory


@pytest.fixture
def scores(source, tmp_path):
    """Two of the scores by image alone, in one file; the third as `judge` writes it: by prompt, with its own path."""
    both = ["image,clip,aesthetic", *(f"{n}.png,{s[1]},{s[0]}" for n, s in reversed(SCORES.items()))]
    (tmp_path / "two.csv").write_text("\n".join(both) + "\n")
    wanted = sorted({(prompt, image) for prompt, *two, _ in PAIRS for image in two})
    vqa = {key: OF_PROMPT.get(key, SCORES[key[1]][2]) for key in wanted}
    judged = ["rank,score,image,prompt", *(f"1,{vqa[p, n]},{source}/{n}.png,{p}" for p, n in wanted)]
    (tmp_path / "judged.csv").write_text("\n".join(judged) + "\n")
    return str(tmp_path / "two.csv"), f"vqa={tmp_path / 'judged.csv'}"


def kept(directory):
    records = Records(directory)
    return {
        (records.prompts[p.prompt].text, int(records.images[p.chosen].name[0]), int(records.images[p.rejected].name[0]))
        for p in records.pairs("train")
    }


@pytest.mark.parametrize(
    ("strategy", "passing"),
    [
        ("mpcf1", {("a", 0, 1), ("b", 4, 5)}),
        ("mpcf2", {("a", 0, 1), ("a", 2, 1), ("b", 4, 5)}),
        ("clip:0.08:0.001", {("a", 0, 1), ("b", 4, 6), ("b", 0, 6), ("c", 0, 5)}),
    ],
)
def test_pairs_that_scores_agree_on(source, scores, tmp_path, strategy, passing):
    config = dataclasses.replace(CONFIG, ties=True, scores=scores, agree=(strategy,))
    manifest = preprocess(source, tmp_path / "records", config)
    assert kept(tmp_path / "records") == passing
    left_out = manifest["left_out"]
    assert sum(count for name, count in left_out.items() if "agree" in name) == len(PAIRS) - len(passing)
    assert left_out["tied pair"] == 1  # held out
    if strategy == "mpcf2":
        expected = {
            "pair that clip does not agree with": 1,
            "pair that vqa does not agree with": 2,
            "tie that vqa does not agree with": 1,
        }
        assert {name: count for name, count in left_out.items() if "agree" in name} == expected
    labels = {p.label for p in Records(tmp_path / "records").pairs("train")}
    assert labels == {1.0, 0.5}


def test_scores_of_a_judge_that_reads_no_prompt(source, scores, tmp_path):
    """`judge --judge aesthetic` leaves its column of prompts empty."""
    rows = ["rank,score,image,prompt", *(f"1,{s[0]},{source}/{n}.png," for n, s in SCORES.items())]
    (tmp_path / "aesthetic.csv").write_text("\n".join(rows) + "\n")
    rows = ["image,clip", *(f"{n}.png,{s[1]}" for n, s in SCORES.items())]
    (tmp_path / "clip.csv").write_text("\n".join(rows) + "\n")
    files = (f"aesthetic={tmp_path / 'aesthetic.csv'}", str(tmp_path / "clip.csv"), scores[1])
    preprocess(source, tmp_path / "records", dataclasses.replace(CONFIG, ties=True, scores=files, agree=("mpcf1",)))
    assert kept(tmp_path / "records") == {("a", 0, 1), ("b", 4, 5)}


def test_ties_are_left_out_unless_asked_for(source, tmp_path):
    manifest = preprocess(source, tmp_path / "records", CONFIG)
    assert manifest["left_out"]["tied pair"] == 3
    assert {p.label for p in Records(tmp_path / "records").pairs("train")} == {1.0}
    rows = [json.loads(line) for line in (source / "pairs.jsonl").read_text().splitlines()]
    (source / "pairs.jsonl").write_text("\n".join(json.dumps(row | {"label": 0.8}) for row in rows))
    with pytest.raises(RecordsError, match="gives no training pair that people tied"):
        preprocess(source, tmp_path / "ties", dataclasses.replace(CONFIG, ties=True))
    preprocess(source, tmp_path / "soft", CONFIG)
    assert {round(p.label, 6) for p in Records(tmp_path / "soft").pairs("train")} == {0.8}
    (source / "pairs.jsonl").write_text("\n".join(json.dumps(row | {"label": 0.2}) for row in rows))
    with pytest.raises(RecordsError, match="row 0: label is 0.2, expected a number from 0.5, a tie, to 1"):
        preprocess(source, tmp_path / "wrong", CONFIG)


def test_labels_and_prompt_weights_reach_the_batch(source, tmp_path):
    preprocess(source, tmp_path / "records", dataclasses.replace(CONFIG, ties=True))
    records = Records(tmp_path / "records")
    pairs = list(records.pairs("train"))
    prompts = [records.prompts[pair.prompt].text for pair in pairs]
    for rows in (None, [1, 2]):  # of one process of several
        batches = TrainingBatches(records, 5, 0, rows, by_prompt=True)
        for step, batch in enumerate(itertools.islice(batches, 3)):
            _, members = batches.schedule.batch(step)
            inverse = np.array([1 / prompts.count(prompts[member]) for member in members])
            mine = slice(None) if rows is None else rows
            np.testing.assert_allclose(batch.weight, (5 * inverse / inverse.sum())[mine], rtol=1e-6)
            np.testing.assert_array_equal(batch.label, np.array([pairs[m].label for m in members])[mine])
    alike = next(TrainingBatches(records, 5, 0))
    np.testing.assert_array_equal(alike.weight, np.ones(5))


def test_the_published_rules():
    """Strategies 1, 2 and 3 of the released code: aesthetics 0, -0.5, -1; the others alike; strict everywhere."""
    for number, least in ((1, 0.0), (2, -0.5), (3, -1.0)):
        rules = {rule.column: (rule.win, rule.tie) for rule in parse_rules([f"mpcf{number}"])}
        assert rules == {"aesthetic": (least, 0.2), "clip": (0.0, 0.03), "vqa": (0.0, 0.07)}
    (rule,) = parse_rules(["x:0.5:0.25"])
    assert [rule.keeps(gap, False) for gap in (0.5, 0.51)] == [False, True]
    assert [rule.keeps(gap, True) for gap in (-0.25, 0.25, -0.2, 0.2)] == [False, False, True, True]
    assert set(PUBLISHED) == {"mpcf1", "mpcf2", "mpcf3"}


@pytest.mark.parametrize("text", ["mpcf4", "clip", "clip:0", "clip:a:1", ":0:1", "clip:0:0", "clip:nan:1"])
def test_rules_of_another_form(text):
    with pytest.raises(ConfigError, match=r"expected COLUMN:WIN:TIE, for instance clip:0:0.03.*mpcf1, mpcf2, mpcf3"):
        parse_rules([text])


def test_two_rules_for_one_column_and_rules_without_scores():
    with pytest.raises(ConfigError, match="agree has two rules for one column: aesthetic, clip, vqa, clip"):
        parse_rules(["mpcf1", "clip:0:1"])
    for values in ({"agree": ("mpcf1",)}, {"scores": ("a.csv",)}):
        with pytest.raises(ConfigError, match="scores are what agree compares: give both, or none"):
            dataclasses.replace(CONFIG, **values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the scores .*: No such file"),
        ("image,clip\n0.png,0.3\n", "no score file has aesthetic, vqa; their columns are image, clip"),
        ("name,clip\n0.png,0.3\n", "has the columns name, clip; it needs image"),
        ("image,clip,aesthetic,vqa\n0.png,0.3,nan,1\n", "line 2: aesthetic is 'nan', expected a number"),
        ("image,clip,aesthetic,vqa\n0.png,0.3,1\n", "line 2: vqa is None, expected a number"),
        ("image,clip,aesthetic,vqa\n0.png,0.3,1,1\n", "lack 2[0-9] scores of training pairs, for instance .* of 1.png"),
        ("image,clip,aesthetic,vqa\n", "no score file has aesthetic, clip, vqa"),
    ],
)
def test_score_files_that_will_not_do(source, tmp_path, text, message):
    if text is not None:
        (tmp_path / "scores.csv").write_text(text)
    config = dataclasses.replace(CONFIG, agree=("mpcf2",), scores=(str(tmp_path / "scores.csv"),))
    with pytest.raises(RecordsError, match=message):
        preprocess(source, tmp_path / "records", config)
    assert not (tmp_path / "records").exists()
