"""Latents of one source and of both: hand-made crosscoders with known answers, and planted atoms found by training."""

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.sae.objectives import SourceNormsLoss
from saelab.stores import JoinedSource
from saelab.universality import ModelDiff, diff_models, score_translation
from saelab.universality.latent_scaling import cut_blocks

D = 8
PAIR = (JoinedSource(name="base", d_in=D), JoinedSource(name="tuned", d_in=D))


def join(a: torch.Tensor, b: torch.Tensor) -> sl.Activations:
    return sl.Activations.join({"base": sl.Activations.from_tensor(a), "tuned": sl.Activations.from_tensor(b)})


def handmade() -> sl.SAE:
    """Latents that read unit vector j of base (the last of tuned); their decoders say what they say.

    0 shared, 1 weak but left out of tuned's decoder, 2 in base alone, 3 and 4 one atom, of which either has one side, 5
    weak and decoded so, 6 in tuned alone.
    """
    cfg = sl.SAEConfig(d_in=2 * D, d_sae=8, activation=sl.ReLU(target_l0=2.0), normalizer="none", sources=PAIR,
                       dictionary="free", objective=(sl.ReconstructionLoss(),))  # fmt: skip
    sae = sl.SAE(cfg, seed=0)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.W_dec.zero_()
        sae.b_enc.zero_()
        for latent, atom, base, tuned in ((0, 0, 1.0, 1.0), (1, 1, 1.0, 0.0), (2, 2, 1.0, 0.0), (3, 3, 1.0, 0.0),
                                          (4, 3, 0.0, 1.0), (5, 4, 1.0, 0.3), (6, 5, 0.0, 1.0)):  # fmt: skip
            sae.W_enc[atom + (D if base == 0 else 0), latent] = 1.0
            sae.W_dec[latent, atom], sae.W_dec[latent, D + atom] = base, tuned
    return sae


def worlds(n: int = 6000) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    z = (torch.rand(n, D, generator=g) < 0.3) * (1 + torch.rand(n, D, generator=g))
    in_tuned = torch.tensor([1.0, 0.4, 0.0, 1.0, 0.3, 1.0, 0.0, 0.0])
    in_base = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    return z * in_base, z * in_tuned


def test_strengths_are_those_that_were_written() -> None:
    diff = diff_models(handmade(), join(*worlds()), min_count=20)
    assert diff.kinds[:7] == (
        "shared",
        "weak_in_b",
        "only_a",
        "decoupled_in_b",
        "decoupled_in_a",
        "weak_in_b",
        "only_b",
    )
    assert diff.kinds[7] == "silent" and np.isnan(diff.nu_error[7])
    # the norms alone see four latents of one source more than there are
    assert diff.kinds_by_norm[:7] == ("shared", "only_a", "only_a", "only_a", "only_b", "weak_in_b", "only_b")
    assert np.flatnonzero(diff.shrunk).tolist() == [1]
    # nothing but the written strengths is in the errors: exact up to float32
    assert np.allclose(diff.nu_error[:7], [1, 0.4, 0, 0, 0, 0.3, 0], atol=1e-5)
    assert np.allclose(diff.nu_reconstruction[[3, 4]], 1, atol=1e-5)
    # independent codes: the reconstruction of the other source has nothing of a private latent but chance, 3 sd
    assert abs(diff.nu_reconstruction[2]) < 3 / 6000**0.5 / 0.3**0.5
    assert np.allclose(diff.relative_norm[:7], [0.5, 0, 0, 0, 1, 0.3 / 1.3, 1], atol=1e-6)
    assert diff.top("only_b") == [6] and diff.counts["weak_in_b"] == 2
    with unchecked(), pytest.raises(ValueError, match=r"`side` must be 'a' .* got 'tuned'"):
        diff.rank("tuned")  # type: ignore[arg-type]
    with unchecked(), pytest.raises(ValueError, match=r"`kind` must be one of .* got 'only'"):
        diff.top("only")  # type: ignore[arg-type]
    # what is decoupled is in both: it is of no model
    assert diff.rank("b") == [6] and diff.rank("a")[0] == 2 and set(diff.rank("a")) == {1, 2, 5}
    assert diff.gain[7] == 0
    assert diff.fvu["base"] < 1e-6 and 0.01 < diff.fvu["tuned"] < 0.1
    assert "only tuned" in str(diff) and "giraffe" in diff.format({6: "giraffe"})


