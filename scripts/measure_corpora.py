"""Do features say how two corpora differ (arXiv:2512.10092)? Stories of `tales` with and without a register.

    python scripts/measure_corpora.py --out corpora.json

Corpora of stories, a without the register and b with it, are coded by an SAE of each seed and compared by
`diff_corpora`. A side is of the register where at least half of its firings in b lie in the register's passages:
`first` and `ten` are the shares of those passages in the firings of the first side by p value and of the first ten,
`chance` the share of all tokens of b. `tokens` is the place of the side that agrees best with the register token by
token (Cohen's kappa) in other stories. In the columns `found` a share of 100 stories of b has the register and 100 of a
have not: the share of draws whose first side is a discovery, and of the register (TopK, largest magnitude alone).

Null: stories divided at random, `any` the share of divisions with a discovery at FDR .05 and `mean` the number of
discoveries; by documents, and with tokens counted as if they were independent (Fisher's test on tokens).

Hypotheses, of the first seed: labels by rules, chosen on half of the stories, scored on the other half.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import hypergeom

import saelab as sl
from objectives.shared import FIRST_STORY, HOOK, format_table, tales_activations
from saelab.corpora import DocumentFeatures, diff_corpora, pool_documents, propose_hypotheses
from saelab.functional.statistics import adjust, kappa
from saelab.sae.initialization import make_untrained
from saelab.stores.files import write_json
from saelab.synthetic.tales import Stories, generate_stories

KEPT = Path("runs/corpora")
REGISTERS = ("recipe", "weather-report")
D_SAE, K = 1024, 16
N_STORIES, N_OTHERS = 600, 200
N_EACH, SHARES, N_DRAWS = 100, (0.5, 0.25, 0.1), 3
N_NULL = 20
FDR = 0.05
ACTIVATIONS = {"TopK": sl.TopK(k=K), "AbsTopK": sl.AbsTopK(k=K)}


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--n-tokens", type=int, default=300_000)
    command.add_argument("--out", type=Path, default=Path("corpora.json"))
    args = command.parse_args()
    stories = generate_stories(N_STORIES, first=FIRST_STORY + 20_000_000)
    others = generate_stories(N_OTHERS, first=FIRST_STORY + 30_000_000)
    registers: dict[str, list[dict[str, float]]] = {}
    nulls: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for name in (*ACTIVATIONS, "untrained"):
            sae = read_sae(name, args.n_tokens, seed)
            store, other = (harvest(sae, one, f"{name}-{seed}-{part}") for part, one in (("a", stories), ("b", others)))
            for by in ("max", "share"):
                documents = pool_documents(store, by)
                for register in REGISTERS:
                    mixed, side = (name, by) == ("TopK", "max"), best_side(other, others, register)
                    row = measure_register(documents, stories, side, register, seed, mixed)
                    registers.setdefault(f"{name}, {by}, {register}", []).append(row)
                if name != "untrained":
                    nulls.setdefault(f"{name}, {by}", []).append(measure_null(documents, seed))
            if name == "AbsTopK":
                nulls.setdefault("tokens as documents", []).append(count_tokens(store, seed))
            print(f"seed {seed}, {name} done", flush=True)
    print(f"\n{format_table(registers)}\n\n{format_table(nulls)}\n", flush=True)
    write_json(args.out, {"registers": registers, "nulls": nulls})
    said = [hypothesize(seed, args.n_tokens, stories) for seed in args.seeds[:1]]
    print("\n\n".join(text for _, text in said))
    write_json(args.out, {"registers": registers, "nulls": nulls, "hypotheses": [found for found, _ in said]})


def read_sae(name: str, n_tokens: int, seed: int) -> sl.SAE:
    """An SAE of tales' layer 2, trained once; or an untrained one with the same location and scale."""
    acts = tales_activations(n_tokens)
    if name == "untrained":
        return make_untrained(read_sae("TopK", n_tokens, seed), acts[:8192], seed=seed)
    folder = KEPT / f"{name}-{n_tokens}-{seed}"
    if not folder.is_dir():
        cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=D_SAE, activation=ACTIVATIONS[name])
        run = sl.TrainConfig(n_tokens=n_tokens, batch_size=1024, seed=seed)
        sl.SAE(cfg, seed=seed).fit(acts, run, progress=False).save_pretrained(folder)
    return sl.SAE.from_pretrained(folder)


def harvest(sae: sl.SAE, stories: Stories, name: str) -> sl.FeatureStore:
    model = sl.load_model("tales", progress=False)
    return sl.harvest(sae, model, stories.tokens(), KEPT / "stores" / name, hook_point=HOOK, progress=False)


def tokens_with(store: sl.FeatureStore, stories: Stories, concept: str) -> np.ndarray:
    labels = stories.labels_at(store.doc_ids.astype(np.int64), store.text.positions[store.places].astype(np.int64))
    return np.asarray(labels[concept])


