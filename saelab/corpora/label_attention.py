"""`LabelHead`: labels of documents from sparse codes of their tokens, by attention of each label (DILA, 2409.10504).

One sparse matrix A, sides of features by labels: `s_tc = f_t A_c` is what token t says for label c, the attention of
the label to the tokens is `a_tc = softmax_t(tau_c s_tc)`, and its logit `sum_t a_tc s_tc + b_c`. So a logit is a sum
over tokens and sides of features, which is what an explanation shows. Read from activations x, as in the paper, the
matrix gives the attention alone and the logit is `sum_t a_tc (x_t w_c) + b_c`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saelab.corpora.coded_documents import CodedDocuments, TokenCodes, attend
from saelab.evaluation.side_masks import Coded
from saelab.functional.sparse_products import gather_sum
from saelab.stores.feature_names import FeatureNames, name_sides, require_names
from saelab.stores.feature_store import FeatureStore
from saelab.stores.files import checksum, replace_folder, save_tensors, write_json
from saelab.stores.results import Drawn, Result, format_table
from saelab.stores.tensors import load_tensors
from saelab.stores.validation import SEAL, naming, read_fields, read_sealed, require_object

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Reads = Literal["codes", "activations"]
_FACTS = ("labels", "skipped", "d_sae", "reads", "n_train", "n_documents", "rate", "l1", "seed")
_VECTORS = ("W", "bias", "temperature", "thresholds")
_Attended: TypeAlias = tuple[Tensor, Tensor]
TENSORS, FACTS, KIND = "label_head.safetensors", "label_head.json", "label head"
SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class HeadScore:
    """How well a way to label documents does on held-out ones; each label's threshold is from other documents."""

    name: str
    micro_f1: float
    """F1 over all labels of all documents"""
    macro_f1: float
    """mean F1 of labels"""
    auroc: float
    """mean over labels; 0.5 is chance"""
    n_features: float
    """sides of features that a label uses, on average"""


@dataclass(frozen=True, kw_only=True)
class LabelFeature:
    """A side of a feature for a label."""

    feature: int
    sign: int
    name: str
    """its label; empty where it has none"""
    weight: float
    """entry of the sparse matrix for a code of the side's usual magnitude, above 0 where it speaks for the label"""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a token or a side of a feature adds to a label's logit."""

    name: str
    """the token's text, or the feature with its sign and label"""
    index: int
    """row of the token, or the feature"""
    sign: int
    """1 or -1: the side of the feature; 1 for a token"""
    attention: float
    """of the token; of a feature that of the tokens on which its side fires"""
    contribution: float
    """nats of the logit; of features of a head that reads activations, their part of the attention's score"""
    share: float
    """of the sum of all |contributions|"""


@dataclass(frozen=True, kw_only=True)
class ExplainedLabel:
    """One label of one document: tokens and features that bring it, the largest contributions first."""

    label: str
    probability: float
    predicted: bool
    """whether the probability reaches the label's threshold"""
    logit: float
    bias: float
    """what is left of the logit without tokens: `logit = bias + sum of contributions of tokens`"""
    tokens: tuple[Evidence, ...]
    features: tuple[Evidence, ...]


@dataclass(frozen=True, kw_only=True)
class ExplainedDocument(Result):
    """Result of `LabelHead.explain`: the labels of a document with the tokens and features that bring each."""

    document: int
    n_tokens: int
    labels: tuple[ExplainedLabel, ...]

    def __str__(self) -> str:
        table = [["label", "p", "token", "attention", "share", "feature", "share"]]
        for one in self.labels:
            for i in range(max(len(one.tokens), len(one.features), 1)):
                left = [one.label, f"{one.probability:.3f}{'' if one.predicted else ' (no)'}"] if i == 0 else ["", ""]
                token, feature = (part[i] if i < len(part) else None for part in (one.tokens, one.features))
                row = [*left, *(("", "", "") if token is None else (token.name.strip(), *_shares(token)))]
                table.append(row + ([] if feature is None else [feature.name, _shares(feature)[1]]))
        head = f"document {self.document}, {self.n_tokens:,} tokens"
        return "\n".join([head, *format_table(table, left=(0, 2, 5))])


