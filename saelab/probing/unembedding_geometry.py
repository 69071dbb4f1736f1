"""`causal_inner_product` and `compare_concepts`: directions of concepts in a model's embedding and unembedding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from saelab.functional.metrics import exact
from saelab.interventions.prompt_metrics import find_token
from saelab.lm.hooks import capture
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.lm.unembedding import Unembedding
from saelab.probing.linear_directions import SMALLEST
from saelab.stores.results import Result, find_row, format_spread, format_table

ConceptPairs: TypeAlias = Sequence[tuple[str | int, str | int]]
"""Pairs of tokens that differ in a concept alone, such as ("he", "she")"""
FEWEST_PAIRS = 2
EMBEDDED = "hook_embed"


@dataclass(frozen=True, eq=False, repr=False)
class CausalInnerProduct:
    """The inner product of arXiv:2311.03658, by the covariance S of the rows of the unembedding over the vocabulary.

        <a, b> = a^T S^-1 b  of directions in the unembedding,     a^T S b  of directions in the residual stream

    S^-1 maps the first to the second. Directions along which the unembedding varies by less than 1e-6 of its largest
    variance have no part in it.
    """

    covariance: Float[Tensor, "d_model d_model"]
    """float64"""
    unembedding: Float[Tensor, "n_tokens d_model"]
    """a row for each token that the tokenizer knows, the final norm's weight folded in, less their mean"""
    token_ids: Int[Tensor, "n_tokens"]

    @property
    def rank(self) -> int:
        """Dimensions in which the unembedding varies."""
        return self._root(0.0).shape[1]

    def __repr__(self) -> str:
        return f"CausalInnerProduct(d_model={len(self.covariance)}, rank={self.rank}, n_tokens={len(self.token_ids)})"

    def whiten(self, directions: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n rank"]:
        """Directions in the unembedding in coordinates whose plain inner product is the causal one."""
        return exact(directions) @ self._root(-0.5)

    def whiten_residual(self, directions: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n rank"]:
        """The same of directions in the residual stream: what a concept adds to it and its probe coincide there."""
        return exact(directions) @ self._root(0.5)

    def to_residual(self, directions: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """Directions in the residual stream for directions in the unembedding, `S^-1 a`.

        Adding one moves the logits along its concept, and along no concept that is orthogonal to it.
        """
        root = self._root(-0.5)
        return (exact(directions) @ root @ root.T).float()

    def _root(self, power: float) -> Float[Tensor, "d_model rank"]:
        variances, axes = torch.linalg.eigh(self.covariance)
        kept = variances > SMALLEST * variances[-1]
        return axes[:, kept] * variances[kept] ** power


def causal_inner_product(model: AnyModel) -> CausalInnerProduct:
    """The causal inner product of a model, from its unembedding; ValueError for a model without a final norm.

    >>> causal_inner_product(sl.lm.tiny_model())
    CausalInnerProduct(d_model=32, rank=32, n_tokens=259)
    """
    model = as_model(model)
    read_out = Unembedding.measure(model)
    rows = exact(read_out(torch.eye(model.cfg.d_model)).T.cpu())[read_out.known.cpu()]
    rows = rows - rows.mean(0)
    return CausalInnerProduct(rows.T @ rows / len(rows), rows.float(), read_out.known.cpu())


@dataclass(frozen=True, kw_only=True)
class ConceptDirection:
    """How well pairs of tokens agree on a concept's direction; cosines of a pair with the mean of the other pairs."""

    name: str
    n_pairs: int
    causal: float
    """mean cosine in the unembedding, by the causal inner product"""
    euclidean: float
    """the same by the plain one"""
    embedding: float
    """the same in the token embedding, plain"""
    both: float
    """cosine of the mean directions in embedding and unembedding, plain; near 1 for any words where these are tied"""


@dataclass(frozen=True, kw_only=True, eq=False)
class ConceptGeometry(Result):
    """Result of `compare_concepts`."""

    limits: ClassVar[str] = (
        "Whitening makes directions of unrelated words nearly orthogonal whatever they mean, as the random pairs show: "
        "cosines near 0 tell concepts apart only as far as they stay below those of random pairs and of a concept with "
        "itself. Independence of the concepts is assumed, not tested."
    )
    """what the result cannot show"""
    names: tuple[str, ...]
    rows: tuple[ConceptDirection, ...]
    random_pairs: dict[str, tuple[float, ...]]
    """by "causal", "euclidean", "embedding" and "both": the same figures of concepts made of random pairs"""
    cosines: dict[str, Float[np.ndarray, "n_concepts n_concepts"]] = field(repr=False)
    """by "causal", "euclidean" and "embedding": cosines of the concepts' mean directions"""
    random_cosines: dict[str, tuple[float, ...]]
    """mean |cosine| of different concepts made of random pairs, of each draw"""
    independent: tuple[tuple[str, str], ...]
    """pairs of concepts that are taken as independent"""
    n_tokens: int
    """tokens of the vocabulary"""
    seed: int

    def __getitem__(self, name: str) -> ConceptDirection:
        return find_row(self.rows, name=name)

    def between(self, space: str) -> float:
        """Mean |cosine| of the independent concepts, in "causal", "euclidean" or "embedding"."""
        places = [(self.names.index(a), self.names.index(b)) for a, b in self.independent]
        return mean_at(np.abs(self.cosines[space]), places)

    def to_dict(self) -> dict[str, Any]:
        """Every field, the means over independent concepts, and what they cannot show, ready for JSON."""
        means = {space: self.between(space) for space in self.cosines}
        return super().to_dict() | {"between": means, "limits": self.limits}

    def __str__(self) -> str:
        head = (
            f"{len(self.names)} concepts, {len(self.independent)} pairs of independent ones, {self.n_tokens:,} tokens, "
            f"{len(self.random_cosines['causal'])} draws of random pairs"
        )
        columns = ("causal", "euclidean", "embedding")
        table = [["mean |cosine| of", *columns]]
        table.append(["random concepts", *(format_spread(self.random_cosines[one]) for one in columns)])
        table.append(["independent concepts", *(f"{self.between(one):.3f}" for one in columns)])
        inside = [["agreement of pairs", "pairs", *columns, "embedding with unembedding"]]
        spread = [format_spread(self.random_pairs[one]) for one in (*columns, "both")]
        inside.append(["random pairs", "", *spread])
        for row in self.rows:
            cells = [f"{value:.3f}" for value in (row.causal, row.euclidean, row.embedding, row.both)]
            inside.append([row.name, str(row.n_pairs), *cells])
        return "\n".join([head, *format_table(table), *format_table(inside), self.limits])


def compare_concepts(
    model: AnyModel,
    concepts: Mapping[str, ConceptPairs],
    *,
    independent: Sequence[tuple[str, str]] | None = None,
    n_random: int = 20,
    seed: int = 0,
) -> ConceptGeometry:
    """Directions of concepts in embedding and unembedding, how well pairs agree on them, and their cosines.

    A concept's direction is the mean of the differences of its pairs, in the unembedding with the final norm's weight
    folded in and in the token embedding. Cosines are those of the causal and of the plain inner product. The null is
    concepts made of as many random pairs of tokens. Sources: arXiv:2311.03658, arXiv:2403.03867.

    Args:
        model: language model.
        concepts: pairs of tokens by name of the concept, by text or id.
        independent: pairs of concepts that are taken as independent; by default all that share no token.
        n_random: draws of random concepts, one for each concept and with as many pairs.
        seed: of these.

    Raises:
        ValueError: for fewer than two concepts, a concept with fewer than two pairs or with a pair of one token, and
            names of concepts that are not there.

    >>> letters = {"case": [("a", "A"), ("b", "B"), ("c", "C")], "digits": [("1", "2"), ("3", "4")]}
    >>> found = compare_concepts(sl.lm.tiny_model(), letters)
    >>> found.independent, found["case"].n_pairs
    ((('case', 'digits'),), 3)
    """
    model = as_model(model)
    ids = {name: _read_pairs(model, name, pairs) for name, pairs in concepts.items()}
    if len(ids) < 2 or n_random < 1:
        raise ValueError(f"`concepts` must be two or more, with a random draw, got {len(ids)} and {n_random} draws.")
    names = tuple(ids)
    if independent is None:
        chosen = tuple(
            (a, b) for i, a in enumerate(names) for b in names[i + 1 :] if not torch.isin(ids[a], ids[b]).any()
        )
    else:
        chosen = tuple((a, b) for a, b in independent)
    if unknown := [name for pair in chosen for name in pair if name not in ids]:
        raise ValueError(f"`independent` must name concepts, got {unknown[:5]}.")
    spaces = _Spaces.read(model)
    drawn = [spaces.draw(list(ids.values()), seed + i, chosen, names) for i in range(n_random)]
    return ConceptGeometry(
        names=names,
        rows=tuple(spaces.describe(name, pairs) for name, pairs in ids.items()),
        random_pairs={key: tuple(one for each, _ in drawn for one in each[key]) for key in drawn[0][0]},
        cosines={key: spaces.compare(list(ids.values()), key) for key in spaces.tables},
        random_cosines={key: tuple(means[key] for _, means in drawn) for key in spaces.tables},
        independent=chosen,
        n_tokens=len(spaces.known),
        seed=seed,
    )


def _read_pairs(model: Model, name: str, pairs: ConceptPairs) -> Int[Tensor, "n_pairs 2"]:
    found = torch.tensor([[find_token(model, one) for one in pair] for pair in pairs], dtype=torch.long)
    if len(found) < FEWEST_PAIRS or (found[:, 0] == found[:, 1]).any():
        raise ValueError(f"'{name}' must have {FEWEST_PAIRS} pairs of different tokens, got {list(pairs)[:5]}.")
    return found


@dataclass(frozen=True, eq=False)
class _Spaces:
    """Vectors of every token known, in several spaces."""

    tables: dict[str, Float[Tensor, "n_tokens _"]]
    known: Int[Tensor, "n_tokens"]

    @classmethod
    def read(cls, model: Model) -> "_Spaces":
        product = causal_inner_product(model)
        known = product.token_ids
        embedded = [capture(model, ids[:, None], [EMBEDDED])[EMBEDDED][:, 0] for ids in known.split(4096)]
        tables = {
            "causal": product.whiten(product.unembedding),
            "euclidean": exact(product.unembedding),
            "embedding": exact(torch.cat(embedded).cpu()),
        }
        return cls(tables, known)

    def differences(self, pairs: Int[Tensor, "n_pairs 2"], space: str) -> Float[Tensor, "n_pairs d"]:
        """Second tokens less first ones; ValueError for a token that the tokenizer does not know."""
        at = torch.searchsorted(self.known, pairs)
        if not torch.equal(self.known[at.clamp(max=len(self.known) - 1)], pairs):
            raise ValueError("Tokens of concepts must be in the tokenizer's vocabulary.")
        vectors = self.tables[space]
        return vectors[at[:, 1]] - vectors[at[:, 0]]

    def agree(self, pairs: Int[Tensor, "n_pairs 2"], space: str) -> float:
        """Mean cosine of each difference with the mean of the others."""
        apart = self.differences(pairs, space)
        others = apart.sum(0) - apart
        return float((normalize(apart, dim=1) * normalize(others, dim=1)).sum(1).mean())

    def join(self, pairs: Int[Tensor, "n_pairs 2"]) -> float:
        """Cosine of the mean directions in embedding and unembedding; NaN where these are of different width."""
        a, b = (self.differences(pairs, space).mean(0) for space in ("embedding", "euclidean"))
        return float(normalize(a, dim=0) @ normalize(b, dim=0)) if len(a) == len(b) else float("nan")

    def describe(self, name: str, pairs: Int[Tensor, "n_pairs 2"]) -> ConceptDirection:
        return ConceptDirection(
            name=name,
            n_pairs=len(pairs),
            causal=self.agree(pairs, "causal"),
            euclidean=self.agree(pairs, "euclidean"),
            embedding=self.agree(pairs, "embedding"),
            both=self.join(pairs),
        )

    def compare(self, concepts: Sequence[Int[Tensor, "_ 2"]], space: str) -> Float[np.ndarray, "n n"]:
        """Cosines of the concepts' mean directions."""
        means = normalize(torch.stack([self.differences(pairs, space).mean(0) for pairs in concepts]), dim=1)
        return (means @ means.T).numpy()

    def draw(
        self,
        concepts: Sequence[Int[Tensor, "_ 2"]],
        seed: int,
        independent: Sequence[tuple[str, str]],
        names: Sequence[str],
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Agreement within concepts made of random pairs, and the mean |cosine| between these."""
        generator = torch.Generator().manual_seed(seed)
        chosen = [
            self.known[torch.rand(len(pairs), len(self.known), generator=generator).topk(2, dim=1).indices]
            for pairs in concepts
        ]
        described = [self.describe("random", pairs) for pairs in chosen]
        inside = {key: [getattr(one, key) for one in described] for key in ("causal", "euclidean", "embedding", "both")}
        places = [(names.index(a), names.index(b)) for a, b in independent]
        tables = {key: np.abs(self.compare(chosen, key)) for key in self.tables}
        return inside, {key: mean_at(table, places) for key, table in tables.items()}


def mean_at(table: Float[np.ndarray, "n n"], places: Sequence[tuple[int, int]]) -> float:
    """Mean of some cells of a table; NaN for none."""
    return float(np.mean([table[at] for at in places])) if places else float("nan")
