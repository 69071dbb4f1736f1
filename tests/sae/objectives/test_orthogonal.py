"""The penalty on similar rows against its dense formula, and what it does where parents are absorbed by children."""

import pytest
import torch
from resuming import assert_resumes
from unchecked import unchecked

import saelab as sl
from saelab.sae.objectives import OrthogonalLoss
from saelab.sae.training_sae import TrainingSAE
from saelab.universality.seed_comparison import measure_directions

D_IN, BATCH = 8, 64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(term, d_sae=40, dictionary="unit", **axes):
    objective = (sl.ReconstructionLoss(), term)
    return sl.SAEConfig(
        d_in=D_IN, d_sae=d_sae, activation=sl.TopK(k=3), dictionary=dictionary, objective=objective, **axes
    )


def trainee_of(cfg, seed=0):
    trainee = TrainingSAE(sl.SAE(cfg, seed=0), sl.TrainConfig(seed=seed))
    trainee.prepare(draw(512, D_IN, seed=1))
    return trainee


def dense_penalty(W_dec, together):
    """Mean over rows of the largest squared cosine with another row of the same chunk, for a mask of such pairs."""
    lengths = W_dec.square().sum(1).sqrt()
    squares = (W_dec @ W_dec.T / (lengths[:, None] * lengths)).square()
    return torch.where(together, squares, -1.0).amax(1).mean()


@pytest.mark.parametrize("dictionary", ["unit", "free"])
def test_value_and_gradient_are_those_of_the_dense_formula(dictionary):
    trainee = trainee_of(config(OrthogonalLoss(coefficient=0.5), dictionary=dictionary))
    if dictionary == "free":
        with torch.no_grad():
            trainee.sae.W_dec *= 1 + draw(40, 1).abs()
    loss = trainee.objective(draw(BATCH, D_IN, seed=2)).terms["orthogonal"]
    expected = 0.5 * dense_penalty(trainee.sae.W_dec, ~torch.eye(40, dtype=torch.bool))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    found, dense = (torch.autograd.grad(one, trainee.sae.W_dec)[0] for one in (loss, expected))
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-6)


def test_chunks_are_drawn_anew_in_each_step_and_by_the_runs_seed():
    x = draw(BATCH, D_IN, seed=2)
    values = {}
    for seed in (0, 0, 1):
        trainee = trainee_of(config(OrthogonalLoss(coefficient=1.0, chunk=10)), seed)
        W_dec, drawn = trainee.sae.W_dec.detach(), []
        for number in range(3):
            trainee.state["n_steps"].fill_(number)
            drawn.append(float(trainee.objective(x).terms["orthogonal"].detach()))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            chunk_of = torch.empty(40, dtype=torch.long)
            chunk_of[torch.randperm(40, generator=generator)] = torch.arange(4).repeat_interleave(10)
            together = (chunk_of[:, None] == chunk_of) & ~torch.eye(40, dtype=torch.bool)
            assert drawn[-1] == pytest.approx(float(dense_penalty(W_dec, together)), rel=1e-5)
        assert values.setdefault(seed, drawn) == drawn and len(set(drawn)) == 3
    assert values[0] != values[1]


def test_it_may_be_left_out_of_most_steps():
    x, trainee = draw(BATCH, D_IN, seed=2), trainee_of(config(OrthogonalLoss(every=3)))
    seen = []
    for number in range(6):
        trainee.state["n_steps"].fill_(number)
        losses = trainee.objective(x)
        losses.total.backward()
        seen.append(float(losses.terms["orthogonal"].detach()))
    assert all(seen[i] > 0 for i in (0, 3)) and seen[1:3] == seen[4:6] == [0.0, 0.0]


PARENTS, CHILDREN = 8, 4


def tree(seed, n=20_000):
    """Eight parents, each with four children that never fire without it; orthogonal directions."""
    generator = torch.Generator().manual_seed(200 + seed)
    atoms = torch.linalg.qr(torch.randn(48, 48, generator=generator))[0][: PARENTS * (1 + CHILDREN)]
    parent = torch.rand(n, PARENTS, generator=generator) < 0.15
    chosen = torch.nn.functional.one_hot(torch.randint(CHILDREN, (n, PARENTS), generator=generator), CHILDREN).bool()
    child = (parent & (torch.rand(n, PARENTS, generator=generator) < 0.6)).unsqueeze(-1) & chosen
    on = torch.cat([parent, child.flatten(1)], dim=1)
    z = on * (1 + torch.rand(on.shape, generator=generator))
    return z @ atoms + 0.02 * torch.randn(n, 48, generator=generator), atoms, child.any(2)


@unchecked()
def test_parents_fire_beside_their_children_where_rows_must_differ():
    """A latent that has absorbed its parent's direction lies near the parent's; without the penalty some do."""
    found = {}
    for coefficient in (0.0, 0.3):
        for seed in range(2):
            x, atoms, has_child = tree(seed)
            objective = (sl.ReconstructionLoss(), sl.AuxK(), OrthogonalLoss(coefficient=coefficient, chunk=20))
            cfg = sl.SAEConfig(d_in=48, d_sae=40, activation=sl.BatchTopK(k=2), objective=objective)
            run = sl.TrainConfig(n_tokens=150 * 512, batch_size=512, n_held_out=2000, seed=seed)
            sae = sl.SAE(cfg, seed=seed).fit(x, run, progress=False)
            rows = sae.W_dec.detach()
            fires = (sae.encode(x[:5000]).detach() != 0)[:, (atoms[:PARENTS] @ rows.T).argmax(1)]
            recall = torch.stack([fires[has_child[:5000, p], p].float().mean() for p in range(PARENTS)]).mean()
            found.setdefault(coefficient, []).append([float(recall), measure_directions(rows).crowding])
    (recall, crowding), (better, apart) = (torch.tensor(found[c]).mean(0).tolist() for c in (0.0, 0.3))
    assert better > recall + 0.08 and apart < crowding - 0.15


def test_configurations_and_runs_are_kept(tmp_path):
    cfg = config(OrthogonalLoss(coefficient=sl.Schedule(start=0.0, end=1.0), chunk=10, every=2))
    assert sl.SAEConfig.from_dict(cfg.to_dict()) == cfg
    x, every = draw(1_000, D_IN, seed=4), {"log_every_tokens": BATCH, "save_every_tokens": BATCH}
    run = sl.TrainConfig(n_tokens=8 * BATCH, batch_size=BATCH, **every)
    assert_resumes(lambda seed: sl.SAE(cfg, seed=seed), x, run, tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OrthogonalLoss(chunk=1), "`chunk` must be at least 2"),
        (lambda: OrthogonalLoss(every=0), "`every` must be at least 1"),
        (lambda: config(OrthogonalLoss(), dictionary="frozen"), "several rows that move, got dictionary='frozen'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
