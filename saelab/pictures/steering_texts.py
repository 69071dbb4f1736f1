"""Steered and unsteered texts in columns, each token coloured by how steering changed its log-probability."""

from collections.abc import Mapping

from saelab.pictures.cards import STRONGEST, show_text, style_card
from saelab.pictures.page import escape, make_page
from saelab.steering.beside import UNSTEERED, SteeredTexts, TextRow, Told
from saelab.stores.results import register_drawing

SCALE = 6.0  # nats at which a colour is strongest
ROW = "border-top: 1px solid var(--rule); padding: .2rem 0 .6rem; margin: .6rem 0 0"
COLUMNS = "grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr)); gap: 0 1.6rem"


def draw_texts(texts: SteeredTexts) -> str:
    """Texts in columns as one HTML element, a card for each prompt; all text is escaped.

    A token's colour is log p' - log p, its log-probability under the steered model minus that under the unsteered one:
    orange where steering made it more likely, blue where less likely, strongest at six nats. Both are in the token's
    title. Unsteered text next to several steered ones is not coloured.
    """
    legend = "Orange: tokens that steering made likelier, blue: less likely; strongest at 6 nats."
    told = "".join(f'<p class="dim">{escape(f"{name}: {what}")}</p>' for name, what in texts.interventions.items())
    rows = "".join(_draw_row(texts, row) for row in texts.rows)
    return f'<article class="fcard">{told}<p class="dim">{legend}</p>{rows}</article>'


def _draw_row(texts: SteeredTexts, row: TextRow) -> str:
    columns = [_draw_column(UNSTEERED, f"perplexity {row.unsteered.perplexity():.3g}", row.unsteered)]
    columns += [_draw_column(name, texts.tell_cost(row, name), told) for name, told in row.steered.items()]
    prompt = f'<h3 class="win">{show_text(row.prompt)}</h3>'
    return f'<section style="{ROW}">{prompt}<div class="both" style="{COLUMNS}">{"".join(columns)}</div></section>'


def _draw_column(name: str, cost: str, told: Told) -> str:
    readers = [reader for reader in told.log_probs if reader != UNSTEERED]
    inside = []
    for i, word in enumerate(told.words):
        at = {reader: values[i] for reader, values in told.log_probs.items()}
        inside.append(_draw_token(word, at, readers[0] if len(readers) == 1 else None))
    head = f'<h4>{escape(name)}</h4><p class="dim">{escape(cost)}</p>'
    return f'<div>{head}<div class="win">{"".join(inside).lstrip()}</div></div>'


def _draw_token(word: str, log_probs: Mapping[str, float], steered: str | None) -> str:
    """A token with its log-probabilities as the title, coloured by their difference where there is one."""
    title = "log p: " + ", ".join(f"{reader} {value:.2f}" for reader, value in log_probs.items())
    change = log_probs[steered] - log_probs[UNSTEERED] if steered is not None else 0.0
    alpha = STRONGEST * min(1.0, abs(change) / SCALE)
    kind = f' class="{"p" if change > 0 else "m"}" style="--a:{alpha:.2f}"' if alpha >= 0.005 else ""
    return f'<b{kind} title="{escape(title)}">{show_text(word)}</b>'


def show_texts(texts: SteeredTexts) -> str:
    """A self-contained HTML page with steered and unsteered texts in columns; text is escaped."""
    return make_page("Steered and unsteered", texts.title, [_draw_alone(texts)])


def _draw_alone(texts: SteeredTexts) -> str:
    return style_card() + draw_texts(texts)


register_drawing(SteeredTexts, _draw_alone)
