"""Published SAEs by the names that SAELens gives them: a table in the package, made by `scripts/refresh_releases.py`.

`releases.json` has an entry per release: the repository, the model, and for each SAE its id, path, hook point, layer,
width, L0, unexplained variance and Neuronpedia id as far as they are known. One value stands for all ids, a list has
one for each; `{id}` and `{layer}` are filled in. `missing` names what the SAE's files leave out, `unread` says why
saelab refuses them. Nothing here needs the Hub.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from saelab.sae.formats.origin import ALIASES
from saelab.stores.results import Result, format_table
from saelab.stores.validation import read_json

TABLE = Path(__file__).parent / "releases.json"
LISTED = 40  # SAEs of several releases up to which each has a line
SHOWN = 100  # lines at most
CANDIDATES = 60  # names that are compared letter by letter


@dataclass(frozen=True, kw_only=True)
class PublishedSAE:
    """One published SAE: `SAE.from_pretrained(release, id)` loads it. What is unknown without its files is None."""

    release: str
    """name of the release"""
    id: str
    """name in the release"""
    repo: str
    """Hub repository 'owner/name'"""
    path: str
    """sub-folder or file in the repository"""
    model: str
    """Hub id of the model that it is for"""
    hook_point: str | None = None
    """hook point that it reads"""
    hook_point_out: str | None = None
    """hook point that a transcoder writes"""
    layer: int | None = None
    """layer of the hook point; None for the embedding"""
    d_sae: int | None = None
    """number of latents, as far as names say it"""
    l0: float | None = None
    """latents that fire for a token, on average, as its authors measured it"""
    fvu: float | None = None
    """unexplained share of the variance, as its authors measured it"""
    neuronpedia: str | None = None
    """id of its dashboards on neuronpedia.org"""
    unread: str | None = None
    """why saelab cannot load it; None where it can"""


@dataclass(frozen=True)
class PublishedSAEs(Result):
    """Published SAEs that were searched for, to iterate over; printed as a table, of releases where there are many."""

    saes: tuple[PublishedSAE, ...]
    """the SAEs, release by release"""
    near: tuple[str, ...] = ()
    """names of releases near what was searched for, where nothing was found"""

    @property
    def releases(self) -> tuple[str, ...]:
        """Names of their releases."""
        return tuple(dict.fromkeys(sae.release for sae in self.saes))

    def __iter__(self) -> Iterator[PublishedSAE]:
        return iter(self.saes)

    def __len__(self) -> int:
        return len(self.saes)

    def __getitem__(self, index: int) -> PublishedSAE:
        return self.saes[index]

    def __str__(self) -> str:
        if not self.saes:
            return f"No published SAE has all of these. {suggest(self.near)}".rstrip()
        whole = len(self) > LISTED and len(self.releases) > 1
        rows = _describe_releases(self.saes) if whole else [_describe(sae) for sae in self.saes]
        head = ["release", "model", "hook points", "layers", "d_sae", "SAEs", ""] if whole else [*COLUMNS, ""]
        lines = format_table([head, *rows[:SHOWN]], left=(0, 1, 2, 6) if whole else (0, 1, 2, 3, 6))
        if (n_more := len(rows) - SHOWN) > 0:
            lines.append(f"... and {n_more:,} more: narrow the search, or iterate")
        return "\n".join([*lines, f"{_count(len(self), 'SAE')} of {_count(len(self.releases), 'release')}"])


COLUMNS = ("release", "id", "model", "hook point", "d_sae", "L0")


def _describe(sae: PublishedSAE) -> list[str]:
    place = f"{sae.hook_point or ''} -> {sae.hook_point_out}" if sae.hook_point_out else sae.hook_point or ""
    numbers = [f"{sae.d_sae:,}" if sae.d_sae else "", f"{sae.l0:g}" if sae.l0 is not None else ""]
    return [sae.release, sae.id, sae.model, place, *numbers, "not read" if sae.unread else ""]


def _describe_releases(saes: Iterable[PublishedSAE]) -> list[list[str]]:
    groups: dict[str, list[PublishedSAE]] = {}
    for sae in saes:
        groups.setdefault(sae.release, []).append(sae)
    return [
        [
            name,
            group[0].model,
            ", ".join(sorted({(sae.hook_point or "").split(".", 2)[-1] for sae in group})),
            _span([sae.layer for sae in group if sae.layer is not None]),
            _span([sae.d_sae for sae in group if sae.d_sae is not None]),
            f"{len(group):,}",
            "not read" if group[0].unread else "",
        ]
        for name, group in groups.items()
    ]


def _span(values: list[int]) -> str:
    """Smallest and largest of some numbers, as '0-25'."""
    return "-".join(f"{value:,}" for value in dict.fromkeys((min(values), max(values)))) if values else ""


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


@cache
def read_table() -> dict[str, dict[str, Any]]:
    """Entries of the table by name of the release."""
    return dict(read_json(TABLE)["releases"])


def pick(entry: dict[str, Any], field: str, i: int) -> Any:
    """Value of a field for the i-th SAE of a release, filled in; None where nothing is known."""
    value = entry.get(field)
    if isinstance(value, list) and field != "missing":
        value = value[i]
    return value.format(id=entry["id"][i], layer=pick(entry, "layer", i)) if isinstance(value, str) else value


@cache
def _list(release: str) -> dict[str, PublishedSAE]:
    """SAEs of a release by their ids."""
    entry = read_table()[release]
    named = ("repo", "path", "model", "hook_point", "hook_point_out", "layer", "d_sae", "l0", "fvu", "neuronpedia")
    return {
        id: PublishedSAE(release=release, id=id, **{name: pick(entry, name, i) for name in (*named, "unread")})
        for i, id in enumerate(entry["id"])
    }


def find_published(release: str, id: str | None) -> PublishedSAE | None:
    """The SAE of a listed release; None where no release has that name, ValueError, with near ids, for an id that the
    release lacks.
    """
    if release not in read_table():
        return None
    saes = _list(release)
    if id not in saes:
        near = find_near(id, saes) if id is not None else ()
        hint = suggest(near or tuple(saes)[:5], "Did you mean" if near else "There are")
        raise ValueError(
            f"`name` must be an id of release '{release}', got {id!r}. {hint} "
            f"sl.list_releases('{release}') lists all {len(saes):,}."
        )
    return saes[id]


def find_near(text: str, names: Iterable[str]) -> tuple[str, ...]:
    """At most five of the names that differ from a text by little, nearest first.

    Names are compared letter by letter only where they share most runs of three letters with the text: comparing all
    would take seconds.
    """

    def cut(name: str) -> set[str]:
        return {name[i : i + 3] for i in range(max(1, len(name) - 2))}

    wanted = cut(text.lower())
    by_lower: dict[str, str] = {name.lower(): name for name in names}
    ranked = sorted(by_lower, key=lambda name: (len(wanted ^ cut(name)), name))[:CANDIDATES]
    return tuple(by_lower[name] for name in get_close_matches(text.lower(), ranked, n=5, cutoff=0.6))


def suggest(names: Iterable[str], before: str = "Did you mean") -> str:
    """A sentence that names some, or nothing without any."""
    given = ", ".join(names)
    return (f"{before} one of: {given}?" if before.startswith("Did") else f"{before}: {given}, ...") if given else ""


def list_releases(
    search: str | None = None,
    *,
    model: str | None = None,
    layer: int | None = None,
    hook_point: str | None = None,
    d_sae: int | None = None,
) -> PublishedSAEs:
    """Published SAEs that `SAE.from_pretrained(release, id)` finds, as SAELens names them; the Hub is not asked.

    Some are in formats that saelab does not read: `unread` says why. Releases of `register_release` are rules, and not
    listed.

    Args:
        search: words that the names of release, SAE, model and repository must contain, in any case, or the whole
            name of one release; None is all.
        model: Hub id of the model, or its last part; None is any.
        layer: layer of the hook point; None is any.
        hook_point: hook point that they read, or its end, such as "hook_resid_post"; None is any.
        d_sae: number of latents, where names say it; None is any.

    Raises:
        ValueError: for a model that no published SAE is for, with near names.

    >>> found = sl.list_releases("gemma scope 2b pt res canonical", layer=12, d_sae=16384)
    >>> [(sae.release, sae.id, sae.l0) for sae in found]
    [('gemma-scope-2b-pt-res-canonical', 'layer_12/width_16k/canonical', 82.0)]
    """
    words, wanted = (search or "").lower().split(), _find_model(model)
    found = []
    whole = next((name for name in read_table() if search and name.lower() == search.lower()), None)
    for release in read_table() if whole is None else [whole]:
        for sae in _list(release).values():
            if wanted is not None and sae.model.lower() not in wanted:
                break  # a release is of one model
            if (layer is not None and sae.layer != layer) or (d_sae is not None and sae.d_sae != d_sae):
                continue
            if hook_point is not None and not f".{sae.hook_point}".endswith(f".{hook_point}"):
                continue
            names = f"{release} {sae.id} {sae.model} {sae.repo} {sae.neuronpedia or ''}".lower()
            if all(word in names for word in words):
                found.append(sae)
    near = find_near(search, read_table()) if search and not found else ()
    return PublishedSAEs(tuple(found), near)


def _find_model(name: str | None) -> set[str] | None:
    """Hub ids, in lower case, that a model's name stands for."""
    if name is None:
        return None
    ids = {entry["model"] for entry in read_table().values()}
    wanted = ALIASES.get(name, name).lower()
    found = {id.lower() for id in ids if wanted in (id.lower(), id.lower().rpartition("/")[2])}
    if not found:
        near = find_near(name, {last: last for id in ids for last in (id, id.rpartition("/")[2])})
        raise ValueError(f"`model` must be one that published SAEs are for, got '{name}'. {suggest(near)}".rstrip())
    return found
