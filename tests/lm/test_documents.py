"""Documents from everything that holds them: each kind read as what it is, or refused with what to do."""

import bz2
import copy
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saelab.lm.documents import list_prompts, read_documents
from saelab.lm.tokens import tokenize

TEXTS = ["one two", "three", "four five six", "seven"]
ROWS = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]


def holders() -> dict[str, Any]:
    import pandas as pd
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

    data, table = Dataset.from_list(ROWS), pa.Table.from_pylist(ROWS)
    return {
        "tuple": tuple(TEXTS),
        "rows": ROWS,
        "columns": {"n": [0] * 4, "text": TEXTS},
        "Dataset": data,
        "IterableDataset": IterableDataset.from_generator(lambda: iter(ROWS)),
        "column of a Dataset": data["text"],
        "Dataset of arrays": data.with_format("numpy"),
        "DataFrame": pd.DataFrame(ROWS),
        "Series": pd.Series(TEXTS, index=[3, 2, 1, 0]),
        "Table": table,
        "RecordBatch": table.to_batches()[0],
        "ChunkedArray": pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
        "Array": pa.array(TEXTS),
        "numpy": np.array(TEXTS),
        "numpy objects": np.array(TEXTS, dtype=object),
        "values of a dict": dict(enumerate(TEXTS)).values(),
        "generator": (text for text in TEXTS),
    }


def test_everything_that_holds_texts_gives_the_same_documents() -> None:
    for kind, texts in holders().items():
        assert list(read_documents(texts)) == TEXTS, kind


def test_files_by_their_suffix(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    rows = io.StringIO(newline="")
    writer = csv.DictWriter(rows, ["n", "text"])
    writer.writeheader()
    writer.writerows(ROWS)
    texts = {
        "a.txt": "\n<|endoftext|>\n".join(TEXTS),
        "bom.txt": "\ufeff" + "\r\n<|endoftext|>\r\n".join(TEXTS),
        "a.jsonl": lines,
        "b.ndjson": "\ufeff" + lines.replace("\n", "\r\n"),
        "a.json": json.dumps(ROWS, indent=1),
        "lines.json": lines,
        "strings.json": json.dumps(TEXTS),
        "a.csv": rows.getvalue(),
        "a.tsv": rows.getvalue().replace(",", "\t"),
    }
    for name, text in texts.items():
        packs = (
            (".gz", gzip.compress),
            (".bz2", bz2.compress),
            (".xz", lzma.compress),
            (".zst", pack_zstd),
            ("", bytes),
        )
        for suffix, pack in packs:
            path = tmp_path / (name + suffix)
            path.write_bytes(pack(text.encode()))
            assert list(read_documents(path)) == TEXTS, path.name
    long = "word " * 50_000
    (tmp_path / "long.csv").write_text(f"text\n{long}\n")
    assert list(read_documents(tmp_path / "long.csv")) == [long]


def test_splits_and_missing_columns_are_named() -> None:
    import pandas as pd
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match=r"splits \['train', 'test'\].*texts\['train'\]"):
        list(read_documents(DatasetDict(train=data, test=data)))
    for texts in (pd.DataFrame(ROWS), {"n": [1], "text": ["a"]}, ROWS, data):
        with pytest.raises(ValueError, match=r"Did you mean \['text'\].*Set `field`"):
            list(read_documents(texts, field="Texts"))
        assert list(read_documents(texts))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (b"bytes", "got bytes. Decode"),
        ([b"bytes"], "got bytes at item 0. Decode"),
        ({"one", "two"}, "have an order"),
        (io.StringIO("one"), "open file"),
        ({"text": "one"}, "Put a single row into a list"),
        (5, "got int. Give a list"),
        ([["two", "words"]], "Join its words"),
        ([[{"role": "user", "content": "Hi"}]], "needs a tokenizer with a chat template"),
        ([[{"content": "Hi"}]], "needs a role"),
        (["one", None], "NoneType at item 1. Leave rows without text out"),
        (["one", float("nan")], "float at item 1"),
        (torch.tensor([1, 2]), "Put a single row of token ids into a list"),
        (np.zeros((2, 3)), "Give strings, or rows of token ids"),
        (["fine", "half \ud83d"], "half of a surrogate pair.*character 5 of item 1"),
    ],
)
def test_what_holds_no_documents_is_refused(texts: Any, message: str, tiny: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tokenize(tiny, texts)


def pack_zstd(data: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("as_path", [False, True])
@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf://datasets/me/tales/a/b.jsonl.gz", ("me/tales", "a/b.jsonl.gz", "dataset", None)),
        ("hf://datasets/me/tales@v1.0/b.jsonl.gz", ("me/tales", "b.jsonl.gz", "dataset", "v1.0")),
        ("hf://datasets/me/tales@refs%2Fpr%2F3/b.jsonl.gz", ("me/tales", "b.jsonl.gz", "dataset", "refs/pr/3")),
        ("hf://me/model/b.jsonl.gz", ("me/model", "b.jsonl.gz", "model", None)),
        ("hf://spaces/me/page/b.jsonl.gz", ("me/page", "b.jsonl.gz", "space", None)),
    ],
)
def test_files_on_the_hub_are_fetched(name, asked, as_path, tmp_path, monkeypatch) -> None:
    import huggingface_hub

    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n'))
    calls = []

    def fetch(repo: str, file: str, *, repo_type: str, revision: str | None) -> str:
        calls.append((repo, file, repo_type, revision))
        return str(tmp_path / "b.jsonl.gz")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert list(read_documents(Path(name) if as_path else name)) == ["one"]
    assert calls == [asked]


