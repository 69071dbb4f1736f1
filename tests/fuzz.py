"""Files of every kind, damaged as disks, editors and strangers damage them, each read in a process of its own.

    python -m tests.fuzz [cases] [seed]

A case is clean where the file is read, or refused by a ValueError or FileNotFoundError that names it. Everything else
is unclean: another exception, an error that does not say which file, more memory than the limit, a crash, more than 20
seconds.
"""

import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import saelab as sl
from saelab.cli.descriptions import describe_folder
from saelab.labels.label import Label, read_entries
from saelab.labels.label_store import LabelStore
from saelab.sae import CLT, CLTConfig
from saelab.stores.files import save_tensors
from saelab.stores.tensors import load_tensors
from tests import foreign

SECONDS, BYTES = 20, 1 << 30
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, -1e308, "", "x", "../x", "/etc/hostname", "a\u0000b",
    "\ud800", "\u202eabc", "NaN", "cafe\u0301" * 50, [], {}, [[[]]], [1, "a", None], {"a": {"b": 1}}, "Infinity",
    "float16",
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """Valid files in a folder, and everything that reads them."""

    name: str
    write: Callable[[Path], Any]
    read: Callable[[Path, Any], Any]


# ---- what is valid
def write_sae(folder: Path, **cfg: Any) -> None:
    sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=32, **{"activation": sl.TopK(k=2), **cfg}))
    sae.fit(activations(), sl.TrainConfig(n_tokens=512, batch_size=128), progress=False)
    sae.save_pretrained(folder)


def activations(n: int = 600) -> Any:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    where = sl.stores.Provenance(
        model="m", weight_processing="none", hook_point="blocks.0.hook_resid_post", text="t", tokens_sha256="",
        mask={}, dtype="float32", ctx_len=25, n_tokens=n, seed=None, versions={},
    )  # fmt: skip
    ids = (torch.arange(n) % 7).int()
    columns = {"token_ids": ids, "doc_ids": (torch.arange(n) // 25).int(), "positions": (torch.arange(n) % 25).int()}
    return sl.Activations.from_tensor(x, where, **columns)


def write_activations(folder: Path) -> None:
    from tests.folders import write_folder

    write_folder(folder, activations()[:], 250)


def write_store(folder: Path) -> None:
    sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=32, activation=sl.AbsTopK(k=2)))
    sl.harvest(sae, None, activations(), folder, shard_tokens=250, allow_mismatch=True, progress=False)
    strings = {str(i): f" w{i}" for i in range(7)}
    (folder / "strings.json").write_text(json.dumps(strings))


def train(folder: Path, resume: bool) -> sl.SAE:
    sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=32, activation=sl.BatchTopK(k=2)))
    cfg = sl.TrainConfig(n_tokens=1024, batch_size=128, save_every_tokens=256)
    return sae.fit(activations(), cfg, out=folder, resume=resume, progress=False)


def labels() -> list[Label]:
    return [Label(feature=i, text=f"label {i}", kind="free", author="me", scores={"f1": 0.5}) for i in range(5)]


def write_labels(folder: Path) -> None:
    with LabelStore(folder / "labels.sqlite") as book:
        book.add(labels())
        for suffix in ("json", "csv", "jsonl"):
            book.save(folder / f"labels.{suffix}")
    (folder / "labels.sqlite").unlink()


# ---- what reads it
def write_clt(folder: Path, format: str) -> None:
    clt = CLT(CLTConfig(n_layers=2, d_in=8, d_sae=16, activation=sl.ReLU(target_l0=4.0)))
    first = activations().provenance
    clt.provenances = tuple(
        first.at(f"blocks.{i}.mlp.hook_in").paired(first.at(f"blocks.{i}.hook_mlp_out")) for i in range(2)
    )
    clt.save_pretrained(folder, format)


def read_clt(folder: Path, made: Any) -> None:
    clt = CLT.from_pretrained(folder)
    clt(torch.ones(3, 16))
    clt.layer(1)
    repr(clt)


def read_sae(folder: Path, made: Any) -> None:
    if made is None:
        describe_folder(folder)
        sl.SAE.from_pretrained(folder).encode(torch.ones(3, 8))
    else:
        describe_folder(folder if made.file is None else folder / made.file)
        foreign.load(folder, made).encode(foreign.some_activations(4))


def read_activations(folder: Path, made: Any) -> None:
    describe_folder(folder)
    acts = sl.Activations.load(folder)
    acts[:], acts[torch.tensor([3, 299, 599])], acts.token_ids, acts.doc_ids, acts.positions
    next(acts.batches(64))


def read_store(folder: Path, made: Any) -> None:
    describe_folder(folder)
    store = sl.FeatureStore.load(folder)
    store.matrix() @ np.ones(store.d_sae, np.float32)
    store.columns().T @ np.ones(len(store), np.float32)
    store.token(len(store) - 1), store.feature(0), store.statistics, store.provenance, store.doc_ids, store.token_ids
    store.text.words(0, 50), str(store)
    next(store.shard_matrices(0, 2))
    store.verify()


