"""Labels and comparisons of several processes are those of one, to the bit; and what the verbs print and write is."""

import hashlib
import io
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import ranks
import torch
from ranks import N_RANKS, Pool, mesh_of
from sampled import one_in
from unchecked import unchecked

import saelab as sl
from saelab.analysis.direct_logits import logit_lens
from saelab.cli.app import dispatch
from saelab.labels.autointerp.clients import Answer, Messages
from saelab.labels.autointerp.example_windows import ExampleConfig
from saelab.labels.autointerp.explainers import explain_features, score_labels
from saelab.labels.autointerp.requests import RequestConfig
from saelab.labels.autointerp.response_cache import AnswerLog, OfflineClient
from saelab.labels.rules import rule_search
from saelab.labels.rules.predicates import make_predicates
from saelab.labels.rules.rule_search import label_by_rules
from saelab.lm.models import load_model
from saelab.training.ranks import RankGrid

HOOK = "blocks.1.hook_resid_post"
PRICED = RequestConfig(price_in=1.0, price_out=2.0, n_tries=1)
SMALL = ExampleConfig(n_top=3, n_each=1, n_silent=2, n_scored=2, width=8)


class Told:
    """A client whose answers are drawn by the prompt; some cannot be read."""

    def __init__(self, failing: bool = False) -> None:
        self.name, self.settings, self.failing = "told", {"model": "told"}, failing

    def complete(self, messages: Messages) -> Answer:
        if self.failing:
            raise RuntimeError("the power went")
        asked = messages[0]["content"]
        drawn = hashlib.sha256(asked.encode()).digest()
        n = sum(line.startswith("{") and '"label"' not in line for line in asked.splitlines())
        text = json.dumps([byte % 2 for byte in drawn[:n]])
        if "A label proposed" not in asked:
            text = json.dumps({"label": f"sort {drawn[0] % 7}"})
        return Answer(
            text=text if drawn[1] % 5 else "hm", tokens_in=len(asked) // 9, tokens_out=drawn[2] % 5
        )  # fewer than is reserved


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Other tests check the types of what one process does."""
    with unchecked():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two SAEs of 24 latents, a third of 2, and their stores; the model is built in.

    Latents 11 and 14 of the second are equal, and of two processes, the one of which comes first the other later.
    """
    folder = tmp_path_factory.mktemp("place")
    model = load_model("tiny")
    animals, verbs = ("cat", "dog", "owl", "fox"), ("sees", "hears", "likes")
    texts = [f"The {a} {v} the {b}. Who {v} it?" for a in animals for v in verbs for b in animals if a != b]
    tokens = sl.tokenize(model, texts * 2, ctx_len=32, packed=False)
    for i, d_sae in enumerate((24, 24, 2)):
        cfg = sl.SAEConfig(d_in=32, d_sae=d_sae, activation=sl.AbsTopK(k=2), normalizer="none")
        sae = sl.SAE(cfg, seed=i)
        if i == 1:
            with torch.no_grad():
                sae.W_enc[:, 14], sae.W_dec[14] = sae.W_enc[:, 11], sae.W_dec[11]
        sae.save_pretrained(folder / f"sae-{i}")
        sl.harvest(sae, model, tokens, folder / f"store-{i}", hook_point=HOOK, progress=False, shard_tokens=700)
    return folder


@pytest.fixture(scope="module", autouse=True)
def ready(pool: Pool) -> None:
    """What is imported first takes long."""
    with patch.object(ranks, "TIMEOUT", 180.0):
        pool.run(prepare)


def prepare() -> None:
    load_model("tiny")


@contextmanager
def small_blocks() -> Iterator[None]:
    """Few pairs of features at once, codes in several parts, and fewer firings than there are."""
    with ExitStack() as stack:
        for module, name, value in (
            ("saelab.universality.similarity", "BLOCK_CELLS", 24 * 3),
            ("saelab.universality.similarity", "CHUNK_ENTRIES", 1500),
            ("saelab.labels.rules.contingency", "BLOCK_FEATURES", 10),
            ("saelab.labels.rules.rule_search", "PAIR_ROWS", 40),
            ("saelab.analysis.direct_logits", "BLOCK", 5),
            ("saelab.labels.autointerp.explainers", "BLOCK", 4),
        ):
            stack.enter_context(patch.object(import_module(module), name, value))
        yield


