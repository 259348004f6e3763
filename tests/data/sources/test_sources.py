"""Every dataset's published files: what they say, and what is refused."""

import io
import json
import warnings
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dinalrm_jax.data.config import PreparationConfig
from dinalrm_jax.data.files import ImageProblem
from dinalrm_jax.data.preferences import Preference, Ranking, hold_out, pick, select
from dinalrm_jax.data.records import RecordsError
from dinalrm_jax.data.sources import genai_bench, hpdv2, hpdv3, imagereward, json_pairs
from dinalrm_jax.data.sources.datasets import read_source
from tests.conftest import ROOT
from tests.data.source_files import ranking, write_hpdv2

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="real files lie beside the project only")


def test_hpdv2_rankings_become_pairs_from_better_to_worse(tmp_path):
    rows = [ranking("p", ["a.png", "b.png", "c.png"], [5, 3, 5]), ranking("q", ["d.png", "e.png"], [1, 0])]
    source = hpdv2.read(write_hpdv2(tmp_path / "s", rows), holdout=1)
    pairs = {(row.prompt, row.chosen, row.rejected) for split in source.preferences.values() for row in split}
    expected = {("p", "b.png", "a.png"), ("p", "b.png", "c.png"), ("q", "e.png", "d.png")}
    assert pairs == {(prompt, f"test/{chosen}", f"test/{rejected}") for prompt, chosen, rejected in expected}
    assert source.counts == {"tied rank": 1}
    prompts = [{row.prompt for row in split} for split in source.preferences.values()]
    assert prompts[0].isdisjoint(prompts[1])
    assert source.open("test/a.png").read() == (tmp_path / "s" / "test" / "a.png").read_bytes()


def test_hpdv2_training_pairs(tmp_path):
    directory = write_hpdv2(tmp_path / "s", [ranking("q", ["d.png", "e.png"], [1, 2])])
    train = [{"prompt": "t", "file_path": ["x.jpg", "y.jpg"], "human_preference": [0, 1]}]
    (directory / "train.json").write_text(json.dumps(train))
    source = hpdv2.read(directory, holdout=1)
    assert source.preferences["train"] == [Preference("t", "train/y.jpg", "train/x.jpg")]
    assert source.preferences["eval"] == [Preference("q", "test/d.png", "test/e.png")]


@needs_shared
def test_hpdv2_subset_and_file_size(tmp_path):
    """data_formats.md 0: JPEG size as a score gets 982 of 1539 strict pairs right (rule M1)."""
    source = hpdv2.read(SHARED / "hpdv2_subset", holdout=10)
    pairs = [row for split in source.preferences.values() for row in split]
    assert len(pairs) == 1539
    assert sum(len(source.open(row.chosen).read()) > len(source.open(row.rejected).read()) for row in pairs) == 982
    assert len({row.prompt for row in source.preferences["eval"]}) == 10


def test_hpdv2_rankings_by_single_people_are_shares(tmp_path):
    """Three people, of whom one ties b and c; a list that is not of all images says nothing."""
    annotations = [{"rank": [1, 2, 3]}, {"rank": [2, 1, 3]}, {"rank": [1, 2, 2]}]
    row = {"prompt": "p", "image_path": ["a.png", "b.png", "c.png"], "rank": [1, 2, 3], "raw_annotations": annotations}
    directory = write_hpdv2(tmp_path / "HPDv2", [row, {**row, "prompt": "q", "raw_annotations": [{"rank": [1, 2]}]}])
    row = {**row, "prompt": "r", "raw_annotations": [{"rank": [1, 2, 3]}]}
    more = json.dumps(row).replace('"raw_annotations": [{"rank": [1', '"raw_annotations": [{"rank": [1e999')
    text = (directory / "test.json").read_text()
    (directory / "test.json").write_text(f"{text.rstrip()[:-1]}, {more}]")
    known, unknown, infinite = hpdv2.benchmark(directory).rankings
    assert infinite.shares is None
    np.testing.assert_allclose(known.shares, [[1 / 2, 2 / 3, 1], [1 / 3, 1 / 2, 5 / 6], [0, 1 / 6, 1 / 2]])
    assert unknown.shares is None


def write_hpdv3(directory, train, test=({"prompt": "t", "path1": "images/1.jpg", "path2": "images/2.jpg"},)):
    directory.mkdir()
    (directory / "train.json").write_text(json.dumps(train))
    (directory / "test.json").write_text(json.dumps(list(test)))
    return directory


