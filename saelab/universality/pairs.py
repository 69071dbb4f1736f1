"""Filters for matched pairs: tokens that are words, one-to-one pairs, keywords; and decoder rows of matched pairs."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.labelling.book import LabelBook
from saelab.sae.sae import SAE
from saelab.stores.results import Result
from saelab.universality.matches import Comparison, Method

Tops = Sequence[Sequence[str]]
"""The strings of the top tokens of every pair, on one side."""
SPECIAL = re.compile(
    r"<\|[^\s|]+\|>|\|[be]os\||</?(?:s|[bes]os|pad|unk|mask|cls|sep|start_of_turn|end_of_turn)>|\[(?:CLS|SEP|PAD|UNK|MASK)\]",
    re.IGNORECASE,
)
"""Special tokens as tokenizers write them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptPairs(Result):
    """Pairs that pass a filter, and how many each rule removed.

    A pair is counted for the first rule that removes it, so `n_kept` and the counts add up to all pairs.
    """

    keep: Bool[np.ndarray, "n_pairs"]
    removed: dict[str, int]

    @property
    def n_kept(self) -> int:
        """Number of pairs kept."""
        return int(self.keep.sum())

    def __str__(self) -> str:
        total = max(len(self.keep), 1)
        rows = [*self.removed.items(), ("kept", self.n_kept)]
        return "\n".join(f"{name:<16} {n:>9,} {n / total:>8.2%}" for name, n in rows)

    def to_dict(self) -> dict[str, Any]:
        """The counts, ready for JSON: `removed` by rule and `n_kept`."""
        return {"removed": dict(self.removed), "n_kept": self.n_kept}


def keep_concepts(tops_a: Tops, tops_b: Tops, *, special: Iterable[str] = ()) -> KeptPairs:
    """The pairs that share a top token and whose top tokens are all words (arXiv:2410.06981).

    Rules, in this order: "nothing shared"; "special", as tokenizers write them or one of `special`; "blank", including
    new lines and invisible characters; "punctuation", including mathematical and currency signs, but not emoji. Case
    and surrounding spaces are ignored when tokens are compared, so that different tokenizers compare. A side without
    top tokens shares nothing. ValueError where the sides differ in number.

    >>> keep_concepts([[" Rain", "snow"], ["day", "."], ["a"]], [["rain"], [" day"], ["b"]]).removed
    {'nothing shared': 1, 'special': 0, 'blank': 0, 'punctuation': 1}
    """
    _check_number(tops_a, tops_b)
    named = frozenset(special)
    tests: dict[str, Callable[[Sequence[str], Sequence[str]], bool]] = {
        "nothing shared": lambda a, b: not set(map(_fold, a)) & set(map(_fold, b)),
        "special": lambda a, b: any(token in named or _is_special(token) for token in (*a, *b)),
        "blank": lambda a, b: any(map(_is_blank, (*a, *b))),
        "punctuation": lambda a, b: any(map(_is_punctuation, (*a, *b))),
    }
    removed = dict.fromkeys(tests, 0)
    keep = np.ones(len(tops_a), bool)
    for i, (a, b) in enumerate(zip(tops_a, tops_b, strict=True)):
        rule = next((name for name, fails in tests.items() if fails(a, b)), None)
        if rule is not None:
            keep[i] = False
            removed[rule] += 1
    return KeptPairs(keep=keep, removed=removed)


def keep_one_to_one(
    features_a: Int[np.ndarray, "n_a"], features_b: Int[np.ndarray, "n_b"], strength: Float[np.ndarray, "n_strength"]
) -> KeptPairs:
    """One-to-one pairs: of the pairs that share a feature only the strongest, by size of `strength`; the first of
    equals.

    Pairs are accepted from the strongest down, each unless one of its features is already used; NaN comes last. Removed
    pairs are counted by whether the feature of `a` was used, or that of `b` alone. ValueError for unequal lengths.

    >>> keep_one_to_one(np.array([3, 3, 5]), np.array([0, 1, 1]), np.array([0.5, -0.9, 0.7])).keep.tolist()
    [False, True, False]
    """
    _check_number(features_a, features_b, strength)
    keep, removed = np.zeros(len(strength), bool), {"repeated in a": 0, "repeated in b": 0}
    taken_a: set[int] = set()
    taken_b: set[int] = set()
    for i in np.argsort(-np.abs(strength), kind="stable").tolist():
        a, b = int(features_a[i]), int(features_b[i])
        if a in taken_a or b in taken_b:
            removed["repeated in a" if a in taken_a else "repeated in b"] += 1
            continue
        keep[i] = True
        taken_a.add(a)
        taken_b.add(b)
    return KeptPairs(keep=keep, removed=removed)


