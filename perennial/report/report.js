const HELD = DATA.failures.length === 0;
const S = DATA.summary;
const GUTTER = 92;

function heading() {
  document.title = `Perennial: ${DATA.title}`;
  byId("headline").textContent = HELD
    ? `${number(S.requests)} streams lived through ${S.reconfigurations} changes of layout. Not one token was lost.`
    : `It did not hold: ${DATA.failures.join("; ")}.`;
  byId("subline").textContent = `${DATA.title}, seed ${DATA.seed}, ${number(DATA.duration, 0)} seconds. ` + (S.exact
    ? "Every stream was compared token by token with the same request on a service that nothing happens to."
    : `Agreement with an undisturbed run, up to the first difference: ${number(100 * (S.agreement ?? 0), 1)} %.`);
  const tiles = [
    [`${number(S.lost_tokens)}`, "tokens lost", S.lost_tokens ? "bad" : "good"],
    [`${number(S.duplicated_tokens)}`, "tokens twice", S.duplicated_tokens ? "bad" : "good"],
    S.exact ? [`${number(S.mismatched_streams)}`, "streams that differ", S.mismatched_streams ? "bad" : "good"]
      : [`${number(100 * (S.agreement ?? 0), 1)}<small>%</small>`, "agreement"],
    [number(S.tokens), `tokens, ${number(S.tokens_per_s, 0)} a second`],
    [`${S.notices}<small>+</small>${S.kills}`, `notices, kill${S.kills === 1 ? "" : "s"} without one`],
    [number(S.additions), "instances added"],
    [split(S.pauses_ms.p50), "planned pause, median"],
    [split(S.recoveries_ms.p50), "kill to next token, median"],
  ];
  for (const [value, label, kind] of tiles) {
    const tile = html(byId("tiles"), "div", `tile ${kind || ""}`);
    html(tile, "b").innerHTML = value;
    html(tile, "span", "", label);
  }
}
const split = ms => duration(ms).replace(/ (m?s)$/, "<small>$1</small>");

function legend() {
  const items = [["var(--greedy)", "greedy stream"], ["var(--sampled)", "sampled stream"], ["var(--amber)", "notice, leaving"],
    ["var(--red)", "killed", "dot"], ["var(--leaf)", "joined", "dot"], ["var(--ink)", "replicas stopped for a switch"]];
  for (const [fill, text, kind] of items) {
    const item = html(byId("legend"), "span");
    html(item, "i", kind).style.background = fill;
    item.append(text);
  }
}

function timeline() {
  const rowsTop = 26, bandHeight = 34, lane = 20, rate = 84, streams = DATA.streams.length;
  const row = streams > 90 ? 4 : streams > 40 ? 6 : 9;
  const yBand = rowsTop + 8, yLanes = yBand + bandHeight + 22, yRate = yLanes + DATA.instances.length * lane + 20, yRows = yRate + rate + 24;
  const { svg, width, height } = canvas(byId("timeline"), yRows + streams * row + 34);
  const x = time => GUTTER + Math.min(1, Math.max(0, time / DATA.duration)) * (width - GUTTER - 6);
  const label = (y, text) => node(svg, "text", { x: GUTTER - 12, y, "text-anchor": "end" }, text);
  const step = niceStep(DATA.duration, 10);
  for (let time = 0; time <= DATA.duration; time += step) {
    node(svg, "line", { x1: x(time), x2: x(time), y1: rowsTop, y2: height - 28, stroke: "var(--grid)" });
    node(svg, "text", { x: x(time), y: height - 10, "text-anchor": "middle" }, `${number(time)} s`);
  }
  for (const action of DATA.actions) mark(svg, x, action, rowsTop, height - 28);
  label(yBand + 21, "layout");
  band(svg, x, yBand, bandHeight);
  label(yLanes - 5, "instances");
  DATA.instances.forEach((item, index) => life(svg, x, item, yLanes + index * lane, lane, label));
  label(yRate + 12, "tokens/s");
  rates(svg, x, yRate, rate, width);
  label(yRows + 8, "streams");
  DATA.streams.forEach((stream, index) => line(svg, x, stream, yRows + index * row, row));
  crosshair(svg, x, width, rowsTop, height - 28);
}

function mark(svg, x, action, top, bottom) {
  const paint = { notice: "var(--amber)", kill: "var(--red)", add: "var(--leaf)" }[action.kind];
  node(svg, "line", { x1: x(action.t), x2: x(action.t), y1: top - 4, y2: bottom, stroke: paint, "stroke-dasharray": "3 4", opacity: .55 });
  const dot = node(svg, "circle", { cx: x(action.t), cy: top - 10, r: 5, fill: paint });
  const text = { notice: `${action.instance} gets a notice of ${number(action.grace, 1)} s`, kill: `${action.instance} is killed without notice`,
    add: `${action.instance} is added` }[action.kind];
  hover(dot, `${number(action.t, 2)} s: ${text}`);
}