def read_run(folder: Path, made: Any) -> None:
    describe_folder(folder)
    train(folder, resume=True)


def read_labels(folder: Path, made: Any) -> None:
    for path in sorted(folder.iterdir()):
        read_entries(path)


def write_map(folder: Path) -> None:
    x = activations()
    sl.universality.fit_map(x, sl.Activations.from_tensor(x[:].flip(1), x.provenance)).save_pretrained(folder)


def read_map(folder: Path, made: Any) -> None:
    sl.universality.SpaceMap.from_pretrained(folder).apply(torch.ones(3, 8))


def write_sharded(folder: Path) -> Any:
    """Weights in several files, by an index."""
    from huggingface_hub import save_torch_state_dict

    write_sae(folder)
    held = load_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(held, folder, max_shard_size=600)


def foreign_kinds() -> list[Kind]:
    writers: list[Callable[[Path], Any]] = [
        foreign.saelens_standard, foreign.saelens_topk, foreign.saelens_jumprelu, foreign.saelens_gated,
        foreign.saelens_batchtopk, foreign.saelens_old, foreign.saelens_transcoder, foreign.saelens_pursuit,
        foreign.sparsify, foreign.gemma_scope, foreign.gemma_scope_2, foreign.llama_scope,
        foreign.openai, foreign.qwen_scope,
        lambda folder: foreign.openmoss(folder, "jumprelu"),
        lambda folder: foreign.dictionary(folder, "AutoEncoderTopK"),
        lambda folder: foreign.dictionary(folder, "MatryoshkaBatchTopKSAE"),
        lambda folder: foreign.circuit_tracer(folder, True, True),
        lambda folder: foreign.overcomplete(folder, "batch norm"),
        lambda folder: foreign.overcomplete(folder, "archetypal"),
        lambda folder: foreign.overcomplete(folder, said=True),
    ]  # fmt: skip
    return [Kind(getattr(write, "__name__", "foreign"), write, read_sae) for write in writers] + [
        Kind("sharded", write_sharded, read_sae)
    ]


KINDS = [
    Kind("sae", write_sae, read_sae),
    Kind("archetypal", lambda folder: write_sae(folder, dictionary=sl.Archetypal(n_points=16)), read_sae),
    Kind("activations", write_activations, read_activations),
    Kind("store", write_store, read_store),
    Kind("run", lambda folder: train(folder, resume=False) and None, read_run),
    Kind("labels", write_labels, read_labels),
    Kind("map", write_map, read_map),
    Kind("cross-layer", lambda folder: write_clt(folder, "saelab"), read_clt),
    Kind("circuit-tracer", lambda folder: write_clt(folder, "circuit_tracer"), read_clt),
    *foreign_kinds(),
]


# ---- damage
def damage(path: Path, rng: random.Random) -> str:
    """Change one file; returns how."""
    raw = path.read_bytes()
    ways: list[Callable[[bytes, random.Random], bytes]] = [flip, cut, insert, blank]
    if path.suffix == ".json":
        ways += [edit_json] * 8
    if path.suffix == ".safetensors":
        ways += [edit_header] * 5
        ways += [lambda raw, rng: edit_values(path, rng)] * 5
    way = rng.choice(ways)
    path.write_bytes(way(raw, rng))
    return f"{path.name}: {getattr(way, '__name__', 'edit_values').strip('<>')}"


def flip(raw: bytes, rng: random.Random) -> bytes:
    held = bytearray(raw)
    for _ in range(rng.choice([1, 1, 4])):
        held[rng.randrange(len(held))] ^= 1 << rng.randrange(8)
    return bytes(held)


def cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw))]


