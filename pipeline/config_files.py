"""Reads luigi.cfg and its overlays as UTF-8 with any line ends, or says in a sentence what to mend.

Luigi reads luigi.cfg while it is imported, and ends in a traceback where it cannot. So `import
pipeline` checks the file first, and this module does not import Luigi.
"""

import configparser
import os
import re
from pathlib import Path


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
