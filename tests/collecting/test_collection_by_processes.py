"""Tokens and streams of several processes are those of one, whether they train themselves or read for others."""

import itertools
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from ranks import Pool, mesh_of

import saelab as sl
from saelab.collecting import reader
from saelab.lm import documents, tokens
from saelab.lm.models import tiny_model

HOOK = "blocks.1.hook_resid_post"


def made() -> tuple[Any, sl.Tokens]:
    model = tiny_model()
    animals = ("cat", "dog", "owl", "fox", "hen")
    texts = [f"The {a} sees the {b}, and the {b} sees nobody." for a in animals for b in animals]
    return model, sl.tokenize(model, texts, ctx_len=16, n_tokens=600)


def batches(shape: tuple[int, int] | None, resumed: bool = False) -> tuple[list[torch.Tensor], dict[str, int]]:
    """Two passes' batches of a stream; with `resumed` the last of them from its state after the third."""
    model, tokens = made()
    mesh = None if shape is None else mesh_of(*shape)

    def make() -> Any:
        return sl.stream(model, tokens, HOOK, batch_size=24, buffer_tokens=192, n_seq=3, epochs=2, mesh=mesh, seed=1)

    flow = make()
    if not resumed:
        return list(flow), dict(flow.removed)
    first = list(itertools.islice(flow, 3))
    again = make()
    again.load_state_dict(flow.state_dict())
    return [*first, *again], dict(again.removed)


def test_several_processes_feed_one_stream(pool: Pool) -> None:
    expected, removed = batches(None)
    assert len(expected) > 20
    for shape, resumed in (((1, 4), False), ((2, 2), True)):
        for found, counts in pool.run(batches, shape, resumed):
            assert len(found) == len(expected) and counts == removed
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def trained(shape: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """An SAE trained while the model runs."""
    model, tokens = made()
    mesh = None if shape is None else mesh_of(*shape)
    flow = sl.stream(model, tokens, HOOK, batch_size=24, buffer_tokens=192, n_seq=3, mesh=mesh)
    cfg = sl.SAEConfig(d_in=flow.d_in, d_sae=64, activation=sl.TopK(k=4))
    sae = sl.SAE(cfg, seed=0).fit(flow, sl.TrainConfig(n_tokens=240, batch_size=24), progress=False, mesh=mesh)
    return {key: held.clone() for key, held in sae.state_dict().items()}


@pytest.mark.slow
def test_the_model_runs_in_the_processes_that_train(pool: Pool) -> None:
    expected = trained(None)
    for found in pool.run(trained, (2, 2)):
        for key, held in expected.items():
            torch.testing.assert_close(found[key], held, rtol=1e-4, atol=1e-5)


def refused() -> str:
    """What a stream says whose third process cannot read: the others do not wait."""
    model, tokens = made()
    if torch.distributed.get_rank() == 2:
        flow = sl.stream(model, tokens, HOOK, batch_size=24, buffer_tokens=192, n_seq=3, mesh=mesh_of(2, 2))

        def broken(*_: Any) -> None:
            raise ValueError("no activations here")

        flow._rounds.forwards.read = broken
    else:
        flow = sl.stream(model, tokens, HOOK, batch_size=24, buffer_tokens=192, n_seq=3, mesh=mesh_of(2, 2))
    try:
        next(flow)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def test_a_process_that_cannot_read_is_named(pool: Pool) -> None:
    said = pool.run(refused)
    assert said[2] == "ValueError: no activations here"
    assert all("process 2 on " in said[i] and "no activations here" in said[i] for i in (0, 1, 3))


NORM_RULE = sl.TokenMask(max_norm_ratio=1.05)
SPLITS = ((1, 1), (1, 2), (3, 1))
"""Meshes of one, two and three of the four processes; three, two and one read for them"""


def opened(mesh: Any, given: bool = False, **settings: Any) -> Any:
    """A stream, for which those that train have model and tokens only if these are given."""
    model, tokens = made()
    trains = mesh is not None and mesh.get_coordinate() is not None
    there = (None, None) if trains and not given else (model, tokens)
    sizes = {"batch_size": 24, "buffer_tokens": 192, "n_seq": 3, "epochs": 2, "seed": 1}
    return sl.stream(*there, settings.pop("hook_point", HOOK), mesh=mesh, **sizes | settings)


def taken(
    shape: tuple[int, int] | None, n: int | None, state: Any = None, given: bool = False, **settings: Any
) -> dict[str, Any] | None:
    """Batches of a stream and what it knows in the end, in the processes that train; None in those that read."""
    with opened(None if shape is None else mesh_of(*shape), given, **settings) as flow:
        if flow.is_reader:
            return flow.serve()
        if state is not None:
            flow.load_state_dict(state)
        found = list(itertools.islice(flow, n))
        widths = (flow.d_in, flow.d_out)
        return {"batches": found, "state": flow.state_dict(), "origin": flow.provenance, "widths": widths}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    states = [
        {key: x for key, x in found["state"].items() if not isinstance(x, torch.Tensor)} for found in (one, other)
    ]
    tensors = [[x for x in found["state"].values() if isinstance(x, torch.Tensor)] for found in (one, other)]
    rows = [[*found["batches"], *held] for found, held in zip((one, other), tensors, strict=True)]
    assert len(rows[0]) == len(rows[1]) and all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
    assert rows[0][0].dtype == rows[1][0].dtype and states[0] == states[1]
    return one["origin"] == other["origin"] and one["widths"] == other["widths"]


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((1, 1), {"mask": NORM_RULE}),
        ((1, 2), {"dtype": torch.bfloat16, "n_seq": 2}),
        ((3, 1), {"hook_point": ("blocks.0.hook_resid_post", HOOK), "given": True}),
        ((2, 1), {"buffer_tokens": 600, "n_seq": 5}),
    ],
    ids=str,
)
def test_others_run_the_model(pool: Pool, shape: tuple[int, int], settings: dict[str, Any]) -> None:
    expected = taken(None, None, **settings)
    assert expected is not None and len(expected["batches"]) > 20
    assert "mask" not in settings or expected["origin"].removed["norm"] > 10
    n_trainers = shape[0] * shape[1]
    found = pool.run(taken_with, shape, None, None, settings)
    assert all(same(one, expected) for one in found[:n_trainers]) and found[n_trainers:] == [None] * (4 - n_trainers)


