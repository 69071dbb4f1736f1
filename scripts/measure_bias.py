"""Bias planted in the words of `tales`, found, taken out and looked for again; and attention heads as classifiers.

    python scripts/measure_bias.py --out bias.json

Half of the topics, drawn by the seed, are the girls' and half the boys'. Vectors of words are mean activations in the
residual stream, in front of the first block too, where no context has come in. In the biased text words of the girls'
topics are read in stories of a girl alone, and those of the boys' topics in stories of a boy; in the fair text in equal
numbers of both. Association tests compare their vectors with names, the subspace is that of pairs such as queen and
king ("words"); or with frequent words as they are read in girls' stories and in boys', and the subspace is that of
others of these ("contexts"). A probe of
which mood is the better one, fitted to words of moods, decides between names. The heads' task is the story's gender,
and the topic of its first paragraph.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import saelab as sl
from objectives.shared import FIRST_STORY, HOOK, format_table, tales_activations, train
from saelab.functional.metrics import exact
from saelab.stores.files import write_json
from saelab.synthetic import lexicon as lex
from saelab.synthetic.tales import FEMALE, MALE, Stories, generate_stories
from saelab.synthetic.vocabulary import VOCABULARY

PAIRS = [("queen", "king"), ("princess", "prince"), ("mother", "father"), ("sister", "brother"), ("aunt", "uncle")]
PAIRS += [("girl", "boy"), ("she", "he"), ("woman", "man")]
ATTRIBUTES = (lex.HEROES["girl"], lex.HEROES["boy"])
MIN_COUNT = 8
N_CONTEXTS = 40  # words that are read in both genders' stories
FIRST_TOKENS = 60  # of a story, which its first topic is in
Rows = dict[str, dict[str, float]]


def read_text(stories: Stories, hook: str, acts: Any) -> dict[str, np.ndarray]:
    """For each token its word, its vector, whether the story is a girl's, and its topic (-1: none)."""
    truth = stories.labels_at(acts.doc_ids, acts.positions)
    topics = [truth[f"topic {name}"].numpy() for name in lex.TOPICS]
    girl = np.zeros(len(stories), bool)
    girl[np.asarray(acts.doc_ids)[truth["story of a girl"].numpy()]] = True
    return {
        "x": exact(acts[:]).numpy(),
        "word": np.asarray(acts.token_ids),
        "girl": girl[np.asarray(acts.doc_ids)],
        "topic": np.where(np.any(topics, 0), np.argmax(topics, 0), -1),
    }


