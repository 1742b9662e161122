"""Colour profiles made from their numbers: a display of wide gamut, and a press whose inks are far from Pillow's formula."""

from __future__ import annotations

import struct

D50 = (0.9642, 1.0, 0.8249)
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
"""XYZ of red, green and blue, adapted to D50."""


def display() -> bytes:
    """Display P3 with a gamma of 2.2: the reddest red that it can show is outside of sRGB."""
    gamma = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256))
    colours = {f"{name}XYZ".encode(): _xyz(*xyz) for name, xyz in zip("rgb", DISPLAY_P3, strict=True)}
    curves = {f"{name}TRC".encode(): gamma for name in "rgb"}
    return _profile(b"mntr", b"RGB ", b"XYZ ", {**colours, **curves, b"wtpt": _xyz(*D50)})


def press() -> bytes:
    """A press whose pure cyan, magenta and yellow are much darker than one minus the ink."""
    corners = bytes(v for corner in range(16) for v in _lab(*(corner >> bit & 1 for bit in (3, 2, 1, 0))))
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", *(1 << 16 if i % 4 == 0 else 0 for i in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * ramp + corners + 3 * ramp
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table, b"wtpt": _xyz(*D50)})


def _lab(cyan: int, magenta: int, yellow: int, black: int) -> tuple[int, int, int]:
    """Encoded in 8 bits, of full inks one over the other."""
    lightness = 255 - 70 * (cyan + magenta + yellow) - 200 * black
    return max(0, lightness), 128 - 30 * cyan + 50 * magenta, 128 - 30 * cyan + 60 * yellow


def _xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2 with these tags."""
    text = b"text" + bytes(4) + b"none\0"
    name = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(8 + 3 + 67)
    tags = {b"desc": name, b"cprt": text} | tags
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = 128 + len(table) + len(body)
    illuminant = struct.pack(">3i", *(round(value * 65536) for value in D50))
    head = struct.pack(">I", size) + bytes(4) + b"\x02\x10\0\0" + kind + space + connection + bytes(12)
    return (head + b"acsp" + bytes(28) + illuminant).ljust(128, b"\0") + table + body
