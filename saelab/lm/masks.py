"""`TokenMask`: rules for which tokens are used, shared by collection, training, evaluation and analyses."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.lm.tokens import Tokens
from saelab.stores.results import Result


@dataclass(frozen=True, kw_only=True)
class MaskResult(Result):
    """Tokens that a mask keeps, and how many each rule removed.

    A token is counted for the first rule that removes it, so `n_kept` and the counts add up to the total, padding
    included.
    """

    keep: Bool[Tensor, "n_seq ctx_len"]
    """True at tokens that are kept"""
    removed: dict[str, int]
    """number of tokens removed by each rule"""

    @property
    def n_kept(self) -> int:
        """Number of tokens kept."""
        return int(self.keep.sum())

    def __str__(self) -> str:
        total = max(self.keep.numel(), 1)
        rows = [*self.removed.items(), ("kept", self.n_kept)]
        return "\n".join(f"{name:<10} {n:>12,} {n / total:>8.2%}" for name, n in rows)

    def to_dict(self) -> dict[str, Any]:
        """Counts only, as a dictionary for JSON: `removed` by rule and `n_kept`."""
        return {"removed": dict(self.removed), "n_kept": self.n_kept}


@dataclass(frozen=True, kw_only=True)
class TokenMask:
    """Rules for excluding tokens, applied in this order: padding (always), special, positions, norm.

    Padding is recognised by document id -1 and never by token id, so a model whose padding token is also its EOS or BOS
    loses none of those. Special tokens are recognised by id, at any position.

    >>> tokens = sl.tokenize(sl.tiny_model(), ["one", "two"], ctx_len=6)
    >>> sl.TokenMask(positions=(1, None)).apply(tokens).removed
    {'padding': 4, 'special': 2, 'positions': 1, 'norm': 0}
    """

    special: bool = True
    """Exclude BOS, EOS and the like (`Tokens.special_ids`)."""
    positions: tuple[int, int | None] = (0, None)
    """Keep positions start <= position < stop in a row; None is the row's end."""
    max_norm_ratio: float | None = None
    """Exclude activations whose norm exceeds this many times the median norm, such as attention sinks; None keeps
    them.
    """

    def __post_init__(self) -> None:
        start, stop = self.positions
        if start < 0 or (stop is not None and stop <= start):
            raise ValueError(f"`positions` must be (start, stop) with 0 <= start < stop, got {self.positions}.")
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 0:
            raise ValueError(f"`max_norm_ratio` must be positive or None, got {self.max_norm_ratio}.")

    def apply(
        self,
        tokens: Tokens,
        norms: Float[Tensor, "n_seq ctx_len"] | None = None,
        median: float | None = None,
    ) -> MaskResult:
        """Tokens to keep, and how many each rule removed.

        Args:
            tokens: rows of token ids.
            norms: Euclidean norms of the activations; needed with `max_norm_ratio`.
            median: norm that they are compared with; None is the median over the tokens that the other rules keep.

        Raises:
            ValueError: for `max_norm_ratio` without norms.
        """
        if self.max_norm_ratio is not None and norms is None:
            raise ValueError(f"`max_norm_ratio={self.max_norm_ratio}` needs the activations' norms, got none.")
        keep = torch.ones_like(tokens.doc_ids, dtype=torch.bool)
        removed, n_left = {}, keep.numel()
        for rule, narrow in self._rules(tokens, norms, median):
            keep = narrow(keep)
            n_before, n_left = n_left, int(keep.sum())
            removed[rule] = n_before - n_left
        return MaskResult(keep=keep, removed=removed)

    def _rules(
        self, tokens: Tokens, norms: Tensor | None, median: float | None
    ) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """Name of each rule, and the function that applies it to the tokens kept so far."""
        return [
            ("padding", lambda keep: keep & tokens.attention_mask),
            ("special", lambda keep: keep & self._find_ordinary(tokens) if self.special else keep),
            ("positions", lambda keep: keep & self._find_inside(tokens) if self.positions != (0, None) else keep),
            ("norm", lambda keep: keep & self._find_usual(keep, norms, median) if norms is not None else keep),
        ]

    def _find_ordinary(self, tokens: Tokens) -> Tensor:
        # Special ids are few, and comparing with each is many times faster than `isin`, which runs in every batch.
        ordinary = torch.ones_like(tokens.ids, dtype=torch.bool)
        for special in tokens.special_ids:
            ordinary &= tokens.ids != special
        return ordinary

    def _find_inside(self, tokens: Tokens) -> Tensor:
        position = torch.arange(tokens.ctx_len)
        start, stop = self.positions
        return (position >= start) & (position < (tokens.ctx_len if stop is None else stop))

    def _find_usual(self, keep: Tensor, norms: Tensor, median: float | None) -> Tensor:
        if self.max_norm_ratio is None:
            return keep
        norms = norms.to(device=keep.device, dtype=torch.float32)
        if median is None:
            median = float(norms[keep].median()) if bool(keep.any()) else 0.0
        return norms <= self.max_norm_ratio * median

    def to_dict(self) -> dict[str, Any]:
        """All rules, as a dictionary for JSON and provenance."""
        return asdict(self)
