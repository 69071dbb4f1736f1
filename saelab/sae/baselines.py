"""`fit_baselines`: what learned less than a given SAE, or from labels, as named SAEs that evaluations take."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from saelab.lm.token_labels import LabelsLike
from saelab.sae.classical_dictionaries import METHODS, DictionaryMethod, draw_tokens, fit_dictionary
from saelab.sae.config import SAEConfig
from saelab.sae.fitting import Data, mean_l0, open_data
from saelab.sae.joint_dictionary import fit_joint_dictionary, refuse_labels
from saelab.sae.pretrained import CONFIG
from saelab.sae.sae import SAE, fit
from saelab.sae.soft_frozen import SoftFrozen
from saelab.stores.activations import Activations
from saelab.stores.validation import read_fields
from saelab.training.config import TrainConfig

SANITY: dict[str, dict[str, Any]] = {
    "frozen_encoder": {"train_encoder": False},
    "frozen_decoder": {"dictionary": "frozen"},
    "soft_frozen": {"dictionary": SoftFrozen()},
}
"""fields of the SAE's configuration that a sanity baseline changes"""
JOINT = "joint"
USUAL = ("frozen_encoder", "soft_frozen", "ica", "l3", "kmeans")
L0_TOKENS = 4096  # on which the SAE's L0 is measured


def fit_baselines(
    sae: SAE,
    acts: Data,
    cfg: TrainConfig | None = None,
    *,
    methods: Sequence[str] | None = None,
    labels: LabelsLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, SAE]:
    """SAEs that learned less than a trained one, by name: the `baselines` of `evaluate`, `concept_baselines`,
    `compare`, `seed_stability` and `score_recovery`.

    A score that they reach too says little of what training found. Sanity baselines (arXiv:2602.14111) are trained as
    the SAE was, on the same batches, with one part held at its random start:

        frozen_encoder   W_enc and b_enc
        frozen_decoder   W_dec
        soft_frozen      W_dec within a cosine of 0.8 of its start

    With `labels` of the activations' tokens there is one more, trained as the SAE was on more than the activations:

        joint            reconstruction and labels at once, by `fit_joint_dictionary`

    The other names are methods of `fit_dictionary`, with the SAE's number of latents, or d_in where rows are
    orthogonal, and as many codes a token as the SAE has on average.

    Args:
        sae: the trained SAE.
        acts: the activations it was trained on.
        cfg: training configuration of those that are trained; None is that of the SAE's training, where it is on
            record.
        methods: names of the baselines; None is frozen_encoder, soft_frozen, ica, l3 and kmeans, and joint with labels,
            without those that such an SAE cannot have: a pursuit has no encoder to freeze, and a transcoder has sanity
            baselines alone.
        labels: of the tokens of `acts`, for "joint"; score it on other tokens.
        seed: of initial weights and samples; another one than the SAE's, whose rows start at the same directions.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for an unknown name, one that such an SAE cannot have, and "joint" without labels.

    >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) ** 3
    >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=16, activation=sl.TopK(k=2)), seed=1)
    >>> fit_baselines(sae, x, methods=["l3", "random"])["random"]
    SAE(AbsTopK(k=2), d_in=8, d_sae=16, OrthogonalMatchingPursuit(latents_per_round=1))
    """
    usual = (*USUAL, JOINT) if labels is not None else USUAL
    chosen = [name for name in usual if _why_not(sae, name) is None] if methods is None else list(methods)
    for name in chosen:
        if name not in SANITY and name not in METHODS and name != JOINT:
            known = [*SANITY, JOINT, *get_args(DictionaryMethod)]
            raise ValueError(f"`methods` must be of {known}, got '{name}'.")
        if (why := _why_not(sae, name)) is not None:
            raise ValueError(f"`methods` must be ones that this SAE can have, got '{name}': {why}.")
        if name == JOINT and labels is None:
            raise ValueError(
                f"'{JOINT}' must have `labels` of the tokens of `acts`, got none; give them, or leave it out."
            )
    data = open_data(acts)
    trained = {name: SAE(replace(sae.cfg, **SANITY[name]), seed).to(sae.device) for name in chosen if name in SANITY}
    if trained:
        fit(list(trained.values()), data, cfg or _recorded(sae), progress=progress)
    if JOINT in chosen and labels is not None:
        both = SAE(sae.cfg, seed).to(sae.device)
        fit_joint_dictionary(both, data, labels, cfg or _recorded(sae), progress=progress)
        trained[JOINT] = both
    fitted = {}
    if classical := [name for name in chosen if name in METHODS]:
        if not isinstance(data, Activations):
            raise ValueError(f"`acts` must be collected for '{classical[0]}', got a stream; leave it out, or collect.")
        k = max(1, round(mean_l0(sae, draw_tokens(data, L0_TOKENS, seed))))
        fitted = {name: _fit_one(sae, data, name, k, seed) for name in classical}
    return {name: (trained | fitted)[name] for name in chosen}


def _why_not(sae: SAE, name: str) -> str | None:
    """Why an SAE cannot have a baseline, or None."""
    if name == "frozen_encoder" and sae.cfg.encoder != "linear":
        return f"its encoder is {sae.cfg.encoder}, which cannot be frozen"
    if name in SANITY:
        try:
            replace(sae.cfg, **SANITY[name])
        except ValueError as error:
            return str(error)
    if name == JOINT:
        return refuse_labels(sae.cfg)
    if name in METHODS and sae.cfg.d_out is not None:
        return "it is a transcoder, whose rows are not of its input"
    return None


def _fit_one(sae: SAE, acts: Activations, method: str, k: int, seed: int) -> SAE:
    d_sae = min(sae.cfg.d_sae, acts.d_in) if METHODS[method].orthogonal else sae.cfg.d_sae
    made = fit_dictionary(acts, method, d_sae=d_sae, k=min(k, d_sae), seed=seed)  # type: ignore[arg-type]
    return made.to(sae.device)


def _recorded(sae: SAE) -> TrainConfig:
    """The configuration that an SAE was trained with from the start, as far as it is on record."""
    names, record = {field.name for field in fields(TrainConfig)}, sae.training_ or {}
    while record.get("before"):  # it was fine-tuned since
        record = record["before"]
    return read_fields(TrainConfig, {name: v for name, v in record.items() if name in names})


def load_baselines(folder: str | Path) -> dict[str, SAE]:
    """The SAEs in the folders of a folder, by the folders' names; FileNotFoundError where there is none."""
    found = sorted(path.parent for path in Path(folder).glob(f"*/{CONFIG}"))
    if not found:
        raise FileNotFoundError(f"'{folder}' must hold folders of SAEs, got none; save each with `save_pretrained`.")
    return {path.name: SAE.from_pretrained(path) for path in found}


def check_baselines(baselines: Mapping[str, SAE], cfg: SAEConfig, taken: Sequence[str]) -> None:
    """Raise ValueError for baselines of another width than an SAE, or with a name that is taken.

    Args:
        baselines: SAEs by name.
        cfg: configuration of the SAE that they are compared with.
        taken: names of other rows.
    """
    widths = (cfg.d_in, cfg.d_target)
    for name, each in baselines.items():
        if name in taken:
            raise ValueError(f"Names of `baselines` must differ from {sorted(taken)}, got '{name}'; give it another.")
        if (each.cfg.d_in, each.cfg.d_target) != widths:
            raise ValueError(f"`baselines` must have the SAE's widths (in, out) {widths}, got {each} as '{name}'.")