@cache
def opened(name: str) -> Any:
    """A store, or an SAE as it is found with it."""
    return sl.SAE.from_pretrained(name) if "sae-" in name else sl.FeatureStore.load(name)


def ruled(place: Path, mesh: Any, n_tokens: int | None = 3, **settings: Any) -> Any:
    store, other = (opened(f"{place}/store-{i}") for i in (0, 1))
    lens = logit_lens(opened(f"{place}/sae-0"), load_model("tiny"), allow_mismatch=True, mesh=mesh)
    predicates = None if n_tokens is None else make_predicates(store, sizes={"token": n_tokens})  # some are left out
    options = {"untrained": other, "min_count": 5, "lens": lens, "mesh": mesh}
    return lens, label_by_rules(store, predicates, **(options | settings))


def explained(place: Path, mesh: Any, answers: Path, failing: bool = False, **settings: Any) -> Any:
    store, client = opened(f"{place}/store-0"), Told(failing)
    options = {"asking": PRICED, "cases": SMALL, "answers": answers, "mesh": mesh, "progress": False}
    settings = {"untrained": opened(f"{place}/store-1"), "scorers": ("detection", "fuzzing")} | settings
    return _timeless(explain_features(store, client, **(options | settings)))


def scored(place: Path, mesh: Any, answers: Path, **settings: Any) -> Any:
    labels = [sl.labels.Label(feature=j % 24, sign=j % 3 - 1, text=f"sort {j}", author="me") for j in range(40)]
    options = {"asking": PRICED, "cases": SMALL, "answers": answers, "mesh": mesh, "progress": False}
    return _timeless(score_labels(opened(f"{place}/store-0"), Told(), labels[::-1], **(options | settings)))


def exported(place: Path, mesh: Any, answers: Path) -> Any:
    client = OfflineClient()
    options = {"cases": SMALL, "answers": answers, "mesh": mesh, "progress": False}
    found = explain_features(opened(f"{place}/store-0"), client, range(9), **options)
    prompts = answers.with_name(f"prompts-{torch.distributed.get_rank() if mesh is not None else 0}.jsonl")
    client.export(prompts)
    return replace(found, usage=replace(found.usage, seconds=0.0)), prompts.read_bytes(), client.report()


def _timeless(found: Any) -> Any:
    assert found.labels and found.missing
    return replace(found, usage=replace(found.usage, seconds=0.0))


def compared(place: Path, mesh: Any, names: str = "store-0 store-1", **settings: Any) -> Any:
    a, b = (opened(f"{place}/{name}") for name in names.split())
    null = sl.universality.NullConfig(n_shifts=settings.pop("n_shifts", 3), n_null=10)
    others = {"untrained": (b, a), "baselines": {"other": b}} if settings.pop("others", False) else {}
    return sl.compare(a, b, null=null, min_count=2, mesh=mesh, progress=False, **(others | settings))


def compared_all(place: Path, mesh: Any) -> Any:
    stores = {f"{i}": opened(f"{place}/store-{i}") for i in range(3)}
    null = sl.universality.NullConfig(n_shifts=1, n_null=10)
    return sl.universality.compare_many(stores, null=null, mesh=mesh, progress=False)


def exact(found: Any) -> Any:
    """All that a result holds, to the bit."""
    if is_dataclass(found):
        return type(found).__name__, [exact(getattr(found, field.name)) for field in fields(found)]
    if isinstance(found, np.ndarray):
        return found.dtype.str, found.shape, found.tobytes()
    if isinstance(found, dict):
        return [(key, exact(value)) for key, value in found.items()]
    return [exact(one) for one in found] if isinstance(found, list | tuple) else repr(found)


