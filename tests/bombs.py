"""Files of a few bytes that declare sizes which no machine has, in every format that is read."""

import json
import struct
import zipfile
import zlib

from lavin.weights.gguf.header import MAX_ELEMENTS

HUGE = 2**60
UINT8, UINT32, BOOL, TEXT, ARRAY = 0, 4, 7, 8, 9


# --- GGUF ---

def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def entry(kind: int, value: bytes, key: bytes = b"a.b") -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, n: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, n) + content


def tensor(dimensions: int, sizes: bytes = b"") -> bytes:
    return text(b"output.weight") + struct.pack("<I", dimensions) + sizes + struct.pack("<IQ", 0, 0)


def gguf_file(*parts: bytes, entries: int = 1, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + b"".join(parts)


GGUF = {
    "array of bytes": gguf_file(entry(ARRAY, array(UINT8, HUGE))),
    "array of numbers whose size overflows": gguf_file(entry(ARRAY, array(UINT32, 2**62 + 1, bytes(8)))),
    "array of texts": gguf_file(entry(ARRAY, array(TEXT, HUGE, text(b"x")))),
    "array of an unknown type": gguf_file(entry(ARRAY, array(99, 8, bytes(8)))),
    "array of arrays": gguf_file(entry(ARRAY, array(ARRAY, 1) * 5000)),
    "long array": gguf_file(entry(ARRAY, array(BOOL, MAX_ELEMENTS + 1, bytes(MAX_ELEMENTS + 1)))),
    "text": gguf_file(entry(TEXT, text(b"x", HUGE))), "key": gguf_file(text(b"x", HUGE)),
    "text in an array": gguf_file(entry(ARRAY, array(TEXT, 1, text(b"x", HUGE)))),
    "entries": gguf_file(entries=HUGE), "tensors": gguf_file(entry(UINT32, bytes(4)), tensors=HUGE),
    "dimensions": gguf_file(tensor(2**32 - 1), entries=0, tensors=1),
    "name of a tensor": gguf_file(text(b"x", HUGE) + bytes(40), entries=0, tensors=1)}


# --- safetensors ---

def safetensors(header: dict | bytes, length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content


SAFETENSORS = {
    "length of the header": safetensors({}, HUGE),
    "tensor": safetensors({"x": {"dtype": "F32", "shape": [2**58], "data_offsets": [0, HUGE]}}),
    "shape whose product overflows": safetensors(
        {"x": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
    "place behind the end": safetensors({"x": {"dtype": "F32", "shape": [4], "data_offsets": [HUGE, HUGE + 16]}}),
    "depth of arrays": safetensors(b"[" * 100_000), "depth of objects": safetensors(b'{"x":' * 100_000)}


# --- torch ---

PICKLES = {
    "length of bytes": b"\x80\x02B" + b"\xff\xff\xff\x7f",
    "length of many bytes": b"\x80\x04\x8e" + struct.pack("<Q", HUGE),
    "length of a number": b"\x80\x02\x8b" + b"\xff\xff\xff\x7f"}


def compressed(path):
    """The same file with compressed records: 256 KiB of zeros in a few bytes."""
    small = path.with_name("compressed.pth")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    return small


def enlarged(path):
    """The same file, whose directory says 4 GB of each record."""
    content = path.read_bytes()
    head, *records = content.split(b"PK\x01\x02")
    changed = [record[:16] + struct.pack("<II", 2**32 - 16, 2**32 - 16) + record[24:] for record in records]
    path.write_bytes(b"PK\x01\x02".join([head, *changed]))
    return path


# --- Tokenizers ---

TOKENIZER_MODELS = {"length of a field": b"\x0a\xff\xff\xff\xff\x0f" + bytes(20),
                    "length of 64 bits": b"\x0a" + b"\xff" * 9 + b"\1", "depth of groups": b"\x0b" * 100_000}
TOKENIZER_JSONS = {"depth of arrays": b"[" * 100_000, "depth of objects": b'{"a":' * 100_000}


# --- Pictures ---

def chunk(name: bytes, data: bytes, length: int | None = None) -> bytes:
    """A chunk of a PNG, which may declare another length than it has."""
    return (struct.pack(">I", len(data) if length is None else length) + name + data
            + struct.pack(">I", zlib.crc32(name + data)))


def png(width: int, height: int, *before: bytes, pixels: bytes = b"\0\x64\x96\xc8") -> bytes:
    """A PNG of these sizes in RGB, of which only `pixels` are there. before: chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(before) + chunk(b"IDAT", zlib.compress(pixels))
            + chunk(b"IEND", b""))


def tiff(width: int, count: int = 1, strip: int = 122) -> bytes:
    """A grey TIFF of one row. count: the number of strips, which begin at `strip`."""
    tags = [(256, 1, width), (257, 1, 1), (258, 1, 8), (259, 1, 1), (262, 1, 1), (273, count, strip), (277, 1, 1),
            (278, 1, 1), (279, count, 1)]
    return (b"II*\0" + struct.pack("<IH", 8, len(tags))
            + b"".join(struct.pack("<HHII", tag, 4, number, value) for tag, number, value in tags)
            + struct.pack("<I", 0) + b"\x64")


def bmp(side: int, bits: int, colours: int = 0) -> bytes:
    header = struct.pack("<IHHIIiiHHIIiiII", 58, 0, 0, 54, 40, side, side, 1, bits, 0, 0, 0, 0, colours, 0)
    return b"BM" + header + bytes(4)


PICTURES = {
    "PNG of 2^60 pixels": png(2**30, 2**30), "PNG of 400 million pixels": png(20_000, 20_000),
    "length of a chunk of a PNG": png(1, 1, chunk(b"tEXt", b"x\0y", 2**31 - 1)),
    **{f"unpacked {name.decode()} of a PNG": png(1, 1, chunk(name, b"x\0\0" + zlib.compress(bytes(30_000_000))))
       for name in (b"zTXt", b"iCCP")},
    "width of a TIFF": tiff(2**32 - 1), "pixels of a TIFF": tiff(400_000_000),
    "strips of a TIFF": tiff(1, count=2**32 - 1), "place of a TIFF's pixels": tiff(1, strip=2**32 - 1),
    "GIF": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + bytes(6) + b"," + struct.pack(
        "<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02\x44\x01\x00;",
    "BMP": bmp(2**31 - 1, bits=24), "colours of a BMP": bmp(1, bits=8, colours=2**32 - 1),
    "PPM": b"P6 2147483647 2147483647 255\n" + bytes(3)}


# --- JSON ---

def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


JSON = {"depth of arrays": nested(100_000), "depth of objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "depth of keys without an end": b'{"a":' * 100_000, "digits of a number": b'{"a":' + b"9" * 100_000 + b"}"}
