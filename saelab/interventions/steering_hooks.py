"""`steer` and `splice`: context managers that steer features, or replace activations, in all forward passes inside."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab.interventions.directions import Direction, make_random
from saelab.interventions.edited_runs import ReadActivations
from saelab.interventions.interventions import (
    ActivationCondition,
    Error,
    FeatureStrengths,
    Intervention,
    Mode,
    TokenSelection,
    Unit,
    hook_point_of,
)
from saelab.lm.hooks import ForwardTokens, TokenTracker, replace_activations as splice_edits, watch
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.lm.tokenizers import find_special_ids
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore


@contextmanager
def steer(
    model: AnyModel,
    source: SAE | Direction,
    features: FeatureStrengths = (),
    *,
    mode: Mode = "add",
    where: TokenSelection = "all",
    unit: Unit = "raw",
    store: FeatureStore | None = None,
    error: Error = "keep",
    hook_point: str | None = None,
    allow_mismatch: bool = False,
) -> Iterator[Model]:
    """A context in which features are steered in every forward pass of the model, at every token of `where`.

    All forward passes count, also those run by other libraries. Contexts nest: an inner one reads what the outer ones
    left. The same tokens are changed with and without a key-value cache, alone and in a padded batch. Strengths without
    effect leave every bit as it is. No hook remains afterward, also after an error. Gradients flow to strengths and
    activations where PyTorch records them.

    Args:
        model: language model.
        source: SAE or direction.
        features: strengths by feature; for mode "ablate" a list of features; for a `Direction` its strength.
        mode: how codes change, by the formulas of `Intervention`: "add", "clamp", "floor", "scale" or "ablate".
        where: tokens that are changed: "all", "prompt", "generated", positions, a mask, a condition or a
            `TokenSelector`. Special tokens are not changed unless asked for.
        unit: unit of the strengths: "raw" codes, "max" multiples of the largest |z| in `store`, "norm" multiples of the
            norm of the token's activation.
        store: codes of the SAE on some text, for unit "max".
        error: "keep" or "drop" the reconstruction error.
        hook_point: where codes are read; by default where the SAE was trained.
        allow_mismatch: go ahead with an SAE of another model, weight processing or hook point.

    Raises:
        ValueError: for features, units, modes and hook points that do not exist, and for an SAE of another model,
            weight processing or hook point (unless `allow_mismatch`).

    >>> model, sae = sl.lm.tiny_model(), sl.SAE(sl.SAEConfig(d_in=32, d_sae=64))
    >>> ids = torch.full((1, 4), 65)
    >>> with sl.steer(model, sae, {3: 5.0}, hook_point="blocks.1.hook_resid_post"):
    ...     moved = sl.lm.logits(model, ids)
    >>> bool((moved != sl.lm.logits(model, ids)).any())
    True
    """
    model = as_model(model)
    intervention = Intervention(source, features, mode, where, unit, store, error, hook_point, allow_mismatch)
    with steer_all(model, [intervention]):
        yield model


@contextmanager
def steer_all(
    model: AnyModel, interventions: Sequence[Intervention], *, tracker: TokenTracker | None = None
) -> Iterator[Model]:
    """A context like `steer` with several interventions together: several SAEs, hook points, modes and places.

    At one hook point they apply in their order, each reading what the one before left.

    Args:
        model: language model.
        interventions: edits of the same or of different hook points.
        tracker: tracker of a text that was begun in an earlier block and goes on in this one; by default a text begins.

    >>> model, point = sl.lm.tiny_model(), "blocks.1.hook_resid_post"
    >>> up = sl.Intervention(sl.Direction(torch.ones(32), point), 2.0)
    >>> with sl.interventions.steer_all(model, [up, up]):
    ...     x = sl.lm.capture(model, torch.full((1, 4), 65), ["blocks.1.hook_out"])
    """
    model = as_model(model)
    for intervention in interventions:
        intervention.require_match(model)
    active = [intervention for intervention in interventions if not intervention.changes_nothing]
    with ExitStack() as stack:
        flow = _Later()
        for intervention in active:
            _attach(stack, model, intervention, flow)
        if active:
            flow.flow = stack.enter_context(watch(model, tracker))
        yield model


@contextmanager
def steer_randomly(
    model: AnyModel, interventions: Sequence[Intervention], seed: int = 0, *, tracker: TokenTracker | None = None
) -> Iterator[Model]:
    """A context like `steer_all` in which what all interventions change together goes along a random direction instead.

        x' = x + |steered(x) - x| r         r a random unit vector of the hook point, the same at every token

    Each token is moved as far as it would be by the interventions, whatever their modes and units: a baseline for them.

    Args:
        model: language model.
        interventions: edits whose changes give the norms.
        seed: seed of the random direction.
        tracker: as in `steer_all`.

    >>> model, point = sl.lm.tiny_model(), "blocks.1.hook_resid_post"
    >>> up = sl.Intervention(sl.Direction(torch.ones(32), point), 2.0)
    >>> with steer_randomly(model, [up]):
    ...     x = sl.lm.capture(model, torch.full((1, 4), 65), ["blocks.1.hook_out"])
    """
    model = as_model(model)
    active = [intervention for intervention in interventions if not intervention.changes_nothing]
    before = {intervention.writes_at: ReadActivations() for intervention in active}
    width = {intervention.writes_at: intervention.rows.shape[1] for intervention in active}
    turns = {
        point: _turn(reading, make_random(Direction(torch.ones(width[point]), point), seed).vector)
        for point, reading in before.items()
    }
    with (
        splice_edits(model, dict(before)),
        steer_all(model, interventions, tracker=tracker),
        splice_edits(model, turns),
    ):
        yield model


def _turn(before: ReadActivations, direction: Tensor) -> Callable[[Tensor], Tensor]:
    """An edit that moves activations as far from `before` as they are now, along the direction."""

    def edit(x: Tensor) -> Tensor:
        start = before.take()
        length = (x.float() - start.float()).norm(dim=-1, keepdim=True)
        return start + (length * direction.to(length)).to(start)

    return edit


@contextmanager
def splice(
    model: AnyModel,
    source: SAE | dict[str, Callable[[Tensor], Tensor]],
    *,
    error: Error = "drop",
    where: TokenSelection = "all",
    hook_point: str | None = None,
    allow_mismatch: bool = False,
) -> Iterator[Model]:
    """A context in which activations are replaced by an SAE's reconstructions, or by functions of them.

    With an SAE, `x' = x_hat`; `error="keep"` gives `x' = x_hat + (x - x_hat)`, which is x bit for bit, with gradients
    through the reconstruction alone. Contexts nest, edits of one hook point apply in order of entry, and no hook
    remains afterward, also after an error.

    Args:
        model: language model.
        source: an SAE; or functions by hook point, each of which takes activations (batch, ctx_len, d) in the model's
            dtype (a copy, free to be changed) and returns the same shape.
        error: "drop" or "keep" the reconstruction error.
        where: tokens that an SAE's reconstructions replace; special tokens are left as they are unless asked for.
        hook_point: where an SAE reads; by default where it was trained.
        allow_mismatch: go ahead with an SAE of another model, weight processing or hook point.

    Raises:
        ValueError: for a wrong name or shape, and for an SAE of another model, weight processing or hook point (unless
            `allow_mismatch`).
        RuntimeError: for a hook point that does not fire exactly once in a forward pass.

    >>> model, ids = sl.lm.tiny_model(), torch.ones(1, 4, dtype=torch.long)
    >>> with sl.splice(model, {"blocks.0.hook_resid_post": torch.zeros_like}):
    ...     x = sl.lm.capture(model, ids, ["blocks.0.hook_out"])["blocks.0.hook_out"]
    >>> float(x.abs().max())
    0.0
    """
    model = as_model(model)
    if isinstance(source, dict):
        with splice_edits(model, source):
            yield model
        return
    intervention = Intervention(
        source, (), "add", where, error=error, hook_point=hook_point, allow_mismatch=allow_mismatch
    )
    intervention.require_match(model)
    with ExitStack() as stack:
        flow = _Later()
        _attach(stack, model, intervention, flow)
        flow.flow = stack.enter_context(watch(model))
        yield model


@dataclass(eq=False)
class _Later:
    """The flow of the model's forward passes, set after every edit is attached, since attaching may probe the model."""

    flow: TokenTracker | None = None

    @property
    def now(self) -> ForwardTokens:
        assert self.flow is not None and self.flow.now is not None
        return self.flow.now


