"""Do attention and MLPs decompose into paths of features, without a patch (arXiv:2402.12201)?

    python scripts/measure_paths.py --seeds 0 1 2 --out paths.json

SAEs (TopK) of what attention and MLP of the first blocks of the model `othello` write; the embedding of a move is
one feature as it is, as there are 60. With norm scales, attention patterns and the MLPs' gates held at what they were,
a feature's pre-activation, a score of attention and a logit are sums over what was written before: moves, positions,
features, the SAEs' errors, biases. BOS is the same in all games: what is written there is one constant.

    complete   the worst miss of the sums, over the value itself and over the root mean square of such values
    few        median number of contributors that carry 80 % of the positive contributions, beside that of positive
               ones; neurons: of MLPs, and value channels of heads; errors: their share of all absolute contributions
    ablation   rank correlation of direct contributions with what removing the upstream feature does when everything
               is recomputed; near: no part lies between; no weights: the product of decoder and encoder alone
    board      how often the position that gives most to a feature which reads a square is a move that played or flipped
               that square; beside a random earlier position, the most attended one, the same position held against
               other squares of the same state; calm: where the last move did nothing to the square; turned: where some
               move flipped it, and then whether the position is the last such move, or the one that played the square;
               who played: F1 of a rule that knows who played the square, and no flips
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import saelab as sl
from objectives.shared import format_table
from saelab.evaluation import encode_csr, score_concepts
from saelab.functional.metrics import exact
from saelab.functional.statistics import rank_correlation
from saelab.lm.hooks import replace_activations
from saelab.lm.models import WORLD_MODELS
from saelab.lm.token_labels import TokenLabels
from saelab.sae.initialization import make_untrained
from saelab.stores.files import write_json
from saelab.synthetic.othello import CONCEPTS, FLIPPED, MINE, SQUARES, VOCABULARY, YOURS, Games, generate_games

KEPT = Path("runs/paths")
SEEN, UNSEEN = 70_000_000, 90_000_000  # numbers of the first games to train on, and to measure on
D_SAE, K, MIN_F1 = 1024, 32, 0.7
Table = dict[str, dict[str, float]]
DIGITS = {"FVU": 3, "few": 1, "complete": 1}


def read_weights(name: str) -> Any:
    """A bundled model that also returns its attention patterns."""
    folder = WORLD_MODELS / name
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def train(model: Any, sites: list[str], seed: int, n_tokens: int) -> dict[str, sl.SAE]:
    """SAEs by hook point, their normalizers folded in; those that were trained before are read."""
    folders = {site: KEPT / str(n_tokens) / f"{site}-{seed}" for site in sites}
    if missing := [site for site, folder in folders.items() if not folder.is_dir()]:
        tokens, mask = generate_games(5_500, first=SEEN).tokens(), sl.TokenMask(special=True)
        acts = sl.collect(
            model, tokens, sites, KEPT / f"acts-{len(sites)}", dtype=torch.float16, mask=mask, progress=False
        )
        for site in missing:
            cfg = sl.SAEConfig(d_in=model.cfg.d_model, d_sae=D_SAE, activation=sl.TopK(k=K))
            run = sl.TrainConfig(n_tokens=n_tokens, batch_size=1024, seed=seed)
            sl.SAE(cfg, seed).fit(acts[site], run, progress=False).save_pretrained(folders[site])  # type: ignore[index]
    return {site: sl.SAE.from_pretrained(folder).fold() for site, folder in folders.items()}


def label(model: Any, sites: list[str], n_games: int) -> tuple[dict[str, Tensor], TokenLabels]:
    """Activations of the moves of games by hook point, and the discs on the board."""
    games, mask = generate_games(n_games, first=UNSEEN + 10_000), sl.TokenMask(special=True)
    acts = sl.collect(model, games.tokens(), sites, mask=mask, progress=False)
    assert isinstance(acts, dict)
    doc_ids, positions = acts[sites[0]].doc_ids, acts[sites[0]].positions
    assert doc_ids is not None and positions is not None
    labels = games.labels_at(doc_ids, positions)
    kept = [i for i, one in enumerate(CONCEPTS) if one.kind in (MINE, YOURS)]
    of = TokenLabels.of(labels.matrix[:, kept], [CONCEPTS[i] for i in kept], labels.doc_ids)
    return {site: one[:] for site, one in acts.items()}, of


class Run:
    """What the model computed for some games, in float64, and its parts as linear maps with the rest as it was."""

    def __init__(self, model: Any, games: Games, sites: list[str]) -> None:
        weights, tokens, names = read_weights("othello"), games.tokens(), range(model.cfg.n_layers)
        self.ids, self.lengths = tokens.ids.long(), tokens.attention_mask.sum(1)
        self.sites = sites
        self.real = torch.arange(self.ids.shape[1]) < self.lengths[:, None]
        self.layers, self.norm = weights.transformer.h, weights.transformer.ln_f
        self.n_heads, self.d_head = model.cfg.n_heads, model.cfg.d_head
        parts = {f"blocks.{i}.hook_{a}_out": f"blocks.{i}.hook_resid_{b}" for i in names for a, b in _PARTS}
        last = f"blocks.{names[-1]}.hook_resid_post"
        seen = sl.lm.capture(model, self.ids, [*parts, *parts.values(), last])
        position = weights.transformer.wpe.weight[: self.ids.shape[1]].expand(*self.ids.shape, -1)
        written = {"move": weights.transformer.wte.weight[self.ids], "position": position}
        self.written = {name: exact(x) for name, x in (written | {name: seen[name] for name in parts}).items()}
        self.into = {name: exact(seen[at]) for name, at in (parts | {"logits": last}).items()}
        self.unembedding, self.neurons = exact(weights.lm_head.weight), dict[str, Tensor]()
        outputs = {name: self.output(name) for name in parts}
        hooks = [out.register_forward_pre_hook(partial(self._keep, name)) for name, out in outputs.items()]
        with torch.no_grad():
            out = weights(self.ids, output_attentions=True)
        for hook in hooks:
            hook.remove()
        self.patterns, self.logits = [exact(x) for x in out.attentions], exact(out.logits)

    def _keep(self, name: str, _: nn.Module, given: tuple) -> None:
        self.neurons[name] = exact(given[0])

    def layer(self, site: str) -> Any:
        return self.layers[int(site.split(".")[1])]

    def output(self, site: str) -> Any:
        """The projection that writes; what it reads are value channels of heads or neurons."""
        return self.layer(site).attn.c_proj if site.endswith("attn_out") else self.layer(site).mlp.c_proj

    def before(self, site: str) -> list[str]:
        names = list(self.written)
        return names if site == "logits" else names[: names.index(site)]

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """A game, and a position in it with some moves before."""
        game = int(rng.integers(len(self.ids)))
        return game, int(rng.integers(4, int(self.lengths[game])))

    def scale(self, site: str) -> Tensor:
        """What the norm multiplies centered inputs of a part by."""
        return (self.into[site].var(-1, unbiased=False) + self.norm.eps).rsqrt()

    def heads(self, site: str, which: int) -> tuple[Tensor, Tensor]:
        """Queries (0), keys (1) or values (2): weights (n_heads, d_model, d_head) and biases (n_heads, d_head)."""
        part = self.layer(site).attn.c_attn
        weight, bias = (exact(x).chunk(3, -1)[which] for x in (part.weight, part.bias))
        return weight.view(-1, self.n_heads, self.d_head).transpose(0, 1), bias.view(self.n_heads, self.d_head)

    def attention(self, site: str, w: Tensor) -> tuple[Tensor, Tensor]:
        """Readers (n_heads, d_model) of scaled inputs for a direction `w` of the output, and the constant."""
        out, (values, bias) = self.output(site), self.heads(site, 2)
        back = (exact(out.weight) @ w).view(self.n_heads, self.d_head)
        reader, constant = through_norm(self.layer(site).ln_1, (values @ back[..., None])[..., 0])
        return reader, constant.sum() + (bias * back).sum() + exact(out.bias) @ w

    def reader(self, site: str, w: Tensor, game: int, at: int) -> tuple[Tensor, Tensor]:
        """Readers (at + 1, d_model) of what was written at each position for `w` at position `at`, and the constant."""
        scale = self.scale(site)[game, : at + 1, None]
        if site.endswith("attn_out"):
            heads, constant = self.attention(site, w)
            return self.patterns[int(site.split(".")[1])][game, :, at, : at + 1].T @ heads * scale, constant
        if site == "logits":
            reader, constant = through_norm(self.norm, w)
        else:
            layer, out = self.layer(site), self.output(site)
            back = exact(out.weight) @ w * (self.neurons[site][game, at] > 0)  # the gate act(h) / h of ReLU
            reader, constant = through_norm(layer.ln_2, exact(layer.mlp.c_fc.weight) @ back)
            constant = constant + exact(layer.mlp.c_fc.bias) @ back + exact(out.bias) @ w
        return torch.cat([torch.zeros(at, len(reader)), reader[None] * scale[at]]), constant


_PARTS = (("attn", "pre"), ("mlp", "mid"))


def through_norm(norm: Any, reader: Tensor) -> tuple[Tensor, Tensor]:
    """What reads a norm's output as what reads its scaled input, centering included, and what the norm's bias gives."""
    folded = reader * exact(norm.weight)
    return folded - folded.mean(-1, keepdim=True), reader @ exact(norm.bias)


class Parts:
    """What one part wrote as codes times rows, a bias and an error."""

    def __init__(self, x: Tensor, codes: Tensor, rows: Tensor, bias: Tensor) -> None:
        self.codes, self.rows, self.bias = exact(codes), exact(rows), exact(bias)
        self.error = x - self.codes @ self.rows - self.bias

    @classmethod
    @torch.no_grad()
    def of(cls, run: Run, site: str, sae: sl.SAE | None) -> "Parts":
        """By the SAE, or without one by neurons and value channels."""
        x = run.written[site]
        if sae is None:
            return cls(x, run.neurons[site], run.output(site).weight, run.output(site).bias)
        return cls(x, sae.encode(x.float()), sae.W_dec, sae.b_dec)

    def pick(self, rng: np.random.Generator, game: int, at: int) -> int:
        """One of the features that fire."""
        return int(rng.choice(self.codes[game, at].nonzero()[:, 0]))


def count_few(values: Tensor, share: float = 0.8) -> int:
    """The fewest of some values that carry this share of the positive ones."""
    summed = values[values > 0].sort(descending=True).values.cumsum(0)
    return int((summed < share * summed[-1]).sum()) + 1


def contribute(
    run: Run, parts: Mapping[str, Parts], site: str, reader: Tensor, game: int
) -> tuple[Tensor, Tensor, float]:
    """What moves, positions and features give at each source; what errors give, and parts without a dictionary; the
    rest.
    """
    nodes, errors, rest, n = [], [], 0.0, len(reader)
    for name in run.before(site):
        rest += float(run.written[name][game, 0] @ reader[0])  # BOS
        if part := parts.get(name):
            codes = part.codes[game, 1:n]
            where = codes.nonzero(as_tuple=True)
            nodes.append(codes[where] * (reader[1:] @ part.rows.T)[where])
            errors.append((part.error[game, 1:n] * reader[1:]).sum(1))
            rest += float(reader[1:].sum(0) @ part.bias)
        else:
            kind = nodes if name in ("move", "position") else errors
            kind.append((run.written[name][game, 1:n] * reader[1:]).sum(1))
    return torch.cat(nodes), torch.cat(errors), rest


def score_pairs(
    run: Run, parts: Mapping[str, Parts], site: str, head: int, game: int, places: tuple[int, int]
) -> Tensor:
    """What pairs give to a score of attention: all that is written at the query by all at the key, then biases."""
    sides, norm = [], run.layer(site).ln_1
    for which, at in enumerate(places):
        vectors = []
        for name in run.before(site):
            if part := parts.get(name):
                fires = part.codes[game, at].nonzero()[:, 0]
                vectors += [
                    part.codes[game, at, fires, None] * part.rows[fires],
                    part.error[game, at, None],
                    part.bias[None],
                ]
            else:
                vectors.append(run.written[name][game, at, None])
        x = torch.cat(vectors)
        read = (x - x.mean(1, keepdim=True)) * run.scale(site)[game, at] * exact(norm.weight)
        weight, bias = (one[head] for one in run.heads(site, which))
        sides.append(torch.cat([torch.cat([read, exact(norm.bias)[None]]) @ weight, bias[None]]))
    return sides[0] @ sides[1].T / run.d_head**0.5


@dataclass(frozen=True, eq=False)
class Measure:
    """One seed's SAEs of one run."""

    model: Any
    run: Run
    games: Games
    saes: dict[str, sl.SAE]
    parts: dict[str, dict[str, Parts]]
    rng: np.random.Generator

    def fvu(self) -> Table:
        """Unexplained variance on the moves of the run."""
        here = self.run.real.clone()
        here[:, 0] = False
        spread = {site: self.run.written[site][here] for site in self.run.sites}
        spread = {site: (x - x.mean(0)).square().sum() for site, x in spread.items()}
        return {
            site: {name: float(of[site].error[here].square().sum() / spread[site]) for name, of in self.parts.items()}
            for site in self.run.sites
        }

    def sums(self, n: int) -> tuple[Table, Table]:
        """Completeness by kind of value, and how few contributors carry most by kind and dictionary."""
        run, rng, trained = self.run, self.rng, self.parts["SAEs"]
        misses, few = dict[str, list](), dict[str, list]()
        for site in [site for site in (*self.run.sites[2:], "logits") for _ in range(n)]:
            game, at = run.draw(rng)
            if site == "logits":
                token = int(run.logits[game, at].argmax())
                kind, w, offset, value = "logit", run.unembedding[token], 0.0, float(run.logits[game, at, token])
            else:
                sae, i = self.saes[site], trained[site].pick(rng, game, at)
                kind, w = "OV" if site.endswith("attn_out") else "MLP", exact(sae.W_enc[:, i])
                offset = float(exact(sae.b_enc[i]) - exact(sae.b_dec) @ w)
                value = float(run.written[site][game, at] @ w) + offset
            reader, constant = run.reader(site, w, game, at)
            for name, parts in self.parts.items():
                nodes, errors, rest = contribute(run, parts, site, reader, game)
                total = float(nodes.sum() + errors.sum() + constant) + rest + offset
                misses.setdefault(kind, []).append((total - value, value))
                share = 100 * float(errors.abs().sum() / (nodes.abs().sum() + errors.abs().sum()))
                few.setdefault(f"{kind}, {name}", []).append((count_few(nodes), int((nodes > 0).sum()), share))
        for _ in range(n):
            (game, at), site = run.draw(rng), str(rng.choice(self.run.sites[2::2]))
            head, source = int(rng.integers(run.n_heads)), int(rng.integers(1, at))
            pairs, own = (score_pairs(run, trained, site, head, game, (at, place)) for place in (source, at))
            pattern = run.patterns[int(site.split(".")[1])][game, head, at]
            value = float((pattern[source] / pattern[at]).log())
            misses.setdefault("QK", []).append((float(pairs.sum() - own.sum()) - value, value))
            few.setdefault("QK, SAEs", []).append((count_few(pairs.flatten()), int((pairs > 0).sum()), float("nan")))
        arrays = {kind: np.array(found) for kind, found in misses.items()}
        return {
            kind: {
                "of the value, 1e-6": 1e6 * float(np.abs(x[:, 0] / x[:, 1]).max()),
                "of the rms, 1e-6": 1e6 * float(np.abs(x[:, 0]).max() / np.sqrt((x[:, 1] ** 2).mean())),
            }
            for kind, x in arrays.items()
        }, {
            name: dict(zip(("80 %", "positive", "errors, %"), map(float, np.median(found, 0)), strict=True))
            for name, found in few.items()
        }

    def ablation(self, n: int) -> Table:
        """Direct contributions against what removing a feature does, by kind of path."""
        run, rng, parts, pairs = self.run, self.rng, self.parts["SAEs"], dict[str, list]()
        for start in range(0, n, 50):
            draws = [(*run.draw(rng), str(rng.choice(self.run.sites[:-1]))) for _ in range(start, min(start + 50, n))]
            removed = {site: torch.zeros(len(draws), *run.written[site].shape[1:]) for site in self.run.sites[:-1]}
            for row, (game, source, site) in enumerate(draws):
                part, i = parts[site], parts[site].pick(rng, game, source)
                removed[site][row, source] = (part.codes[game, source, i] * part.rows[i]).float()
            with replace_activations(self.model, {site: partial(torch.sub, other=x) for site, x in removed.items()}):
                after = sl.lm.capture(self.model, run.ids[[game for game, _, _ in draws]], self.run.sites[1:])
            for row, (game, source, site) in enumerate(draws):
                vector, first = exact(removed[site][row, source]), self.run.sites.index(site) + 1
                for target in self.run.sites[first:]:
                    is_attention = target.endswith("attn_out")
                    at = int(rng.integers(source, int(run.lengths[game]))) if is_attention else source
                    w = exact(self.saes[target].W_enc[:, parts[target].pick(rng, game, at)])
                    effect = float((run.written[target][game, at] - exact(after[target][row, at])) @ w)
                    direct = float(run.reader(target, w, game, at)[0][source] @ vector)
                    kind = f"{'OV' if is_attention else 'MLP'}, {'near' if target == self.run.sites[first] else 'far'}"
                    pairs.setdefault(kind, []).append((direct, effect, float(vector @ w)))
        pairs["all"] = [pair for group in pairs.values() for pair in group]
        return {kind: self._agree(np.array(group)) for kind, group in sorted(pairs.items())}

    def _agree(self, pairs: np.ndarray) -> dict[str, float]:
        direct, effect, plain = pairs.T
        top = np.abs(direct) >= np.quantile(np.abs(direct), 0.9)
        return {
            "spearman": rank_correlation(direct, effect),
            "shuffled": rank_correlation(self.rng.permutation(direct), effect),
            "no weights": rank_correlation(plain, effect),
            "largest tenth": rank_correlation(direct[top], effect[top]),
            "its signs": float((np.sign(direct) == np.sign(effect))[top].mean()),
            "pairs": len(pairs),
        }

    def board(self, acts: dict[str, Tensor], labels: TokenLabels, untrained: dict[str, sl.SAE]) -> Table:
        """Whether a square's feature gets most from a move that concerned the square, mean over features by part."""
        where = self.run.real.nonzero(as_tuple=True)
        truth = np.zeros((*self.run.ids.shape, len(CONCEPTS)), bool)
        truth[where] = self.games.labels_at(*where).matrix.toarray()
        kinds = np.array([one.kind for one in CONCEPTS])
        words = np.array(VOCABULARY)[self.run.ids.numpy()][..., None]
        played = words == np.array(SQUARES)
        concerned = played | truth[..., kinds == FLIPPED]
        table: Table = {}
        for site in self.run.sites[::2]:
            scores = {
                name: score_concepts(encode_csr(sae, acts[site]), labels)
                for name, sae in (("SAE", self.saes[site]), ("untrained", untrained[site]))
            }
            chosen = [(row.kind, row.name) for row in scores["SAE"].scored if row.f1 >= MIN_F1]
            for name, sae in (("SAE", self.saes[site]), ("untrained", untrained[site])):
                best = [(scores[name].best(concept), concept, truth[..., kinds == kind]) for kind, concept in chosen]
                by_rule = [score_player(played, truth[..., kinds == kind], concept) for kind, concept in chosen]
                rows = [
                    self._sources(site, sae, one, state, played, concerned, SQUARES.index(concept.split()[1]))
                    for one, concept, state in best
                    if one.feature is not None
                ]
                if rows := [row for row in rows if row]:
                    means = {key: float(np.nanmean([row[key] for row in rows])) for key in rows[0]}
                    f1 = float(np.mean([one.f1 for one, _, _ in best]))
                    table[f"{site}, {name}"] = {
                        "squares": len(rows),
                        "F1": f1,
                        "F1, who played": float(np.mean(by_rule)),
                        **means,
                    }
        return table

    @torch.no_grad()
    def _sources(
        self,
        site: str,
        sae: sl.SAE,
        best: Any,
        state: np.ndarray,
        played: np.ndarray,
        concerned: np.ndarray,
        square: int,
    ) -> dict[str, float]:
        """Shares of the tokens where a feature reads its square rightly; {} for fewer than 20 such tokens."""
        run, pattern = self.run, self.run.patterns[int(site.split(".")[1])]
        heads, _ = run.attention(site, exact(sae.W_enc[:, best.feature]))
        values = (run.into[site] * run.scale(site)[..., None]) @ heads.T
        given = torch.einsum("ghqs,gsh->gqs", pattern, values)
        fires = sae.encode(run.written[site].float())[..., best.feature].numpy() > best.threshold
        game, at = np.nonzero(fires & state[..., square] & (concerned[..., square].cumsum(1) > 0))
        if len(game) < 20:
            return {}
        places, all_rows = np.arange(fires.shape[1]), np.arange(len(game))
        earlier = (places <= at[:, None]) & (places > 0)
        top, most = (np.where(earlier, x[game, at], -np.inf).argmax(1) for x in (given, pattern.sum(1)))
        mine, calm = concerned[game, :, square] & earlier, ~concerned[game, at, square]
        hit, chance = mine[all_rows, top], mine.sum(1) / earlier.sum(1)
        plays = played[game, :, square] & earlier
        turned = mine.sum(1) > plays.sum(1)
        last = fires.shape[1] - 1 - mine[:, ::-1].argmax(1)
        others = state[game, at] & (np.arange(len(SQUARES)) != square)
        elsewhere = (concerned[game, top] & others).sum(1) / np.maximum(others.sum(1), 1)
        return {
            "concerned": hit.mean(),
            "random": chance.mean(),
            "attended": mine[all_rows, most].mean(),
            "other squares": elsewhere.mean(),
            "calm": hit[calm].mean() if calm.any() else np.nan,
            "calm, random": chance[calm].mean() if calm.any() else np.nan,
            "turned": turned.mean(),
            "last, if turned": (top == last)[turned].mean() if turned.any() else np.nan,
            "play, if turned": plays[all_rows, top][turned].mean() if turned.any() else np.nan,
        }