def test_a_turned_latent_is_told_from_a_weak_one() -> None:
    base, _ = worlds()
    tuned = base.clone()
    # atom 0 turned by 70 degrees into an unused coordinate, atom 1 shrunk to .4
    tuned[:, 6], tuned[:, 0] = base[:, 0] * np.sin(np.radians(70)), base[:, 0] * np.cos(np.radians(70))
    tuned[:, 1] = 0.4 * base[:, 1]
    sae = handmade()
    with torch.no_grad():
        sae.W_dec[0, D], sae.W_dec[0, D + 6] = np.cos(np.radians(70)), np.sin(np.radians(70))
        sae.W_dec[0] /= 1.001  # rounding would decide which source is the stronger one
        sae.W_dec[0, :D] *= 1.001
    diff = diff_models(sae, join(base, tuned))
    assert diff.kinds[:2] == ("weak_in_b", "weak_in_b")
    assert np.flatnonzero(diff.turned).tolist() == [0] and "1 of them turned" in str(diff)
    # along the own row the product of two halves of 6,000 rows: exact but for what the errors have by chance
    assert np.allclose(diff.nu_free[:2], [1, 0.4], atol=0.02)
    assert np.allclose(diff.nu_error[:2], [np.cos(np.radians(70)), 0.4], atol=0.02)


def test_limits_of_a_null_pair_judge_the_same_latents_again() -> None:
    diff = diff_models(handmade(), join(*worlds()), min_count=20)
    # a null pair whose training left strengths of .35 to .9: what is weak at .4 is no more than chance, at .3 it is
    null = replace(diff, kinds=("shared",) * 8, nu_error=np.linspace(0.35, 0.9, 8))
    limit = np.quantile(null.nu_error, 0.05)
    found = diff.calibrate(null)
    assert found.shared == pytest.approx(limit) and found.absent == diff.absent and 0.3 < limit < 0.4
    assert found.kinds == (
        "shared",
        "shared",
        "only_a",
        "decoupled_in_b",
        "decoupled_in_a",
        "weak_in_b",
        "only_b",
        "silent",
    )
    # nothing changed in the null pair: .4 is no chance; and a limit below `absent` moves both
    still = replace(null, nu_error=np.linspace(0.95, 1, 8))
    assert diff.calibrate(still).counts["weak_in_b"] == 2
    loose = diff.calibrate(replace(null, nu_error=np.full(8, 0.1)))
    assert loose.absent == loose.shared == pytest.approx(0.1) and loose.counts["shared"] == 3
    assert np.array_equal(found.nu_error, diff.nu_error, equal_nan=True) and diff.shared == 0.5
    # whether others stand for what is weak or absent has to be known
    blind = replace(diff, nu_reconstruction=np.full(8, np.nan)).calibrate(still)
    assert blind.kinds == ("shared", *["unsure"] * 6, "silent")
    # what a null pair gained is not ranked
    gained = diff.calibrate(replace(still, surplus=np.full(8, 0.7)))
    assert gained.least_gain == pytest.approx(float((0.49 * diff.variance_frac)[:7].max()))
    assert gained.rank("a") == [j for j in diff.rank("a") if diff.gain[j] > gained.least_gain] == [2]
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="`level` must be between 0 and 1"):
            diff.calibrate(null, level)
    with pytest.raises(ValueError, match=r"with judged latents, got 0\.05 and 0 latents"):
        diff.calibrate(replace(null, kinds=("unsure",) * 8))
    with pytest.raises(ValueError, match=r"A null pair must keep its latents: 95% .* got -0\.28"):
        diff.calibrate(replace(null, nu_error=np.linspace(-0.3, 0.1, 8)))


