"""`lens`: the next words that each layer's activations stand for, token by token, by the logit lens or a tuned one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.analysis.tuned_lens import TunedLens
from saelab.functional.metrics import kl_divergence
from saelab.functional.screening import largest_first
from saelab.interventions.prompt_metrics import Prompt, read_one_text
from saelab.lm.hook_points import hook_points_of
from saelab.lm.hooks import capture
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.last_layers import LastLayers
from saelab.lm.model_checks import find_known_ids
from saelab.lm.models import describe_model
from saelab.lm.tokenizers import spell, token_strings
from saelab.lm.verification import find_residuals
from saelab.sae.compatibility import match_weights
from saelab.stores.results import Result, format_table

N_PERMUTATIONS = 200
WIDEST = 14
"""characters of a word in a printed table"""
SHOWN = 24
"""tokens in a printed table, the last ones"""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenLens(Result):
    """Next words read from every layer at every token of a prompt; the last layer's are the model's own predictions."""

    model: str
    lens: str
    """"logit" or "tuned\""""
    hook_points: tuple[str, ...]
    """layers, in order; the last is what the model's final norm reads"""
    tokens: tuple[str, ...]
    """of the prompt"""
    words: tuple[tuple[tuple[str, ...], ...], ...]
    """by layer and token, the likeliest next tokens, the likeliest first"""
    probabilities: Float[np.ndarray, "n_layers n_tokens n_top"]
    """of these words"""
    rank: Int[np.ndarray, "n_layers n_tokens"]
    """by layer, rank of the model's likeliest word of all; 0 is the likeliest"""
    kl: Float[np.ndarray, "n_layers n_tokens"]
    """KL of the model's own prediction from the layer's, nats"""
    kl_permuted: Float[np.ndarray, "n_layers"]
    """mean KL between predictions of different tokens of the prompt, which a lens without the token would have"""
    p: Float[np.ndarray, "n_layers"]
    """share of permutations of the tokens whose mean KL is as low as the prompt's, which is counted among them"""
    n_permutations: int
    seed: int
    limits: str = (
        "A lens shows what the last layers would make of a layer's activation. Later layers need not use it, and words "
        "of early layers may only be frequent ones."
    )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the layers, shorter."""
        return tuple(name.replace(".hook_in", "").replace(".hook_", " ") for name in self.hook_points)

    def __str__(self) -> str:
        n_tokens = len(self.tokens)
        low = [name for name, p in zip(self.hook_points[:-1], self.p[:-1], strict=True) if p > 0.05]
        first = max(0, n_tokens - SHOWN)
        cut = f", the last {SHOWN} shown" if first else ""
        lines = [
            f"{self.lens} lens of {self.model}, {n_tokens} tokens{cut}",
            f"no nearer to the model's prediction of its token than of others (p > 0.05): {', '.join(low) or 'none'}",
        ]
        table = [["token", *self.columns]]
        for i in range(first, n_tokens):
            cells = [
                f"{_shorten(self.words[layer][i][0])} {self.probabilities[layer, i, 0]:.2f}"
                for layer in range(len(self.hook_points))
            ]
            table.append([_shorten(self.tokens[i]), *cells])
        table.append(["KL, mean", *(f"{x:.2f}" for x in self.kl.mean(1))])
        table.append(["KL, permuted", *(f"{x:.2f}" for x in self.kl_permuted)])
        return "\n".join([*lines, *format_table(table, left=range(len(table[0]))), self.limits])


def _shorten(word: str) -> str:
    shown = repr(word)[1:-1]
    return shown if len(shown) <= WIDEST else f"{shown[: WIDEST - 1]}\u2026"


@torch.no_grad()
def lens(
    model: AnyModel,
    prompt: Prompt,
    tuned: TunedLens | None = None,
    hook_points: Sequence[str] | None = None,
    *,
    n: int = 5,
    allow_mismatch: bool = False,
    seed: int = 0,
) -> TokenLens:
    """The next words that each layer's activations stand for at each token of a prompt.

    The model's final norm and head are applied to the residual stream of every layer (logit lens), or to what a tuned
    lens makes of it (arXiv:2303.08112). Beside the KL of each layer stands that between different tokens of the prompt.

    Args:
        model: the language model.
        prompt: a text, or its token ids.
        tuned: result of `fit_lens`; None is the logit lens.
        hook_points: layers of the residual stream, in order; None is the lens' own, or the input of each block.
        n: words of each token and layer, at most the size of the vocabulary.
        allow_mismatch: True accepts a lens that was fitted on another model or weight processing.
        seed: of the permutations.

    Raises:
        ValueError: for a blank prompt, a layer that the lens does not have or that is not as wide as the residual
            stream, and a lens of another model.

    >>> found = lens(sl.lm.tiny_model(), "Hello", n=3)
    >>> found.probabilities.shape, bool((found.rank[-1] == 0).all())
    ((4, 6, 3), True)
    """
    model = as_model(model)
    if n < 1:
        raise ValueError(f"`n` must be at least 1 word, got {n}.")
    if tuned is not None:
        match_weights(tuned.origin, model, allow_mismatch)
    ids = read_one_text(model, prompt).ids
    last = LastLayers.measure(model)
    given = hook_points or (tuned.hook_points if tuned is not None else find_residuals(hook_points_of(model))[:-1])
    names = tuple(name for name in given if name != last.last)
    acts = capture(model, ids, [*names, last.last])
    if wrong := {name: x.shape[-1] for name, x in acts.items() if x.shape[-1] != model.cfg.d_model}:
        raise ValueError(f"`hook_points` must be as wide as the residual stream ({model.cfg.d_model}), got {wrong}.")
    known = find_known_ids(model).nonzero()[:, 0]
    own = last(acts[last.last][0])[:, known.to(ids_device := acts[last.last].device)]
    top = own.argmax(-1, keepdim=True)
    rng = np.random.default_rng(seed)
    orders = [torch.from_numpy(rng.permutation(len(own))).to(ids_device) for _ in range(N_PERMUTATIONS)]
    found = []
    for name in (*names, last.last):
        x = acts[name][0].float()
        x = tuned.apply(name, x) if tuned is not None and name != last.last else x
        found.append(_read(last(x)[:, known.to(x.device)], own, top, orders, min(n, len(known))))
    chosen = known[torch.stack([one.places for one in found])]
    strings = _name(model, chosen)
    return TokenLens(
        model=describe_model(model).name,
        lens="logit" if tuned is None else "tuned",
        hook_points=(*names, last.last),
        tokens=_spell(model, ids[0]),
        words=tuple(tuple(tuple(strings[i] for i in cell) for cell in layer) for layer in chosen.tolist()),
        probabilities=np.stack([one.probabilities.numpy() for one in found]),
        rank=np.stack([one.rank.numpy() for one in found]),
        kl=np.stack([one.kl.numpy() for one in found]),
        kl_permuted=np.array([one.permuted for one in found]),
        p=np.array([one.p for one in found]),
        n_permutations=N_PERMUTATIONS,
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class _LayerWords:
    """What is read from one layer."""

    places: Int[Tensor, "n_tokens n_top"]
    probabilities: Float[Tensor, "n_tokens n_top"]
    rank: Int[Tensor, "n_tokens"]
    kl: Float[Tensor, "n_tokens"]
    permuted: float
    p: float


def _read(logits: Tensor, own: Tensor, top: Tensor, orders: list[Tensor], n: int) -> _LayerWords:
    kl = kl_divergence(own, logits)
    # KL of every two tokens: sum p log p - sum p log q
    log_p, log_q = own.log_softmax(-1), logits.log_softmax(-1)
    p = log_p.exp()
    table = (p * log_p).nansum(-1, keepdim=True) - p @ log_q.T
    rows = torch.arange(len(own), device=own.device)
    drawn = torch.stack([table[rows, order].mean() for order in orders])
    n_tokens = len(own)
    others = (table.sum() - table.diagonal().sum()) / max(1, n_tokens * (n_tokens - 1))
    places = largest_first(logits, n)
    return _LayerWords(
        places=places.cpu(),
        probabilities=logits.softmax(-1).gather(1, places).cpu(),
        rank=(logits > logits.gather(1, top)).sum(1).cpu(),
        kl=kl.cpu(),
        permuted=float(others) if n_tokens > 1 else float("nan"),
        p=(1 + int((drawn <= table.diagonal().mean()).sum())) / (1 + len(orders)),
    )


def _name(model: AnyModel, ids: Tensor) -> dict[int, str]:
    listed = ids.unique().tolist()
    tokenizer = as_model(model).tokenizer
    return token_strings(tokenizer, listed) if tokenizer is not None else {i: f"<{i}>" for i in listed}


def _spell(model: AnyModel, ids: Tensor) -> tuple[str, ...]:
    tokenizer = as_model(model).tokenizer
    return spell(tokenizer, ids.tolist()).words if tokenizer is not None else tuple(f"<{i}>" for i in ids.tolist())