def do(what: str, place: Path, shape: tuple[int, int] | None, settings: dict[str, Any]) -> tuple[Any, str]:
    """What a call of all processes returns, and its error. With `fail`, a module, a function and a process, that
    process's function fails; `on_rank_2` are settings of process 2 alone.
    """
    function: Callable[..., Any] = globals()[what]
    settings, rank = dict(settings), torch.distributed.get_rank() if shape is not None else 0
    module, name, failing = settings.pop("fail", ("saelab.training.ranks", "_short", -1))
    special = settings.pop("on_rank_2", {})
    with small_blocks(), ExitStack() as stack:
        if rank == failing:
            stack.enter_context(patch.object(import_module(module), name, side_effect=RuntimeError("the power went")))
        try:
            mesh = None if shape is None else mesh_of(*shape)
            return exact(function(place, mesh, **settings | (special if rank == 2 else {}))), ""
        except (ValueError, RuntimeError) as failed:
            return None, str(failed)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("ruled", {}),
    ("compared", {"others": True}),
    ("explained", {"features": range(10)}),
    ("scored", {}),
    ("exported", {}),
    ("compared", {"names": "sae-1 sae-0", "others": True, "n_shifts": 5}),
    ("compared_all", {}),
    ("ruled", {"features": [20, 3, 3, 11]}),
    ("ruled", {"features": []}),
    ("explained", {"features": [20, 3, 11], "signs": (0,), "untrained": None}),
    ("compared", {"names": "store-2 store-0"}),  # more processes than features
    ("compared", {"names": "store-0 store-2", "sides": True}),
    ("compared", {"names": "sae-2 sae-1", "similarity": "encoder"}),
    ("compared", {"similarity": "documents"}),
    ("compared", {"similarity": "jaccard", "n_shifts": 0}),
    ("compared", {"names": "store-1 store-0", "similarity": "phi", "m": 1}),
    ("ruled", {"n_tokens": None, "seed": 2}),
]
ALWAYS = ("explained", "scored", "exported", "compared_all")


@pytest.mark.parametrize(("what", "settings"), one_in(5, CASES, ALWAYS), ids=str)
def test_several_processes_find_what_one_finds(
    pool: Pool, place: Path, tmp_path: Path, what: str, settings: dict[str, Any]
) -> None:
    asks = what in ("explained", "scored", "exported")
    of_one, of_many = ({"answers": tmp_path / who / "answers.jsonl"} if asks else {} for who in ("one", "many"))
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    expected, error = do(what, place, None, settings | of_one)
    assert error == ""
    shape = ((1, 4), (2, 2))[len(settings) % 2]
    for found, said in pool.run(do, what, place, shape, settings | of_many):
        assert said == "" and found == expected
    if asks and what != "exported":
        one, many = (AnswerLog(folder["answers"]) for folder in (of_one, of_many))
        assert one._known.keys() == many._known.keys() and len(one) > 5
        assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["answers.jsonl"]


FAILURES: list[tuple[str, dict[str, Any]]] = [
    ("ruled", {"fail": ("saelab.labels.rules.rule_search", "choose_rules", 1)}),
    ("compared", {"fail": ("saelab.universality.comparison_sources", "count_pairs", 3)}),
    ("explained", {"fail": ("saelab.labels.autointerp.explainers", "build_case", 2)}),
    ("ruled", {"fail": ("saelab.labels.rules.contingency", "_best_tokens", 2)}),
    ("ruled", {"fail": ("saelab.labels.rules.rule_search", "make_predicates", 0), "n_tokens": None}),
    ("compared", {"fail": ("saelab.universality.similarity", "_finish_correlation", 0)}),
    ("compared", {"fail": ("saelab.universality.comparison_sources", "find_common_rows", 1)}),
    ("compared", {"fail": ("saelab.universality.comparison", "assign", 2)}),
    ("compared", {"fail": ("saelab.universality.nearest", "_search_rows", 2), "names": "sae-0 sae-1"}),
    ("compared", {"on_rank_2": {"m": 0}}),
]


@pytest.mark.parametrize(("what", "settings"), one_in(3, FAILURES, ("explained",)), ids=str)
def test_a_failure_is_told_to_all(pool: Pool, place: Path, tmp_path: Path, what: str, settings: dict[str, Any]) -> None:
    failing = settings["fail"][2] if "fail" in settings else 2
    more = {"answers": tmp_path / "answers.jsonl"} if what == "explained" else {}
    said = [error for _, error in pool.run(do, what, place, (2, 2), settings | more)]
    own = "the power went" if "fail" in settings else "must be at least 1, got 0"
    assert own in said[failing] and "process" not in said[failing]
    told = f"Stopped, as another process failed. process {failing} on "
    assert all(one.startswith(told) and own in one for i, one in enumerate(said) if i != failing), said


OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("ruled", {"seed": 3}, "the same seed"),
    ("compared", {"names": "store-0 store-2"}, "the same compared"),
    ("explained", {"features": [1, 2]}, "the same sides of features"),
    ("ruled", {"features": [1]}, "the same features"),
    ("compared", {"m": 3}, "the same m"),
]


