"""How results are shown: by drawings of a higher floor, which nobody has to import."""

import re
import subprocess
import sys
from pathlib import Path

from saelab.stores import results

DRAWS = """
import torch
import saelab as sl

model, sae = sl.lm.tiny_model(), sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)))
found = sl.interventions.attribute(model, sae, "One", "e", hook_point="blocks.1.hook_out", progress=False)
assert not found._repr_html_().startswith("<pre>"), found._repr_html_()[:99]
"""


def test_results_draw_themselves_though_nobody_imported_the_drawings() -> None:
    subprocess.run([sys.executable, "-c", DRAWS], check=True)


def test_every_module_with_drawings_is_known() -> None:
    folder = Path(results.__file__).parents[1]
    found = {path for path in folder.rglob("*.py") if re.search(r"^register_drawing\(", path.read_text("utf-8"), re.M)}
    names = {".".join(path.relative_to(folder.parent).with_suffix("").parts) for path in found}
    assert names == set(results.DRAWN_IN)
