"""Nothing that is meant to be shared names a local folder, a user, a host or a key, whatever made it.

One person, whose home, name, host and keys are telling, makes every kind of file that others get. All bytes are
searched: those of compressed files, of archives and of texts in base64 as well.
"""

import base64
import gzip
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_made import serve_hub

import saelab as sl
from saelab.cli.app import dispatch
from saelab.labels.label import Label
from saelab.labels.label_store import LabelStore

USER, HOST, PROJECT, RUN, PASSWORD = "ada-lovelace", "enigma-host", "secret-project", "hidden-run", "s3cr3t-word"
KEYS = {"HF_TOKEN": "hf_QxTokenOfAda", "OPENAI_API_KEY": "sk-KeyOfAda", "NEURONPEDIA_API_KEY": "np-KeyOfAda"}
PLACE, OUT = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
READ = "blocks.1.hook_resid_post"
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's own upload


def unpack(raw: bytes, depth: int = 0) -> Iterator[bytes]:
    """All bytes in bytes: themselves, and what archives, compressed streams and base64 hold."""
    yield raw
    if depth > 3:
        return
    if raw[:2] == b"\x1f\x8b":
        yield from unpack(gzip.decompress(raw), depth + 1)
    if raw[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(raw)) as held:
            for name in held.namelist():
                yield name.encode()
                yield from unpack(held.read(name), depth + 1)
    for found in re.finditer(rb"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{24,}={0,2}", raw):
        text = found[0]
        with pytest.MonkeyPatch.context():
            try:
                yield from unpack(base64.b64decode(text + b"=" * (-len(text) % 4)), depth + 1)
            except ValueError:
                continue


def find_leaks(files: dict[str, bytes], secrets: list[str]) -> list[str]:
    """`file: secret` for each secret that a file or its name has, in any of the ways in which texts are written."""
    spelled = {
        secret: {
            form.lower()
            for form in (
                secret.encode(), secret.encode("utf-16-le"), json.dumps(secret)[1:-1].encode(),
                secret.replace("/", "\\/").encode(), secret.replace("/", "%2F").encode(),
            )
        }
        for secret in secrets
    }  # fmt: skip
    found = []
    for name, raw in files.items():
        whole = [name.encode(), *unpack(raw)]
        for secret, forms in spelled.items():
            for part in whole:
                if hit := next((form for form in forms if form in part.lower()), None):
                    at = part.lower().index(hit)
                    found.append(f"{name}: {secret}: {part[max(0, at - 60) : at + 60]!r}")
                    break
    return found


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_the_search_finds_what_is_hidden() -> None:
    packed, zipped = gzip.compress(b'{"a": "/home/x"}'), io.BytesIO()
    np.savez_compressed(zipped, about=np.array(["/home/x"], dtype="S7"))
    hidden = {
        "gz": packed, "npz": zipped.getvalue(), "base64": b"data:," + base64.b64encode(b"0123456789/home/x 0123456789"),
        "json": b'"\\/home\\/x"', "utf-16": "/home/x".encode("utf-16-le"), "url": b"%2fhome%2fx", "home": b"/home/y",
        "twice": base64.b64encode(packed),
    }  # fmt: skip
    assert [leak.split(":")[0] for leak in find_leaks(hidden, ["/home/x"])] == [*[*hidden][:6], "twice"]


