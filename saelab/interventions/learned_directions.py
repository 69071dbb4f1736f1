"""`learn_direction`: a vector fitted so that a loss falls, beside directions of its norm that were not fitted."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from saelab.interventions.concept_vectors import as_rows
from saelab.interventions.directions import Direction, make_random
from saelab.interventions.interventions import TokenSelection, match_source
from saelab.interventions.module_steering import steer_module
from saelab.interventions.steering_hooks import steer
from saelab.lm.hooks import capture, logits, next_token_loss
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model, find_context, find_row
from saelab.lm.module_inputs import find_module, keep_output, make_inputs
from saelab.lm.text_encoders import pool
from saelab.lm.tokens import tokenize
from saelab.lm.unwrapped import attach
from saelab.sae.compatibility import require_finite, require_one_source
from saelab.sae.sae import SAE
from saelab.stores.jobs import hidden
from saelab.stores.results import Result, find_row as find_result, format_table

ExampleLoss: TypeAlias = Callable[[list[str]], Tensor]
"""From some of the texts to the loss of each, (n,), by forward passes of the model that is steered."""
LEAST = 4
"""texts, so that some are held out"""
CANDIDATES = 8
"""features whose loss is measured, after they were ranked by the gradient"""


@dataclass(frozen=True, kw_only=True)
class DirectionLoss:
    """The mean loss with one direction added."""

    name: str
    fitted: float
    """on the texts that directions were fitted to or chosen on"""
    held_out: float
    """on the others"""
    change: float
    """held-out loss less that without a direction; below 0 is better"""
    se: float
    """standard error of `change`, over held-out texts in pairs; NaN for one text"""


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnedDirection(Result):
    """A fitted vector of one norm, and losses with it, without it and with others of its norm."""

    vector: Float[np.ndarray, "d"]
    norm: float
    place: str
    """hook point, or kind of module, to which it is added"""
    n_fitted: int
    n_held_out: int
    n_steps: int
    seed: int
    rows: tuple[DirectionLoss, ...]
    """of "none", "learned", "gradient"; "means" and "feature N" where they were asked for; "random", "random 2", ..."""

    @property
    def direction(self) -> Direction:
        """The vector, scaled to norm 1, for `sl.steer` and `sl.steer_module`; its peak is the norm."""
        return Direction(torch.from_numpy(self.vector), self.place, "learned", self.norm)

    def row(self, name: str) -> DirectionLoss:
        """Losses with one direction, by name; KeyError for one that there is not."""
        return find_result(self.rows, name=name)

    def __str__(self) -> str:
        head = (
            f"vectors of norm {self.norm:.3g} at {self.place}: {self.n_fitted} texts fitted, {self.n_held_out} held "
            f"out, {self.n_steps} steps, seed {self.seed}"
        )
        table = [["direction", "fitted", "held out", "change", "se"]]
        table += [
            [row.name, f"{row.fitted:.4f}", f"{row.held_out:.4f}", f"{row.change:+.4f}", f"{row.se:.4f}"]
            for row in self.rows
        ]
        return "\n".join([head, *format_table(table)])


def learn_direction(
    model: Any,
    texts: Sequence[str],
    target: Float[Tensor, "n d_out"] | ExampleLoss | None = None,
    *,
    at: nn.Module | str,
    norm: float | None = None,
    contrast: tuple[Sequence[str], Sequence[str]] | None = None,
    sae: SAE | None = None,
    where: TokenSelection = "all",
    held_out: float = 0.25,
    n_steps: int = 60,
    batch_size: int = 16,
    lr: float = 0.05,
    n_random: int = 3,
    tokenizer: Any = None,
    allow_mismatch: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> LearnedDirection:
    """The vector v of a given norm whose addition lowers a loss most, found by gradient descent.

        v = norm u / |u|,   u by Adam, from minus the mean gradient of the loss at v = 0

    The loss of a language model is the mean next-token loss of each text: what v lacks the texts have in common. With
    embeddings as `target` it is 1 - cos of the steered model's embedding (mean over tokens) of a text with its row:
    texts without a concept, embeddings of the same texts with it, give the direction of the concept (as self-discovered
    directions of diffusion models are found, arXiv:2311.17216). Any other loss is a function of some of the texts.
    Nothing of the model is trained and no gradient is left in it. Compare `change` on held-out texts of "learned" with
    the others, which have the same norm.

    Args:
        model: model of `load_model`; Hugging Face encoder or any other torch module.
        texts: texts of the concept, or those to be moved to the target.
        target: None for a language model; an embedding for each text; or a function from texts to their losses.
        at: hook point of a language model; of others the module whose output is steered, or its dotted name.
        norm: norm of the vectors; None is half the median norm of activations of the texts there.
        contrast: texts with and without the concept; the difference of their mean activations is then a baseline.
        sae: its feature that lowers the loss of the fitted texts most, among the eight that the gradient ranks first
            with either sign, is then a baseline.
        where: tokens or positions that are steered, as in `steer` and `steer_module`.
        held_out: share of the texts that nothing is fitted to.
        n_steps: steps of gradient descent; 0 leaves "learned" at the gradient.
        batch_size: texts of a step.
        lr: step size of Adam, for u of norm 1.
        n_random: number of random directions.
        tokenizer: of texts, where the model has none of its own.
        allow_mismatch: accept an SAE of another language model, weight processing or hook point.
        seed: of the held-out texts, batches and random directions.
        progress: show progress bars.

    Raises:
        ValueError: fewer than four texts, a target that does not fit, numbers out of range, a loss that does not depend
            on the module, and for an SAE of another width, model or hook point (unless `allow_mismatch`).

    >>> texts = ["a dog ran", "the dog sat", "my dog ate", "one dog"]
    >>> found = sl.learn_direction(sl.lm.tiny_model(), texts, at="blocks.0.hook_out", n_steps=3, progress=False)
    >>> found.row("learned").fitted < found.row("none").fitted
    True
    """
    texts = list(texts)
    _check_numbers(texts, norm, held_out, n_steps, batch_size, lr, n_random)
    place = _Place(model, at, where, tokenizer)
    if sae is not None:
        _check_sae(sae, place, allow_mismatch)
    loss = place.make_loss(texts, target)
    order = np.random.default_rng(seed).permutation(len(texts))
    n_held = min(len(texts) - 1, max(1, round(held_out * len(texts))))
    fit = _Fit(place, loss, np.sort(order[n_held:]).tolist(), np.sort(order[:n_held]).tolist(), batch_size)
    seen = fit.activations([texts[i] for i in fit.fitted])
    size = norm if norm is not None else float(seen.norm(dim=1).median()) / 2
    gradient = fit.gradient(seen.shape[1])
    vectors = {"learned": fit.descend(gradient, size, n_steps, lr, seed, progress), "gradient": -gradient}
    if contrast is not None:
        vectors["means"] = place.activations(contrast[0]).mean(0) - place.activations(contrast[1]).mean(0)
    if sae is not None:
        name, vector = fit.best_feature(sae, gradient, size)
        vectors[name] = vector
    like = Direction(-gradient, "")
    vectors |= {f"random {i + 1}" if i else "random": make_random(like, seed + i).vector for i in range(n_random)}
    scaled = {name: size * vector / vector.norm() for name, vector in vectors.items()}
    return LearnedDirection(
        vector=scaled["learned"].numpy(), norm=size, place=place.name, n_fitted=len(fit.fitted), n_held_out=n_held,
        n_steps=n_steps, seed=seed, rows=fit.compare(scaled),
    )  # fmt: skip


def _check_numbers(
    texts: list[str], norm: float | None, held_out: float, n_steps: int, batch_size: int, lr: float, n_random: int
) -> None:
    if len(texts) < LEAST:
        raise ValueError(f"`texts` must be at least {LEAST}, as some are held out, got {len(texts)}.")
    if norm is not None and not 0 < norm < float("inf"):
        raise ValueError(f"`norm` must be finite and above 0, or None, got {norm}.")
    if not 0 < held_out < 1:
        raise ValueError(f"`held_out` must be a share between 0 and 1, got {held_out}.")
    if n_steps < 0 or batch_size < 1 or not 0 < lr < float("inf") or n_random < 1:
        raise ValueError(
            "`n_steps` must not be negative, `batch_size` and `n_random` be at least 1 and `lr` above 0, got "
            f"{n_steps}, {batch_size}, {n_random} and {lr}."
        )


def _check_sae(sae: SAE, place: "_Place", allow_mismatch: bool) -> None:
    require_finite(sae)
    require_one_source(sae)
    if isinstance(place.model, Model):
        match_source(sae, place.model, place.name, allow_mismatch)


def _directions_of(sae: SAE, width: int) -> Float[Tensor, "d_sae width"]:
    rows = sae.directions().float().cpu()
    if rows.shape[1] != width:
        raise ValueError(f"`sae` must have the width of what is steered, {width}, got {rows.shape[1]}.")
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


class _Place:
    """Where vectors are added: a hook point of a language model, or a module."""

    def __init__(self, model: Any, at: nn.Module | str, where: TokenSelection, tokenizer: Any) -> None:
        self.model, self._where, self._tokenizer = model, where, tokenizer
        if isinstance(model, Model):
            if not isinstance(at, str):
                raise ValueError(f"`at` of a language model must be a hook point, got a {type(at).__name__}.")
            self.name = at
        else:
            self.module = find_module(model, at)
            self.name = at if isinstance(at, str) else type(at).__name__

    def steered(self, vector: Tensor) -> AbstractContextManager:
        """A context in which the vector is added."""
        if isinstance(self.model, Model):
            norm = vector.norm()
            strength = norm if norm.requires_grad else float(norm)
            return steer(self.model, Direction(vector, self.name), strength, where=self._where)
        return steer_module(self.module, vector, where=self._where)

    def make_loss(self, texts: list[str], target: Any) -> Callable[[Sequence[int]], Tensor]:
        """The loss of texts by their numbers."""
        if callable(target):
            return lambda rows: _check_losses(target([texts[i] for i in rows]), len(rows))
        if isinstance(self.model, Model):
            if target is not None:
                raise ValueError("`target` of a language model must be None or a function, got embeddings.")
            return lambda rows: self._next_tokens([texts[i] for i in rows])
        if not isinstance(target, Tensor) or target.ndim != 2 or len(target) != len(texts):
            got = tuple(target.shape) if isinstance(target, Tensor) else target
            raise ValueError(f"`target` must be an embedding for each of {len(texts)} texts, or a function, got {got}.")
        wanted = target.detach()
        return lambda rows: self._distance([texts[i] for i in rows], wanted[list(rows)])

    def _tokens(self, texts: Sequence[str]) -> Any:
        longest = min(find_context(self.model), max(find_row(self.model, text) for text in texts))
        return tokenize(self.model, list(texts), longest, packed=False)

    def _next_tokens(self, texts: list[str]) -> Tensor:
        tokens = self._tokens(texts)
        losses = next_token_loss(logits(self.model, tokens.ids, grad=torch.is_grad_enabled()), tokens.ids)
        counted = tokens.attention_mask[:, 1:].to(losses.device)
        return (losses * counted).sum(1) / counted.sum(1).clamp_min(1)

    def _distance(self, texts: list[str], wanted: Tensor) -> Tensor:
        inputs = make_inputs(self.model, texts, self._tokenizer)
        assert inputs.real is not None
        embedded = pool(inputs.run().last_hidden_state, inputs.real, "mean")
        return 1 - torch.nn.functional.cosine_similarity(embedded, wanted.to(embedded), dim=1)

    @torch.no_grad()
    def activations(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Of the tokens of texts, special ones left out."""
        if isinstance(self.model, Model):
            tokens = self._tokens(texts)
            x = capture(self.model, tokens.ids, [self.name])[self.name]
            return x[TokenMask().apply(tokens).keep.to(x.device)].float().cpu()
        inputs = make_inputs(self.model, list(texts), self._tokenizer)
        x = as_rows(inputs.capture(self.module)).float()
        return (x.flatten(0, 1) if inputs.text is None else x[inputs.text]).cpu()