def test_a_file_that_the_hub_does_not_give_is_named(monkeypatch) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> str:
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(FileNotFoundError, match=r"hf://datasets/me/tales/a.txt.*could not be fetched"):
        list(read_documents("hf://datasets/me/tales/a.txt"))


def test_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    for name, data, message in [
        ("utf16.txt", "one".encode("utf-16"), "UTF-16"),
        ("plain16.txt", "one two".encode("utf-16-le"), "NUL"),
        ("latin.csv", "text\ncaf\u00e9".encode("latin-1"), "UTF-8"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 99)[:-20], "whole"),
        ("no.txt.gz", b"plain", "whole"),
        ("cut.jsonl.zst", pack_zstd(b'{"text": "one"}\n' * 99)[:-5], "whole"),
        ("no.txt.zst", b"plain", "whole"),
        ("a.parquet", b"PAR1", "whole"),
        ("a.parquet.zst", pack_zstd(b"PAR1"), "as a whole"),
        ("a.zip", b"PK", "Unpack"),
        ("a.json", b"[1, 2", "one JSON value"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            list(read_documents(tmp_path / name))
    with pytest.raises(ValueError, match="folder"):
        list(read_documents(tmp_path))
    for name in ("hf://datasets/a/b", "hf://b"):
        with pytest.raises(ValueError, match="hf://datasets/owner/name/path"):
            list(read_documents(name))
    for missing in ("x" * 5000, "~nobody-here/a.txt", "s3://bucket/a.txt"):
        with pytest.raises(FileNotFoundError, match="existing file"):
            list(read_documents(missing))


def test_rows_of_ids_are_taken_as_they_are(tiny: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    ids = [[5, 6, 7], [8, 9], [10]]
    padded = torch.tensor([[5, 6, 7], [8, 9, 2], [10, 2, 2]])
    mask = [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    made = [
        tokenize(tiny, given, ctx_len=4, bos=False, packed=False)
        for given in (ids, [torch.tensor(row) for row in ids], [np.array(row, np.uint16) for row in ids])
    ]
    rows = [{"input_ids": row, "attention_mask": seen} for row, seen in zip(padded.tolist(), mask, strict=True)]
    held = (rows, {"input_ids": padded, "attention_mask": mask}, Dataset.from_list(rows).with_format("torch"))
    made += [tokenize(tiny, given, ctx_len=4, bos=False, packed=False, field="input_ids") for given in held]
    for tokens in made:
        assert [tokens.ids[i][tokens.attention_mask[i]].tolist() for i in range(3)] == ids
    import pyarrow as pa
    from pyarrow.parquet import write_table

    write_table(pa.Table.from_pylist(rows), tmp_path / "ids.parquet")
    (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("ids.parquet", "ids.jsonl"):
        tokens = tokenize(tiny, tmp_path / name, ctx_len=6, bos=False, field="input_ids")
        assert tokens.ids.tolist() == [[5, 6, 7, 8, 9, 10]] and tokens.doc_ids.tolist() == [[0, 0, 0, 1, 1, 2]]
    for dtype in (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint32, np.uint64):
        assert tokenize(tiny, padded.numpy().astype(dtype), ctx_len=3, bos=False).ids.tolist() == padded.tolist()
    with_bos = tokenize(tiny, [[0, 5], [6]], ctx_len=2, packed=False)
    assert with_bos.ids.tolist() == [[0, 5], [0, 6]]
    with pytest.raises(ValueError, match=r"0\.\.258, got -100\.\.5"):
        tokenize(tiny, [[5, -100]])
    with pytest.raises(TypeError, match="Give them to `tokenize`"):
        list(read_documents(ids))


def test_documents_without_a_token_have_a_number_but_no_row(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import normalizers

    model, tokenizer = tiny, copy.deepcopy(tiny.tokenizer)
    tokenizer._tokenizer.normalizer = normalizers.Replace("!", "")
    monkeypatch.setattr(tiny, "tokenizer", tokenizer)
    for bos in (True, False):
        with pytest.raises(ValueError, match="at least one document"):
            tokenize(model, ["!!!"], bos=bos)
        for packed in (True, False):
            tokens = tokenize(model, ["one", "!!!", "two"], ctx_len=4, packed=packed, bos=bos)
            assert tokens.doc_ids[tokens.attention_mask].unique().tolist() == [0, 2]
            assert bool(tokens.attention_mask.any(1).all()) and len(tokens) == 2


def test_prompts_are_texts_not_keys() -> None:
    assert list_prompts("One") == ["One"] and list_prompts(iter(["a", "b"])) == ["a", "b"]
    for wrong in ({"a": "One"}, b"One", {"One"}):
        with pytest.raises(TypeError, match="list of texts"):
            list_prompts(wrong)
    with pytest.raises(TypeError, match="must be texts, got a dict among them"):
        list_prompts([{"content": "One"}])


def test_bars_are_hidden_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from saelab.stores.jobs import hidden

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert (hidden(True), hidden(False)) == (False, True)
    for value, wanted in (("1", True), ("true", True), ("0", False), ("", False)):
        monkeypatch.setenv("TQDM_DISABLE", value)
        assert hidden(True) is wanted


def test_two_columns_of_one_name_are_no_column(tiny: Any) -> None:
    pd = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match="must be one column of `texts`, got 'text', which 2 are called"):
        tokenize(tiny, pd.DataFrame([["a", "b"]], columns=["text", "text"]))


def test_ids_of_tokens_added_behind_the_models_are_refused() -> None:
    import saelab as sl

    model = sl.lm.tiny_model()
    model.tokenizer.add_tokens(["<|much later|>"] + [f"<|{i}|>" for i in range(8)])
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.258, got .* added behind the model's"):
        tokenize(model, ["One <|7|> two"])
    assert len(tokenize(model, ["One two"])) == 1
