"""What files say is checked where it enters: damage is seen, numbers fit what they point at, nothing leaves its folder,
nothing private is shared, pages run their own scripts alone.
"""

import json
import re
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from unchecked import unchecked

import saelab as sl
from saelab.cli.app import dispatch
from saelab.labels.autointerp.endpoints import OpenAIClient
from saelab.sae.publishing import write_card
from saelab.stores import tensors as reading
from saelab.stores.files import save_tensors, write_json
from saelab.stores.tensors import TensorFile, load_tensors
from saelab.stores.validation import parse_json, read_json, read_sealed
from saelab.training.loop import Diverged
from saelab.visualization.demo_page import Bar, draw_comparison
from saelab.visualization.html import make_page, section
from tests import fuzz
from tests.pages import check_policy

KINDS = {"sae": fuzz.KINDS[0], "activations": fuzz.KINDS[2], "store": fuzz.KINDS[3], "run": fuzz.KINDS[4]}
HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind as saelab writes it."""
    folders = {}
    for name, kind in KINDS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        kind.write(folders[name])
    return folders


# ---- checksums
def flip_all(valid: dict[str, Path], n: int, seed: int = 0) -> list[str]:
    """Flip single bits evenly over the files of all kinds; returns those that nobody saw."""
    rng = np.random.default_rng(seed)
    files = [
        (kind, path)
        for kind, folder in valid.items()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".safetensors", ".json") and path.name != "strings.json"  # rewritten by hand in `fuzz`
    ]
    unseen = []
    for i in range(n):
        kind, path = files[i % len(files)]
        raw = path.read_bytes()
        at, bit = int(rng.integers(len(raw))), int(rng.integers(8))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
        try:
            KINDS[kind].read(valid[kind], None)
            unseen.append(f"{path.name} byte {at} bit {bit}")
        except (ValueError, FileNotFoundError) as error:
            if path.name not in str(error) and str(valid[kind]) not in str(error):
                unseen.append(f"{path.name} byte {at} bit {bit}: {error}")
        finally:
            path.write_bytes(raw)
    return unseen


def test_single_flipped_bits_are_all_seen(valid) -> None:
    assert flip_all(valid, 52) == []


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_all_seen(valid) -> None:
    assert flip_all(valid, 1000, seed=1) == []


def test_only_the_blocks_that_are_read_are_checked(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.arange(400_000.0).view(1000, 400), "y": torch.ones(10)})
    raw = bytearray(path.read_bytes())
    file = TensorFile.open(path)
    raw[file.specs["x"].offset + 1_500_000] ^= 1  # in row 937
    path.write_bytes(raw)
    read: list[int] = []
    crc = reading.zlib.crc32
    monkeypatch.setattr(reading.zlib, "crc32", lambda data, *more: read.append(len(data)) or crc(data, *more))
    file = TensorFile.open(path)
    read.clear()
    file.check("x", 0, 1)
    assert sum(read) == reading.BLOCK
    assert not file.check("x", 0, 1) and len(read) == 1  # once
    file.check_rows("x", np.array([3, 200, 400]))
    assert len(read) == 3
    with pytest.raises(ValueError, match=r"a\.safetensors must hold what was written.*of 'x'"):
        file.check_rows("x", np.array([3, 937]))


def test_files_without_checksums_are_read(valid, tmp_path) -> None:
    kept = safetensors.torch.load_file(valid["sae"] / "model.safetensors")
    safetensors.torch.save_file(kept, tmp_path / "model.safetensors")
    config = read_json(valid["sae"] / "config.json")
    del config["crc32"]
    write_json(tmp_path / "config.json", config)
    old, new = sl.SAE.from_pretrained(tmp_path), sl.SAE.from_pretrained(valid["sae"])
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True))


def test_an_edited_config_may_be_read_without_its_checksum(valid, tmp_path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((valid["sae"] / name).read_bytes())
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"seed": 0', '"seed": 1', 1))
    with pytest.raises(ValueError, match=r'config.json.*another checksum.*remove its line "crc32"'):
        sl.SAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(re.sub(r',\s*"crc32": "\w+"', "", (tmp_path / "config.json").read_text()))
    assert sl.SAE.from_pretrained(tmp_path).training_["seed"] in (0, 1)


def test_a_store_of_ten_million_tokens_opens_at_once(tmp_path) -> None:
    n, n_shards = 250_000, 40
    shard = {
        "offsets": torch.zeros(n + 1, dtype=torch.int32), "feature_offsets": torch.zeros(33, dtype=torch.int32),
        "latents": torch.zeros(0, dtype=torch.uint8), "feature_tokens": torch.zeros(0, dtype=torch.int32),
        "places": torch.arange(n, dtype=torch.int32), "values": torch.zeros(0), "feature_values": torch.zeros(0),
    }  # fmt: skip
    crc32 = save_tensors(tmp_path / "shard-00000.safetensors", shard)
    shards = []
    for i in range(n_shards):
        file = f"shard-{i:05d}.safetensors"
        if i:
            (tmp_path / file).hardlink_to(tmp_path / "shard-00000.safetensors")
        shards.append(sl.stores.manifest.Shard(file=file, n_tokens=n, crc32=crc32))
    origin = fuzz.activations().provenance.to_dict()
    sl.stores.manifest.FeatureManifest(
        d_sae=32, dtype="float32", sae={}, request={}, provenance=origin, shards=tuple(shards), complete=True
    ).save(tmp_path)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        store = sl.FeatureStore.load(tmp_path)
        seconds.append(time.perf_counter() - start)
    assert len(store) == 10_000_000
    assert min(seconds) < 1, seconds  # LOG.md has what it takes; here only that nothing is read


# ---- numbers that point at others
@pytest.mark.parametrize(
    ("name", "at", "value"),
    [("offsets", -1, 5000), ("offsets", 3, 4999), ("feature_offsets", 0, 1), ("latents", 0, 200), ("values", 5, 0.0),
     ("feature_tokens", 0, 251), ("feature_values", 0, float("nan")), ("places", -1, 10_000)],
)  # fmt: skip
def test_numbers_beyond_their_bounds_reach_no_kernel(valid, tmp_path, name, at, value) -> None:
    for path in valid["store"].iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "shard-00000.safetensors"
    held = load_tensors(shard)
    held[name][at] = value
    save_tensors(shard, held)
    store = sl.FeatureStore.load(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(tmp_path))}.* {name} |`{name}` of {re.escape(str(tmp_path))}"
    ):
        store.matrix(), store.columns(), store.places


# ---- names, widths, layouts
@pytest.mark.parametrize("name", ["../a", "/etc/hostname", "a/b", "a\\b", "a\0b", "CON", "..", "", "nul.safetensors"])
def test_names_in_a_manifest_are_no_paths(valid, tmp_path, name) -> None:
    manifest = read_json(valid["activations"] / "manifest.json")
    del manifest["crc32"]
    manifest["shards"][0]["file"] = name
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(ValueError, match=r"manifest.json.*must be named by letters"):
        sl.Activations.load(tmp_path)


def test_links_out_of_the_folder_are_refused_and_those_of_the_hubs_cache_are_not(valid, tmp_path) -> None:
    home = tmp_path / "models--a--b" / "snapshots" / "1"
    for folder, target in ((tmp_path / "plain", tmp_path / "elsewhere"), (home, home.parents[1] / "blobs")):
        folder.mkdir(parents=True), target.mkdir()
        for path in valid["activations"].iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        shard = folder / "shard-00000.safetensors"
        shard.rename(target / "x")
        shard.symlink_to(target / "x")
    with pytest.raises(ValueError, match="got a link to"):
        sl.Activations.load(tmp_path / "plain")
    assert len(sl.Activations.load(home)) == 600


def test_exports_stay_in_the_folder_they_were_given(valid, tmp_path) -> None:
    store = sl.FeatureStore.load(valid["store"])
    bad = store.manifest.provenance | {"hook_point": "../../out", "model": "../.."}
    store.manifest.__dict__["provenance"] = bad  # as a stranger's manifest says it
    inside = tmp_path / "deep" / "er" / "out"
    for form in ("delphi", "neuronpedia", "saedashboard"):
        sl.interop.export_store(store, inside / form, format=form, features=[0], pad_id=0, progress=False)
    assert [path for path in tmp_path.iterdir() if path.name != "deep"] == []
    assert {path.name for path in (tmp_path / "deep" / "er").iterdir()} == {"out"}


def test_what_a_config_claims_takes_no_memory(valid, tmp_path, monkeypatch) -> None:
    """An archetypal config beyond its file is refused with no number of its size drawn."""
    fuzz.write_sae(tmp_path, dictionary=sl.Archetypal(n_points=16))
    described = read_json(tmp_path / "config.json")
    del described["crc32"]
    described["config"]["dictionary"]["n_points"] = 4096
    write_json(tmp_path / "config.json", described)
    monkeypatch.setattr("saelab.sae.archetypal._draw_weights", None)
    with pytest.raises(ValueError, match=r"must fit its config\.json"):
        sl.SAE.from_pretrained(tmp_path)
    described["config"]["d_sae"] = 2**40
    write_json(tmp_path / "config.json", described)
    with pytest.raises(ValueError, match=r"`d_sae` must be below 2\^31"):
        sl.SAE.from_pretrained(tmp_path)


def header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def test_tensors_that_overlap_or_leave_gaps_are_refused(tmp_path) -> None:
    x, path = {"dtype": "F32", "shape": [2]}, tmp_path / "a.safetensors"
    for second, match in (([4, 12], "overlaps"), ([12, 20], "gap")):
        entries = {"x": x | {"data_offsets": [0, 8]}, "y": x | {"data_offsets": second}}
        path.write_bytes(header(entries) + bytes(second[1]))
        with pytest.raises(ValueError, match=rf"a.safetensors.*{match}"):
            load_tensors(path)
    path.write_bytes(header({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}) + bytes(1))
    with pytest.raises(ValueError, match=r"got 'F4' for 'x'"):
        load_tensors(path)


def test_eight_bit_floats_are_read(tmp_path) -> None:
    held = {"x": torch.tensor([1.0, -0.5]).to(torch.float8_e4m3fn), "y": torch.ones(3).to(torch.float8_e5m2)}
    safetensors.torch.save_file(held, tmp_path / "a.safetensors")
    assert {name: x.float().tolist() for name, x in load_tensors(tmp_path / "a.safetensors").items()} == {
        "x": [1.0, -0.5],
        "y": [1.0, 1.0, 1.0],
    }


@pytest.mark.parametrize(
    ("text", "match"),
    [('{"a": 1, "a": 2}', "twice"), ("[" * 5000 + "]" * 5000, "deeper"), ('{"a": NaN}', "NaN"), ("1" * 30, "64 bits"),
     ("\ud800".encode("utf-8", "surrogatepass"), "decode"), ('{"a": 1}'.encode("utf-16"), "decode")],
)  # fmt: skip
def test_json_that_is_none_or_means_two_things(text, match) -> None:
    with pytest.raises(ValueError, match=match):
        parse_json(text)


def test_a_sample_of_the_fuzzer_is_clean() -> None:
    outcomes, unclean = fuzz.run(100, seed=7)
    assert unclean == [] and outcomes["refused"] > 50


# ---- budgets, and numbers that are not finite
@pytest.mark.parametrize("wrong", [{"n_tokens": 0}, {"n_tokens": 1e5}, {"batch_size": 2.5}, {"batch_size": 0}])
def test_budgets_are_whole_numbers(wrong) -> None:
    with unchecked(), pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be a whole number of at least 1"):
        sl.TrainConfig(**wrong)


@pytest.mark.parametrize(("n_tokens", "size"), [(300, 300), (184_319, 512), (368_640, 1024), (2_000_000, 4096)])
def test_short_runs_have_small_batches(n_tokens, size) -> None:
    run = sl.TrainConfig(n_tokens=n_tokens)
    assert run.batch_size == size and (run.n_steps >= 360 or size <= 512)
    assert sl.TrainConfig(n_tokens=n_tokens, batch_size=7 % n_tokens).batch_size == 7


@pytest.mark.parametrize("lr", [float("inf"), float("nan"), -1.0, 0.0])
def test_a_rate_must_be_a_rate(lr) -> None:
    with pytest.raises(ValueError, match="`lr` must be positive and finite"):
        sl.TrainConfig(lr=lr)


def test_weights_and_rows_that_are_not_finite_are_said_where_they_come_in(valid, tmp_path) -> None:
    sae, cfg = sl.SAE.from_pretrained(valid["sae"]), sl.TrainConfig(n_tokens=512, batch_size=128)
    x = fuzz.activations()[:]
    x[-3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"Held-out activations must be finite, 1 of 60 tokens.*held-out row 57"):
        sl.SAE(sae.cfg).fit(x, cfg, progress=False)
    with torch.no_grad():
        sae.W_dec[5, 3] = torch.nan
    with pytest.raises(ValueError, match="Weights must be finite before they are trained, got NaN or inf in W_dec"):
        sae.fit(fuzz.activations(), cfg, progress=False)
    sae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 of 256 in W_dec are NaN or infinite, the first at \[5, 3\]"):
        sl.SAE.from_pretrained(tmp_path)


def test_a_run_that_diverges_says_so_and_keeps_its_last_good_checkpoint(tmp_path, monkeypatch) -> None:
    cfg = sl.TrainConfig(n_tokens=1024, batch_size=128, save_every_tokens=256)
    from saelab.training import loop
    from saelab.training.optimizer import step_adam

    step, n = step_adam, [0]

    def break_down(module, *others):
        n[0] += 1
        step(module, *others)
        if n[0] == 5:
            with torch.no_grad():
                module.b_dec[0] = torch.inf

    monkeypatch.setattr(loop, "step_adam", break_down)
    with pytest.raises(Diverged, match=r"between steps 4 and 5.*b_dec.*is as it was last saved.*smaller `lr`"):
        sl.SAE(sl.SAEConfig(d_in=8, d_sae=32, activation=sl.TopK(k=2))).fit(
            fuzz.activations(), cfg, out=tmp_path, progress=False
        )
    assert read_json(tmp_path / "checkpoint" / "progress.json")["step"] == 4
    weights = load_tensors(tmp_path / "checkpoint" / "weights_0.safetensors")
    assert all(bool(x.isfinite().all()) for x in weights.values())


# ---- what is shared, and what is shown
def test_no_local_path_reaches_what_is_shared(tmp_path, monkeypatch) -> None:
    home = tmp_path / "ada-lovelace"
    sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=32, activation=sl.AbsTopK(k=2)))
    sae.save_pretrained(home / "sae")
    acts = fuzz.activations()
    acts.provenance.__dict__.update(model=str(home / "models" / "tiny"), text=str(home / "text.txt"))
    sae.fit(acts, sl.TrainConfig(n_tokens=512, batch_size=128), progress=False)
    sae.save_pretrained(home / "sae")
    store = sl.harvest(sae, None, acts, home / "store", allow_mismatch=True, progress=False)
    sl.report(store, home / "report.html", features=[0], progress=False)
    for form in ("delphi", "neuronpedia", "saedashboard"):
        sl.interop.export_store(store, home / form, format=form, features=[0], pad_id=0, progress=False)
    sae.save_pretrained(home / "saelens", "saelens")
    (home / "card.md").write_text(write_card(sae, "ada/sae", "saelab", None))
    told = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert len(told) > 12
    assert [path.name for path, held in told.items() if b"lovelace" in held] == []
    assert "base_model" not in (home / "card.md").read_text()
    assert store.manifest.sae["name_or_path"] == "../sae"


def test_a_password_in_an_address_is_nowhere_shown() -> None:
    client = OpenAIClient("m", "http://ada:hunter2@127.0.0.1:9/v1", timeout=0.2)
    assert "hunter2" not in repr(client) and "127.0.0.1" in repr(client)
    with pytest.raises(Exception, match="connection") as caught:
        client.complete([{"role": "user", "content": "hello"}])
    assert "hunter2" not in str(caught.value)
    client.close()


def test_a_store_has_nothing_fetched(valid, tmp_path, monkeypatch, capsys) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *names, **more: asked.append(names[0]) or [])
    monkeypatch.setattr(sl.FeatureStore, "provenance", fuzz.activations().provenance, raising=False)
    store = sl.FeatureStore.load(valid["store"])
    store.manifest.sae["name_or_path"] = "some/sae"
    from saelab.cli.inputs import open_model, open_sae

    assert open_sae(store, None) is None and open_model(store, None, False) is None
    assert asked == [] and "give --sae" in capsys.readouterr().err and not constants.HF_HUB_OFFLINE


def test_the_shell_shows_what_a_terminal_would_obey(valid, tmp_path, capsys) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((valid["sae"] / name).read_bytes())
    described = read_json(tmp_path / "config.json")
    del described["crc32"]
    described["provenance"]["text"] = "\x1b[2J\x9b31m\u202etxt"
    write_json(tmp_path / "config.json", described)
    assert dispatch(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2J" in out and not set(out) & set("\x1b\x9b\u202e")
    assert dispatch(["info", str(tmp_path / "\x1b]0;x")]) == 2
    assert "\x1b" not in capsys.readouterr().err


# ---- pages
def test_every_page_runs_its_own_scripts_alone(valid, tmp_path, monkeypatch) -> None:
    store = sl.FeatureStore.load(valid["store"])
    sl.report(store, tmp_path / "one.html", labels={0: HOSTILE}, title=HOSTILE, progress=False)
    monkeypatch.setattr("saelab.visualization.reports.ON_ONE_PAGE", 0)
    sl.report(store, tmp_path / "many", labels={0: HOSTILE}, progress=False)
    figure = draw_comparison([Bar(HOSTILE, True, 0.5, 0.4, 0.3, 0.2)])
    pages = [(tmp_path / "one.html").read_text(), (tmp_path / "many" / "index.html").read_text()]
    pages += [make_page("t", HOSTILE, [section(HOSTILE, figure)]), make_page("t", "lead", [])]
    for page in pages:
        check_policy(page)


def test_what_was_read_is_what_its_checksum_is_held_against(tmp_path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"k": 1}, sealed=True)
    held, check = read_sealed(path)
    write_json(path, {"k": 2}, sealed=True)  # somebody puts a new one in its place
    check()
    assert held["k"] == 1
    path.write_text(path.read_text().replace("2", "3", 1))
    _, check = read_sealed(path)
    with pytest.raises(ValueError, match="another checksum"):
        check()
