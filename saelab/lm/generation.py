"""`generate` and `stream_tokens`: continuations of prompts by sampling; and greedy chat answers.

A sample depends on its seed alone, not on cache, padding or the rest of its batch: every row has a generator of its
own.
"""

import codecs
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from tqdm.auto import tqdm

from saelab.lm.caching import place_columns
from saelab.lm.continuations import pad_rows
from saelab.lm.conversations import Conversation, Messages, Prompts
from saelab.lm.documents import list_prompts
from saelab.lm.hook_points import hook_points_of
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.model_checks import Model, find_context, find_row
from saelab.lm.tokenizers import find_ends, find_special_ids, read_text, token_bytes
from saelab.lm.tokens import tokenize
from saelab.lm.unwrapped import evaluating
from saelab.stores.corpus import name_bytes
from saelab.stores.jobs import hidden
from saelab.stores.results import Result

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How each token is drawn: from softmax(logits / temperature), cut to the most likely tokens.

    >>> SamplingConfig(temperature=0)  # greedy
    SamplingConfig(temperature=0, top_k=None, top_p=None)
    """

    temperature: float | int = 1.0
    """divisor of the logits, at least 0; 0 takes the most likely token"""
    top_k: int | None = None
    """sample only from the k most likely tokens; None is all"""
    top_p: float | None = None
    """sample only from the smallest set of most likely tokens whose probabilities sum to at least p, in (0, 1]; None is
    all
    """

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be finite and at least 0, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {self.top_k}; use None for all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}.")


SAMPLING = SamplingConfig()
"""from the model's own distribution"""
GREEDY = SamplingConfig(temperature=0)
"""always the most likely token"""
COLDEST = 1e-12
"""Temperature below which the most likely token is taken: noise no longer decides, and logits would overflow."""


