"""Othello by bits against a plain board of rows and columns, known counts of games, and the labels of every token."""

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.functional.statistics import fit_probe
from saelab.synthetic import othello
from saelab.synthetic.othello import CONCEPTS, CTX_LEN, SQUARES, START, VOCABULARY, generate_games, legal_moves, play

DIRECTIONS = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]


def turned_by(board, who, square):
    """Squares that a move turns on a board of 64 numbers: 1, -1, or 0 for none."""
    row, column = divmod(square, 8)
    found = []
    for down, right in DIRECTIONS:
        line, i, j = [], row + down, column + right
        while 0 <= i < 8 and 0 <= j < 8 and board[8 * i + j] == -who:
            line.append(8 * i + j)
            i, j = i + down, j + right
        if line and 0 <= i < 8 and 0 <= j < 8 and board[8 * i + j] == who:
            found += line
    return found


def moves_on(board, who):
    return [square for square in range(64) if board[square] == 0 and turned_by(board, who, square)]


def start():
    board = [0] * 64
    for square, who in (("e4", 1), ("d5", 1), ("d4", -1), ("e5", -1)):
        board[SQUARES.index(square)] = who
    return board


def test_games_are_legal_and_every_label_is_true():
    games = generate_games(30, seed=3)
    matrix = games.labels.matrix.toarray().reshape(-1, 5, 64)
    passes = 0
    for game in range(30):
        first, last = games.offsets[game : game + 2]
        board, who, flipped = start(), 1, []
        for token in range(first, last):
            if token > first:
                square = SQUARES.index(VOCABULARY[games.token_ids[token]])
                flipped = turned_by(board, who, square)
                assert board[square] == 0 and flipped
                for each in (square, *flipped):
                    board[each] = who
                who = -who
                if not moves_on(board, who):
                    passes += token + 1 < last
                    who = -who
            else:
                assert VOCABULARY[games.token_ids[token]] == "<bos>"
            expected = np.zeros((5, 64), bool)
            expected[0], expected[1], expected[2] = (np.array(board) == value for value in (who, -who, 0))
            expected[3, moves_on(board, who)] = expected[4, flipped] = True
            if expected[3].any() or token + 1 < last:  # whose turn it is at the end of a game says nothing
                assert (matrix[token] == expected).all(), (game, token)
        assert not moves_on(board, 1) and not moves_on(board, -1)
    assert passes > 0  # a player who cannot move is passed over


def test_the_number_of_positions_after_each_move_is_the_known_one():
    own, other = START
    for expected in (4, 12, 56, 244, 1396, 8200):
        legal = othello.unpack(legal_moves(own, other))
        game, square = legal.nonzero()
        move = np.uint64(1) << square.astype(np.uint64)
        turned = othello.flipped_discs(own[game], other[game], move)
        own, other = other[game] & ~turned, own[game] | turned | move
        assert len(own) == expected


def test_moves_are_uniform_and_games_depend_on_their_number_alone():
    moves, boards = play(4_000, seed=1, labeled=False)
    assert boards is None
    counts = np.unique(moves[:, 0], return_counts=True)[1]
    assert len(counts) == 4 and np.abs(counts - 1_000).max() < 5 * (4_000 * 0.25 * 0.75) ** 0.5
    assert np.array_equal(play(10, seed=1, first=90, labeled=False)[0], moves[90:100])
    assert not np.array_equal(play(10, seed=2, labeled=False)[0], moves[:10])
    assert generate_games(0).labels.shape == (0,)
    with pytest.raises(ValueError, match="must not be negative"):
        generate_games(2, first=-1)


def test_tokens_labels_and_tokenizer_belong_together():
    games = generate_games(5)
    tokens = games.tokens()
    assert tokens.ids.shape == (5, CTX_LEN) and tokens.special_ids == (0, 1, 2, 3)
    ids = othello.make_tokenizer()(games.text(2)).input_ids
    assert tokens.ids[2, : len(ids)].tolist() == ids and int(tokens.ids[2, len(ids) :].sum()) == 0
    kept = tokens.doc_ids >= 0
    rows, columns = kept.nonzero(as_tuple=True)
    labels = games.labels_at(tokens.doc_ids[kept], columns)
    assert len(CONCEPTS) == 320 and (labels.matrix != games.labels.matrix).nnz == 0
    assert torch.equal(rows, torch.from_numpy(games.labels.doc_ids).long())
    with pytest.raises(ValueError, match="inside their games"):
        games.labels_at(np.array([0]), np.array([CTX_LEN]))
    with pytest.raises(ValueError, match="`games` must be 0 to 4"):
        games.labels_at(np.array([5]), np.array([0]))


def test_the_world_goes_through_collecting_and_scoring(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    cfg = GPT2Config(vocab_size=len(VOCABULARY), n_positions=CTX_LEN, n_embd=16, n_layer=1, n_head=2, eos_token_id=2)
    torch.manual_seed(0)
    GPT2LMHeadModel(cfg).save_pretrained(tmp_path)
    othello.save_tokenizer(tmp_path)
    model = sl.load_model(str(tmp_path))
    games = generate_games(40)
    acts = sl.collect(
        model, games.tokens(), "blocks.0.hook_resid_post", mask=sl.TokenMask(special=True), progress=False
    )
    labels = games.labels_at(acts.doc_ids, acts.positions)
    assert len(acts) == len(games.token_ids) - 40
    scores = sl.evaluation.score_concepts(acts[:], labels, min_count=20)
    of_squares = [row for row in scores.concepts if row.kind == "mine"]
    assert len(of_squares) == 64 and sum(not row.reason for row in of_squares) > 50
    assert all(row.f1 > 0.2 for row in of_squares if row.n_tokens > 800)


def test_the_bundled_model_plays_legal_moves():
    """Its likeliest next move on games that it has never seen, of which one move in seven would be legal by chance."""
    model, games = sl.load_model("othello", progress=False), generate_games(20, first=20_000_000)
    tokens = games.tokens()
    likeliest = sl.lm.logits(model, tokens.ids).argmax(-1)
    legal = np.zeros((len(games.token_ids), len(VOCABULARY)), bool)
    for square, column in ((c.name.split()[1], i) for i, c in enumerate(CONCEPTS) if c.kind == "legal"):
        if square in VOCABULARY:
            legal[:, VOCABULARY.index(square)] = games.labels.matrix[:, column].toarray()[:, 0]
    going = legal.any(1)
    said = likeliest[tokens.attention_mask].numpy()
    share, n = legal[np.arange(len(said)), said][going].mean(), going.sum()
    assert share > 0.97 - 4 * (0.97 * 0.03 / n) ** 0.5


def test_the_bundled_model_holds_the_board_at_its_middle():
    """Linear probes of all squares at once, of games that it has never seen: few to learn from, so less than .95."""
    model, games = sl.load_model("othello", progress=False), generate_games(150, first=21_000_000)
    place = f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
    acts = sl.collect(model, games.tokens(), place, mask=sl.TokenMask(special=True), progress=False)
    labels = games.labels_at(acts.doc_ids, acts.positions)
    states, seen = torch.from_numpy(labels.matrix[:, :192].toarray()).float(), torch.as_tensor(labels.doc_ids) < 100
    found = fit_probe(acts[:][seen], states[seen], standardize=True)(acts[:][~seen]).view(-1, 3, 64).argmax(1)
    right = (found == states[~seen].view(-1, 3, 64).argmax(1)).double().mean()
    assert right > 0.88 and states[seen].mean(0).view(3, 64).amax(0).mean() < 0.6
