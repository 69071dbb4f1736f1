"""`saelab steer` and `saelab steer-curve`: generate text with steered features, and measure effect and cost."""

from pathlib import Path
from typing import Annotated, Any, get_args

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.inputs import echo, open_pair, read_head
from saelab.interventions.interventions import Intervention, TextPart
from saelab.interventions.steering_hooks import steer
from saelab.lm.generation import SAMPLING, SamplingConfig
from saelab.lm.model_checks import Model, find_context
from saelab.lm.tokens import Tokens
from saelab.sae.compatibility import match_model
from saelab.sae.sae import SAE
from saelab.steering.baselines import steering_baselines, write_own
from saelab.steering.dose_response import SteeringSource, steering_curve
from saelab.steering.target_concepts import TokenConcept, concept_from_words, synthetic_concept
from saelab.steering.text_comparison import compare_generations
from saelab.stores.feature_store import FeatureStore
from saelab.stores.files import to_json, write_atomic
from saelab.visualization.intervention_plots import show_curve, show_generations

WORLD = "tales:"
OPENINGS = (
    "Once upon a time", "One day", "There was a", "She went to the", "He saw a", "They", "The boy", "The girl",
    "In the morning", "Then", "It was", "After a while",
)  # fmt: skip
"""what texts of a curve begin with where nothing is given"""
TEXT_TOKENS = 50_000
MODE, WHERE, UNIT = (options.default_of(steer, name) for name in ("mode", "where", "unit"))
N_TEXTS, N_TOKENS, SEED = (options.default_of(compare_generations, name) for name in ("n", "n_tokens", "seed"))
CURVE_UNIT, CURVE_N, CURVE_TOKENS = (options.default_of(steering_curve, name) for name in ("unit", "n", "n_tokens"))

FeatureOption = Annotated[list[int], Option("--feature", help="Number of a feature; may be given again.", metavar="N")]
WhereName = Annotated[str, Option(help=f"Tokens that are changed: {', '.join(get_args(TextPart))}.", metavar="NAME")]
Store = Annotated[Path | None, Option(metavar="FOLDER", show_default="none")]
HookPoint = Annotated[str | None, Option(metavar="NAME")]
NTexts = Annotated[int, Option("--n", metavar="N")]
Temperature = Annotated[float, Option(metavar="T")]
TopKTokens = Annotated[int | None, Option(metavar="K")]
TopP = Annotated[float | None, Option(metavar="P")]


@options.documented_by(steer, compare_generations, SamplingConfig)
def steer_prompts(
    sae: options.SAEName,
    model: options.ModelName,
    prompts: Annotated[list[str], Argument(metavar="PROMPT", help="Text to continue; several are all continued.")],
    feature: FeatureOption,
    strength: Annotated[
        list[float],
        Option(
            "--strength", help="How far it is moved, for each feature or once for all.", metavar="X", show_default="1"
        ),
    ] = [],  # noqa: B006 - typer copies it
    mode: options.Name = MODE,
    where: WhereName = WHERE,
    unit: options.Name = UNIT,
    store: Store = None,
    hook_point: HookPoint = None,
    n: NTexts = N_TEXTS,
    n_tokens: options.Count = N_TOKENS,
    temperature: Temperature = SAMPLING.temperature,
    top_k: TopKTokens = SAMPLING.top_k,
    top_p: TopP = SAMPLING.top_p,
    seed: options.Count = SEED,
    json: options.AsJSON = False,
    html: Annotated[
        Path | None, Option(help="Page for the texts, colored.", metavar="FILE", show_default="none")
    ] = None,
    allow_mismatch: options.AllowMismatch = False,
    device: options.Device = None,
    progress: options.Progress = True,
) -> None:
    """Continue prompts without steering and with steered features: texts side by side, sampled with the same seed.

    Perplexities and KL measure the cost.
    """
    strengths = strength or [1.0]
    if len(strengths) not in (1, len(feature)):
        raise ValueError(f"Give one `--strength`, or one for each feature, got {len(strengths)} for {len(feature)}.")
    coder, lm, place = _open(sae, model, hook_point, allow_mismatch, device, progress)
    moved = dict(zip(feature, strengths * (len(feature) if len(strengths) == 1 else 1), strict=True))
    peaks = FeatureStore.load(store) if store is not None else None
    how: dict[str, Any] = {"mode": mode, "where": where, "unit": unit, "store": peaks}
    intervention = Intervention(coder, moved, **how, hook_point=place, allow_mismatch=allow_mismatch)
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    found = compare_generations(
        lm, intervention, prompts, n_tokens, n=n, seed=seed, sampling=sampling, progress=progress
    )
    echo(to_json(found.to_dict()) if json else str(found))
    if html is not None:
        write_atomic(html, show_generations(found).encode())


