"""Planted dictionaries: what signed codes and nested prefixes are for, and where they are of no use.

Each claim is a comparison on the same data from the same start. A fast version runs always, the longer is marked slow.
"""

from functools import cache

import pytest
import torch
from unchecked import unchecked

import saelab as sl

WIDTH, ATOMS, ACTIVE = 64, 128, 4


def generator(seed):
    return torch.Generator().manual_seed(seed)


@cache
def planted(signed, seed, n=30_000):
    """Four of 128 random directions a token, with coefficients +-(1 + U(0, 1)), or + only."""
    draws = generator(1000 + seed)  # the SAE's own seed would draw its decoder equal to the atoms
    atoms = torch.nn.functional.normalize(torch.randn(ATOMS, WIDTH, generator=draws), dim=1)
    places = torch.rand(n, ATOMS, generator=draws).topk(ACTIVE, dim=1).indices
    size = 1 + torch.rand(n, ACTIVE, generator=draws)
    sign = torch.randint(0, 2, size.shape, generator=draws) * 2 - 1 if signed else 1
    z = torch.zeros(n, ATOMS).scatter(1, places, size * sign)
    return z @ atoms + 0.02 * torch.randn(n, WIDTH, generator=draws), atoms


@unchecked()
def train(configs, x, seed, n_steps, batch_size=256):
    saes = [sl.SAE(cfg, seed=seed) for cfg in configs]
    run = sl.TrainConfig(
        n_tokens=n_steps * batch_size, batch_size=batch_size, n_held_out=2000, seed=seed,
        log_every_tokens=n_steps * batch_size, save_every_tokens=n_steps * batch_size,
    )  # fmt: skip
    return sl.fit(saes, x, run, progress=False)


def compare(signed, n_steps, n_seeds):
    """Mean held-out FVU of TopK, TopK of twice the width and AbsTopK, and the last seed's SAEs with their data."""
    shapes = [(sl.TopK(k=ACTIVE), ATOMS), (sl.TopK(k=ACTIVE), 2 * ATOMS), (sl.AbsTopK(k=ACTIVE), ATOMS)]
    configs = [sl.SAEConfig(d_in=WIDTH, d_sae=m, activation=activation) for activation, m in shapes]
    fvu = []
    for seed in range(n_seeds):
        x, atoms = planted(signed, seed)
        saes = train(configs if signed else configs[::2], x, seed, n_steps)
        fvu.append([saes[0].history_[-1][f"{i}/held_out_fvu"] for i in range(len(saes))])
    return torch.tensor(fvu).mean(0).tolist(), saes, x, atoms


def sign_balance(sae, x):
    """For each latent, the share of its rarer sign."""
    z = sae.encode(x[:5000]).detach()
    positive, negative = (z > 0).sum(0), (z < 0).sum(0)
    return torch.minimum(positive, negative) / (positive + negative).clamp(min=1)


def both_signs_in_one_latent(n_steps, n_seeds, times, cosine):
    """Signed codes are about as good as twice their width, and so many times better than their own; their latents lie
    that near to the planted directions.
    """
    (narrow, wide, signed), (topk, _, abstopk), x, atoms = compare(True, n_steps, n_seeds)
    assert signed <= 1.2 * wide and times * signed <= narrow
    assert (abstopk.W_dec.detach() @ atoms.T).abs().amax(0).mean() > cosine  # the planted directions, up to sign
    assert (sign_balance(abstopk, x) > 0.25).float().mean() > 0.8 and not sign_balance(topk, x).any()


def no_gain_from_signs_where_there_are_none(n_steps, n_seeds):
    (topk, abstopk), saes, x, _ = compare(False, n_steps, n_seeds)
    assert abstopk >= 0.95 * topk
    mixed = (sign_balance(saes[1], x) > 0.25).float()
    assert mixed.mean() < 0.1 + 4 * (0.1 * 0.9 / len(mixed)) ** 0.5


def test_bipolar_data_need_half_the_width_with_signed_codes():
    both_signs_in_one_latent(150, 1, 1.5, 0.8)


def test_unipolar_data_gain_nothing_from_signed_codes():
    """The control: the advantage lies in the data, not in the operator."""
    no_gain_from_signs_where_there_are_none(150, 1)


@pytest.mark.slow
def test_signed_codes_at_length():
    both_signs_in_one_latent(4000, 3, 4, 0.95)
    no_gain_from_signs_where_there_are_none(4000, 3)


PARENTS, CHILDREN = 8, 4


def tree(seed, n=30_000):
    """Eight parents, each with four children that never come without it; orthogonal directions."""
    draws = generator(seed)
    atoms = torch.linalg.qr(torch.randn(48, 48, generator=draws))[0][: PARENTS * (1 + CHILDREN)]
    parent = torch.rand(n, PARENTS, generator=draws) < 0.15
    chosen = torch.nn.functional.one_hot(torch.randint(0, CHILDREN, (n, PARENTS), generator=draws), CHILDREN).bool()
    child = (parent & (torch.rand(n, PARENTS, generator=draws) < 0.6)).unsqueeze(-1) & chosen
    on = torch.cat([parent, child.flatten(1)], dim=1)
    z = on * (1 + torch.rand(on.shape, generator=draws))
    return z @ atoms + 0.02 * torch.randn(n, 48, generator=draws), atoms, child.any(2)


def absorption_of(sae, x, atoms, has_child):
    """How often the parent's latent fires when a child is on, and the mean largest cosine between dictionary rows."""
    rows = sae.W_dec.detach()
    parents = (atoms[:PARENTS] @ rows.T).argmax(1)
    fires = (sae.encode(x).detach() != 0)[:, parents]
    recall = torch.stack([fires[has_child[:, p], p].float().mean() for p in range(PARENTS)]).mean()
    coherence = (rows @ rows.T).fill_diagonal_(-1).amax(1).mean()
    return float(recall), float(coherence)


def prefixes_keep_parents(n_steps, n_seeds, margin, batch_size=256):
    """Averaged over seeds, and only so: a single seed may go either way."""
    measured = []
    for seed in range(n_seeds):
        x, atoms, has_child = tree(seed)
        configs = [
            sl.SAEConfig(d_in=48, d_sae=40, activation=sl.BatchTopK(k=2), prefixes=prefixes)
            for prefixes in (None, (8, 40))
        ]
        saes = train(configs, x, seed, n_steps, batch_size)
        measured.append([absorption_of(sae, x[:8000], atoms, has_child[:8000]) for sae in saes])
    (flat_recall, flat_coherence), (recall, coherence) = torch.tensor(measured).mean(0).tolist()
    assert recall > flat_recall + margin
    assert coherence < flat_coherence - margin


def test_prefixes_keep_parents_from_being_absorbed():
    prefixes_keep_parents(110, 2, 0.04, batch_size=512)  # larger batches: less chance, and fewer seeds to see past it


@pytest.mark.slow
def test_prefixes_at_length():
    prefixes_keep_parents(2500, 8, 0.02)  # by then the flat one has caught up
