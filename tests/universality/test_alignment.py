"""Rows of two stores brought together by characters: against a slow reference, by hand, and on real tokenizers."""

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csc_matrix

import saelab as sl
from saelab.lm.tokenizers import token_strings
from saelab.stores.corpus import StoredText
from saelab.stores.feature_statistics import measure
from saelab.synthetic.tales import generate_stories
from saelab.synthetic.vocabulary import make_tokenizer
from saelab.universality.alignment import align_rows

PART = "\ufffd"


class Planted(sl.FeatureStore):
    """A store in memory with codes of one's own."""

    def __init__(self, text, places=None, codes=None):
        places = np.arange(len(text)) if places is None else np.asarray(places)
        self.codes = csc_matrix(np.zeros((len(places), 1), np.float32) if codes is None else codes)
        self.folder, self._starts = Path("planted"), [0, len(places)]
        statistics = measure(self.codes.shape[1], [(self.codes.indptr, self.codes.data)])
        self.__dict__.update(text=text, places=places, statistics=statistics)


def text_of(documents, doc_ids=None, seed=0, ctx_len=None):
    """Documents as lists of strings; ids are drawn by the seed, so that two texts do not share them."""
    strings = sorted({string for document in documents for string in document})
    ids = dict(zip(strings, np.random.default_rng(seed).permutation(5 * len(strings)).tolist(), strict=False))
    doc_ids = range(len(documents)) if doc_ids is None else doc_ids
    lengths = [len(document) for document in documents]
    positions = np.arange(sum(lengths)) % ctx_len if ctx_len else np.concatenate([np.arange(n) for n in lengths])
    return StoredText(
        token_ids=np.array([ids[string] for document in documents for string in document], np.int32),
        doc_ids=np.repeat(np.array(list(doc_ids), np.int32), lengths),
        positions=positions.astype(np.int32),
        strings={i: string for string, i in ids.items()},
    )


def store_of(*documents, keep=None, **options):
    text = text_of(documents, **options)
    places = None if keep is None else [i for i, string in enumerate(text.words(0, len(text))) if keep(string)]
    return Planted(text, places)


def dense(alignment):
    """The weights by row of a; rows without a partner are 0."""
    found = np.zeros(alignment.n_rows, np.float32)
    found[alignment.rows] = alignment.weights.toarray()
    return found


# Known answers


def test_words_and_letters():
    words, letters = store_of(["<s>", "The", " cat", " sat"]), store_of(list("The cat sat"), seed=1)
    found = align_rows(words, letters)
    expected = np.zeros((4, 11))
    expected[1, 0:3] = expected[2, 4:7] = expected[3, 8:11] = 1 / 3
    np.testing.assert_allclose(dense(found), expected, rtol=1e-6)
    assert found.rows.tolist() == [1, 2, 3] and found.rows_b.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert not found.exact and found.one_to_one == 0 and found.n_documents == 1 and found.n_cut == 0
    assert found.unaligned == {"a": {"special tokens": 1}, "b": {"of white space": 2}}
    back = align_rows(letters, words)
    assert np.array_equal(dense(back), expected.T > 0)


def test_tokens_that_overlap_in_part():
    a, b = store_of([" bark", "ing", " at", " x"]), store_of(["bar", " king a", "t x"], seed=1)
    expected = [[3 / 4, 1 / 4, 0], [0, 1, 0], [0, 1 / 2, 1 / 2], [0, 0, 1]]
    np.testing.assert_allclose(dense(align_rows(a, b)), expected, rtol=1e-6)
    expected = [[1, 0, 0, 0], [1 / 5, 3 / 5, 1 / 5, 0], [0, 0, 1 / 2, 1 / 2]]
    np.testing.assert_allclose(dense(align_rows(b, a)), expected, rtol=1e-6)


def test_the_weights_give_mean_codes():
    a, b = store_of(["dogs", " ran"]), store_of(["do", "gs r", "an"], seed=1)
    z_b = np.array([[1.0, 0.0], [5.0, -2.0], [0.0, 1.0]], np.float32)
    found = align_rows(a, b)
    np.testing.assert_allclose(found.weights @ z_b, [[3.0, -1.0], [5 / 3, 0.0]], atol=1e-6)


