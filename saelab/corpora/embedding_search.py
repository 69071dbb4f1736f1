"""`EmbeddingSearch`: documents by the cosine of their embeddings with a query in which features were edited."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor
from torch.nn.functional import normalize

from saelab.evaluation.feature_classifiers import encode_csr, find_peaks
from saelab.functional.indices import read_feature
from saelab.functional.screening import largest_first
from saelab.sae.compatibility import match_activations, require_one_source
from saelab.sae.sae import SAE
from saelab.stores.activations import Activations
from saelab.stores.results import Result, format_table

BLOCK = 16_384
"""rows that are compared with queries at a time"""
TOP = 10
NOTHING = 1e-5
"""norm of an edited embedding relative to what it was, from which on it has a direction"""
SHOWN = 72  # characters of a document


@dataclass(frozen=True, kw_only=True)
class FoundEmbedding:
    """A document near a query."""

    row: int
    cosine: float
    """with the query as it was edited"""
    rank_before: int
    """its place for the query as it was, from 1"""
    text: str
    """empty where documents have none"""


@dataclass(frozen=True, kw_only=True)
class EmbeddingRanking(Result):
    """Documents nearest to a query, the nearest first."""

    n_documents: int
    """documents searched"""
    edits: tuple[tuple[int, float, float], ...]
    """feature, its code before and the code it was set to"""
    near_query: float
    """cosine of the edited query with the query as it was: what the edit costs"""
    rows: tuple[FoundEmbedding, ...]

    def __str__(self) -> str:
        edited = ", ".join(f"feature {j} from {before:.3g} to {after:.3g}" for j, before, after in self.edits)
        lines = [
            f"{len(self.rows):,} of {self.n_documents:,} documents; {edited or 'nothing edited'}; cosine with the "
            f"query {self.near_query:.3f}"
        ]
        table = [["document", "cosine", "before", "text"]]
        for one in self.rows:
            text = " ".join(one.text.split())
            table.append([str(one.row), f"{one.cosine:.3f}", str(one.rank_before), text[:SHOWN]])
        return "\n".join(lines + format_table(table, left=(3,)))


class EmbeddingSearch:
    """Embeddings of documents, searched by cosine after features of the query were set to other codes.

    An edit encodes the query, sets codes, keeps as many as were active before (the largest by magnitude, those that
    were set first), decodes them, adds back what the reconstruction missed of the query and scales to norm 1
    (arXiv:2408.00657, which leaves the rest of the query out).

    Args:
        sae: an SAE of such embeddings.
        documents: the embeddings, one row a document, as from `embed`, with the texts that are shown; or a tensor.
        allow_mismatch: take embeddings from another encoder than those that the SAE was trained on.

    Raises:
        ValueError: rows of another width or from another encoder, or an SAE that does not reconstruct what it reads.
    """

    def __init__(
        self, sae: SAE, documents: Activations | Float[Tensor, "n d_in"], *, allow_mismatch: bool = False
    ) -> None:
        require_one_source(sae)
        acts = documents if isinstance(documents, Activations) else Activations.from_tensor(documents)
        if acts.d_in != sae.cfg.d_in or sae.cfg.d_out not in (None, sae.cfg.d_in) or len(acts) == 0:
            raise ValueError(
                f"`documents` must be at least one row of the width that `sae` reads and writes, got {len(acts)} rows "
                f"of {acts.d_in} for {sae.cfg.d_in} and {sae.cfg.d_out or sae.cfg.d_in}."
            )
        match_activations(sae, acts, allow_mismatch)
        self.sae, self.documents = sae, acts

    def __len__(self) -> int:
        return len(self.documents)

    def __repr__(self) -> str:
        return f"EmbeddingSearch({len(self):,} documents, {self.sae.cfg.d_sae:,} features)"

    @cached_property
    def peaks(self) -> Float[np.ndarray, "d_sae 2"]:
        """The largest magnitude of each feature's positive and negative codes in the documents."""
        found = np.zeros((self.sae.cfg.d_sae, 2))
        for start in range(0, len(self), BLOCK):
            x = self.documents[start : start + BLOCK].float()
            found = np.maximum(found, find_peaks(encode_csr(self.sae, x)))
        return found

    def query(
        self,
        query: int | Float[Tensor, "d_in"],
        edits: Mapping[int, float] | None = None,
        *,
        top: int = TOP,
    ) -> EmbeddingRanking:
        """The documents nearest to a query in which features were edited, and the place of each before.

        Args:
            query: an embedding, or the row of a document, which is then not found itself.
            edits: codes that features are set to, by feature; 0 takes a feature out. `peaks` says how large they get.
            top: most documents.

        Raises:
            ValueError: a row or a feature that does not exist, codes that are not finite, an embedding of another
                width, or `top` below 1.
        """
        if top < 1:
            raise ValueError(f"`top` must be at least 1, got {top}.")
        own = -1
        if not isinstance(query, Tensor):
            own = read_feature(query, "query")
            if not 0 <= own < len(self):
                raise ValueError(f"`query` must be a row in 0..{len(self) - 1} or an embedding, got {query}.")
            query = self.documents[own : own + 1][0]
        x = query.float()[None]
        moved = self.edit(x, edits or {})
        rows, cosines = self.nearest(moved, top, exclude=np.array([own]))
        before = self._rank(x, rows[0], own)
        codes = self._encode(x)[0]
        texts = [(self.documents.read_texts(row, row + 1) or [""])[0] for row in rows[0].tolist()]
        return EmbeddingRanking(
            n_documents=len(self) - (own >= 0),
            edits=tuple((int(j), float(codes[j]), float(value)) for j, value in (edits or {}).items()),
            near_query=float((normalize(x) * moved).sum()),
            rows=tuple(
                FoundEmbedding(row=row, cosine=cosine, rank_before=rank, text=text)
                for row, cosine, rank, text in zip(
                    rows[0].tolist(), cosines[0].tolist(), before.tolist(), texts, strict=True
                )
            ),
        )

    @torch.no_grad()
    def edit(self, x: Float[Tensor, "n d_in"], edits: Mapping[int, float]) -> Float[Tensor, "n d_in"]:
        """Embeddings with features set to codes, of norm 1.

        Raises:
            ValueError: a feature that does not exist, a code that is not finite, rows of another width, or edits that
                leave nothing of a row.
        """
        if x.shape[1] != self.sae.cfg.d_in:
            raise ValueError(f"Embeddings must have width {self.sae.cfg.d_in}, got {x.shape[1]}.")
        features = [read_feature(j, "edits") for j in edits]
        values = torch.tensor([float(value) for value in edits.values()])
        if any(not 0 <= j < self.sae.cfg.d_sae for j in features) or not bool(values.isfinite().all()):
            raise ValueError(
                f"`edits` must give features in 0..{self.sae.cfg.d_sae - 1} finite codes, got {dict(edits)}."
            )
        if not features:
            return normalize(x.float())
        z = self._encode(x)
        changed = z.clone()
        changed[:, features] = values.to(z)
        changed = _keep(changed, (z != 0).sum(1), features)
        given = x.to(self.sae.device)
        moved = self.sae.decode(changed, x=given).float() - self.sae.decode(z, x=given).float()
        found = x.float() + moved.cpu()
        if empty := int((found.norm(dim=1) <= NOTHING * x.float().norm(dim=1)).sum()):
            raise ValueError(
                f"`edits` must leave something of every embedding, got {empty} of {len(x)} that they cancel; set other "
                "codes."
            )
        return normalize(found)

    def nearest(
        self, x: Float[Tensor, "n d_in"], top: int = TOP, *, exclude: Int[np.ndarray, "n"] | None = None
    ) -> tuple[Int[np.ndarray, "n top"], Float32[np.ndarray, "n top"]]:
        """The rows nearest to each embedding by cosine, best first, and the cosines; of equal ones the first row.

        Args:
            x: embeddings, of any length.
            top: number of rows, at most those there are.
            exclude: a row for each embedding that it does not find; -1 excludes none.
        """
        best_rows = torch.zeros(len(x), 0, dtype=torch.int64)
        best = torch.zeros(len(x), 0)
        out = np.full(len(x), -1) if exclude is None else exclude
        top = min(top, len(self) - bool((out >= 0).any()))
        for start in range(0, len(self), BLOCK):
            cosines = normalize(x.float()) @ normalize(self.documents[start : start + BLOCK].float()).T
            here = np.flatnonzero((out >= start) & (out < start + BLOCK))
            cosines[here, out[here] - start] = -torch.inf
            rows = torch.arange(start, start + cosines.shape[1]).expand(len(x), -1)
            best, best_rows = torch.cat([best, cosines], 1), torch.cat([best_rows, rows], 1)
            kept = largest_first(best, min(top, best.shape[1]))
            best, best_rows = best.gather(1, kept), best_rows.gather(1, kept)
        return best_rows.numpy(), best.numpy()

    @torch.no_grad()
    def _encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        return self.sae.encode(x.to(self.sae.device)).float()

    def _rank(self, x: Float[Tensor, "1 d_in"], rows: Int[np.ndarray, "top"], own: int) -> Int[np.ndarray, "top"]:
        """The places of some rows among all by cosine with an embedding, from 1; a row `own` has none."""
        unit = normalize(x)[0]
        cosines = torch.cat(
            [normalize(self.documents[i : i + BLOCK].float()) @ unit for i in range(0, len(self), BLOCK)]
        )
        if own >= 0:
            cosines[own] = -torch.inf
        return np.array([1 + int((cosines > cosines[row]).sum()) for row in rows.tolist()], np.int64)


