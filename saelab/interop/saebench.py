"""`write_saebench`: export an evaluation in the format of SAEBench's core evaluation."""

import time
import uuid
from pathlib import Path
from typing import Any

from saelab.evaluation.results import Evaluation
from saelab.sae.sae import SAE
from saelab.stores.files import write_json
from saelab.stores.sharing import shareable

NOT_MEASURED = {
    "reconstruction_quality": ("explained_variance_legacy", "mse"),
    "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio"),
    "sparsity": ("l1",),
    "misc_metrics": (
        "freq_over_1_percent",
        "freq_over_10_percent",
        "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent",
        "average_max_encoder_cosine_sim",
        "average_max_decoder_cosine_sim",
    ),
}
"""null in the export: SAEBench would write -1 for some, which can be mistaken for a value"""


def save_saebench(evaluation: Evaluation, path: str | Path, sae: SAE | None = None) -> None:
    """Write an evaluation as JSON in the schema of SAEBench's core evaluation; what saelab does not measure is null.

    `sae` adds its configuration and where it was loaded from. Metrics that are undefined are null, too.
    """
    write_json(path, describe_core(evaluation, sae))


def describe_core(evaluation: Evaluation, sae: SAE | None = None) -> dict[str, Any]:
    """The record that `save_saebench` writes, as a dictionary."""
    version = evaluation.versions.get("saelab", "")
    return {
        "eval_type_id": "core",
        "eval_config": {
            "model_name": evaluation.model,
            "context_size": (evaluation.provenance or {}).get("ctx_len"),
            "dataset": evaluation.text,
            "exclude_special_tokens_from_reconstruction": bool(evaluation.mask.get("special", False)),
            "n_tokens": evaluation.n_tokens,
            "mask": evaluation.mask,
        },
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": _group(evaluation),
        "eval_result_details": [],
        "sae_bench_commit_hash": f"saelab {version}",
        "sae_lens_id": "custom_sae",
        "sae_lens_release_id": shareable((sae.name_or_path if sae is not None else "") or evaluation.sae),
        "sae_lens_version": f"saelab {version}",
        "sae_cfg_dict": sae.cfg.to_dict() if sae is not None else {},
        "eval_result_unstructured": {"intervals": evaluation.intervals, "baselines": evaluation.baselines},
    }


def _group(found: Evaluation) -> dict[str, dict[str, Any]]:
    metrics: dict[str, dict[str, Any]] = {
        "model_behavior_preservation": {
            "kl_div_score": found.kl_score,
            "kl_div_with_ablation": found.kl_zero,
            "kl_div_with_sae": found.kl,
        },
        "model_performance_preservation": {
            "ce_loss_score": found.loss_recovered,
            "ce_loss_with_ablation": found.ce_zero,
            "ce_loss_with_sae": found.ce_sae,
            "ce_loss_without_sae": found.ce_clean,
        },
        "reconstruction_quality": {"explained_variance": found.explained_variance, "cossim": found.cosine},
        "shrinkage": {"relative_reconstruction_bias": found.bias},
        "sparsity": {"l0": found.l0},
        "token_stats": {
            "total_tokens_eval_reconstruction": found.n_tokens,
            "total_tokens_eval_sparsity_variance": found.n_tokens,
        },
        "misc_metrics": {"frac_alive": 1 - found.dead_frac},
    }
    for category, names in NOT_MEASURED.items():
        metrics[category] |= dict.fromkeys(names)
    return metrics