@pytest.mark.parametrize(
    ("votes", "confidence", "expected"),
    [
        ([12, 7], 0.99, ((12, 7), 0.99)),
        (None, None, (None, None)),
        ([None, None], None, (None, None)),
        ("[8, 1]", "0.98", ((8, 1), 0.98)),
        ("[None, None]", "null", (None, None)),
        ([float("nan"), 3], "nan", (None, None)),
        ([], "", (None, None)),
    ],
)
def test_hpdv3_votes_as_they_come(tmp_path, votes, confidence, expected):
    row = {"prompt": "p", "path1": "images/a.jpg", "path2": "images/b.jpg"}
    row |= {"choice_dist": votes, "confidence": confidence, "model1": "flux", "model2": "midjourney"}
    source = hpdv3.read(write_hpdv3(tmp_path / "s", [row]))
    assert source.preferences["train"] == [Preference("p", "images/a.jpg", "images/b.jpg", *expected)]
    assert source.preferences["eval"] == [Preference("t", "images/1.jpg", "images/2.jpg")]


def test_hpdv3_odd_votes_stay_and_are_counted(tmp_path):
    rows = [
        {"prompt": "p", "path1": "a", "path2": "b", "choice_dist": votes} for votes in ([3, 9], [4, 4], [9, 3], None)
    ]
    source = hpdv3.read(write_hpdv3(tmp_path / "s", rows))
    assert [row.chosen for row in source.preferences["train"]] == 4 * ["a"], "path1 is preferred, always"
    assert source.counts == {
        "note: votes against the published order": 1,
        "note: votes tied": 1,
        "note: votes unknown": 2,
    }


def test_filters():
    rows = [
        Preference("p", "1", "x", (7, 3), 0.99),
        Preference("p", "2", "x", (6, 4), 0.99),
        Preference("p", "3", "x", None, None),
        Preference("p", "4", "x", (9, 1), 0.5),
        Preference("q", "5", "x", (9, 1), None),
        Preference("q", "6", "x", (0, 9), None),  # the released filter keeps it, like its "votes unknown"
    ]
    counts = Counter()
    assert [row.chosen for row in select(rows, 0.6, 0.9, counts)] == ["1", "3", "5", "6"]
    assert counts == {"vote share too small": 1, "confidence too small": 1}
    assert select(rows, 0.0, 0.0, counts) == rows


def test_rows_of_a_prompt_are_picked_by_the_seed():
    prompts = ["p", "q", "p", "p", "q", "p"]
    kept = pick(prompts, 2, seed=42)
    assert kept == sorted(kept)
    assert Counter(prompts[i] for i in kept) == {"p": 2, "q": 2}
    assert kept == pick(prompts, 2, seed=42)
    assert len({tuple(pick(prompts, 2, seed)) for seed in range(20)}) > 1
    assert pick(prompts, 0, seed=42) == list(range(6))


def test_imagereward(tmp_path):
    directory = tmp_path / "s"
    directory.mkdir()
    row = {"id": "1", "prompt": "p", "generations": ["a.webp", "b.webp", "c.webp"], "ranking": [2, 1, 2]}
    (directory / "test.json").write_text(json.dumps([row]))
    source = imagereward.read(directory)
    pairs = [("b.webp", "a.webp"), ("b.webp", "c.webp")]
    assert [(pair.chosen, pair.rejected) for pair in source.preferences["eval"]] == pairs
    assert source.counts == {"tied rank": 1}


@needs_shared
def test_imagereward_published_counts(tmp_path):
    """data_formats.md 3: 6,399 strict pairs, 831 tied."""
    source = imagereward.read(SHARED / "imagereward")
    assert len(source.preferences["eval"]) == 6399
    assert source.counts == {"tied rank": 831}


