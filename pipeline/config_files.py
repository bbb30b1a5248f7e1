"""Reads luigi.cfg and its overlays as UTF-8 with any line ends, or says in a sentence what to mend.

Luigi reads luigi.cfg while it is imported, and ends in a traceback where it cannot. So `import
pipeline` checks the file first, and this module does not import Luigi.
"""

import configparser
import json
import os
import re
from pathlib import Path
from typing import Any

from tasks.runtime.settings import json_or_text


class SettingsError(SystemExit):
    """The settings cannot be used. Ends the process with the sentence and exit code 1."""

    def __init__(self, sentence: str):
        super().__init__(f"error: {sentence}")


def read_into(config: configparser.RawConfigParser, path: Path) -> None:
    """Read a file over what `config` holds.

    Raises SettingsError for a file that is not UTF-8 or no configuration.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _place(re.sub(r"\r\n?", "\n", data[: error.start].decode("utf-8-sig")))
        raise SettingsError(f"{path}: {place} is not UTF-8; save the file as UTF-8") from error
    try:
        config.read_string(re.sub(r"\r\n?", "\n", text), str(path))
    except configparser.Error as error:
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from error


def read_overlay(config: configparser.RawConfigParser, path: Path) -> list[tuple[str, str]]:
    """Read an overlay over what `config` holds; returns the (section, key) of every value it sets.

    A key such as `trl.beta` sets one entry of the JSON object `trl`, and leaves its other entries. In a
    section such as `[Train:cub]` these are those of `[Train]`, where it has none of its own. Raises
    SettingsError as `read_into`, and for an entry of a value that is no object.
    """
    overlay = configparser.RawConfigParser()  # alone, to know which keys it sets
    for each in (overlay, config):
        read_into(each, path)
    keys = [
        (section, *key.partition(".")) for section in overlay.sections() for key in overlay[section]
    ]
    for section, name, dot, entry in keys:
        if dot:
            config.remove_option(section, f"{name}.{entry}")
            value = json_or_text(overlay[section][f"{name}.{entry}"])
            entries = _entries(config, path, section, name) | {entry: value}
            config.set(section, name, json.dumps(entries))
    return [(section, name) for section, name, *_ in keys]


def _entries(
    config: configparser.RawConfigParser, path: Path, section: str, name: str
) -> dict[str, Any]:
    """The entries of an object as they are so far."""
    place = next(
        (p for p in (section, section.partition(":")[0]) if config.has_option(p, name)), ""
    )
    entries = json_or_text(config.get(place, name, raw=True)) if place else None
    if not isinstance(entries, dict):
        raise SettingsError(
            f"{path}: section [{section}]: {name} has no entries; write {name} = ..."
        )
    return entries


def require_readable() -> None:
    """Raise SettingsError for a luigi.cfg that Luigi cannot read."""
    for name in filter(None, ("luigi.cfg", os.environ.get("LUIGI_CONFIG_PATH"))):
        path = Path(name)
        if path.is_file():
            read_into(configparser.RawConfigParser(), path)
            if path.read_bytes().startswith(b"\xef\xbb\xbf"):
                raise SettingsError(
                    f"{path} begins with a byte order mark, which Luigi cannot read; save the file "
                    "as UTF-8 without one"
                )


def _place(before: str) -> str:
    """Where a text that ends here is: its section and key, or else its line."""
    sections = re.findall(r"^\[([^\]\n]+)\]", before, re.MULTILINE)
    line = before.count("\n") + 1
    last = before.rpartition("\n")[2]
    if sections and last.lstrip()[:1] not in ("", "#", ";", "["):
        own = before.rpartition(f"[{sections[-1]}]")[2]
        keys = re.findall(r"^([^\s#;=:][^=:\n]*?)\s*[=:]", own, re.MULTILINE)
        return f"section [{sections[-1]}] {''.join(keys[-1:])}".rstrip() + f" (line {line})"
    return f"line {line}"
