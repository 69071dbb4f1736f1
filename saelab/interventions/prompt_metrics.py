"""`PromptMetric`: a metric of the model's predictions, one number for each text; and prompts as padded token ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import SupportsIndex, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.interventions.interventions import TokenSelection, make_where
from saelab.lm.conversations import Conversation, Messages
from saelab.lm.documents import list_prompts
from saelab.lm.hooks import ForwardTokens, next_token_loss
from saelab.lm.model_checks import Model, find_context, find_row
from saelab.lm.tokenizers import find_special_ids, find_token_id, spell, token_strings
from saelab.lm.tokens import Tokens, tokenize

Prompt: TypeAlias = str | Messages | Conversation | Int[Tensor, "n"]
"""A text, which gets a BOS, a conversation, which the assistant continues, or token ids as they are."""
TargetToken: TypeAlias = str | int | np.integer | Int[Tensor, "n_texts"]
"""A token, by its text or id; or one id for each text"""
Metric: TypeAlias = TargetToken | tuple[TargetToken, TargetToken] | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Texts:
    """Rows of token ids, padded on the right."""

    ids: Int[Tensor, "n_texts n"]
    lengths: Int[Tensor, "n_texts"]
    predicts: Bool[Tensor, "n_texts n"] | None = None
    """whether the next token is of the same document; None: everywhere in a text"""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def positions(self) -> Int[Tensor, "n_texts n"]:
        """Positions in each text, from 0; -1 at padding."""
        places = torch.arange(self.ids.shape[1]).expand_as(self.ids)
        return torch.where(places < self.lengths[:, None], places, -1)

    def strings(self, model: Model, row: int = 0) -> tuple[str, ...]:
        """The text of each token of a row; tokens that share a character all show it."""
        ids = self.ids[row, : self.lengths[row]].tolist()
        return spell(model.tokenizer, ids).touched if model.tokenizer is not None else tuple(f"<{i}>" for i in ids)

    def select(self, model: Model, where: TokenSelection) -> Bool[Tensor, "n_texts n"]:
        """Mask of the tokens of a place, special ones only where it asks for them; ValueError for a condition."""
        place = make_where(where)
        if place.when is not None:
            raise ValueError("`where` must be a part, positions or a mask here, got a condition; give a mask of it.")
        special = torch.tensor(find_special_ids(model) if model.tokenizer is not None else (), dtype=torch.long)
        return place.select(ForwardTokens(self.ids, self.positions, 0, self.ids.shape[1], self.lengths), special)


def read_texts(model: Model, prompts: Prompt | Sequence[Prompt] | Tokens) -> Texts:
    """Prompts as padded rows of token ids; ValueError for one that is empty or does not fit the model's context.

    >>> texts = read_texts(sl.lm.tiny_model(), ["One", torch.tensor([0, 70])])
    >>> texts.ids.shape, texts.lengths
    (torch.Size([2, 4]), tensor([4, 2]))
    """
    if isinstance(prompts, Tokens):
        return Texts(prompts.ids.long(), prompts.attention_mask.sum(1), prompts.predicts)
    several = [prompts] if isinstance(prompts, Tensor) else list_prompts(prompts)
    rows = [_read_prompt(model, prompt) for prompt in several]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    if not rows or not 1 <= int(lengths.min()) <= int(lengths.max()) <= find_context(model):
        raise ValueError(
            f"Prompts must have 1 to {find_context(model)} tokens (the model's context), got {lengths.tolist()[:5]}."
        )
    return Texts(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths)


def read_one_text(model: Model, prompt: Prompt, name: str = "prompt") -> Texts:
    """A prompt as one row of token ids; ValueError for several, and as `read_texts`. `name` is the argument's."""
    texts = read_texts(model, prompt)
    if len(texts) != 1:
        raise ValueError(f"`{name}` must be one text, got {len(texts)}; give them one by one.")
    return texts


def _read_prompt(model: Model, prompt: Prompt) -> Int[Tensor, "n"]:
    if isinstance(prompt, Tensor) and prompt.ndim == 1 and not prompt.is_floating_point():
        return prompt.long().cpu()
    if isinstance(prompt, Conversation):
        return torch.tensor(prompt.encode(model.tokenizer, reply=True))
    if not isinstance(prompt, str):
        got = f"{prompt.dtype} of shape {tuple(prompt.shape)}" if isinstance(prompt, Tensor) else type(prompt).__name__
        raise ValueError(f"A prompt must be a text or a tensor of token ids, (n_tokens,) integers, got {got}.")
    if not prompt.strip():
        raise ValueError("A prompt must hold text, got a blank one; to start from BOS alone give its id.")
    tokens = tokenize(model, [prompt], find_row(model, prompt), packed=False, separator=None)
    if tokens.n_truncated:
        raise ValueError(
            f"A prompt must fit the model's context of {find_context(model)} tokens, got '{prompt[:40]}'..."
        )
    return tokens.ids[0, : tokens.n_tokens].long()


