"use strict";
// The page is complete without this script. It adds filters, sorting, and a plot that follows them. Text is only ever set as text.
(() => {
  const table = document.getElementById("rows");
  if (!table) return;
  const { rows, axes, measures, descending } = JSON.parse(document.getElementById("data").textContent);
  const lines = [...table.tBodies[0].rows];
  const SVG = "http://www.w3.org/2000/svg";

  function element(name, parent, attributes = {}, text = null, namespace = null) {
    const made = namespace ? document.createElementNS(namespace, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== null) made.textContent = text;
    parent.append(made);
    return made;
  }
  const svg = (name, parent, attributes, text) => element(name, parent, attributes, text, SVG);

  // -- filters -----------------------------------------------------------------------------------------------------------------

  const chosen = new Map(); // facet -> values that may be shown; none chosen: all
  let words = "";
  const state = { x: Object.keys(axes)[0], y: Object.keys(measures)[0] };

  const fits = row =>
    row.label.toLowerCase().includes(words) && [...chosen].every(([facet, values]) => !values.size || values.has(row.filters[facet]));
  const visible = () => rows.filter(fits);

  function makeFilters() {
    const bar = document.getElementById("filters");
    for (const facet of Object.keys(rows[0].filters)) {
      const values = [...new Set(rows.map(row => row.filters[facet]))].filter(value => value !== "");
      if (values.length < 2) continue;
      if (typeof values[0] === "number") values.sort((a, b) => a - b);
      chosen.set(facet, new Set());
      const set = element("fieldset", bar);
      element("legend", set, {}, facet);
      const choices = element("div", set, { class: "choices" });
      for (const value of values) {
        const button = element("button", choices, { type: "button", "aria-pressed": "false" }, String(value));
        button.addEventListener("click", () => {
          const values = chosen.get(facet);
          if (!values.delete(value)) values.add(value);
          button.setAttribute("aria-pressed", String(values.has(value)));
          update();
        });
      }
    }
    if (rows.length > 12) {
      const label = element("label", bar, {}, "row contains");
      const input = element("input", label, { type: "search", size: "16" });
      input.addEventListener("input", () => { words = input.value.toLowerCase(); update(); });
    }
    const named = Object.fromEntries(Object.entries(measures).map(([key, measure]) => [key, measure.name]));
    for (const [name, options] of [["x", axes], ["y", named]]) {
      if (Object.keys(options).length < 2 || !document.getElementById("plot")) continue;
      const label = element("label", bar, {}, `plot ${name}`);
      const select = element("select", label);
      for (const [key, text] of Object.entries(options)) element("option", select, { value: key }, text);
      select.addEventListener("change", () => { state[name] = select.value; update(); });
    }
    const count = element("output", bar);
    bar.hidden = bar.childElementCount < 2;
    return count;
  }

  // -- table -------------------------------------------------------------------------------------------------------------------

  function sortBy(column, heading) {
    const first = descending[column] ? "descending" : "ascending"; // the best comes first
    const up = heading.getAttribute("aria-sort") === first ? descending[column] : !descending[column];
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = line => rows[line.dataset.i].keys[column];
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
    lines.sort((one, two) => {
      const [a, b] = [key(one), key(two)];
      if (a === null || b === null) return (a === null) - (b === null); // what is unknown comes last, either way
      return up ? compare(a, b) : compare(b, a);
    });
    table.tBodies[0].append(...lines);
  }

  [...table.tHead.rows[0].cells].forEach((heading, column) =>
    heading.querySelector("button").addEventListener("click", () => sortBy(column, heading)));

  // -- plot --------------------------------------------------------------------------------------------------------------------

  const figure = document.getElementById("plot");
  const canvas = figure && figure.querySelector(".canvas");
  const tip = figure && figure.querySelector(".tip");
  let points = [];
  let active = null;

  function niceStep(rough) {
    const power = 10 ** Math.floor(Math.log10(rough));
    return [1, 2, 5, 10].map(factor => factor * power).find(step => step >= rough * 0.999);
  }

  function scale(low, high, start, end, logarithmic) {
    const place = value => (logarithmic ? Math.log(value) : value);
    const at = value => start + Math.min(Math.max((place(value) - place(low)) / (place(high) - place(low)), 0), 1) * (end - start);
    const values = [];
    if (logarithmic) {
      const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
      const factors = 3 * Math.log10(high / low) < Math.abs(end - start) / 42 ? [1, 2, 5] : [1];
      for (let power = first; power <= last; power++) for (const k of factors) values.push(k * 10 ** power);
    } else {
      const step = niceStep((high - low) / Math.max(2, Math.min(6, Math.abs(end - start) / 70)));
      for (let k = Math.ceil(low / step - 1e-9); k <= high / step + 1e-9; k++) values.push(k * step);
    }
    return { at, low, high, ticks: values.filter(value => value >= low * 0.999 && value <= high * 1.001) };
  }

  const shorten = value => String(Number(value.toPrecision(4)));

  function scales(shown, box) {
    const [xs, ys] = [shown.map(row => row[state.x]), shown.map(row => row[state.y])];
    const [xMin, xMax, yMin, yMax] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const logarithmic = xMin > 0 && xMax > 12 * xMin;
    const { percent } = measures[state.y];
    const step = niceStep(Math.max(yMax - yMin, percent ? 0.4 : Math.abs(yMax) * 0.01 || 1) / 4);
    const [top, bottom] = [percent ? 100 : Infinity, yMin >= 0 ? 0 : -Infinity];
    return {
      x: scale(logarithmic ? xMin / 1.3 : 0, logarithmic ? xMax * 1.3 : xMax * 1.12 || 1, box.left, box.right, logarithmic),
      y: scale(Math.max(bottom, Math.floor(yMin / step - 0.5) * step), Math.min(top, Math.ceil(yMax / step + 0.5) * step), box.bottom, box.top, false),
    };
  }

  // A row is on the frontier when no other shown row of its setting is at least as good in both, and better in one.
  function frontiers(shown) {
    const { lower, ranked } = measures[state.y];
    const lines = new Map();
    if (!ranked) return [];
    const rank = row => (lower ? -row[state.y] : row[state.y]);
    for (const row of [...shown].sort((a, b) => a[state.x] - b[state.x] || rank(b) - rank(a))) {
      const line = lines.get(row.setting) ?? [];
      const last = line.at(-1);
      if (!last || rank(row) > rank(last) || (row[state.x] === last[state.x] && row[state.y] === last[state.y])) line.push(row);
      lines.set(row.setting, line);
    }
    return [...lines.values()];
  }

  // Of a canvas: asking the drawing itself would lay the whole page out anew for each label.
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;

  // Beside the point, above or below it; null where every place covers a point or another label.
  function label(width, x, y, reach, box, taken) {
    const places = [["start", x + reach, y], ["end", x - reach, y], ["middle", x, y - reach - 6], ["middle", x, y + reach + 6],
      ["start", x + reach, y - 13], ["start", x + reach, y + 13], ["end", x - reach, y - 13], ["end", x - reach, y + 13]];
    for (const [anchor, atX, atY] of places) {
      const left = atX - { start: 0, middle: width / 2, end: width }[anchor];
      const area = [left - 2, atY - 8, left + width + 2, atY + 8];
      if (left < box.left || area[2] > box.right + 16 || area[1] < 12 || area[3] > box.bottom) continue;
      if (taken.some(other => area[0] < other[2] && other[0] < area[2] && area[1] < other[3] && other[1] < area[3])) continue;
      taken.push(area);
      return { anchor, x: atX, y: atY + 4 };
    }
    return null;
  }

  function draw() {
    if (!figure) return;
    const shown = visible().filter(row => row[state.x] !== null && row[state.y] !== null);
    const width = Math.max(300, canvas.clientWidth);
    const height = Math.max(280, Math.min(440, width * 0.55));
    const box = { left: 52, right: width - 16, top: 20, bottom: height - 44 };
    const root = document.createElementNS(SVG, "svg");
    root.setAttribute("viewBox", `0 0 ${width} ${height}`);
    root.setAttribute("role", "img");
    root.setAttribute("aria-label", `${measures[state.y].name} against ${axes[state.x]}, ${shown.length} rows`);
    points = [];
    canvas.replaceChildren(root);
    canvas.classList.add("drawn");
    leave();
    if (!shown.length) {
      svg("text", root, { x: width / 2, y: height / 2, "text-anchor": "middle" }, "No row with these figures fits the filters.");
      return;
    }
    const { x, y } = scales(shown, box);
    for (const value of y.ticks) {
      svg("line", root, { class: "grid", x1: box.left, x2: box.right, y1: y.at(value), y2: y.at(value) });
      svg("text", root, { x: box.left - 8, y: y.at(value) + 4, "text-anchor": "end" }, shorten(value));
    }
    for (const value of x.ticks) svg("text", root, { x: x.at(value), y: box.bottom + 18, "text-anchor": "middle" }, shorten(value));
    svg("text", root, { class: "axis", x: box.right, y: box.bottom + 37, "text-anchor": "end" }, axes[state.x]);
    svg("text", root, { class: "axis", x: box.left, y: 11 }, measures[state.y].name);
    const lines = frontiers(shown);
    const best = new Set(lines.flat());
    // Lines of many settings would cross each other and tell nothing.
    for (const line of lines.length <= 6 ? lines.filter(line => line.length > 1) : []) {
      svg("polyline", root, { class: "front", points: line.map(row => `${x.at(row[state.x])},${y.at(row[state.y])}`).join(" ") });
    }
    const placed = shown.map(row => ({ row, x: x.at(row[state.x]), y: y.at(row[state.y]) }));
    placed.sort((a, b) => best.has(b.row) - best.has(a.row) || a.x - b.x);
    const reach = point => 6 * point.row.scale;
    const taken = placed.map(point => [point.x - reach(point), point.y - reach(point), point.x + reach(point), point.y + reach(point)]);
    const [low, high] = [`${state.y}_low`, `${state.y}_high`];
    const intervals = shown.length <= 40;
    // On a phone a label that has to give way ends up beside another point: only what nothing beats is labelled there.
    const labelled = shown.length > 200 ? [] : width < 520 && best.size ? placed.filter(point => best.has(point.row)) : placed;
    for (const point of placed) {
      point.group = svg("g", root, { class: `${point.row.family}${best.has(point.row) ? " best" : ""}` });
      if (intervals && point.row[low] !== null && point.row[high] !== null) {
        const ends = [y.at(point.row[low]), y.at(point.row[high])];
        svg("line", point.group, { class: "interval", x1: point.x, x2: point.x, y1: ends[0], y2: ends[1] });
        if (point.row[low] < y.low) svg("path", point.group, { class: "cut", d: "M-4-6h8L0 0Z", transform: `translate(${point.x} ${ends[0]})` });
        if (point.row[high] > y.high) svg("path", point.group, { class: "cut", d: "M-4 6h8L0 0Z", transform: `translate(${point.x} ${ends[1]})` });
      }
      svg("path", point.group, { class: "point", d: point.row.marker, transform: `translate(${point.x} ${point.y}) scale(${point.row.scale})` });
    }
    for (const point of labelled) {
      const text = point.row.tag;
      const place = label(pen.measureText(text).width, point.x, point.y, reach(point) + 4, box, taken);
      if (place) svg("text", point.group, { class: "label", x: place.x, y: place.y, "text-anchor": place.anchor }, text);
    }
    points = placed.sort((a, b) => a.x - b.x || a.y - b.y);
  }

  // -- the point under the pointer, or chosen by keys ------------------------------------------------------------------------------

  function leave() {
    if (!active) return;
    active.group.classList.remove("active");
    lineOf(active.row).classList.remove("active");
    active = null;
    tip.hidden = true;
  }

  const lineOf = row => table.tBodies[0].querySelector(`tr[data-i="${rows.indexOf(row)}"]`);

  function enter(point) {
    if (active === point) return;
    leave();
    active = point;
    point.group.classList.add("active");
    const line = lineOf(point.row);
    line.classList.add("active");
    tip.replaceChildren();
    element("b", tip, {}, point.row.label);
    const headings = [...table.tHead.rows[0].cells].map(cell => cell.textContent);
    [...line.cells].forEach((cell, index) => {
      if (index && cell.textContent !== "-") element("div", tip, {}, `${headings[index]}: ${cell.textContent}`);
    });
    tip.hidden = false;
    const shift = canvas.scrollLeft, room = figure.clientWidth;
    const wanted = point.x - shift + 14;
    tip.style.left = `${Math.max(0, wanted + tip.offsetWidth > room ? point.x - shift - tip.offsetWidth - 14 : wanted)}px`;
    tip.style.top = `${Math.max(0, point.y - 20)}px`;
  }

  function nearest(event) {
    const frame = canvas.firstElementChild.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
    let found = null, least = 26;
    for (const point of points) {
      const distance = Math.hypot(point.x - x, point.y - y);
      if (distance < least) [found, least] = [point, distance];
    }
    return found;
  }

  function showLine(point) {
    lineOf(point.row).scrollIntoView({ block: "center", behavior: "auto" });
  }

  if (figure) {
    canvas.addEventListener("pointermove", event => { const point = nearest(event); if (point) enter(point); else leave(); });
    canvas.addEventListener("pointerleave", leave);
    canvas.addEventListener("click", event => { const point = nearest(event); if (point && event.detail > 1) showLine(point); else if (point) enter(point); });
    canvas.addEventListener("keydown", event => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step && points.length) {
        const from = active ? points.indexOf(active) : step > 0 ? -1 : points.length;
        enter(points[Math.min(Math.max(from + step, 0), points.length - 1)]);
      } else if (event.key === "Enter" && active) showLine(active);
      else if (event.key === "Escape") leave();
      else return;
      event.preventDefault();
    });
    canvas.addEventListener("blur", leave);
    table.tBodies[0].addEventListener("pointerover", event => {
      const line = event.target.closest("tr");
      const point = line && points.find(point => point.row === rows[line.dataset.i]);
      for (const other of points) other.group.classList.toggle("active", other === point || other === active);
    });
    table.tBodies[0].addEventListener("pointerleave", () => {
      for (const point of points) point.group.classList.toggle("active", point === active);
    });
    let waiting = 0;
    new ResizeObserver(() => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(redraw); }).observe(canvas);
  }

  let drawnWidth = 0;
  function redraw() {
    if (canvas.clientWidth !== drawnWidth) { drawnWidth = canvas.clientWidth; draw(); }
  }

  function update() {
    const shown = new Set(visible());
    for (const line of lines) line.hidden = !shown.has(rows[line.dataset.i]);
    document.getElementById("nothing").hidden = shown.size > 0;
    count.textContent = `${shown.size} of ${rows.length} rows`;
    if (figure) { drawnWidth = canvas.clientWidth; draw(); }
  }

  const count = makeFilters();
  update();

  const scroll = table.parentElement;
  new ResizeObserver(() => document.getElementById("measured").classList.toggle("is-wider", scroll.scrollWidth > scroll.clientWidth + 1)).observe(scroll);

  // Paper has no summaries to click on.
  let closed = [];
  addEventListener("beforeprint", () => { closed = [...document.querySelectorAll("details:not([open])")]; for (const one of closed) one.open = true; });
  addEventListener("afterprint", () => { for (const one of closed) one.open = false; });
})();
