// Curves on a canvas: several runs together, smoothed, on a linear or a logarithmic scale, with a
// cross hair that the pointer and the arrow keys move.  The cost of drawing grows with the number of
// pixels, not of points.

const MARGIN = { left: 52, right: 14, top: 12, bottom: 28 };

/** Loss by step of one run. */
export class Curve {
  constructor(name, colour) {
    this.name = name;
    this.colour = colour;
    this.shown = true;
    this.steps = [];
    this.losses = [];
    this.smooth = [];
    this.smoothing = -1;
  }

  /** Replaces the points from index *start* on; returns false if earlier points are missing. */
  put(start, steps, losses) {
    if (start > this.steps.length) return false;
    if (start < this.steps.length) {
      this.steps.length = this.losses.length = start;
      this.smoothing = -1;
    }
    for (let i = 0; i < steps.length; i++) {
      this.steps.push(steps[i]);
      this.losses.push(losses[i]);
    }
    return true;
  }

  /** The exponential moving average, corrected for its start. */
  smoothed(weight) {
    if (this.smoothing !== weight) {
      this.smoothing = weight;
      this.smooth = [];
      this.sum = 0;
      this.norm = 0;
    }
    for (let i = this.smooth.length; i < this.losses.length; i++) {
      const loss = this.losses[i];
      if (loss !== null) {
        this.sum = this.sum * weight + loss * (1 - weight);
        this.norm = this.norm * weight + (1 - weight);
      }
      this.smooth.push(this.norm ? this.sum / this.norm : null);
    }
    return this.smooth;
  }

  /** The index of the point nearest to *step*, or -1. */
  near(step) {
    const { steps } = this;
    if (!steps.length) return -1;
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1;
      else high = middle;
    }
    return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low;
  }
}

/** Returns a distance between ticks that reads well: 1, 2, 2.5 or 5 times a power of ten. */
function nice(span, most) {
  const rough = span / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough) * power;
}

function linearTicks(low, high, most) {
  const by = nice(high - low || 1, most);
  const ticks = [];
  for (let i = Math.ceil(low / by); i * by <= high + by * 1e-9; i++) ticks.push(i * by);
  return ticks;
}

function logTicks(low, high, most) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of [1, 2, 3, 5, 7]) {
      const tick = factor * 10 ** power;
      if (tick >= low && tick <= high) found.push([tick, factor]);
    }
  }
  if (found.length < 2) return linearTicks(low, high, most);
  for (const factors of [[1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
    const kept = found.filter(([, factor]) => factors.includes(factor));
    if (kept.length <= most && kept.length >= 2) return kept.map(([tick]) => tick);
  }
  return linearTicks(low, high, most);
}

export function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return size >= 1000 ? value.toFixed(0) : size >= 100 ? value.toFixed(1) : value.toFixed(3);
}

/** Returns values without the rarest at either end: a spike may leave the chart, but not its average. */
function usual(values) {
  const by = Math.max(1, Math.floor(values.length / 400));
  const some = values.filter((value, i) => i % by === 0 && value !== null).sort((a, b) => a - b);
  const rare = Math.floor(some.length / 100);
  return some.slice(rare, some.length - rare);
}

const tickText = (value) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(0) : String(+value.toPrecision(6)));
const stepText = (step) => (step >= 1e6 ? `${+(step / 1e6).toFixed(2)}M` : step >= 1e3 && step % 100 === 0 ? `${step / 1e3}k` : String(step));

export class Chart {
  /** *onPoint* is called with what is under the cross hair, or with null without one. */
  constructor(frame, canvas, onPoint) {
    this.frame = frame;
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.onPoint = onPoint;
    this.curves = [];
    this.smoothing = 0.6;
    this.log = false;
    this.at = null; // the step under the cross hair
    this.waiting = false;
    new ResizeObserver(() => this.redraw()).observe(frame);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
    frame.addEventListener("pointermove", (event) => this.point(event.clientX - canvas.getBoundingClientRect().left));
    frame.addEventListener("pointerdown", (event) => this.point(event.clientX - canvas.getBoundingClientRect().left));
    frame.addEventListener("pointerleave", () => this.move(null));
    frame.addEventListener("blur", () => this.move(null));
    frame.addEventListener("keydown", (event) => this.key(event));
  }

