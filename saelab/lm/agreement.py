"""Do the hooks read what Hugging Face computes? The residual stream, layer by layer, against `hidden_states`."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.lm.door import Door, door
from saelab.lm.hooks import capture, read_sites, to_model
from saelab.lm.models import Model
from saelab.lm.plain import set_attention, strip
from saelab.stores.results import Result


@dataclass(frozen=True, kw_only=True)
class HookAgreement(Result):
    """Relative distance |x - h| / |h| between hooked activations x and Hugging Face's hidden states h, per hook point.

    In [0, inf), lower is better, 0 is bit-equal. `captured` is what `capture` returns, `bridge` what flows through the
    bridge when it runs by itself.
    """

    hook_points: tuple[str, ...]
    captured: tuple[float, ...]
    bridge: tuple[float, ...]
    tolerance: float
    n_tokens: int

    @property
    def ok(self) -> bool:
        """Whether every distance is within the tolerance (rounding)."""
        return all(error <= self.tolerance for error in (*self.captured, *self.bridge))

    def __str__(self) -> str:
        rows = zip(self.hook_points, self.captured, self.bridge, strict=True)
        lines = [f"{name:<28} {captured:>10.2e} {bridge:>10.2e}" for name, captured, bridge in rows]
        verdict = "agree" if self.ok else "DISAGREE"
        head = f"{'|x - h| / |h|':<28} {'captured':>10} {'bridge':>10}"
        return "\n".join(
            [head, *lines, f"Hooks and Hugging Face {verdict} (tolerance {self.tolerance:g}, {self.n_tokens} tokens)."]
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields and `ok`, ready for JSON."""
        return super().to_dict() | {"ok": self.ok}


def verify_hooks(model: Model, ids: Int[Tensor, "batch ctx_len"] | None = None) -> HookAgreement:
    """Compare every residual hook point with the hidden states that the plain Hugging Face model returns.

    `ids` defaults to 32 random tokens. Hugging Face's last hidden state usually lies behind the final norm, so the
    last row names whichever hook point it is nearest to. ValueError for a model with folded weights, whose activations
    differ from Hugging Face's on purpose.

    >>> sl.verify_hooks(sl.tiny_model()).ok
    True
    """
    if getattr(model, "_weights_processed", False):
        raise ValueError(
            "`verify_hooks` needs raw weights, got a model whose weights were folded by `enable_compatibility_mode`. "
            "Load the model again."
        )
    home = door(model)
    ids = home.probe if ids is None else to_model(model, ids)
    states = _hidden_states(home, ids)
    n_layers = len(states) - 1
    names = [f"blocks.{i}.hook_in" for i in range(n_layers)]
    names += [name for name in (f"blocks.{n_layers - 1}.hook_out", "ln_final.hook_out") if name in home.points]
    through_bridge = {name: home.bridge_site(name) for name in names}
    captured = _distances(capture(model, ids, names), states)
    bridge = _distances(read_sites(home.bridged, through_bridge, ids, stop=True), states)
    last = min(names[n_layers:], key=lambda name: captured[name])
    kept = (*names[:n_layers], last)
    return HookAgreement(
        hook_points=kept,
        captured=tuple(captured[name] for name in kept),
        bridge=tuple(bridge[name] for name in kept),
        tolerance=1e-4 if states[0].dtype == torch.float32 else 0.02,
        n_tokens=ids.numel(),
    )


@torch.no_grad()
def _hidden_states(home: Door, ids: Tensor) -> tuple[Tensor, ...]:
    """Hugging Face's own, from a copy of its modules that nobody hooked."""
    reference: Any = strip(home.bridged)[0]
    set_attention(reference, home.attention)
    states: tuple[Tensor, ...] = reference(ids, use_cache=False, output_hidden_states=True).hidden_states
    return states


def _distances(values: dict[str, Tensor], states: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative distance of each activation to its hidden state: the i-th to the i-th, what is left over to the last."""
    pairs = {name: (x, states[min(i, len(states) - 1)]) for i, (name, x) in enumerate(values.items())}
    return {name: float((x.double() - h.double()).norm() / h.double().norm()) for name, (x, h) in pairs.items()}