def _attach(stack: ExitStack, model: Model, intervention: Intervention, flow: _Later) -> None:
    """Attach the readings first, then the edit, so that all of them see the changes of enclosing contexts."""
    writes_at, when = intervention.writes_at, intervention.places.when
    source = _read_at(stack, model, intervention.reads_at, writes_at)
    condition = None if when is None else _read_at(stack, model, _point_of(when), writes_at)
    special = torch.tensor(find_special_ids(model) if model.tokenizer is not None else (), dtype=torch.long)

    def edit(x: Tensor) -> Tensor:
        keep = intervention.places.select(flow.now, special).to(x.device)
        if when is not None:
            keep = keep & when.holds(x if condition is None else condition()).to(x.device)
        read = x if source is None else source()
        return _change(intervention, x, read, keep)

    stack.enter_context(splice_edits(model, {writes_at: edit}))


def _read_at(stack: ExitStack, model: Model, hook_point: str, writes_at: str) -> Callable[[], Tensor] | None:
    """What returns the activations at a hook point other than the edited one in the running forward pass; None where
    both are one and the edit's own input serves.
    """
    if hook_point == writes_at:
        return None
    reading = ReadActivations()
    stack.enter_context(splice_edits(model, {hook_point: reading}))

    def take() -> Tensor:
        if not reading.fired:
            raise RuntimeError(
                f"What is read must lie before what is changed; '{hook_point}' had not fired yet when "
                f"'{writes_at}' did. Steer at a later hook point."
            )
        return reading.take()

    return take