@pytest.mark.parametrize(("what", "changed", "named"), one_in(3, OTHERS), ids=str)
def test_other_arguments_in_one_process_are_refused_by_all(
    pool: Pool, place: Path, tmp_path: Path, what: str, changed: dict[str, Any], named: str
) -> None:
    more = {"answers": tmp_path / "answers.jsonl"} if what == "explained" else {}
    (said,) = {error for _, error in pool.run(do, what, place, (1, 4), {"on_rank_2": changed} | more)}
    assert f"All processes must have {named}" in said and "in process 2" in said


def test_answers_of_a_run_that_failed_are_not_asked_for_again(pool: Pool, place: Path, tmp_path: Path) -> None:
    answers, options = tmp_path / "answers.jsonl", {"untrained": None, "scorers": ()}
    said = pool.run(do, "explained", place, (1, 4), options | {"answers": answers, "on_rank_2": {"failing": True}})
    assert said[2] == (None, "the power went")
    parts = sorted(path.name for path in tmp_path.iterdir())
    assert set(parts) <= {f"answers.part-{i}.jsonl" for i in (0, 1, 3)} and len(parts) >= 2
    kept = len(AnswerLog(answers))
    found = explained(place, None, answers, **options)
    assert 0 < kept <= found.usage.n_kept and found.usage.n_requests > 0
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    assert explained(place, None, answers, **options).usage.n_requests == 0


def test_a_budget_is_that_of_all(pool: Pool, place: Path, tmp_path: Path) -> None:
    budget = explained(place, None, tmp_path / "one.jsonl", scorers=()).usage.cost / 3
    settings = {"answers": tmp_path / "many.jsonl", "scorers": (), "asking": replace(PRICED, budget=budget)}
    found = pool.run(spend, place, settings)
    assert len(set(found)) == 1
    cost, stopped, n_labels, n_waiting = found[0]
    assert 0 < cost <= budget and "used up" in stopped and n_labels and n_waiting


def spend(place: Path, settings: dict[str, Any]) -> tuple[float, str, int, int]:
    found = explained(place, mesh_of(2, 2), **settings)
    return found.usage.cost, found.usage.stopped, len(found.labels), found.n_waiting


def gather() -> list[Any]:
    """Arrays and values of all processes, of dtypes that no backend knows, some of them empty."""
    grid = RankGrid.of(mesh_of(2, 2))
    i = grid.index
    arrays = [np.arange(i * 2, dtype=np.uint16), np.full((i, 2), i > 1), np.zeros((0, 3)), np.array([np.nan, i])[::-1]]
    return [*(grid.gather_arrays(array) for array in arrays), grid.gather_json({"é": [i, None]})]


