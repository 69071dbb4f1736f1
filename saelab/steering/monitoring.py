"""`monitor`: how far each message of a conversation lies along traits, beside the same pairs with ends exchanged."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.interventions.prompt_metrics import read_one_text
from saelab.lm.conversations import Conversation, Messages
from saelab.lm.hooks import capture
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model, find_context
from saelab.lm.tokenizers import find_special_ids, spell
from saelab.steering.dialogues import Dialogue, count_common
from saelab.steering.traits import Trait
from saelab.stores.results import Result, format_table


@dataclass(frozen=True, kw_only=True)
class MessageReading:
    """The level of every trait over one message, or over a whole text."""

    role: str
    start: int
    """first token"""
    stop: int
    """token after the last"""
    n_tokens: int
    """tokens that are read, special ones left out"""
    levels: dict[str, float]
    """mean level of the tokens by trait: 0 at the negative descriptions, 1 at the positive ones"""
    last: dict[str, float]
    """level of the last token, of a user's message what the reply begins from"""
    chance: dict[str, tuple[float, float]]
    """range of 95 % of the directions of the same pairs, the ends of half of which are exchanged"""


@dataclass(frozen=True, kw_only=True, eq=False)
class TraitReadings(Result):
    """Levels of traits over a conversation, by token and by message.

    A level says where activations lie between the means of two sets of descriptions. Outside of texts like these, other
    things than the trait move it: compare with conversations without the trait, not with 0 and 1 alone.
    """

    rows: tuple[MessageReading, ...]
    traits: tuple[str, ...]
    hook_points: tuple[str, ...]
    """where each trait is read"""
    tokens: tuple[str, ...] = field(repr=False)
    levels: Float[np.ndarray, "n_traits n_tokens"] = field(repr=False)
    kept: Bool[np.ndarray, "n_tokens"] = field(repr=False)
    """tokens that are not special"""
    n_exchanges: int
    seed: int

    def __str__(self) -> str:
        places = ", ".join(f"{name} at {at}" for name, at in zip(self.traits, self.hook_points, strict=True))
        n = int(self.kept.sum())
        lines = [f"{places}; {n:,} tokens, {self.n_exchanges} exchanges, seed {self.seed}"]
        table = [["message", "tokens", *(title for name in self.traits for title in ("exchanged", name, "last token"))]]
        for i, row in enumerate(self.rows):
            cells = []
            for name in self.traits:
                low, high = row.chance[name]
                outside = "" if low <= row.levels[name] <= high else " *"
                cells += [f"{low:.2f} to {high:.2f}", f"{row.levels[name]:.2f}{outside}", f"{row.last[name]:.2f}"]
            table.append([f"{i + 1} {row.role}", f"{row.n_tokens:,}", *cells])
        return "\n".join(
            [*lines, *format_table(table), "* outside of 95 % of the directions of pairs whose ends are exchanged"]
        )