def test_blocks_are_of_whole_documents_where_there_are_enough() -> None:
    ids = np.repeat(np.arange(50), np.random.default_rng(0).integers(5, 40, 50))
    borders = np.flatnonzero(np.diff(ids)) + 1
    cuts = cut_blocks(len(ids), ids, 10)
    assert len(cuts) == 11 and set(cuts[1:-1]) <= set(borders) and (cuts[0], cuts[-1]) == (0, len(ids))
    assert np.diff(cuts).max() < 2 * len(ids) / 10
    # a book is one document: its parts are blocks; and of fewer rows than blocks each is one
    assert cut_blocks(3000, np.repeat([0, 1], [2999, 1]), 4).tolist() == [0, 750, 1500, 2250, 3000]
    assert cut_blocks(3, None).tolist() == [0, 1, 2, 3]


def draw_documents(g: torch.Generator, n_docs: int, strength: torch.Tensor, noise: float = 0.5) -> sl.Activations:
    """Documents of 20 tokens in which every row comes 4 times: a fourth as much to learn from as there are rows."""
    z = (torch.rand(n_docs * 5, len(strength), generator=g) < 0.3) * (
        1 + torch.rand(n_docs * 5, len(strength), generator=g)
    )
    tuned = z * strength + noise * torch.randn(z.shape, generator=g)
    docs = torch.arange(n_docs, dtype=torch.int32).repeat_interleave(20)
    parts = (sl.Activations.from_tensor(x.repeat_interleave(4, 0), doc_ids=docs) for x in (z, tuned))
    return sl.Activations.join(dict(zip(("base", "tuned"), parts, strict=True)))


def reader(n: int) -> sl.SAE:
    """n latents that read and write one coordinate of base each, with rows of norm 2."""
    cfg = sl.SAEConfig(d_in=2 * n, d_sae=n, activation=sl.ReLU(target_l0=2.0), normalizer="none", dictionary="free",
                       sources=tuple(JoinedSource(name=name, d_in=n) for name in ("base", "tuned")),
                       objective=(sl.ReconstructionLoss(),))  # fmt: skip
    sae = sl.SAE(cfg, seed=0)
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([2 * torch.eye(n), torch.zeros(n, n)], 1))
        sae.W_enc.copy_(sae.W_dec.T / 4)
        sae.b_enc.zero_()
    return sae


@unchecked()  # 60 equal calls
def test_standard_errors_are_the_deviations_over_samples_of_documents() -> None:
    g, sae, strength = torch.Generator().manual_seed(3), reader(D), torch.linspace(0, 0.9, D)
    drawn = [diff_models(sae, draw_documents(g, 60, strength)) for _ in range(60)]
    for name in ("nu_error", "surplus"):
        found = np.std([getattr(one, name) for one in drawn], axis=0)
        said = np.mean([getattr(one, f"{name}_se") for one in drawn], axis=0)
        # 60 draws: 9 % sd of a deviation, times 4; tokens taken for independent would say half
        assert np.allclose(said, found, rtol=0.4), name
        assert said.mean() == pytest.approx(found.mean(), rel=0.15)  # of 8 latents
    assert np.allclose(np.mean([one.nu_error for one in drawn], axis=0), strength, atol=0.02)
    assert np.allclose(np.mean([one.surplus for one in drawn], axis=0), 1 - strength, atol=0.02)  # in units of the row
    # squared codes spread over 60 blocks nearly evenly
    assert (drawn[0].freedom > 30).all() and (drawn[0].freedom < 60).all()


