"""The style sheet of the report page: light and dark, desk, phone and paper.

Colours are variables, so that a chart follows the theme without being drawn twice. Every text
colour keeps a contrast of at least 4.5:1 on its ground (a test computes it); the hues are told
apart with any colour vision, and dashes and markers repeat what they say.
"""

import re

from tasks.report_text import esc

# No script, nothing from outside: images as data: URIs and the page's own style sheet.
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

_LAYOUT = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
 font-variant-numeric:tabular-nums}
main,header,footer{max-width:70rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:3.5rem}
footer{padding-top:1.5rem;padding-bottom:4rem;color:var(--muted);font-size:.875rem}
section{border-top:1px solid var(--rule);margin-top:3rem;padding-top:2rem}
h1,h2{font-family:Charter,"Iowan Old Style","Palatino Linotype",Palatino,Georgia,serif;
 font-weight:600;line-height:1.2;text-wrap:balance}
h1{font-size:clamp(1.75rem,1.2rem + 2.4vw,2.6rem);margin:.4rem 0 1.1rem;max-width:26em}
h2{font-size:1.5rem;margin:0 0 .4rem}
h3{font-size:1rem;margin:2rem 0 .25rem}
p{margin:.4rem 0 .8rem;max-width:44em}
.eyebrow{margin:0;color:var(--muted);font-size:.9rem;overflow-wrap:anywhere}
.lead{font-size:1.08rem}
.quiet,.note,figcaption span{color:var(--muted)}
.quiet{font-size:.9rem}
.note{border-left:3px solid var(--rule);padding:.1rem 0 .1rem .9rem;margin:1.2rem 0}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
 font-size:.85em;overflow-wrap:anywhere}
pre{white-space:pre-wrap;margin:.35rem 0;line-height:1.5}
"""

_TABLES = """
.wide{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;min-width:min(100%,34rem);font-size:.95rem}
th,td{padding:.4rem 1.4rem .4rem 0;text-align:left;vertical-align:baseline;font-weight:400}
thead th{color:var(--muted);font-size:.875rem;border-bottom:1px solid var(--rule);
 vertical-align:bottom}
tbody tr+tr>*{border-top:1px solid color-mix(in srgb,var(--rule) 55%,transparent)}
tbody.mode>tr:first-child>*{border-top:1px solid var(--rule);padding-top:.9rem;font-weight:600}
td.n,th.n{text-align:right;white-space:nowrap}
td:last-child,th:last-child{padding-right:0}
small{color:var(--muted);font-size:.8125rem;font-weight:400}
.results th,.results td{white-space:nowrap;padding-right:1.2rem}
.results td span{display:inline-block;min-width:3rem;text-align:right}
.results thead th+th{padding-left:.6rem}
.results small{display:inline-block;margin-left:.7rem;min-width:6.1rem}
.results small+small{min-width:8rem}
.results tbody th{padding-left:.9rem}
.results tbody tr:first-child th,.results.flat tbody th{padding-left:0}
.results.many td,.results.many thead th{text-align:right}
.results.many small{display:block;margin:0;min-width:0}
.sure{font-weight:600}
.up{color:var(--s1)}.down{color:var(--s2)}
.bar{display:block;min-width:9rem;height:.7rem;background:var(--raised);border-radius:2px}
.bar i{display:block;height:100%;background:var(--s1);border-radius:2px;min-width:1px}
.stages{width:100%}
.stages code{white-space:nowrap}
.stages td:nth-child(3){width:34%}
"""

_TILES = """
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(6.2rem,1fr));gap:.7rem;list-style:none;
 margin:1.4rem 0 .4rem;padding:0;max-width:44rem}
.tiles li{display:grid;background:var(--raised);border-radius:6px;padding:.7rem .9rem;
 font-size:.9rem;line-height:1.45;color:var(--muted);break-inside:avoid}
