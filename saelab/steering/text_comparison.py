"""`compare_generations`: generated texts with and without steering, side by side, with log-probabilities by token."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.functional.metrics import kl_divergence
from saelab.interventions.interventions import Intervention
from saelab.interventions.steering_hooks import steer_all
from saelab.lm.continuations import Continuations, read_continuations
from saelab.lm.conversations import Prompts
from saelab.lm.generation import SAMPLING, Generated, Generation, SamplingConfig, StreamedToken, generate
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model
from saelab.lm.tokenizers import spell
from saelab.steering.dose_response import describe_intervention
from saelab.stores.results import Result

BATCH = 16
UNSTEERED = "unsteered"


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """A generated text, token by token."""

    text: str
    words: tuple[str, ...]
    """text of each token; a character made of several tokens is at the first of them, the others are \"\""""
    log_probs: dict[str, tuple[float, ...]]
    """log-probability of each token, in nats at temperature 1, by the model that scores it: `unsteered`, and the
    steered model that generated the text; for an unsteered text every steered model"""

    def perplexity(self, reader: str = UNSTEERED) -> float:
        """`exp(-mean log p)` under the model named `reader`."""
        return float(np.exp(-np.mean(self.log_probs[reader])))


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """The continuations of one prompt, unsteered and steered, sampled with the same seed."""

    prompt: str
    unsteered: ScoredText
    """the text without steering"""
    steered: dict[str, ScoredText]
    """the steered texts, by intervention"""
    kl: dict[str, float]
    """mean KL(p || p') over the predictions of the unsteered text, in nats, by steered model"""


@dataclass(frozen=True, kw_only=True, repr=False)
class GenerationComparison(Result):
    """Result of `compare_generations`: texts without steering and under each intervention."""

    rows: tuple[TextRow, ...]
    """one for each prompt and sample"""
    interventions: dict[str, str]
    """what each does, in a line"""
    temperature: float
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"GenerationComparison({len(self)} texts, unsteered and {', '.join(self.interventions)})"

    @property
    def title(self) -> str:
        """Interventions, temperature and seed in one line."""
        described = "; ".join(f"{name}: {what}" for name, what in self.interventions.items())
        return f"{described}; temperature {self.temperature:g}, seed {self.seed}"

    def format_cost(self, row: TextRow, name: str) -> str:
        """One line of text: perplexity of a steered text under both models, and its KL.

        `row` is the prompt's row and `name` the intervention.
        """
        text = row.steered[name]
        return (
            f"perplexity {text.perplexity():.3g} to the unsteered model, {text.perplexity(name):.3g} to its own, "
            f"KL {row.kl[name]:.3g}"
        )

    def format_rows(self, texts: bool = True) -> str:
        """Perplexities and KL of each text as lines; `texts` is whether these stand below."""
        lines = [self.title]
        for row in self.rows:
            lines += ["", row.prompt, f"  {UNSTEERED} (perplexity {row.unsteered.perplexity():.3g})"]
            lines += [f"    {row.unsteered.text.strip()}"] * texts
            for name, text in row.steered.items():
                lines.append(f"  {name} ({self.format_cost(row, name)})")
                lines += [f"    {text.text.strip()}"] * texts
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.format_rows()


