// The style sheet of report.html.
#pragma once

namespace caldera {

inline constexpr const char* kReportStyle = R"css(
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #fff; --text: #1d2126; --faint: #6b727b; --rule: #e3e5e8;
  --line: #2563c9; --dot: #c2571a; --right: #1c7c3c; --wrong: #b3261e; --right-bg: #e7f4ea; --wrong-bg: #fbeae8; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1c2024; --text: #e6e8ea; --faint: #98a0a9;
  --rule: #30363c; --line: #7aa8f5; --dot: #f0a063; --right: #7fd39a; --wrong: #f29b92; --right-bg: #1b3324;
  --wrong-bg: #3a2321; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 70rem; background: var(--paper); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0 0 .2rem; font-size: 1.75rem; letter-spacing: -.015em; }
h2 { margin: 3rem 0 .9rem; font-size: 1.15rem; }
p { max-width: 46rem; } .faint { color: var(--faint); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .9rem; margin: 1.6rem 0 0; }
.tile { padding: .9rem 1.1rem; background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; }
.tile b { display: block; font-size: 1.6rem; font-weight: 600; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.tile span { color: var(--faint); font-size: .86rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.1rem; }
figure { margin: 0; padding: 1rem 1.1rem .8rem; background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; }
figcaption { margin-bottom: .4rem; font-size: .9rem; color: var(--faint); } figcaption b { color: var(--text); }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 14px; }
svg .grid { stroke: var(--rule); } svg .raw { fill: none; stroke: var(--line); opacity: .28; }
svg .bold { fill: none; stroke: var(--line); stroke-width: 2; stroke-linejoin: round; } svg .dot { fill: var(--dot); }
svg .line-label { fill: var(--line); } svg .dots-label { fill: var(--dot); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 26rem; }
th, td { padding: .42rem 1.1rem .42rem 0; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--faint); font-weight: 500; font-size: .88rem; } th:first-child, td:first-child { text-align: left; }
tr.total td { font-weight: 600; }
.bar { position: relative; width: 11rem; height: .6rem; border-radius: .3rem; background: var(--rule); }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: .3rem; background: var(--line); }
.bar u { position: absolute; top: -.2rem; bottom: -.2rem; width: 2px; background: var(--dot); }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1.1rem; }
.item { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem; overflow: hidden; font-size: .9rem; }
.item img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #8881; }
.item img.small { image-rendering: pixelated; }
.item div { padding: .6rem .8rem .8rem; overflow-wrap: anywhere; } .item p { margin: 0 0 .45rem; line-height: 1.4; }
.given { display: inline-block; padding: .1rem .5rem; border-radius: .35rem; font-weight: 600; }
.right { color: var(--right); background: var(--right-bg); } .wrong { color: var(--wrong); background: var(--wrong-bg); }
.item small { display: block; margin-top: .35rem; color: var(--faint); }
pre { padding: .9rem 1.1rem; overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: .6rem;
  font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
summary { cursor: pointer; font-weight: 600; margin-top: 3rem; }
)css";

}  // namespace caldera
