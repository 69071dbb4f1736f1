"""Puts a picture beside every figure that notebooks hold: `python scripts/draw_pictures.py notebooks/*.ipynb`.

GitHub and other viewers that do not run plotly show the picture. Notebooks that run with matplotlib installed store it
by themselves, where the figure is saelab's; this draws those of any plotly figure from what is stored, without running
anything.
"""

import argparse
import base64
import json
from pathlib import Path
from typing import Any

from saelab.stores.files import write_atomic
from saelab.visualization.pictures import draw_picture

PLOTLY = "application/vnd.plotly.v1+json"


def main() -> None:
    """Draw the figures of the notebooks named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    for path in parser.parse_args().notebooks:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        n = sum(draw(output) for cell in notebook["cells"] for output in cell.get("outputs", []))
        if n:
            text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"  # as nbformat writes it
            write_atomic(path, text.encode())
        print(f"{path}: {n} pictures")


def draw(output: dict[str, Any]) -> bool:
    """Put a picture into an output that holds a figure; whether it does."""
    data = output.get("data", {})
    if PLOTLY not in data:
        return False
    data["image/png"] = base64.b64encode(draw_picture(data[PLOTLY])).decode()
    return True


if __name__ == "__main__":
    main()
