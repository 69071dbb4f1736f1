"""`lobes`: clusters of features that fire in the same windows of text, and whether their directions are near, too."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from saelab.evaluation.feature_classifiers import CodeMatrix, read_values
from saelab.functional.indices import find_runs
from saelab.functional.metrics import exact
from saelab.functional.statistics import kappa
from saelab.geometry.group_agreement import cosine_contrast, information_z, predict_groups
from saelab.geometry.lobe_results import Lobe, Lobes, LobeScore
from saelab.geometry.spectral_clusters import Affinity, NormalizedVectors, SpectralClusters
from saelab.lm.token_labels import LabelsLike, TokenLabels
from saelab.sae.sae import SAE
from saelab.stores.corpus import split_documents
from saelab.stores.feature_store import FeatureStore

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

ROWS_AT_ONCE = 2**16


def lobes(
    codes: FeatureStore | CodeMatrix,
    sae: SAE,
    n_lobes: Sequence[int] = (2, 4, 8, 16),
    *,
    labels: LabelsLike | None = None,
    doc_ids: Shaped[Any, "n_tokens"] | None = None,
    baselines: Mapping[str, tuple[FeatureStore | CodeMatrix, SAE]] | None = None,
    window: int = 32,
    affinity: Affinity = "cosine + 1",
    min_windows: int = 10,
    n_draws: int = 3,
    seed: int = 0,
) -> Lobes:
    """Clusters of features that fire in the same windows of text, and whether these are clusters of directions as well.

    Co-firing of two features is phi, Pearson's r of whether they fire in a window; spectral clustering of phi + 1 (or
    of max(phi, 0)) gives lobes. A feature's direction is its row of W_dec, with the sign that most of its codes have.
    Windows do not span documents. Source: arXiv:2410.19750, section 4, where lobes are compared with clusters of
    directions by adjusted mutual information; the contrast of cosines needs no such clusters, which are not well
    determined.

    Args:
        codes: feature store, or (n_tokens, d_sae) codes.
        sae: the SAE whose codes they are.
        n_lobes: numbers of lobes, each 2 or more.
        labels: concepts of each token, such as topics, to compare lobes with what features mean.
        doc_ids: document of each token; a store knows them.
        baselines: other dictionaries by name, each with its codes of the same tokens, such as an untrained one.
        window: tokens of a window.
        affinity: "cosine + 1", for any number of features, or "max(cosine, 0)", which holds all pairs of features.
        min_windows: features are left out that fire in fewer windows, or in all but fewer.
        n_draws: draws of Gaussian directions.
        seed: of halves of documents, clusterings, draws and permutations.

    Raises:
        ValueError: sizes that disagree, fewer features than lobes, or a number out of range.

    >>> x = torch.eye(8).repeat_interleave(2, 0)[torch.arange(4000) // 20 % 16]  # one feature in each story
    >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=8, activation=sl.TopK(k=1)))
    >>> lobes(x, sae, (2,), doc_ids=torch.arange(4000) // 20, window=10).n_windows
    400
    """
    ks = sorted(set(n_lobes))
    if not ks or ks[0] < 2 or window < 1 or min_windows < 2 or n_draws < 1:
        raise ValueError(
            f"`n_lobes` must be 2 or more each, `window` and `n_draws` at least 1 and `min_windows` at least 2, got "
            f"{list(n_lobes)}, {window}, {n_draws} and {min_windows}."
        )
    given = None if labels is None else TokenLabels.of(labels)
    found = {}
    for name, (one, coder) in {"": (codes, sae), **(baselines or {})}.items():
        text = _Windows.read(one, coder, doc_ids, given, window, seed)
        found[name] = _measure(text, coder, ks, affinity, min_windows, n_draws, seed)
    own = found.pop("")
    return own if not found else Lobes(**{**vars(own), "baselines": found})


@dataclass(frozen=True, eq=False)
class _Windows:
    """What is counted in one pass over codes."""

    windows: "csr_matrix"
    """(n_windows, d_sae), 1 where a feature fires"""
    first: Bool[np.ndarray, "n_windows"]
    """whether a window is of the first half of the documents"""
    signs: Float[np.ndarray, "d_sae"]
    meanings: tuple[Int[np.ndarray, "d_sae"], ...]
    """best concept of each feature in either half, -1 for none; empty without labels"""
    names: tuple[str, ...]
    n_rows: int
    n_documents: int
    counted: str
    window: int

    @classmethod
    def read(cls, codes: Any, sae: SAE, doc_ids: Any, labels: TokenLabels | None, window: int, seed: int) -> "_Windows":
        """Windows, signs and best concepts of a dictionary's features."""
        from scipy.sparse import coo_matrix, csr_matrix

        stored = isinstance(codes, FeatureStore)
        values = codes if stored else csr_matrix(read_values(codes))
        n, d_sae = len(values) if stored else values.shape[0], values.d_sae if stored else values.shape[1]
        documents = _find_documents(values if stored else None, doc_ids, labels)
        if d_sae != sae.cfg.d_sae or len(documents) != n or (labels is not None and labels.n_tokens != n):
            raise ValueError(
                f"`codes` must be of the {sae.cfg.d_sae} features of the SAE, with a document and labels for each row, "
                f"got {d_sae} features, {n} rows, {len(documents)} documents and "
                f"{n if labels is None else labels.n_tokens} labels."
            )
        starts = find_runs(documents)
        place = np.arange(n) - np.repeat(starts, np.diff(np.append(starts, n)))
        of = np.cumsum(place % window == 0) - 1
        first = split_documents(documents, 0.5, seed)
        parts, signs = [], np.zeros(d_sae)
        hits = np.zeros((2, d_sae, 0 if labels is None else len(labels)))
        fires = np.zeros((2, d_sae))
        for start in range(0, n, ROWS_AT_ONCE):
            part = slice(start, min(start + ROWS_AT_ONCE, n))
            block = values.matrix(part.start, part.stop) if stored else values[part].copy()
            block.eliminate_zeros()
            signs += np.asarray(block.sum(0), np.float64).ravel()
            block.data = np.ones_like(block.data, np.float32)
            rows = block.tocoo()
            seen = coo_matrix((rows.data, (of[part][rows.row] - of[start], rows.col)))
            seen.sum_duplicates()
            parts.append((seen.row + of[start], seen.col))
            for half in (0, 1):
                own = first[part] == (half == 0)
                fires[half] += np.asarray(block[own].sum(0)).ravel()
                if labels is not None:
                    hits[half] += (block[own].T @ labels.matrix[part][own].astype(np.float32)).toarray()
        i, j = (np.concatenate(one) for one in zip(*parts, strict=True))
        windows = csr_matrix((np.ones(len(i)), (i, j)), shape=(int(of[-1]) + 1, d_sae))
        windows.sum_duplicates()  # windows that two blocks share
        windows.data[:] = 1
        meanings = () if labels is None else tuple(_best(hits[h], fires[h], labels, first == (h == 0)) for h in (0, 1))
        return cls(
            windows=windows,
            first=first[place % window == 0],
            signs=np.where(signs < 0, -1.0, 1.0),
            meanings=meanings,
            names=() if labels is None else labels.names,
            n_rows=n,
            n_documents=len(np.unique(documents)),
            counted=values.counted if stored else "tokens",
            window=window,
        )


def _find_documents(store: FeatureStore | None, doc_ids: Any, labels: TokenLabels | None) -> Shaped[np.ndarray, "n"]:
    if store is not None:
        return np.asarray(store.doc_ids)
    if doc_ids is None and (labels is None or labels.doc_ids is None):
        raise ValueError("`doc_ids` must be given with codes that are not a store's, got None.")
    return np.asarray(doc_ids) if doc_ids is not None else labels.require_documents()  # type: ignore[union-attr]


def _best(
    hits: Float[np.ndarray, "d n"], fires: Float[np.ndarray, "d"], labels: TokenLabels, rows: Bool[np.ndarray, "m"]
) -> Int[np.ndarray, "d"]:
    """For each feature the concept of highest kappa; -1 where none is above chance."""
    true = np.asarray(labels.matrix[rows].sum(0), np.float64).ravel()
    found = np.nan_to_num(kappa(hits, fires[:, None], true, int(rows.sum())))
    return np.where(found.max(1) > 0, found.argmax(1), -1)


def _measure(
    text: _Windows, sae: SAE, ks: Sequence[int], affinity: Affinity, min_windows: int, n_draws: int, seed: int
) -> Lobes:
    halves = [text.windows[rows] for rows in (text.first, ~text.first)]
    counts, least = [np.asarray(half.sum(0)).ravel() for half in halves], min_windows / 2
    rows = exact(sae.directions()).cpu().numpy() * text.signs[:, None]
    kept = np.all([(c >= least) & (c <= half.shape[0] - least) for c, half in zip(counts, halves, strict=True)], 0)
    kept = np.flatnonzero(kept & (np.abs(rows).max(1) > 0))
    if len(kept) < 2 * ks[-1]:
        raise ValueError(
            f"`n_lobes` must be at most half of the {len(kept)} features that fire in {min_windows} windows and are "
            f"silent in as many, got {ks[-1]}; give more text or fewer lobes."
        )
    rng = np.random.default_rng(seed)
    rows = rows[kept].astype(np.float32)
    firing = NormalizedVectors.of_windows(text.windows[:, kept])
    near = NormalizedVectors.of_rows(rows)
    random = [NormalizedVectors.of_rows(rng.standard_normal(rows.shape, np.float32)) for _ in range(n_draws)]
    cuts = {
        name: SpectralClusters.of(vectors, ks[-1], how, seed)
        for name, vectors, how in (
            ("all", firing, affinity),
            *((str(h), NormalizedVectors.of_windows(half[:, kept]), affinity) for h, half in enumerate(halves)),
            ("rows", near, "cosine + 1"),
            *((f"random {i}", one, "cosine + 1") for i, one in enumerate(random)),
        )
    }
    meanings = [one[kept] for one in text.meanings]
    scores = []
    for k in ks:
        of = {name: cut.cut(k, seed) for name, cut in cuts.items()}
        scores.append(
            _score(k, of, cuts["rows"].cut(k, seed + 1), near, random, meanings, (kept, len(text.signs)), rng)
        )
    finest = scores[-1].lobes[kept]
    return Lobes(
        affinity=affinity,
        window=text.window,
        n_windows=text.windows.shape[0],
        n_rows=text.n_rows,
        counted=text.counted,
        n_documents=text.n_documents,
        n_features=len(kept),
        d_sae=len(text.signs),
        seed=seed,
        scores=tuple(scores),
        lobes=_describe(finest, firing, kept, meanings, text.names),
    )


def _score(
    k: int,
    of: dict[str, np.ndarray],
    again: np.ndarray,
    near: NormalizedVectors,
    random: Sequence[NormalizedVectors],
    meanings: Sequence[np.ndarray],
    places: tuple[np.ndarray, int],
    rng: "np.random.Generator",
) -> LobeScore:
    from sklearn.metrics import adjusted_mutual_info_score as ami

    found, seed = of["all"], int(rng.integers(2**31))
    contrast, z = cosine_contrast(near, found)
    all_lobes = np.full(places[1], -1)
    all_lobes[places[0]] = found
    told = {}
    if meanings:
        pairs = ((of[str(h)], of["rows"], meanings[1 - h]) for h in (0, 1))
        each = [(ami(a, m), ami(a, rng.permutation(m)), ami(b, m)) for a, b, m in pairs]
        names = ("meaning", "meaning_permuted", "meaning_directions")
        told = dict(zip(names, map(float, np.mean(each, 0)), strict=True))
    return LobeScore(
        n_lobes=k,
        contrast=contrast,
        contrast_z=z,
        contrast_z_random=tuple(cosine_contrast(one, found)[1] for one in random),
        ami=float(ami(found, of["rows"])),
        ami_z=information_z(found, of["rows"], rng),
        ami_random=tuple(float(ami(found, of[f"random {i}"])) for i in range(len(random))),
        ami_starts=float(ami(of["rows"], again)),
        ami_halves=float(ami(of["0"], of["1"])),
        accuracy=predict_groups(near, found, seed),
        accuracy_random=predict_groups(random[0], found, seed),
        largest=float(np.bincount(found).max() / len(found)),
        lobes=all_lobes,
        **told,
    )


def _describe(
    groups: np.ndarray,
    firing: NormalizedVectors,
    kept: np.ndarray,
    meanings: Sequence[np.ndarray],
    names: Sequence[str],
) -> tuple[Lobe, ...]:
    sizes = np.bincount(groups)
    sums = firing.times(np.eye(len(sizes))[groups])  # of each feature's phi with those of each lobe
    found = []
    for lobe, size in enumerate(sizes.tolist()):
        own = np.flatnonzero(groups == lobe)
        inside, rest = sums[own, lobe], float(sums[own].sum() - sums[own, lobe].sum())
        told: dict[str, Any] = {}
        if meanings:
            counts = [np.bincount(np.concatenate([m[r] for m in meanings]) + 1, minlength=len(names) + 1)[1:]
                      for r in (own, slice(None))]  # fmt: skip
            shares = [c / (len(meanings) * n) for c, n in zip(counts, (size, len(groups)), strict=True)]
            best = int((counts[0] - counts[1] * size / len(groups)).argmax())
            told = {"concept": names[best], "share": float(shares[0][best]), "share_all": float(shares[1][best])}
        found.append(
            Lobe(
                members=tuple(kept[own[np.argsort(-inside, kind="stable")]].tolist()),
                inside=float(inside.sum() - size) / (size * (size - 1)) if size > 1 else math.nan,
                outside=rest / (size * (len(groups) - size)) if size < len(groups) else math.nan,
                **told,
            )
        )
    return tuple(sorted(found, key=lambda one: (-len(one.members), one.members)))