def test_shares_are_of_characters_not_of_bytes():
    a = store_of(["\u00e9x", "\u732b\U0001f431"])
    b = store_of(["\u00e9", "x", "\u732b", "\U0001f431"], seed=1)
    np.testing.assert_allclose(dense(align_rows(a, b)), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], rtol=1e-6)
    split = store_of([PART, PART, "x", PART, PART + PART, *[PART] * 4], seed=2)
    expected = [[0.25, 0.25, 0.5, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1 / 6, 1 / 3, *[1 / 8] * 4]]
    np.testing.assert_allclose(dense(align_rows(a, split)), expected, rtol=1e-6)
    assert np.array_equal(dense(align_rows(split, a)), np.array(expected).T > 0)


def test_masks_leave_shares_of_what_is_covered():
    documents = ["ab", "cd", " ef"], list("abcdef")
    a, b = (
        store_of(documents[0], keep=lambda s: s != "cd"),
        store_of(documents[1], seed=1, keep=lambda s: s not in "af"),
    )
    found = align_rows(a, b)
    assert found.rows.tolist() == [0, 1] and found.rows_b.tolist() == [0, 3]
    assert found.weights.toarray().tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert found.unaligned == {"b": {"masked on the other side": 2}}


def test_one_to_one_counts_whole_tokens_only():
    a, b = store_of(["a", " b", "cd", " e"]), store_of(["a ", "b", "c", "d", "e\n"], seed=1)
    assert align_rows(a, b).one_to_one == 3 / 4
    masked = store_of(["a ", "b", "c", "d", "e\n"], seed=1, keep=lambda s: s != "d")
    assert align_rows(a, masked).one_to_one == 3 / 4  # "cd" has one partner left, but it is not its equal


# Documents


def test_documents_are_found_in_any_order_and_under_any_id():
    a = store_of(["one", " cat"], ["two", " dogs"], ["three", " owls"], doc_ids=[0, 1, 2])
    b = store_of(["three ow", "ls"], ["four bats"], ["one c", "at"], seed=1, doc_ids=[7, 0, 1])
    found = align_rows(a, b)
    expected = np.zeros((6, 5))
    expected[0, 3] = expected[4, 0] = 1
    expected[1, 3:] = 1 / 3, 2 / 3
    expected[5, :2] = 1 / 2
    np.testing.assert_allclose(dense(found), expected, rtol=1e-6)
    assert found.left_out == {"a": {"not on the other side": 1}, "b": {"not on the other side": 1}}
    assert found.unaligned == {"a": {"in documents left out": 2}, "b": {"in documents left out": 1}}


def test_copies_are_paired_in_their_order():
    a = store_of(["so it was"], ["x"], ["so it was"], ["so it was"], doc_ids=[5, 2, 9, 1])
    b = store_of(["so it", " was"], ["so it w", "as"], ["x"], seed=1, doc_ids=[9, 5, 1])
    expected = [[4 / 7, 3 / 7, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 5 / 7, 2 / 7, 0], [0] * 5]
    np.testing.assert_allclose(dense(align_rows(a, b)), expected, rtol=1e-6)


