"""Reading and replacing activations of a language model at TransformerLens hook points."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.lm.door import Door, door, require_once
from saelab.lm.extent import find_context
from saelab.lm.models import Model
from saelab.lm.plain import OwnHook, Site, Tap, attach, run, run_as_set


class _Stop(Exception):
    """Ends a forward pass once all hook points asked for have fired."""


def find_hook_point(model: Model, name: str) -> str:
    """The name itself, if the model has a hook point of that name.

    Both the old spellings ("blocks.2.hook_resid_post") and the canonical ones ("blocks.2.hook_out") are accepted.
    ValueError otherwise, with at most five similar names.

    >>> sl.find_hook_point(sl.tiny_model(), "blocks.0.hook_resid_post")
    'blocks.0.hook_resid_post'
    """
    door(model).find(name)
    return name


def capture(
    model: Model,
    ids: Int[Tensor, "batch ctx_len"],
    hook_points: Sequence[str],
    *,
    stop: bool = True,
) -> dict[str, Float[Tensor, "batch ctx_len _"]]:
    """Activations at the named hook points in one forward pass, each (batch, ctx_len, d) in the model's dtype, without
    gradient.

    No hook remains afterwards, also after an error.

    Args:
        model: the language model.
        ids: (batch, ctx_len) token ids, padded on the right.
        hook_points: names of the hook points.
        stop: end the forward pass after the last hook point needed; False runs it to the end.

    Raises:
        ValueError: for a wrong name or a hook point without one vector per token.
        RuntimeError: for a hook point that does not fire exactly once.

    >>> model = sl.tiny_model()
    >>> x = sl.capture(model, torch.ones(2, 5, dtype=torch.long), ["blocks.1.hook_resid_post"])
    >>> x["blocks.1.hook_resid_post"].shape
    torch.Size([2, 5, 32])
    """
    names = list(dict.fromkeys(hook_points))
    plain_or_bridge, sites = door(model).route(names)
    with _within_context(model, ids):
        return read_sites(plain_or_bridge, dict(zip(names, sites, strict=True)), to_model(model, ids), stop=stop)


def read_sites(model: nn.Module, sites: dict[str, Site], ids: Tensor, *, stop: bool) -> dict[str, Tensor]:
    """Activations as `capture` returns them, on the bridge or the plain model, at modules already found.

    Args:
        model: the bridge's wrapped model or the plain Hugging Face model.
        sites: module and side by name of the hook point.
        ids: (batch, ctx_len) token ids, padded on the right.
        stop: end the forward pass after the last hook point needed.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in sites}
    with ExitStack() as stack:
        for name, site in sites.items():
            stack.enter_context(attach(site, _keep(seen, name, stop)))
        with suppress(_Stop):
            run(model, ids)
    for name, values in seen.items():
        require_once(name, len(values))
    return {name: _rows_of(name, values[0], ids) for name, values in seen.items()}


def _keep(seen: dict[str, list[Tensor]], name: str, stop: bool) -> Tap:
    """A hook that stores its activations and ends the forward pass when all are there."""

    def tap(x: Tensor) -> None:
        done = stop and all(values or other == name for other, values in seen.items())
        # Cloned where the forward pass continues: some models add to the residual stream in place.
        seen[name].append(x.detach() if done else x.detach().clone())
        if done:
            raise _Stop

    return tap


def _rows_of(name: str, x: Tensor, ids: Tensor) -> Tensor:
    """Activations with one vector per token, also where the model concatenates the rows of all texts."""
    if x.ndim == 2 and len(x) == ids.numel():
        x = x.view(*ids.shape, -1)
    if x.ndim != 3 or x.shape[:2] != ids.shape:
        raise ValueError(
            f"A hook point must carry one vector per token, (batch, ctx_len, d); '{name}' has shape {tuple(x.shape)} "
            f"for ids {tuple(ids.shape)}. Choose a residual, attention or MLP output."
        )
    return x


@contextmanager
def _within_context(model: Model, ids: Tensor) -> Iterator[None]:
    """Context manager that explains an IndexError of a row that exceeds the context; only the model knows which lengths
    it can compute.
    """
    try:
        yield
    except IndexError as error:
        if ids.shape[1] <= find_context(model):
            raise
        raise ValueError(
            f"A row must fit the model's context of {find_context(model)} tokens, got {ids.shape[1]}. Cut it."
        ) from error