def stories_with(stories: Stories, concept: str) -> np.ndarray:
    return np.bincount(stories.story_ids, np.asarray(stories.labels[concept]), minlength=len(stories)) > 0


def best_side(store: sl.FeatureStore, stories: Stories, concept: str) -> tuple[int, int]:
    """The feature and sign that agree best with a concept, token by token."""
    truth, codes = tokens_with(store, stories, concept), store.matrix()
    found = []
    for sign in (1, -1):
        fires = (codes * sign > 0).astype(np.float64)
        hits = np.asarray(fires[np.flatnonzero(truth)].sum(0)).ravel()
        scores = np.nan_to_num(kappa(hits, np.asarray(fires.sum(0)).ravel(), truth.sum(), len(truth)))
        found.append((float(scores.max()), int(scores.argmax()), sign))
    return max(found)[1:]


def measure_register(
    documents: DocumentFeatures, stories: Stories, side: tuple[int, int], register: str, seed: int, mixed: bool
) -> dict[str, float]:
    has, store = stories_with(stories, register), documents.store
    inside, in_b = tokens_with(store, stories, register), has[store.doc_ids]

    def share_inside(side: tuple[int, int]) -> float:
        fires = store.feature(side[0])
        rows = fires.indices[fires.values * side[1] > 0]
        return float(inside[rows[in_b[rows]]].mean())

    diff = diff_corpora(documents.rows(~has), documents.rows(has), n_null=0)
    order = [(row.feature, row.sign) for row in diff.rows]
    figures = {
        "first": share_inside(order[0]),
        "ten": float(np.mean([share_inside(one) for one in order[:10]])),
        "chance": float(inside[in_b].mean()),
        "tokens": 1.0 + order.index(side) if side in order else float("nan"),
        "discoveries": float(len(diff.discoveries)),
    }
    rng = np.random.default_rng(seed)
    for share in SHARES:
        found = [] if mixed else [np.nan]
        for _ in range(N_DRAWS if mixed else 0):
            without, with_it = rng.permutation(np.flatnonzero(~has)), rng.permutation(np.flatnonzero(has))
            n = round(share * N_EACH)
            a, b = without[:N_EACH], np.concatenate([without[N_EACH : 2 * N_EACH - n], with_it[:n]])
            first = diff_corpora(documents.rows(a), documents.rows(b), n_null=0).rows[0]
            found.append(first.q <= FDR and share_inside((first.feature, first.sign)) >= 0.5)
        figures[f"found {share:g}"] = float(np.mean(found))
    return figures


def measure_null(documents: DocumentFeatures, seed: int) -> dict[str, float]:
    half = np.arange(len(documents)) < len(documents) // 2
    diff = diff_corpora(documents.rows(half), documents.rows(~half), n_null=N_NULL, seed=seed)
    found = np.array(diff.null_discoveries)
    return {"any": float((found > 0).mean()), "mean": float(found.mean()), "most": float(found.max())}


def count_tokens(store: sl.FeatureStore, seed: int) -> dict[str, float]:
    """Discoveries of Fisher's test with tokens for documents, where stories were divided at random."""
    documents = pool_documents(store, "share")
    n_fires = (documents.matrix.toarray() * documents.n_tokens[:, None]).round()
    rng, found = np.random.default_rng(seed), []
    for _ in range(N_NULL):
        in_b = rng.permutation(len(documents)) < len(documents) // 2
        own, total = n_fires[in_b].sum(0), n_fires.sum(0)
        kept = total > 0
        null = hypergeom(documents.n_tokens.sum(), total[kept], documents.n_tokens[in_b].sum())
        p = np.minimum(1, 2 * np.minimum(null.sf(own[kept] - 1), null.cdf(own[kept])))
        found.append(int((adjust(p) <= FDR).sum()))
    return {"any": float((np.array(found) > 0).mean()), "mean": float(np.mean(found)), "most": float(max(found))}


def hypothesize(seed: int, n_tokens: int, stories: Stories) -> tuple[dict[str, Any], str]:
    """Hypotheses in words about stories with a recipe and those without."""
    store = harvest(read_sae("AbsTopK", n_tokens, seed), stories, f"AbsTopK-{seed}-a")
    documents, has = pool_documents(store), stories_with(stories, "recipe")
    names = "plain stories", "stories with a recipe"
    with sl.labels.LabelStore.open(store) as book:
        book.add(sl.labels.rules.label_by_rules(store, seed=seed).labels(), afresh=True)
        said = propose_hypotheses(documents.rows(~has), documents.rows(has), book, names=names, seed=seed)
    return said.to_dict(), str(said)


if __name__ == "__main__":
    main()
