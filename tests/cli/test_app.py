"""The command line: its commands, its help, its exit codes, and runs that are cut off."""

import inspect
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from processes import Child
from unchecked import unchecked

from saelab.cli.app import app, dispatch, main
from saelab.cli.inputs import count_overlap, read_head, read_tail
from saelab.cli.settings import read_activation, read_prefixes
from saelab.cli.terminal import find_base
from saelab.cli.training import train_sae
from saelab.evaluation.concepts import score_concepts
from saelab.evaluation.results import ConceptScores
from saelab.lm.models import tiny_model
from saelab.lm.tokens import tokenize
from saelab.sae.activation_functions import JumpReLU
from saelab.sae.activation_registry import ACTIVATIONS
from saelab.sae.config import RandomPrefixes, SAEConfig
from saelab.sae.sae import SAE
from saelab.stores.activations import Activations
from saelab.stores.feature_store import FeatureStore
from saelab.stores.validation import read_json
from saelab.synthetic.tales import CTX_LEN, generate_stories
from saelab.synthetic.vocabulary import VOCABULARY, save_tokenizer
from saelab.training.config import TrainConfig

HOOK_POINT = "blocks.1.hook_resid_post"
SMALL = ["--k", "4", "--d-sae", "64", "--n-tokens", "8192", "--batch-size", "512", "--no-progress"]
SMALL += ["--save-every-tokens", "4096"]


class Run(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Shell = Callable[..., Run]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Any) -> Shell:
    """Runs `saelab ARGS` in this process, where "tiny" is built once for all commands."""
    monkeypatch.setattr("saelab.lm.models.tiny_model", lambda: tiny)

    def run(*args: str | Path) -> Run:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["saelab", *map(str, args)])
        return Run(main(), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text of 400 documents."""
    folder = tmp_path_factory.mktemp("cli")
    animals = ["fox", "hen", "cow", "owl", "cat", "dog", "bee", "ant"]
    texts = [f"The {a} met the {b} {n}." for n in ("once", "twice") for a in animals for b in animals if a != b]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(texts))
    return folder


@pytest.fixture(scope="module")
def acts(folder: Path) -> Path:
    """Activations of the first 2000 tokens."""
    assert dispatch(list(map(str, collect_command(folder)))) == 0
    return folder / "acts"


def collect_command(folder: Path) -> list[str | Path]:
    where = ["--hook-point", HOOK_POINT, "--out", folder / "acts", "--no-progress"]
    return ["collect", "tiny", folder / "text.txt", "--n-tokens", "2000", "--ctx-len", "32", *where]


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return group.commands


@pytest.mark.parametrize("name", list(commands()))
def test_help_is_complete(name: str, shell: Shell) -> None:
    run = shell(name, "--help")
    assert run.code == 0
    said = " ".join(run.out.split())
    for param in commands()[name].params:
        words = param.help.split()[:3]
        assert len(words) >= 1 and " ".join(words) in said
        assert param.param_type_name == "argument" or all(flag in said for flag in param.opts)
        is_flag = getattr(param, "is_flag", False) and not param.secondary_opts
        assert param.required or is_flag or param.show_default, f"{name} {param.opts} must show its default"


def test_help_and_wrong_use_do_not_wait_for_torch() -> None:
    groups = [[name] for name in commands()] + [["labels", "store", name] for name in commands()["labels"].commands]
    lines = [[*words, "--help"] for words in ([], *groups)] + [["colect"], ["train"], ["train", "x", "--d-sae", "y"]]
    code = f"""
import sys
from saelab.cli.app import dispatch
codes = [dispatch(words) for words in {lines}]
assert codes == [0] * {len(lines) - 3} + [2] * 3, codes
slow = {{"torch", "numpy", "jaxtyping", "transformers", "scipy"}} & set(sys.modules)
assert not slow, (slow, [name for name in sys.modules if name.startswith("saelab.")])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stderr.splitlines()) == 3 and run.stdout.count("Usage: saelab") == len(lines) - 3


def test_no_command_shows_help_and_an_unknown_one_is_wrong_use(shell: Shell) -> None:
    assert "collect" in shell().out
    assert shell().code == 0
    assert shell("colect").code == 2


