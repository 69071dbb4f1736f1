"""`fit_map`: a linear map between the spaces of two models, fitted to paired rows, that carries what one model has.

Activations and directions are carried forward. What reads activations (probes, encoders) is carried by the map back:
a probe of a reads b through `b -> a`. So a map is fitted in both directions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from saelab.functional.metrics import exact
from saelab.interventions.directions import Direction
from saelab.sae.compatibility import match_activations
from saelab.sae.sae import SAE
from saelab.stores.activations import Activations
from saelab.stores.files import checksum, replace_folder, save_tensors, write_json
from saelab.stores.manifest import INT_COLUMNS, Provenance
from saelab.stores.tensors import load_tensors
from saelab.stores.validation import SEAL, naming, read_fields, read_sealed, require_object
from saelab.universality.paired_spaces import PairScores, score_pairs

MapMethod = Literal["linear", "orthogonal", "anchors"]
SpaceRows: TypeAlias = Float[Tensor, "_ _"] | Activations
"""(n, d) rows of a space: a tensor, or collected activations"""
Ridged: TypeAlias = Callable[[float], Tensor]
RIDGES = tuple(10.0**i for i in range(2, -9, -1))
"""ridges that are tried, the largest first, which a tie keeps"""
TENSORS, FACTS, KIND = "map.safetensors", "map.json", "space map"


@dataclass(frozen=True, kw_only=True, eq=False)
class SpaceMap:
    """An affine map of activations of a to those of b, `(x - mean_a) W + mean_b`, and one back; made by `fit_map`."""

    mean_a: Float[Tensor, "d_a"]
    mean_b: Float[Tensor, "d_b"]
    W: Float[Tensor, "d_a d_b"]
    """the map of a's space to b's"""
    W_back: Float[Tensor, "d_b d_a"]
    """the map of b's space to a's, fitted by itself"""
    method: MapMethod
    n_pairs: int
    rank: int | None = None
    ridge: tuple[float, float] | None = None
    """ridge of either direction, times the mean variance of the coordinates that are inverted; None where there is
    none
    """
    ridge_chosen: bool = False
    """whether held-out pairs chose it"""
    origin_a: Provenance | None = None
    origin_b: Provenance | None = None

    @property
    def inverse(self) -> "SpaceMap":
        """The same pair of maps with the sides exchanged."""
        return SpaceMap(
            mean_a=self.mean_b, mean_b=self.mean_a, W=self.W_back, W_back=self.W, method=self.method,
            n_pairs=self.n_pairs, rank=self.rank, ridge=None if self.ridge is None else self.ridge[::-1],
            ridge_chosen=self.ridge_chosen, origin_a=self.origin_b, origin_b=self.origin_a,
        )  # fmt: skip

    def apply(self, x: Float[Tensor, "*batch d_a"] | Int[Tensor, "*batch d_a"]) -> Float[Tensor, "*batch d_b"]:
        """Activations of a in b's space, in their own dtype; integers are read as float32."""
        if x.shape[-1] != len(self.mean_a):
            raise ValueError(f"Activations must be as wide as a's space ({len(self.mean_a)}), got {tuple(x.shape)}.")
        found = (x.to(self.mean_a) - self.mean_a) @ self.W + self.mean_b
        return found.to(x) if x.is_floating_point() else found.to(x.device)

    def carry_probe(
        self, weight: Float[Tensor, "*n d_a"], bias: Float[Tensor, "*n"] | None = None
    ) -> tuple[Float[Tensor, "*n d_b"], Float[Tensor, "*n"]]:
        """Weights and bias that give activations of b the scores of a probe of a: `w W_back^T`, and the bias at b's
        mean. Weights are rows, as those of `torch.nn.Linear` and scikit-learn.
        """
        self._check_width("weights of a probe", weight.shape[-1])
        carried = exact(weight) @ exact(self.W_back).T
        start = exact(weight) @ exact(self.mean_a) - carried @ exact(self.mean_b)
        return carried.to(weight), (start if bias is None else exact(bias) + start).to(weight)

    def carry_direction(
        self, direction: Direction, hook_point: str | None = None, *, allow_mismatch: bool = False
    ) -> Direction:
        """The direction `v W` of b to which one of a belongs; `peak` is scaled as the vector is.

        Args:
            direction: direction in a's space.
            hook_point: where it is in b; None is where the pairs were from.
            allow_mismatch: accept a direction at another hook point than the pairs'.

        Raises:
            ValueError: for a direction of another width or hook point, and where b's hook point is not known.
        """
        self._check_width("a direction", direction.d_in)
        if self.origin_a is not None and direction.hook_point != self.origin_a.hook_point and not allow_mismatch:
            raise ValueError(
                f"A direction must be at the hook point that the map was fitted at, '{self.origin_a.hook_point}', got "
                f"'{direction.hook_point}'; fit a map there, or pass allow_mismatch=True."
            )
        place = hook_point or (None if self.origin_b is None else self.origin_b.hook_point)
        if place is None:
            raise ValueError("`hook_point` must be given where the pairs had no provenance, got none.")
        vector = (exact(direction.vector) @ exact(self.W)).float()
        peak = None if direction.peak is None else direction.peak * float(vector.norm())
        return Direction(vector, place, direction.name, peak)

    @torch.no_grad()
    def carry_sae(self, sae: SAE, *, allow_mismatch: bool = False) -> SAE:
        """An SAE of b with the features of one of a: it encodes through the map back and decodes through the map
        forward.

            z = encode((x_b - mean_b) W_back + mean_a)        x_hat_b = (decode(z) - mean_a) W + mean_b

        both folded into its weights, so that it is an SAE like any other, with b's provenance; a latent keeps its
        number. `training_["carried"]` has the facts of the map.

        Args:
            sae: SAE of a.
            allow_mismatch: accept an SAE of another model or hook point than the pairs'.

        Raises:
            ValueError: for an SAE of another width, model or hook point, a transcoder, a crosscoder, and an encoder,
                pruning or normalizer that no weights can carry.
        """
        self._check_width("an SAE", sae.cfg.d_in)
        _refuse_kinds(sae)
        if self.origin_a is not None:
            here = Activations.from_tensor(torch.zeros(1, sae.cfg.d_in), self.origin_a)
            match_activations(sae, here, allow_mismatch)
        folded = sae.fold().cpu()
        mean_a, mean_b, W, W_back, W_enc, b_dec = map(
            exact, (self.mean_a, self.mean_b, self.W, self.W_back, folded.W_enc, folded.b_dec)
        )
        place = (b_dec - mean_a) @ W + mean_b
        shift = (place - mean_b) @ W_back + mean_a - b_dec
        held = folded.state_dict() | {
            "W_enc": (W_back @ W_enc).float().T.contiguous().T,
            "b_enc": (exact(folded.b_enc) + shift @ W_enc).float(),
            "W_dec": (exact(folded.W_dec) @ W).float(),
            "b_dec": place.float(),
        }
        carried = SAE(folded.cfg.adapt(d_in=len(mean_b), init="tied"), seed=None)
        carried.load_state_dict(held, assign=True)
        if folded.cfg.activation.gated and folded.threshold is not None:
            carried.set_gate(folded.threshold)
        carried.provenance = self.origin_b
        carried.training_ = {n: v for n, v in (sae.training_ or {}).items() if n not in ("last", "saved")}
        carried.training_["carried"] = self.describe()
        return carried.to(sae.device)

    def score(
        self,
        a: SpaceRows,
        b: SpaceRows,
        *,
        doc_ids: Shaped[Any, "n"] | None = None,
        n_shuffles: int = 100,
        seed: int = 0,
        allow_mismatch: bool = False,
    ) -> PairScores:
        """How near mapped rows of a come to their partners in b; give rows that the map was not fitted to.

        Args:
            a: (n, d_a) rows of a.
            b: (n, d_b) their partners.
            doc_ids: document of each row, where rows are tokens; shuffled pairings then keep runs of neighbors. None
                takes those of collected activations.
            n_shuffles: number of shuffled pairings; 0 for none.
            seed: of the shuffles, and of the at most 2,000 rows among which partners are searched.
            allow_mismatch: accept activations of other models or hook points than the pairs'.

        Raises:
            ValueError: for rows that are not pairs, or of other widths, models or hook points, and a negative number
                of shuffles.
        """
        x, y, documents = read_pairs(a, b, doc_ids)
        for side, rows, origin in (("a", a, self.origin_a), ("b", b, self.origin_b)):
            _check_origin(side, rows, origin, allow_mismatch)
        self._check_width("rows of a", x.shape[1])
        if y.shape[1] != len(self.mean_b):
            raise ValueError(f"Rows of b must be as wide as b's space ({len(self.mean_b)}), got {y.shape[1]}.")
        return score_pairs(self.apply(x), y, doc_ids=documents, n_shuffles=n_shuffles, seed=seed)

    def describe(self) -> dict[str, Any]:
        """How the map was fitted, ready for JSON, without its weights."""
        origins = {name: getattr(self, name) for name in ("origin_a", "origin_b")}
        plain = {name: getattr(self, name) for name in ("method", "n_pairs", "rank", "ridge_chosen")}
        told = {name: None if origin is None else origin.to_dict() for name, origin in origins.items()}
        return plain | {"ridge": None if self.ridge is None else list(self.ridge)} | told

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `map.json` and `map.safetensors` into a folder, both or neither."""
        with replace_folder(folder, last=FACTS, stale=(FACTS, TENSORS)) as temp:
            save_tensors(temp / TENSORS, {name: getattr(self, name) for name in _WEIGHTS})
            facts = {"kind": KIND, **self.describe(), "tensors": checksum(temp / TENSORS)}
            write_json(temp / FACTS, facts, sealed=True)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SpaceMap":
        """The map of a folder; FileNotFoundError where a file is missing, ValueError for damaged or edited files."""
        path = Path(folder) / FACTS
        found, check_seal = read_sealed(path)
        with naming(path):
            plain = dict(require_object(found, "A map"))  # the seal is checked on what was read
            plain.pop(SEAL, None)
            if plain.pop("kind", None) != KIND:
                raise ValueError(f"A map must be of kind '{KIND}', got another; give what `save_pretrained` wrote.")
            told = read_fields(_Told, plain)
            of_a, of_b = (None if one is None else Provenance.from_dict(one) for one in (told.origin_a, told.origin_b))
            check_seal()
        tensors = load_tensors(Path(folder) / TENSORS)
        d_a, d_b = (tensors[name].numel() if name in tensors else 0 for name in ("mean_a", "mean_b"))
        wanted = {"mean_a": (d_a,), "mean_b": (d_b,), "W": (d_a, d_b), "W_back": (d_b, d_a)}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted or told.tensors != checksum(
            Path(folder) / TENSORS
        ):
            raise ValueError(f"{Path(folder) / TENSORS} must hold the weights that {FACTS} tells of. Was it replaced?")
        return cls(
            **tensors, method=told.method, n_pairs=told.n_pairs, rank=told.rank, ridge=told.ridge,
            ridge_chosen=told.ridge_chosen, origin_a=of_a, origin_b=of_b,
        )  # fmt: skip

    def __repr__(self) -> str:
        rank = "" if self.rank is None else f", rank {self.rank}"
        return f"SpaceMap({self.method}, {len(self.mean_a)} to {len(self.mean_b)}, {self.n_pairs:,} pairs{rank})"

    def _check_width(self, what: str, width: int) -> None:
        if width != len(self.mean_a):
            raise ValueError(
                f"The width of {what} must be that of a's space ({len(self.mean_a)}), got {width}; the other way it is "
                "`map.inverse`."
            )


_WEIGHTS = ("mean_a", "mean_b", "W", "W_back")


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What `map.json` holds."""

    method: MapMethod
    n_pairs: int
    rank: int | None
    ridge: tuple[float, float] | None
    ridge_chosen: bool
    origin_a: dict[str, Any] | None
    origin_b: dict[str, Any] | None
    tensors: str


