"""Payload of rows that are documents: a text, a path or an image of each, as tensors of a shard and as tokens.

The texts of a feature store's documents are kept as its `StoredText`, whose tokens are words and punctuation; an image
is shown as a data URI.
"""

import base64
import re
import struct
import zlib
from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Int64, Shaped, UInt8
from torch import Tensor

from saelab.stores.corpus import StoredText

PayloadKinds: TypeAlias = dict[str, list[int]]
"""What documents have, among "texts", "paths" (of image files, in place of texts) and "pixels", whose value is the
shape of an image; the others have an empty list."""
PIECE = re.compile(r"\s*(?:[\u2e80-\u9fff]|[^\W_\u2e80-\u9fff]+(?:['\u2019][^\W_\u2e80-\u9fff]+)*|[^\w\s]|_)|\s+")
"""A word or a sign with the space before it; ideographs are words of one character."""
LARGEST_IMAGE = 1 << 18
"""Bytes of an image file up to which it is shown."""
SIGNATURES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}
"""How files of images that browsers show begin."""


def pack_strings(strings: Sequence[str]) -> dict[str, Tensor]:
    """The UTF-8 bytes of strings, and where each ends, as tensors of a shard.

    >>> pack_strings(["a", "bc"])["text_ends"].tolist()
    [1, 3]
    """
    parts = [string.encode() for string in strings]
    data = np.frombuffer(b"".join(parts), np.uint8).copy()
    return {"texts": torch.from_numpy(data), "text_ends": torch.from_numpy(np.cumsum([len(part) for part in parts]))}


def unpack_strings(data: UInt8[Tensor, "n_bytes"], ends: Int64[Tensor, "n"], start: int = 0) -> list[str]:
    """The strings whose bytes are `data`, in which they end at `ends - start`; ValueError for bytes that are no UTF-8
    and ends that fall.
    """
    text, borders = data.numpy().tobytes(), [0, *(ends - start).tolist()]
    if borders != sorted(borders) or borders[-1] > len(text):
        raise ValueError("the ends of its texts must rise within their bytes. It was edited: make it again.")
    return [text[a:b].decode() for a, b in pairwise(borders)]


def split_words(texts: Iterable[str]) -> StoredText:
    """Documents as a text whose tokens are words and signs, each with the space before it; joined they are the document
    again.

    >>> made = split_words(["A cat.", "A dog"])
    >>> made.words(0, 3), made.doc_ids.tolist()
    (['A', ' cat', '.'], [0, 0, 0, 1, 1])
    """
    known: dict[str, int] = {}
    ids, counts = array("i"), array("i")
    for text in texts:
        pieces = PIECE.findall(text)
        ids.extend([known.setdefault(piece, len(known)) for piece in pieces])
        counts.append(len(pieces))
    sizes = np.frombuffer(counts, np.int32) if counts else np.zeros(0, np.int32)
    starts = np.cumsum(sizes) - sizes
    return StoredText(
        token_ids=np.frombuffer(ids, np.int32) if ids else np.zeros(0, np.int32),
        doc_ids=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        positions=(np.arange(len(ids)) - np.repeat(starts, sizes)).astype(np.int32),
        strings={number: piece for piece, number in known.items()},
        of_documents=True,
    )


def number_documents(n: int) -> StoredText:
    """Documents without a string as a text of one token each, which is shown as the document's number, <7>."""
    numbers = np.arange(n, dtype=np.int32)
    return StoredText(
        token_ids=numbers, doc_ids=numbers, positions=np.zeros(n, np.int32), strings={}, of_documents=True
    )


def as_pixels(images: Shaped[np.ndarray, "n *size"]) -> UInt8[np.ndarray, "n height width channels"]:
    """Images as bytes: whole numbers of 0 to 255 as they are, others with the range of all of them scaled to 0 to 255.

    Args:
        images: (n, height, width), or with 1, 3 or 4 channels as the last axis.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or 0 in images.shape:
        raise ValueError(
            "`images` must be of shape (n, height, width), or (n, height, width, channels) with 1, 3 or 4 channels, "
            f"got {tuple(images.shape)}."
        )
    if images.dtype == np.uint8:
        return images
    if not np.isfinite(images).all():
        raise ValueError("`images` must be finite, got NaN or infinity.")
    low, high = float(images.min()), float(images.max())
    if np.issubdtype(images.dtype, np.integer) and low >= 0 and 64 <= high <= 255:
        return images.astype(np.uint8)
    return np.round((images - low) * (255 / ((high - low) or 1.0))).astype(np.uint8)


def draw_pixels(pixels: UInt8[np.ndarray, "height width channels"]) -> str:
    """An image as a data URI of a PNG file.

    >>> draw_pixels(np.zeros((2, 2, 1), np.uint8))[:30]
    'data:image/png;base64,iVBORw0K'
    """
    height, width, channels = pixels.shape
    color = {1: 0, 3: 2, 4: 6}[channels]
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)  # filter 0 of each
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes())),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return _as_uri("png", b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def draw_file(path: str | Path) -> str:
    """The image in a file as a data URI; empty where there is none of PNG, JPEG or GIF of at most 256 KiB."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_IMAGE + 1)
    except (OSError, ValueError):
        return ""
    kind = next((kind for signature, kind in SIGNATURES.items() if data.startswith(signature)), "")
    return _as_uri(kind, data) if kind and len(data) <= LARGEST_IMAGE else ""


def _as_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
