"""Reading and replacing activations of a language model at TransformerLens hook points, and batched forward passes.

`TokenTracker` tracks which tokens each forward pass processes, and their positions in the text.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.lm.caching import count_columns, find_given, require_whole
from saelab.lm.hook_points import HookPoints, hook_points_of, require_once
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model, find_context
from saelab.lm.tokens import Tokens
from saelab.lm.unwrapped import OwnHook, Site, Tap, attach, run, run_as_set

FORWARD_TOKENS = 4096
CALIBRATION_TOKENS = 16384


class _Stop(Exception):
    """Ends a forward pass once all hook points asked for have fired."""


def find_hook_point(model: AnyModel, name: str) -> str:
    """`name`, after checking that the model has a hook point of that name; else ValueError.

    Both the old spellings ("blocks.2.hook_resid_post") and the canonical ones ("blocks.2.hook_out") are accepted.
    The error lists at most five similar names.

    >>> sl.lm.find_hook_point(sl.lm.tiny_model(), "blocks.0.hook_resid_post")
    'blocks.0.hook_resid_post'
    """
    model = as_model(model)
    hook_points_of(model).find(name)
    return name


def capture(
    model: AnyModel,
    ids: Int[Tensor, "batch ctx_len"],
    hook_points: Sequence[str],
    *,
    stop: bool = True,
) -> dict[str, Float[Tensor, "batch ctx_len _"]]:
    """Activations at the named hook points in one forward pass, each (batch, ctx_len, d) in the model's dtype, without
    gradient.

    No hook remains afterward, also after an error.

    Args:
        model: the language model.
        ids: (batch, ctx_len) token ids, padded on the right.
        hook_points: names of the hook points.
        stop: end the forward pass after the last hook point needed; False runs it to the end.

    Raises:
        ValueError: for a wrong name or a hook point without one vector per token.
        RuntimeError: for a hook point that does not fire exactly once.

    >>> model = sl.lm.tiny_model()
    >>> x = sl.lm.capture(model, torch.ones(2, 5, dtype=torch.long), ["blocks.1.hook_resid_post"])
    >>> x["blocks.1.hook_resid_post"].shape
    torch.Size([2, 5, 32])
    """
    model = as_model(model)
    names = list(dict.fromkeys(hook_points))
    running, sites = hook_points_of(model).route(names)
    with within_context(model, ids):
        return read_sites(running, dict(zip(names, sites, strict=True)), to_model(model, ids), stop=stop)


def read_sites(model: nn.Module, sites: dict[str, Site], ids: Tensor, *, stop: bool) -> dict[str, Tensor]:
    """Activations as `capture` returns them, at modules already found.

    Args:
        model: the module that runs.
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
def within_context(model: Model, ids: Tensor) -> Iterator[None]:
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
def replace_activations(model: Model, edits: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[Model]:
    """Context manager in which activations at each hook point are replaced by `edits[hook_point](x)`, in any forward
    pass of the model.

    The function gets (batch, ctx_len, d) in the model's dtype (a copy that it may change) and returns the same shape;
    the result is cast to the model's dtype and device. Blocks can be nested; edits of one hook point run in order of
    entry. No hook remains afterward, also after an error.

    Raises:
        ValueError: for a wrong name or shape, and for a changing edit at a hook point that the logits do not depend on.
        RuntimeError: for a hook point that does not fire exactly once in a forward pass.

    >>> model, ids = sl.lm.tiny_model(), torch.ones(1, 4, dtype=torch.long)
    >>> with replace_activations(model, {"blocks.0.hook_resid_post": torch.zeros_like}):
    ...     x = sl.lm.capture(model, ids, ["blocks.0.hook_out"])["blocks.0.hook_out"]
    >>> float(x.abs().max())
    0.0
    """
    home = hook_points_of(model)
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
def _split(home: HookPoints, tap: Tap) -> Iterator[Tap]:
    """Hook for concatenated rows of all texts, made from one that takes (batch, n, d)."""
    shape = _Shape()

    def split(x: Tensor) -> Tensor | None:
        new = tap(x.view(*shape.now, -1))
        return None if new is None else new.reshape(x.shape)

    with home.running.register_forward_pre_hook(shape.follow, with_kwargs=True):
        yield split


@contextmanager
def _edited(home: HookPoints, name: str, tap: Tap) -> Iterator[None]:
    """Context manager with a hook function at a hook point."""
    place = home.look(name)
    if not place.felt:
        tap = _only_reading(name, tap)
    with ExitStack() as stack:
        if place.flat:
            tap = stack.enter_context(_split(home, tap))
        stack.enter_context(home.attached(name, tap))
        yield


def _only_reading(name: str, tap: Tap) -> Tap:
    """The same hook at a place that the logits do not depend on: ValueError if it returns anything but its input."""

    def read(x: Tensor) -> None:
        new = tap(x)
        if new is not None and not torch.equal(new, x):
            raise ValueError(
                f"An edit must change what the model computes; '{name}' is not on its path, and whatever is put "
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
    model: AnyModel, ids: Int[Tensor, "batch ctx_len"], *, grad: bool = False
) -> Float[Tensor, "batch ctx_len d_vocab"]:
    """Logits of the model for right-padded rows of ids, in its dtype; edits of `splice` and `steer` apply.

    Without gradient, unless `grad=True`: then it flows to tensors that the edits use.

    >>> sl.lm.logits(sl.lm.tiny_model(), torch.ones(1, 4, dtype=torch.long)).shape
    torch.Size([1, 4, 259])
    """
    model = as_model(model)
    running = hook_points_of(model).running
    with torch.set_grad_enabled(grad), within_context(model, ids):
        return run_as_set(running, to_model(model, ids))


def next_token_loss(
    logits: Float[Tensor, "batch ctx_len d_vocab"], ids: Int[Tensor, "batch ctx_len"]
) -> Float[Tensor, "batch ctx_len-1"]:
    """Cross-entropy of each next token: -log softmax(logits[:, t])[ids[:, t + 1]], in nats, float32; lower is better.

    Entry t belongs to the prediction made at position t; nothing is masked or averaged here.

    >>> loss = sl.lm.next_token_loss(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]]))
    >>> [round(float(x), 4) for x in loss[0]]
    [2.0794, 2.0794]
    """
    flat = logits[:, :-1].float().flatten(0, 1)
    targets = ids[:, 1:].to(device=flat.device, dtype=torch.long).flatten()
    return torch.nn.functional.cross_entropy(flat, targets, reduction="none").unflatten(0, (len(ids), -1))


@dataclass(frozen=True, eq=False)
class ForwardTokens:
    """Tokens of one forward pass: `n` new columns after `n_past` columns in the key-value cache."""

    ids: Int[Tensor, "batch n"]
    """token ids of the new columns"""
    positions: Int[Tensor, "batch n"]
    """positions in the text, from 0 at a row's first token that is not padding; -1 for padding"""
    n_past: int
    """number of columns in the cache"""
    n_prompt: int
    """number of columns of the text's first forward pass; later columns were generated"""
    lengths: Int[Tensor, "batch"]
    """number of tokens of each row's prompt, without padding"""

    @property
    def columns(self) -> Int[Tensor, "n"]:
        """Indices of the new columns in the text, padding included."""
        return torch.arange(self.n_past, self.n_past + self.ids.shape[1], device=self.ids.device)


@dataclass(eq=False)
class TokenTracker(OwnHook):
    """Tracks the tokens of a model's forward passes, with or without a key-value cache, padded on either side.

    A forward pass continues the text of the one before where it brings a cache, or where each of its rows is a row of
    the one before plus one token, as in generation with and without a cache, beam search included. Any other forward
    pass begins a new text, and so does one with an empty cache.
    """

    home: HookPoints
    """hook points of the model"""
    now: ForwardTokens | None = None
    """tokens of the running or last forward pass"""
    n_forwards: int = 0
    """number of forward passes so far"""
    seen: Tensor | None = None
    """ids of the text so far"""
    ends: Tensor | None = None
    """position of each row's last token"""
    prompt: tuple[int, Tensor] = field(default_factory=lambda: (0, torch.zeros(0)))
    """number of columns of the text's first forward pass, and tokens of each row in it"""

    def follow(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Record a forward pass that begins (a pre-hook with keyword arguments); ValueError where its tokens cannot be
        tracked.
        """
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise ValueError("Steering needs forwards that get token ids (batch, n), got one without `input_ids`.")
        kwargs = _name_arguments(module, args) | kwargs
        cache = find_given(kwargs)
        if cache is not None and self.home.caching.argument is None:  # even if it is empty
            raise ValueError(
                "A forward may go on from a cache only where that gives the logits of the whole text, got one through "
                "a model that loses it, as a TransformerBridge may with another release of transformers. Run with "
                "use_cache=False (`use_past_kv_cache=False` for the bridge's own `generate`), or use `sl.generate`."
            )
        if cache is None:
            require_whole(ids.shape[1], kwargs)
        n_past = self._count_past(cache)
        goes_on = self._goes_on(ids, n_past) and (n_past > 0 or cache is None)
        self.seen = torch.cat([self.seen, ids], 1) if goes_on and n_past and self.seen is not None else ids
        before = self.ends if goes_on and n_past else None
        positions = _find_positions(ids, n_past, kwargs.get("attention_mask"), before)
        self.ends = positions.max(1).values
        if not goes_on:
            self.prompt = n_past + ids.shape[1], positions.max(1).values + 1
        self.now = ForwardTokens(ids, positions, n_past, *self.prompt)
        self.n_forwards += 1

    def _count_past(self, cache: Any) -> int:
        n_past = count_columns(cache)
        if n_past is not None:
            return n_past
        if self.seen is None:
            raise ValueError(
                f"Steering must see a text from its first token where its state does not count them "
                f"({type(cache).__name__}), got a forward in the middle. Run the whole text inside the block."
            )
        return self.seen.shape[1]

    def _goes_on(self, ids: Tensor, n_past: int) -> bool:
        if self.seen is None or len(ids) != len(self.seen):
            return False
        if n_past > 0 or ids.shape[1] != self.seen.shape[1] + 1:
            return n_past > 0
        before = ids[:, :-1]
        same = before == self.seen
        strays = before[~same.all(1)]  # beam search reorders its rows
        return bool((strays[:, None] == self.seen).all(2).any(1).all())


def _name_arguments(module: torch.nn.Module, args: tuple) -> dict[str, Any]:
    """Positional arguments by name."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) if len(args) > 1 else {}


def _find_positions(ids: Tensor, n_past: int, attention_mask: Any, before: Tensor | None) -> Tensor:
    """Positions counted over real tokens. Without a mask all are real and follow those of the forward pass before.

    ValueError for a mask that does not show which columns are padding.
    """
    n = ids.shape[1]
    if attention_mask is None:
        first = torch.full((len(ids),), n_past) if before is None else before + 1
        return first.to(ids.device)[:, None] + torch.arange(n, device=ids.device)
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or attention_mask.shape[1] < n_past + n:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"Steering needs to know padding: `attention_mask` must be (batch, {n_past + n}), past and new columns, or "
            f"left out, got {got}."
        )
    real = attention_mask[:, : n_past + n].bool()
    return (real.cumsum(1) - 1).masked_fill(~real, -1)[:, n_past:].to(ids.device)


@contextmanager
def watch(model: Model, tracker: TokenTracker | None = None) -> Iterator[TokenTracker]:
    """Context manager that yields a `TokenTracker` tracking every forward pass of the model; the one given goes on with
    the text of an earlier block.
    """
    home = hook_points_of(model)
    flow = TokenTracker(home) if tracker is None else tracker
    with home.running.register_forward_pre_hook(flow.follow, with_kwargs=True):
        yield flow


def forward_size(tokens: Tokens, n_seq: int | None, most_tokens: int = FORWARD_TOKENS) -> int:
    """Number of sequences per forward pass: `n_seq`, or as many as hold about 4096 tokens, and `most_tokens` where that
    is less.
    """
    if n_seq is not None and n_seq < 1:
        raise ValueError(
            f"`batch_size` (`n_seq` of a stream) must be at least 1 sequence, got {n_seq}; use None for the default."
        )
    return n_seq or max(1, min(FORWARD_TOKENS, most_tokens) // tokens.ctx_len)


def batches_of(tokens: Tokens, n_seq: int) -> Iterator[Tokens]:
    """Iterator over the sequences in order, `n_seq` at a time."""
    return (tokens[start : start + n_seq] for start in range(0, len(tokens), n_seq))


def norms_of(x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape"]:
    """Euclidean norms in float32, on the CPU like the masks; 0 where not finite.

    Rows that are not finite get norm 0 so that a mask's norm rule keeps them and the finiteness check can raise.
    """
    return x.float().norm(dim=-1).nan_to_num(0.0, 0.0).cpu()


def find_median_norms(
    read: Callable[[Tokens], dict[str, Tensor]], tokens: Tokens, mask: TokenMask, n_seq: int
) -> dict[str, float]:
    """Median activation norms by hook point, which a mask's norm rule compares with: over the tokens that its other
    rules keep.

    Only the first 16384 of the tokens are used.

    Args:
        read: function from a batch of tokens to activations (n_seq, ctx_len, d) by hook point.
        tokens: rows of token ids.
        mask: the mask; its norm rule is ignored.
        n_seq: sequences per batch.

    Raises:
        ValueError: where a kept row is not finite.
    """
    others = replace(mask, max_norm_ratio=None)
    norms: dict[str, list[Tensor]] = {}
    for batch in batches_of(tokens[: max(1, CALIBRATION_TOKENS // tokens.ctx_len)], n_seq):
        keep = others.apply(batch).keep
        for name, x in read(batch).items():
            rows = x[keep.to(x.device)]
            require_finite(name, rows)
            norms.setdefault(name, []).append(norms_of(rows))
    return {name: float(torch.cat(pieces).median()) for name, pieces in norms.items()}


def require_finite(name: str, x: Float[Tensor, "n d"]) -> None:
    """Raise ValueError for rows of a hook point that hold NaN or infinity."""
    # One pass and no copy, unlike isfinite: NaN shows in both minimum and maximum, an infinity in one of them.
    if len(x) and not torch.stack(torch.aminmax(x)).isfinite().all():
        n_bad = int((~x.isfinite().all(1)).sum())
        raise ValueError(
            f"Activations must be finite in {x.dtype}; '{name}' has NaN or infinity in {n_bad} of {len(x)} rows of a "
            "batch. Take bfloat16 or float32 where float16 overflows, or check the model's weights and dtype."
        )
