"""Codes used beyond their own space: from one source of a crosscoder for the others, of one model's SAE for another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from saelab.evaluation.feature_classifiers import encode_csr
from saelab.functional.metrics import ReconstructionSums
from saelab.functional.statistics import correlation_of_sums, f1
from saelab.sae.compatibility import match_activations, require_finite, require_threshold
from saelab.sae.initialization import make_untrained
from saelab.sae.sae import SAE
from saelab.sae.source_views import find_columns
from saelab.stores.activations import Activations
from saelab.stores.results import Result, format_table
from saelab.universality.space_maps import MapMethod, SpaceRows, read_pairs
from saelab.universality.stitching import (
    METHODS,
    SHUFFLED,
    Figures,
    SeedRun,
    StitchTable,
    TokenSplit,
    fit_maps,
    number_documents,
    tabulate,
    tell_widths,
)

PART = 4096  # rows encoded at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Translation(Result):
    """Reconstruction of every source from the codes of every other, and how far their codes agree."""

    sources: tuple[str, ...]
    n_tokens: int
    fvu: Float[np.ndarray, "n_sources n_sources"]
    """unexplained share of the variance of the column's source from codes of the row's"""
    cofiring: Float[np.ndarray, "n_sources n_sources"]
    """of the codes of the row's source, the share whose latent fires from the column's on the same token too"""
    cofiring_shuffled: Float[np.ndarray, "n_sources n_sources"]
    """the same with the column's rows in random order"""
    latent_cofiring: Float[np.ndarray, "d_sae"]
    """tokens on which a latent fires from all sources over those on which it fires from any; NaN where it never fires
    """

    def __str__(self) -> str:
        lines = [f"codes from a source (row) for another (column), {self.n_tokens:,} tokens"]
        figures = (("fvu", self.fvu), ("cofiring", self.cofiring), ("cofiring, shuffled", self.cofiring_shuffled))
        for name, found in figures:
            rows = [[source, *(f"{x:.3f}" for x in row)] for source, row in zip(self.sources, found, strict=True)]
            lines += ["", *format_table([[name, *self.sources], *rows])]
        return "\n".join(lines)


@torch.no_grad()
def score_translation(sae: SAE, acts: Activations, *, seed: int = 0, allow_mismatch: bool = False) -> Translation:
    """How well a crosscoder's codes from each source reconstruct all of them (arXiv:2502.03714).

    Meant for one that encodes from "any" source; of another the codes of a source are those with the other sources at
    their bias.

    Args:
        sae: the crosscoder.
        acts: activations of its sources, joined as those it was trained on.
        seed: of the shuffled rows.
        allow_mismatch: accept activations of other models or hook points.

    Raises:
        ValueError: for an SAE of one source, and activations of other sources.

    >>> x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    >>> acts = Activations.join({"base": Activations.from_tensor(x), "tuned": Activations.from_tensor(-x)})
    >>> cfg = sl.SAEConfig(d_in=8, d_sae=32, sources=acts.sources, encode_from="any", activation=sl.AbsTopK(k=4))
    >>> sae = sl.SAE(cfg, seed=0).fit(acts, sl.TrainConfig(n_tokens=80_000, batch_size=400), progress=False)
    >>> bool((score_translation(sae, acts).fvu < 0.1).all())
    True
    """
    if sae.cfg.sources is None:
        raise ValueError("`sae` must be a crosscoder, got an SAE of one source; train one on joined activations.")
    require_finite(sae)
    require_threshold(sae)
    match_activations(sae, acts, allow_mismatch)
    if acts.d_in != sae.cfg.d_in:
        raise ValueError(f"`acts` must be as wide as all sources together ({sae.cfg.d_in}), got {acts.d_in}.")
    names = tuple(source.name for source in sae.cfg.sources)
    columns, alone = [find_columns(sae.cfg, name) for name in names], [sae.source(name) for name in names]
    sums = [[ReconstructionSums(source.d_in) for source in sae.cfg.sources] for _ in names]
    both, shuffled, fired = (torch.zeros(len(names), size, dtype=torch.float64) for size in (len(names),) * 2 + (1,))
    fires_all, fires_any = torch.zeros(2, sae.cfg.d_sae, dtype=torch.float64, device=sae.device)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(acts), PART):
        x = acts[start : start + PART].to(sae.W_dec)
        codes = [one.encode_sparse(x[:, part]) for one, part in zip(alone, columns, strict=True)]
        for i, own in enumerate(codes):
            for j, part in enumerate(columns):
                sums[i][j].add(x[:, part], alone[j].decode(own))
        fires = [own.to_dense() != 0 for own in codes]
        order = torch.randperm(len(x), generator=generator).to(sae.device)
        for i, mine in enumerate(fires):
            fired[i] += float(mine.sum())
            for j, other in enumerate(fires):
                both[i, j] += float((mine & other).sum())
                shuffled[i, j] += float((mine & other[order]).sum())
        stacked = torch.stack(fires)
        fires_all += stacked.all(0).sum(0)
        fires_any += stacked.any(0).sum(0)
    never = torch.where(fires_any > 0, 0.0, torch.nan)
    return Translation(
        sources=names,
        n_tokens=len(acts),
        fvu=np.array([[one.fvu for one in row] for row in sums]),
        cofiring=(both / fired.clamp(min=1)).numpy(),
        cofiring_shuffled=(shuffled / fired.clamp(min=1)).numpy(),
        latent_cofiring=(fires_all / fires_any.clamp(min=1) + never).cpu().numpy(),
    )