function band(svg, x, y, height) {
  for (const block of DATA.layouts) {
    const wide = Math.max(1.5, x(block.to) - x(block.from) - 1.5);
    const rect = node(svg, "rect", { x: x(block.from), y, width: wide, height, rx: 5, fill: colour(block.config) });
    hover(rect, `epoch ${block.epoch}: ${block.config}\n${number(block.from, 2)} s to ${number(block.to, 2)} s\n` +
      (block.positions || []).map(p => `replica ${p.replica} stage ${p.stage} shard ${p.shard}: ${p.device}`).join("\n"));
    if (wide > 62) node(svg, "text", { x: x(block.from) + wide / 2, y: y + height / 2 + 4, class: "on", "text-anchor": "middle", "pointer-events": "none" }, block.config);
    else if (wide > 34) node(svg, "text", { x: x(block.from) + wide / 2, y: y + height / 2 + 4, class: "on", "text-anchor": "middle", "font-size": 9.5, "pointer-events": "none" }, block.config.replace(/^D1·/, ""));
  }
  for (const change of DATA.reconfigurations) {
    node(svg, "line", { x1: x(change.started), x2: x(change.at), y1: y + height + 6, y2: y + height + 6, stroke: change.mode === "recovery" ? "var(--red)" : "var(--amber)", "stroke-width": 3, "stroke-linecap": "round" });
    if (change.stopped) node(svg, "rect", { x: x(change.at - change.stopped / 1000), y: y - 3, width: Math.max(2, x(change.at) - x(change.at - change.stopped / 1000)), height: height + 6, rx: 1.5, fill: "var(--ink)" });
  }
}

function life(svg, x, item, y, lane, label) {
  const middle = y + lane / 2;
  label(middle + 4, item.name);
  const bar = (from, to, fill, opacity) => node(svg, "rect", { x: x(from), y: middle - 4, width: Math.max(2, x(to) - x(from)), height: 8, rx: 4, fill, opacity });
  const rect = bar(item.from, item.leaving ?? item.to, "var(--leaf)", .75);
  hover(rect, `${item.name} (${item.type})\n${number(item.from, 2)} s to ${number(item.to, 2)} s${item.end ? `, ${item.end}` : ""}`);
  if (item.leaving !== undefined) bar(item.leaving, item.to, "var(--amber)", .95);
  if (item.end === "killed" || item.end === "lost") {
    const at = x(item.to);
    for (const [dx, dy] of [[-4, -4], [-4, 4]])
      node(svg, "line", { x1: at + dx, y1: middle + dy, x2: at - dx, y2: middle - dy, stroke: "var(--red)", "stroke-width": 2.4, "stroke-linecap": "round" });
  }
}

function rates(svg, x, y, height, width) {
  const bins = Math.max(40, Math.floor((width - GUTTER) / 5)), counts = new Array(bins).fill(0), span = DATA.duration / bins;
  for (const stream of DATA.streams) for (const time of stream.times) counts[Math.min(bins - 1, Math.floor(time / span))]++;
  const values = counts.map(count => count / span), smooth = values.map((_, i) => (values[Math.max(0, i - 1)] + 2 * values[i] + values[Math.min(bins - 1, i + 1)]) / 4);
  const most = Math.max(1, ...smooth), at = value => y + height - value / most * height;
  const step = niceStep(most, 2);
  for (let value = step; value <= most; value += step) {
    node(svg, "line", { x1: GUTTER, x2: width - 6, y1: at(value), y2: at(value), stroke: "var(--grid)" });
    node(svg, "text", { x: GUTTER + 3, y: at(value) - 3, "font-size": 10 }, number(value));
  }
  const points = smooth.map((value, i) => `${x((i + .5) * span).toFixed(1)},${at(value).toFixed(1)}`);
  node(svg, "path", { d: `M${x(0)},${y + height}L${points.join("L")}L${x(DATA.duration)},${y + height}Z`, fill: "var(--area)", opacity: .16 });
  node(svg, "path", { d: `M${points.join("L")}`, fill: "none", stroke: "var(--area)", "stroke-width": 1.6, "stroke-linejoin": "round" });
  node(svg, "line", { x1: GUTTER, x2: width - 6, y1: y + height, y2: y + height, stroke: "var(--faint)" });
}