  /** Draws in the next frame, and only once, however often this is called. */
  redraw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  visible() {
    return this.curves.filter((curve) => curve.shown && curve.steps.length);
  }

  /** The range of the curves, or null if there is nothing to draw. */
  range() {
    let first = Infinity, last = -Infinity, low = Infinity, high = -Infinity;
    for (const curve of this.visible()) {
      const smooth = curve.smoothed(this.smoothing);
      first = Math.min(first, curve.steps[0]);
      last = Math.max(last, curve.steps[curve.steps.length - 1]);
      for (const values of [usual(curve.losses), smooth]) {
        for (const value of values) {
          if (value === null || (this.log && value <= 0)) continue;
          if (value < low) low = value;
          if (value > high) high = value;
        }
      }
    }
    if (low > high) return null;
    if (first === last) last = first + 1;
    if (this.log) {
      const room = (high / low) ** 0.06 || 1.1;
      return { first, last, low: low / Math.max(room, 1.02), high: high * Math.max(room, 1.02) };
    }
    const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return { first, last, low: low - room, high: high + room };
  }

  draw() {
    const { canvas, context } = this;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width || !height) return;
    const scale = devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    const range = this.range();
    this.area = null;
    if (!range) return;
    const style = getComputedStyle(this.frame);
    const colour = (name) => style.getPropertyValue(name).trim();
    const area = { x: MARGIN.left, y: MARGIN.top, width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
    this.area = { ...area, ...range };
    const x = (step) => area.x + ((step - range.first) / (range.last - range.first)) * area.width;
    const of = this.log ? Math.log : (value) => value;
    const y = (value) => area.y + area.height - ((of(value) - of(range.low)) / (of(range.high) - of(range.low))) * area.height;

    context.font = `11px ${style.fontFamily}`;
    context.lineWidth = 1;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const most = Math.max(2, Math.floor(area.height / 38));
    for (const tick of this.log ? logTicks(range.low, range.high, most + 2) : linearTicks(range.low, range.high, most)) {
      const place = Math.round(y(tick)) + 0.5;
      context.strokeStyle = colour("--line");
      context.beginPath();
      context.moveTo(area.x, place);
      context.lineTo(area.x + area.width, place);
      context.stroke();
      context.fillStyle = colour("--muted");
      context.fillText(tickText(tick), area.x - 8, place);
    }
    context.textBaseline = "top";
    for (const tick of linearTicks(range.first, range.last, Math.max(2, Math.floor(area.width / 72)))) {
      if (!Number.isInteger(tick)) continue;
      const place = x(tick);
      context.textAlign = place > area.x + area.width - 16 ? "right" : place < area.x + 6 ? "left" : "center";
      context.fillText(stepText(tick), place, area.y + area.height + 9);
    }

    context.save();
    context.beginPath();
    context.rect(area.x - 1, area.y - 4, area.width + 4, area.height + 8);
    context.clip();
    context.lineJoin = "round";
    for (const curve of this.visible()) {
      const smooth = curve.smoothed(this.smoothing);
      context.strokeStyle = colour(curve.colour);
      if (this.smoothing > 0) {
        context.globalAlpha = 0.22;
        context.lineWidth = 1;
        this.line(curve.steps, curve.losses, x, y, area);
      }
      context.globalAlpha = 1;
      context.lineWidth = 1.75;
      this.line(curve.steps, smooth, x, y, area);
    }
    context.restore();
    this.crossHair(x, y, area, colour);
  }