def score_player(played: np.ndarray, state: np.ndarray, concept: str) -> float:
    """F1 of a guess at whose disc it is by whose turn it was when the square was played, which ignores flips."""
    kind, name = concept.split()
    square = SQUARES.index(name)
    at, now = played[..., square].argmax(1)[:, None], np.arange(played.shape[1])
    guess = played[..., square].any(1, keepdims=True) & (now >= at) & ((now - at) % 2 == (kind == MINE))
    true = state[..., square]
    guess &= state.any(-1)  # not behind the end
    return float(2 * (guess & true).sum() / (guess.sum() + true.sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-tokens", type=int, default=200_000, help="to train each SAE on")
    parser.add_argument("--n-blocks", type=int, default=3, help="the first blocks, 2 or more, whose outputs have SAEs")
    parser.add_argument("--n-games", type=int, default=40, help="to measure on")
    parser.add_argument("--n-labeled", type=int, default=200, help="games to find the features of squares on")
    parser.add_argument("--n-values", type=int, default=30, help="values to decompose at each hook point")
    parser.add_argument("--n-removed", type=int, default=400, help="features to ablate")
    parser.add_argument("--out", type=Path, help="everything as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sites = [f"blocks.{i}.hook_{part}_out" for i in range(args.n_blocks) for part in ("attn", "mlp")]
    model, games = sl.load_model("othello", progress=False), generate_games(args.n_games, first=UNSEEN)
    run, (acts, labels) = Run(model, games, sites), label(model, sites, args.n_labeled)
    print(f"othello: {int(run.lengths.sum()):,} tokens; SAEs of {D_SAE}, k {K}, {args.n_tokens:,} tokens, {args.seeds}")
    rows: dict[str, dict[str, list]] = {}
    for seed in args.seeds:
        saes, tables = train(model, sites, seed, args.n_tokens), dict[str, Table]()
        untrained = {site: make_untrained(sae, acts[site][:10_000], seed=100 + seed) for site, sae in saes.items()}
        kinds: dict[str, Any] = {"SAEs": saes, "neurons": dict.fromkeys(sites), "untrained": untrained}
        parts = {name: {site: Parts.of(run, site, of[site]) for site in sites} for name, of in kinds.items()}
        measure = Measure(model, run, games, saes, parts, np.random.default_rng(seed))
        tables["FVU"], tables["ablation"] = measure.fvu(), measure.ablation(args.n_removed)
        tables["complete"], tables["few"] = measure.sums(args.n_values)
        tables["board"] = measure.board(acts, labels, untrained)
        for table, lines in tables.items():
            for name, figures in lines.items():
                rows.setdefault(table, {}).setdefault(name, []).append(figures)
        print(f"seed {seed} done", flush=True)
    for table, found in rows.items():
        print(f"\n{table}\n{format_table(found, DIGITS.get(table, 2))}")
    if args.out:
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