def _keep(z: Float[Tensor, "n d_sae"], n_active: Int[Tensor, "n"], first: list[int]) -> Float[Tensor, "n d_sae"]:
    """The codes that are largest by magnitude, so many in each row; those of `first` before all others."""
    sizes = z.abs()
    sizes[:, first] = torch.where(sizes[:, first] > 0, torch.inf, 0.0)
    most = int(n_active.max().clamp(max=z.shape[1]))
    if most == 0:
        return torch.where(sizes == torch.inf, z, 0)
    order = largest_first(sizes, most)
    within = torch.arange(most, device=z.device) < n_active[:, None]
    kept = torch.zeros_like(z, dtype=torch.bool).scatter_(1, order, within) | (sizes == torch.inf)
    return torch.where(kept, z, 0)


def rotate_toward(
    x: Float[Tensor, "n d_in"], direction: Float[Tensor, "d_in"], cosine: Float[Tensor, "n"] | float
) -> Float[Tensor, "n d_in"]:
    """Embeddings of norm 1, turned toward a direction until their cosine with what they were is `cosine`.

    That is the direction added with whatever weight costs as much: x cos + d sin, with d the part of the direction
    that is at right angles to x, at norm 1.

    Args:
        x: embeddings.
        direction: where to; of any length.
        cosine: cosine with x after the turn, -1 to 1, one or one a row.

    >>> x = rotate_toward(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0, 1.0]), 0.6)
    >>> x.round(decimals=4)
    tensor([[0.6000, 0.8000]])
    """
    unit = normalize(x.float())
    rest = direction.float() - (unit @ direction.float())[:, None] * unit
    c = torch.as_tensor(cosine, dtype=torch.float32).expand(len(x)).clamp(-1, 1)[:, None]
    return normalize(c * unit + (1 - c**2).sqrt() * normalize(rest))