class World:
    """What one person has: a home with a model, a text and a project, in which everything is made by absolute path."""

    def __init__(self, root: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.root, self.home = root, root / "home" / USER
        self.project, self.out = self.home / PROJECT, root / "out"
        self.secrets = [USER, HOST, PROJECT, RUN, PASSWORD, str(root), *KEYS.values()]
        self.folder, self.text = self.home / "models" / "tiny-lm", self.home / "texts" / "stories.txt"
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes)).save_pretrained(self.folder)
        sl.lm.tiny_model().tokenizer.save_pretrained(self.folder)
        self.text.parent.mkdir(parents=True)
        self.project.mkdir()
        words = ["The cat sees the dog.", "An owl likes the fox by the house.", "She went to the market and sang."]
        self.text.write_text("\n<|endoftext|>\n".join(f"{a} {b}" for a in words for b in words for _ in range(4)))
        self.model = sl.load_model(str(self.folder), weight_processing="none", progress=False)
        self.tokens = sl.tokenize(self.model, self.text, 24)

    def run(self, *words: str | Path) -> None:
        """A command."""
        assert dispatch([str(word) for word in words]) == 0

    def check(self, folder: Path, n: int = 1) -> None:
        """Every file of a folder, of which there are at least `n`, holds no secret."""
        files = read_all(folder)
        leaks = find_leaks(files, self.secrets)
        assert len(files) >= n, sorted(files)
        assert not leaks, "\n".join(leaks)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(root / "home" / USER))
        for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            patch.setenv(name, USER)
        for name, key in KEYS.items():
            patch.setenv(name, key)
        patch.setattr("getpass.getuser", lambda: USER)
        patch.setattr("socket.gethostname", lambda: HOST)
        patch.setattr("socket.getfqdn", lambda *_: f"{HOST}.local")
        patch.setattr("platform.node", lambda: HOST)
        made = World(root)
        patch.chdir(made.project)
        yield made


@pytest.fixture(scope="module")
def acts(world: World) -> dict[str, sl.Activations]:
    found = sl.collect(world.model, world.tokens, [READ, PLACE, OUT], world.project / "acts", progress=False)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def sae(world: World, acts: dict[str, sl.Activations]) -> sl.SAE:
    [made] = sl.fit(
        [sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.TopK(k=3)), seed=0)], acts[READ],
        sl.TrainConfig(n_tokens=2048, batch_size=256), out=world.project / RUN / "run", progress=False,
    )  # fmt: skip
    made.save_pretrained(world.project / RUN / "sae")
    return sl.SAE.from_pretrained(world.project / RUN / "sae")


@pytest.fixture(scope="module")
def store(world: World, sae: sl.SAE) -> sl.FeatureStore:
    made = sl.harvest(sae, world.model, world.tokens, world.project / "store", progress=False)
    fired = made.statistics.fires.sum(1).nonzero()[0].tolist()
    world.run("labels", made.folder, "set", str(fired[0]), "mine")
    with LabelStore.open(made) as book:
        where = {"store": str(made.folder), "endpoint": f"https://ada:{PASSWORD}@host.org:8000/v1"}
        book.add([Label(feature=fired[1], text="animals", author=str(world.folder), provenance=where)])
    assert made.manifest.sae["name_or_path"] == f"../{RUN}/sae"  # what a store keeps to find its SAE again
    return sl.FeatureStore.load(world.project / "store")


def test_saes(world: World, sae: sl.SAE, acts: Any, store: Any) -> None:
    for form in ("saelab", "saelens", "sparsify", "dictionary_learning"):
        sae.save_pretrained(world.out / "saes" / form, form)
        how = {} if form == "saelab" else {"model": str(world.folder), "hook_point": READ}
        again = sl.SAE.from_pretrained(world.out / "saes" / form, **how)
        again.save_pretrained(world.out / "saes" / f"{form}-again")
    world.run("convert", world.project / RUN / "sae", world.out / "saes" / "converted", "--format", "saelens")
    world.check(world.out / "saes", 12)
    world.check(world.project / RUN / "run", 4)  # the SAE, its history and its checkpoint