function line(svg, x, stream, y, row) {
  const middle = y + row / 2, paint = stream.ok ? (stream.temperature > 0 ? "var(--sampled)" : "var(--greedy)") : "var(--red)", times = stream.times;
  const end = times.length ? times[times.length - 1] : stream.at;
  const gaps = times.slice(1).map((time, i) => time - times[i]).sort((a, b) => a - b), still = Math.max(.25, 4 * (quantile(gaps, .5) || 0));
  node(svg, "line", { x1: x(stream.at), x2: x(end), y1: middle, y2: middle, stroke: paint, "stroke-width": row * .5, opacity: .2 });
  let path = "", from = times[0];
  times.forEach((time, i) => {
    if (i + 1 < times.length && times[i + 1] - time <= still) return;
    path += `M${x(from).toFixed(1)},${middle}H${Math.max(x(time), x(from) + 1).toFixed(1)}`;
    from = times[i + 1];
  });
  if (path) node(svg, "path", { d: path, stroke: paint, "stroke-width": Math.max(2, row * .5), fill: "none" });
  const target = node(svg, "rect", { x: x(stream.at) - 2, y, width: Math.max(6, x(end) - x(stream.at) + 4), height: row, fill: "transparent" });
  hover(target, `${stream.id}: ${stream.prompt} prompt tokens, ${times.length} tokens, ${stream.temperature > 0 ? `temperature ${stream.temperature}` : "greedy"}\n` +
    (times.length ? `first token after ${duration((times[0] - stream.at) * 1000)}, longest silence ${duration(gaps.length ? gaps[gaps.length - 1] * 1000 : 0)}\n` : "") +
    (stream.error || (stream.ok ? "as in the undisturbed run" : "differs from the undisturbed run")));
}

function crosshair(svg, x, width, top, bottom) {
  const rule = node(svg, "line", { y1: top, y2: bottom, stroke: "var(--ink)", opacity: 0, "pointer-events": "none" });
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * width;
    const time = (at - GUTTER) / (width - GUTTER - 6) * DATA.duration;
    if (time < 0 || time > DATA.duration) return;
    rule.setAttribute("x1", at); rule.setAttribute("x2", at); rule.setAttribute("opacity", .35);
    const layout = DATA.layouts.find(item => item.from <= time && time < item.to);
    const live = DATA.instances.filter(item => item.from <= time && time <= item.to).length;
    const active = DATA.streams.filter(item => item.at <= time && item.times.length && time <= item.times[item.times.length - 1]).length;
    showTip(event, `${number(time, 2)} s\n${layout ? `${layout.config}, epoch ${layout.epoch}` : "no layout in force"}\n${live} instances, ${active} streams`);
  });
  svg.addEventListener("pointerleave", () => { rule.setAttribute("opacity", 0); hideTip(); });
}

function row(table, cells, kind = "td") {
  const line = html(table, "tr");
  for (const [content, className] of cells) {
    const cell = html(line, kind, className || "");
    if (content instanceof Node) cell.appendChild(content); else cell.textContent = content ?? "";
  }
}
function chip(config) {
  const element = document.createElement("span");
  element.className = "chip";
  element.style.background = config && config !== "none" ? colour(config) : "var(--soft)";
  element.textContent = config || "nothing fits";
  return element;
}
function phases(change, longest) {
  const bar = document.createElement("div"), parts = [["prepare", "var(--amber)"], ["copy", "var(--c0)"], ["pause", "var(--c2)"], ["transfer", "var(--c1)"]];
  bar.className = "bar";
  for (const [name, fill] of parts) {
    const part = html(bar, "i");
    part.style.width = `${100 * (change.seconds[name] || 0) / longest}%`;
    part.style.background = fill;
  }
  hover(bar, parts.map(([name]) => `${name} ${duration(1000 * (change.seconds[name] || 0))}`).join("\n"));
  return bar;
}

function requests(change) {
  const parts = [];
  if (change.requestsMoved) parts.push(`${change.requestsMoved} moved`);
  if (change.requestsRestored) parts.push(`${change.requestsRestored} restored from copies`);
  if (change.requestsReplayed) parts.push(`${change.requestsReplayed} replayed`);
  return parts.join(", ") || "–";
}

