"""A text encoder steered by the features of a prompt (arXiv:2501.19066): do neighbors move, and what is lost?

    python scripts/measure_concept_steering.py --model FOLDER --text FILE --out concept_steering.json

Sentences of stories, embedded by a Hugging Face encoder in FOLDER (mean over tokens); those of the last tenth of
stories are held out, equal ones count once. An SAE is trained on the tokens' activations after a layer in the middle.
For each word its neighbors are asked for: `with` is the share of a query's 10 nearest among all other sentences that
hold the word, `near` the cosine of the steered query's embedding with its own without steering. Queries are held-out
sentences without the word for `added` (more is better), with it for `removed` (strengths below 0; less is better).

In the encoder, vectors are added at every token of the layer, at some times the token's own norm: all have the same
length. `prompt` is `sl.concept_vector` of the word; `less` takes "something" away, `k 4` keeps four features, `all
positive` those that top-k would cut too; `no SAE` is the activation of the prompt's tokens less the mean of all;
`feature` is the feature whose mean code rises most in sentences with the word; `means` the difference of activations'
means, `learned` is `sl.learn_direction` toward the mean embedding of sentences with the word, both from training
sentences; `random` is a random direction. On embeddings, as search edits them: the word's mean embedding, that less the
mean of all, the decoder row of the best feature of an SAE of embeddings, and a random direction, at unit length times
a weight. `at .8` is interpolated to where the cosine with the query as it was is .8.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import normalize

import saelab as sl
from objectives.embeddings import N_NEAREST, embed, read_sentences
from objectives.shared import format_table
from saelab.lm.module_inputs import make_inputs
from saelab.lm.text_encoders import make_pooled_encoder
from saelab.stores.files import write_json

WORDS = (
    "dog", "cat", "ball", "tree", "boat", "cake", "rain", "car", "bird", "flower", "water", "park", "book", "house",
    "bear", "fish", "bed", "box", "garden", "sun", "truck", "apple",
)  # fmt: skip
N_WORDS, N_QUERIES, LEAST = 6, 10, 8
D_SAE, K, K_EMBEDDING = 1536, 32, 16
STRENGTHS = (0.25, 0.5, 1.0, 2.0)
NEAR = 0.8
N_FOR_TOKENS, N_LEARNED = 3_000, 32


class Data(NamedTuple):
    texts: list[str]
    x: torch.Tensor
    held_out: np.ndarray
    has: dict[str, np.ndarray]


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face encoder")
    command.add_argument("--text", type=Path, required=True, help="stories that end with <|endoftext|>")
    command.add_argument("--embeddings", type=Path, default=Path("runs/retrieval/embeddings.npz"))
    command.add_argument("--layer", default="encoder.layer.3")
    command.add_argument("--n-sentences", type=int, default=10_000)
    command.add_argument("--n-tokens", type=int, default=200_000, help="to train each SAE on")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--out", type=Path, default=Path("concept_steering.json"))
    args = command.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoModel, AutoTokenizer

    data = read(args)
    encoder, tokenizer = AutoModel.from_pretrained(args.model).eval(), AutoTokenizer.from_pretrained(args.model)
    layer = Layer(encoder, tokenizer, args.layer, data)
    print(
        f"{len(data.texts):,} sentences, {int(data.held_out.sum()):,} held out, {len(layer.tokens):,} tokens to train "
        f"on; words {', '.join(data.has)}",
        flush=True,
    )
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"seeds": [], "rows": {}}
    for seed in [seed for seed in args.seeds if seed not in found["seeds"]]:
        for name, row in measure(layer, data, seed, args.n_tokens).items():
            found["rows"].setdefault(name, []).append(row)
        found["seeds"].append(seed)
        write_json(args.out, found)
        print(f"\nseeds {found['seeds']}\n{format_table(found['rows'])}", flush=True)


def read(args: argparse.Namespace) -> Data:
    """Distinct sentences, unit embeddings, and which hold which word."""
    texts, stories = read_sentences(args.text, args.n_sentences)
    if not args.embeddings.exists():
        args.embeddings.parent.mkdir(parents=True, exist_ok=True)
        np.savez(args.embeddings, **embed(texts, stories, args.model))
    found = np.load(args.embeddings)
    first = np.sort(np.unique(found["sentence_ids"], return_index=True)[1])
    docs = found["doc_ids"][first]
    held_out = docs >= docs[len(docs) * 9 // 10]
    kept = [texts[i] for i in first]
    has = {word: np.array([bool(re.search(rf"\b{word}s?\b", text.lower())) for text in kept]) for word in WORDS}
    enough = [word for word in WORDS if (has[word] & held_out).sum() >= LEAST][:N_WORDS]
    return Data(kept, normalize(torch.from_numpy(found["embeddings"])[first]), held_out, {w: has[w] for w in enough})


class Layer:
    """The encoder, and the activations of training sentences' tokens after one of its layers."""

    def __init__(self, encoder: Any, tokenizer: Any, name: str, data: Data) -> None:
        self.encoder, self.tokenizer, self.name = encoder, tokenizer, name
        self.module = encoder.get_submodule(name)
        self.pooled = make_pooled_encoder(encoder, "mean", tokenizer=tokenizer, batch_size=32)
        early = np.flatnonzero(~data.held_out)
        words = np.any([data.has[word] for word in data.has], axis=0)
        rest = np.random.default_rng(0).permutation(early[~words[early]])
        self.sentences = np.append(early[words[early]], rest)[:N_FOR_TOKENS]  # all with a word are among them
        self.sentences = self.sentences[np.argsort([len(data.texts[i]) for i in self.sentences], kind="stable")]
        parts, owners = [], []
        for start in range(0, len(self.sentences), 64):
            rows = self.sentences[start : start + 64]
            inputs = make_inputs(encoder, [data.texts[i] for i in rows], tokenizer)
            assert inputs.text is not None
            parts.append(inputs.capture(self.module)[inputs.text])
            owners.append(rows[inputs.text.nonzero()[:, 0].numpy()])
        self.tokens, self.owners = torch.cat(parts), np.concatenate(owners)
        self.learned: dict[str, torch.Tensor] = {}

    def embed(self, texts: list[str], vector: torch.Tensor, strength: float) -> torch.Tensor:
        with sl.steer_module(self.module, vector, strength, unit="norm"):
            return normalize(self.pooled.encode(texts))

    def read_prompt(self, text: str) -> torch.Tensor:
        inputs = make_inputs(self.encoder, text, self.tokenizer)
        return inputs.capture(self.module)[inputs.text].mean(0)

    def learn(self, word: str, data: Data) -> torch.Tensor:
        """Of training sentences without the word, toward the mean embedding of those with it; alike for all seeds."""
        if word not in self.learned:
            early = ~data.held_out
            rng = np.random.default_rng(0)
            rows = rng.choice(np.flatnonzero(early & ~data.has[word]), N_LEARNED, replace=False)
            target = data.x[torch.from_numpy(early & data.has[word])].mean(0).expand(N_LEARNED, -1)
            found = sl.learn_direction(
                self.encoder, [data.texts[i] for i in rows], target, at=self.name, tokenizer=self.tokenizer, n_steps=20,
                n_random=1, progress=False,
            )  # fmt: skip
            self.learned[word] = torch.from_numpy(found.vector)
        return self.learned[word]


