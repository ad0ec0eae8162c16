"""Sizes in and out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.units import format_limit, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 2**30),
        ("1.5GB", 1_500_000_000),
        ("900MiB", 900 * 2**20),
        ("900 mib", 900 * 2**20),
        (" 64KB ", 64_000),
        ("4096", 4096),
        ("4096B", 4096),
        ("0.1GB", 100_000_000),  # exact: no binary fraction in between
        ("1TiB", 2**40),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-2GiB", "2 XiB", "1e9", "0", "0.4B", "inf", "nan", "2GiB!", "\u0662GiB", "1_000", "9" * 30],
)
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


def test_ambiguous_unit_names_both_readings() -> None:
    with pytest.raises(UsageError, match=r"2GiB .* or 2GB"):
        parse_size("2G")


@pytest.mark.parametrize(
    ("size", "binary", "text"),
    [
        (0, True, "0 B"),
        (512, True, "512 B"),
        (2 * 2**30, True, "2 GiB"),
        (2_000_000_000, True, "1.86 GiB"),
        (1_950_000_000, False, "1.95 GB"),
        (999_999_999, False, "1 GB"),
        (320 * 2**20, True, "320 MiB"),
        (1000 * 2**20, True, "0.98 GiB"),
    ],
)
def test_format_size(size: int, binary: bool, text: str) -> None:
    assert format_size(size, binary=binary) == text


@pytest.mark.parametrize("text", ["2 GB", "1.5 GB", "3 GiB", "600 MiB", "192 MiB"])
def test_format_limit_is_as_it_was_given(text: str) -> None:
    assert format_limit(parse_size(text)) == text


@given(st.integers(1, 2**50), st.booleans())
def test_what_is_printed_reads_back_within_its_digits(size: int, binary: bool) -> None:
    assert parse_size(format_size(size, binary=binary)) == pytest.approx(size, rel=0.006)