@dataclass(frozen=True, eq=False)
class PromptMetric:
    """A metric with one number for each text: its name, and a function of logits, texts and the texts' row numbers."""

    name: str
    read: Callable[[Tensor, Texts, Tensor], Tensor]

    def __call__(
        self, logits: Float[Tensor, "batch n d_vocab"], texts: Texts, rows: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch"]:
        """The metric of each row of the logits, which belongs to text `rows[i]`.

        ValueError where a user's function returns anything but one number a row.
        """
        values = self.read(logits, texts, rows.to(logits.device))
        if not isinstance(values, Tensor) or values.shape != logits.shape[:1] or not values.is_floating_point():
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"A metric must give a number a row, shape ({len(logits)},), got {got}.")
        return values.float()


def make_prompt_metric(model: Model, metric: Metric) -> PromptMetric:
    """The metric for a token, a pair of tokens, "loss", or a function of the logits.

        "word", 42                   log-probability of that next token after the text, in nats (a tensor: one per text)
        ("word", "other")            its logit minus the other's
        "loss"                       mean cross-entropy of the text's own next tokens, in nats (a token: by its id)
        f(logits)                    a function of (batch, n, d_vocab) that gives (batch,), row by row, differentiable

    ValueError for a text that is not one token, and for an id outside of the model's vocabulary.

    >>> make_prompt_metric(sl.lm.tiny_model(), ("a", "b")).name
    "logit 'a' - logit 'b'"
    """
    if isinstance(metric, str) and metric == "loss":
        return PromptMetric("loss", _loss)
    if isinstance(metric, str | int | np.integer | Tensor):
        target = _find_ids(model, metric)
        return PromptMetric(
            f"log p({_name_token(model, metric)})", lambda logits, texts, rows: _log_p(logits, texts, rows, target)
        )
    if isinstance(metric, tuple):
        a, b = (_find_ids(model, target) for target in metric)

        def difference(logits: Tensor, texts: Texts, rows: Tensor) -> Tensor:
            return _log_p(logits, texts, rows, a) - _log_p(logits, texts, rows, b)

        return PromptMetric(
            f"logit {_name_token(model, metric[0])} - logit {_name_token(model, metric[1])}", difference
        )
    return PromptMetric(getattr(metric, "__name__", "metric"), lambda logits, _texts, _rows: metric(logits))


def read_last(
    logits: Float[Tensor, "batch n d_vocab"], texts: Texts, rows: Int[Tensor, "batch"]
) -> Float[Tensor, "batch d_vocab"]:
    """Logits after the last token of each text, float32; row i of the logits belongs to text `rows[i]`."""
    return logits[torch.arange(len(rows)), texts.lengths[rows.cpu()] - 1].float()


def _loss(logits: Tensor, texts: Texts, rows: Tensor) -> Tensor:
    of = rows.cpu()
    counts = torch.arange(1, texts.ids.shape[1]) < texts.lengths[of, None]
    if texts.predicts is not None:
        counts = counts & texts.predicts[of, :-1]
    counts = counts.to(logits.device)
    losses = next_token_loss(logits, texts.ids[of]).masked_fill(~counts, 0)
    return losses.sum(1) / counts.sum(1)


def _log_p(logits: Tensor, texts: Texts, rows: Tensor, target: Tensor) -> Tensor:
    """Log-probability of the target after the last token of each text."""
    last = read_last(logits, texts, rows).log_softmax(1)
    wanted = target.to(rows).expand(len(texts))[rows]
    return last.gather(1, wanted[:, None])[:, 0]


def _find_ids(model: Model, target: TargetToken) -> Tensor:
    ids = target.reshape(-1) if isinstance(target, Tensor) else torch.tensor([find_token(model, target)])
    if len(ids) == 0 or int(ids.min()) < 0 or int(ids.max()) >= model.cfg.d_vocab:
        raise ValueError(f"A target must be a token id in 0..{model.cfg.d_vocab - 1}, got {ids.tolist()[:5]}.")
    return ids


def find_token(model: Model, target: str | SupportsIndex) -> int:
    """The id of a token given by its text, as `token_strings` shows it, or by its id.

    >>> find_token(sl.lm.tiny_model(), "a"), find_token(sl.lm.tiny_model(), 5)
    (67, 5)
    """
    return find_token_id(model.tokenizer, target) if isinstance(target, str) else index(target)


def _name_token(model: Model, target: TargetToken) -> str:
    if isinstance(target, int | np.integer):
        i = int(target)
        return repr(token_strings(model.tokenizer, [i])[i]) if model.tokenizer is not None else f"<{i}>"
    return "target" if isinstance(target, Tensor) else repr(target)