def _point_of(when: ActivationCondition) -> str:
    point = when.hook_point or hook_point_of(when.source)
    if point is None:
        raise ValueError("`hook_point` of a condition must be given where its SAE does not say it, got None.")
    return point


def _change(intervention: Intervention, x: Tensor, read: Tensor, keep: Bool[Tensor, "batch n"]) -> Tensor:
    if intervention.rows.shape[1] != x.shape[-1]:
        raise ValueError(
            f"An SAE or direction must have the width of the hook point it steers, '{intervention.writes_at}' has "
            f"{x.shape[-1]}, got {intervention.rows.shape[1]}; use the one it was made for."
        )
    if x.shape[: keep.ndim] != keep.shape:
        raise ValueError(
            f"A hook point that is steered must carry one vector per token, got {tuple(x.shape)} at "
            f"'{intervention.writes_at}' for tokens {tuple(keep.shape)}. Choose another one."
        )
    n = int(keep.sum())
    if n == 0:
        return x
    every = n == keep.numel()  # no rows to pick: most steps of generation
    written, read = (part.flatten(0, 1) if every else part[keep] for part in (x, read))
    new = _rewrite(intervention, written, read)
    return new.view_as(x) if every else x.index_put((keep,), new)


def _rewrite(intervention: Intervention, written: Tensor, read: Tensor) -> Tensor:
    source = intervention.source
    moved = intervention.error == "drop" or intervention.strengths
    if moved or isinstance(source, Direction) or not torch.is_grad_enabled():
        return intervention.change(written, read)
    x_hat = source(read).to(written)
    return written.detach() + (x_hat - x_hat.detach())
