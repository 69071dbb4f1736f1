"""A dictionary learned with a classifier: its gradient, when labels help and when not, and who has no labels."""

from dataclasses import replace

import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.functional.statistics import fit_probe
from saelab.sae.baselines import fit_baselines, load_baselines
from saelab.sae.joint_dictionary import JointDictionary, _JointTraining, fit_joint_dictionary
from saelab.sae.objectives import MatryoshkaLoss
from saelab.stores.files import save_tensors
from saelab.stores.jobs import LOCK

D, N, N_TRAIN = 12, 3_000, 2_000
RUN = sl.TrainConfig(n_tokens=24_000, batch_size=400, seed=3, n_held_out=0, lr=0.05, log_every_tokens=24_000)
SHORT = replace(RUN, n_tokens=1_200)


@sl.register_loss_term("labels")
class Taken(sl.AuxK):
    pass


def plant(size):
    """Sparse codes on 8 orthogonal directions, and a label along a ninth, in steps of `size`."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    z = (torch.rand(N, 8, generator=generator) < 0.25) * (1 + 2 * torch.rand(N, 8, generator=generator))
    y = torch.rand(N, generator=generator) < 0.5
    x = z @ Q[:8] + 0.1 * torch.randn(N, D, generator=generator)
    return x + size * (2 * y.float() - 1)[:, None] * Q[8], y


WORLDS = {size: plant(size) for size in (0.3, 2.0)}  # the label has 1 % of the variance, or a third


def make(seed=0, **axes):
    return sl.SAE(sl.SAEConfig(**{"d_in": D, "d_sae": D, "activation": sl.TopK(k=2), **axes}), seed=seed)


@pytest.fixture(scope="module")
@unchecked()
def fitted():
    """By size of the label's step and its coefficient."""
    found = {}
    for size, coefficient in ((0.3, 0.0), (0.3, 1.0), (2.0, 0.0)):
        x, y = WORLDS[size]
        args = x[:N_TRAIN], {"y": y[:N_TRAIN]}, RUN
        found[size, coefficient] = fit_joint_dictionary(make(), *args, coefficient=coefficient, progress=False)
    return found


def probe_accuracy(sae, size):
    """Of a logistic regression on codes, fitted to training rows, on others."""
    x, y = WORLDS[size]
    z = sae.encode(x).detach()
    probe = fit_probe(z[:N_TRAIN], y[:N_TRAIN, None].float())
    return float(((probe(z[N_TRAIN:])[:, 0] > 0) == y[N_TRAIN:]).float().mean())


@pytest.mark.parametrize("activation", [sl.AbsTopK(k=3), sl.ReLU(target_l0=3.0)], ids=lambda a: a.name)
def test_the_gradient_is_that_of_dense_codes(activation):
    x, y = WORLDS[0.3]
    marks = torch.stack([y, x[:, 0] > 1], 1).float()
    sae = make(activation=activation)
    trainee = _JointTraining(sae, RUN, marks, ("y", "up"), 2.0)
    batch = torch.cat([x, marks], 1)[:200]
    trainee.prepare(batch)
    W, b = trainee.both.classifier.W, trainee.both.classifier.b
    with torch.no_grad():
        W.copy_(torch.randn(W.shape, generator=torch.Generator().manual_seed(1)))
    losses = trainee.objective(batch)
    losses.terms["labels"].backward()
    parameters = dict(trainee.module.named_parameters())
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    z = sae.encode(batch[:, :D])
    p, rate = (z @ W + b).sigmoid(), marks.mean(0)
    entropy = -(rate * rate.log() + (1 - rate) * (1 - rate).log())
    said = torch.where(marks[:200] > 0, p, 1 - p)
    wanted = 2.0 * (-said.log().mean(0) / entropy).mean()
    torch.testing.assert_close(losses.terms["labels"], wanted, rtol=1e-4, atol=1e-6)
    assert {"sae.W_enc", "sae.b_enc", "classifier.W", "classifier.b"} <= set(found)
    for name, grad in zip(found, torch.autograd.grad(wanted, [parameters[name] for name in found]), strict=True):
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()), msg=name)


def test_labels_help_only_where_what_discriminates_does_not_reconstruct(fitted):
    accuracy = {key: probe_accuracy(joint.sae, key[0]) for key, joint in fitted.items()}
    slack = 5 * (0.25 / (N - N_TRAIN)) ** 0.5  # five standard errors of a share of held-out rows
    assert accuracy[0.3, 1.0] > accuracy[0.3, 0.0] + slack and accuracy[0.3, 1.0] > 0.9
    assert accuracy[2.0, 0.0] > 0.95  # nothing is left to gain
    fvu = {key: joint.sae.training_["saved"]["fvu"] for key, joint in fitted.items()}
    assert fvu[0.3, 1.0] > fvu[0.3, 0.0]  # and cost variance
    x, y = WORLDS[0.3]
    own = (fitted[0.3, 1.0].predict(x[N_TRAIN:])[:, 0] > 0.5) == y[N_TRAIN:]
    assert abs(float(own.float().mean()) - accuracy[0.3, 1.0]) < slack


def test_without_weight_it_is_the_plain_sae_and_the_classifier_knows_the_rate():
    x, y = WORLDS[0.3]
    run = replace(SHORT, n_held_out=100)
    plain = make().fit(x, run, progress=False)
    joint = fit_joint_dictionary(make(), x, {"y": y}, run, coefficient=0.0, progress=False)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, joint.sae.state_dict()[name]), name
    assert plain.training_["saved"] == joint.sae.training_["saved"]
    torch.testing.assert_close(joint.predict(x[:9])[:, 0], y[:-100].float().mean().expand(9))
    assert joint.sae.history_[-1]["labels"] == 0 and joint.sae.training_["concepts"] == ["y"]