.tiles .what{color:var(--ink);font-weight:600}
.tiles .big{font-size:2.1rem;line-height:1.25;font-weight:600;color:var(--ink);
 font-family:Charter,"Iowan Old Style","Palatino Linotype",Palatino,Georgia,serif}
.tiles .big.up{color:var(--s1)}.tiles .big.down{color:var(--s2)}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:.5rem 3rem}
h4{font-size:.95rem;margin:.8rem 0 .2rem}
.pairs{width:100%;min-width:0}
.pairs td:last-child{width:32%}
.bar.pair{min-width:4rem;background:none;height:auto}
.bar.pair i{height:.4rem;margin:.1rem 0}
.bar.pair .was{background:var(--s0)}
"""

_CHARTS = """
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));
 gap:1.6rem 2rem;margin:1.2rem 0}
figure{margin:0;max-width:28rem;break-inside:avoid;display:flex;flex-direction:column;
 justify-content:space-between}
figcaption{font-size:.9rem;line-height:1.4;margin-bottom:.35rem}
figcaption b{display:block;font-weight:600}
figcaption .key{margin-top:.25rem}
.charts.top figure{justify-content:flex-start}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:11.5px;fill:var(--muted)}
svg .value,svg .row{fill:var(--ink)}
svg .row{font-size:12.5px}
svg .end{text-anchor:end}svg .mid{text-anchor:middle}
.files{margin:.2rem 0 0;font-size:.75rem;text-align:right}
.files a{color:var(--muted);margin-left:.6em}
svg .grid{stroke:var(--rule);stroke-width:1;fill:none;opacity:.75}
svg .mark{stroke:var(--muted);stroke-width:1;stroke-dasharray:2 3;fill:none}
.s0{--c:var(--s0)}.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}.s4{--c:var(--s4)}
.line{stroke:var(--c);stroke-width:2.1;fill:none;stroke-linejoin:round;stroke-linecap:round}
.s0.line{stroke-dasharray:6 4}.s2.line{stroke-dasharray:9 3}.s3.line{stroke-dasharray:2 4}
.s4.line{stroke-dasharray:9 3 2 3}
.line.faint{stroke-width:1;opacity:.38;stroke-dasharray:none}
.dot{fill:var(--c);stroke:var(--c);stroke-width:1.8}
.s0 .dot,.s0.dot{fill:var(--ground)}
.line.whisker{stroke-width:1.8;stroke-dasharray:none}
.graph .mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
 font-size:10.5px}
.graph .box{fill:var(--raised);stroke:var(--rule)}
.graph .edge{fill:none;stroke:var(--muted);stroke-width:1.2;opacity:.75}
svg.graph{margin:1.2rem auto}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:0;padding:0;list-style:none;
 font-size:.875rem;color:var(--muted)}
.key svg{display:inline-block;width:1.9em;height:.7em;margin-right:.4em;vertical-align:0}
"""

_GALLERY = """
.gallery form{display:flex;flex-wrap:wrap;gap:.6rem 1.4rem;align-items:end;margin:1rem 0;
 position:sticky;top:0;background:var(--ground);padding:.6rem 0;z-index:1}
.gallery label{display:grid;font-size:.875rem;color:var(--muted)}
.gallery label.all{display:flex;gap:.4rem;align-items:center;padding-bottom:.25rem}
.gallery select{font:inherit;color:var(--ink);background:var(--raised);border:1px solid var(--rule);
 border-radius:3px;padding:.25rem .4rem;max-width:16rem}
/* At first a few of each kind; all of them when asked for, or when one class or group is chosen. */
.gallery:not(:has([name=all]:checked)):not(:has(select:not([name=kind])>option:checked:not([value=""]))) .rest{display:none}
.gallery:has([name=all]:checked) .more{display:none}
.shown{display:grid;grid-template-columns:9.5rem 1fr 1fr;gap:1rem 1.6rem;padding:1.1rem 0;
 border-top:1px solid var(--rule);break-inside:avoid}
.shown img{width:100%;max-width:9.5rem;height:auto;border-radius:3px;display:block;
 background:var(--raised)}
