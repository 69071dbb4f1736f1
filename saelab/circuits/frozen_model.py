"""A language model that is linear in what is written to it: attention patterns, norm scales and gates are frozen."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.lm.freezing import Freezing
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

    @classmethod
    def make(cls, model: Model, ids: Int[Tensor, "1 n"], hook_points: Sequence[str]) -> "FrozenModel":
        """The frozen model of a prompt, with the hook points that will be used.

        Raises:
            ValueError: for a wrong name.
            RuntimeError: for a hook point that does not fire exactly once.
        """
        home = hook_points_of(model)
        names = list(dict.fromkeys(hook_points))
        has_head = HEAD in home.points and not home.look(HEAD).flat
        running, sites = home.route([*names, HEAD] if has_head else names)
        head = sites[-1] if has_head else None
        return cls(to_model(model, ids), running, dict(zip(names, sites, strict=False)), head)

    def forward(
        self, taps: Sequence[tuple[str, Tap]], constants: Sequence[Tensor] | None = None, n_rows: int = 1
    ) -> tuple[Float[Tensor, "n_rows d_vocab"], list[Tensor]]:
        """Logits after the last token, and the constants.

        Args:
            taps: hook point and hook function; those of one place run in this order.
            constants: of an earlier forward pass over one row; None computes them.
            n_rows: how many times the prompt is run, each as a row of its own.
        """
        mode = Freezing(constants, n_rows)
        with ExitStack() as stack:
            for name, tap in taps:
                stack.enter_context(attach(self.sites[name], tap))
            if self.head is not None:
                stack.enter_context(attach(self.head, lambda x: x[..., -1:, :]))
            with mode:
                logits = run_as_set(self.running, self.ids.expand(n_rows, -1))
        return logits[:, -1].float(), mode.constants
