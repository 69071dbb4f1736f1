"""`steering_baselines`: directions and a control feature for a concept, to compare with steering a feature."""

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab.collecting.harvesting import require_harvested
from saelab.interventions.directions import Direction, make_random
from saelab.interventions.interventions import Intervention, Mode, TokenSelection, Unit
from saelab.lm.generation import generate
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model, find_context
from saelab.lm.tokenizers import find_special_ids
from saelab.lm.tokens import PADDING, Tokens
from saelab.probing.labeled_activations import LabeledActivations, collect_labeled
from saelab.probing.linear_directions import density_matched_features, fit_direction
from saelab.sae.sae import SAE
from saelab.steering.dose_response import SteeringSource
from saelab.steering.target_concepts import TokenConcept
from saelab.stores.feature_store import FeatureStore

LEAST = 10
"""fewest tokens before words of a concept that directions are fitted from"""
OWN_TEXTS, OWN_TOKENS = 128, 60


def steering_baselines(
    model: AnyModel,
    sae: SAE,
    feature: int,
    concept: TokenConcept,
    tokens: Tokens,
    *,
    unit: Unit = "norm",
    mode: Mode = "add",
    where: TokenSelection = "all",
    store: FeatureStore | None = None,
    sign: int | None = None,
    hook_point: str | None = None,
    allow_mismatch: bool = False,
    n_random: int = 1,
    seed: int = 0,
) -> dict[str, SteeringSource]:
    """A feature and baselines of the same length by name, as sources for `steering_curve`.

    "means" is the difference in means, and "probe" a logistic regression, between activations of tokens followed by a
    word of the concept in `tokens` and of others; "random" is a random direction, or several; with a `store` there is
    also a control feature with about the same firing rate and codes that are uncorrelated. All point toward the
    concept.

    Args:
        model: language model.
        sae: SAE the feature is of.
        feature: index of the feature.
        concept: target concept of tokens.
        tokens: text to fit directions on.
        unit: of strengths, as in `Intervention`.
        mode: as in `Intervention`.
        where: tokens that are steered, as in `Intervention`.
        store: codes of the SAE on some text, for unit "max" and for the control feature.
        sign: 1 or -1, the sign of the feature's codes that means more of the concept; by default that of the difference
            of its mean code before words of the concept to the mean code elsewhere.
        hook_point: where the SAE reads; by default where it was trained.
        allow_mismatch: go ahead with an SAE of another model, weight processing or hook point.
        n_random: number of random directions, "random", "random 2", ...; a direction of no meaning has a larger effect
            than all of them with probability 1 / (n_random + 1), so 19 make a test at level 5 %.
        seed: of the sample of tokens and of the random directions.

    Raises:
        ValueError: for no random direction, where fewer than 10 tokens precede words of the concept, and for an SAE of
            another model, weight processing or hook point (unless `allow_mismatch`).

    >>> model, sae = sl.lm.tiny_model(), sl.SAE(sl.SAEConfig(d_in=32, d_sae=48))
    >>> tokens = sl.tokenize(model, ["a tin can, a bin"] * 9, ctx_len=32)
    >>> point = "blocks.1.hook_resid_post"
    >>> list(steering_baselines(model, sae, 3, TokenConcept("i", (int(tokens.ids[0, 4]),)), tokens, hook_point=point))
    ['feature 3', 'means', 'probe', 'random']
    """
    model = as_model(model)
    own = Intervention(
        sae, {feature: 1.0}, mode, where, unit, store, hook_point=hook_point, allow_mismatch=allow_mismatch
    )
    own.require_match(model)
    if n_random < 1:
        raise ValueError(f"`n_random` must be at least 1, got {n_random}; a feature must beat a random direction.")
    before = mark_before(tokens, concept)
    if (n := int(before.sum())) < LEAST:
        raise ValueError(
            f"Directions need {LEAST} tokens before words of the concept, got {n} in {tokens.n_tokens:,} tokens of "
            f"{tokens.source}; give more text, or text with more of '{concept.name}'."
        )
    rows = collect_labeled(model, tokens, before, own.writes_at, seed=seed)
    side = sign or _find_side(sae, feature, collect_labeled(model, tokens, before, own.reads_at, seed=seed))
    found: dict[str, SteeringSource] = {f"feature {feature}": replace(own, features={feature: float(side)})}
    directions = [fit_direction(rows.x, rows.y, own.writes_at, method) for method in ("means", "probe")]
    length = float(own.rows[0].norm())
    for direction in directions:
        found[direction.name] = _steer_alike(direction, own, length)
    for i in range(n_random):
        found[f"random {i + 1}" if i else "random"] = _steer_alike(make_random(directions[0], seed + i), own, length)
    if store is not None:
        require_harvested(store, sae)
        [other] = density_matched_features(store, feature)
        found[f"feature {other}"] = replace(own, features={other: 1.0})
    return found


@torch.no_grad()
def _find_side(sae: SAE, feature: int, rows: LabeledActivations) -> int:
    """Sign of the difference of a feature's mean codes where the label is true and where it is false."""
    z = sae.encode_latents(rows.x.to(sae.device), [feature])[:, 0].cpu()
    return -1 if z[rows.y].mean() < z[~rows.y].mean() else 1


def _steer_alike(direction: Direction, own: Intervention, length: float) -> Intervention:
    """The intervention of equal length along a direction; `length` is the norm of the change for a code of 1."""
    code = float(next(iter(own.strengths.values())))  # its largest, of unit "max"
    weight = length if own.unit == "raw" and own.mode != "scale" else 1.0
    return Intervention(replace(direction, peak=code * length), weight, own.mode, own.where, own.unit)


def mark_before(tokens: Tokens, concept: TokenConcept) -> Bool[Tensor, "n_seq ctx_len"]:
    """Mask of the tokens directly before a token of the concept in the same document."""
    next_is = torch.isin(tokens.ids, torch.tensor(concept.ids, dtype=tokens.ids.dtype)).roll(-1, 1)
    same = (tokens.doc_ids.roll(-1, 1) == tokens.doc_ids) & tokens.attention_mask
    same[:, -1] = False
    return next_is & same


def write_own(model: Model, prompts: list[str], seed: int = 0, *, progress: bool = True) -> Tokens:
    """Text sampled from the model itself, about 7,000 tokens, for use where no other text is given.

    Args:
        model: language model.
        prompts: texts to continue.
        seed: of the sampling.
        progress: show a progress bar.
    """
    n = -(-OWN_TEXTS // len(prompts))
    room = find_context(model) - 16
    made = generate(model, prompts, min(OWN_TOKENS, room), n=n, seed=seed, progress=progress)
    longest = max(len(sample.all_ids) for sample in made)
    ids, doc_ids = torch.zeros(len(made), longest), torch.full((len(made), longest), PADDING)
    for i, sample in enumerate(made):
        ids[i, : len(sample.all_ids)] = torch.tensor(sample.all_ids)
        doc_ids[i, : len(sample.all_ids)] = i
    special = find_special_ids(model)
    return Tokens(
        ids=ids.int(), doc_ids=doc_ids.int(), special_ids=special, source="the model's own", bos=True, packed=False
    )
