"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const NS = "http://www.w3.org/2000/svg";

function node(parent, name, attributes = {}, text) {
  const element = document.createElementNS(NS, name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (text !== undefined) element.textContent = text;
  parent.appendChild(element);
  return element;
}

function canvas(figure, height) {
  const width = Math.max(260, figure.clientWidth);
  figure.replaceChildren();
  const svg = node(figure, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
  return { svg, width, height };
}

function html(parent, name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  parent.appendChild(element);
  return element;
}

const number = (value, digits = 0) =>
  value === null || value === undefined ? "–" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const duration = ms => ms === null || ms === undefined ? "–"
  : ms >= 9950 ? number(ms / 1000, 1) + " s" : ms >= 995 ? number(ms / 1000, 2) + " s" : number(ms, ms < 9.95 ? 1 : 0) + " ms";
const size = bytes => !bytes ? "0" : bytes >= 1e9 ? number(bytes / 1e9, 2) + " GB" : bytes >= 1e6 ? number(bytes / 1e6, 1) + " MB"
  : bytes >= 1e3 ? number(bytes / 1e3, 0) + " kB" : bytes + " B";
const quantile = (sorted, q) => sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : null;

const configs = [...new Set([...DATA.layouts.map(item => item.config), ...DATA.plan.map(item => item.config).filter(Boolean)])];
const colour = config => `var(--c${Math.max(0, configs.indexOf(config)) % 8})`;

function niceStep(span, count) {
  const raw = span / count, magnitude = 10 ** Math.floor(Math.log10(raw));
  return magnitude * ([1, 2, 5, 10].find(step => step * magnitude >= raw) || 10);
}

const tip = byId("tip");
function showTip(event, text) {
  tip.textContent = text;
  tip.style.opacity = 1;
  const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 10);
  const y = event.clientY + 16 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : event.clientY + 16;
  tip.style.left = `${x}px`;
  tip.style.top = `${y}px`;
}
const hideTip = () => { tip.style.opacity = 0; };
const hover = (element, text) => {
  element.addEventListener("pointermove", event => { event.stopPropagation(); showTip(event, text); });
  element.addEventListener("pointerleave", hideTip);
};

/* A histogram over a logarithmic axis of milliseconds, with its median and 99th percentile. */
function histogram(figure, title, values) {
  const { svg, width, height } = canvas(figure, 184), top = 52, bottom = height - 26;
  node(svg, "text", { x: 0, y: 12, class: "strong" }, title);
  if (!values.length) return;
  const p50 = quantile(values, .5), p99 = quantile(values, .99), last = values[values.length - 1];
  node(svg, "text", { x: 0, y: 29 }, `median ${duration(p50)} · p99 ${duration(p99)} · max ${duration(last)}`);
  const low = Math.log10(Math.max(.05, values[0])) - .03, high = Math.log10(last) + .03, bins = Math.max(10, Math.min(44, Math.round(width / 8), Math.round(2.5 * Math.sqrt(values.length))));
  const counts = new Array(bins).fill(0);
  for (const value of values)
    counts[Math.min(bins - 1, Math.max(0, Math.floor((Math.log10(Math.max(value, .05)) - low) / (high - low) * bins)))]++;
  const most = Math.max(...counts), x = value => (Math.log10(value) - low) / (high - low) * width;
  counts.forEach((count, index) => {
    if (!count) return;
    const tall = Math.max(1.5, Math.sqrt(count / most) * (bottom - top)), from = 10 ** (low + index / bins * (high - low));
    const bar = node(svg, "rect", { x: index / bins * width + .75, y: bottom - tall, width: width / bins - 1.5, height: tall, rx: 1.5,
      fill: from >= p99 ? "var(--amber)" : "var(--leaf)", opacity: .85 });
    hover(bar, `${count} from ${duration(from)} to ${duration(10 ** (low + (index + 1) / bins * (high - low)))}`);
  });
  node(svg, "line", { x1: 0, x2: width, y1: bottom, y2: bottom, stroke: "var(--faint)" });
  for (const [value, name] of [[p50, "50"], [p99, "99"]]) {
    node(svg, "line", { x1: x(value), x2: x(value), y1: top - 9, y2: bottom, stroke: "var(--ink)", "stroke-width": 1, "stroke-dasharray": "2 3", opacity: .6 });
    node(svg, "text", { x: x(value) + 3, y: top - 1, "font-size": 10 }, `p${name}`);
  }
  let taken = -99;
  for (let power = Math.floor(low); power <= high; power++)
    for (const lead of high - low > 1.6 ? [1, 3] : high - low > .6 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8]) {
      const at = x(lead * 10 ** power);
      if (at < 14 || at > width - 18 || at - taken < 46) continue;
      taken = at;
      node(svg, "line", { x1: at, x2: at, y1: bottom, y2: bottom + 4, stroke: "var(--faint)" });
      node(svg, "text", { x: at, y: height - 8, "text-anchor": "middle" }, duration(lead * 10 ** power));
    }
}
