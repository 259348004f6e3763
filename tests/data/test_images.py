"""Reading images: what every kind of file becomes, and that no file and no name can end a run or hang it."""

import errno
import io
import os
import pathlib
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from dinalrm_jax.data import files, images
from dinalrm_jax.data.files import ImageProblem, files_below, open_file, patiently
from dinalrm_jax.data.images import decode, read_header, read_rgb
from tests.conftest import ROOT

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest takes our own filter away
LOSSLESS = {"PNG": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}, "WEBP": {"lossless": True}}
LOSSY = {"JPEG": {"quality": 95}, "AVIF": {"quality": 95}}
PICTURE = np.kron(np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
# What a viewer shows of pixels with each of EXIF's orientations.
SHOWN = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}  # fmt: skip


def saved(image, form, **options):
    image.save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


def reason_of(source):
    with pytest.raises(ImageProblem) as found:
        read_rgb(source)
    return found.value.reason


@pytest.mark.parametrize("form", [*LOSSLESS, *LOSSY, "GIF"])
def test_seven_formats(form, tmp_path):
    (tmp_path / "a").write_bytes(saved(Image.fromarray(PICTURE), form, **{**LOSSLESS, **LOSSY}.get(form, {})))
    header, pixels = read_header(tmp_path / "a"), read_rgb(tmp_path / "a")
    assert (header.height, header.width) == pixels.shape[:2] == (24, 40)
    assert np.abs(pixels.astype(int) - PICTURE).mean() < (0.1 if form in LOSSLESS else 12)