def taken_with(shape: tuple[int, int] | None, n: int | None, state: Any, settings: dict[str, Any]) -> Any:
    return taken(shape, n, state, **settings)


def taken_with_other_rounding() -> Any:
    """Batches under a norm rule, whose median norms the third reader finds otherwise."""
    found = reader.find_median_norms
    last = torch.distributed.get_rank() == 3

    def rounded(*args: Any) -> dict[str, float]:
        return {name: norm * (0.5 if last else 1.0) for name, norm in found(*args).items()}

    with patch.object(reader, "find_median_norms", rounded):
        return taken((1, 1), 12, mask=NORM_RULE)


def test_norms_are_compared_with_those_of_the_first_reader(pool: Pool) -> None:
    expected = taken(None, 12, mask=NORM_RULE)
    assert expected is not None and same(pool.run(taken_with_other_rounding)[0], expected)


def test_a_state_goes_on_with_other_readers(pool: Pool) -> None:
    whole = taken(None, 30, epochs=None)
    assert whole is not None
    places, state, found = [(1, 1), (1, 2), None, (3, 1), (1, 1)], None, []
    for shape in places:  # 6 batches are less than an epoch, and end within a round
        part = (
            pool.run(taken_with, shape, 6, state, {"epochs": None})[0] if shape else taken(None, 6, state, epochs=None)
        )
        found += part["batches"]
        state = part["state"]
    assert all(torch.equal(a, b) for a, b in zip(found, whole["batches"], strict=True))
    assert state["n_tokens"] == whole["state"]["n_tokens"] and state["removed"] == whole["state"]["removed"]