def test_it_is_a_baseline_where_labels_are_given(tmp_path, fitted):
    x, y = WORLDS[0.3]
    short, args = SHORT, (make(), x[:N_TRAIN])
    labels = {"y": y[:N_TRAIN]}
    found = fit_baselines(*args, short, methods=["kmeans", "joint"], labels=labels, seed=1, progress=False)
    alone = fit_joint_dictionary(make(seed=1), x[:N_TRAIN], labels, short, progress=False)
    assert list(found) == ["kmeans", "joint"] and torch.equal(found["joint"].W_enc, alone.sae.W_enc)
    fitted[0.3, 1.0].save_pretrained(tmp_path / "joint")
    assert load_baselines(tmp_path)["joint"].training_["label_coefficient"] == 1.0
    with pytest.raises(ValueError, match="'joint' must have `labels`"):
        fit_baselines(*args, short, methods=["joint"])


@unchecked()
def test_latents_are_put_in_their_order_with_the_classifier():
    x, y = WORLDS[0.3]
    axes = {"prefixes": (4, D), "objective": (MatryoshkaLoss(by_rate=True), sl.AuxK())}
    alone = make(**axes).fit(x, SHORT, progress=False)
    joint, labels = fit_joint_dictionary(make(**axes), x, {"y": y}, SHORT, coefficient=0.0, progress=False), {"y": y}
    assert torch.equal(joint.sae.W_enc, alone.W_enc)
    trained = fit_joint_dictionary(make(**axes), x, labels, RUN, coefficient=3.0, progress=False)
    assert trained.sae.training_["last"]["labels"] < 2.4  # of 3 at the rates: lost where rows are another latent's
    assert float(((trained.predict(x)[:, 0] > 0.5) == y).float().mean()) > 0.7


def test_saved_and_loaded_to_the_bit_with_its_classifier(tmp_path, fitted):
    joint, x = fitted[0.3, 1.0], WORLDS[0.3][0]
    joint.save_pretrained(tmp_path)
    loaded = JointDictionary.from_pretrained(tmp_path)
    assert loaded.concepts == ("y",) and torch.equal(loaded.predict(x), joint.predict(x))
    assert torch.equal(sl.SAE.from_pretrained(tmp_path).encode(x), joint.sae.encode(x))
    fitted[2.0, 0.0].sae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has been replaced since"):
        JointDictionary.from_pretrained(tmp_path)
    save_tensors(tmp_path / "classifier.safetensors", {"W": joint.W}, {"concepts": '["y"]'})
    with pytest.raises(ValueError, match="must hold W, b and their concepts"):
        JointDictionary.from_pretrained(tmp_path)
    (tmp_path / "classifier.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        JointDictionary.from_pretrained(tmp_path)


@unchecked()
def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path):
    x, y = WORLDS[0.3]
    often = replace(SHORT, n_tokens=4_000, log_every_tokens=400, save_every_tokens=400)

    def run(seed, labels=None, **more):
        return fit_joint_dictionary(make(seed), x, labels or {"y": y}, often, progress=False, **more)

    def stop(entry):
        assert (tmp_path / LOCK).exists()  # no other process writes there
        if entry["step"] == 5:
            raise KeyboardInterrupt

    whole = run(0)
    with pytest.raises(KeyboardInterrupt):
        run(0, out=tmp_path, sinks=[stop])
    with pytest.raises(ValueError, match="must keep `label_coefficient`"):
        run(5, out=tmp_path, resume=True, coefficient=2.0)
    with pytest.raises(ValueError, match="must keep `concepts`"):
        run(5, {"z": y}, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="must keep `labels`"):
        run(5, {"y": ~y}, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="must not hold another run"):
        run(0, out=tmp_path)
    cut = run(5, out=tmp_path, resume=True)
    assert cut.sae.history_ == whole.sae.history_ and torch.equal(cut.W, whole.W) and torch.equal(cut.b, whole.b)
    for name, weight in whole.sae.state_dict().items():
        assert torch.equal(weight, cut.sae.state_dict()[name]), name


@unchecked()
def test_activations_in_half_precision_have_labels_too():
    x, y = WORLDS[0.3]
    rounded = x.bfloat16()
    half, whole = (
        fit_joint_dictionary(make(), one, {"y": y}, SHORT, progress=False) for one in (rounded, rounded.float())
    )
    torch.testing.assert_close(half.predict(x), whole.predict(x))


@unchecked()
def test_what_cannot_learn_from_labels_is_refused():
    x, y = WORLDS[0.3]
    for sae, labels, why, more in (
        (make(d_out=D), {"y": y}, "transcoder", {}),
        (make(encoder=sl.sae.OrthogonalMatchingPursuit()), {"y": y}, "constants in training", {}),
        (make(), {"y": y[1:]}, "one for each of the 3000 tokens", {}),
        (make(), {"y": torch.ones(N, dtype=torch.bool)}, r"not so: \['y'\]", {}),
        (make(objective=(sl.ReconstructionLoss(), Taken())), {"y": y}, "no loss term 'labels'", {}),
        (make(d_in=D + 1), {"y": y}, "`d_in` of the SAE", {}),
        (make(), {"y": y}, "`coefficient` must be at least 0", {"coefficient": -1.0}),
    ):
        with pytest.raises(ValueError, match=why):
            fit_joint_dictionary(sae, x, labels, RUN, **more)
