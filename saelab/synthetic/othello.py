"""Othello games with the truth of the board at every move, for language models of legal moves (arXiv:2210.13382).

Games are random: each move is drawn uniformly from the legal ones. Positions are held as two 64-bit integers a game,
one bit a square, so that many games are played at a time. After each move the board is described as the player sees it
who moves next: linear probes find "mine" and "yours", not black and white (arXiv:2309.00941).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Int32, UInt64
from torch import Tensor

from saelab.lm.token_labels import Concept, TokenLabels
from saelab.lm.tokenizers import SpecialWords, word_tokenizer
from saelab.lm.tokens import PADDING, Tokens

SQUARES = tuple(f"{column}{row}" for row in range(1, 9) for column in "abcdefgh")
"""names of the squares, row by row: a1 to h8"""
CENTER = ("d4", "e4", "d5", "e5")
"""squares that are filled before the first move"""
PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
VOCABULARY = (PAD, BOS, EOS, UNK, *(square for square in SQUARES if square not in CENTER))
"""tokens: special ones, of which a game has the start alone, and the 60 squares that can be played"""
CTX_LEN = 61
"""the longest game and its start"""
MINE, YOURS, EMPTY, LEGAL, FLIPPED = "mine", "yours", "empty", "legal", "flipped"
CONCEPTS = (
    *(Concept(f"{MINE} {square}", MINE, opposite=f"{YOURS} {square}") for square in SQUARES),
    *(Concept(f"{YOURS} {square}", YOURS, opposite=f"{MINE} {square}") for square in SQUARES),
    *(Concept(f"{EMPTY} {square}", EMPTY) for square in SQUARES),
    *(Concept(f"{LEGAL} {square}", LEGAL, parent=f"{EMPTY} {square}") for square in SQUARES),
    *(Concept(f"{FLIPPED} {square}", FLIPPED) for square in SQUARES),
)
"""after each move, of each square: the disc of who moves next, of the other, none; a legal move; turned by this move"""
Bits = UInt64[np.ndarray, "n_games"]

_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_NOT_A, _NOT_H = np.uint64(0xFEFEFEFEFEFEFEFE), np.uint64(0x7F7F7F7F7F7F7F7F)  # without the first and last column


def _shift(bits: Bits, by: int, kept: np.uint64) -> Bits:
    moved = bits << np.uint64(by) if by > 0 else bits >> np.uint64(-by)
    return moved & kept


_STEPS: tuple[Callable[[Bits], Bits], ...] = tuple(
    partial(_shift, by=by, kept=kept)
    for by, kept in (
        (1, _NOT_A), (-1, _NOT_H), (8, _ALL), (-8, _ALL), (9, _NOT_A), (-9, _NOT_H), (7, _NOT_H), (-7, _NOT_A),
    )
)  # fmt: skip


def legal_moves(own: Bits, other: Bits) -> Bits:
    """Squares where the player of the discs `own` can move, as bits: square i is bit i.

    Args:
        own: (n_games,) discs of the player, one bit a square.
        other: (n_games,) discs of the other.

    >>> own, other = START
    >>> [SQUARES[i] for i in np.flatnonzero(unpack(legal_moves(own, other))[0])]
    ['d3', 'c4', 'f5', 'e6']
    """
    empty, found = ~(own | other), np.zeros_like(own)
    for step in _STEPS:
        line = step(own) & other
        for _ in range(5):
            line |= step(line) & other
        found |= step(line) & empty
    return found


def flipped_discs(own: Bits, other: Bits, move: Bits) -> Bits:
    """Discs of the other player that a move turns, as bits.

    Args:
        own: (n_games,) discs of the player who moves.
        other: (n_games,) discs of the other.
        move: (n_games,) the square that is played, one bit of each.
    """
    found = np.zeros_like(own)
    for step in _STEPS:
        line = step(move) & other
        for _ in range(5):
            line |= step(line) & other
        found |= np.where(step(line) & own != 0, line, np.uint64(0))
    return found


def unpack(bits: Bits) -> Bool[np.ndarray, "n_games 64"]:
    """One column for each square, in the order of `SQUARES`."""
    octets = np.ascontiguousarray(bits.astype("<u8")).view(np.uint8).reshape(len(bits), 8)
    return np.unpackbits(octets, axis=1, bitorder="little").astype(bool)


def _bits_of(*names: str) -> Bits:
    return np.array([sum(1 << SQUARES.index(name) for name in names)], np.uint64)


START = _bits_of("e4", "d5"), _bits_of("d4", "e5")
"""discs of black, who moves first, and of white"""


@dataclass(frozen=True, eq=False, repr=False)
class Games:
    """Games as one sequence of token ids, with the state of the board after each move; `len()` is their number.

    A game is BOS and its moves; a player who cannot move is passed over without a token. Game i has the tokens
    `offsets[i]` to `offsets[i + 1]`. BOS has the labels of the start, where black moves next.
    """

    token_ids: Int32[np.ndarray, "n_tokens"]
    offsets: Int[np.ndarray, "n_games_1"]
    """start of each game, and the end of the last"""
    labels: TokenLabels
    """`CONCEPTS` of each token, and the game it is in"""
    source: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        return f"Games(n_games={len(self)}, n_tokens={len(self.token_ids)}, source={self.source!r})"

    def text(self, i: int) -> str:
        """Moves of game i, such as `f5 d6 c3`."""
        return " ".join(VOCABULARY[j] for j in self.token_ids[self.offsets[i] + 1 : self.offsets[i + 1]])

    def tokens(self) -> Tokens:
        """The games as `Tokens`, one a row, padded to 61, for `collect`, `stream` and `evaluate`."""
        ids = np.full((len(self), CTX_LEN), VOCABULARY.index(PAD), np.int32)
        doc_ids = np.full((len(self), CTX_LEN), PADDING, np.int32)
        lengths = np.diff(self.offsets)
        games = np.repeat(np.arange(len(self), dtype=np.int32), lengths)
        columns = np.arange(len(games)) - np.repeat(self.offsets[:-1], lengths)
        ids[games, columns], doc_ids[games, columns] = self.token_ids, games
        return Tokens(
            ids=torch.from_numpy(ids),
            doc_ids=torch.from_numpy(doc_ids),
            special_ids=tuple(range(VOCABULARY.index(UNK) + 1)),
            source=self.source,
            bos=True,
            packed=False,
        )

    def labels_at(self, games: Int[np.ndarray | Tensor, "n"], positions: Int[np.ndarray | Tensor, "n"]) -> TokenLabels:
        """Labels of n chosen tokens, by index of the game and position in it (BOS is at 0).

        ValueError for a position or a game that there is not.
        """
        games, places = np.asarray(games), np.asarray(positions)
        if len(games) and not (games.min() >= 0 and games.max() < len(self)):
            raise ValueError(f"`games` must be 0 to {len(self) - 1}, got {games.min()} to {games.max()}.")
        if (wrong := (places < 0) | (places >= np.diff(self.offsets)[games])).any():
            i = int(wrong.argmax())
            raise ValueError(f"`positions` must lie inside their games, got {places[i]} in game {games[i]}.")
        return self.labels.select(self.offsets[games] + places)


def generate_games(n_games: int, seed: int = 0, first: int = 0) -> Games:
    """Random legal games with labels: numbers `first` to `first + n_games` of a seed.

    Each game depends on the seed and its own number alone, so disjoint ranges are disjoint samples. ValueError for a
    negative number.

    >>> games = generate_games(2, seed=0)
    >>> len(games), games.text(0).split()[0] in ("d3", "c4", "f5", "e6")
    (2, True)
    """
    from scipy.sparse import csr_matrix

    moves, boards = play(n_games, seed, first)
    assert boards is not None
    lengths = 1 + (moves >= 0).sum(1)
    there = np.arange(CTX_LEN) < lengths[:, None]
    place = {square: i for i, square in enumerate(VOCABULARY)}
    ids = np.array([place[BOS], *(place.get(square, -1) for square in SQUARES)], np.int32)
    tokens = ids[np.concatenate([np.zeros((n_games, 1), np.int64), moves + 1], 1)[there]]
    offsets = np.concatenate([[0], lengths.cumsum()])
    game_ids = np.repeat(np.arange(n_games, dtype=np.int32), lengths)
    labels = TokenLabels(CONCEPTS, csr_matrix(boards[there]), (len(tokens),), game_ids)
    return Games(tokens, offsets, labels, f"othello seed {seed}, games {first} to {first + n_games}")


def play(
    n_games: int, seed: int = 0, first: int = 0, labeled: bool = True
) -> tuple[Int[np.ndarray, "n_games 60"], Bool[np.ndarray, "n_games 61 n_concepts"] | None]:
    """Moves of random games as numbers of squares, -1 after their end, and what is true at the start and after each.

    Args:
        n_games: number of games.
        seed: of the games.
        first: number of the first game.
        labeled: whether the boards are returned, 20 kB a game; else None.
    """
    if n_games < 0 or first < 0:
        raise ValueError(f"`n_games` and `first` must not be negative, got {n_games} and {first}.")
    draws = np.empty((n_games, CTX_LEN - 1))
    for i in range(n_games):
        draws[i] = np.random.default_rng([seed, first + i]).random(CTX_LEN - 1)
    own, other = (np.repeat(side, n_games) for side in START)
    moves = np.full((n_games, CTX_LEN - 1), -1)
    legal, turned = legal_moves(own, other), np.zeros_like(own)
    boards = [_describe(own, other, legal, turned)] if labeled else []
    for step in range(CTX_LEN - 1):
        can = unpack(legal)
        counts = can.sum(1)
        going = counts > 0
        chosen = (can.cumsum(1) > (draws[:, step] * counts).astype(np.int64)[:, None]).argmax(1)
        moves[going, step] = chosen[going]
        move = np.where(going, np.uint64(1) << chosen.astype(np.uint64), np.uint64(0))
        turned = flipped_discs(own, other, move)
        own, other = other & ~turned, own | turned | move
        legal = legal_moves(own, other)
        passed = legal == 0  # the same player moves again, if one can
        own, other = np.where(passed, other, own), np.where(passed, own, other)
        legal = np.where(passed, legal_moves(own, other), legal)
        if labeled:
            boards.append(_describe(own, other, legal, turned))
    return moves, np.stack(boards, 1) if labeled else None


def _describe(own: Bits, other: Bits, legal: Bits, turned: Bits) -> Bool[np.ndarray, "n_games n_concepts"]:
    return np.concatenate([unpack(bits) for bits in (own, other, ~(own | other), legal, turned)], 1)


def save_tokenizer(folder: Path) -> None:
    """Write the files of the tokenizer, whose words are `VOCABULARY`, into a folder such as a model's."""
    make_tokenizer().save_pretrained(folder)


def make_tokenizer() -> Any:
    """A word-level Hugging Face tokenizer of `VOCABULARY`: a game is its moves with spaces between."""
    special = SpecialWords(bos=BOS, eos=EOS, pad=PAD, unk=UNK)
    return word_tokenizer(VOCABULARY, special, no_space_before="", no_space_after="")
