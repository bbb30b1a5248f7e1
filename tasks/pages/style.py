"""The pages' colours and content security policy, and the style sheet of standalone SVG files.

Colours are CSS variables, so that a chart follows the theme without a second drawing. Every text
colour has a contrast of at least 4.5:1 on its ground (a test computes it). The hues can be
distinguished with any colour vision, and dashes and markers repeat them. The style sheets are the
`.css` files in this folder: light and dark, desk, phone and paper.
"""

import re

# No script and nothing from the network: only data: URIs for images, and the page's own style sheet.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

LIGHT = {
    "ground": "#fcfbf8",
    "raised": "#f4f2ec",
    "ink": "#1c2024",
    "muted": "#575e66",
    "rule": "#dedad1",
    "s0": "#666d75",
    "s1": "#0a5c9e",
    "s2": "#a84400",
    "s3": "#006b54",
    "s4": "#86387a",
}
DARK = {
    "ground": "#15181b",
    "raised": "#1e2226",
    "ink": "#e8e6e1",
    "muted": "#a6aeb6",
    "rule": "#353b41",
    "s0": "#a1a9b1",
    "s1": "#74b9f2",
    "s2": "#f0a762",
    "s3": "#56c7a6",
    "s4": "#dda2d4",
}


def standalone_style(sheet: str) -> str:
    """The charts' style sheet for a standalone SVG file, in the light theme.

    Many programs do not know CSS variables, so each colour is written out.
    """
    lines = sheet.splitlines()
    rules = [line.replace("svg ", "") for line in lines if line.startswith("svg ")]
    rules += [line for line in lines if re.match(r"\.(line|dot|s\d\.line)\b", line)]
    sheet = "".join(re.sub(r"(stroke|fill):var\(--c\);", "", rule) for rule in rules)
    for number in range(5):
        colour, ground = LIGHT[f"s{number}"], "#ffffff" if number == 0 else LIGHT[f"s{number}"]
        sheet += f".s{number}.line,.s{number} .line{{stroke:{colour}}}"
        sheet += f".s{number}.dot,.s{number} .dot{{stroke:{colour};fill:{ground}}}"
    sheet = re.sub(r"var\(--(\w+)\)", lambda match: LIGHT[match[1]], sheet)
    family = "text{font-family:'DejaVu Sans',Arial,Helvetica,sans-serif}"
    return f"{family}{sheet}.head{{font-size:14px;font-weight:bold;fill:{LIGHT['ink']}}}"