def fit_map(
    a: SpaceRows,
    b: SpaceRows,
    method: MapMethod = "linear",
    *,
    rank: int | None = None,
    ridge: float | None = None,
    doc_ids: Shaped[Any, "n"] | None = None,
    n_folds: int = 5,
    seed: int = 0,
) -> SpaceMap:
    """The affine map of activations of a to those of b, and back, that paired rows fit.

    With x and y the rows less their means, for a to b (b to a has x and y exchanged):

        linear      argmin |x W - y|^2 + ridge v |W|^2       v the mean square of x over rows and coordinates, times n
        orthogonal  s U V^T, from U S V^T = x^T y, with the factor s that fits best (Procrustes)
        anchors     s x'^T pinv(y')^T, x' and y' rows of norm 1: where the cosines to the paired rows are the same in
                    both spaces, s as before; pinv with a ridge too (arXiv:2406.15057)

    Of these, "orthogonal" needs fewest pairs. `rank` keeps as many leading directions: of the fitted values, or of U S
    V^T. Source of the first two: arXiv:2311.00664.

    Args:
        a: (n, d_a) rows of a: a tensor, or collected activations, such as `AlignedActivations.a`.
        b: (n, d_b) their partners.
        method: "linear", "orthogonal" or "anchors".
        rank: rank of the map; None is the full one.
        ridge: penalty, relative to the mean variance; None chooses it for either direction by held-out pairs.
        doc_ids: document of each row, so that no document is on both sides of a fold; None takes those of collected
            activations.
        n_folds: parts that pairs are held out in, in turn.
        seed: of the folds.

    Raises:
        ValueError: for rows that are not pairs, fewer than 3, values that are not finite or do not vary, and options
            out of range.

    >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    >>> turned = 3 * x[:, [1, 2, 3, 0]] + 1
    >>> bool((fit_map(x, turned, "orthogonal").apply(x) - turned).abs().max() < 1e-5)
    True
    """
    x, y, documents = read_pairs(a, b, doc_ids)
    limit = min(x.shape[1], y.shape[1])
    if method not in get_args(MapMethod):
        raise ValueError(f"`method` must be one of {get_args(MapMethod)}, got '{method}'.")
    if rank is not None and not 1 <= rank <= limit:
        raise ValueError(f"`rank` must be in 1..{limit}, the narrower width, got {rank}.")
    if ridge is not None and (method == "orthogonal" or not 0 <= ridge < float("inf")):
        raise ValueError(f"`ridge` must be at least 0, and None for an orthogonal map, got {ridge} for '{method}'.")
    if still := [name for name, rows in (("a", x), ("b", y)) if bool((rows == rows[:1]).all())]:
        raise ValueError(f"`{still[0]}` must vary over rows for a map to be fitted, got {len(x)} equal ones.")
    mean_a, mean_b = x.mean(0), y.mean(0)
    sides = [(x, y), (y, x)]
    if method == "orthogonal":
        ridges, found = None, [_rotate(one - one.mean(0), other - other.mean(0), rank) for one, other in sides]
    else:
        folds = _fold(documents, len(x), n_folds, seed)
        chosen = [ridge if ridge is not None else _choose_ridge(method, *side, folds) for side in sides]
        ridges = (chosen[0], chosen[1])
        found = [_fit(method, *side, rank)(own) for side, own in zip(sides, chosen, strict=True)]
    origins = [rows.provenance if isinstance(rows, Activations) else None for rows in (a, b)]
    return SpaceMap(
        mean_a=mean_a.float(), mean_b=mean_b.float(), W=found[0].float(), W_back=found[1].float(), method=method,
        n_pairs=len(x), rank=rank, ridge=ridges, ridge_chosen=ridges is not None and ridge is None,
        origin_a=origins[0], origin_b=origins[1],
    )  # fmt: skip