@dataclass(frozen=True, kw_only=True)
class EditScores(Result):
    """Share of the nearest documents that are of a target, for queries that are not, as they are and moved."""

    n_queries: int
    n_target: int
    """documents of the target, among those searched"""
    top: int
    """nearest documents of a query that are looked at"""
    chance: float
    """share of the target among all documents"""
    before: float
    """share of the target among the nearest of the queries as they are"""
    edited: float
    """after the features were set"""
    word_mean: float
    """after a turn toward the mean of the target's documents, to the same cosine, query by query"""
    mean_difference: float
    """after a turn toward that mean less the mean of all documents"""
    random: float
    """after a turn toward another feature's direction, drawn for each query"""
    near_query: float
    """mean cosine of the edited queries with the queries, which all turns share"""

    def __str__(self) -> str:
        head = (
            f"share of the {self.top} nearest that are of the target, {self.n_queries:,} queries, cosine with the "
            f"query {self.near_query:.3f}, target {self.chance:.2%} of all"
        )
        names = ("before", "edited", "word_mean", "mean_difference", "random")
        told = {"word_mean": "toward its mean", "mean_difference": "toward mean difference", "random": "random feature"}
        return "\n".join(
            [head, *format_table([[told.get(name, name), f"{getattr(self, name):.3f}"] for name in names])]
        )


