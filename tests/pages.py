"""Pages for tests that drive them in a browser."""

import base64
import gzip
import hashlib
import html
import json
import re
from typing import Any


def with_script(page: str, script: str) -> str:
    """The page with one more script, which its policy allows."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = page.replace("script-src ", f"script-src &#x27;sha256-{digest}&#x27; ", 1)
    return allowed.replace("</body>", f"<script>{script}</script></body>")


def check_policy(page: str) -> None:
    """Every script that would run has its hash in the page's policy, which lets nothing else run."""
    policy = html.unescape(re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[0])
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and "unsafe" not in rules["script-src"] and rules["base-uri"] == "'none'"
    scripts = re.findall(r"<script(?![^>]*application/json)[^>]*>(.*?)</script>", page, re.S)
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in rules["script-src"]
    assert scripts or rules["script-src"] == "'none'"
    assert not re.search(r"<[^>]*\son\w+=", re.sub(r"<script.*?</script>", "", page, flags=re.S))


def read_cards(text: str) -> dict[int, dict[str, Any]]:
    """The cards of a report's page, or of a file beside it, by feature."""
    packed = re.search(r'(?:id="cards">|^addCards\()"([^"<]*)"', text)
    assert packed is not None
    cards = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    return {int(feature): card for feature, card in cards.items()}


def read_window(window: list[Any]) -> tuple[list[str], list[float], int]:
    """The texts of a card's window, their codes, and which of them is the center."""
    _row, center, *parts = window
    texts, values = [], []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            values.append(0.0)
        else:
            values[-1] = part
    return texts, values, center