def read_pairs(a: SpaceRows, b: SpaceRows, doc_ids: Any) -> tuple[Tensor, Tensor, np.ndarray | None]:
    """Both sides in float64, and the documents of their rows; ValueError for rows that are not pairs.

    `doc_ids` None takes those of collected activations."""
    for name, rows in (("a", a), ("b", b)):
        if not isinstance(rows, Activations) and (not isinstance(rows, Tensor) or rows.ndim != 2):
            raise ValueError(f"`{name}` must be (n, d) rows, a tensor or activations, got {_tell_kind(rows)}.")
    if len(a) != len(b):
        raise ValueError(f"`a` and `b` must be pairs, row by row, got {len(a)} and {len(b)} rows; align them first.")
    if isinstance(a, Activations) and isinstance(b, Activations):
        for name in INT_COLUMNS:
            one, other = getattr(a, name), getattr(b, name)
            if one is not None and other is not None and not torch.equal(one, other):
                raise ValueError(
                    f"`a` and `b` must be of the same tokens, row by row, got other {name}; see `align_activations`."
                )
        doc_ids = a.doc_ids if doc_ids is None else doc_ids
    documents = None if doc_ids is None else np.asarray(doc_ids)
    if documents is not None and len(documents) != len(a):
        raise ValueError(f"`doc_ids` must be one for each of the {len(a)} rows, got {len(documents)}.")
    x, y = (exact(rows[:] if isinstance(rows, Activations) else rows).cpu() for rows in (a, b))
    if len(x) < 3:
        raise ValueError(f"`a` and `b` must be at least 3 pairs, got {len(x)}.")
    for name, rows in (("a", x), ("b", y)):
        if not rows.isfinite().all():
            raise ValueError(f"`{name}` must be finite, got NaN or infinity; leave those pairs out.")
    return x, y, documents