def insert(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + rng.randbytes(rng.choice([1, 8, 100])) + raw[at:]


def blank(raw: bytes, rng: random.Random) -> bytes:
    at, n = rng.randrange(len(raw)), rng.choice([1, 8, 64])
    return raw[:at] + bytes(min(n, len(raw) - at)) + raw[at + n :]


def edit_json(raw: bytes, rng: random.Random) -> bytes:
    """One value, key or nesting changed; the checksum that the file says of itself is taken out."""
    try:
        held = json.loads(raw)
    except ValueError:
        return flip(raw, rng)
    if isinstance(held, dict):
        held.pop("crc32", None)
    if rng.random() < 0.05:
        return b"[" * 3000 + raw + b"]" * 3000
    if rng.random() < 0.05:
        return raw.decode().encode("utf-16")
    if rng.random() < 0.05:
        return raw.replace(b": ", b": NaN, ", 1).replace(b'{"', b'{"x": 1, "x": 2, "', 1)
    held = change(held, rng)
    return json.dumps(held, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")


def change(held: Any, rng: random.Random) -> Any:
    places = list(walk(held))
    if not places:
        return rng.choice(ODD)
    parent, key = rng.choice(places)
    choice = rng.random()
    if choice < 0.7:
        parent[key] = copy.deepcopy(rng.choice(ODD))
    elif choice < 0.85 and isinstance(parent, dict):
        del parent[key]
    elif isinstance(parent, dict):
        parent[rng.choice(["extra", "", "d_in", "name", f"{key}x"])] = parent.pop(key)
    else:
        deep: Any = 1
        for _ in range(300):
            deep = [deep]
        parent[key] = deep
    return held


def walk(held: Any) -> Any:
    """Every (container, key) of a JSON value."""
    if isinstance(held, dict | list):
        for key in held if isinstance(held, dict) else range(len(held)):
            yield held, key
            yield from walk(held[key])


def edit_header(raw: bytes, rng: random.Random) -> bytes:
    """A safetensors header changed as JSON, its checksums taken out."""
    length = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + length])
    except ValueError:
        return flip(raw, rng)
    for key in ("crc32", "sealed"):
        header.get("__metadata__", {}).pop(key, None)
    text = json.dumps(change(header, rng)).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def edit_values(path: Path, rng: random.Random) -> bytes:
    """Some numbers of one tensor changed, the checksums made anew; or a tensor of another shape or type."""
    from safetensors.torch import load_file

    try:
        held = load_file(path)
    except Exception:  # damaged before
        return flip(path.read_bytes(), rng)
    if not held:
        return flip(path.read_bytes(), rng)
    name = rng.choice(sorted(held))
    tensor = held[name].clone()
    if rng.random() < 0.25 or tensor.numel() == 0:
        other = [tensor.flatten(), tensor[None], tensor[:0] if tensor.ndim else tensor, tensor.to(torch.int64)]
        held[name] = rng.choice(other).contiguous()
    else:
        odd = [0, -1, 1, 255, 65535, 2**31 - 1, -(2**31)]
        odd += [float("nan"), float("inf"), -float("inf"), 1e38] if tensor.is_floating_point() else []
        flat = tensor.view(-1)
        for _ in range(rng.choice([1, 1, 3])):
            value = torch.tensor(rng.choice(odd), dtype=torch.float64 if tensor.is_floating_point() else torch.int64)
            flat[rng.randrange(len(flat))] = value.to(tensor.dtype)
        held[name] = tensor
    save_tensors(path, held, {"format": "pt"})
    return path.read_bytes()


# ---- one case, in a process of its own
def run_case(kind: Kind, valid: Path, made: Any, seed: int, home: Path) -> str:
    """What became of one damaged file: "read", "refused", or what was unclean."""
    folder = home / f"case-{seed}"
    shutil.copytree(valid, folder)
    rng = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    how = damage(rng.choice(files), rng)
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read_end)
        os.write(write_end, _try(kind, folder, made).encode("utf-8", "replace"))
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    shutil.rmtree(folder)
    if status:
        said = f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {status}"
    return said if said in ("read", "refused") else f"{kind.name} {seed} ({how}): {said}"


def _find_cause(error: BaseException) -> BaseException:
    """What a check of types met that reads a file itself, as for the texts in a mapping; else the error."""
    while type(error).__name__ == "TypeCheckError" and (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _try(kind: Kind, folder: Path, made: Any) -> str:
    signal.alarm(SECONDS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    try:
        try:
            kind.read(folder, made)
        except TypeError as error:
            raise _find_cause(error) from None
    except (ValueError, FileNotFoundError) as error:
        clean = type(error) in (ValueError, FileNotFoundError) or type(error).__module__.startswith("saelab.")
        named = str(folder) in str(error)
        return "refused" if clean and named else f"{type(error).__name__} without the file: {str(error)[:300]}"
    except BaseException as error:
        import traceback

        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} at {at.filename.rpartition('saelab/')[2]}:{at.lineno}"
    return "read"


def run(n_cases: int, seed: int = 0, kinds: list[Kind] = KINDS, show: bool = False) -> tuple[Counter[str], list[str]]:
    """Outcomes, and the unclean cases in words."""
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    unclean = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        made = {}
        for i, kind in enumerate(kinds):
            (home / str(i)).mkdir()
            made[i] = kind.write(home / str(i))
        for case in range(n_cases):
            i = case % len(kinds)
            said = run_case(kinds[i], home / str(i), made[i], seed + case, home)
            outcomes[said if said in ("read", "refused") else "unclean"] += 1
            if said not in ("read", "refused"):
                unclean.append(said)
                if show:
                    print(said, flush=True)  # noqa: T201
    return outcomes, unclean


if __name__ == "__main__":
    n, first = int(sys.argv[1]) if len(sys.argv) > 1 else 5000, int(sys.argv[2]) if len(sys.argv) > 2 else 0
    counted, faults = run(n, first, show=True)
    print(f"{n} cases: {dict(counted)}")  # noqa: T201
    sys.exit(1 if faults else 0)