@pytest.mark.parametrize("form", ["PPM", "TGA", "ICO", "PCX", "ICNS", "EPS", "JPEG2000"])
def test_other_formats_are_not_opened(form):
    data = saved(Image.fromarray(PICTURE), form)
    with pytest.raises(ImageProblem, match="not a readable image: none of PNG, JPEG") as found:
        decode(data)
    assert found.value.reason == "unreadable"


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_exif_orientation(form, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a").write_bytes(saved(Image.fromarray(PICTURE), form, exif=exif, **{**LOSSLESS, **LOSSY}[form]))
    header, pixels = read_header(tmp_path / "a"), read_rgb(tmp_path / "a")
    shown = SHOWN[orientation](PICTURE)
    assert (header.height, header.width) == pixels.shape[:2] == shown.shape[:2]
    assert np.abs(pixels.astype(int) - shown).mean() < (0.1 if form in LOSSLESS else 12)
    with Image.open(tmp_path / "a") as opened:  # a picture that the caller opened is the same picture
        images.load(opened)
        np.testing.assert_array_equal(read_rgb(opened), pixels)
        assert read_header(opened) == header


def test_damaged_exif_costs_nothing(tmp_path):
    data = saved(Image.fromarray(PICTURE), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode(data), decode(saved(Image.fromarray(PICTURE), "JPEG")))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_greys_of_16_bits_are_scaled(form):
    values = np.linspace(0, 65535, 24 * 40).round().astype(np.uint16).reshape(24, 40)
    pixels = decode(saved(Image.fromarray(values), form))
    np.testing.assert_array_equal(pixels, np.repeat((values // 256)[..., None], 3, axis=-1))
    assert (pixels.min(), pixels.max()) == (0, 255)


def tiff(bits=16, photometric=1, samples=1):
    """A grey TIFF of 1 x 1."""
    tags = [(256, 1), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 200), (277, samples), (278, 1)]
    tags.append((279, 2))
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + b"\xff\x0f"


def test_an_image_is_stretched_or_cropped_to_its_size():
    """A red frame of 8 pixels: stretched it stays all around, cropped to a taller shape it stays above and below."""
    framed = np.full((64, 128, 3), (255, 0, 0), np.uint8)
    framed[8:-8, 8:-8] = (0, 0, 255)
    data = saved(Image.fromarray(framed), "PNG")
    stretched, cropped = (decode(data, (64, 64), crop=crop) for crop in (False, True))
    assert stretched.shape == cropped.shape == (64, 64, 3)
    for pixels, sides in ((stretched, (250, 0)), (cropped, (0, 250))):
        assert pixels[2, 32, 0] > 250
        assert pixels[-3, 32, 0] > 250
        for column in (0, -1):
            assert pixels[32, column, 0] >= sides[0]
            assert pixels[32, column, 2] >= sides[1]


def test_greys_without_a_white_are_refused():
    assert decode(tiff()).shape == (1, 1, 3)
    floats = saved(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF")
    integers = saved(Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)), "TIFF")
    for data in (floats, integers, tiff(bits=12), tiff(photometric=0)):
        assert reason_of(lambda data=data: io.BytesIO(data)) == "unreadable: greys without a white"
        with pytest.raises(ImageProblem):
            read_header(lambda data=data: io.BytesIO(data))


def test_transparency_is_laid_over_white():
    pixels = np.array([[[200, 100, 0, 255], [200, 100, 0, 51], [200, 100, 0, 0]]], np.uint8)
    expected = [[[200, 100, 0], [244, 224, 204], [255, 255, 255]]]
    for form in ("PNG", "TIFF"):
        np.testing.assert_allclose(decode(saved(Image.fromarray(pixels), form)), expected, atol=1)
    lit = np.array([[[80, 255], [80, 0]]], np.uint8)
    assert decode(saved(Image.fromarray(lit, "LA"), "PNG"))[0, :, 0].tolist() == [80, 255]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    for form in ("GIF", "PNG"):
        assert decode(saved(palette, form, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert decode(saved(keyed, "PNG", transparency=(4, 5, 6))).tolist() == [[[1, 2, 3], [255, 255, 255]]]
    deep = Image.fromarray(np.array([[256, 512]], np.uint16))
    assert decode(saved(deep, "PNG", transparency=512))[0, :, 0].tolist() == [1, 255]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG", "AVIF"])
def test_of_several_frames_it_is_the_first(form):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:])
    assert np.abs(decode(data).reshape(-1, 3).mean(axis=0) - (255, 0, 0)).max() < 6


def png_of(width, height):
    """The head of a PNG, and hardly any pixels."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_a_pixel_limit_read_from_the_header(monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    for size in ((10_001, 10_000), (60_000, 60_000)):  # the second is beyond PIL's own limit
        assert reason_of(lambda size=size: io.BytesIO(png_of(*size))) == "unreadable: too many pixels"
        with pytest.raises(ImageProblem, match="too many pixels: .*, and 100000000 are the most"):
            read_header(lambda size=size: io.BytesIO(png_of(*size)))
    assert read_header(lambda: io.BytesIO(png_of(10_000, 10_000))).height == 10_000


def test_pil_prints_nothing(tmp_path):
    (tmp_path / "large.png").write_bytes(png_of(9_900, 9_900))
    palette = Image.new("P", (8, 8))
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 128]))
    (tmp_path / "odd.tif").write_bytes(tiff(samples=9))
    code = f"""
import pathlib, sys
from dinalrm_jax.data.images import ImageProblem, read_header, read_rgb
print("imported", file=sys.stderr)
for path in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
    for read in (read_header, read_rgb):
        try:
            read(path)
        except ImageProblem as problem:
            print(path.name, problem.reason)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.split("\n") == ["large.png unreadable", "odd.tif unreadable", "odd.tif unreadable", ""]
    assert result.stderr.endswith("imported\n")


# ---------------------------------------------------------------------------------- names


@pytest.fixture
def names(tmp_path):
    """A directory of what is no picture, and how each is to be counted."""
    root = tmp_path / "root"
    root.mkdir()
    os.mkfifo(root / "pipe")
    (root / "directory").mkdir()
    (root / "loop").symlink_to("loop")
    (root / "device").symlink_to("/dev/zero")
    (root / "dangling").symlink_to("nowhere")
    Image.fromarray(PICTURE).save(root / "a.png")
    Image.fromarray(PICTURE).save(tmp_path / "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    return root, {
        "pipe": "missing: not a regular file",
        "device": "missing: not a regular file",
        "directory": "missing: is a directory",
        "": "missing: is a directory",
        "loop": "missing: too many levels of symbolic links",
        "x" * 300: "missing: file name too long",
        "a.png/b": "missing: not a directory",
        "a\0.png": "missing: no file's name",
        "a\ud800.png": "missing: no file's name",
        "dangling": "missing",
        "b.png": "missing",
        "../outside.png": "missing: outside of the source",
        "directory/../../outside.png": "missing: outside of the source",
        str(tmp_path / "outside.png"): "missing: outside of the source",
    }


def test_names_that_cannot_be_opened(names):
    root, expected = names
    open_image = files_below(root)
    found = {}
    for name in expected:
        with pytest.raises(ImageProblem) as problem:
            open_image(name)
        found[name] = problem.value.reason
    assert found == expected
    for name in ("a.png", "link.png", "..a.png"):
        if name == "..a.png":
            (root / name).write_bytes((root / "a.png").read_bytes())
        np.testing.assert_array_equal(read_rgb(lambda name=name: open_image(name)), PICTURE)


def test_a_file_too_large_to_read_is_not_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    monster = tmp_path / "sparse"
    assert reason_of(monster) == "unreadable: too large a file"


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "error", [struct.error("odd"), MemoryError(), RecursionError(), ZeroDivisionError(), KeyError(1), OSError("odd")]
)
@pytest.mark.parametrize("step", ["open", "convert"])
def test_whatever_a_decoder_raises_is_the_pictures_fault(monkeypatch, tmp_path, error, step):
    def fails(*_, **__):
        raise error

    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    monkeypatch.setattr(Image if step == "open" else Image.Image, step, fails)
    assert reason_of(tmp_path / "a.png") == "unreadable"
    if step == "open":
        with pytest.raises(ImageProblem, match="not a readable image"):
            read_header(tmp_path / "a.png")


def test_tags_that_cannot_be_decoded_are_the_pictures_fault(monkeypatch):
    picture = Image.open(io.BytesIO(tiff()))

    def odd(*_):
        raise struct.error("odd")

    monkeypatch.setattr(type(picture.tag_v2), "get", odd)
    with pytest.raises(ImageProblem, match="not a readable image: odd"):
        read_header(picture)


def test_in_memory_there_is_no_file_system(monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pathlib.Path("/proc/self/mem").read_bytes())
    with pytest.raises(ImageProblem, match="Input/output error"):
        decode(saved(Image.fromarray(PICTURE), "PNG"))


class Failing(io.BytesIO):
    """A file whose reading fails as often as it is said to, over all of its openings."""

    left = 0

    def read(self, *args):
        if Failing.left:
            Failing.left -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return super().read(*args)


@pytest.mark.parametrize("read", [read_header, read_rgb])
def test_errors_of_the_file_system_are_waited_for(monkeypatch, read):
    data, pauses = saved(Image.fromarray(PICTURE), "PNG"), []
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    expected = read(lambda: io.BytesIO(data))
    Failing.left = 3
    np.testing.assert_equal(read(lambda: Failing(data)), expected)
    assert pauses == list(files.PAUSES)
    assert pauses == sorted(pauses)
    Failing.left = 1000
    with pytest.raises(OSError, match="cannot read an image: .*Stale file handle"):
        read(lambda: Failing(data))
    assert Failing.left == 1000 - 4
    Failing.left = 0


def test_out_of_descriptors_for_a_moment(monkeypatch, tmp_path):
    """The system's own EMFILE; the first pause ends it."""
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    monkeypatch.setattr(files.time, "sleep", sleep)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        with pytest.raises(OSError, match="Too many open files"):
            open_file(tmp_path / "a.png")
        pixels = read_rgb(tmp_path / "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    np.testing.assert_array_equal(pixels, PICTURE)
    assert waited == [files.PAUSES[0]]


def test_what_does_not_pass_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda _: pytest.fail("waited"))

    def denied():
        raise PermissionError(errno.EACCES, "Permission denied", "/x")

    with pytest.raises(OSError, match="cannot read /x: .*Permission denied"):
        patiently(denied, "/x")


@pytest.mark.parametrize("crop", [False, True])
def test_images_are_resized_by_lanczos(crop):
    """As PIL does it, on noise, where every other filter shows."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8))
    expected = (
        ImageOps.fit(image, (48, 48), Image.Resampling.LANCZOS)
        if crop
        else image.resize((48, 48), Image.Resampling.LANCZOS)
    )
    np.testing.assert_array_equal(read_rgb(image, (48, 48), crop=crop), np.asarray(expected))
