"""Functions of tensors alone: activation functions, sparse kernels, top-k search, losses and metrics."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.functional.activation_functions import (
        jumprelu as jumprelu,
        keep_above as keep_above,
        keep_batch_topk as keep_batch_topk,
        keep_group_max as keep_group_max,
        keep_places as keep_places,
        keep_topk as keep_topk,
        project_simplex as project_simplex,
        sparsemax as sparsemax,
        step_above as step_above,
    )
    from saelab.functional.codes import Entries as Entries, SparseCodes as SparseCodes
    from saelab.functional.indices import ChosenRuns as ChosenRuns, FeatureIds as FeatureIds, MarkedRows as MarkedRows
    from saelab.functional.metrics import (
        FiringSums as FiringSums,
        ReconstructionSums as ReconstructionSums,
        effective_rank as effective_rank,
        exact as exact,
        kl_divergence as kl_divergence,
        log_histogram as log_histogram,
        loss_recovered as loss_recovered,
        nested_error as nested_error,
        normalized_error as normalized_error,
        ratio as ratio,
        read_scores as read_scores,
        token_terms as token_terms,
    )
    from saelab.functional.pruning import needed_codes as needed_codes
    from saelab.functional.pursuit import pursue as pursue, pursue_least_squares as pursue_least_squares
    from saelab.functional.rescoring import bound_rounding as bound_rounding, score as score
    from saelab.functional.row_geometry import (
        curvature as curvature,
        intrinsic_dimension as intrinsic_dimension,
        lidar as lidar,
        matrix_entropy as matrix_entropy,
        mean_cosine as mean_cosine,
        outlier_dimensions as outlier_dimensions,
    )
    from saelab.functional.row_topk import largest_latents as largest_latents, topk_latents as topk_latents
    from saelab.functional.screening import Precision as Precision
    from saelab.functional.silent_codes import SilentCodes as SilentCodes
    from saelab.functional.sparse_products import (
        GradientMemory as GradientMemory,
        SparseGradient as SparseGradient,
        select_rows as select_rows,
    )
    from saelab.functional.statistics import ProbeScore as ProbeScore
    from saelab.functional.threshold_search import search_above as search_above
    from saelab.functional.topk import (
        batch_topk_entries as batch_topk_entries,
        group_max_latents as group_max_latents,
        pick_topk as pick_topk,
        search_batch_topk as search_batch_topk,
        search_group_max as search_group_max,
        search_topk as search_topk,
    )
    from saelab.functional.two_samples import Effect as Effect

__getattr__, __dir__, __all__ = attach(__name__)