def _tell_kind(rows: Any) -> str:
    return f"a tensor of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__


def _check_origin(side: str, rows: SpaceRows, origin: Provenance | None, allow_mismatch: bool) -> None:
    there = rows.provenance if isinstance(rows, Activations) else None
    if origin is None or there is None or allow_mismatch:
        return
    wanted, got = ((one.model, one.hook_point) for one in (origin, there))
    if wanted != got:
        raise ValueError(
            f"Rows of {side} must be of the model and hook point that the map was fitted at, {wanted}, got {got}; fit "
            "a map there, or pass allow_mismatch=True."
        )


def _refuse_kinds(sae: SAE) -> None:
    cfg = sae.cfg
    if cfg.d_out is not None or cfg.sources is not None:
        raise ValueError("An SAE must read and write one space to be carried, got a transcoder or a crosscoder.")
    if cfg.encoder != "linear" or cfg.pruning is not None:
        raise ValueError(
            f"An SAE must encode by its weights alone to be carried, got encoder {cfg.encoder}, pruning {cfg.pruning}, "
            "which measure errors in its own space."
        )


# ---- fitting
def _scale(fitted: Tensor, y: Tensor) -> Tensor:
    """The factor that brings fitted values nearest."""
    return (fitted * y).sum() / fitted.square().sum().clamp(min=1e-300)


