"""`patch`: activation patching, activations of a clean run put into a corrupt run, by hook point and position."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.indices import FeatureIds, read_features
from saelab.interventions.attribution import require_aligned, require_autoencoder
from saelab.interventions.directions import Direction, Subspace, as_subspace
from saelab.interventions.edited_runs import EditedRuns
from saelab.interventions.prompt_metrics import Metric, Prompt, Texts, make_prompt_metric, read_one_text
from saelab.lm.hooks import capture
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.sae.sae import SAE
from saelab.stores.results import Result

PatchSource: TypeAlias = str | Direction | Subspace | SAE | tuple[SAE, FeatureIds]
"""A hook point; a direction or subspace, whose component is patched; all features of an SAE, or some of them"""
Positions: TypeAlias = Literal["each", "all"] | Sequence[int | Sequence[int]]

NOTHING = 1e-3
"""Where clean and corrupt metric differ by less than this share of their size, scores are undefined."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Patching(Result):
    """Result of `patch`: metric by source and group of positions."""

    metric: str
    clean: float
    """the metric of the clean prompt"""
    corrupt: float
    """the metric of the corrupt prompt"""
    sources: tuple[str, ...]
    """names of the hook points, directions or features patched"""
    positions: tuple[tuple[int, ...], ...]
    """positions of each column, patched together"""
    clean_tokens: tuple[str, ...]
    corrupt_tokens: tuple[str, ...]
    values: Float[np.ndarray, "n_sources n_columns"] = field(repr=False)
    """the metric of the corrupt prompt with the source patched at these positions"""

    @property
    def reason(self) -> str:
        """Why there are no scores; empty where there are."""
        gap = abs(self.clean - self.corrupt)
        if gap > NOTHING * max(abs(self.clean), abs(self.corrupt)):
            return ""
        return f"clean and corrupt prompt differ by no more than {gap:.2g}, so there is nothing to restore"

    @property
    def scores(self) -> Float[np.ndarray, "n_sources n_columns"]:
        """Denoising scores `(patched - corrupt) / (clean - corrupt)`: 0 as corrupt, 1 as clean.

        Scores below 0 and above 1 are possible; NaN where `reason` explains it.
        """
        gap = float("nan") if self.reason else self.clean - self.corrupt
        return (self.values - self.corrupt) / gap

    def name_column(self, column: int) -> str:
        """Positions and tokens of one column (a group of positions); "corrupt>clean" where the prompts differ."""
        return " ".join(self._name_token(i) for i in self.positions[column])

    def _name_token(self, i: int) -> str:
        ours, theirs = self.clean_tokens[i].strip() or " ", self.corrupt_tokens[i].strip() or " "
        return f"{i} {ours}" if ours == theirs else f"{i} {theirs}>{ours}"

    def to_dict(self) -> dict[str, Any]:
        """Every field, scores and the reason there are none, ready for JSON."""
        return super().to_dict() | {"scores": self.scores.tolist(), "reason": self.reason}

    def __str__(self) -> str:
        head = f"{self.metric}: clean {self.clean:.4g}, corrupt {self.corrupt:.4g}"
        if self.reason:
            return f"{head}; no scores: {self.reason}"
        lines = [f"{head}; share of the difference that each patch restores, the three best positions"]
        width = max(len(name) for name in self.sources)
        for name, scores in zip(self.sources, self.scores, strict=True):
            best = np.argsort(-scores, kind="stable")[:3]
            shown = "   ".join(f"{scores[j]:+.3f} [{self.name_column(int(j))}]" for j in best)
            lines.append(f"{name:<{width}}  {shown}")
        return "\n".join(lines)


def patch(
    model: AnyModel,
    clean: Prompt,
    corrupt: Prompt,
    metric: Metric,
    *,
    sources: PatchSource | Sequence[PatchSource] | None = None,
    positions: Positions = "each",
    hook_point: str | None = None,
    allow_mismatch: bool = False,
) -> Patching:
    """The metric of a corrupt prompt with parts of the clean run patched in, each source at each position.

        a hook point       x' = x_clean
        directions         x' = x + P (x_clean - x)              P projects on what they span
        features           x' = x + sum_i (z_clean,i - z_i) d_i  the corrupt run's own error stays

    The `scores` are `(patched - corrupt) / (clean - corrupt)`. Source: arXiv:2309.16042.

    Args:
        model: language model.
        clean: prompt whose activations are patched in; as many tokens as `corrupt`.
        corrupt: prompt whose run is patched.
        metric: as in `attribute`; mostly a pair of answers, for their logit difference.
        sources: one or several hook points, directions, subspaces, SAEs, or pairs (SAE, features); by default the
            residual stream after every block.
        positions: "each" alone, "all" together, or single positions and groups of them; special tokens are included.
        hook_point: where SAEs read; by default where each was trained.
        allow_mismatch: go ahead with SAEs of another model, weight processing or hook point.

    Raises:
        ValueError: for sources and positions that do not exist, prompts of unequal length, transcoders, and SAEs of
            another model, weight processing or hook point (unless `allow_mismatch`).

    >>> found = patch(sl.lm.tiny_model(), "I see Ann", "I see Tom", ("A", "T"))
    >>> found.scores.shape, float(found.scores[2, -1].round(4))
    ((3, 10), 1.0)
    """
    model = as_model(model)
    ours, theirs = read_one_text(model, clean, "clean"), read_one_text(model, corrupt, "corrupt")
    require_aligned(ours, theirs)
    outcome = make_prompt_metric(model, metric)
    before, runs = (EditedRuns(model, texts, outcome) for texts in (ours, theirs))
    pieces = [_make_piece(runs, source, hook_point, allow_mismatch) for source in _list_sources(model, sources)]
    columns = _list_columns(positions, ours.ids.shape[1])
    x, y = (_read(model, texts, pieces) for texts in (ours, theirs))
    return Patching(
        metric=outcome.name,
        clean=float(before.run()),
        corrupt=float(runs.run()),
        sources=tuple(piece.name for piece in pieces),
        positions=columns,
        clean_tokens=ours.strings(model),
        corrupt_tokens=theirs.strings(model),
        values=np.stack([_patch(runs, one, columns, x[one.hook_point], y[one.hook_point]) for one in pieces]),
    )