def test_arrays_of_any_dtype_are_gathered(pool: Pool) -> None:
    for numbers, flags, none, floats, values in pool.run(gather):
        assert [part.tolist() for part in numbers] == [[], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
        assert numbers[0].dtype == np.uint16 and flags[2].tolist() == [[True, True]] * 2 and flags[1].shape == (1, 2)
        assert [part.shape for part in none] == [(0, 3)] * N_RANKS and floats[3][0] == 3 and np.isnan(floats[3][1])
        assert values == [{"é": [i, None]} for i in range(N_RANKS)]


def run_verb(words: list[str], folder: Path, shape: tuple[int, int] | None) -> tuple[int, str, str]:
    """Exit code and what is said; with a shape as `torchrun` would start this process."""
    rank = torch.distributed.get_rank() if shape is not None else 0
    home, out, err = os.getcwd(), io.StringIO(), io.StringIO()

    @contextmanager
    def as_launched(*_: Any) -> Iterator[tuple[RankGrid, torch.device]]:
        yield RankGrid.of(mesh_of(*shape or (1, 1))), torch.device("cpu")

    with ExitStack() as stack:
        stack.enter_context(small_blocks())
        stack.enter_context(patch("saelab.cli.inputs.load_model", lambda *_, **__: load_model("tiny")))
        if shape is not None:
            stack.enter_context(patch.dict(os.environ, {"RANK": f"{rank}", "WORLD_SIZE": f"{N_RANKS}"}))
            stack.enter_context(patch("saelab.training.launch.launched", as_launched))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        os.chdir(folder)
        try:
            return dispatch([*words, "--no-progress"]), out.getvalue(), err.getvalue()
        finally:
            os.chdir(home)


def contents(folder: Path) -> dict[str, Any]:
    """Every file, hidden ones too; of labels what they say."""
    found: dict[str, Any] = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        found[str(path.relative_to(folder))] = path.read_bytes()
        if path.suffix == ".sqlite":
            with closing(sqlite3.connect(path)) as db:
                columns = [row[1] for row in db.execute("PRAGMA table_info(labels)") if row[1] != "time"]
                found[str(path.relative_to(folder))] = db.execute(f"SELECT {', '.join(columns)} FROM labels").fetchall()
    return found


WORDS = [
    ["label", "store-0", "--untrained"],
    ["compare", "store-0", "store-1", "--out", "match.json", "--html", "page.html", "--shifts", "2"],
    ["label", "store-0", "--export-prompts", "prompts.jsonl", "--features", "1,2,3,4,5"],
]


@pytest.mark.parametrize("words", WORDS, ids=lambda words: " ".join(words[::2]))
def test_the_verbs_print_and_write_once_what_one_process_would(
    pool: Pool, place: Path, tmp_path: Path, words: list[str]
) -> None:
    for folder in ("one", "many"):
        shutil.copytree(place, tmp_path / folder)
    code, out, err = run_verb(words, tmp_path / "one", None)
    assert (code, err) == (0, "") and out
    first, *others = pool.run(run_verb, words, tmp_path / "many", (2, 2))
    shown = [[line for line in text.splitlines() if " tokens in, " not in line] for text in (first[1], out)]
    assert first[0] == 0 and shown[0] == shown[1] and first[2] == "" and others == [(0, "", "")] * (N_RANKS - 1)
    written = contents(tmp_path / "one")
    assert contents(tmp_path / "many") == written and written.keys() != contents(place).keys()


def test_what_a_verb_refuses_is_said_once(pool: Pool, place: Path, tmp_path: Path) -> None:
    for words, said in (
        (["label", "store-9"], "no such folder"),
        (["compare", "store-0", "sae-0"], "got one of each"),
        (["label", "store-0", "--features", "24"], "must be in 0..23, got [24]"),
    ):
        first, *others = pool.run(run_verb, words, place, (1, 4))
        assert first[:2] == (2, "") and said in first[2] and len(first[2].splitlines()) == 1
        assert others == [(2, "", "")] * (N_RANKS - 1)


def lack_the_model(folder: Path) -> tuple[int, str, str]:
    """A comparison in which process 1 cannot open the model, or cannot read what it is to encode."""
    broken = "open_model" if folder.name == "model" else "harvest_untrained"
    real = getattr(import_module("saelab.cli.inputs"), broken, None)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if broken == "open_model":
            return None
        with patch("saelab.collecting.harvesting.rebuild_tokens", side_effect=ValueError("gaps")):
            return real(*args, **kwargs) if real is not None else None

    with ExitStack() as stack:
        if torch.distributed.get_rank() == 1:
            stack.enter_context(patch(f"saelab.cli.inputs.{broken}", refuse))
        return run_verb(["compare", "store-0", "store-1", "--shifts", "1"], folder.parent, (1, 4))


def test_untrained_stores_are_made_by_all_or_none(pool: Pool, place: Path) -> None:
    first, *others = pool.run(lack_the_model, place / "model")
    assert first[0] == 2 and "the same SAE and model of the store at hand, got True in process 0" in first[2]
    assert others == [(2, "", "")] * (N_RANKS - 1)
    first, *others = pool.run(lack_the_model, place / "text")
    assert first[0] == 0 and first[2].count("No untrained dictionary for comparison with store-") == 2
    assert first[2].count("gaps") == 2 and "no untrained dictionary was compared" in first[1]
    assert others == [(0, "", "")] * (N_RANKS - 1)


def test_a_rule_does_not_depend_on_what_else_is_labeled(place: Path) -> None:
    store = opened(f"{place}/store-0")
    with small_blocks():
        every, some = label_by_rules(store, min_count=5), label_by_rules(store, min_count=5, features=[3, 11, 20])
    rules = [[(row.feature, row.sign, row.rule, row.f1_train) for row in found.rows] for found in (every, some)]
    assert set(rules[1]) <= set(rules[0]) and len(rules[1]) > 3 and rule_search.PAIR_ROWS > 40