def match_keywords(tops: Tops, keywords: Iterable[str]) -> Bool[np.ndarray, "n_pairs"]:
    """Whether one of each pair's top tokens is one of the keywords; case and surrounding spaces are ignored.

    Whole tokens are compared: "may" does not match "maybe". ValueError where no keyword has a letter.

    >>> match_keywords([[" May", "x"], ["maybe"], []], ["may", "June"]).tolist()
    [True, False, False]
    """
    wanted = {_fold(keyword) for keyword in keywords} - {""}
    if not wanted:
        raise ValueError("`keywords` must hold a word, got none; give a list such as ['may', 'june'].")
    return np.array([not wanted.isdisjoint(map(_fold, tokens)) for tokens in tops], dtype=bool)


def find_features(book: LabelBook, text: str) -> Int[np.ndarray, "n_features"]:
    """The features whose chosen label contains the words of `text`, best match first, for `np.isin(features, ...)`.

    Labels of kind "none" (no good name) are ignored.
    """
    found = dict.fromkeys(label.feature for label in book.search(text) if label.kind != "none")
    return np.array(list(found), dtype=np.int64)


def _check_number(*columns: Sequence[Any] | np.ndarray) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(f"All arguments must have one entry a pair, got {lengths} entries.")


def _fold(token: str) -> str:
    return token.strip().casefold()


def _is_special(token: str) -> bool:
    return SPECIAL.fullmatch(token.strip()) is not None


def _is_blank(token: str) -> bool:
    """Whether a token is empty or consists of separators, control and formatting characters."""
    return all(unicodedata.category(char)[0] in "ZC" for char in token)


def _is_punctuation(token: str) -> bool:
    visible = [kind for char in token if (kind := unicodedata.category(char))[0] not in "ZC"]
    return bool(visible) and all(kind[0] == "P" or kind in ("Sm", "Sc", "Sk") for kind in visible)


def pair_rows(
    found: Comparison, a: SAE, b: SAE, method: Method = "hungarian", *, universal: bool = True
) -> tuple[Float[np.ndarray, "n d_a"], Float[np.ndarray, "n d_b"]]:
    """The decoder rows of matched pairs, as `compare_spaces` takes them; rows of flipped pairs are negated in b.

    Args:
        found: comparison of the features of a and b.
        a: the first SAE that was compared.
        b: the second SAE.
        method: "hungarian" (one-to-one), "mutual" or "best". "best" is many-to-one, which repeats rows and so inflates
            every measure; report it together with "hungarian".
        universal: True keeps only pairs whose features are both universal.

    Raises:
        ValueError: the SAEs do not have the features that were compared.
    """
    if (a.cfg.d_sae, b.cfg.d_sae) != (len(found.a.fires), len(found.b.fires)):
        raise ValueError(
            f"SAEs must have the features that were compared, {len(found.a.fires)} and {len(found.b.fires)} (without "
            f"`sides`), got {a.cfg.d_sae} and {b.cfg.d_sae}."
        )
    pairs, values = found.match(method)
    if universal:
        kept = found.a.universal[pairs[:, 0]] & found.b.universal[pairs[:, 1]]
        pairs, values = pairs[kept], values[kept]
    x, y = (sae.W_dec.detach().double().cpu().numpy()[side] for sae, side in zip((a, b), pairs.T, strict=True))
    return x, y * np.where(values < 0, -1.0, 1.0)[:, None]
