"use strict";
const source = document.getElementById("charts").textContent;
const scheme = matchMedia("(prefers-color-scheme: dark)");
const themes = {}; // all charts, in light and in dark colours
let printing = false;
const narrow = matchMedia("(max-width: 700px)").matches;
const config = {
  responsive: true,
  displaylogo: false,
  displayModeBar: matchMedia("(hover: hover)").matches && "hover",
  modeBarButtons: [["toImage", "resetScale2d"]],
};

const isDark = () => scheme.matches && !printing;

// Greys of the layout, and black lines with their bands, in dark mode.
const greys = {
  "#222": "#ececec", "#888": "#8d9196", "#e3e3e3": "#3a3d41", "#bdbdbd": "#5a5d61",
  "#000000": "#f2f2f2", "rgba(0,0,0,0.15)": "rgba(242,242,242,0.15)",
};
const least = 110; // lightness, 0..255, that a line needs on a dark card

// Return a colour for a dark card: a dark one is mixed with white. Other values stay as they are.
function forDark(value) {
  if (typeof value !== "string") return value;
  if (value in greys) return greys[value];
  const parts = /^#(..)(..)(..)$/.exec(value)?.slice(1).map((hex) => parseInt(hex, 16))
    ?? /^rgb\((\d+), ?(\d+), ?(\d+)\)$/.exec(value)?.slice(1).map(Number);
  const lightness = parts && 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  if (!(lightness < least)) return value;
  const white = (least - lightness) / (255 - lightness);
  return `rgb(${parts.map((part) => Math.round(part + white * (255 - part))).join(", ")})`;
}

// Return all charts in the colours of the page.
const charts = () =>
  isDark()
    ? (themes.dark ??= JSON.parse(source, (_, value) => forDark(value)))
    : (themes.light ??= JSON.parse(source));

// Return the traces and the layout of a chart for the options that its switches show.
function asSwitched(card) {
  const chart = charts()[card.id];
  const chosen = {};
  for (const select of card.querySelectorAll("select")) chosen[select.dataset.key] = select.value;
  const traces = chart.data
    .filter((trace) => Object.entries(trace.meta?.pick ?? {}).every(([key, value]) => chosen[key] === value))
    .map((trace) => ({ ...trace, visible: true, x: trace.meta?.x ? trace.meta.x[chosen.x] : trace.x }));
  const layout = structuredClone(chart.layout);
  layout.paper_bgcolor = layout.plot_bgcolor = isDark() ? "#222427" : "#fff";
  if (printing) layout.width = 680; // fits on A4 and letter
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

const swatches = [...document.querySelectorAll(".swatch")].map((one) => [one, one.style.borderColor]);

// Draw everything that is drawn already again, in the colours and the width of the page. Plotly.react would keep the
// width of paper, and the height that the legend had.
function repaint() {
  for (const [swatch, colour] of swatches)
    swatch.style.borderColor = isDark() ? (colour === "rgb(0, 0, 0)" ? greys["#000000"] : forDark(colour)) : colour;
  for (const card of cards)
    if (card.dataset.drawn) Plotly.newPlot(card.querySelector(".chart"), ...asSwitched(card), config);
}
repaint();
scheme.addEventListener("change", repaint);

function onPaper(starts) {
  printing = starts;
  cards.forEach(draw);
  repaint();
}
addEventListener("beforeprint", () => onPaper(true));
addEventListener("afterprint", () => onPaper(false));
