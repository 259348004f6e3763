import json

import numpy as np
import pytest
from PIL import Image

from dinalrm_jax import preprocess
from dinalrm_jax.data import hpdv2, tiny_encoders
from dinalrm_jax.data.records import Records, RecordsError
from tests.conftest import ROOT

SUBSET = ROOT.parent / "shared" / "data" / "hpdv2_subset"
needs_subset = pytest.mark.skipif(not SUBSET.is_dir(), reason="the real HPDv2 subset lies beside the project only")


def write_source(directory, rows, colors=None):
    (directory / "test").mkdir(parents=True)
    (directory / "test.json").write_text(json.dumps(rows))
    for row in rows:
        for number, name in enumerate(row["image_path"]):
            Image.new("RGB", (40, 30), (20 * number, 100, 50)).save(directory / "test" / name)
    return directory


def row(prompt, names, ranks):
    return {"prompt": prompt, "image_path": names, "rank": ranks}


def test_rankings_become_pairs_from_better_to_worse(tmp_path):
    rows = [row("p", ["a.png", "b.png", "c.png"], [5, 3, 5]), row("q", ["d.png", "e.png"], [1, 0])]
    splits, left_out = hpdv2.read_preferences(write_source(tmp_path / "s", rows), holdout=1)
    pairs = {(pair.prompt, pair.chosen.name, pair.rejected.name) for rows in splits.values() for pair in rows}
    assert pairs == {("p", "b.png", "a.png"), ("p", "b.png", "c.png"), ("q", "e.png", "d.png")}
    assert left_out == {"tied rank": 1}
    assert {pair.prompt for pair in splits["train"]}.isdisjoint({pair.prompt for pair in splits["eval"]})


def test_published_training_pairs(tmp_path):
    source = write_source(tmp_path / "s", [row("q", ["d.png", "e.png"], [1, 2])])
    train = [{"prompt": "t", "file_path": ["x.jpg", "y.jpg"], "human_preference": [0, 1]}]
    (source / "train.json").write_text(json.dumps(train))
    splits, _ = hpdv2.read_preferences(source, holdout=1)
    (pair,) = splits["train"]
    assert (pair.chosen, pair.rejected) == (source / "train" / "y.jpg", source / "train" / "x.jpg")
    assert [(pair.chosen.name, pair.rejected.name) for pair in splits["eval"]] == [("d.png", "e.png")]


def run(source, output, **changes):
    return preprocess.preprocess_hpdv2(source, output, **{"size": 32, "text_length": 8, "holdout": 1, **changes})


def test_bad_images_are_skipped_and_counted(tmp_path):
    rows = [row("p", ["a.png", "b.png", "c.png", "d.png"], [1, 2, 3, 4]), row("q", ["e.png", "f.png"], [1, 2])]
    source = write_source(tmp_path / "s", rows)
    (source / "test" / "a.png").unlink()
    data = (source / "test" / "b.png").read_bytes()
    (source / "test" / "b.png").write_bytes(data[: len(data) // 2])
    Image.new("L", (64, 32), 128).save(source / "test" / "c.png")  # greyscale is converted
    counts = run(source, tmp_path / "out")
    assert counts["missing image"] == 1
    assert counts["unreadable image"] == 1
    assert counts["pair of a skipped image"] == 5
    assert counts["train pairs"] + counts["eval pairs"] == 2
    data = Records(tmp_path / "out")
    assert data.manifest["source"]["counts"] == counts
    named = {data.images[i].name: data.images[i] for i in range(len(data.images))}
    assert set(named) == {"test/c.png", "test/d.png", "test/e.png", "test/f.png"}
    assert named["test/d.png"].file_bytes == (source / "test" / "d.png").stat().st_size
    grey = tiny_encoders.decode_latents(named["test/c.png"].latents)
    np.testing.assert_allclose(grey, 128, atol=2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: (s / "test.json").unlink(), "not an HPDv2 directory: it has no test.json"),
        (lambda s: (s / "test.json").write_text("[{"), "test.json is not JSON"),
        (lambda s: (s / "test.json").write_text("{}"), "must be a non-empty JSON array"),
        (lambda s: (s / "test.json").write_text('[{"prompt": "x"}]'), "row 0: expected the keys prompt, image_path"),
        (
            lambda s: (s / "test.json").write_text(json.dumps([row("p", ["a.png"], [1, 2])])),
            "row 0: 1 images but 2 ranks",
        ),
    ],
)
def test_directories_that_are_not_hpdv2(tmp_path, damage, message):
    source = write_source(tmp_path / "s", [row("p", ["a.png", "b.png"], [1, 2]), row("q", ["c.png", "d.png"], [1, 2])])
    damage(source)
    with pytest.raises(RecordsError, match=message):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_refusals(tmp_path):
    source = write_source(tmp_path / "s", [row("p", ["a.png", "b.png"], [1, 2]), row("q", ["c.png", "d.png"], [1, 2])])
    with pytest.raises(RecordsError, match="multiple of 16"):
        run(source, tmp_path / "out", size=40)
    with pytest.raises(RecordsError, match="2 of 2 prompts"):
        run(source, tmp_path / "out", holdout=2)
    run(source, tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists already"):
        run(source, tmp_path / "out")


@needs_subset
def test_real_subset_and_file_size_baseline(tmp_path):
    """data_formats.md 0: JPEG size as a score gets 982 of 1539 strict pairs right (rule M1)."""
    splits, left_out = hpdv2.read_preferences(SUBSET, holdout=10)
    pairs = splits["train"] + splits["eval"]
    assert len(pairs) == 1539
    assert not left_out
    right = sum(pair.chosen.stat().st_size > pair.rejected.stat().st_size for pair in pairs)
    assert right == 982
    assert len({pair.prompt for pair in splits["eval"]}) == 10