def write_genai(directory, votes):
    def picture(value):
        Image.new("RGB", (20, 20), (value, 0, 0)).save(buffer := io.BytesIO(), "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    directory.mkdir(parents=True)
    columns = {
        "prompt": [f"prompt {i}" for i in range(len(votes))],
        "left_image": [picture(10 * i) for i in range(len(votes))],
        "right_image": [picture(10 * i + 1) for i in range(len(votes))],
        "vote_type": votes,
    }
    pq.write_table(pa.table(columns), directory / "test_v1-00000-of-00001.parquet", row_group_size=2)


def test_genai_bench(tmp_path):
    write_genai(tmp_path / "image_generation", ["leftvote", "tievote", "rightvote", "bothbad_vote"])
    source = genai_bench.read(tmp_path, "test_v1")
    first, second = source.preferences["eval"]
    assert (first.prompt, second.prompt) == ("prompt 0", "prompt 2")
    reds = [[Image.open(source.open(name)).getpixel((0, 0))[0] for name in (row.chosen, row.rejected)]
            for row in (first, second)]  # fmt: skip
    assert reds == [[0, 1], [21, 20]]
    assert source.counts == {"tie or both bad": 2}
    assert [row.ranks for row in genai_bench.benchmark(tmp_path, "test_v1").rankings] == [
        (1, 2),
        (1, 1),
        (2, 1),
        (1, 1),
    ]
    with pytest.raises(RecordsError, match=r"is not a directory of GenAI-Bench: it has no test-\*.parquet"):
        genai_bench.read(tmp_path, "test")
    write_genai(tmp_path / "odd", ["leftvote", "none"])
    with pytest.raises(RecordsError, match="row 1: vote_type 'none'"):
        genai_bench.read(tmp_path / "odd", "test_v1")
    (tmp_path / "odd" / "test-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(RecordsError, match=r"test-0.parquet is not a parquet file"):
        genai_bench.read(tmp_path / "odd", "test")


def test_json_lines(tmp_path):
    rows = [{"prompt": f"p{i}\u2028", "chosen": "a.png", "rejected": "b.png"} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    source = json_pairs.read(tmp_path, holdout=1)
    assert {split: len(rows) for split, rows in source.preferences.items()} == {"train": 2, "eval": 1}
    named = [row | {"split": "eval" if i else "train"} for i, row in enumerate(rows)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, named)))
    source = json_pairs.read(tmp_path, holdout=1)
    assert [row.prompt for row in source.preferences["eval"]] == ["p1\u2028", "p2\u2028"]
    named[2].pop("split")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, named)))
    with pytest.raises(RecordsError, match='row 2: split is None; .*must say "train" or "eval"'):
        json_pairs.read(tmp_path, holdout=1)


@pytest.mark.parametrize(
    ("dataset", "files", "message"),
    [
        ("hpdv3", {}, "is not a directory of HPDv3: it has no train.json"),
        ("jsonl", {"pairs.jsonl": '{"prompt": 1}\n{"a'}, "pairs.jsonl, line 2 is neither a JSON array nor"),
        ("hpdv3", {"train.json": "[{"}, "train.json is neither a JSON array nor JSON lines"),
        ("hpdv3", {"train.json": "[]"}, "train.json holds no rows"),
        (
            "hpdv3",
            {"train.json": '[{"prompt": "p", "file_path": ["a", "b"], "human_preference": [1, 0]}]'},
            "row 0: expected the keys prompt, path1, path2 of HPDv3, found .*file_path",
        ),
        ("hpdv2", {}, "is not a directory of HPDv2: it has no test.json"),
        ("hpdv2", {"test.json": '[{"prompt": "p", "image_path": ["a"], "rank": [1, 2]}]'}, "1 image_path but 2 ranks"),
        ("hpdv2", {"test.json": '[{"prompt": "p", "image_path": "ab", "rank": [1, 2]}]'}, "image_path must be a list"),
        ("hpdv2", {"test.json": '[{"prompt": "p", "image_path": ["a"], "rank": [null]}]'}, "and rank one of numbers"),
        (
            "hpdv2",
            {"test.json": '[{"prompt": "p", "image_path": ["a", "b"], "rank": [1, 2]}]'},
            "must leave prompts on both sides: 10 of 1 prompts",
        ),
        ("jsonl", {"pairs.jsonl": '{"prompt": null, "chosen": "a", "rejected": "b"}'}, "prompt must be text, got None"),
        ("imagereward", {"test.json": '{"prompt": 1}'}, "expected the keys prompt, generations, ranking"),
        ("genai_bench", {}, "it has no test-"),
        ("jsonl", {}, "is not a directory of pairs in JSON lines: it has no pairs.jsonl"),
    ],
)
def test_directories_that_are_not_what_they_should_be(tmp_path, dataset, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RecordsError, match=message):
        read_source(tmp_path, PreparationConfig(dataset))


