"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
const narrow = matchMedia("(max-width: 700px)").matches;
const config = {
  responsive: true,
  displaylogo: false,
  displayModeBar: matchMedia("(hover: hover)").matches && "hover",
  modeBarButtons: [["toImage", "resetScale2d"]],
};

// Return the traces and the layout of a chart for the options that its switches show.
function asSwitched(card) {
  const chart = charts[card.id];
  const chosen = {};
  for (const select of card.querySelectorAll("select")) chosen[select.dataset.key] = select.value;
  const traces = chart.data
    .filter((trace) => Object.entries(trace.meta?.pick ?? {}).every(([key, value]) => chosen[key] === value))
    .map((trace) => ({ ...trace, visible: true, x: trace.meta?.x ? trace.meta.x[chosen.x] : trace.x }));
  const layout = structuredClone(chart.layout);
  layout.dragmode = narrow ? false : "zoom"; // otherwise a finger that scrolls the page zooms the chart
  for (const [key, axes] of Object.entries(chart.axes))
    for (const [path, value] of Object.entries(axes[chosen[key]] ?? {})) {
      const names = path.split(".");
      const last = names.pop();
      names.reduce((node, name) => (node[name] ??= {}), layout)[last] = value;
    }
  if (!traces.length)
    layout.annotations = [{ text: "no run for this choice", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }];
  return [traces, layout];
}

function draw(card) {
  if (card.dataset.drawn) return;
  card.dataset.drawn = "yes";
  const place = card.querySelector(".chart");
  Plotly.newPlot(place, ...asSwitched(card), config);
  card.addEventListener("change", () => Plotly.react(place, ...asSwitched(card), config));
}

// Draw one chart after the other, so that the page responds while it draws.
const cards = [...document.querySelectorAll("figure.card")];
function drawNext() {
  const card = cards.find((one) => !one.dataset.drawn);
  if (!card) return document.body.setAttribute("data-drawn", "all");
  draw(card);
  setTimeout(drawNext, 0);
}
drawNext();

addEventListener("beforeprint", () => {
  for (const card of cards) {
    draw(card);
    Plotly.relayout(card.querySelector(".chart"), { width: 680 }); // fits on A4 and letter
  }
});
addEventListener("afterprint", () => {
  for (const card of cards) Plotly.relayout(card.querySelector(".chart"), { width: null, autosize: true });
});
