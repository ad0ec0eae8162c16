"""Sizes as people write them: `2GiB`, `1.5GB`, `900MiB`.

GB is 10^9 bytes and GiB is 2^30; nothing here mixes the two.
"""

from __future__ import annotations

import re

from gemma_edge.runtime.errors import UsageError

_UNITS = {"B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}
_BY_LOWER = {unit.lower(): scale for unit, scale in _UNITS.items()}
# ASCII digits only: \d would also take other scripts' digits. Bounded, so that no number is absurdly long.
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes of a size such as "2GiB", "1.5 GB" or "4096" (bytes); case does not matter.

    Raises:
        UsageError: not a positive size, or a unit that could mean two things ("2G").
    """
    match = _SIZE.fullmatch(text)
    number, unit = match.groups() if match else ("", "")
    if match and unit.upper() in ("K", "M", "G", "T"):
        both = f"{number}{unit.upper()}iB (powers of 1024) or {number}{unit.upper()}B (powers of 1000)"
        raise UsageError(f"size {text!r}: say {both}")
    scale = _BY_LOWER.get(unit.lower() or "b")
    if not match or scale is None:
        units = ", ".join(_UNITS)
        raise UsageError(f"size {text!r}: expected a number and a unit ({units}), such as 2GiB or 900MiB")
    whole, _, part = number.partition(".")
    size = int(whole) * scale + int(part or 0) * scale // 10 ** len(part)
    if size < 1:
        raise UsageError(f"size {text!r}: expected at least one byte")
    return size


def as_bytes(size: int | str) -> int:
    """A size given as bytes or as people write it; 0 for none.

    Raises:
        UsageError: it is no size.
    """
    if isinstance(size, str):
        return 0 if size.strip() == "0" else parse_size(size)
    if size < 0:
        raise UsageError(f"a size must be 0 or more, not {size}")
    return size


def format_size(size: int, *, binary: bool = True) -> str:
    """A size in about three digits: "1.86 GiB", or with `binary=False` "2 GB"."""
    step, suffix = (1024, "iB") if binary else (1000, "B")
    scaled, prefix = float(size), ""
    for candidate in "KMGT":
        # Compared as it will be printed, so that 999.9 MB becomes 1 GB and not 1000 MB.
        if abs(scaled) < 999.5:
            break
        scaled, prefix = scaled / step, candidate
    if not prefix:
        return f"{size} B"
    decimals = 2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0
    text = f"{scaled:.{decimals}f}"
    return f"{text.rstrip('0').rstrip('.') if decimals else text} {prefix}{suffix}"


def format_limit(size: int) -> str:
    """A limit as it was probably given: "3 GB" where tenths of a GB are exact, else as `format_size`."""
    return format_size(size, binary=bool(size % 10**8))