def _shares(one: Evidence) -> tuple[str, str]:
    return f"{one.attention:.2f}", f"{one.share if one.contribution >= 0 else -one.share:+.2f}"


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelHead(Drawn):
    """Labels of documents from the codes of their tokens, by attention of each label; made by `label_head`."""

    labels: tuple[str, ...]
    d_sae: int
    reads: Reads
    features: Int[np.ndarray, "n_sides"] = field(repr=False)
    """feature of each row of the matrix"""
    signs: Int[np.ndarray, "n_sides"] = field(repr=False)
    """1 or -1: side of each row"""
    usual: Float[np.ndarray, "n_sides"] = field(repr=False)
    """mean magnitude of each side where it fires"""
    A: Float[Tensor, "n_sides n_labels"] = field(repr=False)
    """the sparse matrix, per unit of code"""
    W: Float[Tensor, "d_in n_labels"] = field(repr=False)
    """what is read from activations; no rows for a head that reads codes"""
    bias: Float[Tensor, "n_labels"] = field(repr=False)
    temperature: Float[Tensor, "n_labels"] = field(repr=False)
    """tau: 0 attends to all tokens alike, large ones to that with the most evidence"""
    thresholds: Float[Tensor, "n_labels"] = field(repr=False)
    """logit from which a label is predicted"""
    scores: tuple[HeadScore, ...] = field(repr=False)
    """of held-out documents: its own first, then baselines and nulls"""
    skipped: tuple[str, ...] = field(repr=False)
    """labels with too few documents"""
    n_train: int
    """training documents"""
    n_documents: int
    """held-out documents"""
    rate: float
    """labels of a held-out document, on average"""
    l1: float
    seed: int

    def __str__(self) -> str:
        head = (
            f"{len(self.labels)} labels from {self.reads}, {self.d_sae:,} features, l1 {self.l1:g}, seed {self.seed}; "
            f"{self.n_train:,} training documents, {self.n_documents:,} held-out ones with {self.rate:.2f} labels each"
        )
        table = [["", "micro F1", "macro F1", "AUROC", "features a label"]]
        table += [
            [s.name, f"{s.micro_f1:.3f}", f"{s.macro_f1:.3f}", f"{s.auroc:.3f}", f"{s.n_features:.1f}"]
            for s in self.scores
        ]
        return "\n".join([head, *format_table(table)])

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def weights(self) -> Float[np.ndarray, "n_sides n_labels"]:
        """The matrix for codes of each side's usual magnitude, by which features are ranked."""
        return np.asarray(self.A.numpy() * self.usual[:, None])

    @property
    def matrix(self) -> "csr_matrix":
        """The sparse matrix (2 d_sae, n_labels), row 2 j for positive and 2 j + 1 for negative codes of feature j."""
        from scipy.sparse import csr_matrix

        row, column = np.nonzero(self.A.numpy())
        values = self.A.numpy()[row, column]
        sides = 2 * self.features[row] + (self.signs[row] < 0)
        return csr_matrix((values, (sides, column)), shape=(2 * self.d_sae, len(self.labels)))

    def top_features(self, label: str, n: int = 10, names: FeatureNames | None = None) -> tuple[LabelFeature, ...]:
        """The sides of features with the largest weights of a label, of either sign; those with 0 are left out.

        Args:
            label: one of the labels.
            n: number of sides.
            names: names of features, as texts by feature or a label store.

        Raises:
            ValueError: for a label that there is not.
        """
        require_names(names)
        own = self.weights[:, self._find(label)]
        order = [i for i in np.argsort(-np.abs(own), kind="stable")[:n].tolist() if own[i] != 0]
        name = name_sides(names, sorted({int(self.features[i]) for i in order}))
        sides = [(int(self.features[i]), int(self.signs[i])) for i in order]
        return tuple(
            LabelFeature(feature=feature, sign=sign, name=name(feature, sign), weight=float(own[i]))
            for i, (feature, sign) in zip(order, sides, strict=True)
        )

    def predict(
        self,
        codes: Coded,
        doc_ids: Shaped[Any, "_"] | None = None,
        *,
        acts: Float[Tensor, "_ _"] | None = None,
    ) -> Float[np.ndarray, "n_documents n_labels"]:
        """The probability of each label of each document, in ascending order of documents; see `decide`.

        Args:
            codes: a store, or codes as `score_concepts` takes them, of the SAE that the head was fitted with.
            doc_ids: document of each token, where `codes` is not a store.
            acts: activations of the same tokens, for a head that reads them.

        Raises:
            ValueError: for codes of another width, and activations that are missing or of another width.
        """
        return self._logits(CodedDocuments(codes, doc_ids, acts)).sigmoid().numpy()

    def decide(self, probabilities: Float[np.ndarray, "n n_labels"]) -> Bool[np.ndarray, "n n_labels"]:
        """Which labels are predicted: those whose probability reaches their threshold."""
        return np.asarray(probabilities >= self.thresholds.sigmoid().numpy())

    def explain(
        self,
        codes: Coded,
        document: int,
        doc_ids: Shaped[Any, "_"] | None = None,
        *,
        labels: Sequence[str] | None = None,
        acts: Float[Tensor, "_ _"] | None = None,
        names: FeatureNames | None = None,
        n_top: int = 5,
    ) -> ExplainedDocument:
        """Which tokens and which features bring the labels of a document, and with what share.

        Contributions of all tokens and the bias sum to the logit, and so do those of all sides of features for a head
        that reads codes: `a_t f_tj A_jc`, summed over features or over tokens.

        Args:
            codes: as for `predict`.
            document: number of the document.
            doc_ids: document of each token, where `codes` is not a store.
            labels: which labels; None for those that are predicted, or the most probable where none is.
            acts: as for `predict`.
            names: names of features, as texts by feature or a label store.
            n_top: tokens and features shown for each label.

        Raises:
            ValueError: for a document or a label that there is not, and as for `predict`.
        """
        require_names(names)
        text = CodedDocuments(codes, doc_ids, acts)
        self._check(text)
        rows, own = text.tokens_of(np.array([text.find(document)]))
        found = text.codes_of(rows, self._place)
        attention, read = self._read(text, found, rows, torch.from_numpy(own), 1)
        parts = attention * read
        logits = parts.sum(0) + self.bias
        chosen = [self._find(one) for one in labels] if labels is not None else []
        if labels is None:
            chosen = torch.nonzero(logits >= self.thresholds)[:, 0].tolist() or [
                int((logits - self.thresholds).argmax())
            ]
        chosen.sort(key=lambda c: -float(logits[c] - self.thresholds[c]))
        words = [str(row) for row in rows.tolist()] if text.store is None else read_words(text.store, rows)
        told = []
        for c in chosen:
            tokens = _rank(parts[:, c].numpy(), attention[:, c].numpy(), words, rows, np.ones(len(rows), int), n_top)
            features = self._explain_features(found, attention[:, c], c, names, n_top)
            told.append(
                ExplainedLabel(
                    label=self.labels[c],
                    probability=float(logits[c].sigmoid()),
                    predicted=bool(logits[c] >= self.thresholds[c]),
                    logit=float(logits[c]),
                    bias=float(self.bias[c]),
                    tokens=tokens,
                    features=features,
                )
            )
        return ExplainedDocument(document=document, n_tokens=len(rows), labels=tuple(told))

    def _explain_features(
        self, found: TokenCodes, attention: Tensor, c: int, names: FeatureNames | None, n_top: int
    ) -> tuple[Evidence, ...]:
        seen = attention.repeat_interleave(found.offsets.diff())
        entries = (seen * found.values * self.A[found.sides, c]).numpy()
        n = len(self.features)
        sums, heard = (np.bincount(found.sides.numpy(), w, n) for w in (entries, seen.numpy()))
        there = np.flatnonzero(sums)
        name = name_sides(names, sorted(set(self.features[there].tolist())))
        titles = []
        for feature, sign in zip(self.features[there].tolist(), self.signs[there].tolist(), strict=True):
            titles.append(f"{feature}{'' if sign > 0 else ' -'} {name(feature, sign)}".strip())
        return _rank(sums[there], heard[there], titles, self.features[there], self.signs[there], n_top)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `label_head.json` and `label_head.safetensors` into a folder, both or neither."""
        entries = self.A.nonzero().T
        tensors = {
            "entries": entries,
            "values": self.A[entries[0], entries[1]],
            "features": torch.from_numpy(self.features),
            "signs": torch.from_numpy(self.signs),
            "usual": torch.from_numpy(self.usual),
        } | {name: getattr(self, name) for name in _VECTORS}
        facts = {name: getattr(self, name) for name in _FACTS} | {"scores": [asdict(one) for one in self.scores]}
        with replace_folder(folder, last=FACTS, stale=(FACTS, TENSORS)) as temp:
            save_tensors(temp / TENSORS, {name: one.contiguous() for name, one in tensors.items()})
            write_json(temp / FACTS, {"kind": KIND, **facts, "tensors": checksum(temp / TENSORS)}, sealed=True)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "LabelHead":
        """The head of a folder; FileNotFoundError where a file is missing, ValueError for damaged or edited files."""
        path, weights = Path(folder) / FACTS, Path(folder) / TENSORS
        found, check_seal = read_sealed(path)
        with naming(path):
            plain = dict(require_object(found, "A label head"))
            plain.pop(SEAL, None)
            if plain.pop("kind", None) != KIND:
                raise ValueError(f"A label head must be of kind '{KIND}', got another.")
            told = read_fields(_HeadFacts, plain)
            scores = tuple(read_fields(HeadScore, one) for one in told.scores)
            check_seal()
        held = load_tensors(weights)
        n, n_labels = len(held["features"]), len(told.labels)
        known = bool(((held["features"] >= 0) & (held["features"] < told.d_sae)).all())
        if not known or told.tensors != checksum(weights) or any(held[name].shape[-1] != n_labels for name in _VECTORS):
            raise ValueError(f"{weights} must hold the weights that {FACTS} tells of. Was it replaced?")
        matrix = torch.zeros(n, n_labels)
        matrix[held["entries"][0], held["entries"][1]] = held["values"]
        facts: dict[str, Any] = {name: getattr(told, name) for name in _FACTS} | {"scores": scores}
        facts |= {"labels": tuple(told.labels), "skipped": tuple(told.skipped)}
        arrays: dict[str, Any] = {name: held[name].numpy() for name in ("features", "signs", "usual")}
        vectors: dict[str, Any] = {name: held[name] for name in _VECTORS}
        return cls(A=matrix, **facts, **arrays, **vectors)

    @cached_property
    def _place(self) -> Int[np.ndarray, "n"]:
        """The row of the matrix that each side has; -1 where it has none."""
        place = np.full(2 * self.d_sae, -1)
        place[2 * self.features + (self.signs < 0)] = np.arange(len(self.features))
        return place

    def _find(self, label: str) -> int:
        if label not in self.labels:
            near = get_close_matches(label, self.labels, n=5) or list(self.labels)[:5]
            raise ValueError(f"`label` must be one of the head's, got {label!r}. Did you mean one of: {near}?")
        return self.labels.index(label)

    def _check(self, text: CodedDocuments) -> None:
        if text.d_sae != self.d_sae:
            raise ValueError(
                f"`codes` must be of the SAE that the head was fitted with, of {self.d_sae} features, got {text.d_sae}."
            )
        if self.reads == "activations" and text.width != len(self.W):
            raise ValueError(
                f"`acts` must be the activations that this head reads, of width {len(self.W)}, got "
                f"{'none' if text.width is None else text.width}."
            )

    @torch.no_grad()
    def _read(self, text: CodedDocuments, found: TokenCodes, rows: np.ndarray, own: Tensor, n: int) -> _Attended:
        """Attention to tokens, and what each says."""
        said = gather_sum(found.sides, found.values, found.offsets, self.A)
        attention = attend(said * self.temperature, own, n)
        return attention, text.acts_of(rows) @ self.W if self.reads == "activations" else said

    def _logits(self, text: CodedDocuments) -> Float[Tensor, "n_documents n_labels"]:
        self._check(text)
        parts = [torch.zeros(0, len(self.labels))]
        for documents in text.batches():
            rows, own = text.tokens_of(documents)
            attention, said = self._read(
                text, text.codes_of(rows, self._place), rows, torch.from_numpy(own), len(documents)
            )
            sums = torch.zeros(len(documents), len(self.labels))
            parts.append(sums.index_add(0, torch.from_numpy(own), attention * said) + self.bias)
        return torch.cat(parts)


@dataclass(frozen=True)
class _HeadFacts:
    """What the JSON file holds."""

    labels: list[str]
    skipped: list[str]
    d_sae: int
    reads: Reads
    n_train: int
    n_documents: int
    rate: float
    l1: float
    seed: int
    scores: list[dict[str, Any]]
    tensors: str


def _rank(
    parts: np.ndarray, attention: np.ndarray, names: Sequence[str], index: np.ndarray, signs: np.ndarray, n: int
) -> tuple[Evidence, ...]:
    """The largest parts by magnitude; what adds nothing is left out."""
    whole = float(np.abs(parts).sum()) or 1.0
    return tuple(
        Evidence(
            name=names[i],
            index=int(index[i]),
            sign=int(signs[i]),
            attention=float(attention[i]),
            contribution=float(parts[i]),
            share=float(abs(parts[i]) / whole),
        )
        for i in np.argsort(-np.abs(parts), kind="stable")[:n].tolist()
        if parts[i] != 0
    )


def read_words(store: FeatureStore, rows: Int[np.ndarray, "n"]) -> list[str]:
    """The text of some rows, tokens or documents."""
    if store.of_documents:
        return ["".join(store.text.words(*store.words.span(row, row + 1))) for row in rows.tolist()]
    return ["".join(store.text.words(place, place + 1)) for place in store.where.at(rows).tolist()]
