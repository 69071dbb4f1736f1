"""Every family and every use, as a page: `python tests/families/run.py` writes docs/supported_models.md."""

import argparse
import datetime
import json
import logging
import re
import sys
import time
import traceback
import warnings
from importlib.metadata import version
from multiprocessing import TimeoutError, get_context
from pathlib import Path
from typing import Any, get_args

import torch
from family import WIDTH, Family, Wrong
from table import VARIANTS, build, list_architectures, list_unbridged
from uses import USES

import saelab
from saelab.lm.loading_guards import no_processes
from saelab.lm.models import Backend

PAGE = Path(__file__).parents[2] / "docs" / "supported_models.md"
SAELAB = Path(saelab.__file__).parent
MARKS = {"right": "yes", "refused": "refused", "wrong": "WRONG"}


def judge(name: str, backend: str = "auto") -> dict[str, tuple[str, str]]:
    """Verdict and reason of each use; of "loading" alone where that ends it, and of nothing for what is untested.

    What was warned of on the way stands beside them as "warned".
    """
    try:
        theirs = build(name)
    except Exception as error:
        return {"untested": ("untested", _line(error))}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = _use(theirs, backend)
    told = dict.fromkeys(f"{one.category.__name__}: {_shorten(str(one.message))}" for one in said)
    return found | ({"warned": ("warned", "; ".join(told))} if told else {})


def _use(theirs: Any, backend: str) -> dict[str, tuple[str, str]]:
    try:
        with no_processes():
            family = Family(theirs, backend)
    except Exception as error:
        return {"loading": (_tell(error), _line(error))}
    if (width := family.width) not in (None, WIDTH):
        return {"untested": ("untested", f"its blocks hand on vectors of width {width}, the edits have {WIDTH}")}
    found = {}
    for use, check in USES.items():
        try:
            check(family)
            found[use] = ("right", "")
        except Exception as error:
            found[use] = (_tell(error), _line(error))
    return found


def _tell(error: Exception) -> str:
    """A refusal is a sentence of saelab's own, raised by it; whatever comes out of a library below is wrong."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    told = str(error)
    said = any(rule in told for rule in (" got ", "must fire exactly once", "must carry one vector"))
    said = said and "unexpected keyword" not in told
    known = isinstance(error, ValueError | TypeError | RuntimeError)
    return "refused" if known and said and SAELAB in raised_in.parents else "wrong"


def _line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    kind = "" if isinstance(error, Wrong | ValueError) else f"{type(error).__name__}: "
    return _shorten(kind + text)


def _shorten(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:240]


def write(found: dict[str, dict[str, tuple[str, str]]], page: Path) -> None:
    """The table of families by uses, and the reasons below it, each once for a family."""
    tested = {name: row for name, row in found.items() if set(row) >= set(USES)}
    cells = [row[use][0] for row in tested.values() for use in USES]
    counts = ", ".join(f"{cells.count(kind)} {kind}" for kind in MARKS)
    versions = ", ".join(f"{p} {version(p)}" for p in ("transformers", "transformer-lens", "torch"))
    others = {kind: {n: row[kind] for n, row in found.items() if kind in row} for kind in ("loading", "untested")}
    lines = [
        "# Model families",
        "",
        f"Written by `make families` on {datetime.date.today()} with {versions}. Not edited by hand.",
        "",
        f"Tiny random models of the {sum(',' not in name for name in found)} text architectures of transformers, "
        f"{len(set(list_unbridged()) & set(found))} of them without a bridge in transformer_lens, and of "
        f"{sum(',' in name for name in found)} other members of some: {len(tested)} tried in {len(USES)} "
        f"uses ({counts}), {len(others['loading'])} not loaded, {len(others['untested'])} untested. Each "
        "cell is held against Hugging Face's own modules, or a derivative measured on the model; what is not right is "
        "refused in a sentence of saelab's own.",
        "",
        "| family | " + " | ".join(USES) + " |",
        "|---" * (len(USES) + 1) + "|",
    ]
    lines += [f"| {n} | " + " | ".join(MARKS[row[use][0]] for use in USES) + " |" for n, row in tested.items()]
    lines += ["", "What is done in each use:", ""]
    lines += [f"- {use}: {' '.join((check.__doc__ or '').split())}" for use, check in USES.items()]
    lines += ["", "## What is refused, or wrong", "", *_list_reasons(tested)]
    lines += ["", "## Not loaded", "", *(f"- {n}: {v}: {why}" for n, (v, why) in others["loading"].items())]
    if others["untested"]:
        lines += ["", "## Untested", "", "No tiny model of these was made.", ""]
        lines += [f"- {n}: {why}" for n, (_, why) in others["untested"].items()]
    if told := [f"- {n}: {row['warned'][1]}" for n, row in found.items() if "warned" in row]:
        lines += ["", "## What was warned of", "", *told]
    page.parent.mkdir(exist_ok=True)
    page.write_text("\n".join(lines) + "\n")


def _list_reasons(tested: dict[str, dict[str, tuple[str, str]]]) -> list[str]:
    """One line for each family and sentence, however many uses it ends; numbers and hook points in it are the first."""
    alike: dict[tuple[str, str, str], tuple[list[str], str]] = {}
    for name, row in tested.items():
        for use in USES:
            verdict, why = row[use]
            if verdict != "right":
                uses, _ = alike.setdefault((name, verdict, re.sub(r"\d|_in|_out", "", why)), ([], why))
                uses.append(use)
    return [f"- {n} ({', '.join(uses)}): {verdict}: {why}" for (n, verdict, _), (uses, why) in alike.items()]


def _be_quiet() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--seconds", type=float, default=3600.0, help="families that take longer are untested")
    parser.add_argument("--backend", choices=get_args(Backend), default="auto")
    parser.add_argument("--each", type=float, default=120.0, help="seconds to wait for one family")
    parser.add_argument("--keep", type=Path, help="verdicts as JSON; families that are there are not tried again")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    _be_quiet()
    names, begin = options.only or [*list_architectures(), *list_unbridged(), *VARIANTS], time.monotonic()
    left = {"untested": ("untested", "the run was ended before it")}
    kept = json.loads(options.keep.read_text()) if options.keep and options.keep.is_file() else {}
    found = dict.fromkeys(names, left) | {name: kept[name] for name in names if name in kept}
    with get_context("fork").Pool(options.workers) as pool:
        waiting = {name: pool.apply_async(judge, (name, options.backend)) for name in names if name not in kept}
        for name, result in waiting.items():
            try:
                left_s = options.seconds - (time.monotonic() - begin)
                found[name] = result.get(max(0.01, min(options.each, left_s)))
            except TimeoutError:
                continue
            kept[name] = found[name]
            if options.keep:
                options.keep.write_text(json.dumps(kept))
            told = " ".join(f"{use}={v}" + (f" [{why[:150]}]" if why else "") for use, (v, why) in found[name].items())
            print(name, told, flush=True)  # noqa: T201
        pool.terminate()
    write(found, options.page)
    return int(any(verdict == "wrong" for row in found.values() for verdict, _ in row.values()))


if __name__ == "__main__":
    sys.exit(main())