def _rotate(x: Tensor, y: Tensor, rank: int | None) -> Tensor:
    """Orthogonal map and factor; directions in which the pairs do not vary are mapped to 0."""
    left, sizes, right = torch.linalg.svd(x.T @ y, full_matrices=False)
    kept = min(int((sizes > sizes[0] * max(x.shape) * torch.finfo(sizes.dtype).eps).sum()), rank or len(sizes))
    W = left[:, :kept] @ right[:kept]
    return W * _scale(x @ W, y)


def _fit(method: MapMethod, x: Tensor, y: Tensor, rank: int | None = None) -> Ridged:
    """The map as a function of the ridge, from one decomposition."""
    x, y = x - x.mean(0), y - y.mean(0)
    if method == "linear":
        before, after, inverted = None, x.T @ y, x
    else:
        normed_x, inverted = (torch.nn.functional.normalize(side, dim=1, eps=1e-300) for side in (x, y))
        before, after = normed_x.T @ inverted, None
    values, vectors = torch.linalg.eigh(inverted.T @ inverted)
    mean, least = values.mean(), values[-1] * len(values) * torch.finfo(values.dtype).eps
    start = vectors if before is None else before @ vectors
    end = vectors.T if after is None else vectors.T @ after

    def at(ridge: float) -> Tensor:
        inverse = torch.where(values > least, 1 / (values.clamp(min=least) + ridge * mean), 0.0)
        W = start * inverse @ end
        if method == "anchors":
            W = W * _scale(x @ W, y)
        return W if rank is None else _cut(W, x, rank)

    return at


def _cut(W: Tensor, x: Tensor, rank: int) -> Tensor:
    """The map to the leading principal directions of the fitted values."""
    right = torch.linalg.eigh((x @ W).T @ (x @ W)).eigenvectors[:, -rank:]
    return W @ right @ right.T


def _fold(documents: np.ndarray | None, n: int, n_folds: int, seed: int) -> Int[np.ndarray, "n"]:
    """The fold of each row; rows of one document are in one fold where there are documents enough."""
    if n_folds < 2:
        raise ValueError(f"`n_folds` must be at least 2, got {n_folds}.")
    groups = np.arange(n) if documents is None else np.unique(documents, return_inverse=True)[1]
    n_groups = int(groups.max()) + 1
    if n_groups < n_folds:
        groups, n_groups = np.arange(n), n
    return (np.random.default_rng(seed).permutation(n_groups) % min(n_folds, n_groups))[groups]


def _choose_ridge(method: MapMethod, x: Tensor, y: Tensor, folds: np.ndarray) -> float:
    """The ridge of least squared error on held-out pairs."""
    errors = torch.zeros(len(RIDGES), dtype=torch.float64)
    for fold in np.unique(folds):
        held = torch.from_numpy(folds == fold)
        at, centers = _fit(method, x[~held], y[~held]), (x[~held].mean(0), y[~held].mean(0))
        for i, ridge in enumerate(RIDGES):
            errors[i] += ((x[held] - centers[0]) @ at(ridge) + centers[1] - y[held]).square().sum()
    return RIDGES[int(errors.argmin())]
