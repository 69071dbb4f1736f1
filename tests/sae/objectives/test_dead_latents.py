"""AuxK from a search of the dead latents against all their pre-activations: the same loss and gradients."""

import pytest
import torch

import saelab as sl
from saelab.functional import compiled
from saelab.sae.objectives import dead_latents
from saelab.sae.training_sae import TrainingSAE

D_IN, D_SAE = 24, 400


def gradients(activation, d_out=None):
    """The AuxK loss of a batch, and its gradients, where every second latent is dead."""
    objective = (sl.ReconstructionLoss(), sl.AuxK(k=9, token_frac=0.5))
    cfg = sl.SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, objective=objective, d_out=d_out)
    trainee = TrainingSAE(sl.SAE(cfg, seed=0), sl.TrainConfig(n_tokens=4096, batch_size=256))
    x = torch.randn(256, D_IN + (d_out or 0), generator=torch.Generator().manual_seed(1))
    trainee.prepare(x)
    trainee.sae.b_enc.data += 0.3 * torch.randn(D_SAE, generator=torch.Generator().manual_seed(2))
    trainee.sae.b_dec.data += torch.randn(trainee.sae.b_dec.shape, generator=torch.Generator().manual_seed(3))
    trainee.state["tokens_since_fired"][::2] = 10**9
    loss = trainee.objective(x).terms["aux"]
    loss.backward()
    named = trainee.sae.named_parameters()
    return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("d_out", [None, 16])
@pytest.mark.parametrize("activation", [sl.TopK(5), sl.AbsTopK(5)], ids=["topk", "abstopk"])
def test_searched_latents_give_the_gradients_of_all(activation, d_out, monkeypatch):
    monkeypatch.setenv("SAELAB_NUMBA", "0")
    wanted_loss, wanted = gradients(activation, d_out)
    if not compiled.has_numba():
        pytest.skip("needs numba")
    monkeypatch.setattr(compiled, "LEAST_WEIGHTS", 0)
    monkeypatch.setenv("SAELAB_NUMBA", "1")
    calls = []
    search = dead_latents.largest_latents
    monkeypatch.setattr(dead_latents, "largest_latents", lambda *args: calls.append(1) or search(*args))
    loss, found = gradients(activation, d_out)
    assert calls, "the search was not used"
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=0)
    assert found.keys() == wanted.keys() and {"W_enc", "b_enc", "W_dec"} <= found.keys()
    assert ("b_dec" in found) == (d_out is None)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max() + 1), msg=name)