def stitch_sae(
    sae: SAE,
    a: SpaceRows,
    b: SpaceRows,
    own: SAE | None = None,
    *,
    n_pairs: int = 2000,
    methods: Sequence[MapMethod] = METHODS,
    n_train: int = 10_000,
    n_test: int = 10_000,
    doc_ids: Shaped[Any, "n"] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    allow_mismatch: bool = False,
) -> StitchTable:
    """How well an SAE of one model serves another: variance it leaves unexplained, and whether its features fire there
    for the tokens that they fire for at home.

    Columns: `fvu`, of what it reconstructs; `l0`; `r`, mean over features of Pearson's correlation of their codes with
    those at home on the same tokens, zeros included; `f1` of firing, mean over features. Carried by a map a feature
    keeps its number. The other model's own SAE and a random dictionary have no such numbers: there the partner of each
    feature is the one of largest |r| on other tokens. Features that do not fire at home on the test rows are left out;
    one that does not fire in the other model has r 0.

    Args:
        sae: SAE of the first model.
        a: (n, d_a) activations of that model where the SAE reads.
        b: (n, d_b) activations of the other model, row i paired with row i of a.
        own: SAE of the other model, to compare with.
        n_pairs: pairs that maps are fitted to.
        methods: maps that are fitted.
        n_train: most rows on which partners are chosen.
        n_test: most rows that figures are of.
        doc_ids: document of each row; None takes those of collected activations, or every row for one.
        seeds: of the choice of documents and pairs, and of the random dictionary.
        allow_mismatch: accept activations of another model or hook point than the SAEs'.

    Raises:
        ValueError: for rows that are not pairs, activations that are not the SAEs', and an SAE that cannot be carried.
    """
    for one, acts in ((sae, a), (own, b)):
        if one is not None:
            require_finite(one)
            require_threshold(one)
            if isinstance(acts, Activations):
                match_activations(one, acts, allow_mismatch)
    x, y, documents = read_pairs(a, b, doc_ids)
    numbers, reasons = number_documents(documents, len(x)), tell_widths(sae.cfg.d_in, y.shape[1])

    def run(seed: int) -> SeedRun:
        split = TokenSplit.make(x, numbers, (n_pairs, n_train, n_test), "random", seed)
        return split.run(_score_saes(sae, own, x.float(), y.float(), split, methods, numbers, seed))

    return tabulate("SAE features of a on b", seeds, n_pairs, reasons, run)


def _score_saes(
    sae: SAE, own: SAE | None, x: Tensor, y: Tensor, split: TokenSplit, methods: Sequence[MapMethod],
    documents: np.ndarray, seed: int,
) -> Figures:  # fmt: skip
    pairs, train, test = split
    home = {part: encode_csr(sae, x[rows]) for part, rows in (("train", train), ("test", test))}
    maps = fit_maps(x[pairs], y[pairs], methods, documents[pairs], seed)
    carried = {name: one.carry_sae(sae, allow_mismatch=True) for name, one in maps.items()}
    random = make_untrained(carried[SHUFFLED], y[train], seed=seed)
    found = {"own": _measure_sae(sae, x[test], home["test"], None)}
    for name, one in (("other's own", own), ("random dictionary", random)):
        if one is not None:
            partners = _find_partners(home["train"], encode_csr(one, y[train]))
            found[name] = _measure_sae(one, y[test], home["test"], partners)
    nothing = dict.fromkeys(("fvu", "l0", "r", "f1"), float("nan"))
    direct = sae.cfg.d_in == y.shape[1]
    found["direct"] = _measure_sae(sae, y[test], home["test"], None) if direct else nothing
    return found | {name: _measure_sae(one, y[test], home["test"], None) for name, one in carried.items()}


def _measure_sae(sae: SAE, x: Tensor, home: Any, partners: Int[np.ndarray, "d_sae"] | None) -> dict[str, float]:
    """The figures of an SAE; `home` are codes at home, `partners` its feature for each of these."""
    sums, codes = ReconstructionSums(x.shape[1]), encode_csr(sae, x)
    for part in x.split(4096):
        sums.add(part, sae(part.to(sae.device)).cpu())
    there = codes.tocsc() if partners is None else codes.tocsc()[:, partners]
    live = home.getnnz(0) > 0
    r = _correlate(home.tocsc(), there)
    if partners is not None:
        r = np.abs(r)  # a flipped feature is one too
    both = np.asarray((home != 0).multiply(there != 0).sum(0)).ravel()
    fire = f1(both, there.getnnz(0), home.getnnz(0))
    return {"fvu": sums.fvu, "l0": codes.nnz / len(x), "r": float(r[live].mean()), "f1": float(fire[live].mean())}


def _correlate(z: Any, other: Any) -> Float[np.ndarray, "d"]:
    """Pearson's r of the columns of two sparse matrices, one by one; 0 where one does not vary."""
    z, other = z.astype(np.float64), other.astype(np.float64)
    sums = [np.asarray(m.sum(0)).ravel() for m in (z, other, z.multiply(z), other.multiply(other), z.multiply(other))]
    return np.nan_to_num(correlation_of_sums(z.shape[0], *sums))


def _find_partners(z: Any, other: Any) -> Int[np.ndarray, "d_sae"]:
    """For each column the one of the other matrix with the largest |r|."""
    z, other = z.astype(np.float64), other.astype(np.float64)
    mine, theirs = ([np.asarray(m.sum(0)).ravel(), np.asarray(m.multiply(m).sum(0)).ravel()] for m in (z, other))
    products = (z.T @ other).toarray()
    r = correlation_of_sums(
        z.shape[0], mine[0][:, None], theirs[0][None], mine[1][:, None], theirs[1][None], products
    )  # fmt: skip
    return np.abs(np.nan_to_num(r)).argmax(1)
