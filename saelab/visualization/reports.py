"""`report`: an HTML page of a feature store to search, sort and read in a browser, without server and network.

Also the features that fire on each token of chosen prompts, as a section of the page.
"""

import base64
import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from saelab.analysis.dashboard import FeatureCard, describe_features
from saelab.analysis.density import KINDS, DeadFeatures, dead_features
from saelab.analysis.direct_logits import LogitLens, logit_lens
from saelab.analysis.feature_similarity import NearestFeatures, nearest_features
from saelab.analysis.prompt_features import read_prompt
from saelab.collecting.harvesting import require_harvested
from saelab.evaluation.results import ROWS, Evaluation
from saelab.functional.indices import FeatureIds, read_features
from saelab.labels.label import Label, join_texts, main_score
from saelab.labels.label_store import LabelStore
from saelab.lm.huggingface import AnyModel, as_model
from saelab.sae.compatibility import match_weights
from saelab.stores.feature_store import FeatureStore
from saelab.stores.files import is_empty, replace_folder, settle, to_json, write_atomic
from saelab.stores.jobs import hidden, hold_folder
from saelab.stores.manifest import Provenance
from saelab.stores.results import Result
from saelab.stores.sharing import shareable, shareable_words
from saelab.stores.validation import read_json
from saelab.universality.matching import Comparison
from saelab.visualization.card_data import describe_card, shorten
from saelab.visualization.feature_cards import style_card
from saelab.visualization.html import bundle, escape, facts, paragraph, read_asset, section, table, write_policy
from saelab.visualization.universality_plots import Matched

if TYPE_CHECKING:
    from saelab.lm.model_checks import Model
    from saelab.sae.sae import SAE

LOCAL_FILES = "'self' file:"
"""Content-Security-Policy sources for card files in the page's own folder, loaded when they are needed"""
N_SHOWN = 12
"""number of features shown per token, the strongest first"""
PER_FILE = 100
N_SEARCHED = 6
"""Number of windows whose text the search covers for each feature, of both signs."""
SNIPPET = 80
"""Characters of text on each side of the token in a row of the list, at most."""
PAGE, NAME = "index.html", "report.json"
FILES = (PAGE, NAME, "cards-*.js")
ON_ONE_PAGE = 200
"""Number of features up to which a folder holds one page and no further files."""

Cards: TypeAlias = Iterator[tuple[dict[str, Any], dict[str, Any]]]
"""rows of the list, each with the card of its feature"""


def fill_page(title: str, summary: str, data: Mapping[str, Any], cards: Mapping[int, Mapping[str, Any]]) -> str:
    """The complete HTML page of a report.

    Args:
        title: plain text.
        summary: HTML.
        data: data of the feature list and the prompts, embedded as JSON.
        cards: cards in the page itself, as `describe_card` makes them, by feature.
    """
    script = bundle("report.js")
    style = read_asset("page.css") + read_asset("components.css")
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            write_policy([script], LOCAL_FILES if data["files"] else ""),
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{style}</style>{style_card()}</head>",
            f"<body>\n<header><h1>{escape(title)}</h1></header>",
            f'<main id="report"><noscript>{NO_SCRIPT}</noscript></main>',
            f'<template id="summary">{summary}</template>',
            f'<script type="application/json" id="data">{to_script(data)}</script>',
            f'<script type="application/json" id="cards">{to_script(pack_cards(cards))}</script>',
            f"<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


NO_SCRIPT = "The list of features needs JavaScript, which this page carries; nothing is fetched from the network."
UNSAFE = re.compile("[<\u2028\u2029\ud800-\udfff]")
"""what may not stand between script tags, line ends that only JavaScript recognizes, and halves of surrogate pairs"""


def pack_cards(cards: Mapping[int, Mapping[str, Any]]) -> str:
    """Cards by feature as JSON, compressed (gzip) and in base64, as `frozen_source.js` reads them."""
    plain = json.dumps(cards, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(plain.encode(), mtime=0)).decode()


def as_script(cards: Mapping[int, Mapping[str, Any]]) -> str:
    """A script that passes cards by feature to the page."""
    return f'addCards("{pack_cards(cards)}");'


def to_script(value: Any) -> str:
    """JSON that is safe between script tags: without `<` and without line ends that only JavaScript recognizes.

    >>> to_script("</script>")
    '"\\\\u003c/script>"'
    """
    plain = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", plain)