def _check_losses(found: Any, n: int) -> Tensor:
    if not isinstance(found, Tensor) or tuple(found.shape) != (n,):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"`target` must return a tensor with a loss for each of {n} texts, got {got}.")
    return found


@dataclass(frozen=True, eq=False)
class _Fit:
    """Losses of texts under directions; `fitted` and `held` are numbers of texts."""

    place: _Place
    loss: Callable[[Sequence[int]], Tensor]
    fitted: list[int]
    held: list[int]
    batch_size: int

    @torch.no_grad()
    def losses(self, vector: Tensor | None, rows: list[int]) -> Float[Tensor, "n"]:
        """The loss of each text, with a vector added or, for None, without."""

        def run() -> Tensor:
            parts = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            return torch.cat([self.loss(part).double().cpu() for part in parts])

        if vector is None:
            return run()
        with self.place.steered(vector):
            return run()

    def activations(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Of the fitted texts: of a module those that pass it when the loss is computed, whatever that runs."""
        if isinstance(self.place.model, Model):
            return self.place.activations(texts)
        seen: list[Tensor] = []
        with attach((self.place.module, "hook_out"), keep_output(seen)):
            self.losses(None, self.fitted)
        if not seen:
            raise ValueError("The loss must depend on the module that is steered, which it did not run.")
        return torch.cat([as_rows(x).flatten(0, 1).float().cpu() for x in seen])

    def slope(self, vector: Tensor, rows: Sequence[int]) -> Tensor:
        """Gradient of the mean loss of some texts by a vector that is added."""
        leaf = vector.detach().clone().requires_grad_()
        with torch.enable_grad(), self.place.steered(leaf):
            mean = self.loss(rows).mean()
            if not mean.requires_grad:
                raise ValueError("The loss must depend on the module that is steered, with gradients; got one without.")
            [found] = torch.autograd.grad(mean, leaf)
        return found

    def gradient(self, width: int) -> Tensor:
        """Of the mean loss of the fitted texts, where next to nothing is added."""
        total = torch.zeros(width)
        start = torch.full((width,), 1e-6)  # a direction must not be zero
        for i in range(0, len(self.fitted), self.batch_size):
            part = self.fitted[i : i + self.batch_size]
            total += self.slope(start, part) * len(part) / len(self.fitted)
        if not total.isfinite().all() or not total.any():
            raise ValueError("The loss must have a finite gradient that is not zero, got another; scale the loss.")
        return total

    def descend(self, gradient: Tensor, size: float, n_steps: int, lr: float, seed: int, progress: bool) -> Tensor:
        """The direction of least loss, by Adam on batches, or its start where that is better on the fitted texts; the
        step size falls to 0.
        """
        u = (-gradient / gradient.norm()).requires_grad_()
        adam = torch.optim.Adam([u], lr=lr)
        falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, max(1, n_steps))
        rng = np.random.default_rng(seed)
        for _ in tqdm(range(n_steps), desc="learn", disable=hidden(progress)):
            rows = rng.choice(self.fitted, min(self.batch_size, len(self.fitted)), replace=False).tolist()
            unit = u / u.norm()
            slope = self.slope((size * unit).detach(), rows)
            [u.grad] = torch.autograd.grad(unit, u, size * slope)
            adam.step()
            falling.step()
        ends = (u.detach() / u.detach().norm(), -gradient / gradient.norm())
        return min(ends, key=lambda unit: float(self.losses(size * unit, self.fitted).mean()))

    def best_feature(self, sae: SAE, gradient: Tensor, size: float) -> tuple[str, Tensor]:
        """The decoder row, with the sign, that lowers the loss of the fitted texts most."""
        unit = _directions_of(sae, len(gradient))
        slopes = unit @ gradient
        found: list[tuple[float, int, Tensor]] = []
        for i in slopes.abs().topk(min(CANDIDATES, len(slopes))).indices.tolist():
            vector = -slopes[i].sign() * unit[i]
            found.append((float(self.losses(size * vector, self.fitted).mean()), i, vector))
        _, best, vector = min(found, key=lambda one: one[:2])
        return f"feature {best}", vector

    def compare(self, vectors: dict[str, Tensor]) -> tuple[DirectionLoss, ...]:
        """Losses without a vector, and with each."""
        without = self.losses(None, self.held)
        rows = []
        for name, vector in {"none": None, **vectors}.items():
            held = self.losses(vector, self.held)
            change = held - without
            rows.append(
                DirectionLoss(
                    name=name, fitted=float(self.losses(vector, self.fitted).mean()), held_out=float(held.mean()),
                    change=float(change.mean()),
                    se=float(change.std() / len(change) ** 0.5) if len(change) > 1 else float("nan"),
                )
            )  # fmt: skip
        return tuple(rows)