@dataclass(frozen=True, eq=False)
class _Piece:
    """A source: its hook point, and the change of the corrupt activations that it causes."""

    name: str
    hook_point: str
    carry: Callable[[Tensor, Tensor], Tensor]
    """from clean and corrupt activations (n, d) to what is added to the corrupt ones"""


def _patch(
    runs: EditedRuns,
    piece: _Piece,
    columns: Sequence[Sequence[int]],
    clean: Float[Tensor, "n d"],
    corrupt: Float[Tensor, "n d"],
) -> Float[np.ndarray, "n_columns"]:
    """The metric of the corrupt prompt with the piece patched at each group of positions.

    Args:
        runs: of the corrupt prompt.
        piece: what is patched.
        columns: groups of positions.
        clean: activations of the clean prompt at the piece's hook point.
        corrupt: those of the corrupt prompt.
    """
    change = piece.carry(clean.float(), corrupt.float()).to(corrupt)
    masks = torch.zeros(len(columns), len(corrupt), 1)
    for mask, positions in zip(masks, columns, strict=True):
        mask[list(positions)] = 1
    edits = {piece.hook_point: lambda x, i: x + masks[i].to(x) * change}
    return runs.run(edits, torch.zeros(len(columns), dtype=torch.long)).double().numpy()


def _read(model: Model, texts: Texts, pieces: Sequence[_Piece]) -> dict[str, Tensor]:
    """Activations of the text by hook point."""
    points = list(dict.fromkeys(piece.hook_point for piece in pieces))
    return {name: x[0] for name, x in capture(model, texts.ids, points, stop=False).items()}


def _list_sources(model: Model, sources: PatchSource | Sequence[PatchSource] | None) -> list[PatchSource]:
    if sources is None:
        return [f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)]
    if isinstance(sources, str | Direction | Subspace | SAE) or _is_features(sources):
        return [sources]  # type: ignore[list-item]
    if not sources:
        raise ValueError("`sources` must name at least one, got none; leave it out for every block.")
    return list(sources)  # type: ignore[arg-type]


def _is_features(source: Any) -> bool:
    """Whether a pair is an SAE with features, not two SAEs."""
    return isinstance(source, tuple) and len(source) == 2 and [isinstance(one, SAE) for one in source] == [True, False]


def _make_piece(runs: EditedRuns, source: PatchSource, hook_point: str | None, allow_mismatch: bool) -> _Piece:
    if isinstance(source, str):
        return _Piece(source, source, lambda clean, corrupt: clean - corrupt)
    if isinstance(source, Direction | Subspace):
        space = as_subspace(source)
        return _Piece(space.name, space.hook_point, lambda clean, corrupt: space.project(clean - corrupt))
    sae, given = (source, None) if isinstance(source, SAE) else source
    require_autoencoder(sae)
    point = runs.match(sae, hook_point, allow_mismatch)
    features = None if given is None else list(dict.fromkeys(read_features(given, sae.cfg.d_sae, "Features")))
    return _Piece(_name_features(features), point, _carry_features(sae, features))


def _carry_features(sae: SAE, features: Sequence[int] | None) -> Callable[[Tensor, Tensor], Tensor]:
    chosen = list(range(sae.cfg.d_sae)) if features is None else list(features)

    @torch.no_grad()
    def carry(clean: Tensor, corrupt: Tensor) -> Tensor:
        codes = (sae.encode(x.to(sae.device)) * sae.output_scale(x.to(sae.device)) for x in (clean, corrupt))
        step = next(codes) - next(codes)
        return (step[:, chosen] @ sae.directions()[chosen]).to(clean)

    return carry


def _name_features(features: Sequence[int] | None) -> str:
    if features is None:
        return "all features"
    shown = ", ".join(str(i) for i in features[:5])
    return f"feature{'s' if len(features) != 1 else ''} {shown}{', ...' if len(features) > 5 else ''}"


def _list_columns(positions: Positions, n: int) -> tuple[tuple[int, ...], ...]:
    """Groups of positions, counted from 0."""
    if isinstance(positions, str):
        if positions not in ("each", "all"):
            raise ValueError(f"`positions` must be 'each', 'all' or a list, got '{positions}'.")
        return tuple((i,) for i in range(n)) if positions == "each" else (tuple(range(n)),)
    groups = [(group,) if isinstance(group, int) else tuple(group) for group in positions]
    if bad := [i for group in groups for i in group if not -n <= i < n]:
        raise ValueError(f"`positions` must be in {-n}..{n - 1}, got {bad[:5]}.")
    return tuple(tuple(i % n for i in group) for group in groups)