def summarize(store: FeatureStore, found: DeadFeatures, evaluation: Evaluation | Mapping[str, Any] | None) -> str:
    """The summary of the report as HTML: data encoded, dead features, and quality of the SAE."""
    origin = store.provenance
    about = {
        "SAE": shareable_words(store.manifest.source),
        "Model": f"{shareable(origin.model)} (weight processing: {origin.weight_processing})",
        "Hook point": origin.hook_point,
        **_describe_text(store),
        "L0": f"{store.l0:.2f} codes a {store.counted[:-1]}, {'of both signs' if store.signed else 'all positive'}",
        "Trained on": _format_training(store.manifest.sae.get("training")),
    }
    parts = [
        facts({name: text for name, text in about.items() if text}),
        section("Features by density", *draw_kinds(found)),
    ]
    if evaluation is not None:
        parts.append(section("Evaluation", *draw_evaluation(evaluation)))
    return "\n".join(parts)


def _describe_text(store: FeatureStore) -> dict[str, str]:
    origin = store.provenance
    if store.of_documents:
        return {"Text": shareable(origin.text), "Documents": f"{len(store):,}, pooling: {origin.pooling}"}
    return {
        "Text": f"{shareable(origin.text)}, rows of {origin.ctx_len} tokens",
        "Tokens": f"{len(store):,}, in {len(store.find_documents()):,} documents",
    }


def _format_training(training: Mapping[str, Any] | None) -> str:
    if not training:
        return ""
    seen = training.get("n_tokens_seen", training.get("n_tokens"))
    if "method" in training:  # of `fit_dictionary`
        return f"{seen:,} tokens by {training['method']}, seed {training['seed']}"
    return f"{seen:,} tokens, batch {training['batch_size']:,}, lr {training['lr']:.3g}, seed {training['seed']}"


def draw_kinds(found: DeadFeatures) -> list[str]:
    """Numbers of features of each kind as HTML, and what the kinds mean."""
    rows = [
        [name, *(f"{counts.get(kind, 0):,}" for kind in KINDS), f"{sum(counts.values()):,}"]
        for name, counts in found.groups.items()
    ]
    limits = (
        f"On {found.n_tokens:,} tokens. Dead: never fired, so the rate is below {3 / found.n_tokens:.1e} (95 %). "
        f"Near-dead: below {found.near_dead_rate:g}. Dense: above {found.dense_rate:g}."
    )
    return [table(["features", *KINDS, "all"], rows), paragraph(limits, "small soft")]


def draw_evaluation(evaluation: Evaluation | Mapping[str, Any]) -> list[str]:
    """An evaluation as an HTML table with intervals and baselines, and what it was measured on."""
    numbers = evaluation.to_dict() if isinstance(evaluation, Evaluation) else evaluation
    baselines = numbers.get("baselines", {})
    rows = []
    for name in ROWS:
        low, high = numbers.get("intervals", {}).get(name, (None, None))
        between = f"{_format_number(low)} to {_format_number(high)}" if low is not None else ""
        key = "ce" if name == "ce_sae" else name
        rows.append(
            [
                name,
                _format_number(numbers.get(name)),
                between,
                *(_format_number(scores.get(key)) for scores in baselines.values()),
            ]
        )
    said = f"{numbers.get('n_tokens', 0):,} tokens of {numbers.get('text', 'an unnamed text')}."
    return [table(["", "SAE", "95 % interval", *baselines], rows), paragraph(said, "small soft")]


def _format_number(x: float | None) -> str:
    return "-" if x is None or x != x else f"{x:.4g}"


def read_prompts(sae: "SAE", model: "Model", prompts: Sequence[str], origin: Provenance) -> list[dict[str, Any]]:
    """The words of each prompt, and for each word the features that fire there with their codes, largest |z| first.

    As `read_prompt` reads them; at most 12 features of a word.

    Args:
        sae: the SAE that encodes.
        model: the language model that it was trained on.
        prompts: texts to show.
        origin: provenance of the feature store, which has hook point and mask.

    Raises:
        ValueError: a prompt is blank or longer than the model's context.
    """
    found = [read_prompt(sae, model, prompt, origin) for prompt in prompts]
    return [
        {"words": list(one.words), "codes": [list(codes.items())[:N_SHOWN] for codes in one.by_word]} for one in found
    ]


@dataclass(frozen=True, kw_only=True)
class Report(Result):
    """Path and size of a report."""

    page: str
    """path of the page to open in a browser"""
    n_features: int
    n_bytes: int

    def __str__(self) -> str:
        return f"{self.page}: {self.n_features:,} features, {self.n_bytes / 2**20:.1f} MiB"


