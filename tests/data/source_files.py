"""Small datasets in their published layouts."""

import json

from PIL import Image


def write_hpdv2(directory, rows):
    """HPDv2 rankings with an image for every name."""
    (directory / "test").mkdir(parents=True)
    (directory / "test.json").write_text(json.dumps(rows))
    for row in rows:
        for number, name in enumerate(row["image_path"]):
            Image.new("RGB", (40, 30), (20 * number, 100, 50)).save(directory / "test" / name)
    return directory


def ranking(prompt, names, ranks):
    return {"prompt": prompt, "image_path": names, "rank": ranks}
