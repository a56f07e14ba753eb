// The loss chart: one line per trainer over its own steps, what was reported drawn faint and its centred moving mean strong.

import { element, shape, shortId, whole } from "./element.js";

const MARGIN = { top: 8, right: 14, bottom: 26, left: 40 };
const SMOOTHING = 1 / 40; // half the mean's window, as a share of all points
const MAX_POINTS = 2000;

export class LossChart {
  #box;
  #readout;
  #lines = new Map(); // trainer's peer id -> { colour, points: [[step, loss]] }
  #cursorStep = null;

  constructor(box, readout) {
    this.#box = box;
    this.#readout = readout;
    new ResizeObserver(() => this.#draw()).observe(box);
    box.addEventListener("pointermove", (event) => this.#point(event.clientX));
    box.addEventListener("pointerleave", () => this.#moveTo(null));
    box.addEventListener("keydown", (event) => this.#key(event));
    box.addEventListener("blur", () => this.#moveTo(null), true);
  }

  /** Start again from `losses`: [{peer_id, points}]. */
  reset(losses) {
    this.#lines.clear();
    this.extend(losses);
  }

  /** Append points; a trainer that went back to an earlier step overwrites what it takes back. */
  extend(losses) {
    for (const { peer_id, points } of losses) {
      const line = this.#lines.get(peer_id) ?? { colour: Math.min(this.#lines.size, 4) + 1, points: [] };
      for (const [step, loss] of points) {
        while (line.points.length && line.points.at(-1)[0] >= step) line.points.pop();
        line.points.push([step, loss]);
      }
      if (line.points.length > MAX_POINTS) line.points = line.points.filter((_, i) => i % 2 === 1);
      if (line.points.length) this.#lines.set(peer_id, line);
    }
    this.#draw();
  }

  colourOf(peerId) {
    return this.#lines.get(peerId)?.colour ?? 0;
  }

  #scales() {
    const points = [...this.#lines.values()].flatMap((line) => line.points);
    const [firstStep, lastStep] = extent(points.map((point) => point[0]));
    const [low, high] = extent(points.map((point) => point[1]));
    const width = this.#box.clientWidth - MARGIN.left - MARGIN.right;
    const height = this.#box.clientHeight - MARGIN.top - MARGIN.bottom;
    const padding = (high - low) * 0.06 || 0.5;
    const [bottom, top] = [low - padding, high + padding];
    return {
      x: (step) => MARGIN.left + (width * (step - firstStep)) / (lastStep - firstStep || 1),
      y: (loss) => MARGIN.top + (height * (top - loss)) / (top - bottom || 1),
      firstStep, lastStep, width, height,
      lossTicks: ticks(bottom, top, 6),
      stepTicks: ticks(firstStep, lastStep, Math.max(2, Math.floor(width / 60))).filter(Number.isInteger),
    };
  }

  #draw() {
    if (this.#lines.size === 0) {
      this.#box.replaceChildren(element("p", { class: "empty" }, "The first loss appears here once a trainer has taken a step."));
      this.#readout.textContent = "";
      return;
    }
    const hadFocus = this.#box.contains(document.activeElement);
    const scales = this.#scales();
    const svg = shape("svg", { role: "img", tabindex: 0, "aria-label": this.#inWords() },
      ...scales.lossTicks.map((tick) => shape("g", {},
        shape("line", { class: "grid", x1: MARGIN.left, x2: MARGIN.left + scales.width, y1: scales.y(tick), y2: scales.y(tick) }),
        shape("text", { class: "tick", x: MARGIN.left - 8, y: scales.y(tick) + 4, "text-anchor": "end" }, tidy(tick)))),
      ...scales.stepTicks.map((tick) => shape("text",
        { class: "tick", x: scales.x(tick), y: MARGIN.top + scales.height + 19, "text-anchor": "middle" }, whole(tick))),
      ...[...this.#lines.values()].map((line) => shape("g", { "data-line": line.colour },
        shape("path", { class: "raw", d: path(line.points, scales) }),
        shape("path", { class: "smooth", d: path(smooth(line.points), scales) }))));
    this.#box.replaceChildren(svg);
    if (hadFocus) svg.focus();
    this.#drawCursor(svg, scales);
  }

  #drawCursor(svg, scales) {
    if (this.#cursorStep === null) {
      this.#readout.textContent = "bits per byte, by step";
      return;
    }
    const found = [...this.#lines].map(([peerId, line]) => [peerId, line.colour, nearest(line.points, this.#cursorStep)]);
    const x = scales.x(Math.min(scales.lastStep, Math.max(scales.firstStep, this.#cursorStep)));
    svg.append(shape("line", { class: "cursor", x1: x, x2: x, y1: MARGIN.top, y2: MARGIN.top + scales.height }),
      ...found.map(([, colour, [step, loss]]) => shape("circle", { class: "mark", "data-line": colour, cx: scales.x(step), cy: scales.y(loss), r: 4.5 })));
    const who = (peerId) => (found.length > 1 ? `${shortId(peerId)} ` : "");
    this.#readout.textContent = found.slice(0, 4).map(([peerId, , [step, loss]]) => `${who(peerId)}step ${whole(step)}: ${loss.toFixed(3)}`).join("   ");
  }

  #point(clientX) {
    if (this.#lines.size === 0) return;
    const scales = this.#scales();
    const share = (clientX - this.#box.getBoundingClientRect().left - MARGIN.left) / scales.width;
    this.#moveTo(scales.firstStep + Math.min(1, Math.max(0, share)) * (scales.lastStep - scales.firstStep));
  }

  #key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by === undefined || this.#lines.size === 0) return;
    event.preventDefault();
    const points = [...this.#lines.values()][0].points;
    const at = this.#cursorStep === null ? points.length - 1 : points.indexOf(nearest(points, this.#cursorStep)) + by;
    this.#moveTo(points[Math.min(points.length - 1, Math.max(0, at))][0]);
  }

  #moveTo(step) {
    if (step === this.#cursorStep) return;
    this.#cursorStep = step;
    this.#draw();
  }

  #inWords() {
    return [...this.#lines].map(([peerId, { points }]) =>
      `Trainer ${shortId(peerId)}: ${points[0][1].toFixed(2)} bits per byte at step ${points[0][0]}, ${points.at(-1)[1].toFixed(2)} at step ${points.at(-1)[0]}.`).join(" ");
  }
}

const path = (points, { x, y }) => points.map(([step, loss], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(loss).toFixed(1)}`).join("");

/** A centred mean lags behind nothing; towards the ends its window narrows, evenly on both sides. */
function smooth(points) {
  const half = Math.ceil(points.length * SMOOTHING);
  return points.map(([step], i) => {
    const reach = Math.min(half, i, points.length - 1 - i);
    const window = points.slice(i - reach, i + reach + 1);
    return [step, window.reduce((sum, [, loss]) => sum + loss, 0) / window.length];
  });
}

const extent = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);

const nearest = (points, step) => points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));

/** Round numbers between `low` and `high`, about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

const tidy = (tick) => (Math.abs(tick) >= 1000 ? whole(tick) : String(tick));
