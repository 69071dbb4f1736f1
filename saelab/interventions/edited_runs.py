"""`EditedRuns`: texts run under edits of activations, in chunks that fit in memory, with one value read for each run.

`ReadActivations`: an edit that changes nothing and keeps the activations that pass.

Layers below the edits compute the same for all runs of a text. Many runs begin above them (`LayersBelow`), on Hugging
Face's plain modules, which are saelab's own copy of the tree, and only where a trial gives the same logits to the bit:
some models hand more than one tensor from lower layers to higher ones.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from saelab.interventions.directions import Direction
from saelab.interventions.interventions import match_source
from saelab.interventions.prompt_metrics import Texts
from saelab.lm.hook_points import HookPoints, hook_points_of
from saelab.lm.hooks import (
    FORWARD_TOKENS,
    capture,
    logits,
    read_sites,
    replace_activations,
    to_model,
    within_context,
)
from saelab.lm.model_checks import Model
from saelab.lm.relevance import RelevanceMethod, propagating
from saelab.lm.unwrapped import run
from saelab.sae.sae import SAE
from saelab.stores.jobs import hidden

LEAST_RUNS = 16
"""Runs for which layers below the edit are computed once for each text: finding these layers takes a few forwards."""
EditRuns: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From activations (batch, n, d), a copy that may be changed, and the indices (batch,) of their runs to new ones."""
ReadLogits: TypeAlias = Callable[[Tensor, Texts, Tensor], Tensor]
"""From logits (batch, n, d_vocab), texts and the rows (batch,) of the texts run to (batch, ...): a `PromptMetric`."""


@dataclass(frozen=True, eq=False)
class LayersBelow:
    """The layers of a plain Hugging Face model that come before a hook point."""

    plain: nn.Module
    layers: tuple[nn.Module, ...]
    n_empty: int | None = None
    """number of empty places after the activations in what a layer returns; None where it returns them alone"""

    def read(self, model: Model, ids: Int[Tensor, "batch n"]) -> Float[Tensor, "batch n d"]:
        """What the last of the layers puts out, in the model's dtype and without gradient; the forward pass ends there.

        Args:
            model: what the plain model belongs to.
            ids: token ids, padded on the right.
        """
        with within_context(model, ids):
            return read_sites(self.plain, {"last": (self.layers[-1], "hook_out")}, to_model(model, ids), stop=True)[
                "last"
            ]

    @contextmanager
    def passed_over(self, output: Float[Tensor, "batch n d"]) -> Iterator[None]:
        """Context manager in which a forward pass does not compute the layers: `output` is what comes out of them.

        Edits of the last layer's output still apply.
        """
        returned = output if self.n_empty is None else (output, *[None] * self.n_empty)
        for layer in self.layers:
            layer.__dict__["forward"] = lambda *_args, **_options: returned
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.__dict__["forward"]