@unchecked()  # 60 equal calls
def test_private_latents_are_called_at_the_stated_rate_where_none_is() -> None:
    """Strengths at the very limit, where evidence is easiest to mistake."""
    g, n, n_samples = torch.Generator().manual_seed(4), 30, 60
    sae, strength = reader(n), torch.full((n,), 0.2)
    calls = [
        sum("only" in kind for kind in diff_models(sae, draw_documents(g, 40, strength)).kinds)
        for _ in range(n_samples)
    ]
    # samples with any such call: at most 5 %, 3 of 60; 4 sd of a binomial above
    assert sum(n > 0 for n in calls) <= 3 + 4 * (60 * 0.05 * 0.95) ** 0.5
    # without correction and standard errors half of them are below the limit
    assert np.mean(diff_models(sae, draw_documents(g, 40, strength)).nu_error < 0.2) > 0.2
    strength[:3] = 0
    found = diff_models(sae, draw_documents(g, 200, strength))
    assert found.kinds[:3] == ("only_a",) * 3 and {*found.kinds[3:]} <= {"unsure", "weak_in_b", "only_a"}


def test_what_a_few_documents_say_is_unsure() -> None:
    """A latent that tuned lacks is called so where many documents say so, and not where one or three do."""
    g, n_docs = torch.Generator().manual_seed(5), 100
    z = 1 + torch.rand(n_docs * 20, 4, generator=g)
    doc_of = torch.arange(n_docs).repeat_interleave(20)
    for latent, n_of in ((1, 1), (2, 3)):
        z[doc_of >= n_of, latent] = 0
    z[torch.rand(z.shape, generator=g) < 0.5] = 0
    docs = doc_of.to(torch.int32)
    b = 0.3 * torch.randn(z.shape, generator=g)
    acts = sl.Activations.join(
        {name: sl.Activations.from_tensor(x, doc_ids=docs) for name, x in (("base", z), ("tuned", b))}
    )
    diff = diff_models(reader(4), acts, min_count=5)
    assert diff.kinds == ("only_a", "unsure", "unsure", "only_a")
    assert np.isnan(diff.nu_error_se[1]) and diff.freedom[1] < 0.5 < diff.freedom[2] < 3
    assert 1 not in diff.rank("a")  # without a standard error there is no evidence
    none = diff_models(reader(4), acts, min_count=10**6)
    assert set(none.kinds) == {"unsure"} and none.rank("a") == [] and np.isnan(none.nu_error_se).all()


def test_a_direction_that_other_latents_cancel_is_no_private_one() -> None:
    """Latent 0 writes along coordinate 0, and latent 1, which fires with it, takes that away and more: the ratio of
    reconstructions has nothing to be of, and says nothing."""
    a, b = worlds()
    a, b = a.clone(), b.clone()
    a[:, 1] = a[:, 0]
    a[:, 0] *= -0.5  # what is left of both
    b[:, :2] = 0
    sae = handmade()
    with torch.no_grad():
        sae.W_enc[:, :2] = 0
        sae.W_enc[1, 0] = sae.W_enc[1, 1] = 1.0
        sae.W_dec[0], sae.W_dec[1] = 0, 0
        sae.W_dec[0, 0], sae.W_dec[1, 0], sae.W_dec[1, 1] = 1.0, -1.5, 1.0
    diff = diff_models(sae, join(a, b))
    assert np.isnan(diff.nu_reconstruction[0]) and abs(diff.nu_error[0]) < 0.05
    assert diff.kinds[0] == "unsure" and diff.surplus[0] < 0 and 0 not in diff.rank("a")
    assert diff.kinds[1] == "only_a"