.who .truth{font-weight:600;margin:.5rem 0 0;line-height:1.3;overflow-wrap:anywhere}
.who .quiet{margin:0;overflow-wrap:anywhere;font-size:.8125rem}
.side{min-width:0;font-size:.925rem}
.side h4{margin:0 0 .2rem;font-size:.875rem;font-weight:400;color:var(--muted)}
.side p{margin:.1rem 0;overflow-wrap:anywhere}
.right::before,.wrong::before{display:inline-block;width:1.3em;font-weight:700}
.right::before{content:"✓";color:var(--s1)}
.wrong::before{content:"✗";color:var(--s2)}
.options{list-style:none;margin:.35rem 0;padding:0}
.options li{display:grid;grid-template-columns:1.4em 1fr auto;gap:0 .4em;padding:.12rem 0;
 align-items:baseline;overflow-wrap:anywhere}
.options .picked{font-weight:600}
.options .vote{color:var(--muted);font-size:.8125rem;font-weight:400;text-align:right}
.tag{color:var(--muted);font-size:.8125rem;font-weight:400;white-space:nowrap}
.said{color:var(--muted);border-left:2px solid var(--rule);padding-left:.7rem;font-size:.8125rem;
 max-height:22rem;overflow:auto}
summary{cursor:pointer;color:var(--s1);padding:.2rem 0}
summary:focus-visible{outline:2px solid var(--s1);outline-offset:2px}
details>div{padding-bottom:.5rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1.2rem;margin:.4rem 0;
 font-size:.875rem}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
"""

_NARROW = """
@media (max-width:46rem){
 header{padding-top:2rem}
 th,td{padding-right:.9rem}
 table{font-size:.9rem;min-width:100%}
 .shown>*{grid-column:1/-1}
 .who{display:grid;grid-template-columns:6rem 1fr;gap:0 1rem;align-items:center}
 .results th,.results td{padding-right:.5rem}
 .results td,.results thead th{text-align:right}
 .results td span{min-width:0}
 .results thead th{white-space:normal;padding-left:0}
 .results tbody th{white-space:normal;padding-left:0}
 .results small{display:block;margin:0;min-width:0;font-size:.75rem}
 .results small+small{display:none}
 td.n{white-space:normal}
 .stages td.n{white-space:nowrap;font-size:.85em}
 .tiles li{padding:.6rem .7rem;font-size:.8rem}
 .tiles .big{font-size:1.6rem}
 .stages td:nth-child(2),.stages th:nth-child(2),
 .stages td:nth-child(3),.stages th:nth-child(3){display:none}
}
@media print{
 :root{--ground:#fff}
 html{font-size:11px}
 body{font-size:1rem}
 .wide{overflow:visible}
 header,main,footer{max-width:none;padding-left:0;padding-right:0}
 section{margin-top:1.5rem;padding-top:1rem}
 tr,figure,.shown{break-inside:avoid}
 h2,h3,h3+p{break-after:avoid}
 .said{max-height:none;overflow:visible}
 .files,.gallery form{display:none}
 .bar,.bar i{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""


def _theme(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


STYLE = (
    f":root{{color-scheme:light dark;{_theme(LIGHT)}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_theme(DARK)}}}}}"
    + "".join((_LAYOUT, _TABLES, _TILES, _CHARTS, _GALLERY, _NARROW))
)


def page(title: str, body: str, *, style: str = "", allowed: str = "") -> str:
    """A whole HTML page that opens offline; `title` is escaped, `body` is HTML.

    `style` comes after the shared style sheet, `allowed` after the content policy.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}{allowed}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{esc(title)}</title><style>{STYLE}{style}</style></head><body>{body}</body></html>\n"
    )


def standalone_style() -> str:
    """The charts' style sheet for an SVG file of its own: the light theme, colours written out.

    Other programs know no variables, so each style's colour is a rule.
    """
    lines = _CHARTS.splitlines()
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
