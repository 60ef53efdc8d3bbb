// Shows values under the pointer, the images of a cell, and the newest report of a run that goes on.
"use strict";

// --- figures: a line and a box with the values at the pointer -------------------------------------------------------

function format(value, percent) {
  if (!percent && Number.isInteger(value)) return value.toLocaleString("en");
  return percent ? (100 * value).toFixed(2).replace(/\.?0+$/, "") + "\u00a0%" : String(Number(value.toPrecision(4)));
}

function readout(svg) {
  const data = JSON.parse(svg.dataset.readout);
  const [left, bottom, right, top] = data.box, [x0, y0, x1, y1] = data.limits;
  const px = x => left + (x - x0) / (x1 - x0) * (right - left);
  const py = y => bottom + (y - y0) / (y1 - y0) * (top - bottom);
  const figure = svg.parentElement, tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  const marks = document.createElementNS("http://www.w3.org/2000/svg", "g");
  svg.append(marks);

  function mark(tag, attributes) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    marks.append(element);
  }

  function closest(points, distance) {
    return points.reduce((best, point) => distance(point) < distance(best) ? point : best);
  }

  function row(text, color) {
    const line = document.createElement("div");
    if (color) {
      const dot = document.createElement("i");
      dot.style.background = color;
      line.append(dot);
    }
    line.append(text);
    tip.append(line);
  }

  function show(event) {
    const area = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / area.width;
    const x = (event.clientX - area.left) * scale, y = (event.clientY - area.top) * scale;
    const series = data.series.filter(line => line.points.length);
    if (x < left - 8 || x > right + 8 || !series.length) return hide();
    const flat = ([a, b]) => Math.hypot(px(a) - x, py(b) - y), along = ([a]) => Math.abs(px(a) - x);
    let shown = series.map(line => ({line, point: closest(line.points, data.nearest ? flat : along)}));
    if (data.nearest) shown = [closest(shown, entry => flat(entry.point))];
    const at = closest(shown, entry => along(entry.point)).point[0];
    shown = shown.filter(entry => data.nearest || Math.abs(px(entry.point[0]) - px(at)) < 12);
    marks.replaceChildren();
    tip.replaceChildren();
    if (!data.nearest) mark("line", {x1: px(at), x2: px(at), y1: top, y2: bottom, class: "guide"});
    const epoch = data.steps_per_epoch ? `, epoch ${Number((at / data.steps_per_epoch).toFixed(2))}` : "";
    row(`${data.x} ${format(at, data.x_percent)}${epoch}`);
    for (const {line, point} of shown) {
      mark("circle", {cx: px(point[0]), cy: py(point[1]), r: 3.5, style: `fill: ${line.color}`});
      row(`${data.nearest ? data.y : line.label} ${format(point[1], data.percent)}`, line.color);
      if (data.nearest && series.length > 1) row(line.label);
    }
    tip.hidden = false;
    const place = figure.getBoundingClientRect(), wide = tip.offsetWidth;
    const beside = event.clientX - place.left + 14;
    tip.style.left = `${Math.max(0, beside + wide > place.width ? beside - wide - 28 : beside)}px`;
    tip.style.top = `${event.clientY - place.top + 14}px`;
  }

  function hide() {
    marks.replaceChildren();
    tip.hidden = true;
  }

  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}

document.querySelectorAll("svg[data-readout]").forEach(readout);

// --- the images of a cell of the confusion matrix, or of a pair of classes ------------------------------------------

const panel = document.getElementById("cell");
let opened = null;

function open(button) {
  if (opened) opened.removeAttribute("aria-expanded");
  const again = opened === button;
  opened = again ? null : button;
  panel.replaceChildren();
  panel.hidden = again;
  if (again) return;
  button.setAttribute("aria-expanded", "true");
  const title = document.createElement("h3");
  title.textContent = button.getAttribute("aria-label");
  panel.append(title, document.getElementById(`cell-${button.dataset.cell}`).content.cloneNode(true));
  panel.scrollIntoView({block: "nearest"});
}

document.querySelectorAll("button[data-cell]").forEach(button => button.addEventListener("click", () => open(button)));

// --- tables that are wider than the page say so ---------------------------------------------------------------------

function mark_wide() {
  for (const element of document.querySelectorAll(".scroll, figure")) {
    element.classList.toggle("overflows", element.scrollWidth > element.clientWidth + 1);
  }
}

mark_wide();
addEventListener("resize", mark_wide);

// --- a run that goes on: reload until the report is that of the finished run ----------------------------------------

const live = document.getElementById("live");
if (live) {
  const written = Number(live.dataset.written), seconds = Number(live.dataset.seconds);
  const age = document.getElementById("age");
  const tell = () => {
    const minutes = Math.max(0, Math.floor((Date.now() / 1000 - written) / 60));
    const ago = minutes < 1 ? "just now" : minutes < 120 ? `${minutes} min ago` : `${Math.floor(minutes / 60)} h ago`;
    const late = seconds && Date.now() / 1000 > written + 3 * seconds + 60;
    age.textContent = `${live.dataset.resumed ? "Resumed" : "Written"} ${ago}.` + (late ? " The next report is overdue; the process may have stopped." : "");
  };
  tell();
  setInterval(tell, 5000);
  setInterval(() => { if (!opened && !String(getSelection())) location.reload(); }, 30000);
}
