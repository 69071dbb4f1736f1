"""Text encoders: one vector for each document, by a model's own pooling or by pooling the vectors of its tokens."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saelab.lm.hooks import FORWARD_TOKENS, capture, find_hook_point
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model, find_context, find_row, sketch_weights
from saelab.lm.models import describe_model, hidden_bars, load_model
from saelab.lm.tokens import tokenize
from saelab.lm.unwrapped import evaluating
from saelab.stores.sharing import shareable

Pooling = Literal["mean", "last", "max", "cls"]
"""How the vectors of a document's tokens become one."""
OWN = "own"
"""Pooling of an encoder that has one, or of vectors that come pooled."""
PLACE = "last_hidden_state"
Encode: TypeAlias = Callable[[Sequence[str]], Float[Tensor, "n d"]]
LONGEST_ROW = 10**6
"""Length from which a tokenizer's limit stands for none."""
MODULES = "modules.json"
"""File by which a folder of sentence-transformers is known."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PooledEncoder:
    """A model that gives one vector a document, and what the vectors depend on."""

    encode: Encode
    """vectors of some documents, (n, d) in float32 on the CPU, one after the other"""
    model: Any
    name: str
    place: str
    """hook point, or name of the output, whose vectors are pooled"""
    pooling: str
    mask: dict[str, Any] = field(default_factory=dict)
    """fields of the mask of the pooled tokens"""
    max_tokens: int | None = None
    """tokens of a document that are read"""
    weight_processing: str = "none"
    backend: str | None = None
    """what runs a model of `load_model`"""

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that the vectors depend on."""
        names = ("saelab", "torch", "transformers", *(["sentence-transformers"] if self.pooling == OWN else []))
        names += ("transformer-lens",) if self.backend == "transformer_lens" else ()
        return find_versions(names)

    def request(self) -> dict[str, Any]:
        """What determines the vectors, as a dictionary for JSON."""
        told = {"model": self.name, "weights": list(sketch_weights(self.model) or ()), "place": self.place}
        return told | {"pooling": self.pooling, "mask": self.mask, "max_tokens": self.max_tokens}


