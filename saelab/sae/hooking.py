"""`hook_sae`: run an SAE or transcoder inside any torch module, such as a plain Hugging Face model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saelab.functional.codes import SparseCodes
from saelab.lm.plain import attach
from saelab.sae.coder import Coder

Side = Literal["input", "output"]


class HookedSAE:
    """Handle of a hooked SAE: `codes` holds the sparse codes of each forward pass, oldest first."""

    def __init__(
        self,
        sae: Coder,
        replace: bool,
        edit: Callable[[Tensor], Tensor] | None,
        keep: Bool[Tensor, "*batch"] | None,
    ) -> None:
        """Store the arguments of `hook_sae`.

        Args:
            sae: the SAE or transcoder.
            replace: whether the reconstruction replaces the activations.
            edit: function of the dense codes applied before they are decoded, or None.
            keep: (*batch) tokens at which activations are replaced; None is all.
        """
        self.sae = sae
        self.codes: list[SparseCodes] = []
        self._replace, self._edit, self._keep = replace, edit, keep
        self._inputs: list[Tensor] = []

    def read(self, x: Float[Tensor, "*batch d_in"]) -> None:
        """Keep a transcoder's input until the module's output, its target, is computed."""
        self._inputs[:] = [x]

    def change(self, y: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch d_out"] | None:
        """Replacement for the activations y in the forward pass; None leaves y as it is."""
        sae = self.sae
        x = (self._inputs.pop() if sae.cfg.d_out is not None else y).to(sae.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self._replace or self._edit is not None)):
            z = sae.encode(x)
            self.codes.append(SparseCodes.from_dense(z.detach()))
            if not self._replace and self._edit is None:
                return None
            y_hat = sae.decode(z if self._edit is None else self._edit(z), x=x)
            if not self._replace:  # the SAE's error is kept, so that only the edit changes y
                y_hat = y + (y_hat - sae.decode(z, x=x)).to(y)
            y_hat = y_hat.to(y)
        if self._keep is None:
            return y_hat
        if self._keep.shape != y.shape[:-1]:
            raise ValueError(
                f"`keep` must be of the tokens' shape {tuple(y.shape[:-1])}, got {tuple(self._keep.shape)}; give one "
                "truth value a token."
            )
        return torch.where(self._keep.to(y.device).unsqueeze(-1), y_hat, y)


@contextmanager
def hook_sae(
    module: nn.Module,
    sae: Coder,
    *,
    side: Side = "output",
    replace: bool = True,
    edit: Callable[[Tensor], Tensor] | None = None,
    keep: Bool[Tensor, "*batch"] | None = None,
) -> Iterator[HookedSAE]:
    """Context manager in which the activations at a module pass through an SAE in every forward pass; yields a
    `HookedSAE` that records the codes.

    Gradients flow. Blocks can be nested; all hooks are removed at the end, also after an error. What Hugging Face's
    `output_hidden_states` shows of that module is read by hooks of its own: x where they were attached before the
    block, `x_hat` where the block was first.

    Args:
        module: module whose input or output is read; a transcoder reads its input and replaces its output.
        sae: the SAE or transcoder.
        side: which activations an SAE reads and replaces: the first tensor that goes into the module ("input") or comes
            out of it ("output"); "output" for a transcoder.
        replace: whether the reconstruction `x_hat` replaces x. With False x stays, and codes are only recorded; with
            `edit` the SAE's error is added back then: `x + decode(edit(z)) - decode(z)`.
        edit: function of the dense codes (*batch, d_sae) applied before they are decoded; None decodes them as they
            are.
        keep: (*batch) tokens at which the activations are replaced, such as all but BOS; None is all.

    Raises:
        ValueError: for an unknown `side`, "input" for a transcoder, and, in the forward pass, a `keep` of another shape
            than the tokens.

    >>> layer, sae = torch.nn.Linear(4, 4), sl.SAE(sl.SAEConfig(d_in=4, d_sae=8, activation=sl.TopK(k=2)))
    >>> with hook_sae(layer, sae) as hooked:
    ...     x_hat = layer(torch.ones(3, 4))
    >>> hooked.codes[0].batch_shape
    (3,)
    """
    if side not in ("input", "output"):
        raise ValueError(f"`side` must be 'input' or 'output', got '{side}'.")
    if sae.cfg.d_out is not None and side == "input":
        raise ValueError("`side` must be 'output' for a transcoder, which reads the input, got 'input'; leave it.")
    hooked = HookedSAE(sae, replace, edit, keep)
    with ExitStack() as stack:
        if sae.cfg.d_out is not None:
            stack.enter_context(attach((module, "hook_in"), hooked.read))
        stack.enter_context(attach((module, "hook_in" if side == "input" else "hook_out"), hooked.change))
        yield hooked
