"""Loss terms of SAE training, one dataclass each; `SAEConfig.objective` is a tuple of them."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.sae.objectives.contrastive import ContrastiveLoss as ContrastiveLoss
    from saelab.sae.objectives.dead_latents import AuxK as AuxK
    from saelab.sae.objectives.density import FLOPsPenalty as FLOPsPenalty
    from saelab.sae.objectives.gated import GateReconstructionLoss as GateReconstructionLoss
    from saelab.sae.objectives.kept_core import KeptCoreLoss as KeptCoreLoss
    from saelab.sae.objectives.masked import MaskedLoss as MaskedLoss
    from saelab.sae.objectives.matryoshka import MatryoshkaLoss as MatryoshkaLoss
    from saelab.sae.objectives.multi_topk import HierarchicalLoss as HierarchicalLoss, MultiTopKLoss as MultiTopKLoss
    from saelab.sae.objectives.orthogonal import OrthogonalLoss as OrthogonalLoss
    from saelab.sae.objectives.p_annealing import LpPenalty as LpPenalty
    from saelab.sae.objectives.reconstruction import ReconstructionLoss as ReconstructionLoss
    from saelab.sae.objectives.source_norms import SourceNormsLoss as SourceNormsLoss
    from saelab.sae.objectives.sparsity import SparsityLoss as SparsityLoss
    from saelab.sae.objectives.terms import (
        LossTerm as LossTerm,
        TrainingStep as TrainingStep,
        register_loss_term as register_loss_term,
    )

__getattr__, __dir__, __all__ = attach(__name__)
