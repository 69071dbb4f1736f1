"""`GivenDocuments`: what `embed` makes rows of and shows with them, checked before work and read in parts."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.lm.documents import describe_source, read_documents
from saelab.stores.payload import PayloadKinds, as_pixels

CHUNK = 2048
"""Documents that are read, sorted by length and embedded together."""


@dataclass(frozen=True, eq=False)
class GivenDocuments:
    """Documents and what is shown of them."""

    items: Any
    """what the encoder gets, with a length; None where texts are read from a file"""
    open_texts: Callable[[], Iterator[str]] | None
    """texts or paths from the first on"""
    payload: PayloadKinds
    pixels: np.ndarray | None
    n: int
    source: str
    sha256: str

    @classmethod
    def read(
        cls, documents: Any, images: Any, separator: str | None, field: str, n_rows: int | None
    ) -> "GivenDocuments":
        """The documents, all of them checked.

        Args:
            documents: texts, or anything with a length, or None.
            images: pixels or paths, or None.
            separator: line that divides the documents of a text file.
            field: name of the column or key that holds the text.
            n_rows: number of vectors, where these are given.

        Raises:
            ValueError: none at all, blank or unreadable texts, and texts, images and rows of different numbers.
        """
        is_path = isinstance(documents, str | Path)
        items, texts = _sort_out(documents, separator, field)
        source = describe_source(documents) if documents is not None else "vectors"
        pixels, paths = _sort_images(images, items)
        if paths is not None and texts is not None:
            raise ValueError("`images` as paths stand in place of texts, got both; give pixels, or leave texts out.")
        payload: PayloadKinds = {}
        if texts is not None or paths is not None:
            payload["texts" if paths is None else "paths"] = []
        if pixels is not None:
            payload["pixels"] = list(pixels.shape[1:])
        strings = texts if paths is None else lambda: iter(paths)
        n, digest = _check(strings, refuse_blank=not is_path)
        numbers = {"documents": n if strings is not None else None, "rows": n_rows}
        numbers |= {"images": None if pixels is None else len(pixels)}
        numbers |= {"items": None if items is None or texts is not None else len(items)}
        known = {name: number for name, number in numbers.items() if number is not None}
        if len(set(known.values())) > 1:
            raise ValueError(f"Each row must have one document and one image, got {known}; give as many of each.")
        total = next(iter(known.values()), 0)
        if total == 0:
            raise ValueError("`documents` must be at least one, got none. Check file and `field`.")
        if pixels is not None:
            digest.update(hash_values(pixels).encode())
        if isinstance(items, np.ndarray):
            digest.update(hash_values(items).encode())
        elif items is not None and texts is None:
            for one in items:
                digest.update(f"{type(one).__name__} {_hash_item(one)} ".encode())
        digest.update(str(total).encode())
        return cls(items, strings, payload, pixels, total, source, digest.hexdigest())

    def require_texts(self) -> None:
        """Raise TypeError where there is no text to encode."""
        if "texts" not in self.payload:
            raise TypeError("`documents` must be texts for an encoder of texts, got something else, or nothing.")

    def chunks(self, start: int) -> Iterator["DocumentPart"]:
        """The documents from one on, some thousand at a time."""
        strings = None if self.open_texts is None else islice(self.open_texts(), start, None)
        for first in range(start, self.n, CHUNK):
            size = min(CHUNK, self.n - first)
            texts = None if strings is None else list(islice(strings, size))
            if texts is not None and len(texts) < size:
                raise ValueError("`documents` must stay as they are while they are read, got fewer the second time.")
            pixels = None if self.pixels is None else self.pixels[first : first + size]
            items = self.items[first : first + size] if self.items is not None else texts
            yield DocumentPart(first, range(size) if items is None else items, texts, pixels)


@dataclass(frozen=True, eq=False)
class DocumentPart:
    """Some documents, one after the other."""

    start: int
    items: Any
    texts: list[str] | None
    pixels: np.ndarray | None


def _sort_out(documents: Any, separator: str | None, field: str) -> tuple[Any, Callable[[], Iterator[str]] | None]:
    """What an encoder gets, None for texts of a file; and how texts are read, None where there are none."""
    if documents is None:
        return None, None
    if isinstance(documents, str | Path):
        return None, lambda: read_documents(documents, separator=separator, field=field)
    if isinstance(documents, np.ndarray | Tensor) and getattr(documents, "dtype", None) is not None:
        if isinstance(documents, Tensor):
            documents = documents.detach().cpu().numpy()
        if documents.dtype.kind not in "OUST":
            return documents, None
    if (
        isinstance(documents, list | tuple)
        and documents
        and all(isinstance(one, int | np.integer) for one in documents)
    ):
        documents = [str(one) for one in documents]  # ids
    if isinstance(documents, list | tuple) and any(isinstance(one, str) for one in documents):
        if bad := [i for i, one in enumerate(documents) if not isinstance(one, str)]:
            raise TypeError(f"Documents must all be texts, got a {type(documents[bad[0]]).__name__} at item {bad[0]}.")
        return documents, lambda: iter(documents)
    if isinstance(documents, list | tuple) and not any(isinstance(one, Mapping) for one in documents):
        return documents, None
    held = list(read_documents(documents, separator=separator, field=field))
    return held, lambda: iter(held)


def hash_values(values: np.ndarray | Tensor) -> str:
    """Hash of shape, dtype and all values."""
    digest = hashlib.sha256(f"{tuple(values.shape)} {values.dtype}".encode())
    parts = [values[i : i + CHUNK] for i in range(0, len(values), CHUNK)] if values.ndim else [values]
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def _hash_item(one: Any) -> str:
    """Hash of an array, an image or plain values; empty for what has no values to be read."""
    try:
        values = one if isinstance(one, Tensor) else np.asarray(str(one) if isinstance(one, Path) else one)
    except (TypeError, ValueError):
        return ""
    return "" if isinstance(values, np.ndarray) and values.dtype.kind == "O" else hash_values(values)


def _sort_images(images: Any, items: Any) -> tuple[np.ndarray | None, list[str] | None]:
    """Pixels, and paths of images; numbers with the shape of images are shown where no others are given."""
    if images is None:
        looks = isinstance(items, np.ndarray) and (
            items.ndim == 3 or (items.ndim == 4 and items.shape[-1] in (1, 3, 4))
        )
        return (as_pixels(items) if looks else None), None
    if isinstance(images, Tensor):
        images = images.detach().cpu().numpy()
    if isinstance(images, np.ndarray) and images.dtype.kind not in "OUST":
        return as_pixels(images), None
    paths = [str(path) for path in images]
    if missing := [path for path in paths if not Path(path).is_file()]:
        raise ValueError(f"`images` must be paths of files, got {len(missing)} that are none, such as '{missing[0]}'.")
    return None, paths


def _check(strings: Callable[[], Iterator[str]] | None, refuse_blank: bool) -> tuple[int, Any]:
    """Number of texts, and a hash of them all; ValueError for a blank one, and for what is no UTF-8."""
    digest, n = hashlib.sha256(), 0
    for i, text in enumerate(strings() if strings is not None else ()):
        if refuse_blank and not text.strip():
            raise ValueError(f"Documents must not be blank, got {text[:20]!r} at item {i}; leave it out.")
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"Documents must be text that UTF-8 can write, got {text[:40]!r} at item {i}.") from None
        digest.update(f"{len(data)} ".encode() + data)
        n += 1
    return n, digest
