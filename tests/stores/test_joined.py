"""Activations of several sources side by side: what they hold, and sources that do not go together."""

from pathlib import Path

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.stores.manifest import Provenance


def acts(n: int = 300, d: int = 3, seed: int = 0, **columns: torch.Tensor) -> sl.Activations:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return sl.Activations.from_tensor(x, **columns)


def ids(n: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.randint(9, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def test_rows_are_those_of_the_sources_in_every_way_of_reading() -> None:
    a, b = acts(d=3), acts(d=2, seed=1)
    both = sl.Activations.join({"a": a, "b": b})
    whole = torch.cat([a[:], b[:]], dim=1)
    assert torch.equal(both[:], whole) and torch.equal(both[7], whole[7]) and both.d_in == 5
    assert torch.equal(both[torch.tensor([4, 2, 299])], whole[[4, 2, 299]])
    assert torch.equal(both.rows(10, 40)[5:9], whole[15:19])
    batch = torch.cat(list(both.batches(50, seed=3, epochs=1)))
    assert torch.equal(batch[batch[:, 0].argsort()], whole[whole[:, 0].argsort()])
    assert both.sources == both.rows(0, 9).sources and [s.d_in for s in both.sources or ()] == [3, 2]


def test_given_rows_pair_sources_of_other_tokens() -> None:
    a, b = acts(token_ids=ids()), acts(200, 2, seed=1, token_ids=ids(200, seed=5))
    rows = {"a": torch.tensor([5, 1, 1]), "b": torch.tensor([0, 199, 7])}
    both = sl.Activations.join({"a": a, "b": b}, rows)
    assert torch.equal(both[1:], torch.cat([a[torch.tensor([1, 1])], b[torch.tensor([199, 7])]], dim=1))
    assert a.token_ids is not None and both.token_ids is not None
    assert torch.equal(both.token_ids, a.token_ids[[5, 1, 1]])


def test_files_are_read_as_tensors_are(tmp_path: Path) -> None:
    model = sl.lm.tiny_model()
    tokens = sl.tokenize(model, ["Once upon a time there was a cat."] * 8, ctx_len=16)
    points = ["blocks.0.hook_out", "blocks.1.hook_out"]
    sl.collect(model, tokens, points, tmp_path / "acts", progress=False)
    parts = [sl.Activations.load(tmp_path / "acts", point) for point in points]
    both = sl.Activations.join(dict(zip("xy", parts, strict=True)))
    assert torch.equal(both[3:50], torch.cat([part[3:50] for part in parts], dim=1))
    origin = both.provenance
    assert origin is not None and origin.at_source("y") == parts[1].provenance
    assert Provenance.from_dict(origin.to_dict()) == origin
    assert both.doc_ids is not None and torch.equal(both.doc_ids, parts[0].doc_ids)


def test_what_does_not_go_together_is_refused() -> None:
    a = acts(token_ids=ids())
    with pytest.raises(ValueError, match="token_ids of 'a' and 'b' differ from row"):
        sl.Activations.join({"a": a, "b": acts(token_ids=ids(seed=1))})
    for wrong in ([a, a], {"a": a, "b": torch.zeros(5, 3)}):
        with unchecked(), pytest.raises(ValueError, match="must be activations by name"):
            sl.Activations.join(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="as many rows"):
        sl.Activations.join({"a": a, "b": acts(200)})
    with pytest.raises(ValueError, match="at least two"):
        sl.Activations.join({"a": a})
    with pytest.raises(ValueError, match=r"`rows` of 'b' must be row numbers in 0\.\.299"):
        sl.Activations.join({"a": a, "b": acts()}, {"b": torch.arange(1, 301)})
    with pytest.raises(ValueError, match="of the sources"):
        sl.Activations.join({"a": a, "b": acts()}, {"c": torch.arange(300)})