  /** Draws a line; points in the same column of pixels are drawn as their range. */
  line(steps, values, x, y, area) {
    const { context } = this;
    context.beginPath();
    const drawable = (value) => value !== null && (!this.log || value > 0);
    if (steps.length === 1 && drawable(values[0])) {
      context.arc(x(steps[0]), y(values[0]), 2, 0, 7);
      context.stroke();
      return;
    }
    let pen = false;
    if (steps.length <= area.width * 1.5) {
      for (let i = 0; i < steps.length; i++) {
        if (!drawable(values[i])) {
          pen = false;
          continue;
        }
        if (pen) context.lineTo(x(steps[i]), y(values[i]));
        else context.moveTo(x(steps[i]), y(values[i]));
        pen = true;
      }
      context.stroke();
      return;
    }
    let column = null, low = 0, high = 0, first = 0, last = 0;
    const flush = () => {
      if (column === null) return;
      if (pen) context.lineTo(column, y(first));
      else context.moveTo(column, y(first));
      if (low !== high) {
        context.lineTo(column, y(low));
        context.lineTo(column, y(high));
        context.lineTo(column, y(last));
      }
      pen = true;
      column = null;
    };
    for (let i = 0; i < steps.length; i++) {
      const value = values[i];
      if (!drawable(value)) {
        flush();
        pen = false;
        continue;
      }
      const place = Math.round(x(steps[i]));
      if (place !== column) {
        flush();
        column = place;
        low = high = first = value;
      }
      if (value < low) low = value;
      if (value > high) high = value;
      last = value;
    }
    flush();
    context.stroke();
  }

  crossHair(x, y, area, colour) {
    const { context } = this;
    if (this.at === null) {
      this.onPoint(null);
      return;
    }
    const place = x(this.at);
    context.strokeStyle = colour("--muted");
    context.globalAlpha = 0.6;
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(place, area.y);
    context.lineTo(place, area.y + area.height);
    context.stroke();
    context.globalAlpha = 1;
    const rows = [];
    for (const curve of this.visible()) {
      const index = curve.near(this.at);
      const far = Math.abs(x(curve.steps[index]) - place) > 12;
      if (far) continue;
      const value = curve.smoothed(this.smoothing)[index];
      rows.push({ curve, step: curve.steps[index], loss: curve.losses[index], smooth: value });
      if (value === null || (this.log && value <= 0)) continue;
      context.fillStyle = colour(curve.colour);
      context.strokeStyle = colour("--surface");
      context.lineWidth = 2;
      context.beginPath();
      context.arc(x(curve.steps[index]), y(value), 4, 0, 7);
      context.fill();
      context.stroke();
    }
    this.onPoint({ step: this.at, x: place, rows, area });
  }

  point(place) {
    if (!this.area) return;
    const part = (place - this.area.x) / this.area.width;
    if (part < -0.02 || part > 1.02) this.move(null);
    else this.move(this.nearest(this.area.first + part * (this.area.last - this.area.first)));
  }

  /** Returns the step nearest to *step* that has a point. */
  nearest(step) {
    let best = null;
    for (const curve of this.visible()) {
      const found = curve.steps[curve.near(step)];
      if (best === null || Math.abs(found - step) < Math.abs(best - step)) best = found;
    }
    return best;
  }

  key(event) {
    if (!this.area) return;
    const { first, last, width } = this.area;
    // By a pixel, or by a step if steps are further apart; ten times as far with Shift.
    const by = Math.max(1, Math.round((last - first) / width)) * (event.shiftKey ? 10 : 1);
    const at = this.at ?? last;
    const to = { ArrowLeft: at - by, ArrowRight: at + by, Home: first, End: last }[event.key];
    if (event.key === "Escape") this.move(null);
    if (to === undefined) return;
    event.preventDefault();
    let found = this.nearest(Math.min(last, Math.max(first, to)));
    if (found === this.at && to !== at) found = Math.min(last, Math.max(first, to));
    this.move(found, true);
  }

  move(step, byKey = false) {
    if (step === this.at) return;
    this.at = step;
    this.byKey = byKey;
    this.redraw();
  }
}

/** Draws rates as a line over a filled area. */
export function spark(canvas, values) {
  const context = canvas.getContext("2d");
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (!width || !height) return;
  const scale = devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  context.setTransform(scale, 0, 0, scale, 0, 0);
  const style = getComputedStyle(canvas);
  const most = Math.max(...values, 1e-9);
  context.strokeStyle = context.fillStyle = style.color;
  const at = (i) => [(i / (values.length - 1)) * (width - 2) + 1, height - 1.5 - (values[i] / most) * (height - 4)];
  context.beginPath();
  context.moveTo(...at(0));
  for (let i = 1; i < values.length; i++) context.lineTo(...at(i));
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.stroke();
  context.lineTo(width - 1, height);
  context.lineTo(1, height);
  context.globalAlpha = 0.12;
  context.fill();
}
