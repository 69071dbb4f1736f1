"""Pages for tests that drive them in a browser."""

import base64
import hashlib


def with_script(page: str, script: str) -> str:
    """The page with one more script, which its policy allows."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = page.replace("script-src ", f"script-src &#x27;sha256-{digest}&#x27; ", 1)
    return allowed.replace("</body>", f"<script>{script}</script></body>")
