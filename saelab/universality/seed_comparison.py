"""Stability of dictionaries across random seeds: cosines of one-to-one matched decoder directions.

Also geometry and usage of one dictionary: rank, coherence, distance to the data, firing density and energy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.metrics import FiringSums, ReconstructionSums, effective_rank, exact
from saelab.functional.statistics import rank_correlation
from saelab.sae.baselines import check_baselines
from saelab.sae.compatibility import require_finite
from saelab.sae.sae import SAE
from saelab.stores.activations import Activations
from saelab.stores.feature_store import FeatureStore
from saelab.stores.results import Result, format_table
from saelab.universality.assignment import pair_all
from saelab.universality.matching import assign
from saelab.universality.nearest import find_nearest
from saelab.universality.similarity import cosine_blocks

PART = 4096
"""Tokens encoded at a time."""
BLOCK_CELLS = 2**23  # cosines held at a time
EXACT = 2**24
"""Number of pairs of features up to which the assignment considers all of them."""
CANDIDATES = 16
"""Number of nearest features of either side that the assignment considers in larger dictionaries."""
OOD_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class DictionaryFigures(Result):
    """Geometry of a dictionary D with rows d_i of unit length (arXiv:2502.12892, appendix)."""

    stable_rank: float
    """`||D||_F^2 / ||D||_2^2`, 1 to d_in: small where rows lean toward one direction"""
    effective_rank: float
    """exp of the entropy of the singular values' shares, 1 to d_in"""
    coherence: float
    """`max_{i != j} |<d_i, d_j>|`, 0 to 1; one pair of equal rows makes it 1"""
    crowding: float
    """`mean_i max_{j != i} |<d_i, d_j>|`, 0 to 1"""
    ood: float
    """`1 - mean_i max_t cos(d_i, x_t)`, out-of-distribution score: lower is nearer to the data, and it falls with the
    number of tokens; NaN without data"""


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentUsage(Result):
    """How often and how strongly a dictionary's features fire on some tokens."""

    n_tokens: int
    fvu: float
    """NaN where only codes are known"""
    density: Float[np.ndarray, "d_sae"]
    """share of tokens on which each feature fires"""
    energy: Float[np.ndarray, "d_sae"]
    """mean of `z^2 ||W_dec||^2` for each feature: the squared size of its contribution to the reconstruction"""

    @property
    def dead_frac(self) -> float:
        """Share of features that fire on no token."""
        return float((self.density == 0).mean())


@torch.no_grad()
def measure_directions(
    rows: Float[Tensor, "d_sae d_in"], x: Float[Tensor, "n_tokens d_in"] | None = None, signed: bool = False
) -> DictionaryFigures:
    """Ranks and coherence of a dictionary's directions and, with centered activations `x`, the out-of-distribution
    score.

    Cosines with activations are absolute values where codes are signed. No d_sae x d_sae matrix is held.

    >>> found = measure_directions(torch.eye(4), torch.eye(4)[:2])
    >>> found.stable_rank, found.effective_rank, found.coherence, found.ood
    (4.0, 4.0, 0.0, 0.5)
    """
    rows = _normalize_rows(rows.float().cpu())
    squares = torch.linalg.eigvalsh(exact(rows).T @ exact(rows)).clamp(min=0)
    others = _largest_cosines(rows, rows, signed=True, itself=False)
    near = None if x is None else _largest_cosines(rows, _normalize_rows(x.float().cpu()), signed, itself=True)
    return DictionaryFigures(
        stable_rank=round(float(squares.sum() / squares[-1]), 6),
        effective_rank=effective_rank(squares.sqrt()),
        coherence=float(others.max()),
        crowding=float(others.mean()),
        ood=math.nan if near is None else 1 - float(near.double().mean()),
    )


def measure_usage(sae: SAE, acts: Activations) -> LatentUsage:
    """FVU, firing density and energy of an SAE's features on activations."""
    sums, fires = ReconstructionSums(sae.cfg.d_in), FiringSums(sae.cfg.d_sae)
    squares = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, acts.n_tokens, PART):
            x = acts[start : start + PART].to(sae.W_enc)
            codes = sae.encode_sparse(x)
            sums.add(x, sae.decode(codes, x=x))
            fires.add(codes)
            squares.index_add_(0, codes.indices.cpu(), exact(codes.values).cpu().square())
    return _usage(sae, fires.firings, squares, acts.n_tokens, sums.fvu)