function changes() {
  const table = byId("changes"), heads = ["at", "from", "to", "", "because", "phases", "stopped", "worst stall", "from disk", "between instances", "inside", "KV", "requests"];
  row(table, heads.map((head, i) => [head, i > 5 && i < 12 ? "n" : ""]), "th");
  const total = change => ["prepare", "copy", "pause", "transfer"].reduce((sum, name) => sum + (change.seconds[name] || 0), 0);
  const longest = Math.max(1e-6, ...DATA.reconfigurations.map(total));
  for (const change of DATA.reconfigurations) {
    const moved = change.moved, tag = document.createElement("span");
    tag.className = `tag ${change.mode}`;
    tag.textContent = change.mode;
    row(table, [[`${number(change.at, 1)} s`], [chip(change.from)], [chip(change.to)], [tag], [change.reason, "wrap"], [phases(change, longest)], [duration(change.stopped), "n"],
      [duration(change.stall), "n"], [size(moved.weights_disk_bytes), "n"], [size(moved.weights_inter_bytes), "n"],
      [size((moved.weights_local_bytes || 0) + (moved.weights_intra_bytes || 0)), "n"], [size(moved.kv_bytes), "n"], [requests(change)]]);
  }
  const clocks = S.recovery_clocks_ms;
  if (DATA.recoveries.length) byId("clocks").textContent = `After a loss, by four clocks (median): known to the controller after ${duration(clocks.detected.p50)}, ` +
    `layout in force after ${duration(clocks.restored.p50)}, first token after ${duration(clocks.served.p50)}; the longest silence that any one stream saw was ${duration(clocks.stall.max)}.`;
}

function planBook() {
  const points = DATA.plan, error = S.cost_model_error;
  byId("planline").textContent = `One plan for every state that the fleet can be in` + (S.plan_version ? `, version ${S.plan_version}` : "") + "." +
    (error.median === null || error.median === undefined ? "" : ` The cost model behind it is off by ${number(100 * error.median, 1)} % (median) and ${number(100 * error.p90, 1)} % (90th percentile) on points that it was not fitted to.`);
  const table = byId("book");
  row(table, [["state"], ["runs"], ["requests/s", "n"], ["latency", "n"]], "th");
  for (const point of points) row(table, [[point.state], [chip(point.config)], [number(point.throughput, 2), "n"], [point.latency === null ? "–" : duration(point.latency * 1000), "n"]]);
  const fit = points.filter(point => point.throughput !== null || point.latency !== null);
  const key = fit.some(point => point.throughput !== null) ? "throughput" : "latency";
  const { svg, width, height } = canvas(byId("plan"), 230), left = 40, bottom = height - 34, top = 26;
  if (!fit.length) return;
  const most = Math.max(...fit.map(point => point[key] || 0)) * 1.12, count = Math.max(...points.map(point => point.instances), 1);
  const x = value => left + value / count * (width - left - 40), y = value => bottom - value / most * (bottom - top);
  node(svg, "text", { x: 0, y: 12 }, key === "throughput" ? "requests a second" : "seconds");
  const step = niceStep(most, 4);
  for (let value = 0; value <= most; value += step) {
    node(svg, "line", { x1: left, x2: width - 8, y1: y(value), y2: y(value), stroke: "var(--grid)" });
    node(svg, "text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, number(value, step < 1 ? (step < .1 ? 2 : 1) : 0));
  }
  node(svg, "path", { d: "M" + fit.map(point => `${x(point.instances)},${y(point[key])}`).join("L"), fill: "none", stroke: "var(--soft)", "stroke-width": 1.5 });
  for (const point of points) {
    node(svg, "text", { x: x(point.instances), y: bottom + 17, "text-anchor": "middle" }, point.instances);
    if (point[key] === null) continue;
    const dot = node(svg, "circle", { cx: x(point.instances), cy: y(point[key]), r: 6, fill: colour(point.config), stroke: "var(--card)", "stroke-width": 2 });
    hover(dot, `${point.state}: ${point.config}\n${point.reason}`);
    node(svg, "text", { x: x(point.instances), y: y(point[key]) - 11, "text-anchor": "middle", class: "strong" }, point.config);
  }
  node(svg, "text", { x: left, y: bottom + 17, "text-anchor": "middle" }, "instances");
}

function facts() {
  for (const [name, value] of Object.entries(DATA.facts)) {
    const item = html(byId("facts"), "div");
    html(item, "dt", "", name);
    html(item, "dd", "", value);
  }
}

function draw() {
  timeline();
  histogram(byId("ttft"), "Time to the first token", DATA.latency.ttft);
  histogram(byId("inter"), "Between tokens", DATA.latency.inter_token);
  histogram(byId("e2e"), "Whole request", DATA.latency.end_to_end);
  byId("book").replaceChildren();
  planBook();
}

heading();
legend();
changes();
facts();
draw();
let pending = 0;
addEventListener("resize", () => { cancelAnimationFrame(pending); pending = requestAnimationFrame(draw); });