def test_what_others_reconstruct_is_decoupled_however_weak_the_latent_is() -> None:
    """Tuned has the atom as strong as base; a third of it stands in this latent's row, the rest in another's."""
    a, _ = worlds()
    sae = handmade()
    with torch.no_grad():
        sae.W_dec[7] = 0
        sae.W_enc[0, 7] = 1.0
        sae.W_dec[0, D], sae.W_dec[7, D] = 0.3, 0.7
    diff = diff_models(sae, join(a, a))
    assert diff.nu_error[0] == pytest.approx(0.3, abs=0.01) and diff.kinds[0] == "decoupled_in_b"
    assert diff.surplus[0] == pytest.approx(0, abs=0.01) and diff.gain[0] < 1e-4


def test_other_spaces_are_compared_without_directions() -> None:
    """Tuned in a turned space of another width: strengths from the best direction."""
    a, b = worlds()
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0))).Q[:D]
    sae, plain = handmade(), diff_models(handmade(), join(a, b))
    sources = (PAIR[0], JoinedSource(name="tuned", d_in=12))
    other = sl.SAE(sl.SAEConfig(d_in=20, d_sae=8, activation=sae.cfg.activation, normalizer="none", sources=sources,
                                dictionary="free", objective=(sl.ReconstructionLoss(),)))  # fmt: skip
    with torch.no_grad():
        other.b_enc.zero_()
        other.W_dec.copy_(torch.cat([sae.W_dec[:, :D], sae.W_dec[:, D:] @ turn], 1))
        other.W_enc.copy_(torch.cat([sae.W_enc[:D], turn.T @ sae.W_enc[D:]]))
    diff = diff_models(other, join(a, b @ turn))
    assert diff.kinds == plain.kinds
    assert np.allclose(diff.nu_error[:7], plain.nu_error[:7], atol=0.02)
    with pytest.raises(ValueError, match="`same_space` must be False"):
        diff_models(other, join(a, b @ turn), same_space=True)


class Planted(NamedTuple):
    acts: sl.Activations
    rows: torch.Tensor
    in_base: torch.Tensor
    in_tuned: torch.Tensor
    kinds: list[str]


def plant(n: int, seed: int, weak: float = 0.25, d: int = 24) -> Planted:
    g = torch.Generator().manual_seed(seed)
    kinds = ["shared"] * 12 + ["only_a"] * 4 + ["only_b"] * 4 + ["weak_in_b"] * 4
    rows = torch.randn(24, d, generator=torch.Generator().manual_seed(99))
    rows /= rows.norm(dim=1, keepdim=True)
    in_base = torch.tensor([float(kind != "only_b") for kind in kinds])
    in_tuned = torch.tensor([{"only_a": 0.0, "weak_in_b": weak}.get(kind, 1.0) for kind in kinds])
    z = (torch.rand(n, 24, generator=g) < 0.08) * (1 + torch.rand(n, 24, generator=g))
    a, b = (z @ (rows * there[:, None]) + 0.02 * torch.randn(n, d, generator=g) for there in (in_base, in_tuned))
    return Planted(join(a, b), rows, in_base, in_tuned, kinds)


def train(world: Planted, activation: sl.TopK | sl.ReLU, *terms: object) -> sl.SAE:
    cfg = sl.SAEConfig(d_in=world.acts.d_in, d_sae=32, sources=world.acts.sources, activation=activation,
                       objective=(sl.ReconstructionLoss(), *terms))  # fmt: skip
    run = sl.TrainConfig(n_tokens=150_000, batch_size=500)
    return sl.SAE(cfg, seed=0).fit(world.acts, run, progress=False)


def found_kinds(world: Planted, sae: sl.SAE, diff: ModelDiff, by_norm: bool = False) -> dict[str, Counter[str]]:
    """Kinds of the latents nearest to the atoms of each kind, among those that fire."""
    found: dict[str, Counter[str]] = {}
    fires = torch.from_numpy(diff.firings > 20)
    for atom, kind in enumerate(world.kinds):
        side = slice(24, None) if kind == "only_b" else slice(0, 24)
        rows = sae.W_dec.detach()[:, side]
        near = (rows @ world.rows[atom] / rows.norm(dim=1).clamp(min=1e-6)).where(fires, -1.0)
        assert near.max() > 0.9, (kind, near.max())
        said = (diff.kinds_by_norm if by_norm else diff.kinds)[int(near.argmax())]
        found.setdefault(kind, Counter())[said] += 1
    return found