def train(x: torch.Tensor, k: int, n_tokens: int, seed: int) -> sl.SAE:
    cfg = sl.SAEConfig(d_in=x.shape[1], d_sae=D_SAE, activation=sl.TopK(k=k))
    run = sl.TrainConfig(n_tokens=n_tokens, batch_size=256, n_held_out=0, seed=seed)
    return sl.SAE(cfg, seed=seed).fit(sl.Activations.from_tensor(x), run, progress=False)


def measure(layer: Layer, data: Data, seed: int, n_tokens: int) -> dict[str, dict[str, float]]:
    """Curves of each way of steering, averaged over words."""
    sae = train(layer.tokens, K, n_tokens, seed)
    of_embeddings = train(data.x[torch.from_numpy(~data.held_out)], K_EMBEDDING, n_tokens, seed)
    rng = np.random.default_rng(seed)
    added: dict[str, list[np.ndarray]] = {}
    removed: dict[str, list[np.ndarray]] = {}
    for i, word in enumerate(data.has):
        without, with_it = (np.flatnonzero(data.held_out & (data.has[word] == value)) for value in (False, True))
        ways = make_ways(layer, data, sae, of_embeddings, word, seed * len(data.has) + i)
        for table, pool, sign in ((added, without, 1.0), (removed, with_it, -1.0)):
            rows = rng.choice(pool, min(N_QUERIES, len(pool)), replace=False)
            for name, way in ways.items():
                curve = [score(data.x[rows], data, rows, word)]
                curve += [score(way(rows, sign * s), data, rows, word) for s in STRENGTHS]
                table.setdefault(name, []).append(np.array(curve))
        print(f"seed {seed}: {word}", flush=True)
    return {name: describe(np.mean(added[name], 0), np.mean(removed[name], 0)) for name in added}


