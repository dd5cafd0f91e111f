// Text as tokens that are coloured by their probability, with a tip on each.  Everything from the
// server is inserted as text, never as markup: a model may say anything.

const BOUNDS = [0.9, 0.7, 0.5, 0.25, 0.05];
const decoder = new TextDecoder();
const encoder = new TextEncoder();
const tip = document.getElementById("tip");

/** Returns the bytes of a token, from the name that the server gives it. */
function bytesOf(name) {
  if (!name.startsWith("bytes:\\x")) return encoder.encode(name);
  return Uint8Array.from(name.slice(8).split("\\x"), (pair) => parseInt(pair, 16));
}

export function percent(logprob) {
  if (logprob === null || logprob === undefined) return "";
  const value = Math.exp(logprob) * 100;
  return value >= 99.95 ? "100 %" : value >= 1 ? `${value.toFixed(1)} %` : value >= 0.01 ? `${value.toFixed(2)} %` : "< 0.01 %";
}

/** Returns the text of a token that is shown alone: spaces, tabs and line feeds are made visible. */
export function visible(text) {
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ | $/g, "␣") || "∅";
}

/** The mean log-probability of tokens; its exponential is the inverse of the perplexity. */
export function meanLogprob(logprobs) {
  const known = logprobs.filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

/** Shows tokens in *element* as they arrive. */
export class TokenText {
  constructor(element) {
    this.element = element;
    this.tokens = [];
    this.spans = [];
    this.current = -1;
    this.partial = []; // bytes of a character that is not complete
    element.tabIndex = 0;
    element.addEventListener("pointerover", (event) => this.point(event.target));
    element.addEventListener("pointerleave", () => this.leave());
    element.addEventListener("blur", () => this.leave());
    element.addEventListener("keydown", (event) => this.key(event));
  }

  /** Adds a token, by its name, with its log-probability and the likeliest tokens, or null for either. */
  add(name, logprob, top = null) {
    const bytes = [...this.partial, ...bytesOf(name)];
    const text = decoder.decode(Uint8Array.from(bytes));
    // A character of several tokens is shown with the last of them.
    const incomplete = text.endsWith("\ufffd") && name.startsWith("bytes:") && bytes.length < 4;
    this.partial = incomplete ? bytes : [];
    const span = document.createElement("span");
    span.className = "t";
    if (logprob !== null && logprob !== undefined) {
      const p = Math.exp(logprob);
      const place = BOUNDS.findIndex((bound) => p >= bound);
      span.classList.add(`p${place < 0 ? BOUNDS.length : place}`);
    }
    span.textContent = incomplete ? "" : text;
    this.tokens.push({ text: incomplete ? name.slice(6) : text, logprob, top });
    this.spans.push(span);
    this.element.append(span);
  }

  point(target) {
    const index = this.spans.indexOf(target);
    if (index >= 0) this.show(index);
  }

  key(event) {
    const last = this.spans.length - 1;
    const to = {
      ArrowRight: Math.min(last, this.current + 1), ArrowLeft: Math.max(0, this.current - 1), Home: 0, End: last,
    }[event.key];
    if (event.key === "Escape") this.leave();
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.show(to);
    const news = document.getElementById("news");
    const { text, logprob } = this.tokens[to];
    news.textContent = `${visible(text)}, ${percent(logprob) || "probability unknown"}`;
  }

  show(index) {
    this.leave();
    this.current = index;
    const span = this.spans[index];
    span.classList.add("on");
    const { text, logprob, top } = this.tokens[index];
    tip.replaceChildren(row(text, logprob, true));
    for (const [other, value] of top || []) if (other !== text) tip.append(row(other, value, false));
    tip.hidden = false;
    const box = (span.getClientRects()[0] || span.getBoundingClientRect());
    const left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8));
    const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
    tip.style.left = `${left}px`;
    tip.style.top = `${below ? box.bottom + 6 : Math.max(8, box.top - tip.offsetHeight - 6)}px`;
  }

  leave() {
    if (this.current >= 0) this.spans[this.current].classList.remove("on");
    tip.hidden = true;
  }
}

function row(text, logprob, own) {
  const line = document.createElement("div");
  if (own) line.className = "own";
  const name = document.createElement("code");
  name.textContent = visible(text);
  const value = document.createElement("span");
  value.textContent = percent(logprob) || "unknown";
  line.append(name, value);
  return line;
}