@options.documented_by(steer, steering_curve, SamplingConfig, concept_from_words)
def draw_curve(
    sae: options.SAEName,
    model: options.ModelName,
    feature: FeatureOption,
    concept: Annotated[
        str,
        Option("--concept", help=f"Words joined by commas, or {WORLD}NAME for a concept of tales.", metavar="WORDS"),
    ],
    other: Annotated[
        list[str],
        Option("--other", help="Words of another concept, for selectivity; may be given again.", metavar="WORDS"),
    ] = [],  # noqa: B006
    first_token: Annotated[bool, Option("--first-token")] = False,
    baselines: Annotated[
        bool,
        Option(
            "--baselines/--no-baselines",
            help="Steer by the difference in means, a probe, a random direction, and with --store by another feature, "
            "too.",
        ),
    ] = False,
    prompt: Annotated[
        list[str],
        Option("--prompt", help="Text to continue; may be given again.", metavar="TEXT", show_default="openings"),
    ] = [],  # noqa: B006
    text: Annotated[
        Path | None,
        Option(help="Text that baselines learn the concept from.", metavar="FILE", show_default="the model's own"),
    ] = None,
    strengths: Annotated[
        str | None, Option(help="Numbers joined by commas, of both signs.", metavar="X,Y", show_default="by unit")
    ] = None,
    mode: options.Name = MODE,
    where: WhereName = WHERE,
    unit: options.Name = CURVE_UNIT,
    store: Store = None,
    hook_point: HookPoint = None,
    n: NTexts = CURVE_N,
    n_tokens: options.Count = CURVE_TOKENS,
    temperature: Temperature = SAMPLING.temperature,
    top_k: TopKTokens = SAMPLING.top_k,
    top_p: TopP = SAMPLING.top_p,
    seed: options.Count = SEED,
    out: Annotated[
        Path | None, Option(help="Page for tables and figures.", metavar="FILE", show_default="none")
    ] = None,
    json: options.JSONFile = None,
    allow_mismatch: options.AllowMismatch = False,
    device: options.Device = None,
    progress: options.Progress = True,
) -> None:
    """Measure the effect of steering on a concept, and its cost, over strengths, compared with baselines.

    The concept is a set of words, each a token of the model. Directions are found where such words follow, in --text
    or in text that the model writes.
    """
    coder, lm, place = _open(sae, model, hook_point, allow_mismatch, device, progress)
    opened = FeatureStore.load(store) if store is not None else None
    concepts = [_read_concept(lm, words, first_token) for words in (concept, *other)]
    openings = prompt or list(OPENINGS)
    how: dict[str, Any] = {"unit": unit, "mode": mode, "where": where, "store": opened}
    at: dict[str, Any] = {"hook_point": place, "allow_mismatch": allow_mismatch}
    sources: dict[str, SteeringSource] = {f"feature {i}": Intervention(coder, {i: 1.0}, **how, **at) for i in feature}
    if baselines:
        tokens = _read_text(lm, text, openings, seed, progress)
        sources |= steering_baselines(lm, coder, feature[0], concepts[0], tokens, seed=seed, **how, **at)
    curve = steering_curve(
        lm,
        sources,
        concepts[0],
        openings,
        strengths=_read_strengths(strengths),
        others={one.name: one for one in concepts[1:]},
        n=n,
        n_tokens=n_tokens,
        seed=seed,
        sampling=SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p),
        progress=progress,
        **how,
    )
    echo(str(curve))
    if json is not None:
        curve.save(json)
    if out is not None:
        write_atomic(out, show_curve(curve).encode())
        echo(f"{len(curve.points) - 1} strengths in {out}.")


def _open(
    sae: str, model: str, hook_point: str | None, allow_mismatch: bool, device: str | None, progress: bool
) -> tuple[SAE, Model, str]:
    """The SAE, the model, and the place of the one in the other."""
    coder, lm = open_pair(sae, model, device, progress)
    return coder, lm, match_model(coder, lm, hook_point, None, allow_mismatch).hook_point


def _read_concept(model: Model, words: str, first_token: bool) -> TokenConcept:
    if words.startswith(WORLD):
        return synthetic_concept(model, words.removeprefix(WORLD))
    found = concept_from_words(model, words, first_token=first_token)
    assert isinstance(found, TokenConcept)
    return found


def _read_text(model: Model, text: Path | None, openings: list[str], seed: int, progress: bool) -> Tokens:
    """What directions are found in: texts of another seed than those that are measured, where none are given."""
    if text is None:
        return write_own(model, openings, seed + 1, progress=progress)
    length = min(options.CTX_LEN, find_context(model))
    return read_head(model, text, TEXT_TOKENS, length, True, options.SEPARATOR, options.FIELD)


def _read_strengths(given: str | None) -> list[float] | None:
    if given is None:
        return None
    try:
        return [float(part) for part in given.split(",")]
    except ValueError:
        raise ValueError(f"`--strengths` must be numbers joined by commas, got '{given}'.") from None