@torch.no_grad()
def compare_generations(
    model: AnyModel,
    interventions: Intervention | Sequence[Intervention] | Mapping[str, Intervention | Sequence[Intervention]],
    prompts: Prompts,
    n_tokens: int = 50,
    *,
    n: int = 1,
    seed: int = 0,
    sampling: SamplingConfig = SAMPLING,
    bos: bool | None = True,
    on_token: Callable[[str, int, StreamedToken], None] | None = None,
    progress: bool = True,
) -> GenerationComparison:
    """Texts with and without steering, sampled with the same seed and scored under both models.

    Args:
        model: language model.
        interventions: one or several applied together; or a mapping, whose names each give texts of their own, such as
            one for each sign.
        prompts: one or several texts or conversations to continue.
        n_tokens: most tokens generated for each text.
        n: texts for each prompt.
        seed: seed of the sampling; the same for all texts compared.
        sampling: temperature, top-k and top-p, as in `generate`.
        bos: put a BOS before each prompt, as in `generate`.
        on_token: called with "unsteered" or the name of an intervention, the number of the text and each of its tokens
            as it is drawn; texts are then drawn one after the other.
        progress: show progress bars.

    Raises:
        ValueError: for an intervention named 'unsteered', and for what `generate` and `steer` refuse.

    >>> model, up = sl.lm.tiny_model(), sl.Direction(torch.ones(32), "blocks.1.hook_resid_post")
    >>> texts = compare_generations(model, sl.Intervention(up, 0.0), "One", 4)
    >>> texts.rows[0].kl, texts.rows[0].steered["steered"].text == texts.rows[0].unsteered.text
    ({'steered': 0.0}, True)
    """
    model = as_model(model)
    named = interventions if isinstance(interventions, Mapping) else {"steered": interventions}
    blocks = {name: [one] if isinstance(one, Intervention) else list(one) for name, one in named.items()}
    if not blocks or UNSTEERED in blocks:
        raise ValueError(f"`interventions` must have names other than '{UNSTEERED}', got {list(blocks)}.")

    def write(name: str) -> Generation:
        tell = None if on_token is None else partial(on_token, name)
        how: dict[str, Any] = {"n": n, "seed": seed, "sampling": sampling, "bos": bos, "progress": progress}
        return generate(model, prompts, n_tokens, on_token=tell, **how)

    plain, made = write(UNSTEERED), {}
    for name, block in blocks.items():
        with steer_all(model, block):
            made[name] = SteeredTexts(partial(steer_all, model, block), write(name).samples)
    described = {name: "; ".join(map(describe_intervention, block)) for name, block in blocks.items()}
    return GenerationComparison(
        rows=score_texts(model, plain.samples, made),
        interventions=described,
        temperature=float(sampling.temperature),
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class SteeredTexts:
    """Texts of one steered model."""

    steered: Callable[[], AbstractContextManager[Any]]
    """enters the context in which they were generated"""
    samples: Sequence[Generated]
    """one for each unsteered text"""


@torch.no_grad()
def score_texts(model: Model, plain: Sequence[Generated], steered: Mapping[str, SteeredTexts]) -> tuple[TextRow, ...]:
    """Texts with and without steering, each scored under its own and the other model.

    Args:
        model: language model, without edits.
        plain: the texts without steering.
        steered: the texts of each steered model by name, none of them "unsteered".
    """
    rows = _TextRows(model, plain)
    for name, made in steered.items():
        rows.add(name, made)
    return rows.read()


class _TextRows:
    """Generated texts and the log-probabilities of their tokens, collected model by model."""

    def __init__(self, model: Model, plain: Sequence[Generated]) -> None:
        self.model, self.plain = model, plain
        self.steered: dict[str, Sequence[Generated]] = {}
        self.log_probs: dict[tuple[str, str], list[tuple[float, ...]]] = {}
        """by writer and reader"""
        self.kl: dict[str, list[float]] = {}

    def add(self, name: str, texts: SteeredTexts) -> None:
        """Score both texts under both models, a batch at a time."""
        made = texts.samples
        self.steered[name], self.kl[name] = made, []
        for first in range(0, len(made), BATCH):
            part = slice(first, first + BATCH)
            before = [_read(self.model, written[part]) for written in (self.plain, made)]
            with texts.steered():
                after = [_read(self.model, written[part]) for written in (self.plain, made)]
            for writer, (p, q) in zip((UNSTEERED, name), zip(before, after, strict=True), strict=True):
                self._keep(writer, UNSTEERED, p, is_first=first == 0)
                self._keep(writer, name, q, is_first=first == 0)
            self.kl[name] += _find_kl(before[0], after[0])

    def _keep(self, writer: str, reader: str, found: Continuations, is_first: bool) -> None:
        log_probs = found.logits.float().log_softmax(-1).gather(2, found.ids[..., None])[..., 0]
        rows = [tuple(row[kept].tolist()) for row, kept in zip(log_probs, found.mask, strict=True)]
        self.log_probs[writer, reader] = rows if is_first else self.log_probs[writer, reader] + rows

    def read(self) -> tuple[TextRow, ...]:
        """A row for each unsteered text."""
        return tuple(
            TextRow(
                prompt=plain.prompt,
                unsteered=self._texttext(UNSTEERED, plain, i),
                steered={name: self._texttext(name, made[i], i) for name, made in self.steered.items()},
                kl={name: values[i] for name, values in self.kl.items()},
            )
            for i, plain in enumerate(self.plain)
        )

    def _texttext(self, writer: str, sample: Generated, i: int) -> ScoredText:
        mine = {reader: rows[i] for (by, reader), rows in self.log_probs.items() if by == writer}
        return ScoredText(text=sample.text, words=_spell(self.model, sample), log_probs=mine)


def _read(model: Model, batch: Sequence[Generated]) -> Continuations:
    return read_continuations(model, [sample.prompt_ids for sample in batch], [sample.ids for sample in batch])


def _find_kl(p: Continuations, q: Continuations) -> list[float]:
    def mean(row: int) -> float:
        kept: Tensor = p.mask[row]
        return float(kl_divergence(p.logits[row, kept], q.logits[row, kept]).mean())

    return [mean(row) for row in range(len(p.mask))]


def _spell(model: Model, sample: Generated) -> tuple[str, ...]:
    """Text of each generated token after the prompt."""
    if model.tokenizer is None:
        return tuple(f"<{i}>" for i in sample.ids)
    return spell(model.tokenizer, sample.all_ids).words[len(sample.prompt_ids) :]