def read_usage(sae: SAE, store: FeatureStore) -> LatentUsage:
    """Firing density and energy of an SAE's features, from the store that was harvested with it; FVU is NaN."""
    seen = store.statistics
    return _usage(sae, torch.from_numpy(seen.fires.sum(1)), torch.from_numpy(seen.squares.sum(1)), len(store), math.nan)


def _usage(sae: SAE, fires: Int[Tensor, "d_sae"], squares: Float[Tensor, "d_sae"], n: int, fvu: float) -> LatentUsage:
    lengths = exact(sae.W_dec).cpu().square().sum(1)
    energy = squares.double() * lengths / max(1, n)
    return LatentUsage(n_tokens=n, fvu=fvu, density=(fires.double() / max(1, n)).numpy(), energy=energy.numpy())


def _normalize_rows(rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)


def _largest_cosines(
    rows: Float[Tensor, "d_sae d_in"], others: Float[Tensor, "n d_in"], signed: bool, itself: bool
) -> Float[Tensor, "d_sae"]:
    """The largest cosine (|cosine| where signed) of each row with the others; with `itself`, its own index too."""
    step = max(1, BLOCK_CELLS // len(others))
    found = []
    for start in range(0, len(rows), step):
        cosines = rows[start : start + step] @ others.T
        cosines = cosines.abs_() if signed else cosines
        if not itself:
            cosines.diagonal(start).fill_(-1.0 if len(others) > 1 else 0.0)
        found.append(cosines.amax(1))
    return torch.cat(found).clamp(max=1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class SeedAgreement(Result):
    """Similarity of every pair of several dictionaries; cosines are absolute values where codes are signed."""

    matched: Float[np.ndarray, "n_pairs"]
    """mean cosine of the one-to-one pairs (Hungarian): the stability of arXiv:2502.12892; 1 is the same dictionary"""
    nearest: Float[np.ndarray, "n_pairs"]
    """mean over the features of both dictionaries of the largest cosine with any feature of the other; a lower bar than
    `matched`"""
    overlap: Float[np.ndarray, "n_pairs"]
    """mean squared cosine of the principal angles between the subspaces of highest energy"""
    found: Float[np.ndarray, "n_saes"]
    """share of features whose one-to-one partners in all other dictionaries reach the threshold"""
    features: Float[np.ndarray, "n_saes d_sae"] = field(repr=False)
    """each feature's mean cosine with its partners"""


@dataclass(frozen=True, kw_only=True, eq=False)
class SeedStability(Result):
    """Agreement of trained dictionaries, compared with two kinds of random ones."""

    d_in: int
    d_sae: int
    signed: bool
    threshold: float
    """cosine from which a feature counts as found again"""
    rank: int
    """dimensions of the subspaces whose overlap is measured"""
    exact: bool
    """whether the assignment considered every pair, not only the nearest of either side"""
    trained: SeedAgreement
    """agreement of the dictionaries given"""
    random: SeedAgreement
    """agreement of random dictionaries of the same shape"""
    matched_random: SeedAgreement
    """agreement of random dictionaries with the second moments of each dictionary's directions (the stricter null)"""
    figures: tuple[DictionaryFigures, ...]
    """geometry of each dictionary in the normalized space of training"""
    random_figures: DictionaryFigures
    """geometry of one random dictionary of the same shape"""
    usage: tuple[LatentUsage, ...] = field(repr=False)
    """firing density and energy of each dictionary, where activations or stores are given"""
    seed: int
    baselines: Mapping[str, SeedAgreement] = field(default_factory=dict)
    """agreement of other dictionaries of each seed, by name"""

    @cached_property
    def trends(self) -> dict[str, float]:
        """Spearman's rank correlations of a feature's stability with its density and energy, over all live features.

        Above 0, rare or weak features are the unstable ones. Empty where usage is not known.
        """
        if not self.usage:
            return {}
        density, energy = (np.stack([getattr(one, name) for one in self.usage]) for name in ("density", "energy"))
        live = density > 0
        return {
            name: rank_correlation(self.trained.features[live], values[live])
            for name, values in (("density", density), ("energy", energy))
        }

    @cached_property
    def quarters(self) -> Float[np.ndarray, "n"]:
        """Mean stability of the live features of all dictionaries by quartile of density, the rarest first."""
        if not self.usage:
            return np.zeros(0)
        density = np.stack([one.density for one in self.usage])
        order = np.argsort(density[density > 0], kind="stable")
        return np.array([part.mean() for part in np.array_split(self.trained.features[density > 0][order], 4)])

    def __str__(self) -> str:
        n = len(self.figures)
        kind = "by size" if self.signed else "with their sign"
        lines = [f"{n} dictionaries of {self.d_sae:,} directions in {self.d_in:,} dimensions, cosines {kind}"]
        table = [["", "trained", "random", "matched random", *self.baselines]]
        families = (self.trained, self.random, self.matched_random, *self.baselines.values())
        names = {
            "matched": "matched one to one",
            "nearest": "nearest",
            "found": f"found by all (>= {self.threshold:g})",
        }
        for name, title in (names | {"overlap": f"subspace of {self.rank} dimensions"}).items():
            table.append([title, *(f"{getattr(one, name).mean():.3f}" for one in families)])
        for name in ("stable_rank", "effective_rank", "coherence", "crowding", "ood"):
            mean = np.mean([getattr(one, name) for one in self.figures])
            table.append([name.replace("_", " "), f"{mean:.3f}", f"{getattr(self.random_figures, name):.3f}"])
        lines += format_table(table)
        if self.usage:
            by_density = ", ".join(f"{value:.3f}" for value in self.quarters)
            lines.append(f"matched, rarest quarter first: {by_density}")
            trends = ", ".join(f"{name} {value:+.2f}" for name, value in self.trends.items())
            lines.append(f"rank correlation with {trends}, over {self.usage[0].n_tokens:,} tokens")
        return "\n".join(lines)


def seed_stability(
    saes: Sequence[SAE],
    acts: Activations | Float[Tensor, "n_tokens d_in"] | None = None,
    *,
    stores: Sequence[FeatureStore] | None = None,
    threshold: float = 0.7,
    rank: int | None = None,
    seed: int = 0,
    baselines: Sequence[Mapping[str, SAE]] | None = None,
) -> SeedStability:
    """Pairwise agreement of SAEs of one activation space, and which features are not found again (arXiv:2502.12892).

    Directions are compared in the activations' own units, by cosine; by |cosine| where any of the SAEs is signed. Every
    figure comes with that of random dictionaries.

    Args:
        saes: two or more SAEs of one shape, usually trained with different seeds.
        acts: (n_tokens, d_in) activations. Subspaces are then those of highest energy, stability is correlated with
            density and energy, and FVU, dead features and the out-of-distribution score are measured; the latter on at
            most 16,384 of the tokens.
        stores: one feature store per SAE, as another source of density and energy.
        threshold: cosine, in (0, 1], from which a feature counts as found again.
        rank: number of principal dimensions compared, in 1..d_in; None is d_in / 4.
        seed: seed of the random dictionaries.
        baselines: for each SAE the same names of other SAEs, such as those that `fit_baselines` makes of each with a
            seed of its own; those of one name are compared with each other as the SAEs are.

    Raises:
        ValueError: there are fewer than two SAEs, their shapes differ, an option is out of range, or baselines do
            not fit.

    >>> cfg = sl.SAEConfig(d_in=32, d_sae=48)
    >>> found = seed_stability([sl.SAE(cfg, seed=0), sl.SAE(cfg, seed=0)])
    >>> round(float(found.trained.matched.mean()), 3), float(found.random.matched.mean()) < 0.7
    (1.0, True)
    """
    acts = Activations.from_tensor(acts) if isinstance(acts, Tensor) else acts
    _check(saes, acts, stores)
    for sae in saes:
        require_finite(sae)
    d_in, d_sae = saes[0].cfg.d_target, saes[0].cfg.d_sae
    rank = rank or max(1, d_in // 4)
    if not 1 <= rank <= d_in or not 0 < threshold <= 1:
        raise ValueError(f"`rank` must be in 1..d_in ({d_in}) and `threshold` in (0, 1], got {rank} and {threshold}.")
    signed = any(sae.cfg.activation.signed for sae in saes)
    usage = [measure_usage(sae, acts) for sae in saes] if acts is not None else []
    usage = usage or [read_usage(sae, store) for sae, store in zip(saes, stores or (), strict=False)]
    generator = torch.Generator().manual_seed(seed)
    trained = [sae.directions().float().cpu() for sae in saes]
    random = [_bring_back(sae, torch.randn(d_sae, d_in, generator=generator)) for sae in saes]
    matched_random = [_draw_matched(rows, generator) for rows in trained]
    weights = [torch.from_numpy(one.energy) for one in usage]
    drawn = torch.randn(d_sae, d_in, generator=generator)
    return SeedStability(
        d_in=d_in, d_sae=d_sae, signed=signed, threshold=threshold, rank=rank, exact=d_sae**2 <= EXACT,
        trained=_agree(trained, signed, threshold, rank, weights),
        random=_agree(random, signed, threshold, rank),
        matched_random=_agree(matched_random, signed, threshold, rank),
        figures=tuple(measure_directions(sae.W_dec, _center(sae, acts), signed) for sae in saes),
        random_figures=measure_directions(drawn, _center(saes[0], acts), signed),
        usage=tuple(usage), seed=seed,
        baselines=_agree_by_name(saes, baselines or (), threshold, rank),
    )  # fmt: skip


def _agree_by_name(
    saes: Sequence[SAE], baselines: Sequence[Mapping[str, SAE]], threshold: float, rank: int
) -> dict[str, SeedAgreement]:
    """Agreement of the baselines of each name."""
    names = [list(one) for one in baselines]
    if names and (len(names) != len(saes) or any(set(one) != set(names[0]) for one in names)):
        raise ValueError(f"`baselines` must have the same names for each of the {len(saes)} SAEs, got {names[:5]}.")
    found = {}
    for name in names[0] if names else ():
        group = [one[name] for one in baselines]
        _check(group, None, None)
        check_baselines(dict.fromkeys([name], group[0]), saes[0].cfg, ("trained", "random", "matched random"))
        signed = any(each.cfg.activation.signed for each in group)
        found[name] = _agree([each.directions().float().cpu() for each in group], signed, threshold, rank)
    return found


def find_core(saes: Sequence[SAE], *, threshold: float = 0.7) -> list[int]:
    """Features of the first SAE that all others have too: whose one-to-one partner in each of them has at least that
    cosine.

    Cosines are absolute values where codes are signed, as in `seed_stability`. `sl.sae.start_from_core` trains on from
    them.

    Args:
        saes: two or more SAEs of one shape, trained with different seeds.
        threshold: cosine, in (0, 1], from which a feature counts as found again.

    Raises:
        ValueError: there are fewer than two SAEs, their shapes differ, or the threshold is out of range.

    >>> cfg = sl.SAEConfig(d_in=32, d_sae=48)
    >>> len(find_core([sl.SAE(cfg, seed=0), sl.SAE(cfg, seed=0)])), find_core([sl.SAE(cfg, seed=s) for s in (0, 1)])
    (48, [])
    """
    _check(saes, None, None)
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must be in (0, 1], got {threshold}.")
    signed = any(sae.cfg.activation.signed for sae in saes)
    first, *others = [sae.directions().float().cpu().numpy() for sae in saes]
    smallest = np.min([match_rows(first, other, signed)[0] for other in others], axis=0)
    return [int(i) for i in np.flatnonzero(smallest >= threshold)]


def _check(saes: Sequence[SAE], acts: Activations | None, stores: Sequence[FeatureStore] | None) -> None:
    shapes = {(sae.cfg.d_sae, sae.cfg.d_target) for sae in saes}
    if len(saes) < 2 or len(shapes) > 1:
        raise ValueError(
            f"`saes` must be two or more of one shape (d_sae, d_in), got {len(saes)} of {sorted(shapes)[:5]}."
        )
    d_sae, d_in = shapes.pop()
    if acts is not None and any(sae.cfg.d_out is not None for sae in saes):
        raise ValueError("`acts` must not be given for transcoders, whose directions are not theirs; give `stores`.")
    if acts is not None and acts.d_in != d_in:
        raise ValueError(f"`acts` must have the SAEs' d_in ({d_in}), got {acts.d_in}; use their hook point.")
    if acts is not None and stores is not None:
        raise ValueError("`acts` and `stores` must not both be given, got both; pass `acts` alone.")
    if stores is not None and (len(stores) != len(saes) or any(store.d_sae != d_sae for store in stores)):
        widths = [store.d_sae for store in stores][:5]
        raise ValueError(f"`stores` must be one for each of {len(saes)} SAEs, {d_sae} wide, got widths {widths}.")


def _bring_back(sae: SAE, rows: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae d_in"]:
    """Random directions of the normalized space, converted to the activations' own units as the SAE's are."""
    normalizer = sae.out_normalizer
    return rows if normalizer.kind == "none" else normalizer.apply_matrix(rows, normalizer.inverse.cpu())


def _draw_matched(rows: Float[Tensor, "d_sae d_in"], generator: torch.Generator) -> Float[Tensor, "d_sae d_in"]:
    """Random unit directions with the second moments of the given rows at unit length."""
    squares, axes = torch.linalg.eigh(_normalize_rows(rows).double().T @ _normalize_rows(rows).double() / len(rows))
    squares = squares.clamp(min=0)
    drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    scales = squares.sqrt()
    for _ in range(50):  # bringing rows to unit length evens them out, so the scales must differ by more
        found = _normalize_rows(drawn * scales).square().mean(0)
        scales = scales * (squares / found.clamp(min=1e-30)).sqrt()
    return (_normalize_rows(drawn * scales) @ axes.T).float()


def _center(sae: SAE, acts: Activations | None) -> Float[Tensor, "n d_in"] | None:
    """Some activations, evenly spaced, in the normalized space of the SAE; None without activations."""
    if acts is None:
        return None
    places = torch.linspace(0, acts.n_tokens - 1, min(OOD_TOKENS, acts.n_tokens), dtype=torch.float64).long()
    return sae.center(acts[places]).detach()


def _agree(
    dictionaries: Sequence[Float[Tensor, "d_sae d_in"]],
    signed: bool,
    threshold: float,
    rank: int,
    weights: Sequence[Float[Tensor, "d_sae"]] = (),
) -> SeedAgreement:
    n, d_sae = len(dictionaries), len(dictionaries[0])
    weights = weights or [torch.ones(d_sae)] * n
    spaces = [_principal(rows, w, rank) for rows, w in zip(dictionaries, weights, strict=True)]
    cosines, nearest, overlap = np.full((n, n, d_sae), np.nan), [], []
    for i, j in combinations(range(n), 2):
        cosines[i, j], cosines[j, i], near = match_rows(dictionaries[i].numpy(), dictionaries[j].numpy(), signed)
        nearest.append(near)
        overlap.append(float((spaces[i].T @ spaces[j]).square().sum()) / rank)
    return SeedAgreement(
        matched=np.array([cosines[i, j].mean() for i, j in combinations(range(n), 2)]),
        nearest=np.array(nearest),
        overlap=np.array(overlap),
        found=(np.nanmin(cosines, axis=1) >= threshold).mean(1),
        features=np.nanmean(cosines, axis=1),
    )


def match_rows(
    a: Float[np.ndarray, "d d_in"], b: Float[np.ndarray, "d d_in"], signed: bool
) -> tuple[Float[np.ndarray, "d"], Float[np.ndarray, "d"], float]:
    """Each row's cosine with its one-to-one partner on the other side, and the mean largest cosine over the rows of
    both.

    In very wide dictionaries only the nearest of either side are candidates, and a row without a partner counts as 0.
    """
    if len(a) * len(b) > EXACT:
        return _match_nearest(a, b, signed)
    sizes = np.empty((len(a), len(b)), np.float32)
    for start, block in cosine_blocks(a, b):
        cosines = block().numpy()
        sizes[start : start + len(cosines)] = np.abs(cosines) if signed else cosines
    partners = pair_all(sizes)
    of_a = sizes[np.arange(len(a)), partners].astype(np.float64)
    return of_a, of_a[np.argsort(partners)], float(sizes.max(1).mean() + sizes.max(0).mean()) / 2


def _match_nearest(a: np.ndarray, b: np.ndarray, signed: bool) -> tuple[np.ndarray, np.ndarray, float]:
    sides = find_nearest(cosine_blocks(a, b), len(a), len(b), CANDIDATES, signed)
    pairs, values = assign(*sides)
    of_a, of_b = np.zeros(len(a)), np.zeros(len(b))
    of_a[pairs[:, 0]] = of_b[pairs[:, 1]] = np.abs(values)
    return of_a, of_b, float(np.mean([np.nan_to_num(np.abs(side.values[:, 0])).mean() for side in sides]))


def _principal(
    rows: Float[Tensor, "d_sae d_in"], weights: Float[Tensor, "d_sae"], rank: int
) -> Float[Tensor, "d_in rank"]:
    """Orthonormal axes of highest energy: leading eigenvectors of `sum_i w_i d_i d_i^T` with unit d_i."""
    unit = _normalize_rows(rows).double()
    moments = (unit * weights.double()[:, None]).T @ unit
    return torch.linalg.eigh(moments).eigenvectors[:, -rank:]
