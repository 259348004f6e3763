import pytest

from dinalrm_jax.data.buckets import BUCKETS, align, bucket_name, nearest, nearest_aspect, parse_bucket


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1024, 1024), (1024, 1024)),
        ((700, 700), (512, 512)),  # ln area: nearer to 512 than to 1024
        ((730, 730), (1024, 1024)),
        ((3000, 3000), (1024, 1024)),
        ((1200, 832), None),  # ln(1200/832) = 0.366; the nearest shapes are at 0.325 and 0.405
        ((1248, 832), (1248, 832)),
        ((900, 600), (1248, 832)),  # 3:2, the smaller of the two 3:2 buckets
        ((2688, 1792), (1344, 896)),
        ((1030, 1000), (1024, 1024)),  # ln 1.03 = 0.0296
        ((1031, 1000), None),  # ln 1.031 = 0.0305
        ((768, 1365), (832, 1472)),  # 16:9
    ],
)
def test_nearest(size, bucket):
    assert nearest(size, BUCKETS, 0.03) == bucket


@pytest.mark.parametrize(
    ("first", "second", "bucket"),
    [
        ((512, 512), (512, 512), (512, 512)),
        ((256, 256), (1024, 1024), (1024, 1024)),  # both scaled to the larger long side
        ((1248, 832), (1344, 896), (1344, 896)),
        ((1024, 768), (1152, 832), (1152, 832)),  # 4:3 and 18:13 are 3.7% apart; the smaller width decides
        ((1024, 1024), (1024, 768), None),
        ((1248, 832), (832, 1248), None),
        ((1152, 832), (1248, 832), None),  # 7.7%
    ],
)
def test_align(first, second, bucket):
    assert align(first, second, BUCKETS, 0.03) == bucket
    assert align(second, first, BUCKETS, 0.03) == bucket


def test_cropping_takes_the_nearest_shape():
    assert nearest_aspect((1216, 832), BUCKETS) in {(1248, 832), (1152, 832)}
    assert nearest_aspect((5000, 100), BUCKETS) == (1472, 832)
    assert nearest_aspect((400, 400), BUCKETS) == (512, 512)


def test_names():
    assert all(parse_bucket(bucket_name(bucket)) == bucket for bucket in BUCKETS)
    for name in ("1024", "1024x", "100x128", "0x16"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            parse_bucket(name)