def find_versions(packages: Sequence[str]) -> dict[str, str]:
    """The version of each package that is installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def pool(
    x: Float[Tensor, "batch n_tokens d"], keep: Bool[Tensor, "batch n_tokens"], pooling: str
) -> Float[Tensor, "batch d"]:
    """One vector of each row of tokens, in float32: mean, elementwise maximum, last or first ("cls") of those kept.

    Args:
        x: vectors of tokens.
        keep: which tokens count, at least one in each row.
        pooling: mean, max, last or cls.

    >>> x = torch.tensor([[[1.0], [4.0], [9.0]]])
    >>> [float(pool(x, torch.tensor([[True, True, False]]), name)) for name in ("mean", "max", "last", "cls")]
    [2.5, 4.0, 4.0, 1.0]
    """
    x, rows = x.float(), torch.arange(len(x), device=x.device)
    if pooling == "mean":
        return (x * keep[..., None]).sum(1) / keep.sum(1)[:, None]
    if pooling == "max":
        return x.masked_fill(~keep[..., None], -torch.inf).amax(1)
    at = torch.arange(x.shape[1], device=x.device).expand_as(keep)
    last = at.masked_fill(~keep, -1).amax(1)
    return x[rows, last if pooling == "last" else at.masked_fill(~keep, x.shape[1]).amin(1)]


def make_pooled_encoder(
    encoder: Any,
    pooling: str | None = None,
    *,
    hook_point: str | None = None,
    mask: TokenMask | None = None,
    tokenizer: Any = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
) -> PooledEncoder:
    """The text encoder of a model: of sentence-transformers, of Hugging Face, of saelab's `load_model`, or in a folder.

    Args:
        encoder: the model, or the name of its folder.
        pooling: mean, last, max or cls; None is the model's own, which sentence-transformers have.
        hook_point: where a model of `load_model` is read.
        mask: tokens of such a model that are pooled; None leaves out special ones.
        tokenizer: of a Hugging Face model; None loads that of the model's folder.
        max_tokens: tokens of a document that are read; None is as many as the model reads.
        batch_size: documents per forward pass; None is about 4096 tokens' worth.

    Raises:
        ValueError: for a model without pooling where none is named, and for what goes with another kind of model.
        TypeError: for what is no text encoder.
        ImportError: as `load_text_encoder`.
    """
    if pooling is not None and pooling not in get_args(Pooling):
        raise ValueError(
            f"`pooling` must be one of {get_args(Pooling)}, or None for the encoder's own, got {pooling!r}."
        )
    for name, given in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if given is not None and given < 1:
            raise ValueError(f"`{name}` must be at least 1, or None, got {given}.")
    if isinstance(encoder, str | Path):
        encoder, own = load_text_encoder(encoder, hook_point=hook_point)
        tokenizer = tokenizer or own
    if isinstance(encoder, Model):
        return _of_language_model(encoder, pooling, hook_point, mask or TokenMask(), max_tokens, batch_size)
    if hook_point is not None or mask is not None:
        raise ValueError("`hook_point` and `mask` go with a model of `load_model` only; leave them out.")
    if is_sentence_transformer(encoder):
        if pooling is None:
            return _of_sentences(encoder, max_tokens, batch_size)
        encoder, tokenizer = encoder[0].auto_model, tokenizer or encoder.tokenizer
    if not is_pretrained(encoder):
        raise TypeError(
            "`encoder` must be a model of sentence-transformers, transformers or `load_model`, a folder, a function or "
            f"vectors, got {type(encoder).__name__}."
        )
    return _of_hugging_face(encoder, pooling, tokenizer, max_tokens, batch_size)


def is_sentence_transformer(encoder: Any) -> bool:
    """Whether this is a model of sentence-transformers, which is not imported for it."""
    return any(kind.__name__ == "SentenceTransformer" for kind in type(encoder).__mro__)


def is_pretrained(encoder: Any) -> bool:
    """Whether this is a Hugging Face model."""
    if not isinstance(encoder, nn.Module):
        return False
    from transformers import PreTrainedModel

    return isinstance(encoder, PreTrainedModel)


def load_text_encoder(
    name: str | Path, *, hook_point: str | None = None, device: Any = None, backend: str = "auto"
) -> tuple[Any, Any]:
    """The model of a folder or Hub id, and its tokenizer, None where the model has it.

    Args:
        name: folder or Hub id; a folder with modules.json is one of sentence-transformers.
        hook_point: where a language model will be read, which is then loaded by `load_model`; None for an encoder.
        device: where it computes; None is the best one present.
        backend: as for `load_model`, of a language model.

    Raises:
        ValueError: for a folder without a model.
        ImportError: where sentence-transformers is not installed and the folder needs it.
    """
    if hook_point is not None:
        return load_model(name, device=device, backend=backend, progress=False), None
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file() and not (folder / MODULES).is_file():
        raise ValueError(f"`encoder` must be a folder with config.json or {MODULES}, got '{name}' without.")
    place = device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    with hidden_bars():
        if (folder / MODULES).is_file():
            return load_sentences(folder, place), None
        from transformers import AutoModel, AutoTokenizer

        name = str(folder) if folder.is_dir() else str(name)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # a head that is not in the files is drawn, unused, and the same each time
                model = AutoModel.from_pretrained(name)
            return model.to(place).eval(), AutoTokenizer.from_pretrained(name)
        except OSError as error:
            raise ValueError(f"`encoder` must be a folder or Hub id of a model, got '{name}' ({error}).") from None


def load_sentences(name: str | Path, device: Any = None, **options: Any) -> Any:
    """A model of sentence-transformers.

    Args:
        name: Hub id or local folder.
        device: where it computes; None is for sentence-transformers to choose.
        **options: further arguments of `SentenceTransformer`.

    Raises:
        ImportError: sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ImportError(
            f"'{name}' is opened by sentence-transformers, which is not installed: pip install sentence-transformers. "
            "The folder of a Hugging Face model with `pooling`, or a function from texts to vectors, needs no package."
        ) from None
    return SentenceTransformer(str(name), device=None if device is None else str(device), **options)


def _of_sentences(model: Any, max_tokens: int | None, batch_size: int | None) -> PooledEncoder:
    """The encoder of sentence-transformers, which pools by itself."""
    if max_tokens is not None:
        raise ValueError("`max_tokens` goes with `pooling`; an encoder that pools by itself has its `max_seq_length`.")
    options = {"convert_to_tensor": True, "show_progress_bar": False, "normalize_embeddings": False}

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        with evaluating(model):
            found: Tensor = model.encode(list(texts), batch_size=batch_size or 32, **options)
        return found.float().cpu()

    longest = getattr(model, "max_seq_length", None)
    inner = getattr(model[0], "auto_model", model)
    return PooledEncoder(
        encode=encode, model=model, name=_name(inner), place="sentence_embedding", pooling=OWN, max_tokens=longest
    )