def report(
    store: FeatureStore,
    out: str | Path,
    model: AnyModel | None = None,
    labels: Mapping[int, str] | LabelStore | None = None,
    features: FeatureIds | None = None,
    *,
    sae: "SAE | None" = None,
    prompts: Sequence[str] = (),
    evaluation: Evaluation | Mapping[str, Any] | None = None,
    near: NearestFeatures | None = None,
    compare: FeatureStore | None = None,
    comparison: Comparison | None = None,
    title: str = "",
    progress: bool = True,
    **choice: Any,
) -> Report:
    """Write a report of a feature store: searchable list of features, cards, summary; returns its path and size.

    The report opens from the disk and loads nothing from the network. Text from outside is escaped.

    Args:
        store: feature store to report on.
        out: folder to write to, or a single page where it ends in .html.
        model: language model of the store; with `sae`, cards also show the tokens that a feature promotes.
        labels: text by feature, or a label database; None takes the chosen labels of the store's own.
        features: numbers of the features; None takes all.
        sae: the SAE that the store was harvested with; similar features are then found by decoder direction, without it
            by correlation of codes.
        prompts: texts shown token by token; needs `sae` and `model`.
        evaluation: result of `evaluate`, shown in the summary.
        near: result of `nearest_features` to show as similar features instead.
        compare: another store of the same text; each card then shows the best partner there, and the list its
            similarity.
        comparison: result of `compare(store, other)` for the two stores; None computes it with default options.
        title: title of the page; empty names the store.
        progress: whether to show progress bars.
        **choice: options of `max_activating_examples`, such as `n_top`.

    Raises:
        ValueError: a feature does not exist, the SAE or model is not the store's, prompts are given without SAE and
            model, the stores do not compare or are not those of `comparison`, `out` holds something other than a
            report, or another process is writing there.
        TimeoutError, PermissionError: as in `LabelStore`.
    """
    model = model if model is None else as_model(model)
    everything = range(store.d_sae)
    wanted = list(dict.fromkeys(read_features(everything if features is None else features, store.d_sae)))
    _check(store, wanted, sae, model, prompts)
    names = _read_names(store, labels)
    with _claim(Path(out)) as target:
        matched = _match(store, compare, comparison, progress)
        near = near or (nearest_features(sae) if sae is not None else nearest_features(store))
        lens = logit_lens(sae, model, wanted, allow_mismatch=True) if sae is not None and model is not None else None
        found = dead_features(store, sae)
        shown = [] if sae is None or model is None else read_prompts(sae, model, prompts, store.provenance)
        cards = _cards(store, wanted, names, lens, near, choice, found, matched, progress)
        summary = summarize(store, found, evaluation) + (matched.summarize() if matched else "")
        compared = matched.comparison.similarity if matched else None
        return _write(_Page(title or _name(store), summary, shown, compared), target, cards, len(wanted))


@dataclass(frozen=True)
class _Name:
    """Display name of a feature, and the labels that it comes from, where these are known."""

    text: str
    labels: Sequence[Label] = ()


def _read_names(store: FeatureStore, labels: Mapping[int, str] | LabelStore | None) -> dict[int, _Name]:
    if labels is not None and not isinstance(labels, LabelStore):
        return {feature: _Name(text) for feature, text in labels.items()}
    if labels is None:
        with LabelStore.open(store) as book:
            return _read_names(store, book)
    chosen = groupby(labels, key=lambda label: label.feature)
    return {feature: _Name(join_texts(own), own) for feature, group in chosen for own in [list(group)]}


def _match(
    store: FeatureStore, other: FeatureStore | None, comparison: Comparison | None, progress: bool
) -> Matched | None:
    if other is None:
        if comparison is not None:
            raise ValueError("`comparison` needs the other store as `compare`, got none; give both.")
        return None
    called = {feature: name.text for feature, name in _read_names(other, None).items()}
    return Matched.make(store, other, comparison, called, progress)


@dataclass(frozen=True)
class _Page:
    """Parts of a report other than its features."""

    title: str
    summary: str
    prompts: list[dict[str, Any]]
    compared: str | None
    """similarity by which features have partners; None without a comparison"""

    def fill(self, rows: list[dict[str, Any]], files: list[str], cards: Mapping[int, Any]) -> str:
        data = {"features": rows, "files": files, "per_file": PER_FILE, "prompts": self.prompts}
        data["compared"] = self.compared
        return fill_page(self.title, self.summary, data, cards)


def _name(store: FeatureStore) -> str:
    origin, cfg = store.provenance, store.manifest.sae["config"]
    return f"{cfg['d_sae']:,} features at {origin.hook_point} of {Path(origin.model).name}"


def _check(
    store: FeatureStore, wanted: list[int], sae: "SAE | None", model: "Model | None", prompts: Sequence[str]
) -> None:
    if not wanted:
        raise ValueError("`features` must name at least one feature, got none.")
    if prompts and (sae is None or model is None):
        raise ValueError("`prompts` are encoded again, so they need `sae` and `model`, got none; give both.")
    if sae is not None:
        require_harvested(store, sae)
    if model is not None:
        match_weights(store.provenance, model)