def test_benchmarks_keep_their_ties(tmp_path):
    """What evaluation sees: rankings with ties, images by the names that `open` takes."""
    rows = [ranking("p", ["a.png", "b.png", "c.png"], [5, 3, 5])]
    found = hpdv2.benchmark(write_hpdv2(tmp_path / "hpdv2", rows))
    assert found.rankings == [Ranking("p", ("test/a.png", "test/b.png", "test/c.png"), (5, 3, 5))]
    assert found.open("test/a.png").read() == (tmp_path / "hpdv2" / "test" / "a.png").read_bytes()

    hpd = hpdv3.benchmark(write_hpdv3(tmp_path / "hpdv3", []))
    assert hpd.rankings == [Ranking("t", ("images/1.jpg", "images/2.jpg"), (1, 2))]

    (tmp_path / "ir" / "test_images" / "x").mkdir(parents=True)
    (tmp_path / "ir" / "test_images" / "x" / "1.webp").write_bytes(b"1")
    row = {"id": "1", "prompt": "q", "generations": ["x/1.webp", "x/2.webp"], "ranking": [1, 1]}
    (tmp_path / "ir" / "test.json").write_text(json.dumps([row]))
    image_reward = imagereward.benchmark(tmp_path / "ir")
    assert image_reward.rankings == [Ranking("q", ("x/1.webp", "x/2.webp"), (1, 1))]
    assert image_reward.open("x/1.webp").read() == b"1"


DEEP = "[" * 100_000
ODD = [
    ("400 digits as votes", '"choice_dist": [%s, 3]' % ("9" * 400), {"note: votes unknown": 1}),
    ("5000 digits as votes", '"choice_dist": [%s, 3]' % ("9" * 5000), {"note: votes unknown": 1}),
    ("digits as confidence", '"choice_dist": [9, 3], "confidence": %s' % ("9" * 400), {}),
    ("votes that only look like numbers", '"choice_dist": [1e308, 1e308]', {"note: votes unknown": 1}),
    ("hostile text as votes", '"choice_dist": "%s"' % ("-" * 9000), {"note: votes unknown": 1}),
    ("deep text as votes", '"choice_dist": "%s"' % ("(" * 9000), {"note: votes unknown": 1}),
    ("endless text as votes", '"choice_dist": "%s1"' % ("-" * 1_000_000), {"note: votes unknown": 1}),
    ("digits in text as votes", '"choice_dist": "[%s, 1]"' % ("9" * 4000), {"note: votes unknown": 1}),
    ("half of a surrogate pair", '"choice_dist": [9, 3], "prompt": "a \\ud83d"', {"row of text that is no Unicode": 1}),
    ("the same in a name", '"choice_dist": [9, 3], "path1": "a\\udcff.png"', {"row of text that is no Unicode": 1}),
]


@pytest.mark.parametrize(("odd", "counts"), [row[1:] for row in ODD], ids=[row[0] for row in ODD])
def test_odd_rows_are_counted(tmp_path, odd, counts):
    good = '{"prompt": "p", "path1": "a.png", "path2": "b.png", "choice_dist": [9, 3]}'
    bad = '{"prompt": "q", "path1": "a.png", "path2": "b.png", ' + odd + "}"
    directory = write_hpdv3(tmp_path / "s", [])
    (directory / "train.json").write_text(f"[{good}, {bad}]")
    source = hpdv3.read(directory)
    source.counts.pop("note: votes unknown")  # of test.json, among them
    counts = dict(counts)
    unknown = counts.pop("note: votes unknown", 0)
    assert source.counts == counts
    assert len(source.preferences["train"]) == 2 - sum(counts.values())
    assert [row.votes for row in source.preferences["train"]].count(None) == unknown
    kept = select(source.preferences["train"], 0.6, 0.5, Counter())
    assert Preference("p", "a.png", "b.png", (9, 3), None) in kept


def test_lines_nested_too_deep_are_counted(tmp_path):
    rows = [json.dumps({"prompt": f"p{i}", "chosen": "a", "rejected": "b"}) for i in range(3)]
    deep = '{"prompt": "x", "chosen": "a", "rejected": "b", "more": ' + DEEP + "}"
    (tmp_path / "pairs.jsonl").write_text("\n".join([*rows[:2], deep, rows[2]]))
    source = json_pairs.read(tmp_path, holdout=1)
    assert source.counts == {"row nested too deep": 1}
    assert sum(map(len, source.preferences.values())) == 3


