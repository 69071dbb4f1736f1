"""Text encoders: any function from texts to vectors, a sentence-transformers model, and vectors kept in a file."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float

from saelab.lm.text_encoders import load_sentences
from saelab.stores.files import save_tensors
from saelab.stores.sharing import shareable
from saelab.stores.tensors import TensorFile

logger = logging.getLogger(__name__)
PROBE = "names of rivers, lakes and the sea"
"""Text whose vector tells whether vectors in a file are of the same encoder."""
SAME = 1e-3
"""Largest difference of an entry between two vectors of one text by one encoder, of norm 1."""
DIGEST = 16


@runtime_checkable
class EmbeddingFunction(Protocol):
    """Protocol for text encoders, such as a sentence-transformers model's `encode`.

    An encoder that has a method `encode_query` too is asked by it for the vectors of labels and queries.
    """

    def __call__(self, texts: list[str]) -> Any:
        """A vector for each text, as a matrix of shape (n_texts, d)."""
        ...


class SentenceEncoder:
    """Encoder of texts by a sentence-transformers model; needs the package sentence-transformers.

    Args:
        name: Hub id or local folder of the model, such as "sentence-transformers/all-MiniLM-L6-v2".
        device: where it computes; None is for sentence-transformers to choose.
        **options: further arguments of `SentenceTransformer`, such as `local_files_only=True` or `revision`.

    Raises:
        ImportError: sentence-transformers is not installed.
    """

    def __init__(self, name: str, device: str | None = None, **options: Any) -> None:
        self.name = shareable(name)
        self._model = load_sentences(name, device, **options)

    def __repr__(self) -> str:
        return f"SentenceEncoder({self.name!r})"

    def __call__(self, texts: list[str]) -> np.ndarray:
        return self._encode("encode_document", texts)

    def encode_query(self, texts: list[str]) -> np.ndarray:
        """Vectors of texts that are compared with others, with the model's own prompt for queries where it has one."""
        return self._encode("encode_query", texts)

    def _encode(self, method: str, texts: list[str]) -> np.ndarray:
        encode = getattr(self._model, method, self._model.encode)  # before sentence-transformers 5 there is one alone
        return np.asarray(encode(texts, show_progress_bar=False, convert_to_numpy=True))


def encode_texts(
    encoder: EmbeddingFunction, texts: Sequence[str], *, queries: bool = False
) -> Float[np.ndarray, "n d"]:
    """Vectors of norm 1 for texts, in float32; each different text is encoded once.

    Args:
        encoder: function from a list of texts to a matrix with a row for each.
        texts: the texts, at least one.
        queries: whether they are labels or queries, for which an encoder may have a method `encode_query`.

    Raises:
        ValueError: the encoder returns another number of rows, or entries that are not finite.

    >>> encode_texts(lambda texts: [[len(text), 0.0] for text in texts], ["ab", "c"]).tolist()
    [[1.0, 0.0], [1.0, 0.0]]
    """
    different = list(dict.fromkeys(texts))
    found = (getattr(encoder, "encode_query", encoder) if queries else encoder)(different)
    rows = np.asarray(found.detach().cpu().float() if isinstance(found, torch.Tensor) else found, dtype=np.float32)
    if rows.ndim != 2 or len(rows) != len(different) or not np.isfinite(rows).all():
        raise ValueError(
            f"`encoder` must return finite vectors as a matrix of {len(different)} rows, one for each text, "
            f"got {'entries that are not finite' if rows.ndim == 2 and len(rows) == len(different) else rows.shape}."
        )
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    place = {text: i for i, text in enumerate(different)}
    return rows[[place[text] for text in texts]]


class VectorIndex:
    """Vectors of many short texts, each encoded once, which are compared with a query.

    With a path they are kept in a file. There they count as long as the encoder gives one text of ours the vector that
    it gave when the file was written; a file by another encoder, or a damaged one, is made anew.

    Args:
        encoder: function from texts to vectors.
        path: safetensors file; None keeps the vectors in memory.

    >>> letters = lambda texts: [[text.count(letter) for letter in "abc"] for text in texts]
    >>> VectorIndex(letters).compare("bb", ["aa", "bbb"]).tolist()
    [0.0, 1.0]
    """

    def __init__(self, encoder: EmbeddingFunction, path: str | Path | None = None) -> None:
        self.encoder, self.path = encoder, None if path is None else Path(path)
        self._vectors: dict[bytes, np.ndarray] = {}
        self._probe = encode_texts(encoder, [PROBE])
        if self.path is not None and self.path.is_file():
            self._read(self.path)

    def __len__(self) -> int:
        return len(self._vectors)

    def compare(self, query: str, texts: Sequence[str]) -> Float[np.ndarray, "n"]:
        """Cosine of the query with each text; texts that are new are kept, beside those there are."""
        if not texts:
            return np.zeros(0, np.float32)
        if any(_digest(text) not in self._vectors for text in texts):
            self._keep({**dict.fromkeys(self._vectors, ""), **{_digest(text): text for text in texts}})
        rows = np.stack([self._vectors[_digest(text)] for text in texts])
        return rows @ encode_texts(self.encoder, [query], queries=True)[0]

    def update(self, texts: Sequence[str]) -> int:
        """Encode texts that are new, and forget those that are not among `texts`; returns how many were new."""
        return self._keep({_digest(text): text for text in texts})

    def _keep(self, wanted: Mapping[bytes, str]) -> int:
        new = {key: text for key, text in wanted.items() if key not in self._vectors}
        if not new and len(wanted) == len(self._vectors):
            return 0
        rows = encode_texts(self.encoder, list(new.values())) if new else ()
        known = {**self._vectors, **dict(zip(new, rows, strict=True))}
        self._vectors = {key: known[key] for key in wanted}
        if self.path is not None:
            self._write(self.path)
        return len(new)

    def _write(self, path: Path) -> None:
        keys = np.frombuffer(b"".join(self._vectors), np.uint8).reshape(-1, DIGEST)
        rows = np.stack([*self._vectors.values()]) if self._vectors else np.zeros((0, self._probe.shape[1]), np.float32)
        tensors = {"keys": keys.copy(), "vectors": rows, "probe": self._probe}
        try:
            save_tensors(path, {name: torch.from_numpy(value) for name, value in tensors.items()})
        except OSError as error:  # labels may be read where nothing may be written
            logger.info("%s could not be written (%s); texts are encoded again next time", path, error)

    def _read(self, path: Path) -> None:
        try:
            file = TensorFile.open(path)
            keys, rows, probe = (file.read(name).numpy() for name in ("keys", "vectors", "probe"))
        except (ValueError, KeyError, OSError) as error:
            logger.info("%s cannot be read (%s) and is made anew", path, error)
            return
        d = self._probe.shape[1]
        fits = keys.dtype == np.uint8 and keys.shape == (len(rows), DIGEST) and probe.shape == (1, d)
        if not fits or rows.shape[1:] != (d,) or np.abs(probe - self._probe).max() > SAME:
            logger.info("%s holds vectors of another encoder and is made anew", path)
            return
        self._vectors = {key.tobytes(): row for key, row in zip(keys, rows.astype(np.float32), strict=True)}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=DIGEST).digest()