@contextmanager
def _claim(out: Path) -> Iterator[Path]:
    """Context manager for the report's path, with its folder locked; ValueError where other files would be lost."""
    if out.suffix == ".html":
        yield out
        return
    if out.is_file():
        raise ValueError(f"`out` must be a folder, or a page that ends in .html, got the file {out}. Choose another.")
    with hold_folder(out):
        settle(out)
        held = read_json(out / NAME) if (out / NAME).is_file() else {}
        if not is_empty(out) and not (isinstance(held, dict) and held.get("kind") == "report"):
            raise ValueError(f"`out` must be empty or hold a report, got {out}. Choose another folder.")
        yield out


def _cards(
    store: FeatureStore,
    wanted: list[int],
    names: Mapping[int, _Name],
    lens: LogitLens | None,
    near: NearestFeatures,
    choice: dict[str, Any],
    found: DeadFeatures,
    matched: Matched | None,
    progress: bool,
) -> Cards:
    """Each feature's row of the list and its card."""
    from tqdm.auto import tqdm

    texts = {j: name.text for j, name in names.items()}
    cards = describe_features(store, wanted, labels=texts, lens=lens, neighbors=near, **choice)
    for card in tqdm(cards, total=len(wanted), unit=" features", disable=hidden(progress)):
        j = card.feature
        labels = names[j].labels if j in names else ()
        row = _row(card, found, labels) | (matched.describe(j) if matched else {})
        yield row, describe_card(card, labels, matched.describe_partners(card) if matched else ())


def _write(page: _Page, target: Path, cards: Cards, n_features: int) -> Report:
    if target.suffix == ".html":
        return _write_page(page, target, cards)
    with replace_folder(target, last=PAGE, stale=FILES) as folder:
        if n_features <= ON_ONE_PAGE:
            _write_page(page, folder / PAGE, cards)
        else:
            rows, files = _write_files(folder, cards)
            write_atomic(folder / PAGE, page.fill(rows, files, {}).encode())
        write_atomic(folder / NAME, to_json({"kind": "report", "title": page.title}).encode())
    n_bytes = sum(file.stat().st_size for pattern in FILES for file in target.glob(pattern))
    return Report(page=str(target / PAGE), n_features=n_features, n_bytes=n_bytes)


def _write_page(page: _Page, path: Path, cards: Cards) -> Report:
    rows, drawn = [], {}
    for row, card in cards:
        rows.append(row)
        drawn[row["feature"]] = card
    text = page.fill(rows, [], drawn).encode()
    write_atomic(path, text)
    return Report(page=str(path), n_features=len(rows), n_bytes=len(text))


def _write_files(folder: Path, cards: Cards) -> tuple[list[dict[str, Any]], list[str]]:
    """Write cards into scripts of `PER_FILE`, one in memory at a time; returns the rows of the list and file names."""
    rows: list[dict[str, Any]] = []
    files: list[str] = []
    drawn: dict[int, dict[str, Any]] = {}

    def flush() -> None:
        if drawn:
            files.append(f"cards-{len(files):04d}.js")
            write_atomic(folder / files[-1], as_script(drawn).encode())
            drawn.clear()

    for row, card in cards:
        rows.append(row)
        drawn[row["feature"]] = card
        if len(drawn) == PER_FILE:
            flush()
    flush()
    return rows, files


def _row(card: FeatureCard, found: DeadFeatures, labels: Sequence[Label] = ()) -> dict[str, Any]:
    """A feature's row of the list, with the words that the search covers."""
    groups = [group.examples for group in card.examples.groups if group.name == "top"]  # the strong side first
    tops = [example for group in groups for example in group[: N_SEARCHED // len(groups)]]
    snippet = ["", "", ""]
    if tops:
        words, center = tops[0].words, tops[0].center
        snippet = ["".join(words[:center])[-SNIPPET:], words[center], "".join(words[center + 1 :])[:SNIPPET]]
    n_positive, n_negative = (sum(side.n_firings for side in card.sides if side.sign == sign) for sign in (1, -1))
    row = {
        "feature": card.feature,
        "label": card.label,
        "snippet": [part.replace("\n", " ") for part in snippet],
        "search": " ".join(dict.fromkeys(" ".join(example.text for example in tops).casefold().split())),
        "density": float(f"{card.density:.6g}"),
        "n_positive": n_positive,
        "n_negative": n_negative,
        "balance": shorten(n_negative / card.n_firings) if card.n_firings else None,
        "peak": float(f"{max((side.peak for side in card.sides), default=0.0):.6g}"),
        "kind": found.kinds[card.feature],
    }
    scores = [score for label in labels if (score := main_score(label)) is not None]
    if scores:
        row["score"] = shorten(sum(scores) / len(scores))
    if labels:
        row["authors"] = list(dict.fromkeys(shareable(label.author) for label in labels))
        row["by_person"] = any(label.by_person for label in labels)
    return row
