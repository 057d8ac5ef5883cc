"""The page that the report's numbers are put into; ``{{title}}``, ``{{notes}}`` and ``{{data}}`` are replaced."""

from __future__ import annotations

__all__ = ["PAGE"]

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the model remembers</title>
<style>
:root { --ink: #1b2230; --soft: #5c6675; --line: #dfe4ea; --paper: #ffffff; --ground: #f4f6f8; --accent: #225ea8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 17px; margin: 0 0 2px; }
.sub { color: var(--soft); margin: 0 0 16px; }
.note { background: #fff6dc; border-left: 4px solid #e0a100; padding: 6px 12px; margin: 8px 0; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px;
  margin: 14px 0; }
.hint { color: var(--soft); font-size: 13.5px; margin: 0 0 10px; max-width: 95ch; }
.bar { display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center; position: sticky; top: 0; z-index: 5;
  background: var(--ground); padding: 10px 0; }
.group { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
.group > span { color: var(--soft); font-size: 13px; margin-right: 2px; }
button { font: inherit; font-size: 13.5px; padding: 4px 11px; border: 1px solid #c6ced8; border-radius: 7px;
  background: #fff; color: var(--ink); cursor: pointer; }
button:hover { border-color: var(--accent); }
button[aria-pressed="true"] { background: var(--accent); border-color: var(--accent); color: #fff; }
button:focus-visible, canvas:focus-visible { outline: 3px solid #41b6c4; outline-offset: 1px; }
.text { font: 17px/1.75 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 460px; overflow-y: auto; border: 1px solid var(--line); border-radius: 6px;
  padding: 8px 10px; }
.text span { padding: 3px 0; cursor: default; }
.text span.on { outline: 2px solid #d55e00; outline-offset: -1px; border-radius: 2px; }
.text .sign { opacity: .55; }
.wrap { display: flex; gap: 8px; }
.names { flex: none; width: 66px; position: relative; font-size: 12px; color: var(--soft); text-align: right; }
.names div { position: absolute; right: 0; transform: translateY(-50%); white-space: nowrap; }
.plot { flex: 1; min-width: 0; }
canvas { display: block; width: 100%; image-rendering: pixelated; cursor: crosshair; border: 1px solid var(--line); }
.axis { position: relative; height: 32px; font-size: 12px; color: var(--soft); }
.axis div { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.axis .what { left: 50%; top: 15px; }
.legend { display: flex; gap: 8px; align-items: center; font-size: 12.5px; color: var(--soft); margin: 8px 0 0;
  flex-wrap: wrap; }
.ramp { width: 190px; height: 12px; border-radius: 2px; border: 1px solid var(--line); }
svg { display: block; width: 100%; }
.cols { display: grid; grid-template-columns: 1fr 1fr; gap: 26px; }
.cols svg text { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; }
@media (max-width: 760px) { .cols { grid-template-columns: 1fr; } }
#tip { position: fixed; display: none; z-index: 9; background: #1b2230; color: #fff; padding: 8px 11px;
  border-radius: 7px;
  font-size: 12.5px; line-height: 1.45; pointer-events: none; max-width: 300px; box-shadow: 0 3px 14px
  rgba(0,0,0,.25); }
#tip b { font: 14px ui-monospace, "DejaVu Sans Mono", monospace; background: #38435a; border-radius: 3px;
  padding: 0 5px; }
#tip table { border-spacing: 0; margin-top: 4px; } #tip td:last-child { text-align: right; padding-left: 14px; }
</style>
</head>
<body>
<main>
<h1>What the model writes down, and what it lets pass</h1>
<p class="sub">{{title}}</p>
{{notes}}
<div class="bar">
  <div class="group" id="measures"><span>Show</span></div>
  <div class="group" id="layers"><span>Layer</span></div>
</div>
<section>
  <h2 id="texthead"></h2>
  <p class="hint" id="says"></p>
  <div class="text" id="text"></div>
  <div class="legend" id="textlegend"></div>
</section>
<section>
  <h2>All layers</h2>
  <p class="hint">A row for each layer, first layer on top, a column for each token; colours are scaled within each row
  between its 2nd and 98th percentile. The top strip is surprise: the bits that the model spent on the token. Click a
  row to
  see its layer in the text.</p>
  <div class="wrap"><div class="names" id="rownames"></div><div class="plot"><canvas id="all" tabindex="0"
    aria-label="heat map of layers and tokens"></canvas><div class="axis" id="allaxis"></div></div></div>
  <div class="legend"><span>low</span><canvas class="ramp ramped" width="190" height="12"></canvas><span>high within the
  row</span></div>
</section>
<section>
  <h2 id="linehead"></h2>
  <p class="hint" id="linehint"></p>
  <div id="line"></div>
</section>
<section>
  <h2 id="charhead"></h2>
  <p class="hint">Means over all places where a character stands (at least twice), beside the mean over the whole text
  (grey line).</p>
  <div class="cols"><div id="most"></div><div id="least"></div></div>
</section>
<section>
  <h2 id="maphead"></h2>
  <p class="hint" id="maphint"></p>
  <div class="group" id="mapwhat" style="margin-bottom:8px"></div>
  <div class="wrap"><div class="names" id="mapnames"></div><div class="plot"><canvas id="map"
    aria-label="heat map of channels and tokens"></canvas><div class="axis" id="mapaxis"></div></div></div>
  <div class="legend" id="maplegend"></div>
</section>
</main>
<div id="tip"></div>
<script id="data" type="application/json">{{data}}</script>
<script>
"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const T = D.pieces.length, L = D.layers.length;
// ColorBrewer's YlGnBu: light to dark, so it reads without colour too.
const STOPS = ["ffffe5", "edf8b1", "c7e9b4", "7fcdbb", "41b6c4", "1d91c0", "225ea8", "253494", "0b1f5c"]
  .map(h => [0, 2, 4].map(i => parseInt(h.slice(i, i + 2), 16)));
function rgb(x, stops = STOPS) {
  x = Math.min(Math.max(x, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(x), stops.length - 2), f = x - i;
  return stops[i].map((v, c) => Math.round(v + (stops[i + 1][c] - v) * f));
}
// Purple to orange through white (ColorBrewer's PuOr), for what lies below and above a middle.
const BOTH = ["2d004b", "5e4fa2", "998ec3", "d8daeb", "fbfbfb", "fee0b6", "f1a340", "b35806", "7f3b08"]
  .map(h => [0, 2, 4].map(i => parseInt(h.slice(i, i + 2), 16)));
const css = x => "rgb(" + rgb(x).join(",") + ")";
const ink = x => x > 0.55 ? "#fff" : "#1b2230";
const el = id => document.getElementById(id);
const state = { measure: 0, layer: L > 1 ? -1 : 0, map: "delta" };
const SIGNS = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "": "·", "\u0000": "␀" };
function shown(piece) {
  return Array.from(piece).map(c => c in SIGNS ? SIGNS[c] : (c < " " || c === "\u007f") ? "\\x" +
    c.charCodeAt(0).toString(16).padStart(2, "0") : c).join("") || "·";
}
function number(v) {
  if (v === null || v === undefined) return "–";
  const a = Math.abs(v);
  if (a === 0) return "0";
  if (a >= 1e6) return v.toExponential(1).replace("+", "");
  if (a >= 100) return v.toFixed(0);
  if (a >= 10) return v.toFixed(1);
  if (a >= 0.1) return v.toFixed(3);
  if (a >= 0.001) return v.toFixed(4);
  return v.toExponential(1).replace("-", "−");
}
function scaler(values, scale) {
  const f = scale === "log" ? v => Math.log(Math.max(v, 1e-9)) : v => v;
  const sorted = values.filter(v => v !== null).map(f).sort((a, b) => a - b);
  const at = q => sorted[Math.min(sorted.length - 1, Math.max(0, Math.round(q * (sorted.length - 1))))];
  const low = at(0.02), high = at(0.98), back = scale === "log" ? Math.exp : v => v;
  const s = v => v === null ? 0 : high > low ? Math.min(1, Math.max(0, (f(v) - low) / (high - low))) : 0.5;
  s.low = back(low); s.high = back(high);
  return s;
}
// Scaled values are kept: every view of a layer uses one scale.
const kept = new Map();
function scaled(l, m) {
  const key = l + "/" + m;
  if (!kept.has(key)) {
    const M = D.measures[m];
    if (l < 0) {
      const rows = D.layers.map((_, i) => scaled(i, m).values);
      const values = Array.from({ length: T }, (_, t) => rows.reduce((a, r) => a + r[t], 0) / L);
      kept.set(key, { values, raw: values, low: Math.min(...values), high: Math.max(...values) });
    } else {
      const raw = D.layers[l].values[M.name], s = scaler(raw, M.scale);
      kept.set(key, { values: raw.map(s), raw, low: s.low, high: s.high });
    }
  }
  return kept.get(key);
}
const name = l => l < 0 ? "mean of all layers" : "layer " + D.layers[l].layer;
const open = D.layers.map(l => new Set(l.open));
// What isn't forgotten by the end has no number yet: grey.
const GREY = "#d3d8de";
const unknown = (l, t) => l >= 0 && D.measures[state.measure].name === "remembered" && open[l].has(t);

const tip = el("tip");
function showTip(event, t, l) {
  const parts = [];
  const add = (k, v) => parts.push("<tr><td>" + k + "</td><td>" + v + "</td></tr>");
  const b = document.createElement("b");
  b.textContent = shown(D.pieces[t]);
  add("surprise", D.bits[t] === null ? "–" : number(D.bits[t]) + " bits");
  if (l >= 0) {
    D.measures.forEach(m => {
      const v = D.layers[l].values[m.name][t];
      if (m.name === "remembered") add(m.label, (open[l].has(t) ? "≥ " : "") + number(v) + " tokens");
      else if (m.name === "influence") add(m.label, number(D.layers[l].share[t]));
      else add(m.label, number(v));
    });
    add("half-life at this Δ", number(D.layers[l].half_life[t]) + " tokens");
  } else {
    D.layers.forEach((one, i) => { if (L <= 10 || i % Math.ceil(L / 10) === 0)
      add("layer " + one.layer, number(one.values[D.measures[state.measure].name][t])); });
  }
  tip.innerHTML = b.outerHTML + " token " + (t + 1) + " of " + T + ", id " + D.ids[t] + "<br>" +
    (l >= 0 ? name(l) : D.measures[state.measure].label) + "<table>" + parts.join("") + "</table>";
  tip.style.display = "block";
  const w = tip.offsetWidth, h = tip.offsetHeight;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - w - 8) + "px";
  tip.style.top = (event.clientY + 18 + h > innerHeight ? event.clientY - h - 12 : event.clientY + 18) + "px";
}
const hideTip = () => { tip.style.display = "none"; };

let marked = null;
function mark(t) {
  if (marked) marked.classList.remove("on");
  marked = t === null ? null : el("text").querySelector('[data-t="' + t + '"]');
  if (marked) marked.classList.add("on");
}

function ramp(canvas, stops) {
  const c = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    c.fillStyle = "rgb(" + rgb(x / (canvas.width - 1), stops).join(",") + ")";
    c.fillRect(x, 0, 1, canvas.height);
  }
}
function legend(box, low, high, words, stops) {
  box.innerHTML = '<span>' + low + '</span><canvas class="ramp" width="190" height="12"></canvas><span>' + high +
    '</span><span>' + words + "</span>";
  ramp(box.querySelector("canvas"), stops);
}

function drawText() {
  const M = D.measures[state.measure], S = scaled(state.layer, state.measure), box = el("text");
  el("texthead").textContent = M.label[0].toUpperCase() + M.label.slice(1) + ", " + name(state.layer);
  el("says").textContent = M.says[0].toUpperCase() + M.says.slice(1) + " ␣ is a space, ↵ a new line" +
    (D.pieces.includes("") ? ", · a part of the character after it." : ".");
  box.textContent = "";
  marked = null;
  const out = document.createDocumentFragment();
  for (let t = 0; t < T; t++) {
    const s = document.createElement("span"), piece = D.pieces[t];
    const sign = piece === "" || Array.from(piece).some(c => c in SIGNS || c < " ");
    s.textContent = shown(piece);
    if (sign && piece.length <= 1) s.className = "sign";
    s.dataset.t = t;
    const grey = unknown(state.layer, t);
    s.style.background = grey ? GREY : css(S.values[t]);
    s.style.color = grey ? ink(0) : ink(S.values[t]);
    out.append(s);
    if (piece.includes("\n")) out.append("\n");
    else if (piece.endsWith(" ")) out.append(document.createElement("wbr"));
  }
  box.append(out);
  if (state.layer < 0) legend(el("textlegend"), "low", "high", "mean of the layers' own scales");
  else legend(el("textlegend"), number(S.low), number(S.high), (M.name === "remembered" ? "tokens, " : "") +
    "2nd to 98th percentile of this layer" + (M.scale === "log" ? ", logarithmic" : ""));
}

function axis(box) {
  let step = 1;
  while (T / step > 11) step *= [2, 2.5, 2][Math.round(3 * Math.log10(step)) % 3] || 2;
  box.textContent = "";
  for (let t = 0; t < T; t += step) {
    const d = document.createElement("div");
    d.textContent = t + 1;
    d.style.left = 100 * (t + 0.5) / T + "%";
    box.append(d);
  }
  const what = document.createElement("div");
  what.className = "what";
  what.textContent = "token";
  box.append(what);
}
function labels(box, items) {
  box.textContent = "";
  items.forEach(([y, text]) => {
    const d = document.createElement("div");
    d.textContent = text; d.style.top = y + "px"; box.append(d);
  });
}

const STRIP = 16, GAP = 4;
const rowHeight = () => Math.max(12, Math.min(34, Math.floor(320 / L)));
const bitsScale = scaler(D.bits, "linear");
function drawAll() {
  const canvas = el("all"), h = rowHeight(), height = STRIP + GAP + L * h;
  canvas.width = T; canvas.height = height; canvas.style.height = height + "px";
  const c = canvas.getContext("2d");
  c.fillStyle = "#fff"; c.fillRect(0, 0, T, height);
  for (let t = 0; t < T; t++) { c.fillStyle = css(bitsScale(D.bits[t])); c.fillRect(t, 0, 1, STRIP); }
  for (let l = 0; l < L; l++) {
    const v = scaled(l, state.measure).values;
    for (let t = 0; t < T; t++) {
      c.fillStyle = unknown(l, t) ? GREY : css(v[t]);
      c.fillRect(t, STRIP + GAP + l * h, 1, h - 1);
    }
  }
  const every = Math.ceil(13 / h);
  labels(el("rownames"), [[STRIP / 2 + 1, "surprise"]].concat(D.layers.map((one, l) =>
    [STRIP + GAP + (l + 0.5) * h + 1, (l === state.layer ? "▸ " : "") + "layer " + one.layer])
    .filter((_, l) => l % every === 0 || l === state.layer)));
  el("rownames").style.height = height + "px";
  axis(el("allaxis"));
}
function place(event, canvas) {
  const r = canvas.getBoundingClientRect();
  return [Math.max(0, Math.min(T - 1, Math.floor((event.clientX - r.left) / r.width * T))), event.clientY - r.top];
}
el("all").addEventListener("mousemove", e => {
  const [t, y] = place(e, el("all")), l = Math.floor((y - STRIP - GAP) / rowHeight());
  showTip(e, t, l >= 0 && l < L ? l : -1); mark(t);
});
el("all").addEventListener("mouseleave", () => { hideTip(); mark(null); });
el("all").addEventListener("click", e => {
  const l = Math.floor((place(e, el("all"))[1] - STRIP - GAP) / rowHeight());
  if (l >= 0 && l < L) { state.layer = l; draw(); }
});

function drawLine() {
  const M = D.measures[state.measure], S = scaled(state.layer, state.measure);
  el("linehead").textContent = M.label[0].toUpperCase() + M.label.slice(1) + " along the text, " + name(state.layer);
  const log = M.scale === "log" && state.layer >= 0;
  el("linehint").textContent = state.layer < 0
    ? "Mean over the layers of the values scaled to 0 … 1 within each layer. Choose a layer for its own numbers."
    : "The layer's own numbers" + (log ? ", on a logarithmic axis." : ".") +
      (M.name === "remembered" ? " Open circles: not forgotten by the end." : "");
  const W = 1100, H = 190, left = 58, right = 8, top = 8, bottom = 34;
  const raw = S.raw.map(v => v === null ? 0 : v);
  const floor = Math.max(1e-9, Math.min(...raw.filter(v => v > 0)));
  const f = log ? v => Math.log10(Math.max(v, floor)) : v => v;
  let lo = log ? Math.min(...raw.map(f)) : 0, hi = Math.max(...raw.map(f));
  if (!(hi > lo)) hi = lo + 1;
  const x = t => left + (t + 0.5) / T * (W - left - right);
  const y = v => H - bottom - (f(v) - lo) / (hi - lo) * (H - top - bottom);
  const ticks = [];
  if (log) {
    for (let p = Math.ceil(lo); p <= hi; p += Math.max(1, Math.round((hi - lo) / 5))) ticks.push(Math.pow(10, p));
    if (ticks.length < 2) ticks.push(Math.pow(10, lo), Math.pow(10, hi));
  } else {
    const raw10 = Math.pow(10, Math.floor(Math.log10(hi / 3))), step = [1, 2, 5, 10].map(k => k * raw10)
      .find(k => hi / k <= 5);
    for (let v = 0; v <= hi; v += step) ticks.push(v);
  }
  let out = "";
  ticks.forEach(v => {
    out += '<line x1="' + left + '" x2="' + (W - right) + '" y1="' + y(v) + '" y2="' + y(v) + '" stroke="#e5e9ee"/>' +
      '<text x="' + (left - 7) + '" y="' + (y(v) + 4) + '" text-anchor="end">' + number(v) + "</text>";
  });
  const bar = (W - left - right) / T;
  if (T <= 400) for (let t = 0; t < T; t++)
    out += '<rect x="' + (x(t) - bar * 0.42) + '" width="' + bar * 0.84 + '" y="' + y(raw[t]) + '" height="' +
      Math.max(0, H - bottom - y(raw[t])) + '" fill="' + css(0.25 + 0.6 * S.values[t]) + '"/>';
  else out += '<polyline fill="none" stroke="#225ea8" stroke-width="1" points="' +
    raw.map((v, t) => x(t).toFixed(1) + "," + y(v).toFixed(1)).join(" ") + '"/>';
  if (M.name === "remembered" && state.layer >= 0) open[state.layer].forEach(t => {
    out += '<circle cx="' + x(t) + '" cy="' + y(raw[t]) +
      '" r="2.6" fill="#fff" stroke="#d55e00" stroke-width="1.3"/>'; });
  if (T <= 140) for (let t = 0; t < T; t++) {
    const s = document.createElement("i");
    s.textContent = shown(D.pieces[t]);
    out += '<text x="' + x(t) + '" y="' + (H - bottom + 14) + '" text-anchor="middle" font-family="monospace">' +
      s.innerHTML + "</text>";
  } else for (let t = 0, step = Math.ceil(T / 11 / 50) * 50; t < T; t += step)
    out += '<text x="' + x(t) + '" y="' + (H - bottom + 14) + '" text-anchor="middle">' + (t + 1) + "</text>";
  out += '<text x="' + (left + W - right) / 2 + '" y="' + (H - 4) + '" text-anchor="middle">token</text>';
  el("line").innerHTML = '<svg viewBox="0 0 ' + W + " " + H + '" font-size="11.5" fill="#5c6675" role="img">' + out +
    '<rect x="' + left + '" y="0" width="' + (W - left - right) + '" height="' + (H - bottom) +
    '" fill="transparent" id="over"/></svg>';
  const over = el("over");
  over.addEventListener("mousemove", e => {
    const r = over.getBoundingClientRect();
    const t = Math.max(0, Math.min(T - 1, Math.floor((e.clientX - r.left) / r.width * T)));
    showTip(e, t, state.layer); mark(t);
  });
  over.addEventListener("mouseleave", () => { hideTip(); mark(null); });
}

function drawCharacters() {
  const M = D.measures[state.measure], S = scaled(state.layer, state.measure), groups = new Map();
  el("charhead").textContent = "Which characters: " + M.label + ", " + name(state.layer);
  D.pieces.forEach((p, t) => {
    if (p === "" || S.raw[t] === null) return;
    if (!groups.has(p)) groups.set(p, []);
    groups.get(p).push(S.raw[t]);
  });
  const mean = a => a.reduce((x, y) => x + y, 0) / a.length;
  const all = mean(S.raw.filter(v => v !== null));
  let rows = [...groups].filter(([, v]) => v.length > 1).map(([p, v]) => [p, mean(v), v.length]);
  rows.sort((a, b) => b[1] - a[1]);
  const n = Math.min(10, Math.floor(rows.length / 2));
  const top = Math.max(all, ...rows.map(r => r[1])) || 1;
  const chart = (box, list, title) => {
    const W = 520, h = 21, x0 = 52, w = W - x0 - 120;
    let out = '<text x="0" y="14" font-weight="bold" fill="#1b2230">' + title + "</text>";
    list.forEach(([p, v, k], i) => {
      const y = 24 + i * h, s = document.createElement("i");
      s.textContent = shown(p);
      out += '<text x="' + (x0 - 8) + '" y="' + (y + 14) + '" text-anchor="end" fill="#1b2230">' + s.innerHTML +
      "</text>" +
        '<rect x="' + x0 + '" y="' + (y + 3) + '" height="14" rx="2" width="' + Math.max(1, w * v / top) +
        '" fill="#1d91c0"/>' +
        '<text x="' + (W - 62) + '" y="' + (y + 14) + '" text-anchor="end" fill="#1b2230">' + number(v) + "</text>" +
        '<text x="' + (W - 50) + '" y="' + (y + 14) + '" fill="#8a94a3">×' + k + "</text>";
    });
    const x = x0 + w * all / top;
    out += '<line x1="' + x + '" x2="' + x + '" y1="22" y2="' + (26 + list.length * h) +
      '" stroke="#8a94a3" stroke-dasharray="3 3"/>';
    box.innerHTML = '<svg viewBox="0 0 ' + W + " " + (30 + list.length * h) + '" role="img">' + out + "</svg>";
  };
  chart(el("most"), rows.slice(0, n), "highest");
  chart(el("least"), rows.slice(rows.length - n).reverse(), "lowest");
}

const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
function drawMap() {
  const P = D.map[state.map], data = bytes(P.data), canvas = el("map");
  el("maphead").textContent = "Channel by channel, layer " + D.map.layer;
  el("maphint").textContent = "A row for each of the " + D.map.channels + " channels" +
    (P.rows < D.map.channels ? " (averaged to " + P.rows + " rows)" : "") +
    ", the longest memory on top; " + (P.diverging ? "orange: Δ above the channel's own median, so it is " +
    "opened for this token; purple: below." :
    "colour is how much of the channel's state this token has just written.");
  canvas.width = P.columns; canvas.height = P.rows;
  const height = Math.max(120, Math.min(380, P.rows * 3));
  canvas.style.height = height + "px";
  const c = canvas.getContext("2d"), image = c.createImageData(P.columns, P.rows);
  const table = Array.from({ length: 256 }, (_, i) => rgb(i / 255, P.diverging ? BOTH : STOPS));
  data.forEach((v, i) => { image.data.set(table[v], 4 * i); image.data[4 * i + 3] = 255; });
  c.putImageData(image, 0, 0);
  labels(el("mapnames"), [[9, "long"], [height / 2, "channel"], [height - 9, "short"]]);
  el("mapnames").style.height = height + "px";
  axis(el("mapaxis"));
  legend(el("maplegend"), P.low, P.high, (P.diverging ? "times the channel's median Δ, " : "") +
    "to the 99th percentile, logarithmic", P.diverging ? BOTH : STOPS);
}
el("map").addEventListener("mousemove", e => {
  const [t] = place(e, el("map"));
  const l = D.layers.findIndex(one => one.layer === D.map.layer);
  showTip(e, t, l); mark(t);
});
el("map").addEventListener("mouseleave", () => { hideTip(); mark(null); });

el("text").addEventListener("mousemove", e => {
  const t = e.target.dataset ? e.target.dataset.t : undefined;
  if (t === undefined) return hideTip();
  showTip(e, +t, state.layer);
});
el("text").addEventListener("mouseleave", hideTip);

function buttons(box, items, get, set) {
  items.forEach(([value, text]) => {
    const b = document.createElement("button");
    b.textContent = text;
    b.dataset.value = value;
    b.addEventListener("click", () => { set(value); draw(); });
    box.append(b);
  });
  box.refresh = () => box.querySelectorAll("button").forEach(b =>
    b.setAttribute("aria-pressed", String(b.dataset.value === String(get()))));
}
buttons(el("measures"), D.measures.map((m, i) => [i, m.label]), () => state.measure, v => { state.measure = v; });
buttons(el("layers"), (L > 1 ? [[-1, "all"]] : []).concat(D.layers.map((l, i) => [i, l.layer])), () => state.layer,
  v => { state.layer = v; });
buttons(el("mapwhat"), [["delta", "step size Δ"], ["written", "written"]], () => state.map, v => { state.map = v; });
function draw() {
  ["measures", "layers", "mapwhat"].forEach(id => el(id).refresh());
  drawText(); drawAll(); drawLine(); drawCharacters(); drawMap();
}
document.querySelectorAll(".ramped").forEach(c => ramp(c));
// #measure,layer opens the report at a view.
const at = location.hash.slice(1).split(",").map(Number);
if (at.length === 2 && at[0] >= 0 && at[0] < D.measures.length && at[1] >= -1 && at[1] < L) {
  state.measure = at[0]; state.layer = at[1];
}
draw();
</script>
</body>
</html>
"""