def _of_hugging_face(
    model: Any, pooling: str | None, tokenizer: Any, max_tokens: int | None, batch_size: int | None
) -> PooledEncoder:
    if pooling is None:
        raise ValueError(
            f"`pooling` must be one of {get_args(Pooling)} for a {type(model).__name__}, which gives a vector for each "
            "token, got None."
        )
    if tokenizer is None:
        tokenizer = find_tokenizer(model)
    config = model.config
    body = model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model.base_model
    limits = (max_tokens, tokenizer.model_max_length, _find_positions(body))
    longest = min((n for n in limits if n is not None and n < LONGEST_ROW), default=None)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        rows = tokenizer(list(texts), truncation=longest is not None, max_length=longest)["input_ids"]
        _require_tokens(rows, texts)
        found = [torch.empty(0)] * len(rows)
        with evaluating(body):
            for part in by_length([len(row) for row in rows], batch_size):
                width = max(len(rows[i]) for i in part)
                ids = torch.tensor([rows[i] + [fill] * (width - len(rows[i])) for i in part], device=body.device)
                keep = torch.tensor([[True] * len(rows[i]) + [False] * (width - len(rows[i])) for i in part]).to(
                    ids.device
                )
                x = body(input_ids=ids, attention_mask=keep.long()).last_hidden_state
                for i, row in zip(part, pool(x, keep, pooling).cpu(), strict=True):
                    found[i] = row
        return torch.stack(found)

    return PooledEncoder(encode=encode, model=body, name=_name(model), place=PLACE, pooling=pooling, max_tokens=longest)


def _find_positions(body: Any) -> int | None:
    """Number of tokens that an encoder has positions for; None where its configuration names no limit."""
    limit = getattr(body.config, "max_position_embeddings", None)
    learned = getattr(getattr(body, "embeddings", None), "position_embeddings", None)
    first = getattr(learned, "padding_idx", None)  # RoBERTa's count from behind that of padding
    return limit if limit is None or first is None else limit - first - 1


def _of_language_model(
    model: Model,
    pooling: str | None,
    hook_point: str | None,
    mask: TokenMask,
    max_tokens: int | None,
    batch_size: int | None,
) -> PooledEncoder:
    if pooling is None or hook_point is None or pooling == "cls":
        raise ValueError(
            "A language model's `hook_point` must be given, and `pooling` mean, last or max, got "
            f"{hook_point!r} and {pooling!r}."
        )
    if mask.max_norm_ratio is not None:
        raise ValueError("`mask` must be without `max_norm_ratio` to pool tokens, got one; leave it out.")
    place, longest = find_hook_point(model, hook_point), min(max_tokens or find_context(model), find_context(model))

    def encode(texts: Sequence[str]) -> Tensor:
        n = min(longest, max(find_row(model, text) for text in texts))  # some models have no longest row
        tokens = tokenize(model, list(texts), n, packed=False, bos=None)
        keep = mask.apply(tokens).keep
        _require_tokens([keep[tokens.doc_ids[:, 0] == i].any() for i in range(len(texts))], texts)
        lengths = tokens.attention_mask.sum(1).tolist()
        found = [torch.empty(0)] * len(texts)
        for part in by_length(lengths, batch_size):
            width = max(lengths[i] for i in part)
            x = capture(model, tokens.ids[part, :width], [place])[place]
            for i, row in zip(part, pool(x, keep[part, :width].to(x.device), pooling).cpu(), strict=True):
                found[i] = row
        return torch.stack(found)

    about = describe_model(model)
    told = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(mask).items()}
    return PooledEncoder(
        encode=encode, model=model, name=about.name, place=place, pooling=pooling, mask=told,
        max_tokens=None if longest == sys.maxsize else longest,
        weight_processing=about.weight_processing, backend=about.backend,
    )  # fmt: skip


def by_length(lengths: Sequence[int], batch_size: int | None = None) -> Iterator[list[int]]:
    """Numbers of rows in batches of similar length, the longest first: of `batch_size` rows, or of about 4096 tokens.

    >>> list(by_length([1, 3, 2], 2))
    [[1, 2], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        n = batch_size or max(1, FORWARD_TOKENS // max(1, lengths[order[0]]))
        yield order[:n]
        order = order[n:]


def _require_tokens(rows: Sequence[Any], texts: Sequence[str]) -> None:
    """Raise ValueError for documents that the tokenizer makes nothing of, or the mask leaves nothing of."""
    if bad := [i for i, row in enumerate(rows) if not (row if isinstance(row, Tensor) else len(row))]:
        raise ValueError(f"Documents must have a token to be pooled, got none of {texts[bad[0]][:40]!r}; leave it out.")


def find_tokenizer(model: Any) -> Any:
    """The tokenizer in the folder of a Hugging Face model; ValueError where there is none."""
    from transformers import AutoTokenizer

    name = getattr(model.config, "_name_or_path", "")
    try:
        with hidden_bars():
            return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        raise ValueError(
            f"`tokenizer` must be given with a {type(model).__name__} whose folder has none, got None."
        ) from None


def _name(model: Any) -> str:
    return shareable(str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__))