def failing(what: str) -> str:
    """What a process says where one of those that read fails, or one of those that train."""
    rank = torch.distributed.get_rank()
    try:
        flow = opened(mesh_of(1, 2))
        with flow if what != "reader" else nullcontext():  # those that train close it where a reader fails
            if flow.is_reader:
                if rank == 3 and what == "reader":
                    flow._rounds.forwards.read = failing_after(flow._rounds.forwards.read, 2)
                flow.serve()
                return "served"
            taken = list(itertools.islice(flow, 2))
            if what == "trainer":
                raise OSError("no room for the history")
            taken += list(flow)
    except (ValueError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{len(taken)} batches"


def failing_after(read: Any, n: int) -> Any:
    calls: list[int] = []

    def limited(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > n:
            raise ValueError("no activations here")
        return read(*args)

    return limited


def test_a_reader_that_fails_is_named_and_others_do_not_wait(pool: Pool) -> None:
    said = pool.run(failing, "reader")
    assert said[0] == said[1] and said[2:] == ["served", "ValueError: no activations here"]
    assert said[0].startswith("RuntimeError: Stopped, as another process failed. process 3 on ")
    assert said[0].endswith(": ValueError: no activations here")
    assert pool.run(failing, "trainer") == ["OSError: no room for the history"] * 2 + ["served"] * 2
    assert pool.run(failing, "nobody")[2:] == ["served"] * 2


def ahead(folder: str) -> tuple[str, list[int]] | None:
    """What a process that reads did, r for a forward pass and s for an answer, and how many rows each pass gave."""
    with opened(mesh_of(1, 2), buffer_tokens=960, epochs=None) as flow:
        if not flow.is_reader:
            for _ in range(22):  # 22 batches of 24 rows, after which the buffer is refilled
                next(flow)
                done, before = -1, len(list(Path(folder).iterdir()))
                while done != before:  # until the readers rest
                    time.sleep(0.1)
                    done, before = before, len(list(Path(folder).iterdir()))
            return None
        did, sizes, read, send = [], [], flow._rounds.forwards.read, flow._rounds._send

        def reading(*args: Any) -> Any:
            found = read(*args)
            did.append("r")
            sizes.append(len(found[0]))
            Path(folder, f"{torch.distributed.get_rank()}-{len(sizes)}").touch()
            return found

        def sending(found: Any) -> None:
            did.append("s")
            send(found)

        flow._rounds.forwards.read, flow._rounds._send = reading, sending
        flow.serve()
    return "".join(did), sizes


def test_readers_are_ahead_by_as_much_as_refills_the_buffer(pool: Pool, tmp_path: Path) -> None:
    for found in pool.run(ahead, str(tmp_path))[2:]:
        did, sizes = found
        unasked = sizes[did.count("s") :]
        assert 2 * 2 * sum(unasked) >= 960 > 2 * 2 * sum(unasked[:-1])
        assert "s" * 5 in did  # nothing is read between answers that are there


def misused() -> list[str]:
    """What is said of calls in the wrong process, of other arguments in one of them, and of two streams at once."""
    rank, (model, tokens) = torch.distributed.get_rank(), made()
    said: list[str] = []

    def note(call: Any) -> None:
        try:
            call()
        except (ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("nothing")

    mesh = mesh_of(1, 2)
    note(lambda: opened(mesh, seed=1 + (rank == 3)))
    note(lambda: opened(mesh_of(1, 2) if rank else mesh_of(1, 1)))
    note(lambda: sl.stream(None, None, HOOK, mesh=mesh))
    note(lambda: sl.stream(model, tokens[: 9 + (rank == 3)], HOOK, mesh=mesh))
    note(lambda: sl.stream(model, tokens[: 9 + (rank == 0)], HOOK, mesh=mesh))
    note(lambda: opened(mesh, buffer_tokens=47))
    with opened(mesh) as flow, opened(mesh) as other:
        if flow.is_reader:
            note(lambda: next(flow))
            sae = sl.SAE(sl.SAEConfig(d_in=flow.d_in, d_sae=66, activation=sl.TopK(k=4)))
            note(lambda: sae.fit(flow, sl.TrainConfig(n_tokens=48, batch_size=24), mesh=mesh))
            note(flow.serve)
        else:
            note(flow.serve)
            next(flow)
            note(lambda: next(other))
            flow.close()
            note(lambda: list(flow))
    return said


def test_what_does_not_go_together_is_said_by_all(pool: Pool) -> None:
    told = pool.run(misused)
    for i in range(4):
        assert told[i][0] == "ValueError: All processes must have the same seed, got 1 in process 0 and 2 in process 3."
        assert "the same processes of `mesh`, got [0] in process 0 and [0, 1] in process 1" in told[i][1]
        missing = "ValueError: `model` and `tokens` must be given in a process that runs the model, got None"
        assert told[i][2].startswith(
            missing if i > 1 else "RuntimeError: Stopped, as another process failed. process 2"
        )
        assert told[i][3].startswith("ValueError: All processes must have the same tokens_sha256")
        assert told[i][4].startswith("ValueError: All processes must have the same tokens_sha256")
        assert "`buffer_tokens` must be at least twice" in told[i][5]
    for said in told[:2]:
        assert said[6].startswith("ValueError: `serve` must be called in a process outside of `mesh`, got process")
        assert "process 2 on " in said[7] and "Streams of one mesh must be read one after another" in said[7]
        assert said[8] == "ValueError: The stream must be open, got one that was closed; make another."
    for i, said in enumerate(told[2:], 2):
        assert said[6].startswith(
            f"ValueError: Batches must be taken in the processes of `mesh`, got a call in process {i}"
        )
        assert said[7].startswith(f"ValueError: `mesh` must hold this process, number {i} of 4, got one of [0, 1]")
        assert "Streams of one mesh must be read one after another" in said[8]


DOCUMENTS = [" " if i % 41 == 7 else f"{i} " + "cats and dogs " * (i * i % 5) for i in range(300)]
"""Of many lengths, some blank"""


def write_documents(folder: Path) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    rows = [{"text": text, "n": i} for i, text in enumerate(DOCUMENTS)]
    write_table(pa.Table.from_pylist(rows), folder / "one.parquet")
    for name, part in {"whole": rows, **{f"part-{i}": rows[i * 60 : (i + 1) * 60] for i in range(5)}}.items():
        write_table(pa.Table.from_pylist(part), folder / f"{name}.parquet", row_group_size=17)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "whole.txt").write_text("\n---\n".join(DOCUMENTS))


def opened_text(kind: str, folder: Path) -> Any:
    """A text of some kind, and what else `tokenize` is told of it."""
    from datasets import Dataset, load_dataset

    if kind in ("list", "generator", "ids"):
        made = {"list": DOCUMENTS, "generator": iter(DOCUMENTS), "ids": [list(text.encode()) for text in DOCUMENTS]}
        return made[kind], {}
    if kind.endswith((".txt", ".parquet", ".jsonl")):
        return folder / kind, {"separator": "---"}
    data = Dataset.from_list([{"text": text, "n": i} for i, text in enumerate(DOCUMENTS)])
    if kind == "data set":
        return data.shuffle(seed=5), {}
    if kind == "data set of ids":
        ids = [{"input_ids": list(text.encode()), "attention_mask": [1, *[0] * (len(text) - 1)]} for text in DOCUMENTS]
        return Dataset.from_list(ids), {"field": "input_ids"}
    _, suffix, n_files, *change = kind.split()
    files = [str(folder / f"part-{i}.{suffix}") for i in range(int(n_files))]
    data = load_dataset(
        {"jsonl": "json"}.get(suffix, suffix), data_files=files, split="train", streaming=True, cache_dir=str(folder)
    )
    changed = {
        "": lambda: data,
        "mapped": lambda: data.map(lambda row: {"text": row["text"].upper()}).filter(lambda row: row["n"] % 3 > 0),
        "numbered": lambda: data.map(lambda row, i: {"text": f"{i} {row['text']}"}, with_indices=True),
        "taken": lambda: data.take(101),
        "shuffled": lambda: data.shuffle(seed=3, buffer_size=50),
    }
    return changed["".join(change)](), {}


def tokenized(kind: str, folder: Path, shape: tuple[int, int] | None, settings: dict[str, Any]) -> Any:
    """Tokens of a text, in blocks of a few rows; and how many documents this process has read."""
    n_read, read = [], documents._read_row

    def counted(*args: Any) -> Any:
        n_read.append(1)
        return read(*args)

    texts, told = opened_text(kind, folder)
    with patch.object(tokens, "BLOCK", 7), patch.object(documents, "_read_row", counted):
        found = sl.tokenize(tiny_model(), texts, mesh=None if shape is None else mesh_of(*shape), **told | settings)
    return found, len(n_read)


FIELDS = ("special_ids", "source", "bos", "packed", "n_truncated")
TEXTS = [
    ("list", {"ctx_len": 16}),
    ("generator", {"ctx_len": 16, "n_tokens": 1234}),
    ("whole.txt", {"ctx_len": 16, "packed": False}),
    ("whole.jsonl", {"ctx_len": 16, "packed": False, "n_tokens": 777}),
    ("whole.parquet", {"ctx_len": 16}),
    ("whole.parquet", {"ctx_len": 16, "n_tokens": 1}),
    ("one.parquet", {"ctx_len": 16, "bos": False}),
    ("data set", {"ctx_len": 16}),
    ("data set", {"ctx_len": 16, "n_tokens": 3000, "packed": False}),
    ("data set of ids", {"ctx_len": 16}),
    ("ids", {"ctx_len": 16}),
    ("streamed parquet 5", {"ctx_len": 16, "packed": False}),
    ("streamed parquet 5", {"ctx_len": 16, "n_tokens": 2000}),
    ("streamed parquet 5 mapped", {"ctx_len": 16}),
    ("streamed parquet 2", {"ctx_len": 16}),
    ("streamed jsonl 5", {"ctx_len": 16}),
    ("streamed jsonl 3", {"ctx_len": 16}),  # fewer files than processes
    ("streamed jsonl 5 numbered", {"ctx_len": 16}),
    ("streamed jsonl 5 taken", {"ctx_len": 16}),
    ("streamed jsonl 5 shuffled", {"ctx_len": 16}),
]


@pytest.mark.parametrize(("kind", "settings"), TEXTS, ids=str)
def test_several_processes_tokenize_what_one_does(
    pool: Pool, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    write_documents(tmp_path)
    whole, n_read = tokenized(kind, tmp_path, None, settings)
    shape = ((1, 4), (2, 2), (4, 1))[len(kind) % 3]
    answers = pool.run(tokenized, kind, tmp_path, shape, settings)
    for found, _ in answers:
        assert found.sha256 == whole.sha256
        assert all(getattr(found, name) == getattr(whole, name) for name in FIELDS), (found, whole)
    shares = [n for _, n in answers]
    if "n_tokens" not in settings:
        assert sum(shares) == n_read and max(shares) < n_read * 0.45


def told_apart(folder: Path) -> list[str]:
    """What is said of a text or an argument that one process has otherwise, or that cannot be tokenized."""
    from datasets import Dataset

    second, said = torch.distributed.get_rank() == 2, []

    def note(texts: Any, model: Any = None, **settings: Any) -> None:
        try:
            with patch.object(tokens, "BLOCK", 7):
                found = sl.tokenize(model or tiny_model(), texts, mesh=mesh_of(2, 2), **{"ctx_len": 16} | settings)
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append(f"{len(found)} rows")

    data = Dataset.from_list([{"text": text} for text in DOCUMENTS])
    note([*DOCUMENTS[:-1], "another" if second else DOCUMENTS[-1]])
    note(DOCUMENTS[: 299 if second else 300], n_tokens=10**6)
    note(data.shuffle(seed=int(second)))
    note(data.select(range(299)) if second else data)
    note(folder / ("part-1.parquet" if second else "part-0.parquet"))
    note(opened_text("streamed jsonl 5", folder / "other" if second else folder)[0])
    note(DOCUMENTS, ctx_len=8 if second else 16)
    note(DOCUMENTS, model=tiny_model(architecture="gpt2") if second else None)
    note([*DOCUMENTS[:8], 8, *DOCUMENTS[9:]])
    note([" "] * 50)
    note(folder / "missing.txt" if second else folder / "whole.txt")
    note(folder / "whole.parquet" if second else iter(DOCUMENTS))
    return said


def test_texts_that_differ_are_refused_by_all(pool: Pool, tmp_path: Path) -> None:
    write_documents(tmp_path)
    (tmp_path / "other").mkdir()
    for i in range(5):
        (tmp_path / "other" / f"part-{i}.jsonl").write_text('{"text": "other", "n": 1}\n')
    told = pool.run(told_apart, tmp_path)
    others = (
        "ValueError: All processes must have the same documents in `texts`, got others in process 2 than in process 0"
    )
    same = "ValueError: All processes must have the same "
    wanted = [others, others, f"{same}rows by their checksum", f"{same}number of rows", f"{same}first row"]
    wanted += [f"{same}first row", f"{same}ctx_len", f"{same}tokenizer"]
    for said in told:
        assert [text[: len(start)] for text, start in zip(said, wanted, strict=False)] == wanted
        assert said[9].startswith("ValueError: `texts` must hold at least one document that is not blank")
        assert said[11].startswith(f"{same}source")
    assert told[1][8].startswith("TypeError: A document must be a string, got int at item 8")
    assert told[2][10].startswith("FileNotFoundError: ")
    for i, found in ((0, told[0][8]), (3, told[3][8]), (0, told[0][10])):
        assert found.startswith("RuntimeError: Stopped, as another process failed. process "), i


def tokenized_by_some(ranks: list[int]) -> str:
    """The hash of a text in the processes of a mesh; what is said in the others."""
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("data",))
    try:
        return sl.tokenize(tiny_model(), DOCUMENTS, mesh=mesh).sha256
    except ValueError as error:
        return str(error)


def test_some_of_the_processes_tokenize(pool: Pool) -> None:
    whole = sl.tokenize(tiny_model(), DOCUMENTS).sha256
    found = pool.run(tokenized_by_some, [1, 2, 3])
    assert found[1:] == [whole] * 3 and "must hold this process, number 0 of 4, got one of [1, 2, 3]" in found[0]