def monitor(
    model: AnyModel,
    text: str | Messages | Conversation | Dialogue,
    traits: Trait | Sequence[Trait],
    *,
    n_exchanges: int = 200,
    seed: int = 0,
) -> TraitReadings:
    """Levels of traits at every token of a conversation or text, and their means over each message.

        level = (x - negative) . v / |v|^2        v = positive - negative, the means of the descriptions' ends

    The model is as it is when this is called: inside `steer` the steered one. A message's tokens include what the chat
    template writes around it. The range of chance is that of `1/2 + (x - middle) . w / |v|^2` over directions w of the
    same pairs and length, the ends of a random half of which are exchanged: how far such a text lies from the
    descriptions along whatever else the pairs differ in. Random directions of the space would be no null: activations
    lie further along a difference of two texts than along them.

    Args:
        model: language model.
        text: messages, a dialogue of `converse`, or a text, which counts as one message.
        traits: directions to read, each at its own best hook point.
        n_exchanges: draws of exchanged ends for each trait.
        seed: of these.

    Raises:
        ValueError: for no trait, two of one name, fewer than 20 exchanges, and a text that does not fit the
            model's context.

    >>> model = sl.lm.tiny_model()
    >>> pairs = [("I am glad", "I am sad"), ("so glad", "so sad")]
    >>> trait = sl.steering.trait_vector(model, pairs, name="glad", progress=False)
    >>> monitor(model, "I am so glad", trait).rows[0].n_tokens
    12
    """
    model = as_model(model)
    found = (traits,) if isinstance(traits, Trait) else tuple(traits)
    names = tuple(trait.name for trait in found)
    if not found or len(set(names)) < len(names):
        raise ValueError(f"`traits` must be at least one, with different names, got {list(names)}.")
    if n_exchanges < 20:
        raise ValueError(f"`n_exchanges` must be at least 20 for a range of 95 %, got {n_exchanges}.")
    ids, parts = _read(model, text)
    special = torch.tensor(sorted(find_special_ids(model)) if model.tokenizer is not None else [], dtype=torch.long)
    kept = torch.isin(ids, special, invert=True)
    x = capture(model, ids[None], [trait.hook_point for trait in found])
    levels, by_chance = dict[str, Tensor](), dict[str, Tensor]()
    for trait in found:
        here = x[trait.hook_point][0].float().cpu()
        levels[trait.name] = trait.level(here)
        by_chance[trait.name] = _level_exchanged(trait, here, n_exchanges, seed)
    rows = []
    for role, start, stop in parts:
        of = torch.arange(start, stop)[kept[start:stop]]
        if not len(of):
            continue
        chance = {name: by_chance[name][of].mean(0).quantile(torch.tensor([0.025, 0.975])).tolist() for name in names}
        rows.append(
            MessageReading(
                role=role, start=start, stop=stop, n_tokens=len(of),
                levels={name: float(levels[name][of].mean()) for name in names},
                last={name: float(levels[name][of[-1]]) for name in names},
                chance={name: (low, high) for name, (low, high) in chance.items()},
            )
        )  # fmt: skip
    return TraitReadings(
        rows=tuple(rows), traits=names, hook_points=tuple(trait.hook_point for trait in found),
        tokens=tuple(spell(model.tokenizer, ids.tolist()).words), kept=kept.numpy(),
        levels=torch.stack([levels[name] for name in names]).numpy(), n_exchanges=n_exchanges, seed=seed,
    )  # fmt: skip


def _level_exchanged(trait: Trait, x: Float[Tensor, "n d_in"], n: int, seed: int) -> Float[Tensor, "n n_drawn"]:
    """Levels along the directions of the same pairs with ends exchanged."""
    ends = [torch.from_numpy(end[trait.hook_point]) for end in (trait.positive, trait.negative)]
    return 0.5 + (x - (ends[0] + ends[1]) / 2) @ trait.draw_exchanged(n, seed).T / (ends[0] - ends[1]).square().sum()


def _read(model: Model, text: Any) -> tuple[Tensor, list[tuple[str, int, int]]]:
    """Token ids, and role, first token and end of each message."""
    if isinstance(text, Dialogue):
        if not text.is_chat:
            return torch.tensor(text.ids), _parts_of(text)
        text = text.conversation
    given = Conversation.find(text)
    if given is None:
        ids = read_one_text(model, text, "text").ids[0]
        return ids, [("text", 0, len(ids))]
    whole = given.encode(model.tokenizer)
    if len(whole) > (longest := find_context(model)):
        raise ValueError(f"A conversation must fit the model's context of {longest} tokens, got {len(whole)}.")
    parts, start = [], 0
    for i, message in enumerate(given.messages):
        stop = len(whole) if i + 1 == len(given) else _find_end(model, given, i + 1, whole)
        if stop is not None:
            parts.append((str(message["role"]), start, stop))
            start = stop
    return torch.tensor(whole), parts


def _find_end(model: Model, given: Conversation, n: int, whole: list[int]) -> int | None:
    """Where the first n messages end; None where the template takes no such conversation alone, as with a system
    message without a user's: they then count to the next.
    """
    try:
        return count_common(Conversation(given.messages[:n]).encode(model.tokenizer), whole)
    except ValueError:
        return None


def _parts_of(dialogue: Dialogue) -> list[tuple[str, int, int]]:
    """Messages of a running text."""
    found = []
    starts = [*(turn.start for turn in dialogue.turns[1:]), len(dialogue.ids)]
    for turn, stop in zip(dialogue.turns, starts, strict=True):
        middle = len(turn.reply.prompt_ids)
        found += [("user", turn.start, middle), ("assistant", middle, stop)]
    return found
