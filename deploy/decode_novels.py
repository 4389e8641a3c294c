#!/usr/bin/env python3
"""Writes the novels in Debian's r-cran-janeaustenr as plain text files, without R.

Usage: decode_novels.py Rdata.rdb FOLDER

Rdata.rdb is a row of records: 4 bytes unpacked length (big-endian), then a zlib stream. A stream holds one serialized
vector of strings, one string a line of the novel: "X\\n", three 32-bit versions, the native encoding's name, then
(flags, count) and per string (flags, length, bytes); all integers big-endian, length -1 for a missing string.
"""
import pathlib
import struct
import sys
import zlib

NOVELS = [  # in the file's order, with the words that their title pages hold
    ("emma", "EMMA"),
    ("mansfield_park", "MANSFIELD PARK"),
    ("northanger_abbey", "NORTHANGER ABBEY"),
    ("persuasion", "Persuasion"),
    ("pride_and_prejudice", "PRIDE AND PREJUDICE"),
    ("sense_and_sensibility", "SENSE AND SENSIBILITY"),
]
STRING_VECTOR, STRING = 16, 9  # types of R's serialization, the low byte of `flags`


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        if count < 0 or self.at + count > len(self.data):
            raise ValueError(f"record ends at byte {len(self.data)}, needed {self.at + count}")
        self.at += count
        return self.data[self.at - count:self.at]

    def int32(self):
        return struct.unpack(">i", self.take(4))[0]


def records(data):
    reader = Reader(data)
    while reader.at + 4 < len(data):
        length = reader.int32()
        stream = zlib.decompressobj()
        record = stream.decompress(data[reader.at:])
        if len(record) != length:
            raise ValueError(f"record at byte {reader.at}: got {len(record)} bytes, expected {length}")
        yield record
        reader.at = len(data) - len(stream.unused_data)


def lines(record):
    reader = Reader(record)
    if reader.take(2) != b"X\n":
        raise ValueError("record is not in R's binary form")
    reader.take(12)
    reader.take(reader.int32())
    if reader.int32() & 0xFF != STRING_VECTOR:
        raise ValueError("record is not a vector of strings")
    for _ in range(reader.int32()):
        if reader.int32() & 0xFF != STRING:
            raise ValueError(f"no string at byte {reader.at - 4}")
        yield reader.take(max(reader.int32(), 0)).decode("utf-8")


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    found = 0
    for record in records(source.read_bytes()):
        if found == len(NOVELS):
            break
        name, title = NOVELS[found]
        text = "\n".join(lines(record)) + "\n"
        if title not in text[:400]:
            sys.exit(f"decode_novels: record {found} of {source}: expected '{title}' on its first page")
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        found += 1
    if found != len(NOVELS):
        sys.exit(f"decode_novels: {source}: got {found} novels, expected {len(NOVELS)}")


if __name__ == "__main__":
    main()
