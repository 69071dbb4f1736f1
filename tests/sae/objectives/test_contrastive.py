"""The contrastive loss against its dense formula, and what contrast between neighbors finds in a planted world."""

import math

import pytest
import torch
from resuming import assert_resumes
from unchecked import unchecked

import saelab as sl
from saelab.sae.objectives import ContrastiveLoss
from saelab.sae.training_sae import TrainingSAE

D_IN, BATCH = 8, 64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(term, activation=None, d_sae=40, **axes):
    activation, objective = activation or sl.TopK(k=3), (sl.ReconstructionLoss(), term)
    return sl.SAEConfig(d_in=D_IN, d_sae=d_sae, activation=activation, objective=objective, normalizer="none", **axes)


@pytest.mark.parametrize("pairs", ["neighbors", "self"])
@pytest.mark.parametrize(
    "activation", [sl.TopK(k=3), sl.AbsTopK(k=3), sl.BatchTopK(k=3), sl.JumpReLU(coefficient=0.1, start=0.4)]
)
@pytest.mark.parametrize("d_sae", [40, 2048], ids=["dense", "sparse"])
def test_value_and_gradient_are_those_of_the_dense_formula(activation, d_sae, pairs):
    term = ContrastiveLoss(coefficient=0.5, temperature=0.3, pairs=pairs, prefix=0.25)
    trainee = TrainingSAE(sl.SAE(config(term, activation, d_sae), seed=0), sl.TrainConfig())
    trainee.prepare(draw(512, D_IN, seed=1))
    sae, x = trainee.sae, draw(BATCH, D_IN, seed=2)
    loss = trainee.objective(x).terms["contrastive"]
    z = activation((x - sae.b_dec) @ sae.W_enc + sae.b_enc, sae.threshold, training=True)[:, : d_sae // 4]
    codes = torch.nn.functional.normalize(z, dim=1)
    assert (z == 0).all(1).any()  # a token without a code in the prefix is like no other
    a, b = codes[:32], codes[32:] if pairs == "neighbors" else codes[:32]
    s, right = a @ b.T / 0.3, torch.arange(32)
    entropy = torch.nn.functional.cross_entropy
    dense = 0.5 * (entropy(s, right) + entropy(s.T, right)) / 2
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-6)
    weights = [sae.W_enc, sae.b_enc]
    found = torch.autograd.grad(loss, weights, retain_graph=True)
    for one, other in zip(found, torch.autograd.grad(dense, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_batch_without_codes_in_the_prefix_has_finite_gradients():
    trainee = TrainingSAE(sl.SAE(config(ContrastiveLoss(prefix=0.025)), seed=0), sl.TrainConfig())
    trainee.prepare(draw(512, D_IN, seed=1))
    with torch.no_grad():
        trainee.sae.b_enc[0] = -100.0
    losses = trainee.objective(draw(BATCH, D_IN, seed=2))
    assert float(losses.terms["contrastive"].detach()) == pytest.approx(0.1 * math.log(32), rel=1e-6)
    losses.total.backward()
    assert all(bool(weight.grad.isfinite().all()) for weight in (trainee.sae.W_enc, trainee.sae.b_enc))


def test_one_token_has_no_pair_and_no_loss():
    trainee = TrainingSAE(sl.SAE(config(ContrastiveLoss(pairs="self")), seed=0), sl.TrainConfig())
    trainee.prepare(draw(512, D_IN, seed=1))
    losses = trainee.objective(draw(1, D_IN, seed=2))
    assert float(losses.terms["contrastive"].detach()) == 0.0
    losses.total.backward()
    assert bool(trainee.sae.W_enc.grad.isfinite().all())


TOPICS, WORDS, LENGTH = 12, 60, 20


def planted(seed=0, n_documents=600):
    """Documents of one topic, with three stronger words a token; topics are the first atoms."""
    generator = torch.Generator().manual_seed(100 + seed)
    atoms = torch.nn.functional.normalize(torch.randn(TOPICS + WORDS, 40, generator=generator), dim=1)
    n = n_documents * LENGTH
    words = torch.rand(n, WORDS, generator=generator).topk(3, dim=1).indices + TOPICS
    topic = torch.randint(TOPICS, (n_documents,), generator=generator).repeat_interleave(LENGTH)
    z = torch.zeros(n, len(atoms)).scatter(1, words, 1 + torch.rand(n, 3, generator=generator))
    z[torch.arange(n), topic] = 1.2
    doc_ids = torch.arange(n_documents, dtype=torch.int32).repeat_interleave(LENGTH)
    return sl.Activations.from_tensor(z @ atoms, doc_ids=doc_ids), topic, atoms


@unchecked()
def train(acts, term, n_tokens=50_000, seed=0):
    cfg = sl.SAEConfig(
        d_in=40, d_sae=100, activation=sl.TopK(k=4), prefixes=(20, 100), objective=(sl.ReconstructionLoss(), term)
    )
    return sl.SAE(cfg, seed=seed).fit(acts, sl.TrainConfig(n_tokens=n_tokens, batch_size=256), progress=False)


def topics_found(sae, acts, topic):
    """Mean over topics of the F1 of the best latent of the prefix."""
    fires = (sae.encode(acts[:]).detach()[:, :20] != 0).float()
    true = torch.nn.functional.one_hot(topic, TOPICS).float()
    both = fires.T @ true
    return float((2 * both / (fires.sum(0)[:, None] + true.sum(0)).clamp(min=1)).amax(0).mean())


def test_contrast_between_neighbors_finds_what_stays_the_same_along_a_document():
    acts, topic, _ = planted()
    scores = [topics_found(train(acts, ContrastiveLoss(coefficient=c, prefix=0.2)), acts, topic) for c in (0.0, 0.3)]
    assert scores[1] > 1.5 * scores[0]


def likeness(sae, x):
    """Mean cosine of the codes of different tokens."""
    codes = torch.nn.functional.normalize(sae.encode(x).detach(), dim=1)
    return float((codes @ codes.T).fill_diagonal_(0).mean())


@unchecked()
def test_self_pairs_repel_and_need_no_documents():
    acts, _, _ = planted()
    x = acts[:4_000]
    weights = (0.0, 3.0)
    found = [likeness(train(x, ContrastiveLoss(coefficient=w, pairs="self"), 25_000), x[:500]) for w in weights]
    assert found[1] < 0.8 * found[0]


def test_neighbors_need_documents():
    with pytest.raises(ValueError, match="rows without `doc_ids`"):
        train(draw(1_000, 40), ContrastiveLoss())


def test_configurations_and_runs_are_kept(tmp_path):
    cfg = config(ContrastiveLoss(coefficient=sl.Schedule(start=0.0, end=1.0), prefix=0.5, temperature=0.1))
    assert sl.SAEConfig.from_dict(cfg.to_dict()) == cfg
    alone = config(ContrastiveLoss(pairs="self"))
    assert sl.SAEConfig.from_dict(alone.to_dict()) == alone and not alone.objective[1].needs
    acts = sl.Activations.from_tensor(draw(1_000, D_IN), doc_ids=(torch.arange(1_000) // 25).int())
    every = {"log_every_tokens": BATCH, "save_every_tokens": BATCH}
    run = sl.TrainConfig(n_tokens=8 * BATCH, batch_size=BATCH, **every)
    assert_resumes(lambda seed: sl.SAE(cfg, seed=seed), acts, run, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"pairs": "next"}, r"`pairs` must be one of \['neighbors', 'self'\], got 'next'"),
        ({"prefix": 0.0}, r"`prefix` must be in \(0, 1\]"),
        ({"prefix": 1.5}, r"`prefix` must be in \(0, 1\]"),
    ],
)
def test_bad_settings_are_refused_with_a_sentence(settings, message):
    with pytest.raises(ValueError, match=message), unchecked():
        ContrastiveLoss(**settings)
