"""`saelab trace`: a graph from the shell is that of `trace`, and what is wrong is said in one line."""

from typing import Any

import numpy as np
import pytest
from transcoders_made import make_coder

import saelab as sl
from saelab.circuits.graph import AttributionGraph
from saelab.circuits.graph_reading import read_graph_file, read_graph_json
from saelab.circuits.tracing import trace
from saelab.cli.app import dispatch
from saelab.sae import CLT, CLTConfig

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    monkeypatch.setattr("saelab.lm.models.tiny_model", lambda: tiny)


def test_a_graph_is_traced_checked_and_written(tiny, tiny_tokens, capsys, tmp_path) -> None:
    coder = make_coder(is_transcoder=False)
    coder.provenance = sl.collect(tiny, tiny_tokens[:2], HOOK, progress=False).provenance
    coder.save_pretrained(tmp_path / "sae")
    words = ["trace", "tiny", str(tmp_path / "sae"), "A fox", "--no-progress"]
    assert dispatch(words) == 2 and "--allow-missing" in capsys.readouterr().err
    assert dispatch(["trace", "tiny", *[str(tmp_path / "sae")] * 2]) == 2 and "`PROMPT`" in capsys.readouterr().err
    for forgotten in ("owner/name", "release/blocks.0/width_16k", "./sae", str(tmp_path / "sae" / "config.json")):
        assert dispatch(["trace", "tiny", str(tmp_path / "sae"), forgotten]) == 2
        told = capsys.readouterr().err
        assert f"`PROMPT` must be a text after the SAEs, got '{forgotten}'" in told and "begin it with a space" in told
    # longer than a file's name may be, and of no user: texts, of which the dictionary is what is wrong
    for text in ("A fox " * 100, "~nobody sees", "and / or"):
        assert dispatch(["trace", "tiny", str(tmp_path / "sae"), text]) == 2
        assert "--allow-missing" in capsys.readouterr().err
    words += ["--allow-missing", "--target", "a", "--target", "b", "--nodes", "0.9"]
    assert dispatch([*words, "--page", str(tmp_path / "page.txt")]) == 2 and ".html" in capsys.readouterr().err
    files = [
        "--out",
        str(tmp_path / "graph.json"),
        "--json",
        str(tmp_path / "j.json"),
        "--page",
        str(tmp_path / "p.html"),
    ]
    assert dispatch([*words, "--check", *files]) == 0
    said = capsys.readouterr().out
    assert "targets: logit 'a'" in said and "the whole graph: replacement" in said and "Spearman" in said
    expected = trace(tiny, coder, "A fox", targets=["a", "b"], allow_missing=True).prune(0.9)
    found = AttributionGraph.load(tmp_path / "graph.json")
    assert str(found) == str(expected) and f"{len(found)} nodes and" in said
    np.testing.assert_allclose(found.edge_weights, expected.edge_weights)
    shared = read_graph_file(tmp_path / "j.json")
    np.testing.assert_array_equal(shared.graph.edge_weights, found.edge_weights)
    assert shared.view.node_threshold == shared.view.edge_threshold == 1, "it is pruned already"
    assert '<main id="graph">' in (tmp_path / "p.html").read_text()
    with pytest.raises(ValueError, match="read it with `read_graph_json`"):
        AttributionGraph.load(tmp_path / "j.json")
    with pytest.raises(ValueError, match=r"graph.json, which `AttributionGraph.load` reads"):
        read_graph_json(tmp_path / "graph.json")


def test_a_cross_layer_transcoder_is_recognized(tiny, tiny_tokens, capsys, tmp_path) -> None:
    n, width = tiny.cfg.n_layers, tiny.cfg.d_model
    places = [(f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out") for i in range(n)]
    acts = sl.collect(tiny, tiny_tokens[:20], [name for place in places for name in place], progress=False)
    clt = CLT(CLTConfig(n_layers=n, d_in=width, d_sae=64, activation=sl.TopK(k=4)))
    pair = tuple(sl.Activations.join({place[side]: acts[place[side]] for place in places}) for side in (0, 1))
    clt.fit(pair, sl.TrainConfig(n_tokens=100, batch_size=20), progress=False)
    clt.save_pretrained(tmp_path / "clt")
    words = ["trace", "tiny", str(tmp_path / "clt"), "A fox", "--no-progress", "--out", str(tmp_path / "graph.json")]
    assert dispatch(words) == 0 and "replacement" in capsys.readouterr().out
    expected = trace(tiny, clt, "A fox").prune()
    np.testing.assert_allclose(
        AttributionGraph.load(tmp_path / "graph.json").edge_weights, expected.edge_weights, rtol=1e-4, atol=1e-6
    )
    assert dispatch([*words, "--check"]) == 0 and "Spearman" in capsys.readouterr().out
