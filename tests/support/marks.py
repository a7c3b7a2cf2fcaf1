"""What is inside a file, read without klein and without Pillow."""

import xml.etree.ElementTree as ET

IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
PREFIX = "http://cv.iptc.org/newscodes/digitalsourcetype/"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"

Chunk = tuple[bytes, bytes]


def chunks(data: bytes) -> list[Chunk]:
    """The named parts of a PNG, JPEG or WebP, in order."""
    if data.startswith(b"\x89PNG"):
        return _png(data)
    return _jpeg(data) if data.startswith(b"\xff\xd8") else _webp(data)


def _png(data: bytes) -> list[Chunk]:
    found, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += size + 12
    return found


def _jpeg(data: bytes) -> list[Chunk]:
    found, at = [], 2
    while data[at + 1] != 0xDA:
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((data[at : at + 2], data[at + 4 : at + 2 + size]))
        at += size + 2
    return [*found, (b"scan", data[at:])]


def _webp(data: bytes) -> list[Chunk]:
    found, at = [], 12
    while at < len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        found.append((data[at : at + 4], data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return found


XMP_HEADS = {
    b"iTXt": b"XML:com.adobe.xmp\0\0\0\0\0",
    b"\xff\xe1": b"http://ns.adobe.com/xap/1.0/\0",
    b"XMP ": b"",
}
"""Where each format keeps XMP: the chunk's name, and what its data begins with."""


def is_xmp(chunk: Chunk) -> bool:
    return chunk[0] in XMP_HEADS and chunk[1].startswith(XMP_HEADS[chunk[0]])


def source_type(data: bytes) -> str | None:
    """IPTC's word in the one XMP packet of a file, None without a packet."""
    packets = [chunk for chunk in chunks(data) if is_xmp(chunk)]
    if not packets:
        return None
    ((name, packet),) = packets
    (about,) = ET.fromstring(packet.removeprefix(XMP_HEADS[name])).iter(f"{RDF}Description")
    return about.attrib[IPTC].removeprefix(PREFIX)
