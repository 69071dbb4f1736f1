"""Sums of metrics by document, and the bootstrap over documents for 95 % intervals."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_NUMBERS = 2**22  # draws times documents held at a time
LEVEL = 0.95


class DocumentSums:
    """Sums of per-token terms for each document, in float64.

    Tokens of a document depend on each other, documents do not: the bootstrap draws documents.

    >>> sums = DocumentSums(torch.tensor([[0, 0, 7, -1]]))
    >>> sums.add(torch.tensor([0, 0, 7]), {"n_tokens": torch.ones(3)})
    >>> sums.columns["n_tokens"].tolist(), float(sums.total()["n_tokens"])
    ([2.0, 1.0], 3.0)
    """

    def __init__(self, doc_ids: Int[Tensor, "*shape"]) -> None:
        self.documents = doc_ids[doc_ids >= 0].unique()
        self.columns: dict[str, Tensor] = {}

    def add(self, doc_ids: Int[Tensor, "n"], terms: dict[str, Float[Tensor, "n"]]) -> None:
        """Add per-token terms to the sums of their documents."""
        places = torch.searchsorted(self.documents, doc_ids)
        for name, values in terms.items():
            if name not in self.columns:
                self.columns[name] = torch.zeros(len(self.documents), dtype=torch.float64)
            self.columns[name].index_add_(0, places, values.cpu().double())

    @property
    def n_documents(self) -> int:
        """Number of documents with at least one token counted."""
        return int((self.columns["n_tokens"] > 0).sum())

    def total(self) -> dict[str, Float[Tensor, ""]]:
        """Sum of each term over all documents."""
        return {name: column.sum() for name, column in self.columns.items()}

    def resample(self, n_draws: int, seed: int) -> dict[str, Float[Tensor, "n_draws"]]:
        """Bootstrap draws of each total: as many documents with replacement, `n_draws` times, the same for all."""
        counted = self.columns["n_tokens"] > 0
        table = torch.stack([column[counted] for column in self.columns.values()], dim=1)
        n, generator = len(table), torch.Generator().manual_seed(seed)
        size = max(1, CHUNK_NUMBERS // n)
        chunks = []
        for start in range(0, n_draws, size):
            drawn = torch.randint(n, (min(size, n_draws - start), n), generator=generator)
            places = drawn + n * torch.arange(len(drawn))[:, None]
            counts = torch.bincount(places.flatten(), minlength=drawn.numel()).view(-1, n)
            chunks.append(counts.double() @ table)
        return dict(zip(self.columns, torch.cat(chunks).unbind(1), strict=True))


def find_reach(draws: Float[np.ndarray, "n n_draws"], n_clusters: int, n_groups: int = 1) -> Float[np.ndarray, "n"]:
    """Half the width of 95 % intervals, `t sd sqrt(m / (m - g))`, t Student's of m - g degrees of freedom.

    Quantiles of the draws are too narrow for a few clusters: those of two exclude a mean of 0 half of the time. NaN
    where there are too few clusters, or draws, for a spread.

    Args:
        draws: numbers with clusters drawn with replacement; NaN is left out.
        n_clusters: m, how many clusters there are to draw from, prompts or documents for instance.
        n_groups: g, groups that clusters were drawn within.

    >>> find_reach(np.array([[-1.0, 1.0]]), 1000).round(2).tolist(), find_reach(np.array([[-1.0, 1.0]]), 1).tolist()
    ([1.96], [nan])
    """
    from scipy.stats import t

    reach, freedom = np.full(len(draws), np.nan), n_clusters - n_groups
    known = (~np.isnan(draws)).sum(1) > 1
    if known.any() and freedom > 0:
        scale = float(t.ppf((1 + LEVEL) / 2, freedom)) * np.sqrt(n_clusters / freedom)
        reach[known] = scale * np.nanstd(draws[known], axis=1)
    return reach


def find_interval(draws: Float[Tensor, "n_draws"]) -> tuple[float, float]:
    """The 95 % interval of bootstrap draws, from their quantiles; draws that are NaN are left out.

    >>> [round(end, 6) for end in find_interval(torch.arange(1001.0))]
    [25.0, 975.0]
    """
    tail = (1 - LEVEL) / 2
    low, high = draws.double().nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