def to_model(model: Model, ids: Tensor) -> Tensor:
    """Token ids as the model takes them: int64, on its device. ValueError for ids outside of its vocabulary."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < model.cfg.d_vocab:
        raise ValueError(
            f"Token ids must be in 0..{model.cfg.d_vocab - 1}, got {int(ids.min())}..{int(ids.max())}. Has the "
            "tokenizer tokens that were added behind the model's?"
        )
    return ids.to(device=next(model.original_model.parameters()).device, dtype=torch.long)


@contextmanager
def splice(model: Model, edits: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[Model]:
    """Context manager in which activations at each hook point are replaced by `edits[hook_point](x)`, in any forward
    pass of the model.

    The function gets (batch, ctx_len, d) in the model's dtype (a copy that it may change) and returns the same shape;
    the result is cast to the model's dtype and device. Blocks can be nested; edits of one hook point run in order of
    entry. No hook remains afterwards, also after an error.

    Raises:
        ValueError: for a wrong name or shape, and for a changing edit at a hook point that the logits do not depend on.
        RuntimeError: for a hook point that does not fire exactly once in a forward pass.

    >>> model, ids = sl.tiny_model(), torch.ones(1, 4, dtype=torch.long)
    >>> with sl.splice(model, {"blocks.0.hook_resid_post": torch.zeros_like}):
    ...     x = sl.capture(model, ids, ["blocks.0.hook_out"])["blocks.0.hook_out"]
    >>> float(x.abs().max())
    0.0
    """
    home = door(model)
    with ExitStack() as stack:
        for name, edit in edits.items():
            stack.enter_context(_edited(home, name, _replace(name, edit)))
        yield model


class _Shape(OwnHook):
    """Records batch size and length of the running forward pass."""

    def __init__(self) -> None:
        self.now: tuple[int, ...] = ()

    def follow(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs: Any = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        self.now = tuple(inputs.shape[:2])


@contextmanager
def _split(home: Door, tap: Tap) -> Iterator[Tap]:
    """Hook for concatenated rows of all texts, made from one that takes (batch, n, d)."""
    shape = _Shape()

    def split(x: Tensor) -> Tensor | None:
        new = tap(x.view(*shape.now, -1))
        return None if new is None else new.reshape(x.shape)

    with ExitStack() as stack:
        for module in (home.bridged, home.plain):
            if module is not None:
                stack.enter_context(module.register_forward_pre_hook(shape.follow, with_kwargs=True))
        yield split


@contextmanager
def _edited(home: Door, name: str, tap: Tap) -> Iterator[None]:
    """Context manager with a hook on the bridge's hook point, and on the plain model where that is the same place."""
    place = home.look(name)
    if not place.felt:
        tap = _only_reading(name, tap)
    site = home.plain_site(name) if place.agrees else None
    with ExitStack() as stack:
        if place.flat:
            tap = stack.enter_context(_split(home, tap))
        stack.enter_context(attach(home.bridge_site(name), tap))
        if site is not None:
            stack.enter_context(attach(site, tap))
            home.n_spliced += 1
            stack.callback(setattr, home, "n_spliced", home.n_spliced - 1)
        yield


def _only_reading(name: str, tap: Tap) -> Tap:
    """The same hook at a place that the logits do not depend on: ValueError if it returns anything but its input."""

    def read(x: Tensor) -> None:
        new = tap(x)
        if new is not None and not torch.equal(new, x):
            raise ValueError(
                f"An edit must change what the model computes; '{name}' lies beside its path, and whatever is put "
                "there changes no logit. Edit the residual stream, or an attention or MLP output."
            )

    return read


def _replace(name: str, edit: Callable[[Tensor], Tensor]) -> Tap:
    """A hook that applies an edit to a copy and checks the shape of the result."""

    def tap(x: Tensor) -> Tensor:
        new = edit(x.clone())
        if not isinstance(new, Tensor) or new.shape != x.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"An edit must return the shape it was given, {tuple(x.shape)}; the one at '{name}' returned {got}."
            )
        return new.to(x)

    return tap


def logits(
    model: Model, ids: Int[Tensor, "batch ctx_len"], *, grad: bool = False
) -> Float[Tensor, "batch ctx_len d_vocab"]:
    """Logits of the model for right-padded rows of ids, in its dtype; edits of `splice` and `steer` apply.

    Without gradient, unless `grad=True`: then it flows to tensors that the edits use.

    >>> sl.logits(sl.tiny_model(), torch.ones(1, 4, dtype=torch.long)).shape
    torch.Size([1, 4, 259])
    """
    plain_or_bridge, _ = door(model).route([])
    with torch.set_grad_enabled(grad), _within_context(model, ids):
        return run_as_set(plain_or_bridge, to_model(model, ids))


def next_token_loss(
    logits: Float[Tensor, "batch ctx_len d_vocab"], ids: Int[Tensor, "batch ctx_len"]
) -> Float[Tensor, "batch ctx_len-1"]:
    """Cross-entropy of each next token: -log softmax(logits[:, t])[ids[:, t + 1]], in nats, float32; lower is better.

    Entry t belongs to the prediction made at position t; nothing is masked or averaged here.

    >>> loss = sl.next_token_loss(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]]))
    >>> [round(float(x), 4) for x in loss[0]]
    [2.0794, 2.0794]
    """
    flat = logits[:, :-1].float().flatten(0, 1)
    targets = ids[:, 1:].to(device=flat.device, dtype=torch.long).flatten()
    return torch.nn.functional.cross_entropy(flat, targets, reduction="none").unflatten(0, (len(ids), -1))
