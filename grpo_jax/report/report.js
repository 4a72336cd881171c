
"use strict";
// Shows the values of the charts' points, and the completions token by token. Text from
// data is only ever assigned to textContent, and colours are classes.
const data = JSON.parse(document.getElementById("data").textContent);
const isNumber = (x) => typeof x === "number";
const formatNumber = (x) => isNumber(x) ? String(Number(x.toPrecision(4))).replace("-", "−") : "–";

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

// -- charts: the nearest point of every line, by pointer or by arrow keys --------------

const LEFT = 46, RIGHT = 350, WIDTH = 360;

function nearestIndex(steps, x) {
  let best = 0;
  steps.forEach((s, i) => { if (Math.abs(s - x) < Math.abs(steps[best] - x)) best = i; });
  return best;
}

document.querySelectorAll(".chart").forEach((chart, number) => {
  const { x: [first, last], lines } = data.charts[number];
  const readout = chart.parentElement.querySelector(".readout");
  const cursor = chart.querySelector(".cursor");
  const steps = lines.reduce((a, b) => (b.x.length > a.x.length ? b : a)).x;
  let at = steps.length - 1;
  function readOut(index) {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const x = steps[at], place = LEFT + (x - first) / (last - first) * (RIGHT - LEFT);
    cursor.setAttribute("transform", `translate(${place + 9} 0)`);
    const said = lines.map((line) => `${line.label} ${formatNumber(line.y[nearestIndex(line.x, x)])}`);
    readout.textContent = `step ${formatNumber(x)}: ${said.join(", ")}`;
  }
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const place = (event.clientX - box.left) / box.width * WIDTH;
    const x = first + (place - LEFT) / (RIGHT - LEFT) * (last - first);
    readOut(nearestIndex(steps, x));
  });
  chart.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    readOut(by);
  });
});

// -- the measures of a token ------------------------------------------------------------

const difference = (a, b) => (isNumber(a) && isNumber(b) ? a - b : null);

const MEASURES = {
  advantage: (c, i) => Array.isArray(c.advantage) ? c.advantage[i] : c.advantage,
  log_ratio: (c, i) => c.ref_logps ? difference(c.logps?.[i], c.ref_logps[i]) : null,
  // The estimator of GRPO's KL term: π_ref/π − log(π_ref/π) − 1.
  kl: (c, i) => {
    const d = c.ref_logps ? difference(c.ref_logps[i], c.logps?.[i]) : null;
    return isNumber(d) ? Math.exp(Math.min(d, 60)) - d - 1 : null;
  },
  ratio: (c, i) => {
    const d = c.old_logps ? difference(c.old_logps[i], c.logps?.[i]) : null;
    return isNumber(d) ? Math.exp(Math.max(-60, Math.min(d, 60))) : null;
  },
  surprise: (c, i) => difference(0, c.logps?.[i]),
};
const NAMES = {
  advantage: "Â", log_ratio: "log π/π_ref", kl: "KL", ratio: "π_old/π_sampler",
  surprise: "−log π",
};
const neutralValue = (measure) => (measure === "ratio" ? 1 : 0);

