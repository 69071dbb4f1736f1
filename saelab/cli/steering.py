"""`saelab steer` and `saelab steer-curve`: generate text with steered features, and measure effect and cost."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from saelab.cli import options
from saelab.cli.sources import Source, read_value
from saelab.cli.terminal import echo

if TYPE_CHECKING:
    from saelab.lm.generation import StreamedToken

OPENINGS = (
    "Once upon a time", "One day", "There was a", "She went to the", "He saw a", "They", "The boy", "The girl",
    "In the morning", "Then", "It was", "After a while",
)  # fmt: skip
"""what texts of a curve begin with where nothing is given"""
STEER = Source("saelab.interventions.steering_hooks:steer")
GENERATE = Source("saelab.steering.text_comparison:compare_generations")
CURVE = Source("saelab.steering.dose_response:steering_curve")
SAMPLING = Source("saelab.lm.generation:SamplingConfig")
CONCEPT = Source("saelab.steering.target_concepts:concept_from_words")
PARTS = read_value("saelab.interventions.interventions:TextPart")

FeatureOption = Annotated[list[int], Option("--feature", help="Number of a feature; may be given again.", metavar="N")]
WhereName = Annotated[str, Option(help=f"Tokens that are changed: {', '.join(PARTS)}.", metavar="NAME")]
Store = Annotated[Path | None, Option(metavar="FOLDER", show_default="none")]
HookPoint = Annotated[str | None, Option(metavar="NAME")]
NTexts = Annotated[int, Option("--n", metavar="N")]
Temperature = Annotated[float, Option(metavar="T")]
TopKTokens = Annotated[int | None, Option(metavar="K")]
TopP = Annotated[float | None, Option(metavar="P")]


@options.documented_by(STEER, GENERATE, SAMPLING)
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
    mode: options.Name = STEER.mode,
    where: WhereName = STEER.where,
    unit: options.Name = STEER.unit,
    store: Store = None,
    hook_point: HookPoint = None,
    n: NTexts = GENERATE.n,
    n_tokens: options.Count = GENERATE.n_tokens,
    temperature: Temperature = SAMPLING.temperature,
    top_k: TopKTokens = SAMPLING.top_k,
    top_p: TopP = SAMPLING.top_p,
    seed: options.Count = GENERATE.seed,
    chat: options.Chat = False,
    json: options.AsJSON = False,
    html: Annotated[
        Path | None, Option(help="Page for the texts, colored.", metavar="FILE", show_default="none")
    ] = None,
    stream: Annotated[
        bool | None,
        Option("--stream/--no-stream", help="Show texts as they are written, or not.", show_default="in a terminal"),
    ] = None,
    allow_mismatch: options.AllowMismatch = False,
    device: options.Device = None,
    backend: options.BackendName = "auto",
    progress: options.Progress = True,
) -> None:
    """Continue prompts without steering and with steered features: texts side by side, sampled with the same seed.

    Perplexities and KL measure the cost.
    """
    from saelab.cli.inputs import as_messages, open_placed
    from saelab.interventions.interventions import Intervention
    from saelab.lm.generation import SamplingConfig
    from saelab.steering.text_comparison import compare_generations
    from saelab.stores.feature_store import FeatureStore
    from saelab.stores.files import to_json, write_atomic
    from saelab.visualization.intervention_plots import show_generations

    strengths = strength or [1.0]
    if len(strengths) not in (1, len(feature)):
        raise ValueError(f"Give one `--strength`, or one for each feature, got {len(strengths)} for {len(feature)}.")
    coder, lm, place = open_placed(sae, model, hook_point, allow_mismatch, device, progress, backend)
    moved = dict(zip(feature, strengths * (len(feature) if len(strengths) == 1 else 1), strict=True))
    peaks = FeatureStore.load(store) if store is not None else None
    how: dict[str, Any] = {"mode": mode, "where": where, "unit": unit, "store": peaks}
    intervention = Intervention(coder, moved, **how, hook_point=place, allow_mismatch=allow_mismatch)
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    texts = as_messages(prompts) if chat else prompts
    live = not json and (sys.stdout.isatty() if stream is None else stream)
    how = {"n": n, "seed": seed, "sampling": sampling, "on_token": _show_texts(prompts, n) if live else None}
    found = compare_generations(lm, intervention, texts, n_tokens, progress=progress and not live, **how)
    if live:
        echo(f"\n\n{found.format_rows(texts=False)}")
    else:
        echo(to_json(found.to_dict()) if json else str(found))
    if html is not None:
        write_atomic(html, show_generations(found).encode())


def _show_texts(prompts: list[str], n: int) -> "Callable[[str, int, StreamedToken], None]":
    """What prints texts as they are written, each behind its prompt."""
    shown: list[tuple[str, int]] = []

    def show(name: str, number: int, token: "StreamedToken") -> None:
        if (name, number) not in shown[-1:]:
            echo(f"{'' if not shown else chr(10) * 2}[{name}] {prompts[number // n]}", nl=False)
            shown.append((name, number))
        echo(token.text, nl=False)

    return show


@options.documented_by(STEER, CURVE, SAMPLING, CONCEPT)
def draw_curve(
    sae: options.SAEName,
    model: options.ModelName,
    feature: FeatureOption,
    concept: Annotated[
        str,
        Option(
            "--concept", help=f"Words joined by commas, or {options.WORLD}NAME for a concept of tales.", metavar="WORDS"
        ),
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
    mode: options.Name = STEER.mode,
    where: WhereName = STEER.where,
    unit: options.Name = CURVE.unit,
    store: Store = None,
    hook_point: HookPoint = None,
    n: NTexts = CURVE.n,
    n_tokens: options.Count = CURVE.n_tokens,
    temperature: Temperature = SAMPLING.temperature,
    top_k: TopKTokens = SAMPLING.top_k,
    top_p: TopP = SAMPLING.top_p,
    seed: options.Count = GENERATE.seed,
    out: Annotated[
        Path | None, Option(help="Page for tables and figures.", metavar="FILE", show_default="none")
    ] = None,
    json: options.JSONFile = None,
    allow_mismatch: options.AllowMismatch = False,
    device: options.Device = None,
    backend: options.BackendName = "auto",
    progress: options.Progress = True,
) -> None:
    """Measure the effect of steering on a concept, and its cost, over strengths, compared with baselines.

    The concept is a set of words, each a token of the model. Directions are found where such words follow, in --text
    or in text that the model writes.
    """
    from saelab.cli.inputs import open_placed, read_concept, read_or_write
    from saelab.interventions.interventions import Intervention
    from saelab.lm.generation import SamplingConfig
    from saelab.steering.baselines import steering_baselines
    from saelab.steering.dose_response import SteeringSource, steering_curve
    from saelab.stores.feature_store import FeatureStore
    from saelab.stores.files import write_atomic
    from saelab.visualization.intervention_plots import show_curve

    coder, lm, place = open_placed(sae, model, hook_point, allow_mismatch, device, progress, backend)
    opened = FeatureStore.load(store) if store is not None else None
    concepts = [read_concept(lm, words, first_token) for words in (concept, *other)]
    openings = prompt or list(OPENINGS)
    how: dict[str, Any] = {"unit": unit, "mode": mode, "where": where, "store": opened}
    at: dict[str, Any] = {"hook_point": place, "allow_mismatch": allow_mismatch}
    sources: dict[str, SteeringSource] = {f"feature {i}": Intervention(coder, {i: 1.0}, **how, **at) for i in feature}
    if baselines:
        tokens = read_or_write(lm, text, openings, seed, progress)
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


def _read_strengths(given: str | None) -> list[float] | None:
    if given is None:
        return None
    try:
        return [float(part) for part in given.split(",")]
    except ValueError:
        raise ValueError(f"`--strengths` must be numbers joined by commas, got '{given}'.") from None
