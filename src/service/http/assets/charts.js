// Series as they grow, drawn by uPlot (beside it a table of the same numbers for those who do not see it).

import { html } from "./vendor/lit-html.js";
import { number } from "./words.js";

const TITLES = {
  loss: "Loss, nats per token",
  learning_rate: "Learning rate",
  gradient_norm: "Gradient norm",
  tokens_per_s: "Tokens per second",
};
const ORDER = ["loss", "tokens_per_s", "learning_rate", "gradient_norm"];
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// All series of one job: what was measured, by stage and name, and the plots of it.
export class Charts {
  constructor(signal) {
    this.series = new Map();
    this.plots = new Map();
    const redraw = () => {
      for (const plot of this.plots.values()) plot.destroy();
      this.plots.clear();
      this.draw();
    };
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", redraw, { signal });
    window.addEventListener("resize", () => this.resize(), { signal });
    signal.addEventListener("abort", () => this.plots.forEach((plot) => plot.destroy()));
  }

  // One value; a step that was computed twice counts once.
  add(stage, key, step, value) {
    const id = `${stage}/${key}`;
    if (!this.series.has(id)) this.series.set(id, { id, stage, key, points: new Map() });
    this.series.get(id).points.set(step, value);
  }

  sorted() {
    const place = (s) => (ORDER.indexOf(s.key) + 1 || 99);
    return [...this.series.values()].sort((a, b) => place(a) - place(b) || a.id.localeCompare(b.id));
  }

  // The places of the plots and their numbers.
  view() {
    if (!this.series.size) return "";
    return html`<section class="card"><h2>Along the way</h2><div class="charts">${this.sorted().map((s) => {
      const values = [...s.points.values()];
      const name = TITLES[s.key] ?? s.key;
      return html`<figure><figcaption>${name} <span class="quiet">(${s.stage}) now ${number(values.at(-1))}</span></figcaption>
        <div class="plot" data-series=${s.id} role="img" aria-label="${name}: ${values.length} steps, first ${number(values[0])},
          least ${number(least(values))}, last ${number(values.at(-1))}"></div></figure>`;
    })}</div></section>`;
  }

  // Puts the values into the places; after each `view`.
  draw() {
    for (const node of document.querySelectorAll("[data-series]")) {
      const series = this.series.get(node.dataset.series);
      const steps = [...series.points.keys()].sort((a, b) => a - b);
      const data = [steps, steps.map((step) => series.points.get(step))];
      const plot = this.plots.get(series.id);
      if (plot && plot.root.parentNode === node) plot.setData(data);
      else this.plots.set(series.id, new window.uPlot(options(node, series), data, node));
    }
  }

  resize() {
    for (const plot of this.plots.values()) plot.setSize({ width: plot.root.parentNode.clientWidth, height: 200 });
  }
}

const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);

function options(node, series) {
  const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
  return {
    width: node.clientWidth,
    height: 200,
    scales: { x: { time: false } },
    axes: [{ ...axis }, { ...axis, size: 64, values: (_, ticks) => ticks.map((tick) => number(tick, 3)) }],
    series: [{ label: "step" }, { label: series.key, stroke: colour("--green"), width: 2, points: { show: series.points.size < 3 } }],
    cursor: { y: false },
  };
}
