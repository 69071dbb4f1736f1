"""`diff_models`: which latents of a crosscoder belong to one of two sources, by latent scaling; `score_translation`.

A decoder row of norm 0 does not show that a source lacks a latent: a sparsity penalty may have driven it there. Latent
scaling (arXiv:2504.02922) measures how much of the latent is left in what the source's reconstruction misses. A latent
has the kind that the sample gives evidence of, and is unsure otherwise.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.functional.statistics import adjust
from saelab.sae.compatibility import match_activations, require_finite, require_threshold
from saelab.sae.sae import SAE
from saelab.sae.source_views import find_columns, source_norms
from saelab.stores.activations import Activations
from saelab.stores.results import Result, format_table
from saelab.universality.latent_scaling import TINY, CodeSums, RatioErrors, Ratios

LatentKind = Literal[
    "shared", "weak_in_a", "weak_in_b", "only_a", "only_b", "decoupled_in_a", "decoupled_in_b", "unsure", "silent"
]
SHOWN = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelDiff(Result):
    """Latents of a crosscoder by the source that they belong to.

    a and b are the two sources. Of each latent the source with the larger decoder norm is the stronger one; `nu_error`,
    `nu_reconstruction` and `nu_free` are ratios of its strength in the weaker to that in the stronger, NaN where it has
    none in the stronger or never fires. Standard errors are of the sample of documents, by the jackknife.
    """

    a: str
    b: str
    n_tokens: int
    absent: float
    """strength in the weaker source, relative to the stronger, below which it is absent there"""
    shared: float
    """relative strength from which on it is shared"""
    decoupled: float
    """relative strength in the weaker source's reconstruction from which on other latents stand for it"""
    least_gain: float
    """gain up to which a latent is not ranked: 0, or the largest one of a null pair, see `calibrate`"""
    fdr: float
    """rate of false ones among the latents of a kind, and among those ranked"""
    kinds: tuple[LatentKind, ...]
    """kind of each latent, by latent scaling"""
    kinds_by_norm: tuple[LatentKind, ...]
    """kind of each latent by the ratio of its decoder norms alone, with the same limits"""
    relative_norm: Float[np.ndarray, "d_sae"]
    """share of b in the decoder norms, `||d_b|| / (||d_a|| + ||d_b||)`"""
    nu_error: Float[np.ndarray, "d_sae"]
    """relative strength in the weaker source, what its reconstruction misses included"""
    nu_reconstruction: Float[np.ndarray, "d_sae"]
    """relative strength in the reconstruction of the weaker source, to which other latents may contribute"""
    nu_free: Float[np.ndarray, "d_sae"]
    """relative strength as `nu_error`, in whatever direction it is largest in either source, instead of along the
    stronger one's row"""
    surplus: Float[np.ndarray, "d_sae"]
    """what the stronger source's activations have more of than the weaker one's, whichever latents reconstruct them:
    the regression on the codes of their difference along the stronger source's row, in units of that row
    """
    nu_error_se: Float[np.ndarray, "d_sae"]
    """standard error; NaN for latents that fire too seldom or in one place only"""
    nu_reconstruction_se: Float[np.ndarray, "d_sae"]
    """standard error"""
    surplus_se: Float[np.ndarray, "d_sae"]
    """standard error"""
    freedom: Float[np.ndarray, "d_sae"]
    """degrees of freedom of the standard errors"""
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
        """Latents that are weak or absent along the stronger source's row and shared in strength: the weaker source
        has something as strong on the same tokens in another direction.
        """
        found = np.isin(np.array(self.kinds), ("weak_in_a", "weak_in_b", "only_a", "only_b"))
        return found & (np.nan_to_num(self.nu_free) >= self.shared)

    @property
    def gain(self) -> Float[np.ndarray, "d_sae"]:
        """Share of the stronger source's variance that is the difference of the two sources along a latent, explained
        by its codes: `variance_frac` times the square of `surplus`; 0 without evidence, at `fdr`, of a surplus.

        What counts is the activations: whether this latent or others reconstruct them in the weaker source is the
        dictionary's choice, and differs between two copies of one model.
        """
        more = _below(-self.surplus, self.surplus_se, self.freedom, 0.0)
        return np.where(_find_evident(more, self.fdr), self.variance_frac * np.nan_to_num(self.surplus) ** 2, 0.0)

    def rank(self, side: Literal["a", "b"], n: int | None = None) -> list[int]:
        """Numbers of the latents that a source has more of, those of the largest gain first, whatever their kind.

        Args:
            side: the source.
            n: number of latents; None is all with a gain above `least_gain`.
        """
        if side not in ("a", "b"):
            raise ValueError(f"`side` must be 'a' ({self.a}) or 'b' ({self.b}), got '{side}'.")
        stronger = np.array(self._stronger) == ("a", "b").index(side)
        chosen = np.flatnonzero(stronger & (self.gain > self.least_gain))
        return chosen[np.argsort(-self.gain[chosen], kind="stable")][:n].tolist()

    def calibrate(self, null: "ModelDiff", level: float = 0.05) -> "ModelDiff":
        """The same latents judged by limits of a null pair, such as a copy that was trained as long on the old data.

        `shared` becomes the strength that `level` of the null pair's latents stay below, those left out that are
        decoupled or unsure, and `absent` is no higher. So of latents that changed no more than those of the null pair
        about that share is not called shared, whatever the null pair's training has turned or shrunk. `least_gain`
        becomes the null pair's largest gain: of such latents about one is ranked.

        Args:
            null: diff of the null pair, by a crosscoder of the same kind.
            level: share of the null pair's latents that may fall below.

        Raises:
            ValueError: for a level out of range, a null pair of which no latent was judged, and one of which more than
                that share lost all strength: it is no null.
        """
        kinds = np.array(null.kinds)
        judged = ~np.isin(kinds, ("unsure", "silent", "decoupled_in_a", "decoupled_in_b"))
        if not 0 < level < 1 or not judged.any():
            raise ValueError(
                f"`level` must be between 0 and 1, of a null pair with judged latents, got {level} and "
                f"{int(judged.sum())} latents."
            )
        shared = min(1.0, float(np.quantile(null.nu_error[judged], level)))
        if shared <= 0:
            raise ValueError(
                f"A null pair must keep its latents: {1 - level:.0%} of them above a strength of 0, got {shared:.2f}. "
                "Train its copy for fewer steps or at a lower rate, or take a larger `level`."
            )
        least = float(null.gain.max(initial=0.0))
        found = replace(self, absent=min(self.absent, shared), shared=shared, least_gain=least)
        return replace(found, kinds=found._judge())

    def _judge(self) -> tuple[LatentKind, ...]:
        """Kind of each latent that the sample gives evidence of, at `fdr` among the latents of a kind."""
        absent, shared = (
            _below(self.nu_error, self.nu_error_se, self.freedom, at) for at in (self.absent, self.shared)
        )
        apart = _below(self.nu_reconstruction, self.nu_reconstruction_se, self.freedom, self.decoupled)
        chances = {  # p value of each kind: that of the claim for which there is the least evidence
            "shared": 1 - shared,
            "weak": np.maximum.reduce([1 - absent, shared, apart]),
            "only": np.maximum(absent, apart),
            "decoupled": np.maximum(shared, 1 - apart),
        }
        names = np.where(self.firings == 0, "silent", "unsure").astype(object)
        for name, p in chances.items():
            names[_find_evident(p, self.fdr)] = name
        return tuple(_name(name, side) for name, side in zip(names.tolist(), self._stronger, strict=True))

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
        said += f"; {int(self.turned.sum()):,} of them turned"
        lines = [f"a: {self.a}, b: {self.b}; {self.n_tokens:,} tokens", said]
        lines.append("fvu: " + ", ".join(f"{name} {value:.3f}" for name, value in self.fvu.items()))
        for side in "ba":
            rows = [[f"only {names[side]}", "variance", "rel. norm", "nu error", "se", "nu rec.", "tokens", ""]]
            for j in self.top("only_b" if side == "b" else "only_a", n):
                figures = (self.relative_norm[j], self.nu_error[j], self.nu_error_se[j], self.nu_reconstruction[j])
                label = (labels or {}).get(j, "")
                rows.append([str(j), f"{self.variance_frac[j]:.2%}", *(f"{x:.2f}" for x in figures),
                             f"{self.firings[j]:,}", label])  # fmt: skip
            lines += ["", *format_table(rows, left=(0, 7))]
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
    fdr: float = 0.05,
    min_count: int = 20,
    allow_mismatch: bool = False,
) -> ModelDiff:
    """Latents that two sources of a crosscoder share, that are weak in one, and that only one has.

    For each latent of codes z and rows d_a, d_b, with e_m what the reconstruction of source m misses, all in the
    normalizer's units, in which the sources have the same mean squared norm:

        strength of m = argmin_beta sum_i ||e_m,i + z_i d_m - beta z_i d||^2,    d the row of the larger norm

    with z and e_m less their means, so that a latent which is seldom 0 is not mistaken for a bias.

    `nu_error` is the weaker source's strength over the stronger's: at least `shared`, below it, where the latent is
    weak, or below `absent`, where it is of one source alone. Unless the other reconstructs the same without it:
    `nu_reconstruction`, with the reconstruction in place of e_m + z d_m, is then at least `decoupled`. Sources of other
    spaces have no direction in common: there a strength is the norm of the best direction, `||sum_i z_i (e_m,i + z_i
    d_m)|| / sum_i z_i^2`, from the product of two halves of the rows, so that noise adds nothing.

    A latent has a kind where the sample gives evidence that its strengths are on that side of the limits, at a false
    discovery rate of `fdr` within each kind (Student's t by the jackknife over 100 blocks of whole documents, Benjamini
    and Hochberg's correction for the number of latents). Otherwise it is unsure, also where it fires on fewer than
    `min_count` tokens; silent where it never fires.

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
        fdr: rate of false ones among the latents of a kind that is accepted.
        min_count: tokens that a latent must fire on.
        allow_mismatch: accept activations of other models or hook points.

    Raises:
        ValueError: for an SAE of one source, names that are none of its sources or equal, activations of other sources,
            limits out of order or range, and directions that cannot be compared.

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
    if not 0 < fdr < 1:
        raise ValueError(f"`fdr` must be between 0 and 1, got {fdr}.")
    require_finite(sae)
    require_threshold(sae)
    match_activations(sae, acts, allow_mismatch)
    if acts.d_in != sae.cfg.d_in:
        raise ValueError(f"`acts` must be as wide as all sources together ({sae.cfg.d_in}), got {acts.d_in}.")
    columns = [find_columns(sae.cfg, name) for name in names]
    same_space = _is_same_space(sae, acts, names, columns, same_space)
    found, norms = CodeSums.measure(sae, acts), _norms_of(sae, names)
    ratios = Ratios.measure(sae, found, norms, columns, same_space)
    errors = RatioErrors.measure(sae, acts, found, ratios, norms, columns, same_space)
    variance = torch.stack([found.variance[part].sum() for part in columns])
    power = found.squares / found.n * norms.max(0).values.square()
    firings = found.firings.cpu().numpy()
    silent, seldom = np.where(firings == 0, np.nan, 0.0), np.where(firings < min_count, np.nan, 0.0)
    diff = ModelDiff(
        a=names[0],
        b=names[1],
        n_tokens=found.n,
        absent=absent,
        shared=shared,
        decoupled=decoupled,
        least_gain=0.0,
        fdr=fdr,
        kinds=(),
        kinds_by_norm=tuple(
            "silent" if n == 0 else _name(_find_zone(x, absent, shared), side)
            for x, side, n in zip(ratios.norm.tolist(), ratios.stronger.tolist(), firings.tolist(), strict=True)
        ),
        relative_norm=(norms[1] / norms.sum(0).clamp(min=TINY)).cpu().numpy(),
        nu_error=ratios.error.cpu().numpy() + silent,
        nu_reconstruction=ratios.reconstruction.cpu().numpy() + silent,
        nu_free=ratios.free.cpu().numpy() + silent,
        surplus=ratios.surplus.cpu().numpy() + silent,
        nu_error_se=errors.error + seldom,
        nu_reconstruction_se=errors.reconstruction + seldom,
        surplus_se=errors.surplus + seldom,
        freedom=errors.freedom,
        firings=firings,
        variance_frac=(power / variance[ratios.stronger].clamp(min=TINY)).cpu().numpy(),
        fvu={
            name: float(found.missed[part].sum() / found.variance[part].sum().clamp(min=TINY))
            for name, part in zip(names, columns, strict=True)
        },
    )
    return replace(diff, kinds=diff._judge())


def _below(
    nu: Float[np.ndarray, "d_sae"], se: Float[np.ndarray, "d_sae"], freedom: Float[np.ndarray, "d_sae"], limit: float
) -> Float[np.ndarray, "d_sae"]:
    """p values for strengths being below a limit, of Student's t; NaN where there is no standard error.

    Args:
        nu: the strengths.
        se: their standard errors.
        freedom: degrees of freedom of these.
        limit: the limit.
    """
    from scipy.stats import t

    exactly = 1e-6  # strengths without an error are exact but for rounding
    p = t.cdf((nu - limit) / np.maximum(se, exactly), np.maximum(freedom, 1e-3))
    return np.where(np.isfinite(nu) & np.isfinite(se), p, np.nan)


def _find_evident(p: Float[np.ndarray, "n"], fdr: float) -> Bool[np.ndarray, "n"]:
    """Which p values, those left out that are NaN, are discoveries at a false discovery rate."""
    found, known = np.zeros(len(p), bool), np.isfinite(p)
    if known.any():
        found[known] = adjust(p[known]) <= fdr
    return found


def _find_zone(nu: float, absent: float, shared: float) -> str:
    return "shared" if nu >= shared else "weak" if nu >= absent else "only"


def _name(kind: str, stronger: int) -> LatentKind:
    """A kind with the source that it speaks of."""
    if kind == "only":
        return "only_a" if stronger == 0 else "only_b"
    if kind == "weak":
        return "weak_in_b" if stronger == 0 else "weak_in_a"
    if kind == "decoupled":
        return "decoupled_in_b" if stronger == 0 else "decoupled_in_a"
    return "shared" if kind == "shared" else "silent" if kind == "silent" else "unsure"


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
