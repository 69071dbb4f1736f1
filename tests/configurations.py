"""Configurations of small SAEs, one for each kind: settings of `SAEConfig` beside `SMALL`."""

from typing import Any

import saelab as sl
from saelab.sae import AbsJumpReLU, Archetypal, DuplicateReset, Gated, Log1pReLU, Refined, SoftFrozen, Sparsemax
from saelab.sae.objectives import (
    AuxK,
    ContrastiveLoss,
    FLOPsPenalty,
    HierarchicalLoss,
    KeptCoreLoss,
    LpPenalty,
    MaskedLoss,
    MatryoshkaLoss,
    MultiTopKLoss,
    OrthogonalLoss,
)

D_IN, D_SAE = 16, 64
SMALL: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "activation": sl.TopK(k=4)}
RECONSTRUCTION = sl.ReconstructionLoss()
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "topk": {},
    "abstopk": {"activation": sl.AbsTopK(k=4)},
    "batchtopk": {"activation": sl.BatchTopK(k=4)},
    "batchabstopk": {"activation": sl.BatchAbsTopK(k=4)},
    "groupmax": {"activation": sl.GroupMax(k=4)},
    "relu": {"activation": sl.ReLU(target_l0=4.0)},
    "log1prelu": {"activation": Log1pReLU(target_l0=4.0)},
    "jumprelu": {"activation": sl.JumpReLU(target_l0=4.0)},
    "absjumprelu": {"activation": AbsJumpReLU(target_l0=4.0)},
    "gated": {"activation": Gated(target_l0=4.0)},
    "sparsemax": {"activation": Sparsemax()},
    "matryoshka": {"activation": sl.BatchTopK(k=4), "prefixes": (8, 24, 64)},
    "random prefixes": {"prefixes": sl.RandomPrefixes()},
    "revived": {"activation": sl.TopK(k=1), "objective": (RECONSTRUCTION, AuxK(k=3, dead_after_tokens=1))},
    "not normalized": {"normalizer": "none"},
    "whiten": {"normalizer": "whiten"},
    "layer_norm": {"normalizer": "layer_norm"},
    "token_norm": {"normalizer": "token_norm"},
    "free": {"dictionary": "free"},
    "frozen": {"dictionary": "frozen"},
    "soft frozen": {"dictionary": SoftFrozen()},
    "archetypal": {"dictionary": Archetypal(n_points=32)},
    "transcoder": {"d_out": 12},
    "transcoder with a skip connection": {"d_out": 12, "skip": True},
    "refined": {"encoder": Refined()},
    "untrained encoder": {"train_encoder": False},
    "from data": {"init": "data"},
    "in a subspace": {"init": "subspace"},
    "hierarchical": {"objective": (HierarchicalLoss(ks=(2, 4, 8)), AuxK())},
    "hierarchical in the batch": {
        "activation": sl.BatchTopK(k=4),
        "objective": (HierarchicalLoss(ks=(2, 4, 8)), AuxK()),
    },
    "multi topk": {"objective": (MultiTopKLoss(ks=(4, 16), weights=(1, 0.125)), AuxK(k=3))},
    "contrast": {"objective": (RECONSTRUCTION, AuxK(), ContrastiveLoss(pairs="self", prefix=0.5))},
    "orthogonal": {"objective": (RECONSTRUCTION, AuxK(), OrthogonalLoss(chunk=8))},
    "flops": {"objective": (RECONSTRUCTION, AuxK(), FLOPsPenalty(weights=tuple(map(float, range(D_SAE)))))},
    "annealed": {
        "activation": sl.ReLU(target_l0=4.0),
        "objective": (RECONSTRUCTION, LpPenalty(p_end=0.95)),  # a smaller one makes rounding errors grow
    },
    "kept core": {"objective": (RECONSTRUCTION, AuxK(), KeptCoreLoss(n=20))},
    "lista": {
        "encoder": Refined(),
        "prefixes": (8, 24, 64),
        "objective": (MatryoshkaLoss(detached=True, by_rate=True, tilt=2e-3), AuxK()),
        "sparsity_schedule": sl.Schedule(start=4.0, end=1.0, until=0.5),
    },
}
PURSUITS: dict[str, dict[str, Any]] = {
    "matching pursuit": {"encoder": sl.MatchingPursuit(), "normalizer": "none", "objective": (RECONSTRUCTION,)},
    "orthogonal matching pursuit": {"encoder": sl.OrthogonalMatchingPursuit(), "objective": (RECONSTRUCTION,)},
    "masked": {"encoder": sl.OrthogonalMatchingPursuit(), "objective": (MaskedLoss(),)},
    "duplicates": {
        "activation": sl.AbsTopK(k=4),
        "encoder": sl.ICFL(latents_per_round=2),
        "objective": (RECONSTRUCTION,),
        "duplicates": DuplicateReset(every_steps=2, cos=0.5),
    },
}
