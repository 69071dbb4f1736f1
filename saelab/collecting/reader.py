"""`ActivationReader`: run one batch through the model and return the activations of the tokens the mask keeps."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saelab.lm.hooks import capture, find_hook_point, find_median_norms, norms_of, require_finite
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model, sketch_weights
from saelab.lm.models import describe_model
from saelab.lm.tokens import Tokens
from saelab.stores.manifest import Provenance, dtype_name

DEFAULT_MASK = TokenMask()


@dataclass(frozen=True)
class ForwardRows:
    """Activations and tokens of the kept rows of one batch of sequences."""

    acts: dict[str, Tensor]
    """Activations by hook point, (n, d_in), finite, on the model's device."""
    columns: dict[str, Tensor]
    """Columns token_ids, doc_ids and positions of the rows, int32."""
    index: Tensor
    """Index of each row in the flattened batch (sequence * ctx_len + position)."""
    removed: dict[str, int]
    """Number of tokens removed by each rule of the mask."""


@dataclass(frozen=True, kw_only=True)
class ActivationReader:
    """Reads activations at several hook points under one token mask, and counts the tokens that each rule removes."""

    model: Model
    """the language model"""
    hook_points: tuple[str, ...]
    """names of the hook points"""
    mask: TokenMask
    """tokens to keep"""
    dtype: torch.dtype
    """dtype of the rows"""
    median_norms: dict[str, float] | None = None
    """median activation norm by hook point, that the mask's norm rule compares with; None before `calibrated`"""

    @classmethod
    def make(
        cls, model: Model, tokens: Tokens, hook_points: Sequence[str], mask: TokenMask, dtype: torch.dtype | None
    ) -> "ActivationReader":
        """A reader of activations at the named hook points, after checking all arguments.

        Args:
            model: the language model.
            tokens: rows of token ids that will be read.
            hook_points: names of the hook points, all different.
            mask: tokens to keep.
            dtype: dtype of the rows; None is the model's.

        Raises:
            ValueError: for an unknown or repeated hook point, a dtype that is not floating point, and a mask that keeps
                nothing.
        """
        names = tuple(find_hook_point(model, name) for name in hook_points)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"`hook_points` must be at least one and all different, got {list(names)}.")
        dtype = dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())
        if not dtype.is_floating_point:
            raise ValueError(f"`dtype` must be a floating dtype such as torch.bfloat16, got {dtype}.")
        reader = cls(model=model, hook_points=names, mask=mask, dtype=dtype)
        if reader.count_rows(tokens) == 0:
            raise ValueError(f"`mask` must keep at least one token, got none: {mask}.")
        return reader

    def count_rows(self, tokens: Tokens) -> int:
        """Number of rows that the mask keeps before its norm rule, which needs the activations."""
        return int(replace(self.mask, max_norm_ratio=None).apply(tokens).keep.sum())

    def widths(self, tokens: Tokens) -> dict[str, int]:
        """Width of the activations by hook point, from a forward pass over one sequence."""
        return {name: x.shape[-1] for name, x in self._capture(tokens[:1]).items()}

    def calibrated(self, tokens: Tokens, n_seq: int) -> "ActivationReader":
        """The same reader with the median norms that the mask's norm rule compares with, where the mask has that rule.

        The medians are taken over the kept tokens among the first 16384 of `tokens`, in forward passes of `n_seq`
        sequences.
        """
        if self.mask.max_norm_ratio is None or self.median_norms is not None:
            return self
        return replace(self, median_norms=find_median_norms(self._capture, tokens, self.mask, n_seq))

    def read(self, batch: Tokens) -> ForwardRows:
        """Kept rows of one batch, from one forward pass; ValueError naming the hook point where a row is not finite in
        the stored dtype.
        """
        acts = self._capture(batch)
        kept = self.mask.apply(batch, **self._outliers(acts))
        index = kept.keep.flatten().nonzero().squeeze(1)
        positions = torch.arange(batch.ctx_len, dtype=torch.int32).expand_as(batch.ids)
        columns = {"token_ids": batch.ids, "doc_ids": batch.doc_ids, "positions": positions}
        rows = {name: _select(x.flatten(0, 1), index).to(self.dtype) for name, x in acts.items()}
        for name, x in rows.items():
            require_finite(name, x)
        return ForwardRows(
            rows, {name: column.flatten()[index] for name, column in columns.items()}, index, kept.removed
        )

    def request(self, tokens: Tokens) -> dict[str, Any]:
        """What determines the rows that are read, as a dictionary for JSON.

        Model, weights, hook points, mask, dtype, and a hash of `tokens`.
        """
        model = describe_model(self.model)
        return {
            "model": model.name,
            "weight_processing": model.weight_processing,
            "weights": fingerprint(dict(self.model.named_parameters())),
            "hook_points": list(self.hook_points),
            "tokens_sha256": tokens.sha256,
            "mask": _plain(self.mask.to_dict()),
            "dtype": dtype_name(self.dtype),
        }

    def origins(
        self, tokens: Tokens, n_tokens: int, removed: dict[str, int], seed: int | None = None
    ) -> dict[str, Provenance]:
        """Provenance of what was read, by hook point.

        Args:
            tokens: the rows of token ids that were read.
            n_tokens: number of rows kept so far.
            removed: number of tokens removed by each rule of the mask.
            seed: seed of the order of sequences; None for the text's own order.
        """
        medians = self.median_norms or {}
        first = self._provenance(tokens, n_tokens, removed, seed)
        return {name: first.at(name, medians.get(name)) for name in self.hook_points}

    def _provenance(self, tokens: Tokens, n_tokens: int, removed: dict[str, int], seed: int | None) -> Provenance:
        model = describe_model(self.model)
        return Provenance(
            model=model.name,
            weight_processing=model.weight_processing,
            hook_point=self.hook_points[0],
            text=tokens.source,
            tokens_sha256=tokens.sha256,
            mask=_plain(self.mask.to_dict()),
            dtype=dtype_name(self.dtype),
            ctx_len=tokens.ctx_len,
            n_tokens=n_tokens,
            seed=seed,
            versions=dict(model.versions),
            removed=removed,
            model_sketch=sketch_weights(self.model),
        )

    def _capture(self, batch: Tokens) -> dict[str, Tensor]:
        return capture(self.model, batch.ids, self.hook_points)

    def _outliers(self, acts: dict[str, Tensor]) -> dict[str, Any]:
        """Arguments of `TokenMask.apply` for the norm rule: norms relative to the median, the largest over the hook
        points, so that an outlier at one is dropped at all.

        Rows that are not finite count as ordinary here, so that they are reported rather than masked.
        """
        if self.median_norms is None:
            return {}
        ratios = [norms_of(x) / self.median_norms[name] for name, x in acts.items()]
        return {"norms": torch.stack(ratios).amax(0), "median": 1.0}


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Hash of the weights' names, shapes and dtypes and of about 64 evenly spaced values of each; differs between a
    model and its fine-tune.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        places = torch.arange(0, weight.numel(), max(1, weight.numel() // 64), device=weight.device)
        values = weight.detach().take(places).cpu()  # `flatten` would copy a transposed weight
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    # Lists as after JSON, so that a stored mask equals a new one.
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _select(x: Tensor, index: Tensor) -> Tensor:
    return x if len(index) == len(x) else x.index_select(0, index.to(x.device))