@dataclass(frozen=True, eq=False)
class EditedRuns:
    """Texts run under edits of activations, and what is read of their logits.

    A run is one text under one edit: the same text may be run many times, each time with another edit.

    >>> from saelab.interventions.prompt_metrics import read_last, read_texts
    >>> model = sl.lm.tiny_model()
    >>> runs = EditedRuns(model, read_texts(model, ["One", "Two"]), read_last)
    >>> halved = {"blocks.1.hook_resid_post": lambda x, i: x / 2 ** i[:, None, None]}
    >>> found = runs.run(halved, rows=torch.tensor([0, 0]))
    >>> found.shape, torch.allclose(found[0], runs.run()[0]), torch.allclose(found[0], found[1])
    (torch.Size([2, 259]), True, False)
    """

    model: Model
    texts: Texts
    read: ReadLogits

    @property
    def batch_size(self) -> int:
        """Number of runs in one forward pass, about 4096 tokens."""
        return max(1, FORWARD_TOKENS // self.texts.ids.shape[1])

    def match(self, source: SAE | Direction, hook_point: str | None = None, allow_mismatch: bool = False) -> str:
        """The hook point at which an SAE or direction edits these runs, once it is checked that an SAE belongs there.

        Args:
            source: SAE or direction.
            hook_point: where it reads; by default where the SAE was trained, or the direction's own.
            allow_mismatch: accept an SAE of another model, weight processing or hook point.

        Raises:
            ValueError: as `saelab.sae.compatibility.match_places`.
        """
        return match_source(source, self.model, hook_point, allow_mismatch)

    def run(
        self,
        edits: Mapping[str, EditRuns] | None = None,
        rows: Int[Tensor, "n_runs"] | None = None,
        *,
        grad: bool = False,
        rules: RelevanceMethod | None = None,
        progress: str | None = None,
    ) -> Float[Tensor, "n_runs *values"]:
        """What is read of each run's logits, on the CPU.

        Args:
            edits: by hook point, what replaces its activations; none for the unmodified model.
            rows: text of each run; by default each text once.
            grad: let gradients flow to tensors that the edits use.
            rules: propagation rules in place of the model's gradients, as of `saelab.lm.relevance.propagating`; what
                is read of the logits keeps its gradient.
            progress: title of a progress bar; None for no bar.
        """
        rows = torch.arange(len(self.texts)) if rows is None else rows
        below, found = self._find_below(edits or {}, rows), []
        with tqdm(total=len(rows), unit="run", desc=progress, delay=2, disable=hidden(progress is not None)) as bar:
            for start in range(0, len(rows), self.batch_size):
                runs = torch.arange(start, min(start + self.batch_size, len(rows)))
                found.append(self._forward(edits or {}, rows[runs], runs, grad, rules, below))
                bar.update(len(runs))
        return torch.cat(found) if found else torch.zeros(0)

    def _find_below(self, edits: Mapping[str, EditRuns], rows: Tensor) -> "_Below | None":
        """What is below an edit, where the same texts are run so often that it is worth keeping."""
        if len(edits) != 1 or len(rows) < max(LEAST_RUNS, 2 * len(rows.unique())):
            return None
        layers = find_layers_below(self.model, next(iter(edits)))
        return None if layers is None else _Below(self.model, layers, self.texts)

    def _forward(
        self,
        edits: Mapping[str, EditRuns],
        rows: Tensor,
        runs: Tensor,
        grad: bool,
        rules: RelevanceMethod | None,
        below: "_Below | None",
    ) -> Tensor:
        bound = {name: _bind(edit, runs) for name, edit in edits.items()}
        with (
            nullcontext() if below is None else below.known(rows),
            replace_activations(self.model, bound),
            nullcontext() if rules is None else propagating(self.model, rules),
        ):
            found = logits(self.model, self.texts.ids[rows], grad=grad)
        with torch.set_grad_enabled(grad):
            return self.read(found, self.texts, rows).cpu()

    def activations(
        self, hook_point: str, pick: Callable[[Tensor, Tensor], Tensor]
    ) -> Float[Tensor, "n_picked *place d_in"]:
        """Activations of the unmodified model, each text once, float32 on the CPU.

        Args:
            hook_point: where they are read.
            pick: from activations (batch, n, d) and the rows (batch,) of their texts to those wanted.
        """
        parts = []
        for rows in torch.arange(len(self.texts)).split(self.batch_size):
            x = capture(self.model, self.texts.ids[rows], [hook_point])[hook_point]
            parts.append(pick(x, rows).float().cpu())
        return torch.cat(parts)


class _Below:
    """Layers below an edit, and what comes out of them for the texts of the last chunk of runs."""

    def __init__(self, model: Model, layers: LayersBelow, texts: Texts) -> None:
        self.model, self.layers, self.texts = model, layers, texts
        self.used, self.output = torch.empty(0, dtype=torch.long), torch.empty(0)

    def known(self, rows: Int[Tensor, "batch"]) -> AbstractContextManager[None]:
        """Context manager in which a forward pass of these texts begins above the layers."""
        used, where = rows.unique(return_inverse=True)
        if len(used) == len(rows):  # nothing is there twice
            return nullcontext()
        if not torch.equal(used, self.used):
            # A text alone passes through other kernels than several together, and differs from them in the last bit.
            ids = self.texts.ids[used if len(used) > 1 else used.repeat(2)]
            self.used, self.output = used, self.layers.read(self.model, ids)
        return self.layers.passed_over(self.output[where.to(self.output.device)])


def _bind(edit: EditRuns, runs: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: edit(x, runs)


class ReadActivations:
    """An edit for `replace_activations` that leaves activations as they are and keeps what is wanted of them.

    >>> model, point, reading = sl.lm.tiny_model(), "blocks.1.hook_resid_post", ReadActivations()
    >>> with replace_activations(model, {point: reading}):
    ...     x = sl.lm.capture(model, torch.ones(1, 4, dtype=torch.long), [point])[point]
    >>> reading.fired, torch.equal(reading.take(), x), reading.fired
    (True, True, False)
    """

    def __init__(self, pick: Callable[[Tensor], Tensor] = torch.clone) -> None:
        """`pick` chooses what is kept, a copy, since the model may add to activations in place."""
        self.pick = pick
        self.kept: Tensor | None = None

    @property
    def fired(self) -> bool:
        """Whether activations passed since they were last taken."""
        return self.kept is not None

    def __call__(self, x: Tensor) -> Tensor:
        self.kept = self.pick(x)
        return x

    def take(self) -> Tensor:
        """What was kept of the running or last forward pass, once: RuntimeError where nothing has passed since."""
        if self.kept is None:
            raise RuntimeError("What is read must have passed, got nothing since it was last taken.")
        kept, self.kept = self.kept, None
        return kept


_known: "weakref.WeakKeyDictionary[HookPoints, dict[str, LayersBelow | None]]" = weakref.WeakKeyDictionary()


def find_layers_below(model: Model, hook_point: str) -> LayersBelow | None:
    """The layers before a hook point that need not be computed again; None where there are none.

    There are none, either, where a trial of three short forward passes, made once, finds that the model needs more than
    the last layer's output, and while hooks are on the model, whoever registered them.

    >>> model = sl.lm.tiny_model()
    >>> [len(found.layers) if (found := find_layers_below(model, f"blocks.1.{p}")) else 0
    ...  for p in ("hook_resid_pre", "hook_resid_post")]
    [1, 2]
    """
    home = hook_points_of(model)
    home.look(hook_point)  # so that a wrong name always raises
    if not home.is_bare:
        return None
    known = _known.setdefault(home, {})
    if hook_point not in known:
        with home.aside():
            known[hook_point] = _try(home, home.running, hook_point)
    return known[hook_point]


def _try(home: HookPoints, plain: nn.Module, hook_point: str) -> LayersBelow | None:
    layers = _list_before(plain, *home.site(hook_point))
    if not layers:
        return None
    try:
        said, output, others = _run_seeing(plain, layers[-1], home.probe)
        if output.shape[:2] != home.probe.shape or any(other is not None for other in others or ()):
            return None
        found = LayersBelow(plain, layers, None if others is None else len(others))
        run(plain, home.probe.flip(1))  # what is left of lower layers anywhere is now that of another text
        with found.passed_over(output):
            again = run(plain, home.probe)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of whatever kind: the model is then run whole
        return None
    return found if torch.equal(again, said) else None


def _run_seeing(plain: nn.Module, layer: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor, tuple | None]:
    """Logits, what a layer put out, and what it returned besides; None where it returned a tensor alone."""
    seen: list[tuple[Tensor, tuple | None]] = []

    def see(_module: nn.Module, _args: tuple, returned: Any) -> None:
        output, others = (returned[0], tuple(returned[1:])) if isinstance(returned, tuple) else (returned, None)
        seen.append((output.clone(), others))  # a copy, since the model may add to it in place

    with layer.register_forward_hook(see):
        said = run(plain, ids)
    [(output, others)] = seen
    return said, output, others


def _list_before(plain: nn.Module, module: nn.Module, side: str) -> tuple[nn.Module, ...]:
    """The elements of the outermost list of layers that are complete where a module begins, or ends."""
    for listed in plain.modules():
        if isinstance(listed, nn.ModuleList):
            for i, layer in enumerate(listed):
                if any(part is module for part in layer.modules()):
                    return tuple(listed)[: i + (layer is module and side == "hook_out")]
    return ()
