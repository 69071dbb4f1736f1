"""Families of features as nested lists, which Jupyter shows for the result of `find_families`."""

from saelab.corpora.feature_families import Family, FeatureFamilies
from saelab.stores.results import register_drawing
from saelab.visualization.html import escape

MOST_FAMILIES, MOST_CHILDREN = 30, 200
"""of a result, and of a family, that are drawn"""


def draw_families(found: FeatureFamilies) -> str:
    """The families as an HTML list that unfolds, a tree each; labels are escaped."""
    lines = [f"<p>{escape(str(found).splitlines()[0])}</p>"]
    lines += [_draw_family(one) for one in found.families[:MOST_FAMILIES]]
    if (left := len(found.families) - MOST_FAMILIES) > 0:
        lines.append(f"<p>{left:,} smaller families are not shown.</p>")
    return "\n".join(lines)


def _draw_family(one: Family) -> str:
    below: dict[int, list[int]] = {}
    for i, above in enumerate(one.above[:MOST_CHILDREN]):
        below.setdefault(above, []).append(i)

    def draw(above: int) -> str:
        items = (
            f"<li>{_name(one.children[i], one.names[i])}{draw(i) if i in below else ''}</li>" for i in below[above]
        )
        return f"<ul>{''.join(items)}</ul>"

    left = len(one.children) - MOST_CHILDREN
    figures = (
        f"{len(one.children):,} below, {one.n_documents:,} documents, overlap {one.inside:.2f} inside and "
        f"{one.outside:.3f} outside, excess {one.excess:+.1f}, q {one.q:.2g}"
    )
    return (
        f"<details><summary>{_name(one.parent, one.name)} <small>{figures}</small></summary>{draw(-1)}"
        f"{f'<p>{left:,} more</p>' if left > 0 else ''}</details>"
    )


def _name(side: tuple[int, int], label: str) -> str:
    return escape(" ".join([str(side[0]), *(["\u2212"] if side[1] < 0 else []), *([label] if label else [])]))


register_drawing(FeatureFamilies, draw_families)