def test_a_document_that_was_cut_aligns_at_its_beginning():
    a = store_of(["Once", " upon", " a", " time"], ["The", " end"])
    b = store_of(["The e"], ["On", "ce upon a", " t"], seed=1)
    found = align_rows(a, b)
    expected = [[0, 1 / 2, 1 / 2, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_allclose(dense(found), expected, rtol=1e-6)
    assert found.n_documents == found.n_cut == 2 and not found.left_out
    assert found.one_to_one == 0  # "time" and "t" have each other alone, but not all of each other
    shorter = align_rows(store_of(["Once", " upon"]), b)
    assert (
        shorter.n_cut == 1 and shorter.weights.shape == (2, 4) and shorter.left_out["b"] == {"not on the other side": 1}
    )
    assert shorter.unaligned["b"] == {"in documents left out": 1, "behind the end of the other's text": 1}


def test_of_documents_that_begin_alike_that_of_the_same_id_is_taken():
    a = store_of(["Once", " upon"], ["Once", " up"], doc_ids=[3, 4])
    b = store_of(["Once upon", " a time"], ["Once upon", " a cat"], seed=1, doc_ids=[4, 3])
    assert dense(align_rows(a, b)).argmax(1).tolist() == [2, 2, 0, 0]


def test_a_text_that_differs_is_left_out_and_counted():
    beginning = "It was a dark and stormy night "
    a, b = store_of([beginning, "in May"], ["fine"]), store_of([beginning, "in June"], ["fi", "ne"], seed=1)
    found = align_rows(a, b)
    assert found.left_out == {"a": {"text differs": 1}, "b": {"text differs": 1}}
    assert found.rows.tolist() == [2] and found.rows_b.tolist() == [2, 3]
    accents = align_rows(store_of(["caf\u00e9 x"], ["fine"]), store_of(["caf\u00e8 x"], ["fine"], seed=1))
    assert accents.rows.tolist() == [1]


def test_packed_sequences_may_cut_documents_anywhere():
    documents = [["On", "ce", " upon"], [" a", " time", " x"]]
    whole = store_of(*documents)
    packed = Planted(text_of([list("Once upon"), list("a time x")], seed=1, ctx_len=4))
    assert np.array_equal(
        dense(align_rows(whole, packed)),
        dense(align_rows(whole, store_of(list("Once upon"), list("a time x"), seed=1))),
    )
    pieces = text_of([["On"], ["a"], ["ce upon"], [" time x"]], doc_ids=[0, 1, 0, 1], seed=1)
    found = dense(align_rows(whole, Planted(pieces)))
    assert found.argmax(1).tolist() == [0, 2, 2, 1, 3, 3] and (found.max(1) == 1).all()


def test_nothing_in_common_is_an_error():
    with pytest.raises(ValueError, match=r"documents in common, got none .*not on the other side.*Harvest"):
        align_rows(store_of(["one"]), store_of(["two"], seed=1))
    with pytest.raises(ValueError, match=r"rows in common, got none in 1 .*masked on the other side.*masks"):
        align_rows(
            store_of(["ab", "c"], keep=lambda s: s == "c"), store_of(["a", "bc"], seed=1, keep=lambda s: s == "a")
        )
    with pytest.raises(ValueError, match="no text"):
        align_rows(store_of(["<s>", " "]), store_of(["<s>", "a"], seed=1))
    unread = text_of([["one"]])
    unread = Planted(
        StoredText(token_ids=unread.token_ids, doc_ids=unread.doc_ids, positions=unread.positions, strings={})
    )
    with pytest.raises(ValueError, match="tokens of unknown text"):
        align_rows(unread, store_of(["o", "ne"], seed=1))


# Tokens that are no text, or part of a character


def test_special_tokens_are_no_text():
    a = store_of(["<s>", "a b", "</s>", "<pad>"], [" <bos>", "c", "[SEP]"])
    b = store_of(["a", " b", "<|endoftext|>"], ["c"], seed=1)
    found = align_rows(a, b)
    assert found.rows.tolist() == [1, 5] and found.unaligned["a"] == {"special tokens": 5}


def test_unknown_words_leave_their_document_out():
    a, b = store_of([" <unk>", " cat"], ["fine"]), store_of(["cat", " here"], ["fi", "ne"], seed=1)
    found = align_rows(a, b)
    assert found.rows.tolist() == [2]
    assert found.left_out["a"] == {"tokens of unknown text": 1}


def test_around_unknown_words_the_rest_of_the_document_is_aligned():
    """On either side, and on both at different words."""
    words = [
        "once",
        "upon",
        "a",
        "time",
        "there",
        "was",
        "a",
        "small",
        "fox",
        "who",
        "met",
        "nobody",
        "at",
        "the",
        "river",
        "all",
        "day",
        "long",
    ]
    tokens = [f" {word}" for word in words]
    unknown = [" <unk>" if word in ("small", "nobody") else token for word, token in zip(words, tokens, strict=True)]
    other = [" <unk>" if word in ("river",) else token for word, token in zip(words, tokens, strict=True)]
    plain = [" once upon", " a time", *tokens[4:]]
    for a, b, missing in ((unknown, plain, ("small", "nobody")), (unknown, other, ("small", "nobody", "river"))):
        found = align_rows(store_of(a), store_of(b, seed=1))
        assert [words[i] for i in found.rows] == [word for word in words if word not in missing]
        assert found.n_documents == 1 and not found.left_out
        np.testing.assert_allclose(dense(found)[found.rows].sum(1), 1)
        back = align_rows(store_of(b), store_of(a, seed=1))
        assert len(back.rows_b) == len(found.rows)


def test_documents_that_differ_are_no_versions_of_one_for_an_unknown_word():
    a, b = store_of([" <unk>", " fox", " ran"], ["fine"]), store_of(["the", " hen", " sat"], ["fine"], seed=1)
    assert align_rows(a, b).left_out["a"] == {"tokens of unknown text": 1}


def test_tokens_that_hold_several_bytes_of_a_character():
    """Of a quotation mark's three bytes two are one token: which is not to be seen, but that they make it up is."""
    split = ["He", " \ufffd", PART, "Hi", "!"]
    single, joined = store_of(["He", " \u201c", "Hi!"], seed=1), store_of(["He", " \u201cHi", "!"], seed=1)
    found = align_rows(store_of(split), single)
    assert np.array_equal(dense(found), [[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    np.testing.assert_allclose(dense(align_rows(single, store_of(split)))[1], [0, 0.5, 0.5, 0, 0])
    np.testing.assert_allclose(dense(align_rows(joined, store_of(split)))[1], [0, 1 / 6, 1 / 6, 2 / 3, 0], rtol=1e-6)
    assert align_rows(single, store_of(["He", PART, "Hi", "!"])).one_to_one == 2 / 3


def test_what_cannot_be_told_apart_is_left_out_and_counted():
    a, b = store_of(["Hi ", PART, PART, PART, " you"]), store_of(["Hi", "\u201c", "\u201d", " you"], seed=1)
    found = align_rows(a, b)
    assert found.rows.tolist() == [0, 4] and found.rows_b.tolist() == [0, 3]
    reason = "in characters split unclearly"
    assert found.unaligned == {"a": {reason: 3}, "b": {reason: 2}} and found.n_cut == 0


def test_known_characters_share_a_stretch_as_characters():
    a, b = store_of(["x", 3 * PART, "y"]), store_of(["x", "\u00e9", "\u4f60", "y"], seed=1)
    np.testing.assert_allclose(dense(align_rows(a, b))[1], [0, 0.5, 0.5, 0], rtol=1e-6)
    around = align_rows(store_of([f"x{PART}y", "z"]), store_of(["x\u201cy", "z"], seed=1))
    assert np.array_equal(dense(around), np.eye(2)) and around.one_to_one == 1


def test_parts_that_contradict_one_another_are_unclear():
    """As many bytes on both sides, but only since tokens of several stand at different places."""
    a, b = store_of(["x", PART, PART, "\u00e9", "y"]), store_of(["x", "\u201c", PART, "y"], seed=1)
    found = align_rows(a, b)
    assert found.rows.tolist() == [0, 4] and found.unaligned["a"] == {"in characters split unclearly": 3}


@pytest.mark.parametrize(
    "other",
    [
        ["x", "\u00e8", "y", "\u00e9", "z"],
        ["x", "\u00e9", "y", "\u00e9", "\u00e9"],
        ["x", "\u00e9", "y", "\u00e9\u00e9", "z"],
        ["x", "\u00e9", "y", "z"],
        ["x", "\u00e9", "q", "\u00e8", "z"],
    ],
)
def test_a_text_that_differs_beside_parts_of_characters(other):
    a = store_of(["x", "\u00e9", "y", PART, PART, "z"], ["fine"])
    if other[1] == "\u00e9":
        a = store_of(["x", PART, PART, "y", "\u00e9", "z"], ["fine"])
    found = align_rows(a, store_of(other, ["fine"], seed=1))
    assert found.rows.tolist() == [6] and found.n_documents == 1


def test_a_cut_behind_parts_of_characters():
    a, b = store_of(["x", PART, PART, "y", "\u4f60", "\u597d"]), store_of(["x", "\u00e9", "y", "\u4f60"], seed=1)
    found = align_rows(a, b)
    assert found.rows.tolist() == [0, 1, 2, 3, 4] and found.n_cut == 1
    assert found.unaligned["a"] == {"behind the end of the other's text": 1}


def test_texts_without_ascii():
    texts = ["\u4f60\u597d", "\u732b", "\u732b\u732b\u732b\u732b"]
    a = store_of(*([text] for text in texts))
    b = store_of(*([PART] * len(text.encode()) for text in reversed(texts)), doc_ids=[8, 9, 7], seed=1)
    assert dense(align_rows(a, b)).argmax(1).tolist() == [15, 12, 0]
    assert dense(align_rows(b, a)).argmax(1).tolist() == [2] * 12 + [1] * 3 + [0] * 6


def test_what_reads_most_alike_is_paired_first():
    a = store_of([PART, PART, "x"], ["He", PART, PART, "is", "so"])
    b = store_of(["\u00e8", "x"], ["He"], [PART, PART, "x"], ["He", "\u201c", "isso"], seed=1)
    assert dense(align_rows(a, b)).argmax(1).tolist() == [3, 4, 5, 6, 7, 7, 8, 8]


def test_a_document_cut_within_a_character():
    whole = store_of(["so ", "\U0001f600", " it"])
    found = align_rows(whole, store_of(["s", "o", PART, PART], seed=1))
    assert found.rows.tolist() == [0] and found.unaligned["a"]["in characters split unclearly"] == 1
    both = align_rows(store_of(["so", PART, PART, PART, PART]), store_of(["s", "o", PART, PART], seed=1))
    assert both.rows.tolist() == [0, 1, 2] and both.n_cut == 1


def test_hostile_strings():
    strings = [
        "\x00",
        "\\b(",
        ".*",
        "\ud800",
        "a" * 5000,
        "e\u0301",
        "\u202e",
        "%s{}",
        "\u0085",
        "\u3000",
        "<not special>",
    ]
    a, b = store_of(strings, ["fine"]), store_of(list("".join(strings)), ["fine"], seed=1)
    found = align_rows(a, b)
    assert found.n_documents == 2 and not found.left_out and len(found.rows) == len(strings) + 1 - 2
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-5)
    whole = "".join(string for string in strings if not string.isspace())
    assert len(found.rows_b) == len(whole) + 1 - whole.count(" ")


def test_a_replacement_character_of_the_text_itself():
    a, b = store_of(["x", PART, "y"]), store_of(["x", PART, PART, PART, "y"], seed=1)
    assert np.allclose(dense(align_rows(a, b)), [[1, 0, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 0, 1]])


# The same tokens


def test_equal_stores_give_the_identity():
    documents = ["<s>", "a", " ", PART, "<unk>"], ["<s>", "b"]
    found = align_rows(store_of(*documents), store_of(*documents))
    assert found.exact and found.one_to_one == 1 and np.array_equal(dense(found), np.eye(7))
    assert not found.left_out and not found.unaligned


def test_equal_tokens_under_different_masks():
    documents = list("abcdef"), list("ghi")
    a, b = store_of(*documents, keep=lambda s: s not in "bg"), store_of(*documents, keep=lambda s: s not in "ch")
    found = align_rows(a, b)
    assert found.exact and np.array_equal(a.places[found.rows], b.places[found.rows_b])
    assert "".join(a.text.words(0, 9)[p] for p in a.places[found.rows]) == "adefi"
    assert np.array_equal(found.weights.toarray(), np.eye(len(b))[found.rows_b])
    assert found.unaligned == {"a": {"masked on the other side": 2}, "b": {"masked on the other side": 2}}


def test_equal_ids_of_different_tokenizers_are_not_the_same_tokens():
    a, b = (text_of([["ab", "c"], ["x"]]) for _ in range(2))
    other = dict(zip(b.strings, ("c", "ab", "x"), strict=False)) | {int(b.token_ids[2]): "x"}
    b = StoredText(token_ids=b.token_ids, doc_ids=b.doc_ids, positions=b.positions, strings=other)
    found = align_rows(Planted(a), Planted(b))
    assert not found.exact and found.rows.tolist() == [2]
    borders = [Planted(text_of([["x", "y", "z"]])) for _ in range(2)]
    for store, doc_ids in zip(borders, ([0, 0, 1], [0, 1, 1]), strict=True):
        store.text.doc_ids[:] = doc_ids
    found = align_rows(*borders)
    assert not found.exact and found.n_documents == found.n_cut == 1 and found.rows.tolist() == [0]


def test_stores_on_disk(tiny, tiny_tokens, tmp_path):
    saes = [sl.SAE(sl.SAEConfig(d_in=32, d_sae=16, activation=sl.AbsTopK(k=4)), seed=seed) for seed in (0, 1)]
    options = {"hook_point": "blocks.1.hook_resid_post", "progress": False}
    masks = sl.TokenMask(), sl.TokenMask(positions=(3, None))
    a, b = (
        sl.harvest(sae, tiny, tiny_tokens, tmp_path / str(i), mask=mask, **options)
        for i, (sae, mask) in enumerate(zip(saes, masks, strict=True))
    )
    found = align_rows(a, b)
    assert found.exact and np.array_equal(a.places[found.rows], b.places) and found.rows_b.tolist() == [*range(len(b))]
    codes = found.weights @ b.matrix()
    assert np.array_equal(codes.toarray(), b.matrix().toarray())


# Against a slow reference


ALPHABET = "abcdefgh.,' \n\t\u00e9\u4f60\u3000\u201c\U0001f600"


def cut_up(text, rng, split):
    """A tokenization, and the truth of each token: {character of the document: share of it}, without white space."""
    tokens, truth, i = [], [], 0
    while i < len(text):
        n, letter = int(rng.integers(1, 5)), text[i]
        if split and rng.random() < 0.7 and ord(letter) > 127 and not letter.isspace():
            n_bytes = len(letter.encode())
            tokens += [PART] * n_bytes
            truth += [{i: 1 / n_bytes}] * n_bytes
            i += 1
        else:
            tokens.append(text[i : i + n])
            truth.append({j: 1.0 for j in range(i, min(i + n, len(text))) if not text[j].isspace()})
            i += n
    return tokens, truth


def naive_weights(truth_a, truth_b):
    """Character by character; two parts of one character meet where they stand in it."""
    found = np.zeros((len(truth_a), len(truth_b)))
    parts = [defaultdict(list), defaultdict(list)]
    for side, truth in zip(parts, (truth_a, truth_b), strict=True):
        for token, characters in enumerate(truth):
            for character, share in characters.items():
                side[character].append((token, share))
    for character in parts[0].keys() & parts[1].keys():
        start_a = 0.0
        for i, share_a in parts[0][character]:
            start_b = 0.0
            for j, share_b in parts[1][character]:
                common = min(start_a + share_a, start_b + share_b) - max(start_a, start_b)
                found[i, j] += max(0.0, common)
                start_b += share_b
            start_a += share_a
    return np.where(found > 1e-9, found, 0)


@pytest.mark.parametrize("seed", range(25))
def test_equal_to_a_slow_reference(seed):
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list(ALPHABET), rng.integers(1, 60))) + f"x{i}" for i in range(6)]
    sides = [[cut_up(text, rng, split=rng.random() < 0.7) for text in texts] for _ in range(2)]
    order = rng.permutation(6)
    a = Planted(text_of([tokens for tokens, _ in sides[0]]))
    b = Planted(text_of([sides[1][i][0] for i in order], seed=1))
    for store in (a, b):
        store.places = np.flatnonzero(rng.random(len(store.text)) < 0.8)
        store._starts = [0, len(store.places)]
    where = [np.cumsum([0] + [len(sides[k][i][0]) for i in o]) for k, o in enumerate((range(6), order))]
    expected = np.zeros((len(a.text), len(b.text)))
    for place, i in enumerate(order):
        block = naive_weights(sides[0][i][1], sides[1][i][1])
        expected[where[0][i] : where[0][i + 1], where[1][place] : where[1][place + 1]] = block
    expected = expected[a.places][:, b.places]
    for one, other, truth in ((a, b, expected), (b, a, expected.T)):
        found, sums = align_rows(one, other), truth.sum(1, keepdims=True)
        truth = np.divide(truth, sums, out=np.zeros_like(truth), where=sums > 0)
        np.testing.assert_allclose(dense(found), truth, atol=1e-6)
        assert np.array_equal(found.rows, np.flatnonzero(sums))
        assert np.array_equal(found.rows_b, np.flatnonzero(truth.sum(0)))
        for name, n, rows in zip("ab", found.n_rows, (found.rows, found.rows_b), strict=True):
            assert n == len(rows) + sum(found.unaligned.get(name, {}).values())


# Showing it


def test_it_prints_itself_and_is_saved(tmp_path):
    found = align_rows(store_of(["<s>", "one two"], ["x"]), store_of(["one", " ", "two"], ["y"], seed=1))
    shown = str(found)
    assert "documents in common: 1" in shown and "one to one: 0.000" in shown
    assert "rows of a unaligned: 1 special tokens, 1 in documents left out" in shown
    assert "documents of b left out: 1 not on the other side" in shown
    assert "one to one" in found._repr_html_()
    found.save(tmp_path / "alignment.json")
    saved = json.loads((tmp_path / "alignment.json").read_text())
    assert saved["n_aligned"] == [1, 2] and saved["n_rows"] == [3, 4] and "weights" not in saved


# Two real tokenizers over one text


WORDS = [
    "dog",
    "cat",
    "girl",
    "boy",
    "day",
    "little",
    "happy",
    "play",
    "mom",
    "friend",
    "tree",
    "big",
    "was",
    "and",
    "he",
]
TALE_WORDS = ["was", "the", "a", "and", "of", "in", "his", "her", "there", "with"]


def marks_in(text, words, store_of_text):
    """For every token and word, 1 where the token has a character of the word; offsets are found token by token."""
    found = np.zeros((len(store_of_text), len(words)), np.float32)
    borders = np.flatnonzero(np.diff(store_of_text.doc_ids, prepend=-1, append=-1))
    for start, stop in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        pieces = ["" if string.strip().startswith("<") else string for string in store_of_text.words(start, stop)]
        ends = np.cumsum([len(piece) for piece in pieces])
        for column, word in enumerate(words):
            for match in re.finditer(rf"\b{word}\b", "".join(pieces)):
                first, last = np.searchsorted(ends, [match.start(), match.end() - 1], "right")
                found[start + first : start + last + 1, column] = 1
    return found


def tokens_of(tokens, tokenizer):
    kept = tokens.attention_mask.numpy()
    ids = tokens.ids.numpy()[kept]
    positions = np.broadcast_to(np.arange(tokens.ctx_len), kept.shape)[kept]
    strings = token_strings(tokenizer, np.unique(ids).tolist())
    return StoredText(token_ids=ids, doc_ids=tokens.doc_ids.numpy()[kept], positions=positions, strings=strings)


def plant(text, words, seed):
    """A store that fires on words, with strengths of its own, in an order of its own, and not on every token."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(words))
    places = np.flatnonzero(text.positions > 0)
    codes = marks_in(text, [words[i] for i in order], text)[places]
    codes *= 1 + 0.1 * rng.random(codes.shape, np.float32)
    return order, Planted(text, places, codes)


def check_planted(texts, words):
    """Every planted feature correlates with its partner, and less with all others, both ways round."""
    (order_a, a), (order_b, b) = (plant(text, words, seed) for seed, text in enumerate(texts))
    for one, other, orders in ((a, b, (order_a, order_b)), (b, a, (order_b, order_a))):
        found = align_rows(one, other)
        z = [one.codes.tocsr()[found.rows].toarray(), (found.weights @ other.codes).toarray()]
        n = len(words)
        r = np.corrcoef(*z, rowvar=False)[:n, n:][np.argsort(orders[0])][:, np.argsort(orders[1])]
        assert (np.diag(r) > 0.9).all(), r.diagonal()
        assert (r - np.diag(np.diag(r))).max() < 0.5
    return align_rows(a, b)


def test_planted_features_of_two_real_tokenizers(tiny, shared_data):
    model = sl.load_model(shared_data / "stories260k")
    stories = (shared_data / "tinystories" / "tinystories.txt").read_text()[:80_000].split("<|endoftext|>")[:-1]
    stories = [story.strip() for story in stories]
    order = np.random.default_rng(0).permutation(len(stories))
    pieces = tokens_of(sl.tokenize(model, stories, ctx_len=64), model.tokenizer)
    letters = tokens_of(sl.tokenize(tiny, [stories[i] for i in order], ctx_len=100), tiny.tokenizer)
    found = check_planted((pieces, letters), WORDS)
    assert found.n_documents == len(stories) and found.n_cut == 0 and not found.left_out
    covered = (pieces.positions > 0) & [bool(s.strip()) and s != "<s>" for s in pieces.words(0, len(pieces))]
    assert len(found.rows) > 0.98 * covered.sum()


def test_planted_features_of_words_and_bytes(tiny):
    stories = generate_stories(60, seed=3)
    words = tokens_of(stories.tokens(), make_tokenizer())
    letters = tokens_of(sl.tokenize(tiny, [stories.text(i) for i in range(60)], ctx_len=100), tiny.tokenizer)
    found = check_planted((words, letters), TALE_WORDS)
    assert found.n_documents == 60 and found.n_cut == 0 and not found.left_out
    assert found.unaligned["a"]["special tokens"] == 60 and "of white space" not in found.unaligned["a"]
    cut = tokens_of(sl.tokenize(tiny, [stories.text(i) for i in range(60)], ctx_len=120, packed=False), tiny.tokenizer)
    found = align_rows(Planted(words), Planted(cut))
    assert found.n_documents == found.n_cut == 60 and "behind the end of the other's text" in found.unaligned["a"]