def score_edit(
    search: EmbeddingSearch,
    edits: Mapping[int, float],
    target: Bool[np.ndarray, "n_documents"],
    *,
    known: Bool[np.ndarray, "n_documents"] | None = None,
    n_queries: int = 30,
    top: int = TOP,
    seed: int = 0,
) -> EditScores:
    """How often an edit finds documents of a target, such as those with a word, beside rivals at equal cost.

    Queries are documents without the target, drawn at random. Each rival turns the query until its cosine with the
    query is that of the edited one (`rotate_toward`), so that all of them cost the same.

    Args:
        search: the documents and the SAE.
        edits: codes that features are set to.
        target: which documents are to be found.
        known: documents that the means of the rivals are taken of, while queries are drawn from the others; None takes
            all for both.
        n_queries: number of queries, at most those there are.
        top: nearest documents that are looked at.
        seed: of the queries and the random features.

    Raises:
        ValueError: masks of another length, no document of the target that is known, none without it to ask, or edits
            that do not fit.
    """
    n = len(search)
    seen = np.ones(n, bool) if known is None else known
    if len(target) != n or len(seen) != n or not (target & seen).any():
        raise ValueError(
            f"`target` and `known` must be masks of the {n} documents with at least one of the target among those "
            f"known, got {len(target)} and {len(seen)}, {int((target & seen).sum()) if len(target) == len(seen) else 0}"
            " of the target known."
        )
    asked = np.flatnonzero(~target if known is None else ~target & ~known)
    if len(asked) == 0 or min(n_queries, top) < 1:
        raise ValueError(
            "There must be a document without the target to ask, `n_queries` and `top` at least 1, got "
            f"{len(asked)} documents, {n_queries} and {top}."
        )
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(asked, min(n_queries, len(asked)), replace=False))
    given = torch.cat([search.documents[int(row) : int(row) + 1] for row in rows]).float()
    edited, x = search.edit(given, edits), normalize(given)  # an SAE reads embeddings at the length that they have
    cosine = (x * edited).sum(1)
    mean = _mean(search, target & seen)
    live = np.setdiff1d(np.flatnonzero(search.peaks.any(1)), list(edits))
    drawn = search.sae.directions(rng.choice(live, len(rows)).tolist()).float().cpu() if len(live) else x * 0
    ways = {
        "before": x,
        "edited": edited,
        "word_mean": rotate_toward(x, mean, cosine),
        "mean_difference": rotate_toward(x, mean - _mean(search, seen), cosine),
        "random": torch.cat([rotate_toward(x[i : i + 1], drawn[i], cosine[i : i + 1]) for i in range(len(rows))]),
    }
    hits = {name: float(target[search.nearest(moved, top, exclude=rows)[0]].mean()) for name, moved in ways.items()}
    return EditScores(
        n_queries=len(rows),
        n_target=int(target.sum()),
        top=top,
        chance=float(target.mean()),
        near_query=float(cosine.mean()),
        **hits,
    )


def _mean(search: EmbeddingSearch, rows: Bool[np.ndarray, "n"]) -> Float[Tensor, "d_in"]:
    """The mean of some documents' embeddings at norm 1."""
    total = torch.zeros(search.documents.d_in, dtype=torch.float64)
    for start in range(0, len(rows), BLOCK):
        x = normalize(search.documents[start : start + BLOCK].float())
        total += x[torch.from_numpy(rows[start : start + BLOCK])].double().sum(0)
    return (total / rows.sum()).float()
