"""Tokens: nothing lost, documents known, the same from every kind of source."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saelab.lm.documents import describe_source, read_documents
from saelab.lm.models import tiny_model
from saelab.lm.tokens import tokenize

TEXTS = ["one two", "three", "four five six", "seven"]


def words(model: Any, tokens: Any, doc: int) -> str:
    ids = tokens.ids[tokens.doc_ids == doc].tolist()
    return model.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_every_document_is_there(tiny: Any, packed: bool, bos: bool) -> None:
    tokens = tokenize(tiny, TEXTS, ctx_len=16, packed=packed, bos=bos)
    assert [words(tiny, tokens, i) for i in range(4)] == TEXTS
    assert tokens.n_tokens == sum(len(text) + bos for text in TEXTS)
    assert int((tokens.ids == tiny.tokenizer.bos_token_id).sum()) == 4 * bos
    assert (tokens.bos, tokens.packed, tokens.n_truncated, tokens.source) == (bos, packed, 0, "list")
    assert tokens.ids.dtype == tokens.doc_ids.dtype == torch.int32
    assert len(tokens) == (4 if not packed else -(-tokens.n_tokens // 16))


def test_packed_rows_have_padding_only_at_the_end(tiny: Any) -> None:
    tokens = tokenize(tiny, TEXTS, ctx_len=16)
    mask = tokens.attention_mask.flatten()
    assert mask[: tokens.n_tokens].all() and not mask[tokens.n_tokens :].any()
    assert (tokens.doc_ids.flatten()[: tokens.n_tokens].diff() >= 0).all()


def test_long_documents_are_cut_and_counted(tiny: Any) -> None:
    tokens = tokenize(tiny, TEXTS, ctx_len=6, packed=False)
    assert tokens.n_truncated == 2
    assert [words(tiny, tokens, i) for i in range(4)] == ["one t", "three", "four ", "seven"]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("n_tokens", [1, 7, 8, 20])
def test_n_tokens_is_exact(tiny: Any, packed: bool, n_tokens: int) -> None:
    tokens = tokenize(tiny, TEXTS, ctx_len=8, packed=packed, n_tokens=n_tokens)
    everything = tokenize(tiny, TEXTS, ctx_len=8, packed=packed)
    assert tokens.n_tokens == n_tokens
    assert torch.equal(tokens.ids[tokens.attention_mask], everything.ids[everything.attention_mask][:n_tokens])


def test_only_as_much_text_is_read_as_needed(tiny: Any) -> None:
    read = []

    def endless() -> Any:
        while True:
            read.append("some text")
            yield read[-1]

    assert tokenize(tiny, endless(), ctx_len=8, n_tokens=100).n_tokens == 100
    assert len(read) <= 256


def test_bos_follows_the_tokenizer_when_asked(tiny: Any) -> None:
    assert tokenize(tiny, TEXTS, ctx_len=8, bos=None).bos
    gpt2 = tiny_model(architecture="gpt2")
    gpt2.tokenizer._tokenizer.post_processor = None
    assert not tokenize(gpt2, TEXTS, ctx_len=8, bos=None).bos
    assert tokenize(gpt2, TEXTS, ctx_len=8).bos


def test_rows_are_sliced_with_their_documents(tiny: Any) -> None:
    tokens = tokenize(tiny, TEXTS, ctx_len=4)
    part = tokens[2:5]
    assert len(part) == 3 and torch.equal(part.ids, tokens.ids[2:5]) and torch.equal(part.doc_ids, tokens.doc_ids[2:5])
    assert part.source == tokens.source and part.n_tokens == 12
    assert torch.equal(tokens[-1].ids, tokens.ids[-1:])
    assert torch.equal(tokens[[3, 1]].ids, tokens.ids[[3, 1]])
    assert len(list(tokens)) == len(tokens)
    with pytest.raises(IndexError, match="99"):
        tokens[99]


def test_the_fingerprint_follows_the_content(tiny: Any) -> None:
    tokens, again = tokenize(tiny, TEXTS, ctx_len=8), tokenize(tiny, tuple(TEXTS), ctx_len=8)
    assert tokens.sha256 == again.sha256
    others = [tokens[1:], tokenize(tiny, TEXTS, ctx_len=4), tokenize(tiny, TEXTS[::-1], ctx_len=8)]
    assert len({tokens.sha256, *(other.sha256 for other in others)}) == 4


def test_special_ids_leave_out_unknown_words(tiny: Any, shared_data: Path) -> None:
    from saelab.lm.models import load_model

    assert tokenize(tiny, TEXTS).special_ids == (0, 1, 2)
    model = load_model(shared_data / "stories260k", device="cpu")
    assert tokenize(model, TEXTS).special_ids == (1, 2)  # 0 is <unk>


def write_all_kinds(folder: Path) -> dict[str, Any]:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset
    from pyarrow.parquet import write_table

    (folder / "a.txt").write_text("\n<|endoftext|>\n".join(TEXTS) + "\n<|endoftext|>\n", encoding="utf-8")
    (folder / "lines.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": t, "n": 1}) for t in TEXTS) + "\n", encoding="utf-8")
    write_table(pa.table({"n": [1] * 4, "text": TEXTS}), folder / "a.parquet")
    rows = [{"text": text} for text in TEXTS]
    return {
        "text": folder / "a.txt",
        "jsonl": str(folder / "a.jsonl"),
        "parquet": folder / "a.parquet",
        "rows": rows,
        "data set": Dataset.from_list(rows),
        "streamed": IterableDataset.from_generator(lambda: iter(rows)),
        "generator": (text for text in TEXTS),
    }


def test_every_source_gives_the_same_documents(tmp_path: Path) -> None:
    for kind, texts in write_all_kinds(tmp_path).items():
        assert list(read_documents(texts)) == TEXTS, kind
        assert describe_source(texts)
    assert list(read_documents(tmp_path / "lines.txt", separator=None)) == TEXTS


def test_documents_keep_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n---\n\n---\nthree", encoding="utf-8")
    assert list(read_documents(path, separator="---")) == ["one\n\ntwo", "three"]
    assert list(read_documents(path, separator="***")) == ["one\n\ntwo\n---\n\n---\nthree"]


def test_bad_text_is_a_clear_error(tiny: Any, tmp_path: Path) -> None:
    for empty in ([], ["", " \n"]):
        with pytest.raises(ValueError, match="not blank"):
            tokenize(tiny, empty)
    with pytest.raises(FileNotFoundError, match="existing file"):
        tokenize(tiny, "just a sentence")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        tokenize(tiny, tmp_path / "bad.jsonl")
    (tmp_path / "other.jsonl").write_text('{"body": "fine"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="'body'"):
        tokenize(tiny, tmp_path / "other.jsonl")
    assert tokenize(tiny, tmp_path / "other.jsonl", field="body").n_tokens == 5
    with pytest.raises(TypeError, match="int at item 1"):
        tokenize(tiny, ["fine", 3])
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        tokenize(tiny, tmp_path / "latin.txt")
    write_all_kinds(tmp_path)
    with pytest.raises(ValueError, match=r"'body'.*'n', 'text'"):
        tokenize(tiny, tmp_path / "a.parquet", field="body")


def test_bad_sizes_are_clear_errors(tiny: Any) -> None:
    for ctx_len in (0, 257):
        with pytest.raises(ValueError, match=rf"1\.\.256.*got {ctx_len}"):
            tokenize(tiny, TEXTS, ctx_len=ctx_len)
    with pytest.raises(ValueError, match="n_tokens"):
        tokenize(tiny, TEXTS, n_tokens=0)


def test_real_stories(shared_data: Path) -> None:
    from saelab.lm.models import load_model

    model = load_model(shared_data / "stories260k", device="cpu")
    tokens = tokenize(model, shared_data / "tinystories" / "tinystories.txt", n_tokens=20_000)
    assert (tokens.n_tokens, tokens.ctx_len, len(tokens)) == (20_000, 128, 157)
    first = tokens.ids[tokens.doc_ids == 0].numpy()
    assert first[0] == 1 and np.count_nonzero(first == 1) == 1
    assert words(model, tokens, 0).strip().startswith("One day, a little girl named Lily found a needle")