@dataclass(frozen=True, eq=False)
class Sampler:
    """Samples the next token of each row of a batch.

    Row i draws with `generators[i]` alone, the same number of times at every step, so that its sample does not depend
    on the rest of the batch, and two models sampled with the same seeds use the same noise.
    """

    cfg: SamplingConfig
    generators: Sequence[Generator]
    """one generator per row; its state advances with each call"""

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, "batch"]:
        """(batch,) token ids, one per row."""
        if self.cfg.temperature < COLDEST:
            return logits.argmax(1)
        kept = self._cut(logits / self.cfg.temperature)
        waits = torch.empty_like(kept)
        for row, generator in zip(waits, self.generators, strict=True):
            row.exponential_(generator=generator)
        # Exponential race: among exponential times with rates p, the minimum is at i with probability p_i.
        return (kept - waits.log()).argmax(1)

    def _cut(self, logits: Tensor) -> Tensor:
        """Logits with -inf for tokens that top-k and top-p exclude."""
        top_k, top_p = self.cfg.top_k, self.cfg.top_p
        if top_k is not None and top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(top_k, 1).values[:, -1:], -torch.inf)
        if top_p is not None and top_p < 1:
            ordered, order = logits.sort(dim=1, descending=True, stable=True)
            before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)  # probability of all more likely tokens
            excluded = before >= top_p
            excluded[:, 0] = False  # the most likely token stays, even where float32 rounds top_p to 0
            ordered = ordered.masked_fill(excluded, -torch.inf)
            logits = logits.scatter(1, order, ordered)
        return logits


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One continuation of a prompt."""

    prompt: str
    """the prompt as text"""
    text: str
    """generated text, without special tokens"""
    prompt_ids: tuple[int, ...]
    """token ids of the prompt, BOS included"""
    ids: tuple[int, ...]
    """generated token ids; they end with an end-of-text token where the model produced one"""
    log_probs: tuple[float, ...]
    """log-probability of each generated token under the model that generated it, edits included, in nats, at
    temperature 1
    """

    @property
    def all_ids(self) -> tuple[int, ...]:
        """Token ids of prompt and continuation."""
        return self.prompt_ids + self.ids


@dataclass(frozen=True, kw_only=True)
class Generation(Result):
    """Continuations from one call of `generate`, `n` for each prompt, in the order of the prompts."""

    samples: tuple[Generated, ...]
    """the continuations"""
    temperature: float
    """temperature they were sampled at"""
    seed: int
    """seed they were sampled with"""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Generated:
        return self.samples[i]

    def __iter__(self) -> Iterator[Generated]:
        return iter(self.samples)

    @property
    def texts(self) -> tuple[str, ...]:
        """Text of each prompt with its continuation."""
        return tuple(sample.prompt + sample.text for sample in self.samples)

    @property
    def n_tokens(self) -> int:
        """Number of generated tokens."""
        return sum(len(sample.ids) for sample in self.samples)

    def __str__(self) -> str:
        return "\n".join(f"[{i}] {text}" for i, text in enumerate(self.texts))


@torch.no_grad()
def generate(
    model: AnyModel,
    prompts: Prompts | Int[Tensor, "n_prompts n"],
    n_tokens: int = 50,
    *,
    n: int = 1,
    seed: int = 0,
    sampling: SamplingConfig = SAMPLING,
    bos: bool | None = True,
    stop_at_eos: bool = True,
    use_cache: bool = True,
    batch_size: int = BATCH,
    on_token: "Callable[[int, StreamedToken], None] | None" = None,
    progress: bool = True,
) -> Generation:
    """Sampled continuations of prompts, `n` for each, up to `n_tokens` tokens each; edits of `splice` and `steer`
    apply.

    Sample i of prompt p depends on `seed`, p and i alone, not on the other rows of its batch, nor on the cache. Prompts
    of unequal length are padded on the left. Cache and padding are used where they were measured not to change the
    model's logits; otherwise whole texts are run again at each step, and only rows of one length are batched, which is
    slower but gives the same text.

    Args:
        model: the language model.
        prompts: text or texts, a conversation or several, which the assistant continues (lists of messages such as
            {"role": "user", "content": "Hello"}), or rows of token ids, which are used as they are.
        n_tokens: largest number of tokens to generate per sample.
        n: number of samples per prompt.
        seed: seed of the samples.
        sampling: temperature, top-k and top-p; by default the model's own distribution.
        bos: whether BOS is put before each text; None does as the tokenizer by itself.
        stop_at_eos: whether a sample ends at an end-of-text token.
        use_cache: whether to use a key-value cache where it is correct.
        batch_size: samples per batch.
        on_token: called with the number of a sample and each of its tokens as it is drawn; samples are then drawn one
            after the other.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for an empty prompt, for texts that do not fit the model's context, and for sizes below 1.

    >>> made = sl.generate(sl.lm.tiny_model(), ["One", "Two, three"], 4, n=2, seed=1)
    >>> len(made), made.n_tokens
    (4, 16)
    """
    model = as_model(model)
    if n < 1 or n_tokens < 1 or batch_size < 1:
        raise ValueError(f"`n`, `n_tokens` and `batch_size` must be at least 1, got {n}, {n_tokens} and {batch_size}.")
    rows, texts = _read_prompts(model, prompts, bos)
    _require_room(model, rows, n_tokens)
    jobs = [(p, i) for p in range(len(rows)) for i in range(n)]
    made: dict[tuple[int, int], Generated] = {}
    ends = find_ends(model) if stop_at_eos else frozenset()
    bar = tqdm(total=len(jobs) * n_tokens, unit="token", desc="generate", delay=2, disable=hidden(progress))
    with bar:
        for batch in _find_batches(model, jobs, rows, n_tokens, batch_size if on_token is None else 1):
            generators = [_seed(seed, p, i) for p, i in batch]
            sampler = Sampler(sampling, generators)
            run = _Run(model, [rows[p] for p, _ in batch], n_tokens, sampler, use_cache)
            tell = None if on_token is None else _tell(model, on_token, batch[0][0] * n + batch[0][1])
            for (p, i), (ids, log_probs) in zip(batch, run.go(ends, bar, tell), strict=True):
                made[p, i] = _read_sample(model, texts[p], rows[p], ids, log_probs)
    samples = [made[job] for job in jobs]
    return Generation(samples=tuple(samples), temperature=float(sampling.temperature), seed=seed)


def _tell(model: Model, on_token: "Callable[[int, StreamedToken], None]", number: int) -> Callable[[int, float], None]:
    """What tells of the tokens of one sample."""
    text = _TextReader(model)
    return lambda token, log_prob: on_token(number, StreamedToken(token, text.read(token), log_prob))


def _read_prompts(model: Model, prompts: Prompts | Tensor, bos: bool | None) -> tuple[list[Tensor], list[str]]:
    """Token ids and text of each prompt."""
    tokenizer: Any = model.tokenizer
    if isinstance(prompts, Tensor):
        rows = [row.long().cpu() for row in prompts]
        texts = [read_text(model, row.tolist()) if tokenizer else "" for row in rows]
        return rows, texts
    given = list_prompts(prompts)
    if other := [one for one in given if not isinstance(one, str | Conversation)]:
        advice = "Give token ids alone, as a tensor (n_prompts, n)."
        raise TypeError(f"Prompts must be texts or conversations, got {type(other[0]).__name__}. {advice}")
    texts = [one.write(tokenizer, reply=True) if isinstance(one, Conversation) else one for one in given]
    if bad := [i for i, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"A prompt must hold text, prompt {bad[0]} is blank; to start from BOS alone give its id.")
    rows = []
    for one, text in zip(given, texts, strict=True):
        if isinstance(one, Conversation):
            rows.append(torch.tensor(one.encode(tokenizer, reply=True)))
            continue
        tokens = tokenize(model, [text], find_row(model, text), packed=False, bos=bos, separator=None)
        rows.append(tokens.ids[0, : tokens.n_tokens].long())
    return rows, texts


def _require_room(model: Model, rows: list[Tensor], n_tokens: int) -> None:
    longest = max((len(row) for row in rows), default=0)
    if longest == 0 or min(len(row) for row in rows) == 0:
        raise ValueError("`prompts` must hold at least one prompt of at least one token, got an empty one.")
    if longest + n_tokens > find_context(model):
        raise ValueError(
            f"Prompt and text must fit the model's context of {find_context(model)} tokens, got {longest} + "
            f"{n_tokens}. Shorten the prompt or lower `n_tokens`."
        )


def _find_batches(
    model: Model, jobs: Sequence[tuple[int, int]], rows: Sequence[Tensor], n_tokens: int, batch_size: int
) -> Iterator[list[tuple[int, int]]]:
    """The jobs in batches; prompts of different lengths are kept apart where padding would change their logits."""
    home = hook_points_of(model)
    if home.caching.pads(home.running, max(len(rows[p]) for p, _ in jobs) + n_tokens):
        groups = [list(jobs)]
    else:
        lengths = sorted({len(rows[p]) for p, _ in jobs})
        groups = [[(p, i) for p, i in jobs if len(rows[p]) == length] for length in lengths]
    for group in groups:
        yield from (group[first : first + batch_size] for first in range(0, len(group), batch_size))


def _seed(*parts: int) -> torch.Generator:
    if min(parts) < 0:
        raise ValueError(f"`seed` must be at least 0, got {min(parts)}. Give another one.")
    state = np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _read_sample(model: Model, text: str, prompt: Tensor, ids: list[int], log_probs: list[float]) -> Generated:
    tokenizer: Any = model.tokenizer
    made = ""
    if tokenizer is not None:
        # Decoded together with the prompt: whether a tokenizer puts a space before a word depends on what precedes it.
        made = read_text(model, [*prompt.tolist(), *ids])[len(read_text(model, prompt.tolist())) :]
    return Generated(
        prompt=text, text=made, prompt_ids=tuple(prompt.tolist()), ids=tuple(ids), log_probs=tuple(log_probs)
    )


class _Run:
    """Generation of one batch: rows padded on the left, one forward pass per token."""

    def __init__(self, model: Model, rows: list[Tensor], n_tokens: int, sampler: Sampler, use_cache: bool) -> None:
        home = hook_points_of(model)
        self.module = home.running
        self.device = next(self.module.parameters()).device
        ids, real = pad_rows([row.tolist() for row in rows], left=True)
        self.ids, self.real = ids.to(self.device), real.to(self.device)
        self.n_tokens, self.sampler, self.caching = n_tokens, sampler, home.caching
        self.use_cache = use_cache and self.caching.keeps(self.module, ids.shape[1], n_tokens)
        self.before: Any = None  # output of the previous step, where its cache is used

    def go(
        self, ends: frozenset[int], bar: Any, tell: Callable[[int, float], None] | None
    ) -> list[tuple[list[int], list[float]]]:
        """Generated ids and log-probabilities of each row; a token is told of as it is drawn."""
        found: list[tuple[list[int], list[float]]] = [([], []) for _ in self.ids]
        for drawn in self.steps(ends):
            for row, token, log_prob in drawn:
                found[row][0].append(token)
                found[row][1].append(log_prob)
                if tell is not None:
                    tell(token, log_prob)
            bar.update(len(found))
        return found

    def steps(self, ends: frozenset[int]) -> Iterator[list[tuple[int, int, float]]]:
        """Step by step, row, new token and its log-probability of each row that has not ended before."""
        open_rows = set(range(len(self.ids)))
        for _ in range(self.n_tokens):
            logits = self.step()
            chosen = self.sampler(logits)
            tokens, log_probs = chosen.tolist(), logits.log_softmax(1).gather(1, chosen[:, None])[:, 0].tolist()
            yield [(row, tokens[row], log_probs[row]) for row in sorted(open_rows)]
            open_rows -= {row for row in open_rows if tokens[row] in ends}
            if not open_rows:
                return
            self.ids = torch.cat([self.ids, chosen[:, None].to(self.device)], 1)
            self.real = torch.cat([self.real, torch.ones_like(self.real[:, :1])], 1)

    def step(self) -> Float[Tensor, "batch d_vocab"]:
        """Logits after the last token, float32 on the CPU."""
        n = self.ids.shape[1]
        begin = 0 if self.before is None else n - 1
        more = self.caching.go_on(self.before, self.real, begin, n) if begin else place_columns(self.real, 0, n)
        with torch.no_grad(), evaluating(self.module):
            out = self.module(self.ids[:, begin:], use_cache=self.use_cache, **more)
        if self.use_cache:
            self.before = out
        last: Tensor = out.logits[:, -1].float().cpu()
        return last


@dataclass(frozen=True)
class StreamedToken:
    """One generated token."""

    id: int
    text: str
    """the characters that are whole with this token; empty inside a character and for special tokens"""
    log_prob: float
    """log-probability under the model that generated it, edits included, in nats, at temperature 1"""


class _TextReader:
    """The characters of tokens that come one by one."""

    def __init__(self, model: Model) -> None:
        self._tokenizer: Any = model.tokenizer
        self._special = frozenset(find_special_ids(model) if model.tokenizer is not None else ())
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._bytes: dict[int, bytes] = {}

    def read(self, token: int) -> str:
        """The characters that are whole with this token; bytes of no character are written as <0xE4>."""
        if self._tokenizer is None or token in self._special:
            return ""
        if token not in self._bytes:
            self._bytes |= token_bytes(self._tokenizer, [token])
        made = self._decoder.decode(self._bytes[token])
        return name_bytes(made.encode("utf-8", "surrogateescape"))


class TokenStream(Iterator[StreamedToken]):
    """The tokens of one continuation, each drawn when it is asked for, as `stream_tokens` returns them.

    Edits of `splice` and `steer` apply to a token where they are in force when it is drawn. `close`, and the end of the
    text, release the key-value cache.

    Args:
        model: the language model.
        prompt: the text that is continued, as the sample has it.
        run: the forward passes over its tokens.
        ends: ids of tokens that end the text.
    """

    def __init__(self, model: AnyModel, prompt: str, run: "_Run", ends: frozenset[int]) -> None:
        model = as_model(model)
        self._model, self._prompt, self._steps = model, prompt, run.steps(ends)
        self._prompt_ids = run.ids[0].cpu()
        self._text = _TextReader(model)
        self._ids: list[int] = []
        self._log_probs: list[float] = []

    def __next__(self) -> StreamedToken:
        [(_, token, log_prob)] = next(self._steps)
        self._ids.append(token)
        self._log_probs.append(log_prob)
        return StreamedToken(token, self._text.read(token), log_prob)

    def close(self) -> None:
        """Draw no more tokens, and release the cache; the sample so far remains."""
        self._steps.close()  # type: ignore[attr-defined]  # a generator

    @property
    def sample(self) -> Generated:
        """The tokens drawn so far as one continuation."""
        return _read_sample(self._model, self._prompt, self._prompt_ids, self._ids, self._log_probs)


def stream_tokens(
    model: AnyModel,
    prompt: str | Messages | Conversation | Int[Tensor, "n"],
    n_tokens: int = 50,
    *,
    seed: int = 0,
    sampling: SamplingConfig = SAMPLING,
    bos: bool | None = True,
    stop_at_eos: bool = True,
    use_cache: bool = True,
) -> TokenStream:
    """The tokens that `generate` draws for one prompt with the same arguments, bit for bit, one by one.

    Args:
        model: the language model.
        prompt: one text or conversation, or one row of token ids, which is used as it is.
        n_tokens: largest number of tokens to generate.
        seed: seed of the sample.
        sampling: temperature, top-k and top-p; by default the model's own distribution.
        bos: whether BOS is put before the text; None does as the tokenizer by itself.
        stop_at_eos: whether the sample ends at an end-of-text token.
        use_cache: whether to use a key-value cache where it is correct.

    Raises:
        ValueError: at once, as `generate`.

    >>> model = sl.lm.tiny_model()
    >>> drawn = [token.id for token in sl.lm.stream_tokens(model, "One", 4)]
    >>> drawn == list(sl.generate(model, "One", 4)[0].ids)
    True
    """
    model = as_model(model)
    if n_tokens < 1:
        raise ValueError(f"`n_tokens` must be at least 1, got {n_tokens}.")
    rows, texts = _read_prompts(model, prompt[None] if isinstance(prompt, Tensor) else prompt, bos)
    _require_room(model, rows, n_tokens)
    if len(rows) != 1:
        raise ValueError(f"A stream must continue one prompt, got {len(rows)}. Use `generate` for several.")
    run = _Run(model, rows, n_tokens, Sampler(sampling, [_seed(seed, 0, 0)]), use_cache)
    return TokenStream(model, texts[0], run, find_ends(model) if stop_at_eos else frozenset())


def answer(model: Model, messages: Sequence[Mapping[str, str]], n_tokens: int) -> tuple[str, int, int, bool]:
    """Greedy answer to a conversation, the numbers of tokens of prompt and answer, and whether the model ended it.

    The prompt is made with the tokenizer's chat template where it has one, else the messages are joined as plain text.
    ValueError where prompt and answer do not fit the model's context.

    >>> text, n_in, n_out, is_whole = answer(sl.lm.tiny_model(), [{"role": "user", "content": "Hi"}], 3)
    >>> n_in, n_out, is_whole
    (4, 3, False)
    """
    ids = _encode(model.tokenizer, messages)
    if ids.shape[1] + n_tokens > find_context(model):
        raise ValueError(
            f"A prompt must fit the model's context of {find_context(model)} tokens with {n_tokens} of the answer, "
            f"got {ids.shape[1]} tokens. Show fewer or shorter texts, or take another model."
        )
    made = generate(model, ids, n_tokens, sampling=GREEDY, progress=False).samples[0]
    is_whole = len(made.ids) < n_tokens or int(made.ids[-1]) in find_ends(model)
    return read_text(model, made.ids), ids.shape[1], len(made.ids), is_whole


def _encode(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> torch.Tensor:
    if tokenizer.chat_template:
        ids = Conversation(tuple(dict(message) for message in messages)).encode(tokenizer, reply=True)
    else:
        ids = tokenizer("\n\n".join(message["content"] for message in messages) + "\n")["input_ids"]
    return torch.tensor([ids])
