"Pictures as they come: cut, standing in for something else, with odd notes, of odd ranges and shapes, or no files at all."
import io
import os
import random
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, features

from dqe_cir.data import square_pad, target_pad
from dqe_cir.data.pictures import FORMATS, open_image

from .frame import Case

WRITTEN = [name for name in ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM") if name in FORMATS and (name not in ("WEBP", "AVIF") or features.check(name.lower()))]
NOTES = (b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"pHYs", b"gAMA", b"cHRM", b"tIME", b"sRGB", b"bKGD", b"sPLT", b"acTL", b"fcTL", b"prVt")


def noise(rng: random.Random, width: int = 0, height: int = 0) -> Image.Image:
    "A picture that packs badly, so that every part of its file matters."
    size = height or rng.randrange(20, 70), width or rng.randrange(20, 70), 3
    return Image.fromarray(np.random.default_rng(rng.randrange(2**32)).integers(0, 256, size, dtype=np.uint8))


def packed(picture: Image.Image, kind: str, **more) -> bytes:
    held = io.BytesIO()
    picture.save(held, kind, **more)
    return held.getvalue()


def opening(path: Path, content: bytes | None = None, look=None):
    "What a user does with a file: open it; `look` says in an assertion what must be seen."
    if content is not None: path.write_bytes(content)

    def act():
        picture = open_image(path)
        assert picture.mode == "RGB" and min(picture.size) > 0
        if look: look(picture)
    return act


def cut_at(kind: str, seed: int):
    def make(folder):
        rng = random.Random(seed)
        content = packed(noise(rng), kind)
        return opening(folder / f"cut.{kind.lower()}", content[:int(len(content) * rng.uniform(0.05, 0.85))])
    return make


def chunk(kind: bytes, body: bytes, sound: bool = True) -> bytes:
    check = zlib.crc32(kind + body) ^ (0 if sound else 1)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def png_with(kind: bytes, seed: int):
    "A sound PNG but for one chunk beside the picture: random bytes, sometimes with a wrong checksum."
    def make(folder):
        rng = random.Random(seed)
        picture = noise(rng)
        content, note = packed(picture, "PNG"), chunk(kind, rng.randbytes(rng.choice((0, 1, 5, 40, 3000))), rng.random() < 0.6)

        def same(found): assert found.tobytes() == picture.tobytes(), "the picture is another one"
        return opening(folder / "noted.png", content[:33] + note + content[33:], same)
    return make


def text_bomb(folder: Path):
    content = packed(Image.new("RGB", (30, 30)), "PNG")
    note = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**24), 9))
    return opening(folder / "comment.png", content[:33] + note * 9 + content[33:])


def jpeg_with(marker: int, start: bytes, seed: int):
    "A sound JPEG but for one segment of notes, whose body after its name is random or a damaged directory of tags."
    def make(folder):
        rng = random.Random(seed)
        content = packed(noise(rng), "JPEG")
        entries = b"".join(struct.pack("<HHII", rng.choice((0x112, 0x10F, 0x11A, 0x128, 0x8769, 0x8825, rng.randrange(65536))), rng.randrange(14), rng.choice((0, 1, 2, 9, 2**31)), rng.randrange(2**32))
                           for _ in range(5))
        body = start + rng.choice((rng.randbytes(60), b"II*\0" + struct.pack("<IH", 8, 5) + entries, b"MM\0*" + rng.randbytes(30), b"II*\0" + struct.pack("<I", 2**31), b""))
        return opening(folder / "noted.jpg", content[:2] + b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body + content[2:])
    return make


def turned(kind: int, seed: int):
    "Turned by a note among broken ones: whatever the others say, the picture stands upright."
    def make(folder):
        rng = random.Random(seed)
        odd = (0x10F, rng.choice((5, 10, 12)), 1, struct.pack("<I", rng.randrange(100, 2**31)))
        entries = [(0x112, 3, 1, struct.pack("<HH", kind, 0)), odd]
        body = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)
        content = packed(noise(rng, 40, 24), "JPEG")

        def upright(found): assert found.size == ((24, 40) if kind > 4 else (40, 24)), found.size
        return opening(folder / "phone.jpg", content[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + content[2:], upright)
    return make


def standing_in(name: str, content: bytes):
    return lambda folder: opening(folder / name, content)


def special(what: str):
    def make(folder):
        path = folder / f"{what}.png"
        if what == "folder": path.mkdir()
        elif what == "pipe": os.mkfifo(path)
        elif what == "socket": socket.socket(socket.AF_UNIX).bind(os.path.relpath(path) if len(str(path)) > 100 else str(path))
        elif what == "device": path.symlink_to("/dev/zero")
        elif what == "loop": path.symlink_to(path)
        elif what == "dangling": path.symlink_to(folder / "nowhere")
        return opening(path)
    return make


def huge(kind: str, width: int, height: int):
    "A header that promises more pixels than anybody opens, and next to nothing behind it."
    def make(folder):
        if kind == "png": content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(1000)))
        elif kind == "ppm": content = f"P6 {width} {height} 255\n".encode() + bytes(1000)
        elif kind == "bmp": content = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 1054, 0, 0, 54, 40, width, height, 1, 24, 0, 1000, 0, 0, 0, 0) + bytes(1000)
        else: content = b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02L\x01\0;"
        return opening(folder / f"huge.{kind}", content)
    return make