def score(x: torch.Tensor, data: Data, rows: np.ndarray, word: str) -> tuple[float, float]:
    """Share of the nearest other sentences that hold the word, and cosine to the queries as they were."""
    scores = x @ data.x.T
    scores[torch.arange(len(rows)), torch.from_numpy(rows)] = -2
    hits = torch.from_numpy(data.has[word])[scores.topk(N_NEAREST).indices].float().mean()
    return float(hits), float((x * data.x[rows]).sum(1).mean())


def describe(added: np.ndarray, removed: np.ndarray) -> dict[str, float]:
    """Figures at each strength, and at the cosine NEAR; NaN where no strength gets so far."""

    def at_near(curve: np.ndarray) -> float:
        below = np.flatnonzero(curve[:, 1] <= NEAR)
        if not len(below):
            return float("nan")
        (a, x), (b, y) = curve[below[0] - 1], curve[below[0]]
        return float(a + (b - a) * (x - NEAR) / (x - y))

    told = {"added at .8": at_near(added), "removed at .8": at_near(removed)}
    for title, curve in (("added", added), ("removed", removed)):
        told[f"{title} 0"] = curve[0, 0]
        for s, (hits, near) in zip(STRENGTHS, curve[1:], strict=True):
            told |= {f"{title} {s:g}": hits, f"{title} near {s:g}": near}
    return {name: float(value) for name, value in told.items()}


@torch.no_grad()
def make_ways(
    layer: Layer, data: Data, sae: sl.SAE, of_embeddings: sl.SAE, word: str, draw: int
) -> dict[str, Callable[[np.ndarray, float], torch.Tensor]]:
    """What makes embeddings of sentences, by their numbers, at a strength."""
    how: dict[str, Any] = {"at": layer.name, "tokenizer": layer.tokenizer}
    has = torch.from_numpy(data.has[word][layer.owners])
    difference = layer.tokens[has].mean(0) - layer.tokens[~has].mean(0)
    rises = (sae.encode(layer.tokens[has]).mean(0) - sae.encode(layer.tokens[~has][::4]).mean(0)).topk(1).indices
    generator = torch.Generator().manual_seed(draw)
    with torch.enable_grad():
        learned = layer.learn(word, data)
    vectors = {
        "prompt": sl.concept_vector(sae, layer.encoder, word, **how).vector,
        "prompt, less": sl.concept_vector(sae, layer.encoder, word, less="something", **how).vector,
        "prompt, less, k 4": sl.concept_vector(sae, layer.encoder, word, less="something", k=4, **how).vector,
        "prompt, all positive": sl.concept_vector(sae, layer.encoder, word, k=sae.cfg.d_sae, **how).vector,
        "prompt, no SAE": layer.read_prompt(word) - layer.tokens.mean(0),
        "feature": sae.directions()[int(rises)],
        "means": difference,
        "learned": learned,
        "random": torch.randn(len(difference), generator=generator),
    }
    early = ~data.held_out
    mean = data.x[torch.from_numpy(early & data.has[word])].mean(0)
    codes = [
        of_embeddings.encode(data.x[torch.from_numpy(early & (data.has[word] == value))]) for value in (True, False)
    ]
    best = int((codes[0].mean(0) - codes[1].mean(0)).argmax())
    on_embeddings = {
        "embedding, word mean": mean,
        "embedding, means": mean - data.x[torch.from_numpy(early)].mean(0),
        "embedding, feature": of_embeddings.directions()[best],
        "embedding, random": torch.randn(len(mean), generator=generator),
    }

    def inside(vector: torch.Tensor) -> Callable[[np.ndarray, float], torch.Tensor]:
        return lambda rows, strength: layer.embed([data.texts[i] for i in rows], vector, strength)

    def outside(vector: torch.Tensor) -> Callable[[np.ndarray, float], torch.Tensor]:
        return lambda rows, strength: normalize(data.x[rows] + strength * normalize(vector, dim=0))

    ways = {name: inside(vector) for name, vector in vectors.items()}
    return ways | {name: outside(vector) for name, vector in on_embeddings.items()}


if __name__ == "__main__":
    main()
