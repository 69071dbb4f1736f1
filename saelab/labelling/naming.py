"""Names of rules in English."""

import re
from collections.abc import Sequence

TOKEN = "the token "
FAMILIES = (TOKEN, "after the token ", "before the token ", "the word ", "the last token of the word ")
QUOTED = re.compile(r"'([^']+)'|\"([^\"]+)\"")


def name_rule(names: Sequence[str], joined: str) -> str:
    """A rule in English, from the names of its predicates.

    >>> name_rule(["the token ' cat'", "the token ' dog'"], "or"), name_rule(["numbers", "in a question"], "and")
    ("the token ' cat' or ' dog'", 'numbers and also in a question')
    >>> name_rule(["after the token ' th'", "the token 'at'"], "and")
    "the token 'at' after ' th'"
    """
    if joined == "and":
        return _name_both(*names)
    lead = next((lead for lead in FAMILIES if all(name.startswith(lead) for name in names)), "")
    tails = [name[len(lead) :] for name in names]
    return lead + ", ".join(tails[:-1]) + (" or " if len(tails) > 1 else "") + tails[-1]


def _name_both(first: str, second: str) -> str:
    """The conjunction of two predicates in English, shortened where one of them is a token."""
    for token, other in ((first, second), (second, first)):
        if token.startswith(TOKEN) and " after " not in token:
            if other.startswith("after " + TOKEN):
                return f"{token} after {other.removeprefix('after ' + TOKEN)}"
            if other.startswith(("words ", "the word ")):
                return f"{token} in {other}"
    return f"{first} and also {second}"


def name_output(tokens: Sequence[str]) -> str:
    """The tokens that a feature promotes, in English.

    >>> name_output([" cat", " dog"])
    "says ' cat' or ' dog'"
    """
    return "says " + name_rule([repr(token) for token in tokens[:6]], "or") if tokens else ""


def alike(a: str, b: str) -> bool:
    """Whether two names quote the same word, ignoring case, spaces and endings.

    >>> alike("the token ' cat'", "the token ' Cats'"), alike("the token ' cat'", "the token ' dog'")
    (True, False)
    """
    cores = [(match[1] or match[2]).strip().lower() for match in map(QUOTED.search, (a, b)) if match]
    if len(cores) < 2 or not all(cores):
        return False
    n = min(4, *map(len, cores))
    return cores[0][:n] == cores[1][:n] and n > 1
