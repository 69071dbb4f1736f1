"""A language model that is linear in what is written to it: attention patterns, norm scales and gates are frozen."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.lm.freezing import Freezing, Hold, Watch
from saelab.lm.hook_points import hook_points_of
from saelab.lm.hooks import to_model
from saelab.lm.model_checks import Model
from saelab.lm.unwrapped import Site, Tap, attach, run_as_set

HEAD = "unembed.hook_in"


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """A model whose forward pass on one prompt is made affine in what is put into some of its hook points."""

    ids: Int[Tensor, "1 n"]
    running: nn.Module
    """the plain model, or the bridge"""
    sites: dict[str, Site]
    """by name of the hook point"""
    head: Site | None
    """where the logits of the last token alone are computed from; None computes all"""
    neurons: tuple[tuple[str, str], ...] = ()
    """hook points in front of and behind the neurons of each MLP whose gates are frozen, too"""

    @classmethod
    def make(
        cls,
        model: Model,
        ids: Int[Tensor, "1 n"],
        hook_points: Sequence[str],
        neurons: Sequence[tuple[str, str]] = (),
    ) -> "FrozenModel":
        """The frozen model of a prompt, with the hook points that will be used.

        Args:
            model: the language model.
            ids: the prompt.
            hook_points: names of those that will be used.
            neurons: hook points in front of and behind the neurons of each MLP whose gates are frozen, too.

        Raises:
            ValueError: for a wrong name.
            RuntimeError: for a hook point that does not fire exactly once.
        """
        home = hook_points_of(model)
        names = list(dict.fromkeys([*hook_points, *(name for pair in neurons for name in pair)]))
        has_head = HEAD in home.points and not home.look(HEAD).flat
        running, sites = home.route([*names, HEAD] if has_head else names)
        head = sites[-1] if has_head else None
        return cls(to_model(model, ids), running, dict(zip(names, sites, strict=False)), head, tuple(neurons))

    def forward(
        self,
        taps: Sequence[tuple[str, Tap]],
        constants: Sequence[Tensor] | None = None,
        n_rows: int = 1,
        watch: Watch | None = None,
    ) -> tuple[Float[Tensor, "n_rows d_vocab"], list[Tensor]]:
        """Logits after the last token, and the constants.

        Args:
            taps: hook point and hook function; those of one place run in this order.
            constants: of an earlier forward pass over one row; None computes them.
            n_rows: how many times the prompt is run, each as a row of its own.
            watch: sees all functions that are called.
        """
        mode = Freezing(constants, n_rows, watch)
        gates = [(pair, _Gate(mode.hold)) for pair in self.neurons]
        gating = [(name, tap) for (a, b), gate in gates for name, tap in ((a, gate.keep), (b, gate.pass_on))]
        with ExitStack() as stack:
            for name, tap in (*gating, *taps):
                stack.enter_context(attach(self.sites[name], tap))
            if self.head is not None:
                stack.enter_context(attach(self.head, lambda x: x[..., -1:, :]))
            with mode:
                logits = run_as_set(self.running, self.ids.expand(n_rows, -1))
        return logits[:, -1].float(), mode.constants


class _Gate:
    """The hook functions of an MLP's neurons, whose gates g = post / pre are constants: what they write is g pre."""

    def __init__(self, hold: Hold) -> None:
        self._hold = hold
        self._pre: Tensor | None = None

    def keep(self, pre: Tensor) -> None:
        """Read what goes into the neurons; of an MLP with gates of its own, the factor that is linear."""
        self._pre = pre

    def pass_on(self, post: Tensor) -> Tensor:
        """Replace what comes out of them."""
        pre = self._pre
        assert pre is not None  # it is read before
        return pre * self._hold(lambda: torch.where(pre == 0, 0.0, post / pre))
