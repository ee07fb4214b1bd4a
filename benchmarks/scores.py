"""Write the score tables of README.md and of the model cards from the committed results of `savl evaluate --json`.

python benchmarks/scores.py          # rewrite the tables between the markers
python benchmarks/scores.py --check  # only say whether they are up to date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "savl" / "weights" / "scores"
MARKED = re.compile(r"(?<=<!-- scores -->\n).*?(?=<!-- /scores -->)", re.DOTALL)


def table(model: str) -> str:
    """Markdown table of a model's committed results, bicubic beside it."""
    lines = [
        f"| images | bicubic PSNR Y / SSIM Y / PSNR RGB | {model} PSNR Y / SSIM Y / PSNR RGB | gain, dB Y |",
        "|---|---|---|---:|",
    ]
    for path in sorted((RESULTS / model).glob("*.json")):
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        bicubic, scores = report["mean"]["bicubic"], report["mean"][model]
        gain = scores["psnr_y"] - bicubic["psnr_y"]
        lines.append(
            f"| {path.stem} ({len(report['images'])}) | {_row(bicubic)} | {_row(scores)} | {gain:+.2f} |",
        )
    return "\n".join(lines) + "\n"


def _row(scores: dict[str, float]) -> str:
    return f"{scores['psnr_y']:.2f} / {scores['ssim_y']:.4f} / {scores['psnr_rgb']:.2f}"


def documents() -> dict[Path, str]:
    """Every document with a score table, and what it should say."""
    found = {ROOT / "README.md": "savl-tiny"}
    found |= {path: path.stem for path in (ROOT / "savl" / "weights").glob("*.md")}
    # A function as replacement: a string would have its backslashes interpreted.
    return {path: MARKED.sub(lambda _, m=model: table(m), path.read_text("utf-8")) for path, model in found.items()}


def main() -> int:
    """Rewrite or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if a table is out of date")
    check = parser.parse_args().check
    old = {path: path.read_text(encoding="utf-8") for path in documents()}
    stale = [path for path, text in documents().items() if text != old[path]]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'out of date' if check else 'rewritten'}")
        if not check:
            path.write_text(documents()[path], encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
