"""The methods of the table: how each makes a dictionary of given width and L0 from given activations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import saelab as sl
from saelab.sae import AbsJumpReLU, Archetypal, Gated, Refined, SoftFrozen, fit_dictionary, make_untrained
from saelab.sae.classical_dictionaries import METHODS as CLASSICAL
from saelab.sae.objectives import (
    AuxK,
    ContrastiveLoss,
    FLOPsPenalty,
    HierarchicalLoss,
    LpPenalty,
    MaskedLoss,
    MatryoshkaLoss,
    MultiTopKLoss,
    OrthogonalLoss,
)

BATCH = 512


@dataclass(frozen=True)
class Setting:
    """What every method is given; the last `n_held_out` activations are not trained on."""

    acts: sl.Activations
    d_sae: int
    k: int
    n_tokens: int
    n_held_out: int
    seed: int


@dataclass(frozen=True)
class Method:
    """A row of the table: a configuration that is trained, or a dictionary that learns less."""

    kind: str
    """"not trained", "classical", "partly trained" or "trained" """
    source: str
    """arXiv id, or ''"""
    fields: Callable[[int, int], dict[str, Any]] | None = None
    """fields of `SAEConfig` for d_sae and k; None where nothing is trained"""
    classical: str = ""
    """method of `fit_dictionary`"""

    def config(self, d_in: int, d_sae: int, k: int) -> sl.SAEConfig:
        given = {} if self.fields is None else self.fields(d_sae, k)
        return sl.SAEConfig(**{"d_in": d_in, "d_sae": d_sae, "activation": sl.TopK(k=k)} | given)

    def fits(self, documents: bool) -> bool:
        """Whether it can be made where tokens have documents, or have none."""
        return documents or not any("neighbors" in term.needs for term in self.config(64, 512, 8).terms)

    def make(self, setting: Setting) -> sl.SAE:
        """The dictionary of a setting."""
        s = setting
        if self.classical:
            width = min(s.d_sae, s.acts.d_in) if CLASSICAL[self.classical].orthogonal else s.d_sae
            seen = s.acts.rows(0, len(s.acts) - s.n_held_out)
            return fit_dictionary(seen, self.classical, d_sae=width, k=s.k, seed=s.seed)  # type: ignore[arg-type]
        sae = sl.SAE(self.config(s.acts.d_in, s.d_sae, s.k), seed=s.seed)
        if self.fields is None:
            return make_untrained(sae, s.acts[:8192], seed=s.seed)
        run = sl.TrainConfig(n_tokens=s.n_tokens, batch_size=BATCH, seed=s.seed, n_held_out=s.n_held_out)
        return sae.fit(s.acts, run, progress=False)


def _trained(source: str, fields: Callable[[int, int], dict[str, Any]], kind: str = "trained") -> Method:
    return Method(kind, source, fields)


def _with(*terms: Any, first: Any = None) -> tuple[Any, ...]:
    return (first or sl.ReconstructionLoss(), AuxK(), *terms)


def _nested(m: int) -> tuple[int, ...]:
    return (m // 16, m // 4, m)


FALLING = sl.Schedule(start=2.0, end=1.0, since=0.3, until=0.9)
"""a target L0 that starts at twice its end, for p-annealing"""
ANNEALED = sl.Schedule(start=4.0, end=1.0, until=0.5)
METHODS: dict[str, Method] = {
    "untrained TopK": Method("not trained", ""),
    "random rows": Method("classical", "", classical="random"),
    "PCA": Method("classical", "", classical="pca"),
    "ICA": Method("classical", "", classical="ica"),
    "l3 maximization": Method("classical", "2002.10043", classical="l3"),
    "k-means": Method("classical", "", classical="kmeans"),
    "K-SVD": Method("classical", "", classical="ksvd"),
    "SNMF": Method("classical", "", classical="snmf"),
    "CNMF": Method("classical", "", classical="cnmf"),
    "frozen encoder": _trained("2602.14111", lambda m, k: {"train_encoder": False}, "partly trained"),
    "frozen decoder": _trained("2602.14111", lambda m, k: {"dictionary": "frozen"}, "partly trained"),
    "soft-frozen decoder": _trained("2602.14111", lambda m, k: {"dictionary": SoftFrozen()}, "partly trained"),
    "TopK": _trained("2406.04093", lambda m, k: {}),
    "BatchTopK": _trained("2412.06410", lambda m, k: {"activation": sl.BatchTopK(k=k)}),
    "AbsTopK": _trained("2510.00404", lambda m, k: {"activation": sl.AbsTopK(k=k)}),
    "ReLU, L1": _trained("2309.08600", lambda m, k: {"activation": sl.ReLU(target_l0=float(k))}),
    "p-annealing": _trained(
        "2408.00113",
        lambda m, k: {
            "activation": sl.ReLU(target_l0=float(k)),
            "objective": _with(LpPenalty()),
            "sparsity_schedule": FALLING,
        },
    ),
    "Gated": _trained("2404.16014", lambda m, k: {"activation": Gated(target_l0=float(k))}),
    "JumpReLU": _trained("2407.14435", lambda m, k: {"activation": sl.JumpReLU(target_l0=float(k))}),
    "two-sided JumpReLU": _trained("", lambda m, k: {"activation": AbsJumpReLU(target_l0=float(k))}),
    "Matryoshka": _trained("2503.17547", lambda m, k: {"activation": sl.BatchTopK(k=k), "prefixes": _nested(m)}),
    "MultiTopK": _trained(
        "2406.04093", lambda m, k: {"objective": _with(first=MultiTopKLoss(ks=(k, 4 * k), weights=(1.0, 0.125)))}
    ),
    "HierarchicalTopK": _trained(
        "2505.24473", lambda m, k: {"objective": _with(first=HierarchicalLoss(ks=(k // 2, k, 2 * k)))}
    ),
    "temporal contrast": _trained(
        "2511.05541",
        lambda m, k: {"prefixes": (m // 5, m), "objective": _with(ContrastiveLoss(coefficient=0.1, prefix=0.2))},
    ),
    "OrtSAE": _trained(
        "2509.22033",
        lambda m, k: {"activation": sl.BatchTopK(k=k), "objective": _with(OrthogonalLoss(coefficient=0.25))},
    ),
    "FLOPs penalty": _trained("2004.05665", lambda m, k: {"objective": _with(FLOPsPenalty())}),
    "archetypal": _trained("2502.12892", lambda m, k: {"dictionary": Archetypal()}),
    "subspace start": _trained("2508.16929", lambda m, k: {"init": "subspace"}),
    "whitened": _trained("2412.16247", lambda m, k: {"normalizer": "whiten"}),
    "refined": _trained("", lambda m, k: {"encoder": Refined()}),
    "LISTA-Matryoshka": _trained(
        "",
        lambda m, k: {
            "encoder": Refined(),
            "sparsity_schedule": ANNEALED,
            "prefixes": _nested(m),
            "objective": _with(first=MatryoshkaLoss(detached=True, by_rate=True, tilt=2e-3)),
        },
    ),
    "matching pursuit": _trained("2506.03093", lambda m, k: {"encoder": sl.MatchingPursuit(), "normalizer": "none"}),
    "OMP": _trained(
        "",
        lambda m, k: {
            "encoder": sl.OrthogonalMatchingPursuit(),
            "activation": sl.AbsTopK(k=k),
            "objective": (sl.ReconstructionLoss(),),
        },
    ),
    "OMP, masked": _trained(
        "2302.12715",
        lambda m, k: {
            "encoder": sl.OrthogonalMatchingPursuit(),
            "activation": sl.AbsTopK(k=k),
            "objective": (MaskedLoss(),),
        },
    ),
    "ICFL, resets": _trained(
        "2412.16247",
        lambda m, k: {
            "encoder": sl.ICFL(latents_per_round=4),
            "activation": sl.AbsTopK(k=k),
            "objective": (sl.ReconstructionLoss(),),
            "duplicates": sl.sae.DuplicateReset(),
        },
    ),
}
