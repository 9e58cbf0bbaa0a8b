"""The style sheet of `report.html`."""

STYLE = """
:root {
  color-scheme: light dark;
  --back: #fff; --text: #1b1f24; --soft: #5b6470; --line: #d9dee4;
  --card: #f5f7f9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #15181c; --text: #e6e9ed; --soft: #9aa4b0; --line: #343b44;
    --card: #1f242a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 76rem;
  background: var(--back); color: var(--text);
  font: 16px/1.45 system-ui, sans-serif;
}
h1 { font-size: 1.5rem; margin: 0.3rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.6rem; }
p, li { max-width: 48rem; }
.cards {
  display: grid; gap: 0.6rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr));
}
.cards div { background: var(--card); border-radius: 6px; padding: 0.6rem; }
.cards dt { color: var(--soft); font-size: 0.85rem; }
.cards dd { margin: 0; font-size: 1.35rem; }
.cards .note { color: var(--soft); font-size: 0.75rem; }
.bar {
  display: flex; height: 2.2rem; border-radius: 6px; overflow: hidden;
  margin-bottom: 0.8rem;
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td {
  text-align: left; vertical-align: top; padding: 0.25rem 0.9rem 0.25rem 0;
  border-bottom: 1px solid var(--line);
}
th { color: var(--soft); font-weight: 500; }
.legend td:nth-child(-n+3) { white-space: nowrap; }
.legend td:nth-child(4) { color: var(--soft); }
.legend i {
  display: inline-block; width: 0.8rem; height: 0.8rem; border-radius: 2px;
  margin-right: 0.4rem; vertical-align: -0.05rem;
}
.pictures {
  display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
}
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: currentColor; }
pre { overflow-x: auto; background: var(--card); padding: 0.8rem; }
summary { cursor: pointer; padding: 0.3rem 0; }
@media (max-width: 40rem) {
  body { padding: 0.6rem; }
  .legend td:nth-child(4), .legend th:nth-child(4) { display: none; }
}
"""