def ramp(kind: str, low: float, high: float, holes: float = 0.0):
    "A picture of numbers from `low` to `high`: it must have contrast, and its lowest number be its darkest."
    def make(folder):
        values = np.linspace(low, high, 1600).reshape(40, 40).astype(kind)
        if holes: values[20, :int(40 * holes)] = np.nan
        Image.fromarray(values).save(folder / "depth.tif")

        def seen(found):
            grey = np.asarray(found, dtype=int)[..., 0]
            assert grey[-1, -1] - grey[0, 0] > 100, f"{grey.min()} to {grey.max()}"
        return opening(folder / "depth.tif", look=seen)
    return make


def no_number(folder: Path):
    Image.fromarray(np.full((20, 20), np.nan, dtype=np.float32)).save(folder / "gap.tif")
    return opening(folder / "gap.tif")


def strip(width: int, height: int, transform):
    def make(folder):
        Image.new("L", (width, height), 200).save(folder / "strip.png")

        def act():
            pixels = transform(open_image(folder / "strip.png"), size=64)
            assert pixels.shape == (3, 64, 64) and pixels.isfinite().all()
        return act
    return make


def stored(mode: str, kind: str):
    "A sound picture of a mode in a format."
    def make(folder):
        picture = noise(random.Random(mode + kind)).convert("L").convert(mode) if mode != "P" else noise(random.Random(1)).quantize(16)
        return opening(folder / f"fine.{kind.lower()}", packed(picture, kind))
    return make


MODES = {"PNG": ("1", "L", "LA", "P", "RGB", "RGBA"), "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr"), "JPEG": ("L", "RGB", "CMYK"), "GIF": ("L", "P"), "BMP": ("1", "L", "RGB"), "ICO": ("RGBA",)}


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    draw = lambda: rng.randrange(2**32)
    for kind in WRITTEN:
        if kind not in ("GIF", "AVIF"): yield Case("cut", kind, cut_at(kind, draw()))
    yield from (Case("cut", f"PNG again {i}", cut_at(rng.choice(("PNG", "JPEG")), draw())) for i in range(4))
    for kind in NOTES: yield Case("side note", f"PNG {kind.decode()}", png_with(kind, draw()), "accept")
    yield Case("side note", "PNG comment that unpacks to 150 MB", text_bomb, "accept")
    starts = {"Exif": (0xE1, b"Exif\0\0"), "XMP": (0xE1, b"http://ns.adobe.com/xap/1.0/\0"), "ICC": (0xE2, b"ICC_PROFILE\0\1\2"), "MPF": (0xE2, b"MPF\0"), "Photoshop": (0xED, b"Photoshop 3.0\0" + b"8BIM"),
              "comment": (0xFE, b"\xff\xfe"), "APP4": (0xE4, b"")}
    for name, (marker, start) in starts.items(): yield from (Case("side note", f"JPEG {name} {i}", jpeg_with(marker, start, draw()), "accept") for i in range(3 if name in ("Exif", "MPF") else 1))
    for kind in range(1, 9): yield Case("turned among broken notes", str(kind), turned(kind, draw()), "accept")
    others = {"page.png": b"<!doctype html><title>404</title>", "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n", "empty.webp": b"", "zeros.png": bytes(5000),
              "random.jpg": rng.randbytes(3000), "words.bmp": b"shopping list\n" * 9, "archive.png": b"PK\3\4" + rng.randbytes(200), "document.png": b"%PDF-1.7\n" + rng.randbytes(200),
              "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n(made-by-a-picture) (w) file closefile\nshowpage\n", "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
              "metafile.png": b"\xd7\xcd\xc6\x9a" + bytes(60), "layers.png": b"8BPS\0\1" + bytes(60), "film.jpg": b"\0\0\0\x18ftypmp42" + bytes(60), "phone.heic": b"\0\0\0\x18ftypheic" + bytes(60),
              "signature only.png": b"\x89PNG\r\n\x1a\n", "two bytes.jpg": b"\xff\xd8", "pickle.png": b"\x80\4\x95" + bytes(30)}
    for name, content in others.items(): yield Case("stands in for a picture", name, standing_in(name, content))
    for what in ("folder", "pipe", "socket", "device", "loop", "dangling", "absent"): yield Case("no regular file", what, special(what))
    for kind, width, height in (("png", 60_000, 60_000), ("png", 2_000_000, 1), ("png", 1, 2**31 - 1), ("ppm", 90_000, 90_000), ("bmp", 70_000, 70_000), ("gif", 65_535, 65_535)):
        yield Case("promises too much", f"{kind} {width} x {height}", huge(kind, width, height))
    for kind, low, high in (("float32", 0, 1), ("float32", 0, 255), ("float32", 0, 0.001), ("float32", -1, 1), ("float32", 300, 4000), ("float32", 0, 1e30), ("int32", 0, 255), ("int32", 0, 4095), ("int32", 0, 65535),
                            ("int32", -2**31, 2**31 - 1), ("float32", 0, rng.uniform(0.01, 1e6)), ("int32", rng.randrange(-900, 0), rng.randrange(200, 10**6)), ("uint16", 0, 65535)):
        yield Case("range of numbers", f"{kind} {low} to {high}", ramp(kind, low, high), "accept")
    yield Case("range of numbers", "with gaps", ramp("float32", 0, 1, 0.5), "accept")
    yield Case("range of numbers", "nothing but gaps", no_number)
    for width, height in ((40_000, 8), (8, 40_000), (60_000, 1), (1_000_000, 1)):
        yield Case("strip", f"{width} x {height}", strip(width, height, rng.choice((target_pad, square_pad))), "accept")
    for kind, modes in MODES.items():
        if kind in FORMATS: yield from (Case("sound", f"{kind} {mode}", stored(mode, kind), "accept") for mode in modes)