def test_defaults_are_those_of_the_library() -> None:
    given = inspect.signature(train_sae).parameters
    for config in (TrainConfig, SAEConfig):
        shared = [
            f.name for f in fields(config) if f.name in given and f.name not in ("objective", "activation", "prefixes")
        ]
        assert len(shared) >= 3
        for name in shared:
            default = given[name].default
            assert default is inspect.Parameter.empty or default == getattr(config, name)
    built = SAEConfig(d_in=2, d_sae=64, activation=read_activation(given["activation"].default, given["k"].default))
    assert built == SAEConfig(d_in=2, d_sae=64)


def test_an_activation_takes_its_own_settings_and_k_where_it_has_one(acts: Path, shell: Shell, tmp_path: Path) -> None:
    for name, kind in ACTIVATIONS.items():
        assert read_activation(name) == kind()
    assert read_activation("jumprelu,bandwidth=0.2", 8) == JumpReLU(target_l0=8.0, bandwidth=0.2)
    with pytest.raises(ValueError, match=r"Activation 'sparsemax' takes \['scale'\], got \['k'\]"):
        read_activation("sparsemax", 8)
    with pytest.raises(ValueError, match=r"`--activation` must be a name and settings such as NAME,key=0.5, got"):
        read_activation("topk,k=many")
    where = ["--activation", "sparsemax,scale=1.5", "--d-sae", "64", "--n-tokens", "1024", "--batch-size", "256"]
    trained = shell("train", acts, *where, "--out", tmp_path / "sae")
    assert trained.code == 0 and "Sparsemax(scale=1.5)" in shell("info", tmp_path / "sae").out


@pytest.mark.parametrize(
    ("activation", "more"),
    [
        ("abstopk", ["--prefixes", "16,64"]),
        ("batchtopk", ["--prefixes", "random", "--normalizer", "whiten"]),
        ("topk", ["--init", "data", "--dead-after-tokens", "1000"]),
        ("jumprelu", ["--lr", "0.001"]),
        ("relu", ["--no-aux", "--dictionary", "free"]),
        ("abstopk", ["--dictionary", "archetypal", "--n-points", "48", "--delta", "0.2"]),
    ],
)
def test_the_whole_way(
    folder: Path, acts: Path, shell: Shell, tmp_path: Path, activation: str, more: list[str]
) -> None:
    out = tmp_path / "sae"
    trained = shell("train", acts, "--activation", activation, *SMALL, *more, "--seed", "3", "--out", out)
    assert trained.code == 0, trained.err
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "history.jsonl", "history.csv", "checkpoint",
    }  # fmt: skip
    described = shell("info", out)
    for fact in ("tiny-llama", HOOK_POINT, "text.txt[:", "held-out FVU", "4", "8,192 tokens", "seed 3"):
        assert fact in described.out
    scores = tmp_path / "deep" / "eval.json"
    scores.parent.mkdir()
    found = shell(
        "evaluate", out, "tiny", folder / "text.txt", "--n-tokens", "500", "--n-bootstrap", "20", "--json", scores
    )
    assert found.code == 0, found.err
    assert "fvu" in found.out
    assert "text.txt[-" in found.err
    numbers = read_json(scores)
    assert {"fvu", "l0", "dead_frac", "loss_recovered", "ce_clean", "ce_sae", "ce_zero", "n_tokens"} <= set(numbers)
    assert 0 < numbers["fvu"] < 1


def test_info_of_activations(acts: Path, shell: Shell) -> None:
    said = shell("info", acts).out
    for fact in ("activations", f"{HOOK_POINT} (d_in 32)", "float32", "text.txt[:", "special", "torch"):
        assert fact in said