def test_odd_rankings(tmp_path):
    """Counted where they would be trained on; an error where they are a benchmark, which must be whole."""
    rows = [ranking(f"p{i}", ["a.png", "b.png"], [1, 2]) for i in range(3)]
    directory = write_hpdv2(tmp_path / "s", rows)
    text = json.dumps([*rows, ranking("q", ["a.png", "b.png"], [1, 0])]).replace("[1, 0]", f"[1, {'9' * 400}]")
    (directory / "test.json").write_text(text)
    assert hpdv2.read(directory, holdout=1).counts == {"row of ranks out of range": 1}
    with pytest.raises(RecordsError, match="row 3, has ranks out of range; a benchmark must be whole"):
        hpdv2.benchmark(directory)
    (directory / "test.json").write_text(json.dumps([*rows, ranking("q", ["\ud800.png", "b.png"], [1, 2])]))
    assert hpdv2.read(directory, holdout=1).counts == {"row of text that is no Unicode": 1}
    with pytest.raises(RecordsError, match="row 3 holds text that is no Unicode"):
        hpdv2.benchmark(directory)


@pytest.mark.parametrize(
    ("dataset", "name", "data", "message"),
    [
        ("hpdv3", "train.json", DEEP.encode(), "train.json is nested too deep to be read as JSON"),
        ("hpdv3", "train.json", b'[{"prompt": "\xff"}]', "is not text in UTF-8: invalid start byte at byte 13"),
        ("hpdv3", "train.json", b"9" * 5000, "row 0: expected the keys prompt, path1, path2 of HPDv3, found float"),
        ("jsonl", "pairs.jsonl", b'{"prompt": [[[[[[[[[[]]]]]]]]]], "chosen": "a", "rejected": "b"}', "must be text"),
        ("jsonl", "pairs.jsonl", b'{"prompt": "p", "chosen": "a", "rejected": "b", "split": []}', r"split is \[\]"),
        ("hpdv2", "train.json", b'[{"prompt": "p", "file_path": 3, "human_preference": [1, 0]}]', "got 3 and"),
        ("hpdv2", "train.json", b'[{"prompt": "p", "file_path": ["a", "b"], "human_preference": ["a", 1]}]', "'a', 1"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_as_rows(tmp_path, dataset, name, data, message):
    (tmp_path / "test.json").write_text(json.dumps([ranking("p", ["a", "b"], [1, 2])]))
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RecordsError, match=message):
        read_source(tmp_path, PreparationConfig(dataset, holdout=1))


def test_parquet_images_that_are_empty(tmp_path):
    write_genai(tmp_path / "s", ["leftvote", "rightvote"])
    path = tmp_path / "s" / "test_v1-00000-of-00001.parquet"
    table = pq.read_table(path)
    left = table["left_image"].to_pylist()
    right = [{"bytes": None, "path": "elsewhere.png"}, None]
    columns = {name: table[name] for name in ("prompt", "vote_type")}
    pq.write_table(pa.table({**columns, "left_image": left, "right_image": right}), path)
    source = genai_bench.read(tmp_path / "s", "test_v1")
    for row, empty in zip(source.preferences["eval"], ("rejected", "chosen")):
        with pytest.raises(ImageProblem, match="the right_image of row . of .* is empty") as found:
            source.open(getattr(row, empty))
        assert found.value.reason == "missing"


def test_a_damaged_column_of_images(tmp_path):
    write_genai(tmp_path / "s", ["leftvote", "rightvote"])
    path = tmp_path / "s" / "test_v1-00000-of-00001.parquet"
    metadata = pq.ParquetFile(path).metadata
    names = [metadata.row_group(0).column(i).path_in_schema for i in range(metadata.num_columns)]
    start = metadata.row_group(0).column(names.index("left_image.bytes")).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    source = genai_bench.read(tmp_path / "s", "test_v1")
    first, _ = source.preferences["eval"]
    with pytest.raises(ImageProblem) as found:
        source.open(first.chosen)
    assert found.value.reason == "unreadable: damaged parquet file"
    assert source.open(first.rejected).read()


def test_holding_out_most_prompts_is_said():
    rows = [Preference(f"prompt {number}", "a", "b") for number in range(12)]
    with pytest.warns(UserWarning, match="10 of 12 prompts are held out, which leaves 2 to train on; --holdout"):
        split = hold_out(rows, 10, "pairs")
    assert (len(split["train"]), len(split["eval"])) == (2, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hold_out(rows, 6, "pairs")
