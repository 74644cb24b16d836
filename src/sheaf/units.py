"""Bytes, seconds and rates: plain numbers inside, readable text at the edges."""

import re

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


def pretty_bytes(size_bytes: float) -> str:
    """Bytes in binary units with three digits.

    >>> pretty_bytes(1536), pretty_bytes(7_386_624 * 4)
    ('1.50 KiB', '28.2 MiB')
    """
    value, unit = float(size_bytes), _BINARY[0]
    for unit in _BINARY:
        if abs(value) < 1000 or unit == _BINARY[-1]:
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{_three_digits(value)} {unit}"


def pretty_seconds(seconds: float) -> str:
    """Seconds with the unit a reader expects.

    >>> pretty_seconds(0.000042), pretty_seconds(0.4), pretty_seconds(75), pretty_seconds(7500)
    ('42.0 us', '400 ms', '1 min 15 s', '2 h 5 min')
    """
    if seconds < 1e-3:
        return f"{_three_digits(seconds * 1e6)} us"
    if seconds < 1:
        return f"{_three_digits(seconds * 1e3)} ms"
    if seconds < 60:
        return f"{_three_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def pretty_number(value: float) -> str:
    """A number with about three digits and thousands apart.

    >>> pretty_number(12345.6), pretty_number(87.65), pretty_number(0.4321)
    ('12,346', '87.7', '0.43')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def pretty_rate(per_second: float, unit: str) -> str:
    """A rate in decimal units.

    >>> pretty_rate(1.25e9, "B"), pretty_rate(48e9, "FLOP")
    ('1.25 GB/s', '48.0 GFLOP/s')
    """
    for prefix in ("P", "T", "G", "M", "k"):
        if per_second >= _DECIMAL[prefix]:
            return f"{_three_digits(per_second / _DECIMAL[prefix])} {prefix}{unit}/s"
    return f"{_three_digits(per_second)} {unit}/s"


def parse_bytes(text: str) -> int:
    """Bytes from text such as ``"4 GiB"``, ``"500MB"`` or ``"123"``.

    Raises ValueError for anything else.

    >>> parse_bytes("4 GiB"), parse_bytes("500MB")
    (4294967296, 500000000)
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*(?:([KMGTP])(i)?)?B?\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write a number with B, KB, KiB, MB, MiB, GB or GiB")
    power = " KMGTP".index(match[2].upper()) if match[2] else 0
    return round(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
