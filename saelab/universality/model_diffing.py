"""`diff_models`: which latents of a crosscoder belong to one of two sources, by latent scaling; `score_translation`.

A decoder row of norm 0 does not show that a source lacks a latent: a sparsity penalty may have driven it there. Latent
scaling (arXiv:2504.02922) measures how much of the latent is left in what the source's reconstruction misses.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.functional.codes import SparseCodes
from saelab.functional.sparse_products import Entries, weight_gradient
from saelab.sae.compatibility import match_activations, require_finite, require_threshold
from saelab.sae.sae import SAE
from saelab.sae.source_views import find_columns, source_norms
from saelab.stores.activations import Activations
from saelab.stores.results import Result, format_table

LatentKind = Literal[
    "shared", "weak_in_a", "weak_in_b", "only_a", "only_b", "decoupled_in_a", "decoupled_in_b", "unsure", "silent"
]
PART = 4096  # rows encoded at a time
SHOWN = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelDiff(Result):
    """Latents of a crosscoder by the source that they belong to.

    a and b are the two sources. Of each latent the source with the larger decoder norm is the stronger one; `nu_error`
    and `nu_reconstruction` are ratios of its strength in the weaker to that in the stronger.
    """

    a: str
    b: str
    n_tokens: int
    absent: float
    """strength in the weaker source, relative to the stronger, below which it is absent there"""
    shared: float
    """relative strength from which on it is shared"""
    kinds: tuple[LatentKind, ...]
    """kind of each latent, by latent scaling"""
    kinds_by_norm: tuple[LatentKind, ...]
    """kind of each latent by the ratio of its decoder norms alone, with the same limits"""
    relative_norm: Float[np.ndarray, "d_sae"]
    """share of b in the decoder norms, `||d_b|| / (||d_a|| + ||d_b||)`"""
    nu_error: Float[np.ndarray, "d_sae"]
    """relative strength in the weaker source, what its reconstruction misses included; NaN for latents that never fire
    """
    nu_reconstruction: Float[np.ndarray, "d_sae"]
    """relative strength in the reconstruction of the weaker source, to which other latents may contribute"""
    nu_free: Float[np.ndarray, "d_sae"]
    """relative strength as `nu_error`, in whatever direction it is largest in either source, instead of along the
    stronger one's row"""
    noise: Float[np.ndarray, "d_sae"]
    """standard deviation of `nu_error` over shuffled pairings of codes and rows"""
    firings: Int[np.ndarray, "d_sae"]
    """tokens on which each latent fires"""
    variance_frac: Float[np.ndarray, "d_sae"]
    """share of the stronger source's variance that the latent's contribution `z d` has as its mean square, by which
    latents are ranked"""
    fvu: dict[str, float]
    """unexplained share of the variance by source"""

    @property
    def counts(self) -> dict[str, int]:
        """Number of latents of each kind, most frequent first."""
        return dict(Counter(self.kinds).most_common())

    @property
    def shrunk(self) -> Bool[np.ndarray, "d_sae"]:
        """Latents that their decoder norms would call absent in a source where latent scaling finds them."""
        pairs = zip(self.kinds, self.kinds_by_norm, strict=True)
        return np.array([norm.startswith("only") and kind.startswith(("weak", "shared")) for kind, norm in pairs])

    @property
    def turned(self) -> Bool[np.ndarray, "d_sae"]:
        """Latents that are weak along the stronger source's row and shared in strength: the weaker source has them in
        another direction. Training on anything turns latents, so that they say little of what it was on.
        """
        return np.isin(np.array(self.kinds), ("weak_in_a", "weak_in_b")) & (self.nu_free >= self.shared)

    @property
    def gain(self) -> Float[np.ndarray, "d_sae"]:
        """Share of the stronger source's variance that a latent adds to the weaker one's: `variance_frac` times `1 -
        nu_error`, at least 0; 0 for latents that are unsure or silent."""
        open_ = np.isin(np.array(self.kinds), ("unsure", "silent"))
        return np.where(open_, 0.0, self.variance_frac * np.clip(1 - np.nan_to_num(self.nu_error), 0, None))

    def rank(self, side: Literal["a", "b"], n: int | None = None) -> list[int]:
        """Numbers of the latents that are stronger in a source, those of the largest gain first, whatever their kind.

        Args:
            side: the source.
            n: number of latents; None is all with a gain above 0.
        """
        if side not in ("a", "b"):
            raise ValueError(f"`side` must be 'a' ({self.a}) or 'b' ({self.b}), got '{side}'.")
        stronger = np.array(self._stronger) == ("a", "b").index(side)
        chosen = np.flatnonzero(stronger & (self.gain > 0))
        return chosen[np.argsort(-self.gain[chosen], kind="stable")][:n].tolist()

    def calibrate(self, null: "ModelDiff", level: float = 0.05) -> "ModelDiff":
        """The same latents judged by limits of a null pair, such as a copy that was trained as long on the old data.

        `shared` becomes the strength that `level` of the null pair's latents stay below, and `absent` is no higher. So
        of latents that changed no more than those of the null pair about that share is not called shared, whatever the
        null pair's training has turned or shrunk.

        Args:
            null: diff of the null pair, by a crosscoder of the same kind.
            level: share of the null pair's latents that may fall below.

        Raises:
            ValueError: for a level out of range, and a null pair of which no latent was judged.
        """
        judged = ~np.isin(np.array(null.kinds), ("unsure", "silent"))
        if not 0 < level < 1 or not judged.any():
            raise ValueError(
                f"`level` must be between 0 and 1, of a null pair with judged latents, got {level} and "
                f"{int(judged.sum())} latents."
            )
        shared = float(np.quantile(null.nu_error[judged], level))
        absent = min(self.absent, shared)
        kinds = tuple(
            kind if kind in ("unsure", "silent") or nu < absent else _judge(nu, 0.0, stronger, absent, shared, 1.0)
            for kind, nu, stronger in zip(self.kinds, self.nu_error.tolist(), self._stronger, strict=True)
        )
        return replace(self, kinds=kinds, absent=absent, shared=shared)

    @property
    def _stronger(self) -> list[int]:
        """The source of the larger decoder norm of each latent, 0 for a."""
        return (self.relative_norm > 0.5).astype(int).tolist()

    def top(self, kind: LatentKind, n: int | None = None) -> list[int]:
        """Numbers of the latents of a kind, those of the largest share of variance first.

        Args:
            kind: one of the kinds.
            n: number of latents; None is all.
        """
        if kind not in get_args(LatentKind):
            raise ValueError(f"`kind` must be one of {list(get_args(LatentKind))}, got '{kind}'.")
        chosen = np.flatnonzero(np.array(self.kinds) == kind)
        return chosen[np.argsort(-self.variance_frac[chosen], kind="stable")][:n].tolist()

    def format(self, labels: Mapping[int, str] | None = None, n: int = SHOWN) -> str:
        """Counts of the kinds, and the first latents of a alone and of b alone as a table.

        Args:
            labels: text by latent, such as of a label store.
            n: latents shown of each source.
        """
        names = {"a": self.a, "b": self.b}
        said = ", ".join(f"{kind} {count:,}" for kind, count in self.counts.items())
        said += f"; of the weak ones {int(self.turned.sum()):,} turned"
        lines = [f"a: {self.a}, b: {self.b}; {self.n_tokens:,} tokens", said]
        lines.append("fvu: " + ", ".join(f"{name} {value:.3f}" for name, value in self.fvu.items()))
        for side in "ba":
            rows = [[f"only {names[side]}", "variance", "rel. norm", "nu error", "nu rec.", "tokens", ""]]
            for j in self.top("only_b" if side == "b" else "only_a", n):
                figures = (self.relative_norm[j], self.nu_error[j], self.nu_reconstruction[j])
                label = (labels or {}).get(j, "")
                rows.append([str(j), f"{self.variance_frac[j]:.2%}", *(f"{x:.2f}" for x in figures),
                             f"{self.firings[j]:,}", label])  # fmt: skip
            lines += ["", *format_table(rows, left=(0, 6))]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, and the counts."""
        return super().to_dict() | {"counts": self.counts}

    def __str__(self) -> str:
        return self.format()


@torch.no_grad()
def diff_models(
    sae: SAE,
    acts: Activations,
    a: str | None = None,
    b: str | None = None,
    *,
    same_space: bool | None = None,
    absent: float = 0.2,
    shared: float = 0.5,
    decoupled: float = 0.5,
    min_count: int = 20,
    allow_mismatch: bool = False,
) -> ModelDiff:
    """Latents that two sources of a crosscoder share, that are weak in one, and that only one has.

    For each latent of codes z and rows d_a, d_b, with e_m what the reconstruction of source m misses, all in the
    normalizer's units, in which the sources have the same mean squared norm:

        strength of m = argmin_beta sum_i ||e_m,i + z_i d_m - beta z_i d||^2,    d the row of the larger norm

    with z and e_m less their means, so that a latent which is seldom 0 is not mistaken for a bias.

    `nu_error` is the weaker source's strength over the stronger's. Below `absent` the latent is of one source alone,
    unless the other reconstructs the same without it: `nu_reconstruction`, with the reconstruction in place of e_m + z
    d_m, is then at least `decoupled`. Sources of other spaces have no direction in common: there a strength is the norm
    of the best direction, `||sum_i z_i (e_m,i + z_i d_m)|| / sum_i z_i^2`, from the product of two halves of the rows,
    so that noise adds nothing.

    A latent is unsure where it fires on fewer than `min_count` tokens, or where `nu_error` has a standard deviation of
    more than a quarter of `absent` over shuffled pairings of codes and rows, and silent where it never fires.

    Args:
        sae: the crosscoder.
        acts: activations of its sources, joined as those it was trained on; held out best.
        a: name of a source; None is the first.
        b: name of another; None is the second.
        same_space: whether directions of both sources mean the same, as those of a model and its fine-tuned copy at one
            hook point do; None is where widths and hook points are equal and the normalizer turns no direction.
        absent: relative strength below which a latent is absent.
        shared: relative strength from which on it is shared.
        decoupled: relative strength in the reconstruction from which on other latents stand for it.
        min_count: tokens that a latent must fire on.
        allow_mismatch: accept activations of other models or hook points.

    Raises:
        ValueError: for an SAE of one source, names that are none of its sources or equal, activations of other sources,
            limits out of order, and directions that cannot be compared.

    >>> x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    >>> acts = Activations.join({"base": Activations.from_tensor(x), "tuned": Activations.from_tensor(x)})
    >>> cfg = sl.SAEConfig(d_in=8, d_sae=16, sources=acts.sources, activation=sl.TopK(k=4))
    >>> sae = sl.SAE(cfg, seed=0).fit(acts, sl.TrainConfig(n_tokens=40_000, batch_size=400), progress=False)
    >>> diff = diff_models(sae, acts)
    >>> diff.top("only_a"), diff.top("only_b"), bool(0.45 < np.median(diff.relative_norm) < 0.55)
    ([], [], True)
    """
    names = _choose_pair(sae, a, b)
    if not 0 < absent <= shared <= 1 or not decoupled > 0:
        raise ValueError(f"Limits must be 0 < absent <= shared <= 1 and positive, got {absent}, {shared}, {decoupled}.")
    require_finite(sae)
    require_threshold(sae)
    match_activations(sae, acts, allow_mismatch)
    if acts.d_in != sae.cfg.d_in:
        raise ValueError(f"`acts` must be as wide as all sources together ({sae.cfg.d_in}), got {acts.d_in}.")
    columns = [find_columns(sae.cfg, name) for name in names]
    same_space = _is_same_space(sae, acts, names, columns, same_space)
    found = _Sums.measure(sae, acts)
    norms = _norms_of(sae, names)
    ratios = _Ratios.measure(sae, found, norms, columns, same_space)
    ids, missed_frac, silent = norms.argmax(0), found.missed.diagonal(), found.firings == 0
    unsure = (found.firings < min_count) | ~(ratios.noise <= absent / 4)
    judged = (x.tolist() for x in (ratios.error, ratios.reconstruction, ids, silent, unsure))
    kinds = tuple(
        "silent" if dead else "unsure" if open_ else _judge(x, y, s, absent, shared, decoupled)
        for x, y, s, dead, open_ in zip(*judged, strict=True)
    )
    plain = tuple(
        "silent" if dead else _judge(x, 0.0, s, absent, shared, 1.0)
        for x, s, dead in zip(ratios.norm.tolist(), ids.tolist(), silent.tolist(), strict=True)
    )
    power = found.squares / found.n * norms.max(0).values.square()
    variance = torch.stack([found.variance[part].sum() for part in columns])
    nan = torch.where(silent, torch.nan, 0.0)
    return ModelDiff(
        a=names[0],
        b=names[1],
        n_tokens=found.n,
        absent=absent,
        shared=shared,
        kinds=kinds,
        kinds_by_norm=plain,
        relative_norm=(norms[1] / norms.sum(0).clamp(min=1e-30)).cpu().numpy(),
        nu_error=(ratios.error + nan).cpu().numpy(),
        nu_reconstruction=(ratios.reconstruction + nan).cpu().numpy(),
        nu_free=(ratios.free + nan).cpu().numpy(),
        noise=(ratios.noise + nan).cpu().numpy(),
        firings=found.firings.cpu().numpy(),
        variance_frac=(power / variance[ids].clamp(min=1e-30)).cpu().numpy(),
        fvu={
            name: float(missed_frac[part].sum() / found.variance[part].sum().clamp(min=1e-30))
            for name, part in zip(names, columns, strict=True)
        },
    )


def _is_same_space(
    sae: SAE, acts: Activations, names: tuple[str, str], columns: list[slice], given: bool | None
) -> bool:
    """Whether directions of both sources mean the same: as given, else as far as can be told; ValueError where they
    cannot.
    """
    widths, turned = [part.stop - part.start for part in columns], sae.cfg.normalizer == "whiten"
    possible = not turned and widths[0] == widths[1]
    if given and not possible:
        raise ValueError(
            "`same_space` must be False for sources of different widths or whitened apart, got widths "
            f"{widths} and normalizer '{sae.cfg.normalizer}'."
        )
    return possible and _share_hook_point(acts, names) if given is None else given


def _norms_of(sae: SAE, names: tuple[str, str]) -> Float[Tensor, "2 d_sae"]:
    """Norms of the decoder rows of two sources."""
    order = [source.name for source in sae.cfg.sources or ()]
    return source_norms(sae).double()[[order.index(name) for name in names]]


@dataclass(frozen=True)
class _Ratios:
    """Of each latent what the source of the smaller norm has, over what that of the larger has."""

    error: Float[Tensor, "d_sae"]
    """strengths"""
    free: Float[Tensor, "d_sae"]
    """strengths in any direction"""
    reconstruction: Float[Tensor, "d_sae"]
    """strengths in the reconstruction alone"""
    norm: Float[Tensor, "d_sae"]
    noise: Float[Tensor, "d_sae"]
    """standard deviation of `error` over shuffled pairings"""

    @classmethod
    def measure(
        cls, sae: SAE, found: "_Sums", norms: Float[Tensor, "2 d_sae"], columns: list[slice], same_space: bool
    ) -> "_Ratios":
        """The ratios of two sources.

        Args:
            sae: the crosscoder.
            found: sums over tokens.
            norms: norms of the decoder rows of both.
            columns: columns of each.
            same_space: whether a direction of one is one of the other.
        """
        stronger = norms.argmax(0)
        weaker = 1 - stronger
        d = [sae.W_dec.detach().double()[:, part] for part in columns]
        row = torch.where((stronger == 0)[:, None], d[0], d[1]) if same_space else None
        each = list(zip(columns, d, strict=True))
        strength = torch.stack([_strength(found.errors[..., part] + d_m, found.spread, row) for part, d_m in each])
        free = torch.stack([_strength(found.errors[..., part] + d_m, found.spread, None) for part, d_m in each])
        carried = torch.stack([_strength(found.rebuilt[..., part], found.spread, row) for part in columns])
        missed = torch.stack([_noise(found.missed[part, part], row, sae.cfg.d_sae) for part in columns])
        above = strength.gather(0, stronger[None])[0].abs().clamp(min=1e-30)
        return cls(
            error=_divide(strength, weaker, stronger),
            free=_divide(free, weaker, stronger),
            reconstruction=_divide(carried, weaker, stronger),
            norm=_divide(norms, weaker, stronger),
            noise=missed.gather(0, weaker[None])[0] * found.spread.sum((0, 2)).rsqrt() / above,
        )


def _strength(
    halves: Float[Tensor, "2 d_sae d"], spread: Float[Tensor, "2 d_sae 1"], row: Float[Tensor, "d_sae d"] | None
) -> Float[Tensor, "d_sae"]:
    """Length of regressions along a direction, in units of its length; without one, their norm from the product of the
    two halves, whose noise is independent.
    """
    if row is None:
        return (halves[0] * halves[1]).sum(1).clamp(min=0).sqrt()
    whole = (halves * spread).sum(0) / spread.sum(0)
    return (whole * row).sum(1) / row.square().sum(1).clamp(min=1e-30)


def _noise(missed: Float[Tensor, "d d"], row: Float[Tensor, "d_sae d"] | None, n: int) -> Float[Tensor, "n"]:
    """Standard deviation of what a reconstruction misses, along a direction and in units of its length, or of one of
    its coordinates. That of a strength over all pairings of codes and rows is this over the root of the codes' spread.
    """
    if row is None:
        return (missed.trace() / len(missed)).sqrt().expand(n)
    along = ((row @ missed) * row).sum(1).clamp(min=0).sqrt()
    return along / row.square().sum(1).clamp(min=1e-30)


def _divide(values: Tensor, weaker: Tensor, stronger: Tensor) -> Tensor:
    """Values of the weaker source over those of the stronger; 0 where the stronger has none."""
    below, above = values.gather(0, weaker[None])[0], values.gather(0, stronger[None])[0]
    return torch.where(above > 0, below / above.clamp(min=1e-30), 0.0)


def _judge(nu: float, nu_r: float, stronger: int, absent: float, shared: float, decoupled: float) -> LatentKind:
    if nu >= shared:
        return "shared"
    if nu >= absent:
        return "weak_in_b" if stronger == 0 else "weak_in_a"
    if nu_r >= decoupled:
        return "decoupled_in_b" if stronger == 0 else "decoupled_in_a"
    return "only_a" if stronger == 0 else "only_b"


def _choose_pair(sae: SAE, a: str | None, b: str | None) -> tuple[str, str]:
    known = [source.name for source in sae.cfg.sources or ()]
    if not known:
        raise ValueError("`sae` must be a crosscoder, got an SAE of one source; train one on joined activations.")
    one, other = a or known[0], b or next(name for name in known if name != (a or known[0]))
    for name in (one, other):
        find_columns(sae.cfg, name)
    if one == other:
        raise ValueError(f"`a` and `b` must be two sources, got '{one}' twice.")
    return one, other


def _share_hook_point(acts: Activations, names: tuple[str, str]) -> bool:
    origin = acts.provenance
    if origin is None or origin.sources is None:
        return True
    one, other = (origin.at_source(name) for name in names)
    return one.hook_point == other.hook_point


@dataclass(eq=False)
class _Sums:
    """Regressions on the codes of what reconstructions miss and of reconstructions, and what their noise is made of."""

    n: int
    firings: Int[Tensor, "d_sae"]
    squares: Float[Tensor, "d_sae"]
    """sum of squared codes"""
    spread: Float[Tensor, "2 d_sae 1"]
    """sum of squared codes about their mean over all rows, in either half of the rows"""
    missed: Float[Tensor, "d_in d_in"]
    """covariance of what reconstructions miss"""
    variance: Float[Tensor, "d_in"]
    errors: Float[Tensor, "2 d_sae d_in"]
    """`sum (z - mean z) (e - mean e) / spread` in either half, e what reconstructions miss"""
    rebuilt: Float[Tensor, "2 d_sae d_in"]
    """the same of reconstructions"""

    @classmethod
    def measure(cls, sae: SAE, acts: Activations) -> "_Sums":
        """Sums over all rows; a half has the first or the second part of each batch."""
        d_sae, d_in = sae.cfg.d_sae, sae.cfg.d_in

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=sae.device)

        products, sums = zeros(2, 2, d_sae, d_in), zeros(2, 2, d_in)
        codes_sum, squares, n_rows = zeros(2, d_sae), zeros(2, d_sae), zeros(2)
        firings, missed = torch.zeros(d_sae, dtype=torch.long, device=sae.device), zeros(d_in, d_in)
        x_sum, x_squares = zeros(d_in), zeros(d_in)
        for start in range(0, len(acts), PART):
            for half, part in enumerate(acts[start : start + PART].tensor_split(2)):
                target, codes = sae.center(part), sae.encode_sparse(part)
                found = codes.decode(sae.W_dec)
                error = target - found
                for which, rows in enumerate((error, found)):
                    products[which, half] += _product(codes, rows)
                    sums[which, half] += rows.sum(0)
                codes_sum[half].index_add_(0, codes.indices, codes.values.double())
                squares[half].index_add_(0, codes.indices, codes.values.double().square())
                firings += torch.bincount(codes.indices, minlength=d_sae)
                n_rows[half] += len(part)
                missed += error.double().T @ error.double()
                x_sum, x_squares = x_sum + target.sum(0), x_squares + target.square().sum(0)
        n, code_mean, means = len(acts), codes_sum.sum(0) / len(acts), sums.sum(1) / len(acts)
        spread = squares - 2 * code_mean * codes_sum + n_rows[:, None] * code_mean.square()
        spread = spread.clamp(min=1e-30)[:, :, None]
        for which, mean in enumerate(means):
            for half in (0, 1):
                rest = sums[which, half] - n_rows[half] * mean
                products[which, half] -= torch.outer(code_mean, rest) + torch.outer(codes_sum[half], mean)
        return cls(
            n=n,
            firings=firings,
            squares=squares.sum(0),
            spread=spread,
            missed=missed / n - torch.outer(means[0], means[0]),
            variance=x_squares / n - (x_sum / n).square(),
            errors=products[0] / spread,
            rebuilt=products[1] / spread,
        )


def _product(codes: SparseCodes, rows: Float[Tensor, "n d"]) -> Float[Tensor, "d_sae d"]:
    """z^T rows."""
    entries = Entries(codes.indices, codes.rows, codes.offsets).with_columns(codes.d_sae)
    return weight_gradient(entries, codes.values, rows.contiguous(), codes.d_sae).double()
