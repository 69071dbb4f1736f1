"""Screenshots of every view of the explorer for the documentation: light, dark and on a phone.

    python scripts/shoot_explorer.py STORE MODEL --feature 12 --prompt "Tom saw a dog."

Chromium of this machine draws them; pictures are stored with a palette where pillow is installed. Look at each before
it is kept.
"""

import argparse
import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import saelab as sl

MODES: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1100, "height": 760}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1100, "height": 760}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 640}, "color_scheme": "light"},
}
COLORS = 128
PAUSE = 1500  # ms for figures, and for what fades


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("store")
    words.add_argument("model")
    words.add_argument("--feature", type=int, default=0)
    words.add_argument("--prompt", default="Once upon a time")
    words.add_argument("--compare")
    words.add_argument("--evaluation")
    words.add_argument("--attribution")
    words.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    given = words.parse_args()
    results = {name: getattr(given, name) for name in ("compare", "evaluation", "attribution")}
    with sl.explore(given.store, sl.load_model(given.model, progress=False), port=0, **results) as server:
        while server.explorer.comparison_state == "comparing":
            time.sleep(0.2)
        shoot(server.url, given)


def addresses(given: argparse.Namespace) -> dict[str, str]:
    moved = {"feature": given.feature, "strength": 1.5, "mode": "add", "unit": "max"}
    setup = {"prompt": given.prompt, "features": [moved], "n_tokens": 30, "temperature": 0.7}
    found = {
        "features": "#/features",
        "feature": f"#/feature/{given.feature}",
        "prompt": f"#/prompt?text={given.prompt}",
        "steer": f"#/steer?setup={json.dumps(setup)}",
        "dead": "#/dead",
        "lists": "#/lists",
    }
    return found | {name: f"#/{name}" for name in ("evaluation", "compare", "attribution") if getattr(given, name)}


def shoot(url: str, given: argparse.Namespace) -> None:
    from playwright.sync_api import sync_playwright

    chromium = next(path for name in ("chromium", "google-chrome") if (path := shutil.which(name)))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for mode, how in MODES.items():
            page = browser.new_page(**how)
            page.set_default_timeout(60_000)
            for view, address in addresses(given).items():
                page.goto("about:blank")
                page.goto(url + address)
                page.wait_for_load_state("networkidle")
                if view == "steer":
                    page.get_by_role("button", name="Write").click()
                    page.locator(".costs").first.wait_for()
                    page.locator(".streams").scroll_into_view_if_needed()
                page.wait_for_timeout(PAUSE)
                path = given.out / f"explorer-{view}-{mode}.png"
                path.write_bytes(shrink(page.screenshot()))
                print(f"{path} {path.stat().st_size / 1024:.0f} KiB")
            page.close()
        browser.close()


def shrink(png: bytes) -> bytes:
    """The picture with a palette of few colors."""
    try:
        from PIL import Image
    except ImportError:
        return png
    packed = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(
        packed, "png", optimize=True
    )
    return packed.getvalue()


if __name__ == "__main__":
    main()