@pytest.mark.parametrize("form", ["saelab", "saelens", "sparsify", "dictionary_learning"])
def test_cards(world: World, sae: sl.SAE, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sl.evaluate(sae, world.model, world.tokens[:8], n_bootstrap=0, progress=False)
    with serve_hub(monkeypatch, tmp_path) as hub:
        sae.push_to_hub("me/sae", format=form, evaluation=found, path_in_repo="one")
        world_files = {**hub.files("me/sae"), "messages": json.dumps(hub.messages).encode()}
    assert len(world_files) > 3 and not find_leaks(world_files, world.secrets)


def test_stores(world: World, store: Any, acts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub(monkeypatch, tmp_path) as hub:
        store.push_to_hub("me/store")
        acts[READ].push_to_hub("me/acts")
        with LabelStore.open(store) as book:
            book.push_to_hub("me/store")
        files = {f"{repo}/{name}": raw for repo in ("me/store", "me/acts") for name, raw in hub.files(repo).items()}
        files |= {"messages": json.dumps(hub.messages).encode()}
    assert len(files) > 8 and not find_leaks(files, world.secrets)


@pytest.mark.parametrize("form", ["neuronpedia", "saedashboard", "delphi"])
def test_exports(world: World, sae: sl.SAE, store: Any, form: Any) -> None:
    sl.interop.export_store(store, world.out / form, form, sae=sae, model=world.model, progress=False)
    world.check(world.out / form, 2)


def test_what_neuronpedia_is_sent(world: World, sae: sl.SAE, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from saelab.interop.neuronpedia_upload import Server, upload

    sent: dict[str, bytes] = {}
    monkeypatch.setattr(Server, "ask", lambda self, path, body=None: {"name": sent.setdefault(path, body or b"")})
    upload(store, sae=sae, model=world.model, journal=world.project / "journal.json", progress=False)
    assert "feature/upload-batch" in sent and not find_leaks(sent, world.secrets)


def test_labels(world: World, store: Any) -> None:
    for name in ("labels.json", "labels.csv", "labels.jsonl", "labels.json.gz"):
        (world.out / "labels").mkdir(parents=True, exist_ok=True)
        world.run("labels", store.folder, "export", world.out / "labels" / name)
    world.check(world.out / "labels", 4)


def test_pages_and_results(world: World, sae: sl.SAE, store: Any, acts: Any) -> None:
    out, model = world.out / "pages", world.model
    out.mkdir(parents=True)
    found = sl.evaluate(sae, model, world.tokens[:8], n_bootstrap=0, progress=False)
    found.save(out / "evaluation.json")
    sl.interop.save_saebench(found, out / "saebench.json", sae)
    with LabelStore.open(store) as book:
        shown = {"labels": book, "sae": sae, "prompts": ["The cat"], "evaluation": found, "progress": False}
        sl.report(store, out / "report", model, **shown)
        sl.report(store, out / "one.html", model, features=[0, 1], **shown)
        sl.analysis.describe_feature(store, 1).save(out / "card.json")
    other = sl.harvest(
        sl.SAE(sae.cfg, seed=7), model, world.tokens, world.project / "other", hook_point=READ, progress=False
    )
    sl.compare(store, other, null=sl.universality.NullConfig(n_shifts=2, n_null=8), progress=False).save(
        out / "comparison.json"
    )
    up = sl.Intervention(sae, {1: 2.0}, store=store)
    texts = sl.steering.compare_generations(model, up, "The cat", 4, progress=False)
    texts.save(out / "texts.json")
    (out / "texts.html").write_text(sl.visualization.show_generations(texts))
    sl.read(sae, model, ["The cat sees"], progress=False).save(out / "read.json")
    (out / "nearest.html").write_text(sl.analysis.nearest_features(store).of(1).__repr__())
    (out / "feature.html").write_text(store.feature(1)._repr_html_())
    sl.interventions.attribute(model, sae, "The cat sees", ("d", "e")).save(out / "attribution.json")
    sl.analysis.dead_features(store, sae).save(out / "dead.json")
    sl.analysis.list_features(store).save(out / "table.json")
    words = sl.steering.concept_from_words(model, "c,d")
    curve = sl.steering.steering_curve(
        model, {"feature": up}, words, ["The cat"], strengths=[-1.0, 1.0], n=1, n_tokens=4, progress=False
    )
    curve.save(out / "curve.json")
    (out / "curve.html").write_text(sl.visualization.show_curve(curve))
    for shown_object in (sae, store, acts[READ], world.tokens):
        (out / f"{type(shown_object).__name__}.txt").write_text(repr(shown_object) + str(shown_object))
    world.check(out, 16)


def test_commands(world: World, sae: sl.SAE, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the shell writes, from names as they are typed: relative to the project, with ~ or from the root."""
    out = world.out / "commands"
    quiet, model, short = "--no-progress", world.folder, ["--n-tokens", "512"]
    world.run("collect", "~/models/tiny-lm", world.text, "--hook-point", READ, "--out", "cli-acts", *short, quiet)
    small = ["--d-sae", "48", "--k", "3", "--n-tokens", "512", "--batch-size", "128"]
    world.run("train", "cli-acts", "--out", out / "run", *small, quiet)
    more = ["--json", out / "evaluation.json", "--saebench", out / "saebench.json"]
    world.run("evaluate", out / "run", model, world.text, "--no-baselines", *more, *short, quiet)
    world.run("harvest", out / "run", model, "~/texts/stories.txt", "--out", "cli-store", *short, quiet)
    found = ["--evaluation", out / "evaluation.json"]
    world.run("report", "cli-store", "--out", out / "report", "--model", model, *found, quiet)
    both = ["--out", out / "comparison.json", "--html", out / "comparison.html"]
    world.run("compare", "cli-store", world.project / "cli-store", *both, quiet)
    world.run("export", "cli-store", "--out", out / "exported", "--model", model, "--sae", out / "run", quiet)
    texts = ["--feature", "1", "--n-tokens", "3", "--html", out / "a.html"]
    world.run("steer", out / "run", model, "The cat", *texts, quiet)
    world.check(out, 10)


def test_an_explorer(world: World, store: Any, sae: sl.SAE) -> None:
    from saelab.explorer.session import Explorer

    shown = Explorer(store, sae)
    try:
        shown.set_label(2, "given here")
        files = {name: data for name, _, data in map(shown.export, ("json", "csv", "neuronpedia"))}
        files["about"] = json.dumps(shown.about()).encode()
        assert not find_leaks(files, world.secrets)
    finally:
        shown.close()


@pytest.fixture(scope="module")
def transcoder(world: World, acts: dict[str, sl.Activations]) -> sl.SAE:
    pairs = sl.stores.ActivationPairs(acts[PLACE], acts[OUT])
    cfg = sl.SAEConfig(d_in=32, d_out=32, d_sae=48, activation=sl.TopK(k=3))
    [made] = sl.fit([sl.SAE(cfg, seed=0)], pairs, sl.TrainConfig(n_tokens=1024, batch_size=256), progress=False)
    made.save_pretrained(world.project / "transcoder")
    return sl.SAE.from_pretrained(world.project / "transcoder")


def test_graphs(world: World, transcoder: sl.SAE) -> None:
    transcoder.save_pretrained(world.out / "graphs" / "transcoder", "sparsify")
    graph = sl.circuits.trace(world.model, [transcoder], "The cat sees", allow_missing=True)
    sl.visualization.write_graph_page(graph, world.out / "graphs" / "graph.html")
    sl.circuits.write_graph_json(graph, world.out / "graphs" / "graph.json")
    by_command = ["--json", world.out / "graphs" / "cli.json", "--page", world.out / "graphs" / "cli.html"]
    world.run("trace", world.folder, world.project / "transcoder", "The cat sees", "--allow-missing", *by_command)
    world.check(world.out / "graphs", 6)


def test_other_kinds_of_weights(world: World, sae: sl.SAE, transcoder: sl.SAE, acts: Any) -> None:
    """Transcoders of a layer and of all layers in every format, maps between spaces, dictionaries with a classifier."""
    out = world.out / "weights"
    bare = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.TopK(k=3), normalizer="none"), seed=0)
    bare.b_dec.data.zero_()
    bare.provenance, bare.name_or_path = sae.provenance, str(world.folder)
    bare.save_pretrained(out / "overcomplete", "overcomplete")
    transcoder.to_jumprelu(acts[PLACE][:1024].float()).save_pretrained(out / "layers", "circuit_tracer")
    clt = sl.sae.CLT(sl.sae.CLTConfig(n_layers=2, d_in=32, d_sae=48, activation=sl.TopK(k=3)))
    layers = [tuple(f"blocks.{i}.hook_{name}" for name in ("resid_mid", "mlp_out")) for i in range(2)]
    clt.fit(sl.stream(world.model, world.tokens, layers), sl.TrainConfig(n_tokens=1024, batch_size=256), progress=False)
    x = acts[PLACE][:1024].float()
    clt.save_pretrained(out / "clt")
    clt.to_jumprelu(torch.cat([x, x], 1)).save_pretrained(out / "clt-circuit-tracer", "circuit_tracer")
    sl.universality.fit_map(acts[READ], acts[READ]).save_pretrained(out / "map")
    dictionary = sl.sae.JointDictionary(sae=sae, W=torch.zeros(48, 2), b=torch.zeros(2), concepts=("cat", "dog"))
    dictionary.save_pretrained(out / "joint")
    world.check(out, 10)


def test_lenses_and_profiles_of_layers(world: World) -> None:
    out = world.out / "of-layers"
    lens = sl.analysis.fit_lens(world.model, world.tokens, n_steps=1, progress=False)
    lens.save_pretrained(out / "lens")
    sl.analysis.lens(world.model, "The cat sees", lens).save(out / "words.json")
    profile = sl.analysis.layer_profile(world.model, world.tokens, length=8, n_groups=3, n_prompts=9, progress=False)
    profile.save(out / "profile.json")
    sl.analysis.word_geometry(world.model, world.tokens, progress=False).save(out / "geometry.json")
    world.check(out, 5)


def test_documents_and_corpora(world: World, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = world.out / "documents"
    texts = world.project / "documents.txt"
    texts.write_text(
        "\n<|endoftext|>\n".join(f"A {word} text of number {i}." for i in range(12) for word in ("dry", "wet"))
    )
    world.run("embed", world.folder, texts, "--pooling", "mean", "--out", "rows", "--no-progress")
    rows = sl.Activations.load(world.project / "rows")
    coder = sl.SAE(sl.SAEConfig(d_in=32, d_sae=24, activation=sl.TopK(k=3)), seed=0)
    made = sl.harvest(coder, None, rows, world.project / "of-documents", allow_mismatch=True, progress=False)
    sl.report(made, out / "report", progress=False)
    documents = sl.corpora.pool_documents(store)
    sl.corpora.diff_corpora(documents, documents).save(out / "diff.json")
    world.check(out, 2)
    with serve_hub(monkeypatch, tmp_path) as hub:
        rows.push_to_hub("me/rows")
        made.push_to_hub("me/documents")
        files = {f"{repo}/{name}": raw for repo in ("me/rows", "me/documents") for name, raw in hub.files(repo).items()}
    assert len(files) > 5 and not find_leaks(files, world.secrets)


def test_what_is_found_in_documents(world: World, sae: sl.SAE, store: Any) -> None:
    """Families, detectors, label heads, an index and a trait, of commands that were given absolute paths."""
    out = world.out / "found"
    documents = sl.corpora.pool_documents(store)
    marks, labels, pairs = (world.project / name for name in ("marks.json", "labels.json", "pairs.jsonl"))
    marks.write_text(json.dumps({"even": [*range(0, len(store), 2)]}))
    labels.write_text(json.dumps({"odd": [*range(1, len(documents), 2)], "early": [*range(len(documents) // 2)]}))
    lines = [{"positive": f"A big {one}.", "negative": f"A {one}."} for one in ("cat", "dog")]
    pairs.write_text("\n".join(map(json.dumps, lines)))
    other = world.project / "untrained-codes"
    sl.collecting.harvest_untrained(store, sae, world.model, other, progress=False)
    world.run("families", store.folder, "--max-density", "1", "--out", out / "families.json")
    least = ["--min-count", "2", "--train-frac", "0.5"]
    found = ["--baseline", other, "--quantile", "0.05", "--out", out / "dissection.json"]
    world.run("dissect", store.folder, "--labels", marks, *least, *found)
    made = ["--untrained", other, "--epochs", "1", "--out", out / "head"]
    world.run("label-head", store.folder, "--labels", labels, *least, *made)
    world.run("monitor", world.folder, pairs, "--save", out / "trait.json", "--no-progress")
    head = sl.corpora.LabelHead.from_pretrained(out / "head")
    head.explain(store, int(store.doc_ids[0])).save(out / "explained.json")
    sl.corpora.CodeIndex.build(documents).save(out / "index.safetensors")
    world.check(out, 7)


@pytest.mark.parametrize("pattern", ["notebooks/*.ipynb", "docs/**/*.md", "*.md", "saelab/**/*.json", "findings/*"])
def test_what_the_repository_shows(pattern: str) -> None:
    """Nor does what was run by us name where: paths of homes, and of folders of this kind of machine."""
    local = re.compile(r"/(home|root|Users|work|tmp|var/folders)/(?!ada\b)[\w.-]+/[\w./-]+")
    files = [*ROOT.glob(pattern)]
    assert files
    found = [f"{file.relative_to(ROOT)}: {hit[0]}" for file in files for hit in local.finditer(file.read_text())]
    assert not found