// The value that gets the full colour: the 98th percentile of a measure's sizes.
function fullColourValue(measure) {
  const sizes = [];
  for (const group of data.groups) for (const c of group.completions) {
    const n = c.tokens ? c.tokens.length : 1;
    for (let i = 0; i < n; i++) {
      const value = c.mask?.[i] === 0 ? null : MEASURES[measure](c, i);
      if (isNumber(value)) sizes.push(Math.abs(value - neutralValue(measure)));
    }
  }
  if (!sizes.length) return null;
  sizes.sort((a, b) => a - b);
  return sizes[Math.floor(0.98 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1;
}

// Blue above the neutral value, orange below it. KL and surprise are never negative;
// the larger, the more orange.
function colourClass(measure, scale, value) {
  if (!isNumber(value)) return "";
  const from = value - neutralValue(measure);
  const level = Math.min(8, Math.round(8 * Math.abs(from) / scale));
  const bad = measure === "kl" || measure === "surprise" ? from > 0 : from < 0;
  return level ? (bad ? "d" : "u") + level : "";
}

// -- completions -----------------------------------------------------------------------

function showCompletions() {
  const list = document.getElementById("groups"), more = document.getElementById("more");
  const order = document.getElementById("order"), scaleText = document.getElementById("scale");
  const tokenText = document.getElementById("token");
  const radios = [...document.querySelectorAll("#colors input")];
  const scales = Object.fromEntries(Object.keys(MEASURES).map((m) => [m, fullColourValue(m)]));
  for (const radio of radios) radio.disabled = scales[radio.value] === null;
  let measure = (radios.find((r) => !r.disabled) || radios[0]).value;
  radios.find((r) => r.value === measure).checked = true;
  const laidOut = new Map();  // the element of a completion's text → the completion
  let marked = null, shown = 0;

  function paint(text, c) {
    text.querySelectorAll("[data-i]").forEach((span) => {
      const i = Number(span.dataset.i);
      const tool = c.mask?.[i] === 0;
      const hue = tool ? "" : colourClass(measure, scales[measure], MEASURES[measure](c, i));
      const names = [hue, span.dataset.code && "code", span === marked && "at"];
      span.className = names.filter(Boolean).join(" ");
    });
  }

  function paintAll() {
    laidOut.forEach((c, text) => paint(text, c));
    const scale = scales[measure], center = neutralValue(measure);
    scaleText.replaceChildren();
    if (scale === null) return;
    const both = !["kl", "surprise"].includes(measure);
    for (const share of both ? [-1, -0.5, 0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1]) {
      const value = center + share * scale;
      scaleText.append(element("span", colourClass(measure, scale, value), formatNumber(value)));
    }
  }

  function describeToken(text, i) {
    const c = laidOut.get(text), spans = text.querySelectorAll("[data-i]");
    const at = Math.max(0, Math.min(spans.length - 1, i));
    if (!spans.length) return;
    marked?.classList.remove("at");
    marked = spans[at];
    marked.classList.add("at");
    const said = Object.keys(MEASURES)
      .map((m) => [NAMES[m], MEASURES[m](c, at)])
      .filter(([, value]) => isNumber(value))
      .map(([name, value]) => `${name} ${formatNumber(value)}`);
    if (c.mask?.[at] === 0) said.splice(0, said.length, "written by a tool");
    const token = c.tokens ? `token ${at + 1} of ${c.tokens.length + c.cut} ` +
      JSON.stringify(c.tokens[at]) : "all tokens";
    tokenText.textContent = `${token}: ${said.join(" · ") || "nothing is known of it"}`;
  }

  // Which tokens lie in a ```python block that the model wrote.
  function programTokens(c) {
    const inside = new Set(), parts = c.tokens.map((t, i) => c.mask?.[i] === 0 ? "" : t);
    const whole = parts.join("");
    for (const found of whole.matchAll(/```(?:python|py)\b[^]*?(?:```|$)/g)) {
      let at = 0;
      parts.forEach((part, i) => {
        const end = found.index + found[0].length;
        if (part && at < end && at + part.length > found.index) inside.add(i);
        at += part.length;
      });
    }
    return inside;
  }

  function textElement(c) {
    const text = element("div", "text");
    text.tabIndex = 0;
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", "completion, token by token");
    laidOut.set(text, c);
    const tokens = c.tokens || [c.text], code = c.tokens ? programTokens(c) : new Set();
    let box = text;
    tokens.forEach((token, i) => {
      const tool = c.mask?.[i] === 0;
      if (tool && box === text) {
        box = element("span", "tool");
        box.append(element("span", "by", "output of a tool"));
        text.append(box);
      } else if (!tool) box = text;
      // A line's end gets a sign, so that it can have a colour.
      const written = c.tokens && !tool ? token.replaceAll("\n", "↵\n") : token;
      const span = element("span", "", written === "" && c.tokens ? "·" : written);
      span.dataset.i = i;
      if (code.has(i)) span.dataset.code = "1";
      box.append(span);
    });
    if (c.cut) text.append(element("span", "by", `… and ${c.cut} more tokens`));
    text.addEventListener("pointerover", (event) => {
      const span = event.target.closest("[data-i]");
      if (span) describeToken(text, Number(span.dataset.i));
    });
    text.addEventListener("keydown", (event) => {
      const here = marked && text.contains(marked) ? Number(marked.dataset.i) : -1;
      const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: 1e9 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      describeToken(text, to);
      marked?.scrollIntoView({ block: "nearest" });
    });
    return text;
  }

  function completionElement(c) {
    const right = isNumber(c.reward) && c.reward > 0;
    const card = element("article", right ? "completion" : "completion failed");
    const facts = [isNumber(c.reward) ? `reward ${formatNumber(c.reward)}` : "no reward"];
    if (isNumber(c.advantage)) facts.push(`Â ${formatNumber(c.advantage)}`);
    if (c.tokens) facts.push(`${c.tokens.length + c.cut} tokens`);
    if (c.calls) {
      const failed = c.failures ? `, ${c.failures} failed` : "";
      facts.push(`${c.calls} ${c.calls === 1 ? "program" : "programs"}${failed}`);
    }
    if (!c.finished) facts.push("cut off");
    card.append(element("p", "", facts.join(" · ")));
    const text = textElement(c);
    card.append(text);
    paint(text, c);
    return card;
  }

  function groupElement(g, open) {
    const box = element("details", "group"), head = element("summary");
    const line = g.question.split("\n").find((x) => x.trim()) || "";
    head.append(element("span", "", `step ${formatNumber(g.step)}`));
    head.append(element("span", "quiet", `${g.failed} of ${g.of} failed`));
    head.append(element("span", "quiet", `reward ${formatNumber(g.reward)}`));
    head.append(element("bdi", "quiet", line.length > 90 ? line.slice(0, 89) + "…" : line));
    box.append(head);
    let filled = false;
    function fill() {
      if (filled) return;
      filled = true;
      box.append(element("p", "question", g.question));
      if (g.answer) box.append(element("p", "question quiet", `answer: ${g.answer}`));
      const sides = element("div", "sides");
      g.completions.forEach((c) => sides.append(completionElement(c)));
      box.append(sides);
      const rest = g.of - g.completions.length;
      if (rest > 0) box.append(element("p", "quiet", `and ${rest} more completions`));
    }
    box.addEventListener("toggle", () => { if (box.open) fill(); });
    if (open) { fill(); box.open = true; }
    return box;
  }

  const ORDERS = {
    failures: (a, b) => b.failed / b.of - a.failed / a.of || b.step - a.step,
    newest: (a, b) => b.step - a.step,
    oldest: (a, b) => a.step - b.step,
  };
  let sorted = [];
  function showMore() {
    const until = Math.min(sorted.length, shown + 20);
    for (; shown < until; shown++) list.append(groupElement(sorted[shown], shown < 3));
    more.hidden = shown >= sorted.length;
  }
  function showSorted() {
    list.replaceChildren();
    laidOut.clear();
    marked = null;
    shown = 0;
    sorted = data.groups.slice().sort(ORDERS[order.value]);
    showMore();
  }
  order.addEventListener("change", showSorted);
  more.addEventListener("click", showMore);
  radios.forEach((radio) => radio.addEventListener("change", () => {
    measure = radio.value;
    paintAll();
  }));
  showSorted();
  paintAll();
}

if (data.groups.length) showCompletions();
