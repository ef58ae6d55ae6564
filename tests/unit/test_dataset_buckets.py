"""Sizes to train at."""

from __future__ import annotations

import pytest

from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import buckets

# Height and width of the official training code's table; the transposes belong to it too.
OFFICIAL = (
    (704, 1408),
    (704, 1344),
    (768, 1344),
    (768, 1280),
    (832, 1216),
    (832, 1152),
    (896, 1152),
    (896, 1088),
    (960, 1088),
    (960, 1024),
    (1024, 1024),
)


def test_the_buckets_of_one_megapixel_are_the_official_ones() -> None:
    (sizes,) = buckets.parse("1024")
    assert set(sizes) == {*OFFICIAL, *((width, height) for height, width in OFFICIAL)}


@pytest.mark.parametrize("grid", buckets.GRIDS)
@pytest.mark.parametrize("side", [128, 512, 768, 1536, 4096])
def test_buckets_lie_on_the_grid_near_the_area_and_come_with_their_transposes(side: int, grid: int) -> None:
    (sizes,) = buckets.parse(str(side), grid)
    for width, height in sizes:
        assert width % grid == 0 and height % grid == 0 and max(width, height) <= 4096
        assert 0.9 * side**2 <= width * height <= side**2
        assert 0.5 <= width / height <= 2
        assert (height, width) in sizes
    assert (side, side) in sizes
    assert len({width / height for width, height in sizes}) == len(sizes)


def test_lists_of_areas_and_sizes() -> None:
    assert buckets.parse("1024x1024,1344x768") == (((1024, 1024), (1344, 768)),)
    assert buckets.parse(" 512 , 128x64；64×128 ", 64)[1:] == (((128, 64), (64, 128)),)
    assert len(buckets.parse("512,1024,1024x1024")) == 3
    assert buckets.parse("512,512") == buckets.parse("512")


@pytest.mark.parametrize(
    ("text", "grid", "words"),
    [
        ("", 64, "is no list of resolutions"),
        ("1024by768", 64, "'1024by768'"),
        ("-64x64", 64, "'-64x64'"),
        ("1360x768", 64, "Use 1344x768"),
        ("1000x1000", 16, "1000x1000"),
        ("0", 64, "The resolution 0"),
        ("8192", 64, "from 16 to 4096"),
        ("99999x64", 64, "Use 4096x64"),
        ("1024", 8, "The grid is 8"),
    ],
)
def test_what_is_no_resolution_is_refused_in_words(text: str, grid: int, words: str) -> None:
    with pytest.raises(LongCatError) as caught:
        buckets.parse(text, grid)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((1024, 1024), (1024, 1024)),
        ((4000, 3000), (1152, 896)),
        ((3000, 4000), (896, 1152)),
        ((1920, 1080), (1344, 768)),
        ((1000, 10), (1408, 704)),
        ((50, 50), (1024, 1024)),
    ],
)
def test_a_picture_goes_to_the_bucket_nearest_in_ratio(picture: tuple[int, int], size: tuple[int, int]) -> None:
    assert buckets.choose(buckets.parse("1024"), *picture) == (size,)


def test_nearest_is_measured_in_the_logarithm() -> None:
    # 1.4 is nearer to 2 than to 1 in the ratio's logarithm only above the square root of 2.
    passes = (((64, 64), (128, 64)),)
    assert buckets.choose(passes, 1410, 1000) == ((64, 64),)
    assert buckets.choose(passes, 1420, 1000) == ((128, 64),)
    assert buckets.choose(passes, 1000, 1420) == ((64, 64),)


def test_a_picture_is_trained_at_each_area_and_at_each_listed_size_of_its_ratio() -> None:
    assert buckets.choose(buckets.parse("512,1024"), 100, 100) == ((512, 512), (1024, 1024))
    assert buckets.choose(buckets.parse("512x512,1024x1024,1344x768"), 100, 100) == ((512, 512), (1024, 1024))
    assert buckets.choose(buckets.parse("1024,1024x1024"), 100, 100) == ((1024, 1024),)


def test_what_is_enlarged_and_what_is_kept() -> None:
    assert buckets.enlargement((1024, 1024), 512, 2048) == 2
    assert buckets.kept((1024, 1024), 512, 2048) == pytest.approx(0.25)
    assert buckets.kept((1344, 768), 2688, 1536) == 1
