"""What do graphs without a patch, attention scores and overlaps of heads find (arXiv:2402.12201, arXiv:2408.09503)?

    python scripts/measure_circuits.py giver --seeds 0 1 2      the name task of tales
    python scripts/measure_circuits.py othello --seeds 0 1 2    scores and flipped discs of `othello`
    python scripts/measure_circuits.py heads --seeds 0 1 2      heads that work together, in four models

giver: dictionaries are transcoders of MLPs, or SAEs of what attention and MLPs write (gates frozen), of all blocks;
each trained, of one step, and untrained. What SAEs lose is split by giving transcoders SAEs of attention beside them,
and SAEs to MLPs alone.
    graph / model  what the answer's logit less the other person's loses without the giver's name, along all paths of
                   the graph, over that in the model, patterns and scales held: ratio of the means over prompts
    r              the same two, correlated over prompts
    reached        share of prompts where `follow(.2)` and `follow(.8)` from the answer reach the giver's name; others:
                   share of the other tokens of the prompt that they reach; nodes
    rank           of the giver's name among the tokens by the size of the effect
    score: the head that looks most from the end to the giver, against the key that it looks at next: share of the
    difference that pairs with an error on either side have (by magnitude); 80 %: pairs that carry 80 % of it

othello: SAEs of what attention and MLP of blocks 0 to 2 write.
    concepts       with a feature of F1 above .7: move, mine, yours, empty, flipped
    parity         heads that look at moves of one player. Scores of the move two before against the move one before:
                   correlation of what a pair gives with whether its two features prefer one player's moves, and the
                   same with the features' preferences permuted
    flipped        features of an MLP that tell a flipped square: share of positive contributions by kind of source;
                   of those of features, share from features of the same square, and with the squares permuted

heads: subspaces of 8 directions; z of the overlap of the pair of heads that looks most some tokens back and most at
what came as many tokens after the same token, on random tokens that are repeated, and its rank among all pairs; rho of
such looks and the overlap; share of pairs above what 5 % of random subspaces have, and the same in the same model with
random weights.
"""

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import saelab as sl
from measure_paths import UNSEEN, train as train_on_othello
from objectives.shared import FIRST_STORY, format_table
from saelab.circuits.frozen_model import FrozenModel
from saelab.circuits.graph import AttributionGraph
from saelab.evaluation import encode_csr, score_concepts
from saelab.functional.statistics import correlation, rank_correlation
from saelab.lm.hook_points import hook_points_of
from saelab.lm.token_labels import Concept, TokenLabels
from saelab.lm.tokenizers import SpecialWords, word_tokenizer
from saelab.lm.unwrapped import set_attention
from saelab.sae.initialization import make_untrained
from saelab.stores.files import write_json
from saelab.synthetic.othello import FLIPPED, SQUARES, generate_games
from saelab.synthetic.tales import generate_stories
from saelab.synthetic.tasks import name_edits

KEPT = Path("runs/circuits")
SIZE: dict[str, Any] = {"d_sae": 1024, "activation": sl.TopK(k=16)}
MIN_F1 = 0.7
Row = dict[str, float]
Coders = dict[Any, sl.SAE]


@torch.no_grad()
def read_patterns(model: Any, ids: Tensor) -> Tensor:
    """(n_layers, batch, n_heads, n, n) attention, by Hugging Face's eager attention."""
    twin = copy.deepcopy(hook_points_of(model).plain)
    assert twin is not None
    set_attention(twin, "eager")
    return torch.stack(twin(ids, output_attentions=True, use_cache=False).attentions)


