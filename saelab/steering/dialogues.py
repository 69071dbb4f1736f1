"""`converse`: a dialogue of several turns, each steered in its own way, whose history is read as the model alone would.

A key-value cache that is kept over turns keeps what was steered: strengths of earlier turns go on acting through the
keys and values of their tokens after they were changed or set to zero (arXiv:2605.10664). Here every turn reads the
history anew, unsteered or, to study that effect, with the strengths that each of its turns had.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saelab.interventions.interventions import Intervention
from saelab.interventions.prompt_metrics import read_one_text
from saelab.interventions.steering_hooks import steer_all
from saelab.lm.conversations import Conversation
from saelab.lm.generation import SAMPLING, Generated, SamplingConfig, generate
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.stores.results import Result

DialogueHistory = Literal["clean", "steered"]
TurnEdits: TypeAlias = Sequence[Intervention] | Sequence[Sequence[Intervention]]


@dataclass(frozen=True, kw_only=True, eq=False)
class DialogueTurn:
    """What was said to the model, and its reply."""

    said: str
    reply: Generated
    start: int
    """first token of the turn in `reply.all_ids`; those before are history"""
    interventions: tuple[Intervention, ...]
    """what steered this turn's tokens"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dialogue(Result):
    """Turns of a dialogue, the last of which holds all its tokens."""

    turns: tuple[DialogueTurn, ...]
    history: str
    """"clean" or "steered", as in `converse`"""
    system: str | None
    is_chat: bool
    """whether a chat template makes the text; otherwise what is said and replied is one running text"""
    seed: int

    @property
    def conversation(self) -> Conversation:
        """The messages, also of a dialogue that is one running text."""
        first = [{"role": "system", "content": self.system}] if self.system is not None else []
        parts = [(("user", turn.said), ("assistant", turn.reply.text)) for turn in self.turns]
        return Conversation((*first, *({"role": role, "content": text} for pair in parts for role, text in pair)))

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids of the whole dialogue."""
        return self.turns[-1].reply.all_ids

    def to_dict(self) -> dict[str, Any]:
        """DialogueHistory, seed, and of each turn what was said and replied, with ids and log-probabilities."""
        turns = [
            {
                "said": turn.said, "reply": turn.reply.text, "start": turn.start, "ids": list(turn.reply.ids),
                "log_probs": list(turn.reply.log_probs), "n_interventions": len(turn.interventions),
            }
            for turn in self.turns
        ]  # fmt: skip
        return {"history": self.history, "seed": self.seed, "system": self.system, "turns": turns}

    def __str__(self) -> str:
        lines = [f"dialogue of {len(self.turns)} turns, {len(self.ids):,} tokens, history {self.history}"]
        for message in self.conversation.messages:
            lines.append(f"{message['role']}: {message['content']}")
        return "\n".join(lines)


def converse(
    model: AnyModel,
    says: str | Sequence[str],
    interventions: TurnEdits = (),
    *,
    history: DialogueHistory = "clean",
    system: str | None = None,
    before: Dialogue | None = None,
    n_tokens: int = 50,
    seed: int = 0,
    sampling: SamplingConfig = SAMPLING,
    stop_at_eos: bool = True,
    use_cache: bool = True,
) -> Dialogue:
    """A dialogue in which the model replies to each of `says`, steered on the tokens of the turn.

    With `history="clean"` earlier turns are read without any edit, whatever steered them when they were written: a turn
    with no interventions is the model's own reply to that text, bit for bit. With `history="steered"` the tokens of
    each earlier turn are steered as they were then, as in a key-value cache that is kept. Either way the cache within a
    turn changes nothing.

    Args:
        model: language model. Without a chat template what is said and replied is one running text.
        says: what is said to the model, turn by turn.
        interventions: what steers every turn, or a list of such lists, one a turn. `where` is "all", "prompt" (what is
            said) or "generated" tokens of the turn, or a condition on codes.
        history: "clean" or "steered".
        system: system message, for models with a chat template.
        before: dialogue that goes on; its history, system message and seed stand.
        n_tokens: largest number of tokens of a reply.
        seed: of the samples; each turn has its own draws.
        sampling: temperature, top-k and top-p.
        stop_at_eos: whether a reply ends at an end-of-text token.
        use_cache: whether to use a key-value cache within a turn, where it is correct.

    Raises:
        ValueError: for lists of another length than `says`, interventions with positions or masks of their own, a
            system message without a chat template, and a dialogue that outgrows the model's context.

    >>> model = sl.lm.tiny_model()
    >>> up = sl.Intervention(sl.Direction(torch.ones(32), "blocks.1.hook_resid_post"), 4.0)
    >>> found = converse(model, ["Hello. ", " And then? "], [[up], []], n_tokens=3)
    >>> [len(turn.reply.ids) for turn in found.turns], found.turns[1].start
    ([3, 3], 11)
    """
    model = as_model(model)
    if before is not None:
        history, system, seed = before.history, before.system, before.seed  # type: ignore[assignment]
    if history not in get_args(DialogueHistory):
        raise ValueError(f"`history` must be one of {get_args(DialogueHistory)}, got '{history}'.")
    is_chat = bool(getattr(model.tokenizer, "chat_template", None))
    if system is not None and not is_chat:
        raise ValueError("`system` needs a tokenizer with a chat template, got none; say it in the first turn.")
    said = [says] if isinstance(says, str) else list(says)
    each = _spread(interventions, len(said))
    turns = list(before.turns) if before is not None else []
    for text, now in zip(said, each, strict=True):
        ids = _read_chat(model, turns, text, system) if is_chat else _go_on(model, turns, text)
        start = _find_start(ids, turns[-1] if turns else None, history)
        active = [replace(one, where=_within(one, slice(start, None))) for one in now]
        if history == "steered":
            active = [*_earlier(turns, start), *active]
        drawn = int(np.random.SeedSequence((seed, len(turns))).generate_state(1)[0])
        with steer_all(model, active):
            made = generate(
                model, ids[None], n_tokens, seed=drawn, sampling=sampling, stop_at_eos=stop_at_eos,
                use_cache=use_cache, progress=False,
            )[0]  # fmt: skip
        turns.append(DialogueTurn(said=text, reply=made, start=start, interventions=tuple(now)))
    return Dialogue(turns=tuple(turns), history=history, system=system, is_chat=is_chat, seed=seed)


def _spread(given: TurnEdits, n: int) -> list[Sequence[Intervention]]:
    """The interventions of each of n turns."""
    several = [one for one in given if not isinstance(one, Intervention)]
    if not several:
        return [given] * n  # type: ignore[list-item]
    if len(several) != len(given) or len(given) != n:
        raise ValueError(f"`interventions` must be one list, or one for each of the {n} turns, got {len(given)}.")
    return several


def _read_chat(model: Model, turns: Sequence[DialogueTurn], text: str, system: str | None) -> Int[Tensor, "n"]:
    """Token ids of a conversation up to where the model replies."""
    first = [{"role": "system", "content": system}] if system is not None else []
    past = [(("user", turn.said), ("assistant", turn.reply.text)) for turn in turns]
    told = [{"role": role, "content": content} for pair in past for role, content in pair]
    messages = (*first, *told, {"role": "user", "content": text})
    return torch.tensor(Conversation(messages).encode(model.tokenizer, reply=True))


def _go_on(model: Model, turns: Sequence[DialogueTurn], text: str) -> Int[Tensor, "n"]:
    """Token ids of a running text: those there are, as they were drawn, and the new ones where the tokenizer adds them
    to the old text; where it joins old and new ones, the text is tokenized again.
    """
    past = "".join(turn.said + turn.reply.text for turn in turns)
    whole = read_one_text(model, past + text, "says").ids[0]
    if not turns:
        return whole
    known, before = torch.tensor(turns[-1].reply.all_ids), read_one_text(model, past, "says").ids[0]
    if len(whole) <= len(before) or not torch.equal(whole[: len(before)], before):
        return whole
    return torch.cat([known, whole[len(before) :]])


def _find_start(ids: Int[Tensor, "n"], last: DialogueTurn | None, history: DialogueHistory) -> int:
    """Number of tokens that were there before; a kept cache has not read the last one."""
    if last is None:
        return 0
    known = last.reply.all_ids
    same = count_common(ids.tolist(), known)
    return min(same, len(known) - 1) if history == "steered" else same


def count_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning of two sequences.

    >>> count_common([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _within(one: Intervention, positions: slice) -> Any:
    """The intervention's `where` among some positions."""
    if one.places.positions is not None or one.places.tokens is not None:
        raise ValueError("`where` of a dialogue must be a part of the turn or a condition, got positions or a mask.")
    return replace(one.places, positions=positions)


def _earlier(turns: Sequence[DialogueTurn], end: int) -> list[Intervention]:
    """What steered the tokens of earlier turns, at the places that it had."""
    found = []
    for turn, start in zip(turns, [*(turn.start for turn in turns[1:]), end], strict=False):
        stop = min(start, end)
        middle = min(stop, len(turn.reply.prompt_ids))
        for one in turn.interventions:
            begin = {"all": turn.start, "prompt": turn.start, "generated": middle}[one.places.part]
            to = middle if one.places.part == "prompt" else stop
            where = replace(_within(one, slice(begin, to)), part="all")
            found += [replace(one, where=where)] if begin < to else []
    return found
