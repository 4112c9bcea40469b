"""Make docs/config.md from the comments of GaCLLM.yaml and the presets.

python docs/make_config_page.py            write it
python docs/make_config_page.py --check    exit with 1 if it is not up to date
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "config.md"
HEAD = """\
# Configuration

Made from `properties/model/GaCLLM.yaml` by `python docs/make_config_page.py`; do not edit.

Keys are flat, as in RecBole, and are given as flags (`--n_neighbors=8`), in yaml files
(`--config_files="a.yaml b.yaml"`) or in a dictionary. From weak to strong: RecBole's
`overall.yaml`, these defaults, the preset, the dataset config, your files, your dictionary, your
flags. An unknown key with one of our prefixes is refused. All keys of RecBole work as ever.
"""
LINE = re.compile(r"^(?P<key>\w+): (?P<value>.*?)\s+# \((?P<type>[\w ]+)\) (?P<meaning>.+)$")


def page() -> str:
    """The text of docs/config.md."""
    defaults = ROOT / "properties" / "model" / "GaCLLM.yaml"
    parts = [HEAD]
    for line in defaults.read_text(encoding="utf-8").splitlines()[1:]:
        found = LINE.match(line)
        if found:
            value = "" if found["value"] == "~" else f"`{found['value']}`"
            meaning = found["meaning"].replace("|", "\\|")
            parts.append(f"| `{found['key']}` | {found['type']} | {value} | {meaning} |")
        elif line.startswith("# "):
            heading = f"\n## {line[2:]}\n\n"
            parts.append(heading + "| key | type | default | meaning |\n|---|---|---|---|")
        elif line:
            raise SystemExit(f"{defaults}: a line without key, type and meaning: {line!r}")
    parts.append("\n## Presets\n")
    for file in sorted((ROOT / "properties" / "presets").glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        words = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
        keys = ", ".join(f"`{key}: {value}`" for key, value in yaml.safe_load(text).items())
        parts.append(f"- **{file.stem}**: {words} ({keys})")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        raise SystemExit(f"{PAGE} is not up to date: run python docs/make_config_page.py")
