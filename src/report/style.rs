//! How the page looks: in light, in dark, on paper.

pub(super) const CSS: &str = r"
:root {
  color-scheme: light dark;
  --paper: #ffffff; --raised: #f5f6f8; --ink: #1b1f24; --soft: #57606a; --line: #d5d9df; --grid: #e8eaee;
  --accent: #0b5cad; --good: #116329; --bad: #a40e26; --warn: #7a4d00; --warn-paper: #fff4dc;
  --s-unprotected: #f2a59b; --s-syncing: #b5d3f2; --s-protected: #96d3a2; --s-degraded: #f3cf73; --s-standing-by: #a9dcd6;
  --s-arbitrating: #d5b8f0; --s-held: #b48be0; --s-taken-over: #f0b07a; --s-stopped: #c3c9d1; --s-failed: #e0596b; --s-empty: #e9ebef;
  --c0: #2f6fb5; --c1: #e08214; --c2: #2c9c69; --c3: #b5457f; --c4: #7d63c0; --c5: #b08900; --c6: #3aa3c2; --c7: #8a929c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161c; --raised: #1b212a; --ink: #e4e8ee; --soft: #9aa5b3; --line: #343c48; --grid: #262d37;
    --accent: #79b8ff; --good: #6fd08c; --bad: #ff8a94; --warn: #f0c674; --warn-paper: #33290f;
    --s-unprotected: #8f3b33; --s-syncing: #2f5580; --s-protected: #2a6b3c; --s-degraded: #7d5f10; --s-standing-by: #1f6660;
    --s-arbitrating: #66458a; --s-held: #7d4fb8; --s-taken-over: #965521; --s-stopped: #4a5361; --s-failed: #b32b40; --s-empty: #29303a;
    --c0: #6aa9ec; --c1: #f0a04b; --c2: #4fc78d; --c3: #e07bb0; --c4: #a892e8; --c5: #d6b53c; --c6: #62c8e4; --c7: #9aa2ad;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, 'Segoe UI', 'Noto Sans', 'Liberation Sans', 'DejaVu Sans', sans-serif; overflow-wrap: anywhere; }
header { border-bottom: 1px solid var(--line); padding-bottom: .75rem; }
.kicker { margin: 0; color: var(--soft); font-size: .8rem; letter-spacing: .06em; text-transform: uppercase; }
h1 { margin: .1rem 0; font-size: 2rem; line-height: 1.2; }
h2 { margin: 2.25rem 0 .75rem; font-size: 1.25rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
.headline { margin: .25rem 0; font-size: 1.15rem; font-weight: 600; }
.v-good { color: var(--good); } .v-bad { color: var(--bad); }
.meta, .note, footer { color: var(--soft); font-size: .87rem; margin: .25rem 0; }
footer { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: .75rem; }
.note.warning { color: var(--warn); background: var(--warn-paper); border-left: 3px solid var(--warn); padding: .4rem .7rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(15.5rem, 1fr)); gap: .75rem; margin: 0; }
.tile { background: var(--raised); border: 1px solid var(--line); border-radius: 8px; padding: .65rem .85rem; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; }
dd strong { display: block; font-size: 1.3rem; line-height: 1.35; font-weight: 600; }
small { color: var(--soft); font-size: .8rem; font-weight: 400; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem .9rem; list-style: none; margin: 0 0 .4rem; padding: 0; font-size: .8rem; color: var(--soft); }
.legend li { display: flex; align-items: center; gap: .35rem; }
.swatch { width: 12px; height: 12px; flex: none; }
.scroll { overflow-x: auto; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.timeline { display: block; width: 100%; min-width: 46rem; height: auto; margin-top: .75rem; }
svg text { fill: var(--ink); font: 11px system-ui, 'Segoe UI', 'Noto Sans', 'Liberation Sans', 'DejaVu Sans', sans-serif; }
svg .label { font-weight: 600; font-size: 12px; } svg .tick { fill: var(--soft); font-size: 10px; }
svg .axis { stroke: var(--soft); } svg .grid { stroke: var(--grid); }
.bar, .point { fill: var(--c0); } .stem { fill: var(--c0); opacity: .35; }
.percentile { stroke: var(--c1); stroke-width: 1.5; stroke-dasharray: 4 3; }
.takeover-line { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 5 4; }
.mark { fill: none; stroke: var(--ink); stroke-width: 1.6; }
.m-takeover { fill: var(--s-taken-over); } .m-link-lost { fill: var(--bad); stroke: var(--bad); } .m-link-back { fill: var(--good); stroke: var(--good); }
.m-silent { stroke: var(--bad); stroke-width: 2; }
.s-unprotected { fill: var(--s-unprotected); } .s-syncing { fill: var(--s-syncing); } .s-protected { fill: var(--s-protected); }
.s-degraded { fill: var(--s-degraded); } .s-standing-by { fill: var(--s-standing-by); } .s-arbitrating { fill: var(--s-arbitrating); }
.s-held { fill: var(--s-held); } .s-taken-over { fill: var(--s-taken-over); } .s-stopped { fill: var(--s-stopped); }
.s-failed { fill: var(--s-failed); } .s-empty { fill: var(--s-empty); }
.c0 { fill: var(--c0); } .c1 { fill: var(--c1); } .c2 { fill: var(--c2); } .c3 { fill: var(--c3); }
.c4 { fill: var(--c4); } .c5 { fill: var(--c5); } .c6 { fill: var(--c6); } .c7 { fill: var(--c7); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem; }
.chart { margin: 0; background: var(--raised); border: 1px solid var(--line); border-radius: 8px; padding: .65rem .85rem; }
.chart svg { display: block; width: 100%; height: auto; } figcaption { font-weight: 600; }
.spread { margin: .25rem 0 0; color: var(--soft); font-size: .8rem; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th, td { padding: .32rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }
thead th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody th { font-weight: 500; } .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.time { font-variant-numeric: tabular-nums; white-space: nowrap; color: var(--soft); }
tr.strong th, tr.strong td { font-weight: 700; color: var(--ink); }
.e { border-left: 4px solid var(--line); }
.e-unprotected { border-left-color: var(--s-unprotected); } .e-syncing { border-left-color: var(--s-syncing); } .e-protected { border-left-color: var(--s-protected); }
.e-degraded { border-left-color: var(--s-degraded); } .e-standing-by { border-left-color: var(--s-standing-by); } .e-arbitrating { border-left-color: var(--s-arbitrating); }
.e-held { border-left-color: var(--s-held); } .e-taken-over { border-left-color: var(--s-taken-over); } .e-stopped { border-left-color: var(--s-stopped); }
.e-failed, .e-link-lost { border-left-color: var(--s-failed); } .e-link-back { border-left-color: var(--s-protected); }
.cut { text-align: center; color: var(--soft); font-style: italic; }
code { font: .8rem ui-monospace, 'Liberation Mono', 'DejaVu Sans Mono', monospace; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .tile, .chart, tr, svg { break-inside: avoid; } h2, h3 { break-after: avoid; } .scroll { overflow: visible; } .timeline { min-width: 0; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
";
