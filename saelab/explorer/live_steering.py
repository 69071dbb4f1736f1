"""Steering while somebody reads: texts without steering, steered, and moved at random, streamed from the same noise.

The texts take turns of a few tokens, so that all of them grow on the page at once. Edits are on the model during a turn
alone.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from saelab.explorer.security import LIMITS, ExplorerLimits
from saelab.interventions.interventions import Intervention, Mode, Unit
from saelab.interventions.steering_hooks import steer_all, steer_randomly
from saelab.lm.generation import SamplingConfig, TokenStream, stream_tokens
from saelab.lm.hook_points import hook_points_of
from saelab.lm.hooks import TokenTracker
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.sae.sae import SAE
from saelab.steering.text_comparison import UNSTEERED, SteeredTexts, TextRow, score_texts
from saelab.stores.feature_store import FeatureStore
from saelab.stores.validation import read_fields, require_object

TURN_TOKENS, TURN_SECONDS = 16, 0.1
"""a turn ends after so many tokens, or after the token on which it has taken so long"""
STEERED, RANDOM = "steered", "random"


@dataclass(frozen=True, kw_only=True)
class MovedFeature:
    """One feature of a steering set-up."""

    feature: int
    strength: float = 1.0
    mode: Mode = "add"
    unit: Unit = "raw"


@dataclass(frozen=True, kw_only=True)
class SteeringSetup:
    """Features that are moved together, and how the texts are drawn."""

    prompt: str
    features: tuple[MovedFeature, ...]
    n_tokens: int = 60
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    random: bool = True
    """whether a text along a random direction of the same norm is drawn, too"""

    @classmethod
    def from_dict(cls, plain: object, limits: ExplorerLimits = LIMITS) -> "SteeringSetup":
        """The set-up in a JSON object; ValueError for one that is wrong or beyond the limits."""
        given = require_object(plain, "A steering set-up")
        moved = given.get("features", ())
        if not isinstance(moved, list | tuple) or not 1 <= len(moved) <= limits.n_features:
            raise ValueError(f"`features` must list 1 to {limits.n_features} features. Choose some, or fewer.")
        setup = read_fields(cls, given | {"features": [read_fields(MovedFeature, one) for one in moved]})
        require_prompt(setup.prompt, limits)
        if not 1 <= setup.n_tokens <= limits.n_tokens:
            raise ValueError(f"`n_tokens` must be in 1..{limits.n_tokens}, got {setup.n_tokens}.")
        if len({one.feature for one in setup.features}) < len(setup.features):
            raise ValueError("`features` must name each feature once. Put the strengths of one feature together.")
        _ = setup.sampling
        return setup

    @property
    def sampling(self) -> SamplingConfig:
        """How each token is drawn."""
        return SamplingConfig(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    def interventions(self, sae: SAE, store: FeatureStore) -> list[Intervention]:
        """One intervention for each mode and unit, which apply in this order at the hook point of the store."""
        together: dict[tuple[Mode, Unit], dict[int, float]] = {}
        for one in self.features:
            together.setdefault((one.mode, one.unit), {})[one.feature] = one.strength
        place = {"store": store, "hook_point": store.provenance.hook_point}
        return [
            Intervention(sae, list(moved) if mode == "ablate" else moved, mode, "all", unit, **place)  # type: ignore[arg-type]
            for (mode, unit), moved in together.items()
        ]


def require_prompt(text: str, limits: ExplorerLimits = LIMITS) -> None:
    """Raise ValueError for a prompt that is blank or too long."""
    if not text.strip():
        raise ValueError("A prompt must hold text, got a blank one.")
    if len(text) > limits.prompt:
        raise ValueError(f"A prompt may have at most {limits.prompt:,} characters, got {len(text):,}. Shorten it.")


@dataclass(eq=False)
class _Text:
    """One text that is being drawn."""

    stream: TokenStream
    steered: Callable[..., AbstractContextManager[Any]]
    """enters the context in which its tokens are drawn; takes the tracker of its tokens"""
    tracker: TokenTracker

    def draw(self) -> Iterator[dict[str, Any]]:
        """The tokens of the next turn; none at the end of the text."""
        begin = time.perf_counter()
        with self.steered(tracker=self.tracker):
            for _, token in zip(range(TURN_TOKENS), self.stream, strict=False):
                yield {"token": token.text, "log_prob": token.log_prob}
                if time.perf_counter() - begin > TURN_SECONDS:
                    return


def steer_live(
    model: AnyModel,
    interventions: list[Intervention],
    setup: SteeringSetup,
    lock: AbstractContextManager[Any] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Events of each turn: tokens of one of the texts, and in the end KL and perplexities.

    Closing the iterator leaves no edit on the model and holds no cache. The texts are those that `generate` gives with
    the same seed, with the edits and without.

    Args:
        model: language model.
        interventions: what is moved.
        setup: prompt, length and sampling.
        lock: held during each turn, so that others may use the model between two.

    Raises:
        ValueError: before the first turn, as `stream_tokens` and `steer`.
    """
    model = as_model(model)
    lock = lock or nullcontext()
    ways: dict[str, Callable[..., AbstractContextManager[Any]]] = {
        UNSTEERED: _leave,
        STEERED: partial(steer_all, model, interventions),
    }
    if setup.random:
        ways[RANDOM] = partial(steer_randomly, model, interventions, setup.seed)
    with lock:  # what is measured of a model once, is measured by running it
        for intervention in interventions:
            intervention.require_match(model)
        texts = {name: _begin(model, setup, steered) for name, steered in ways.items()}
    try:
        growing = dict(texts)
        while growing:
            for name, text in list(growing.items()):
                with lock:
                    drawn = [{"run": name, **token} for token in text.draw()]
                if drawn:
                    yield drawn
                else:
                    del growing[name]
        with lock:
            made = {name: SteeredTexts(ways[name], [text.stream.sample]) for name, text in texts.items()}
            [row] = score_texts(model, made.pop(UNSTEERED).samples, made)
        yield [describe_cost(row)]
    finally:
        for text in texts.values():
            text.stream.close()


def _leave(tracker: TokenTracker | None = None) -> AbstractContextManager[None]:
    return nullcontext()


def _begin(model: Model, setup: SteeringSetup, steered: Callable[..., AbstractContextManager[Any]]) -> _Text:
    stream = stream_tokens(model, setup.prompt, setup.n_tokens, seed=setup.seed, sampling=setup.sampling)
    return _Text(stream, steered, TokenTracker(hook_points_of(model)))


def describe_cost(row: TextRow) -> dict[str, Any]:
    """The last event: what steering cost, by text.

    `perplexity` is that of each text to the unsteered model, `own_perplexity` to the model that wrote it, `kl` the mean
    KL divergence of the steered from the unsteered predictions along the unsteered text, in nats.
    """
    texts: Mapping[str, Any] = {UNSTEERED: row.unsteered, **row.steered}
    return {
        "done": True,
        "kl": dict(row.kl),
        "perplexity": {name: text.perplexity() for name, text in texts.items()},
        "own_perplexity": {name: text.perplexity(name) for name, text in texts.items()},
    }