# ---- tales
def train_tales(model: Any, seed: int, n_tokens: int) -> dict[str, Coders]:
    """Dictionaries by kind; those that were trained before are read."""
    layers, width = range(model.cfg.n_layers), model.cfg.d_model
    transcoders = [(f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out") for i in layers]
    places: dict[str, list] = {
        "transcoders": transcoders,
        "SAEs": [f"blocks.{i}.hook_{part}_out" for i in layers for part in ("attn", "mlp")],
    }
    names = list(dict.fromkeys([name for pair in transcoders for name in pair] + places["SAEs"]))
    tokens = generate_stories(300_000 // 155, first=FIRST_STORY).tokens()
    acts = sl.collect(model, tokens, names, KEPT / "acts", dtype=torch.float16, progress=False)
    found: dict[str, Coders] = {}
    for kind, of_kind in places.items():
        for how, n in (("trained", n_tokens), ("one step", 1024)):
            for place in of_kind:
                folder = KEPT / f"{kind}-{how}-{n}-{seed}".replace(" ", "-") / str(of_kind.index(place))
                if not folder.is_dir():
                    pair = tuple(acts[name] for name in place) if isinstance(place, tuple) else acts[place]
                    cfg = sl.SAEConfig(d_in=width, d_out=width if isinstance(place, tuple) else None, **SIZE)
                    run = sl.TrainConfig(n_tokens=n, batch_size=1024, seed=seed)
                    sl.SAE(cfg, seed).fit(pair, run, progress=False).save_pretrained(folder)
                found.setdefault(f"{kind}, {how}", {})[place] = sl.SAE.from_pretrained(folder)
        if kind == "SAEs":
            untrained = {
                place: make_untrained(sae, acts[place][:10_000].float(), seed=100 + seed)
                for place, sae in found[f"{kind}, trained"].items()
            }
            found[f"{kind}, untrained"] = untrained
    saes = found["SAEs, trained"]
    attention = {place: sae for place, sae in saes.items() if "attn" in place}
    found["transcoders and SAEs of attention"] = {**found["transcoders, trained"], **attention}
    found["SAEs of MLPs"] = {place: sae for place, sae in saes.items() if "mlp" in place}
    return found


@torch.no_grad()
def take_giver(model: Any, ids: Tensor, giver: int, pair: list[int]) -> float:
    """What the answer's logit less the rival's loses in the model, patterns and scales held."""
    at = "blocks.0.hook_in"
    frozen = FrozenModel.make(model, ids[None], [at])
    whole, constants = frozen.forward([])
    keep = torch.ones(len(ids), 1)
    keep[giver] = 0
    less, _ = frozen.forward([(at, lambda x: x * keep)], constants)
    lost = (whole - less)[0, pair]
    return float(lost[0] - lost[1])


def read_giver(graph: AttributionGraph, giver: int) -> Row:
    """By the graph: the effect, whether it is reached, and its rank."""
    answer, rival = np.flatnonzero(graph.is_kind("logit")).tolist()
    tokens = np.flatnonzero(graph.is_kind("embedding"))
    effects = (graph.effects(answer) - graph.effects(rival))[tokens]
    reaching: Row = {}
    for share in (0.2, 0.8):
        followed = graph.follow(share, target=answer)
        reached = np.zeros(len(tokens), bool)
        reached[followed.positions[followed.is_kind("embedding")]] = True
        reaching |= {
            f"reached, {share}": float(reached[giver]),
            f"others, {share}": float(np.delete(reached, giver).mean()),
            f"nodes, {share}": float(len(followed)),
        }
    return {
        "graph": float(effects[giver]),
        **reaching,
        "rank": float((np.abs(effects) >= abs(effects[giver])).sum()),
        "replacement": graph.replacement_score,
        "miss": graph.completeness_error,
    }


def read_score(model: Any, coders: Coders, ids: Tensor, giver: int, patterns: Tensor) -> Row:
    """Of the head that looks most from the end to the giver."""
    looks = patterns[1:, :, -1]  # layer 0 reads embeddings alone
    layer, head = np.unravel_index(int(looks[:, :, giver].argmax()), looks.shape[:2])
    others = looks[layer, head].clone()
    others[giver] = -1
    found = sl.circuits.attention_score(
        model, coders, ids, head=(int(layer) + 1, int(head)), key=giver, against=int(others.argmax())
    )
    sizes, is_error = np.abs(found.pairs), found.is_kind("error")
    largest = np.sort(sizes, axis=None)[::-1].cumsum()
    return {
        "looks": float(looks[layer, head, giver]),
        "errors": 1 - float(sizes[np.ix_(~is_error, ~is_error)].sum() / sizes.sum()),
        "80 %": float(np.searchsorted(largest, 0.8 * largest[-1]) + 1),
        "miss": found.completeness_error,
    }


def measure_giver(args: argparse.Namespace, seed: int) -> dict[str, Row]:
    model = sl.load_model("tales", progress=False)
    prompts = [versions["original"] for versions in name_edits(args.n, seed=seed)]
    ids, givers = [one.ids.long() for one in prompts], [one.giver_at for one in prompts]
    pairs = [[one.answer, one.other_answer] for one in prompts]
    true = [take_giver(model, *of) for of in zip(ids, givers, pairs, strict=True)]
    patterns = [read_patterns(model, one[None])[:, 0] for one in ids]
    rows: dict[str, Row] = {}
    for kind, coders in train_tales(model, seed, args.n_tokens).items():
        if args.kinds and kind not in args.kinds:
            continue
        found, scores = [], []
        for one, giver, pair, own in zip(ids, givers, pairs, patterns, strict=True):
            graph = sl.circuits.trace(model, coders, one, targets=pair, max_features=None)
            found.append(read_giver(graph, giver))
            scores.append(read_score(model, coders, one, giver, own))
        effects = np.array([one.pop("graph") for one in found])
        rows[kind] = {
            "graph / model": float(effects.mean() / np.mean(true)),
            "r": correlation(effects, np.array(true)),
            **{name: float(np.mean([one[name] for one in found])) for name in found[0] if name != "miss"},
            "miss, 1e-6": 1e6 * max(one["miss"] for one in found + scores),
            **{f"score: {name}": float(np.mean([one[name] for one in scores])) for name in scores[0] if name != "miss"},
        }
        print(f"seed {seed}, {kind}: {rows[kind]}", flush=True)
    print(f"seed {seed}: in the model {np.mean(true):.2f}", flush=True)
    return rows


# ---- Othello
def measure_othello(args: argparse.Namespace, seed: int) -> dict[str, Row]:
    model = sl.load_model("othello", progress=False)
    sites = [f"blocks.{i}.hook_{part}_out" for i in range(3) for part in ("attn", "mlp")]
    saes = train_on_othello(model, sites, seed, args.n_tokens)
    games = generate_games(150, first=UNSEEN + 10_000)
    tokens, mask = games.tokens(), sl.TokenMask(special=True)
    acts = sl.collect(model, tokens, sites, mask=mask, progress=False)
    assert isinstance(acts, dict)
    some = acts[sites[0]]
    doc_ids, positions = some.doc_ids, some.positions
    truth, x = games.labels_at(doc_ids, positions), {site: one[:] for site, one in acts.items()}
    moves = (tokens.ids[doc_ids, positions].numpy()[:, None] == np.arange(4, 64)).astype(np.uint8)
    untrained = {site: make_untrained(sae, x[site][:10_000], seed=100 + seed) for site, sae in saes.items()}
    rows: dict[str, Row] = {}
    best: dict[str, Any] = {}
    for name, of in (("SAE", saes), ("untrained", untrained)):
        for site in sites:
            scores = score_concepts(encode_csr(of[site], x[site]), truth)
            by_move = score_concepts(
                encode_csr(of[site], x[site]),
                TokenLabels.of(moves, [Concept(f"move {i}", "move") for i in range(60)], truth.doc_ids),
            )
            good = [row for row in (*scores.scored, *by_move.scored) if row.f1 >= MIN_F1]
            rows[f"concepts, {site}, {name}"] = {
                kind: float(sum(row.kind == kind for row in good))
                for kind in ("move", "mine", "yours", "empty", FLIPPED)
            }
            best[name, site] = scores
    for name, of in (("SAE", saes), ("untrained", untrained)):
        rows |= {
            f"parity, {at}, {name}": row for at, row in measure_parity(args, model, of, x, positions, seed).items()
        }
    rows |= measure_flipped(args, model, saes, best, seed)
    for name, row in rows.items():
        print(f"seed {seed}, {name}: { ({key: round(value, 3) for key, value in row.items()}) }", flush=True)
    return rows


def measure_parity(
    args: argparse.Namespace, model: Any, saes: Coders, x: Mapping[str, Tensor], positions: Tensor, seed: int
) -> dict[str, Row]:
    """Scores of the two heads of block 2 that look most at moves of one player."""
    even = (positions % 2 == 0).numpy()
    prefers = {}
    for site, sae in saes.items():
        codes = encode_csr(sae, x[site]) != 0
        counts = np.asarray(codes.sum(0)).ravel()
        prefers[site] = 2 * np.asarray(codes[even].sum(0)).ravel() / np.maximum(counts, 1) - 1
    games = generate_games(args.n, first=UNSEEN).tokens()
    pattern = read_patterns(model, games.ids.long())[2]
    n = games.ids.shape[1]
    same = (torch.arange(n)[:, None] - torch.arange(n)) % 2 == 0
    rows = slice(20, 50)
    leaning = (pattern * (2 * same.float() - 1))[:, :, rows, 1:].sum(-1).mean((0, 2)) / pattern[:, :, rows, 1:].sum(
        -1
    ).mean((0, 2))
    rng, found = np.random.default_rng(seed), dict[str, Row]()
    for head in leaning.abs().argsort(descending=True)[:2].tolist():
        values, labels, where, score = [], [], [], []
        for game in range(args.n):
            ids = games.ids[game][games.attention_mask[game]].long()
            query = int(rng.integers(20, min(50, len(ids))))
            one = sl.circuits.attention_score(
                model, saes, ids, head=(2, head), query=query, key=query - 2, against=query - 1, allow_missing=True
            )
            score.append(one.score)
            is_feature = one.is_kind("feature")
            pairs = np.where(is_feature[:, None] & is_feature, one.pairs, 0)
            for place in np.argsort(-np.abs(pairs), axis=None)[:200]:
                i, j = divmod(int(place), len(one))
                sign = 1 if one.positions[j] == query - 2 else -1
                values.append(float(pairs[i, j]))
                where.append([(one.dictionaries[one.sources[k]], int(one.features[k])) for k in (i, j)])
                labels.append(sign)
        found[f"head {head}"] = {
            "leans": float(leaning[head]),
            "score": float(np.mean(score)),
            "pairs": float(len(values)),
            **correlate_labels(np.array(values), where, np.array(labels), prefers, rng),
        }
    return found


def correlate_labels(
    values: np.ndarray, where: list, signs: np.ndarray, prefers: Mapping[str, np.ndarray], rng: np.random.Generator
) -> Row:
    def correlate(of: Mapping[str, np.ndarray]) -> float:
        products = np.array([of[a][i] * of[b][j] for (a, i), (b, j) in where])
        return rank_correlation(signs * products, values)

    shuffled = [correlate({site: rng.permutation(one) for site, one in prefers.items()}) for _ in range(99)]
    return {
        "rho": correlate(prefers),
        "shuffled": float(np.mean(shuffled)),
        "shuffled 95": float(np.quantile(shuffled, 0.95)),
    }


def measure_flipped(
    args: argparse.Namespace, model: Any, saes: Coders, best: Mapping[Any, Any], seed: int
) -> dict[str, Row]:
    """What gives to the features of MLPs that tell flipped squares."""
    rng, rows = np.random.default_rng(seed), dict[str, Row]()
    squares = {site: name_squares(best["SAE", site], saes[site].cfg.d_sae) for site in saes}
    games = generate_games(args.n, first=UNSEEN)
    tokens = games.tokens()
    for site in [site for site in saes if "mlp" in site]:
        good = [(row, best["SAE", site].best(row.name)) for row in best["SAE", site].scored if row.kind == FLIPPED]
        good = [(row.name.split()[1], one.feature) for row, one in good if row.f1 >= 0.5 and one.feature is not None]
        parts: list[Row] = []
        for square, feature in good[:20]:
            codes = find_firing(model, tokens, site, saes[site], feature)
            for game, at in codes[: args.n_fired]:
                ids = tokens.ids[game][: at + 1].long()
                graph = sl.circuits.trace(
                    model, saes, ids, targets=(site, feature, at), max_features=1, allow_missing=True
                )
                parts.append(split_sources(graph, squares, SQUARES.index(square), rng))
        if parts:
            means = {key: float(np.nanmean([one[key] for one in parts])) for key in parts[0]}
            rows[f"flipped, {site}"] = {"features": float(len(good)), "tokens": float(len(parts)), **means}
    return rows


def name_squares(scores: Any, n: int) -> np.ndarray:
    """The square of the concept that each feature tells best, above F1 .5; -1 for none."""
    found, f1 = np.full(n, -1), np.full(n, 0.5)
    for row in scores.scored:
        feature = scores.best(row.name).feature
        if feature is not None and row.f1 > f1[feature]:
            found[feature], f1[feature] = SQUARES.index(row.name.split()[1]), row.f1
    return found


def find_firing(model: Any, tokens: Any, site: str, sae: sl.SAE, feature: int) -> list[tuple[int, int]]:
    acts = sl.lm.capture(model, tokens.ids.long(), [site])[site]
    codes = sae.encode(acts)[..., feature].detach() * tokens.attention_mask
    return [(int(game), int(at)) for game, at in codes.nonzero() if at > 5]


def split_sources(
    graph: AttributionGraph, squares: Mapping[str, np.ndarray], square: int, rng: np.random.Generator
) -> Row:
    """Shares of the positive contributions to the last node, and of the same square among features."""
    target = len(graph) - 1
    into = graph.edge_targets == target
    sources, weights = graph.edge_sources[into], np.maximum(graph.edge_weights[into], 0)
    total = weights.sum()
    is_feature = graph.is_kind("feature")[sources]
    at = [graph.dictionaries[i] if i >= 0 else "" for i in graph.sources[sources]]
    own = np.array(
        [f and squares[site][i] >= 0 for f, site, i in zip(is_feature, at, graph.features[sources], strict=True)], bool
    )
    where = np.array(
        [squares[site][i] if one else -1 for one, site, i in zip(own, at, graph.features[sources], strict=True)]
    )
    permuted = where.copy()
    permuted[own] = rng.permutation(len(SQUARES))[where[own]]
    share = lambda mask: float(weights[mask].sum() / total)  # noqa: E731
    named = float(weights[own].sum())
    return {
        "move": share(graph.is_kind("embedding")[sources] & (graph.positions[sources] == graph.positions[target])),
        "attention": share(is_feature & np.array(["attn" in site for site in at])),
        "MLPs": share(is_feature & np.array(["mlp" in site for site in at])),
        "errors": share(graph.is_kind("error")[sources]),
        "same square": float(weights[own & (where == square)].sum()) / named if named else np.nan,
        "permuted": float(weights[own & (permuted == square)].sum()) / named if named else np.nan,
    }


# ---- heads
def make_copier(seed: int, steps: int) -> Any:
    """Two layers of attention alone, trained on random tokens that are repeated once after a distance that varies."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cfg = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(cfg)
        for layer in model.model.layers:
            torch.nn.init.zeros_(layer.mlp.down_proj.weight).requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.01)
        for step in range(steps):
            n = int(torch.randint(4, 20, ()))  # of varying length, so that the distance tells nothing
            half = torch.randint(4, 64, (64, n))
            ids = torch.cat([torch.ones(64, 1, dtype=torch.long), half, half], 1)
            logits = model(ids, use_cache=False).logits[:, n + 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, n + 2 :].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == steps - 1:
                print(f"copier {seed}: loss {float(loss.detach()):.3f} of {np.log(60):.2f}", flush=True)
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, 64))]
    special = SpecialWords("<bos>", "<eos>", "<pad>", "<unk>")
    return sl.load_model(model.eval(), tokenizer=word_tokenizer(words, special, no_space_before="", no_space_after=""))


@torch.no_grad()
def read_looks(model: Any, first: int, seed: int) -> tuple[Tensor, Tensor]:
    """(5, n_layers, n_heads) of attention on repeated tokens: d = 1 to 5 tokens back, and to what came d tokens after
    the same token.
    """
    generator, n = torch.Generator().manual_seed(seed), 12
    half = torch.randint(first, model.cfg.d_vocab, (16, n), generator=generator)
    ids = torch.cat([torch.ones(16, 1, dtype=torch.long), half, half], 1)
    patterns = read_patterns(model, ids).mean(1)
    back, after = (
        torch.stack([patterns.diagonal(-at, -2, -1)[..., 1 + n - at :].mean(-1) for at in distances])
        for distances in (range(1, 6), range(n - 1, n - 6, -1))
    )
    return back, after


def measure_heads(args: argparse.Namespace, seed: int) -> dict[str, Row]:
    from transformers import AutoModelForCausalLM

    copier = make_copier(seed, args.steps)
    models: dict[str, Callable[[], Any]] = {
        "copier": lambda: copier,
        **{name: partial(sl.load_model, name, progress=False) for name in ("tales", "tales-b", "othello")},
    }
    rows: dict[str, Row] = {}
    for name, load in models.items():
        model = load()
        back, after = read_looks(model, 4, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = AutoModelForCausalLM.from_config(model.original_model.config)
        random = sl.load_model(fresh.eval(), tokenizer=model.tokenizer)
        found, null = (sl.circuits.head_overlap(one, rank=8, seed=seed) for one in (model, random))
        known = ~np.isnan(found.overlap)
        by_distance = back[:, :, :, None, None] * after[:, None, None]
        looks, distances = by_distance.max(0)
        looks = torch.where(torch.from_numpy(known), looks, -1)
        pair = np.unravel_index(int(looks.argmax()), looks.shape)
        distance = int(distances[pair])
        rows[name] = {
            "distance": float(distance + 1),
            "back": float(back[distance][pair[:2]]),
            "after": float(after[distance][pair[2:]]),
            "z": float(found.z[pair]),
            "rank": float((found.overlap[known] >= found.overlap[pair]).sum()),
            "pairs": float(known.sum()),
            "rho": rank_correlation(looks.numpy()[known], found.overlap[known]),
            "above": found.above_frac,
            "above, random": null.above_frac,
        }
        shown = {key: round(value, 3) for key, value in rows[name].items()}
        print(f"seed {seed}, {name}, {tuple(map(int, pair))}: {shown}", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["giver", "othello", "heads"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-tokens", type=int, default=200_000, help="to train each dictionary on")
    parser.add_argument("--n", type=int, default=12, help="prompts, or games")
    parser.add_argument("--kinds", nargs="+", help="of dictionaries of tales; all by default")
    parser.add_argument("--n-fired", type=int, default=3, help="tokens of each feature of a flipped square")
    parser.add_argument("--steps", type=int, default=3000, help="to train the model that copies")
    parser.add_argument("--out", type=Path, help="everything as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    measure = {"giver": measure_giver, "othello": measure_othello, "heads": measure_heads}[args.what]
    rows: dict[str, list[Row]] = {}
    for seed in args.seeds:
        for name, row in measure(args, seed).items():
            rows.setdefault(name, []).append(row)
    for columns in dict.fromkeys(tuple(found[0]) for found in rows.values()):
        same = {name: found for name, found in rows.items() if tuple(found[0]) == columns}
        print(f"\n{format_table(same)}")
    if args.out:
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
