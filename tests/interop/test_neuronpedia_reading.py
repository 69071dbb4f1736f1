"""What was exported for Neuronpedia, and what others published there, is read back."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import saelab as sl
from saelab.interop.neuronpedia import export_store
from saelab.interop.neuronpedia_reading import read_neuronpedia
from saelab.labels.label import Label
from saelab.labels.label_store import LabelStore


@pytest.fixture(scope="module")
def sae() -> sl.SAE:
    return sl.SAE(sl.SAEConfig(d_in=32, d_sae=40, activation=sl.AbsTopK(k=3)), seed=1)


@pytest.fixture(scope="module")
def store(sae: sl.SAE, tiny: Any, tiny_tokens: Any, tmp_path_factory: pytest.TempPathFactory) -> sl.FeatureStore:
    folder = tmp_path_factory.mktemp("read_back") / "store"
    made = sl.harvest(sae, tiny, tiny_tokens[:24], folder, hook_point="blocks.1.hook_resid_post", progress=False)
    with LabelStore.open(made) as book:
        book.add([Label(feature=5, sign=-1, text="cold", kind="input", author="rules", scores={"f1": 0.5})])
        book.set(3, "a name", author="me")
    return made


def test_an_export_is_read_back(store: sl.FeatureStore, sae: sl.SAE, tiny: Any, tmp_path: Path) -> None:
    root = export_store(store, tmp_path, "neuronpedia", sae=sae, model=tiny, features=[3, 5, 8], progress=False)
    found = read_neuronpedia(root)
    assert list(found.features) == [3, 5, 8] and found.source["id"] == "1-saelab"
    for j, one in found.features.items():
        assert one.rate == pytest.approx(len(store.feature(j)) / len(store))
        assert one.vector == pytest.approx(sae.directions()[j].float().numpy())
        assert one.promoted[0] == tuple(sl.analysis.logit_lens(sae, tiny, [j])[j].promoted[0])
        windows = found.examples([j])[j]
        assert max(map(abs, windows[0].values)) == pytest.approx(float(np.abs(store.feature(j).values).max()))
        assert {len(w.tokens) - len(w.values) for w in windows} == {0}
        assert any(w.low is None for w in windows) == (store.feature(j).values.max() > 0)
        assert min(min(w.values) for w in windows) == pytest.approx(min(store.feature(j).values.min(), 0))
    read = {(label.feature, label.sign): label for label in found.labels}
    assert (read[5, -1].text, read[5, -1].kind, dict(read[5, -1].scores)) == ("cold", "input", {"f1": 0.5})
    assert (read[3, 0].text, read[3, 0].by_person, read[3, 0].author) == ("a name", True, "a person")
    with LabelStore(tmp_path / "labels.sqlite") as book:
        assert found.add_labels(book) == 2 and book[5, -1].author == "rules"
    assert "3 features, 3 with a vector, 2 with an explanation; examples only" in str(found)


def test_what_others_published_is_read(tmp_path: Path) -> None:
    """Rows as Neuronpedia's own export writes them: few fields, numbers as texts, null for what is unknown."""
    root = tmp_path / "gpt2-small" / "6-res-jb"
    head = {"modelId": "gpt2-small", "layer": "6-res-jb"}
    write(root / "features/batch-0.jsonl.gz", [head | {"index": "12", "frac_nonzero": -1, "maxActApprox": None}])
    rows = [
        {"tokens": ["a", "b"], "values": [0, 2.5], "binMin": -1, "binMax": -1, "binContains": -1},
        {"tokens": ["c"], "values": [7], "binMin": 5, "binMax": 8, "binContains": 0.25},
    ]
    write(root / "activations/batch-0.jsonl.gz", [head | {"index": "12"} | row for row in rows])
    said = {"description": "rain", "typeName": "np_max-act", "explanationModelName": "lm-x", "embedding": "[0.5]"}
    write(root / "explanations/batch-0.jsonl.gz", [head | {"id": "c1", "index": "12"} | said])
    found = read_neuronpedia(root)
    assert (found.source["modelId"], found.source["id"]) == ("gpt2-small", "6-res-jb")
    one, [strong, weak] = found.features[12], found.examples()[12]
    assert math.isnan(one.rate) and math.isnan(one.peak) and one.vector is None
    assert (strong.tokens, strong.low, strong.share, weak.low) == (("c",), 5, 0.25, None)
    assert [(label.text, label.author) for label in found.labels] == [("rain", "lm-x, np_max-act")]


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def test_wrong_folders_and_lines_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`folder` must hold source\.jsonl"):
        read_neuronpedia(tmp_path)
    for bad in (b'{"index": "1"}\n{"ind', b'{"index": "x"}\n', b'{"index": -1}\n', b"[1]\n", b"{}\n", b"\x1f\x8bno"):
        (tmp_path / "features").mkdir(exist_ok=True)
        (tmp_path / "features/batch-0.jsonl").write_bytes(bad)
        with pytest.raises(ValueError, match=r"batch-0\.jsonl must hold JSON lines; its line \d is none"):
            _ = read_neuronpedia(tmp_path).features