def mean_words(text: dict[str, np.ndarray], keep: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Mean vectors of words that occur often enough."""
    ids = text["word"][keep]
    counts = np.bincount(ids, minlength=len(VOCABULARY))
    sums = torch.zeros(len(VOCABULARY), text["x"].shape[1], dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(ids).long(), torch.from_numpy(text["x"][keep]))
    seen = np.flatnonzero(counts >= MIN_COUNT)
    return [VOCABULARY[i] for i in seen], sums.numpy()[seen] / counts[seen, None]


def list_words(halves: tuple[list[str], list[str]]) -> tuple[list[str], list[str]]:
    """Words of topics of one half alone."""
    both = []
    for half in halves:
        named = [lex.TOPICS[name] for name in half]
        both.append({word for one in named for part in one[:4] for word in part.split()})
    return sorted(both[0] - both[1]), sorted(both[1] - both[0])


def measure_bias(text: dict[str, np.ndarray], model: Any, tokens: sl.Tokens, hook: str, seed: int) -> Rows:
    """Association tests and edits for the biased text and the fair one."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(list(lex.TOPICS)).tolist()
    halves = (names[:5], names[5:])
    targets = list_words(halves)
    ids = [np.array([VOCABULARY.index(word) for word in words]) for words in targets]
    is_first, is_second = (np.isin(text["word"], some) for some in ids)
    target = is_first | is_second
    with_bias = ~target | (is_first & text["girl"]) | (is_second & ~text["girl"])
    fair = ~target | (rng.random(len(target)) < 0.5)  # as many, of both
    rows: Rows = {}
    for title, keep in (("biased", with_bias), ("fair", fair)):
        words, x = mean_words(text, keep)
        seen = [[w for w in some if w in words] for some in targets]
        named = [[w for w in some if w in words] for some in ATTRIBUTES]
        lists: dict[str, Any] = {"words": (words, x, named, [p for p in PAIRS if set(p) <= set(words)])}
        lists["contexts"] = read_contexts(text, keep & ~target, words, x)
        for definition, (known, vectors, attributes, pairs) in lists.items():
            place: dict[str, Any] = {}
            if title == "biased" and hook != "hook_embed":
                place = {"model": model, "tokens": tokens, "hook_point": hook}
            if hook == "hook_embed" and definition == "contexts":
                continue  # a word is the same in both
            sets = (tuple(seen), tuple(attributes), pairs)
            settings: dict[str, Any] = {"seed": seed, "n_permutations": 2000, **place}
            found = sl.probing.score_debiasing(vectors, known, *sets, **settings)
            print(f"\n{hook}, {title}, {definition}, seed {seed}\n{found}", flush=True)
            for row in found.rows:
                rows[f"{hook}, {definition}, {title}, {row.name}"] = {
                    "effect": float(np.mean(row.effects)),
                    "cosines": row.statistic,
                    "p": float(np.mean(row.p)),
                    "p attributes": float(np.mean(row.p_attributes)),
                    "kept": row.neighbors_kept,
                    "neighbors' bias": row.neighbor_bias,
                    "loss": row.loss - found.rows[0].loss,
                }
    return rows


def read_contexts(text: dict[str, np.ndarray], keep: np.ndarray, words: list[str], x: np.ndarray) -> tuple[Any, ...]:
    """The most frequent words without a gender in girls' stories and in boys': half are attributes, half are pairs."""
    both = [dict(zip(*mean_words(text, keep & (text["girl"] == side)), strict=True)) for side in (True, False)]
    own = {*FEMALE, *MALE, *ATTRIBUTES[0], *ATTRIBUTES[1]}
    counts = np.bincount(text["word"][keep], minlength=len(VOCABULARY))
    order = [VOCABULARY[i] for i in np.argsort(-counts, kind="stable")]
    shared = [w for w in order if w in both[0] and w in both[1] and w.lower() not in own and w not in own][:N_CONTEXTS]
    sides = [[f"{word} ({name})" for word in shared] for name in ("girl", "boy")]
    vectors = np.vstack([x, *([one[word] for word in shared] for one in both)])
    attributes = [side[::2] for side in sides]
    return [*words, *sides[0], *sides[1]], vectors, attributes, list(zip(sides[0][1::2], sides[1][1::2], strict=True))


def measure_preferences(text: dict[str, np.ndarray], hook: str, seed: int) -> Rows:
    """A probe of glad over sad words, on names (girls' first) and on poles that have nothing to do with moods."""
    words, x = mean_words(text, np.ones(len(text["word"]), bool))
    row = {word: i for i, word in enumerate(words)}
    moods = [[w for part in lex.MOODS[mood].values() for w in part.split() if w in row] for mood in ("glad", "sad")]
    pairs = [(row[a], row[b]) for a in moods[0] for b in moods[1]]
    girls, boys = ([row[w] for w in some if w in row] for some in ATTRIBUTES)
    poles = {name: axis.poles for name, axis in lex.AXES.items()}
    other = [(row[a], row[b]) for a, b in poles.values() if {a, b} <= row.keys()]
    transfer = {"girls' names over boys'": [(a, b) for a in girls for b in boys], "first poles over second": other}
    found = sl.probing.preference_probe(x, pairs, transfer, seed=seed)
    print(f"\n{hook}, seed {seed}\n{found}", flush=True)
    rows = {}
    for one in found.rows:
        figures = {"accuracy": one.accuracy, "turned": float(np.mean(one.flipped)), "p": one.p}
        rows[f"{hook}, {one.name}"] = figures
    return rows


def measure_heads(model: Any, stories: Stories, sae: sl.SAE, seed: int, shots: int) -> Rows:
    """Vote of heads beside the residual stream and codes, for two tasks."""
    tokens = stories.tokens()
    tokens = replace(tokens, ids=tokens.ids[:, :FIRST_TOKENS], doc_ids=tokens.doc_ids[:, :FIRST_TOKENS])
    ids = tokens.attention_mask.nonzero()[:, 0].numpy()
    labels = stories.labels_at(*tokens.attention_mask.nonzero(as_tuple=True))
    girl = np.zeros(len(stories), bool)
    girl[ids[labels["story of a girl"].numpy()]] = True
    first = np.full(len(stories), len(ids))
    topic = np.full(len(stories), "none", object)
    for name in lex.TOPICS:
        places = np.flatnonzero(labels[f"topic {name}"].numpy())
        start = np.full(len(stories), len(ids))
        np.minimum.at(start, ids[places], places)
        topic[start < first] = name
        first = np.minimum(first, start)
    rows = {}
    told = (topic != "none") & np.isin(topic, [name for name in lex.TOPICS if (topic == name).sum() > shots])
    for task, y in {"gender": np.where(girl, "girl", "boy"), "first topic": topic}.items():
        some = np.flatnonzero(told)
        chosen, names = tokens[some], [str(one) for one in y[some]]
        found = sl.circuits.classify_heads(model, chosen, names, shots, sae=sae, seed=seed)
        print(f"\n{task}, seed {seed}\n{found}", flush=True)
        for one in found.rows:
            figures = {"accuracy": float(np.mean(one.accuracy)), "shuffled": float(np.mean(one.shuffled))}
            rows[f"{task}, {one.name}"] = figures
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hooks", nargs="+", default=["hook_embed", HOOK])
    parser.add_argument("--n-stories", type=int, default=600, help="that vectors of words are means over")
    parser.add_argument("--n-loss", type=int, default=60, help="stories that losses are measured on")
    parser.add_argument("--n-texts", type=int, default=300, help="stories that heads classify")
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--n-tokens", type=int, default=100_000, help="to train the SAE of the heads' baseline on")
    parser.add_argument("--out", type=Path, help="everything as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sl.load_model("tales", progress=False)
    acts = tales_activations()
    tables: dict[str, dict[str, list[dict[str, float]]]] = {}

    def add(table: str, rows: Rows) -> None:
        for name, figures in rows.items():
            tables.setdefault(table, {}).setdefault(name, []).append(figures)

    for seed in args.seeds:
        first = FIRST_STORY + 20_000_000 + seed * 1_000_000  # unseen, others for each seed
        stories = generate_stories(args.n_stories, first=first)
        held = generate_stories(args.n_loss, first=first + args.n_stories).tokens()
        collected: Any = sl.collect(model, stories.tokens(), args.hooks, progress=False)
        for hook in args.hooks:
            text = read_text(stories, hook, collected[hook] if len(args.hooks) > 1 else collected)
            add("debiasing", measure_bias(text, model, held, hook, seed))
            add("preferences", measure_preferences(text, hook, seed))
        cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=1024, activation=sl.TopK(k=16))
        sae = train({"sae": cfg}, acts, seed, args.n_tokens)["sae"]
        texts = generate_stories(args.n_texts, first=first + args.n_stories + args.n_loss)
        add("heads", measure_heads(model, texts, sae, seed, args.shots))
        print(f"\nseeds so far: {args.seeds[: args.seeds.index(seed) + 1]}")
        for title, rows in tables.items():
            print(f"\n{title}\n{format_table(rows)}", flush=True)
        if args.out:
            write_json(args.out, tables)


if __name__ == "__main__":
    main()
