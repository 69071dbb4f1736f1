"""A stand-in language model that has learned something: made-up stories, and a short lesson on them."""

import random
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from saelab.lm.models import Model
from saelab.lm.plain import strip
from saelab.lm.tokens import Tokens

_HEROES = [("fox", "she"), ("hen", "she"), ("cow", "she"), ("pig", "he"), ("cat", "he"), ("dog", "he")]
_PLACES = ["farm", "forest", "river", "market", "garden", "school"]
_THINGS = {"ball": "red", "apple": "green", "book": "new", "boat": "blue", "cake": "sweet", "lamp": "bright"}
_OPENINGS = ["Once there was a {hero} at the {place}.", "One day a {hero} went to the {place}."]
_FINDS = ["{He} saw a {thing}. The {thing} was {look}.", "{He} found a {look} {thing} at the {place}."]
_ENDINGS = [
    "The {hero} took the {thing} home and was happy.",
    "But {he} lost the {thing} at the {place} and was sad.",
    "Then {he} gave the {thing} to the {friend}, and the {friend} was happy.",
]


def make_stories(n: int, seed: int = 0) -> list[str]:
    """n very short stories from a few templates: animals, places and things, with pronouns and looks that agree.

    >>> from saelab.lm.teach import make_stories
    >>> len(make_stories(3)), make_stories(3) == make_stories(3, seed=0)
    (3, True)
    """
    draw = random.Random(seed)
    return [_story(draw) for _ in range(n)]


def _story(draw: random.Random) -> str:
    (hero, he), (friend, _) = draw.sample(_HEROES, 2)
    thing, look = draw.choice(list(_THINGS.items()))
    words = {"hero": hero, "friend": friend, "thing": thing, "look": look, "he": he, "He": he.capitalize()}
    template = " ".join(draw.choice(part) for part in (_OPENINGS, _FINDS, _ENDINGS))
    return template.format(place=draw.choice(_PLACES), **words)


def teach(
    model: Model,
    tokens: Tokens,
    *,
    n_steps: int = 600,
    batch_size: int = 16,
    lr: float = 5e-3,
    seed: int = 0,
    progress: bool = True,
) -> float:
    """Train a small language model on tokens, and return its loss over the last tenth, in nats per token.

    The one function that changes the model it is given, in place: Adam on `batch_size` random rows a step, the rate
    falling linearly to 0. Meant for `tiny_model`, whose activations mean nothing before. ValueError for padded rows.

    >>> from saelab.lm.teach import teach
    >>> model = sl.tiny_model(n_layers=1)
    >>> teach(model, sl.tokenize(model, ["abab" * 8] * 8, ctx_len=33), n_steps=3, progress=False) > 0
    True
    """
    if not bool(tokens.attention_mask.all()):
        raise ValueError("`tokens` must be full rows, got rows with padding; leave the last row out.")
    plain, _ = strip(model.original_model)
    optimiser = torch.optim.Adam(plain.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in tqdm(range(n_steps), desc="teach", unit=" steps", disable=not progress):
        optimiser.param_groups[0]["lr"] = lr * (1 - step / n_steps)
        rows = torch.randint(len(tokens), (batch_size,), generator=generator)
        ids = tokens.ids[rows].to(next(plain.parameters()).device, torch.long)
        logits = plain(ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return float(torch.stack(losses[-max(1, n_steps // 10) :]).mean())


def save_model(model: Model, folder: str | Path) -> None:
    """Write a model and its tokenizer as a Hugging Face folder, which `load_model` reads."""
    plain, _ = strip(model.original_model)
    for part in (plain, model.tokenizer):
        save: Any = part.save_pretrained
        save(folder)
