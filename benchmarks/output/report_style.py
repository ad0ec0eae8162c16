"""Style sheets of the report and of single charts: system fonts, two palettes, nothing loaded."""

_LIGHT = """
--page: #fafaf8; --card: #ffffff; --ink: #1c1f23; --quiet: #5f6670; --line: #e4e4df; --band: #f1f1ec;
--s0: #2b66c2; --s1: #d9822b; --s2: #1f8a70; --s3: #8a4fbf; --s4: #b83a52; --s5: #5c6b7a;
--good: #1a7a4f; --warn: #9a6a00; --bad: #b3261e;
"""
_DARK = """
--page: #14171a; --card: #1c2024; --ink: #e8e9ea; --quiet: #9aa3ad; --line: #30363c; --band: #22272c;
--s0: #6ea8fe; --s1: #f0a55a; --s2: #4fc3a1; --s3: #c39bea; --s4: #f0808f; --s5: #97a5b3;
--good: #5fd39a; --warn: #e3b341; --bad: #ff8a80;
"""

PALETTES = f"""
:root {{ {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
:root[data-theme=dark] {{ {_DARK} }}
"""
CHART_STYLE = """
text { fill: var(--ink); } .tick, .value { fill: var(--quiet); } .label { text-anchor: end; }
.grid { stroke: var(--line); fill: none; }
.whisker { stroke: var(--ink); stroke-width: 1.2; } .dot { fill: var(--ink); fill-opacity: 0.45; }
.mark { stroke: var(--bad); stroke-dasharray: 5 4; fill: none; } .marklabel { fill: var(--bad); }
.marklabel, .value { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
.pale { fill-opacity: 0.35; }
.band0 { fill: none; pointer-events: all; } .band1 { fill: var(--band); }
.area { fill-opacity: 0.75; } .line { fill: none !important; stroke-width: 2; }
""" + "".join(
    f".s{i} {{ fill: var(--s{i}); background: var(--s{i}); }} .line.s{i} {{ stroke: var(--s{i}); }}\n"
    for i in range(6)
)
# Of a chart that is a file of its own.
PICTURE_STYLE = (
    PALETTES
    + "svg { font: 12px system-ui, sans-serif; } .title { font-size: 15px; font-weight: 600; }\n"
    + ".card { fill: var(--card); stroke: var(--line); }"
    + CHART_STYLE
)
STYLE = (
    PALETTES
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 920px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 26px; font-weight: 650; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 18px; font-weight: 650; margin: 0 0 2px; }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 8px; overflow-wrap: anywhere; }
header p, .lead { color: var(--quiet); margin: 2px 0 16px; }
section { margin-top: 40px; }
figure, article, .scroll { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
figure { margin: 0 0 16px; padding: 14px 16px 10px; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 8px; }
svg { display: block; width: 100%; height: auto; overflow: visible; font-size: 12px; }
.narrow { display: none; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-bottom: 8px; font-size: 13px; }
.legend { color: var(--quiet); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.cards { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); }
article { padding: 14px 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 10px; }
.tiles b { font-size: 24px; font-weight: 650; letter-spacing: -0.02em; }
.tiles small, .tiles span { color: var(--quiet); font-size: 12px; }
.tiles span { display: block; margin-top: -4px; }
.badge { margin: 12px 0 0; padding-left: 10px; border-left: 3px solid; font-size: 13px; }
.good { border-color: var(--good); } .warn { border-color: var(--warn); } .bad { border-color: var(--bad); }
.scroll { overflow-x: auto; margin-bottom: 16px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 12px; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; color: var(--quiet); font-weight: 600; }
tbody tr:first-child td { border-top: 0; }
td:first-child { min-width: 9em; } th:not(.short) { min-width: 11em; }
.short { white-space: nowrap; }
.facts { color: var(--quiet); font-size: 13px; margin: -6px 0 10px; overflow-wrap: anywhere; }
@media (max-width: 800px) {
  .wide { display: none; } .narrow { display: block; max-width: 440px; }
}
@media (max-width: 640px) {
  main { padding: 24px 12px 40px; }
  figure { padding: 12px 10px 8px; }
  th, td { padding: 6px 8px; }
}
"""
    + CHART_STYLE
    + ".above { text-anchor: start; }\n"
)