def test_planted_atoms_get_their_labels_where_an_l1_crosscoder_errs() -> None:
    world, test = plant(10_000, seed=0), plant(8_000, seed=5)
    right = {"shared": {"shared": 12}, "only_a": {"only_a": 4}, "only_b": {"only_b": 4}, "weak_in_b": {"weak_in_b": 4}}
    sae = train(world, sl.BatchTopK(k=2), sl.AuxK())
    diff = diff_models(sae, test.acts)
    assert found_kinds(world, sae, diff) == right
    assert not diff.shrunk.any()
    # the same L0 by L1: the decoder has no row for weak atoms, and its norms call them base's own
    sae = train(world, sl.ReLU(target_l0=2.0), SourceNormsLoss())
    diff = diff_models(sae, test.acts)
    assert found_kinds(world, sae, diff, by_norm=True)["weak_in_b"] == {"only_a": 4}
    assert found_kinds(world, sae, diff) == right  # latent scaling finds them in what the reconstruction misses
    assert diff.shrunk.sum() >= 4


def test_two_copies_have_nothing_of_their_own() -> None:
    """A null pair: the same activations with noise of their own in either."""
    world = plant(10_000, seed=0)
    base = world.acts[:][:, :24]
    g = torch.Generator().manual_seed(4)
    a, b = (base + 0.05 * torch.randn(base.shape, generator=g) for _ in range(2))
    pair = world._replace(acts=join(a, b))
    diff = diff_models(train(pair, sl.BatchTopK(k=2), sl.AuxK()), pair.acts)
    assert set(diff.counts) <= {"shared", "unsure", "silent"} and diff.counts["shared"] >= 20


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"a": "tuned", "b": "tuned"}, "two sources"),
        ({"b": "other"}, "one of the sources"),
        ({"absent": 0.6}, "absent <= shared"),
        ({"fdr": 0.0}, "`fdr` must be between 0 and 1"),
    ],
)
def test_wrong_arguments(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        diff_models(handmade(), join(*worlds(100)), **wrong)


def test_wrong_pairs() -> None:
    plain = sl.SAE(sl.SAEConfig(d_in=16, d_sae=32), seed=0)
    for call in (diff_models, score_translation):
        with pytest.raises(ValueError, match="must be a crosscoder"):
            call(plain, join(*worlds(100)))
        with pytest.raises(ValueError, match="must have the sources of the SAE"):
            call(
                handmade(),
                sl.Activations.join(dict(zip("ab", map(sl.Activations.from_tensor, worlds(9)), strict=True))),
            )
        with pytest.raises(ValueError, match="as wide as all sources"):
            call(handmade(), sl.Activations.from_tensor(torch.ones(9, 8)))


def test_a_latent_of_equal_norms_is_ranked_where_its_kind_says() -> None:
    rows = torch.eye(3)
    sae = sl.SAE(sl.SAEConfig(d_in=6, d_sae=3, sources=join(rows, rows).sources, activation=sl.TopK(k=1)), seed=0)
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([rows, rows[[1, 2, 0]]], 1))  # as strong in both, in other directions
        sae.W_enc.copy_(sae.W_dec.T)
    x = rows[torch.arange(600) % 3] * torch.rand(600, 1, generator=torch.Generator().manual_seed(0))
    diff = diff_models(sae, join(x, x[:, [2, 0, 1]]))
    assert (diff.relative_norm == 0.5).all() and {"weak_in_b", "only_a", "decoupled_in_b"} & {*diff.kinds}
    assert sorted(diff.rank("a")) == [0, 1, 2] and diff.rank("b") == []