def test_an_sae_of_folded_weights_is_used_with_folded_weights(
    folder: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saelab.lm.models.tiny_model", tiny_model)  # a fresh one for each command: folding changes it
    where = ["--hook-point", HOOK_POINT, "--n-tokens", "300", "--ctx-len", "32", "--out", tmp_path / "acts"]
    options = ["--weight-processing", "folded", "--no-progress"]
    made = shell("collect", "tiny", folder / "text.txt", *where, *options)
    assert made.code == 0 and "(weight processing: folded)" in made.out
    sae = SAE(SAEConfig(d_in=32, d_sae=64))
    sae.provenance = Activations.load(tmp_path / "acts").provenance
    sae.save_pretrained(tmp_path / "sae")
    out = ["--out", tmp_path / "store", "--n-tokens", "300", "--no-progress"]
    assert shell("harvest", tmp_path / "sae", "tiny", folder / "text.txt", *out).code == 0
    steered = shell(
        "steer", tmp_path / "sae", "tiny", "The fox", "--feature", "3", "--strength", "2", "--n-tokens", "2"
    )
    assert steered.code == 0, steered.err


def test_a_crosscoder_of_two_folders(acts: Path, tmp_path: Path, shell: Shell) -> None:
    shutil.copytree(acts, tmp_path / "tuned")
    command = ("train", acts, *SMALL, "--out", tmp_path / "sae")
    trained = shell(*command, "--beside", tmp_path / "tuned")
    assert trained.code == 0, trained.err
    sae = SAE.from_pretrained(tmp_path / "sae")
    assert [(source.name, source.d_in) for source in sae.cfg.sources or ()] == [("acts", 32), ("tuned", 32)]
    assert sae.source("tuned").provenance == Activations.load(tmp_path / "tuned").provenance
    twice = shell(*command, "--beside", acts)
    assert twice.code == 2 and "must name folders of other names" in twice.err


def test_several_hook_points(folder: Path, tmp_path: Path, shell: Shell) -> None:
    command = [str(tmp_path / "two") if word == folder / "acts" else word for word in collect_command(folder)]
    assert shell(*command, "--hook-point", "blocks.0.hook_mlp_out", "--dtype", "bfloat16").code == 0
    unsaid = shell("train", tmp_path / "two", *SMALL, "--out", tmp_path / "sae")
    assert unsaid.code == 2
    assert HOOK_POINT in unsaid.err
    said = shell("train", tmp_path / "two", *SMALL, "--hook-point", "blocks.0.hook_mlp_out", "--out", tmp_path / "sae")
    assert said.code == 0
    assert "blocks.0.hook_mlp_out" in said.out
    coder = tmp_path / "transcoder"
    trained = shell("train", tmp_path / "two", *SMALL, "--target", "blocks.0.hook_mlp_out", "--skip", "--out", coder)
    assert trained.code == 0, trained.err
    assert "a transcoder" in trained.out and "d_out 32, skip connection" in trained.out
    assert f"{HOOK_POINT} to blocks.0.hook_mlp_out" in trained.out
    judged = shell(
        "evaluate", coder, "tiny", folder / "text.txt", "--n-tokens", "300", "--no-baselines", "--no-progress"
    )
    assert judged.code == 0 and f"from {HOOK_POINT} to blocks.0.hook_mlp_out" in judged.out
    shutil.copytree(coder, tmp_path / "others" / "the same")
    words = ("evaluate", coder, "tiny", folder / "text.txt", "--n-tokens", "300", "--baselines", tmp_path / "others")
    beside = shell(*words, "--no-progress")
    assert beside.code == 0 and "the same" in beside.out, beside.err
    both = shell(*words, "--no-baselines")
    assert both.code == 2 and "`--no-baselines` must stand without `--baselines`" in both.err
    stored = tmp_path / "store"
    harvested = shell(
        "harvest", coder, "tiny", folder / "text.txt", "--n-tokens", "300", "--out", stored, "--no-progress"
    )
    assert harvested.code == 0, harvested.err


WRONG = {
    "no such text": "collect tiny no.txt --hook-point blocks.1.hook_resid_post --out a",
    "no such hook point": "collect tiny {text} --hook-point blocks.7.hook_resid_post --out a",
    "no such model": "collect ./nowhere {text} --hook-point blocks.1.hook_resid_post --out a",
    "not a dtype": "collect tiny {text} --hook-point blocks.1.hook_resid_post --dtype int8 --out a",
    "not a device": "collect tiny {text} --hook-point blocks.1.hook_resid_post --device abacus --out a",
    "other arguments than before": "collect tiny {text} --hook-point blocks.1.hook_resid_post --out {acts}",
    "missing flag": "train {acts} --d-sae 64",
    "not a number": "train {acts} --d-sae many --out a",
    "unknown flag": "train {acts} --d-sae 64 --out a --lambda 3",
    "k above d_sae": "train {acts} --d-sae 64 --k 65 --out a",
    "prefixes that do not end at d_sae": "train {acts} --d-sae 64 --prefixes 16,32 --out a",
    "prefixes that are no numbers": "train {acts} --d-sae 64 --prefixes 16,x --out a",
    "unknown activation": "train {acts} --d-sae 64 --activation tpok --out a",
    "unknown normalizer": "train {acts} --d-sae 64 --normalizer l2 --out a",
    "batch larger than the data": "train {acts} --d-sae 64 --n-tokens 9999 --batch-size 4096 --out a",
    "a target that is not there": "train {acts} --d-sae 64 --target blocks.7.hook_mlp_out --out a",
    "a skip connection to nowhere": "train {acts} --d-sae 64 --skip --out a",
    "no activations": "train nowhere --d-sae 64 --out a",
    "out is the activations": "train {acts} --d-sae 64 --out {acts}",
    "two wishes": "train {acts} --d-sae 64 --out a --resume --overwrite",
    "no such SAE": "evaluate ./nowhere tiny {text}",
    "not an SAE": "evaluate {acts} tiny {text}",
    "nothing": "info nowhere",
    "nothing of ours": "info {folder}",
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_use_exits_with_2_and_one_line(case: str, folder: Path, acts: Path, shell: Shell, tmp_path: Path) -> None:
    places = {"{text}": folder / "text.txt", "{acts}": acts, "{folder}": folder}
    words = [str(places.get(word, tmp_path / word if word == "a" else word)) for word in WRONG[case].split()]
    before = sorted(acts.iterdir())
    run = shell(*words, *(["--no-progress"] if words[0] in ("collect", "train") else []))
    assert (run.code, run.out) == (2, "")
    message = [line for line in run.err.splitlines() if "Loading weights" not in line]
    assert len(message) == 1, run.err
    assert not (tmp_path / "a").exists()
    assert sorted(acts.iterdir()) == before


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("out of\nmemory"), 1, "failed: RuntimeError: out of memory"),
        (OSError(28, "No space left"), 1, "No space left"),
        (KeyboardInterrupt("Stopped; go on with resume=True."), 1, "Stopped; go on with --resume."),
        (KeyboardInterrupt(), 1, "Interrupted."),
        (ValueError("`k` is wrong"), 2, "error: `k` is wrong"),
    ],
)
def test_errors_become_codes(
    error: BaseException, code: int, said: str, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(path: Path) -> str:
        raise error

    monkeypatch.setattr("saelab.cli.descriptions.describe_folder", fail)
    run = shell("info", tmp_path)
    assert run.code == code
    assert run.err.count("\n") == 1
    assert said in run.err
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            shell("--debug", "info", tmp_path)
        monkeypatch.setenv("SAELAB_DEBUG", "1")
        with pytest.raises(type(error)):
            shell("info", tmp_path)


def test_a_finished_sae_is_not_lost(acts: Path, shell: Shell, tmp_path: Path) -> None:
    command = ["train", acts, *SMALL, "--out", tmp_path]
    assert shell(*command).code == 0
    before = contents(tmp_path)
    refused = shell(*command, "--seed", "1")
    assert refused.code == 2
    assert "--overwrite" in refused.err
    complete = shell(*command, "--resume")
    assert complete.code == 0
    assert "complete already" in complete.out
    assert contents(tmp_path) == before
    for change in (["--seed", "1"], ["--k", "5"], ["--d-sae", "32"], ["--activation", "abstopk"]):
        other = shell(*command, "--resume", *change)
        assert other.code == 2
        assert "must keep" in other.err
    assert contents(tmp_path) == before
    assert shell(*command, "--seed", "1", "--overwrite").code == 0
    assert contents(tmp_path) != before


LONG = ["--activation", "batchtopk", "--prefixes", "16,64", "--n-tokens", "10240", "--save-every-tokens", "1024"]


def run_slowly(*words: str) -> int:
    """`saelab WORDS`, in a process of its own, with time after each checkpoint to stop it."""
    from saelab.training import checkpoint

    save = checkpoint.save_checkpoint
    checkpoint.save_checkpoint = lambda *arguments: (save(*arguments), time.sleep(0.3))[0]  # type: ignore[assignment]
    sys.argv = ["saelab", *words]
    return main()


@pytest.fixture(scope="module")
def uncut(acts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that nothing cut off."""
    out = tmp_path_factory.mktemp("uncut") / "sae"
    assert dispatch([*map(str, ("train", acts, *SMALL, *LONG, "--out", out))]) == 0
    return out


@pytest.mark.skipif(sys.platform == "win32", reason="signals as on Unix")
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(
    kill: signal.Signals, acts: Path, uncut: Path, shell: Shell, tmp_path: Path
) -> None:
    command = ["train", acts, *SMALL, *LONG, "--out", tmp_path / "cut"]
    process = Child(tmp_path / "errors.txt", run_slowly, *map(str, command))
    process.wait_until((tmp_path / "cut" / "checkpoint" / "progress.json").exists)
    process.send(kill)
    code, err = process.wait()
    assert code == (-kill if kill is signal.SIGKILL else 1), err
    assert not (tmp_path / "cut" / "config.json").exists()
    assert "Traceback" not in err
    if kill is not signal.SIGKILL:
        assert str(tmp_path / "cut" / "checkpoint") in err
        assert "--resume" in err
    assert "unfinished training run" in shell("info", tmp_path / "cut").out
    assert shell(*command).code == 2
    assert shell(*command, "--resume").code == 0
    assert contents(tmp_path / "cut") == contents(uncut)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_collecting_goes_on_and_begins_anew_when_asked(folder: Path, acts: Path, shell: Shell) -> None:
    before = contents(acts)
    assert shell(*collect_command(folder)).code == 0
    assert contents(acts) == before
    assert shell(*collect_command(folder), "--shard-tokens", "500").code == 2
    assert contents(acts) == before
    assert shell(*collect_command(folder), "--overwrite").code == 0
    assert contents(acts) == before


def test_evaluation_reads_from_the_end(tiny: Any, folder: Path) -> None:
    path = folder / "text.txt"
    documents = path.read_text().split("\n<|endoftext|>\n")
    tokens, n_before = read_tail(tiny, path, 200, 32, True, "<|endoftext|>", "text")
    expected = tokenize(tiny, documents[::-1], ctx_len=32, n_tokens=200)
    assert tokens.sha256 == expected.sha256
    n = int(tokens.doc_ids.max()) + 1
    assert n_before == len(documents) - n
    assert tokens.source == f"text.txt[-{n}:]"
    head = read_head(tiny, path, 200, 32, True, "<|endoftext|>", "text")
    assert head.sha256 == tokenize(tiny, documents, ctx_len=32, n_tokens=200).sha256
    assert read_tail(tiny, path, 10**6, 32, True, "<|endoftext|>", "text")[0].source == f"text.txt[-{len(documents)}:]"


@pytest.mark.parametrize(
    ("trained", "shared"),
    [
        ("text.txt[:1]", 0),
        ("text.txt[:102]", 0),
        ("text.txt[:105]", 3),
        ("text.txt[:112]", 10),
        ("other.txt[:112]", 0),
        ("list", 0),
    ],
)
def test_overlap_with_training_is_counted(tiny: Any, trained: str, shared: int) -> None:
    tokens = tokenize(tiny, ["a fox"] * 10, ctx_len=8)
    assert count_overlap(replace(tokens, source="text.txt[-10:]"), 102, trained) == shared


def test_overlap_is_said(folder: Path, acts: Path, shell: Shell, tmp_path: Path) -> None:
    assert shell("train", acts, *SMALL, "--out", tmp_path).code == 0
    common = ["evaluate", tmp_path, "tiny", folder / "text.txt", "--no-baselines", "--no-progress", "--n-tokens"]
    assert "warning" not in shell(*common, "300").err
    assert "was trained on" in shell(*common, "100000").err
    assert "was trained on" in shell(*common, "300", "--from-start").err


def test_prefixes_are_read() -> None:
    assert read_prefixes("4,8") == (4, 8)
    assert read_prefixes("random") == RandomPrefixes()
    assert read_prefixes(None) is None


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random model over the vocabulary of tales."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("untrained")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(VOCABULARY), max_position_embeddings=CTX_LEN, **shape))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_demo_writes_a_report(shell: Shell, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for home, long in (("saelab.cli.demo_stages", score_concepts), ("saelab.synthetic.tales", generate_stories)):
        monkeypatch.setattr(f"{home}.{long.__name__}", unchecked()(long))  # they are checked where they are tested
    small = ["--n-stories", "30", "--n-tokens", "4096", "--d-sae", "64", "--k", "4", "--hook-point", HOOK_POINT]
    run = shell("demo", "--model", untrained, "--out", tmp_path / "demo", *small, "--no-progress")
    assert run.code == 0, run.err
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert run.out.splitlines()[-2].startswith(f"Open {tmp_path / 'demo' / 'report.html'}")
    scores = tmp_path / "demo" / "abstopk" / "concepts.json"
    explore = f"saelab explore {tmp_path / 'demo' / 'store'} --model {untrained} --concepts {scores}"
    assert run.out.splitlines()[-1].endswith(explore) and ConceptScores.load(scores).n_features == 64
    assert FeatureStore.load(tmp_path / "demo" / "store").d_sae == 64
    for name in ("TopK", "AbsTopK", "Matryoshka", "pca", "probe"):
        assert name in run.out and name in page
        assert name in ("pca", "probe") or "4,096 tokens" in shell("info", tmp_path / "demo" / name.lower()).out
    for fact in ("30 stories", "15 stories", "special", "What failed", "topic sea", "plotly.js v"):
        assert fact in page
    assert read_json(tmp_path / "demo" / "topk" / "concepts.json")["n_stories"] > 0


def test_a_store_is_harvested_listed_and_counted(acts: Path, folder: Path, shell: Shell, tmp_path: Path) -> None:
    assert shell("train", acts, *SMALL, "--activation", "abstopk", "--out", tmp_path / "sae").code == 0
    command = ["harvest", tmp_path / "sae", "tiny", folder / "text.txt", "--n-tokens", "1500", "--no-progress"]
    made = shell(*command, "--out", tmp_path / "store")
    assert made.code == 0, made.err
    assert "64 of SAE(AbsTopK(k=4)" in made.out and "l0 4" in made.out
    assert shell("info", tmp_path / "store").out == made.out
    assert shell(*command, "--out", tmp_path / "store").out == made.out
    listed = shell("features", tmp_path / "store", "--sort", "peak", "--top", "5")
    assert listed.code == 0 and len(listed.out.splitlines()) == 7
    rows = json.loads(shell("features", tmp_path / "store", "--top", "64", "--json").out)["rows"]
    densities = [row["density"] for row in rows]
    assert densities == sorted(densities, reverse=True) and len(rows) == 64
    assert sum(densities) == pytest.approx(4)
    found = json.loads(shell("dead", tmp_path / "store", "--sae", tmp_path / "sae", "--json").out)
    assert len(found["kinds"]) == 64 and found["n_tokens"] > 1000
    assert "near-dead" in shell("dead", tmp_path / "store").out


def test_stores_refuse_what_makes_no_sense(acts: Path, folder: Path, shell: Shell, tmp_path: Path) -> None:
    wrong = shell("features", acts)
    assert wrong.code == 2 and "features" in wrong.err and "harvest" in wrong.err
    assert shell("dead", tmp_path / "nothing").code == 2
    assert shell("train", acts, *SMALL, "--out", tmp_path / "sae").code == 0
    command = ["harvest", tmp_path / "sae", "tiny", folder / "text.txt", "--out", tmp_path / "store", "--no-progress"]
    assert "float16 or float32" in shell(*command, "--values", "int8").err
    assert shell(*command, "--n-tokens", "300").code == 0
    refused = shell(*command, "--n-tokens", "400")
    assert refused.code == 2 and "--overwrite" in refused.err
    near = shell("features", tmp_path / "store", "--sort", "densty")
    assert near.code == 2 and "density" in near.err


def test_classes_that_typer_has_no_more_are_an_error() -> None:
    assert issubclass(typer.BadParameter, find_base(typer.BadParameter, "UsageError"))
    with pytest.raises(ImportError, match="must be made from a class `Misuse`"):
        find_base(typer.BadParameter, "Misuse")
