// The cluster: the way of a token from stage to stage, its figures, and what happened to whom.

import { chart } from "./chart.js";
import { element } from "./elements.js";

const KEPT_S = 300;
const SHORTEST_S = 30;
const MOST_LOG_LINES = 50;
const $ = (selector) => document.querySelector(selector);
const history = []; // snapshots of the last minutes
const states = new Map(); // what each node was in last

/** Show a snapshot of the cluster, as `/api/v1/events` tells it. */
export function showCluster(snapshot) {
  history.push(snapshot);
  while (snapshot.at - history[0].at > KEPT_S) history.shift();
  snapshot.nodes.forEach((node) => noteState(node, snapshot.at));
  if ($("#cluster").hidden) return;
  showPipeline(snapshot);
  showRates(snapshot.rates);
  showCharts(snapshot);
}

function showPipeline({ nodes, pipeline }) {
  const named = new Map(nodes.map((node) => [node.name, node]));
  const [master] = nodes, busy = pipeline.some((stage) => stage.active);
  const way = [nodeElement(master, master.spans, busy)];
  for (const stage of pipeline) {
    way.push(arrow(stage), nodeElement(named.get(stage.node), [stage.span], stage.active));
  }
  if (pipeline.at(-1)?.node !== master.name) {
    way.push(element("li", { className: busy ? "arrow active" : "arrow" }, "back to the master"));
  }
  $("#pipeline").replaceChildren(...way);
  const used = new Set([master.name, ...pipeline.map((stage) => stage.node)]);
  const apart = nodes.filter((node) => !used.has(node.name));
  $("#apart").hidden = apart.length === 0;
  $("#apart ul").replaceChildren(...apart.map((node) => nodeElement(node, node.spans, false)));
}

function nodeElement(node, spans, active) {
  const mark = element("span", { className: "mark" }, node.state);
  const cells = element("div", { className: "cells" }, ...node.holds.map((part) => element("b", {}, part)));
  for (const [begin, end] of spans) {
    for (let block = begin; block < end; block += 1) cells.append(element("i", { title: `block ${block}` }));
  }
  const blocks = spans.filter(([begin, end]) => end > begin).map(([begin, end]) => `${begin}–${end - 1}`).join(", ");
  const lit = active && node.state !== "lost";
  const memory = node.memory_total === null ? "memory unknown" : `memory ${bytes(node.memory_used)} of ${bytes(node.memory_total)}`;
  return element("li", { className: `node ${node.state}${lit ? " active" : ""}` },
    element("h3", {}, node.name, mark),
    element("p", {}, [node.device, node.dtype].filter(Boolean).join(" · ") || "unknown device"),
    element("p", {}, node.address ?? "this server"),
    cells,
    element("p", {}, blocks ? `blocks ${blocks}` : "no blocks"),
    element("p", {}, memory));
}

function arrow(stage) {
  const told = stage.compute_ms === null ? ["idle"] : [
    `${number(stage.network_ms, 2)} ms way`, `${number(stage.compute_ms, 2)} ms work`, `${number(stage.bytes_per_s / 1e6, 2)} MB/s`];
  return element("li", { className: stage.active ? "arrow active" : "arrow" }, ...told.map((text) => element("div", {}, text)));
}

function showRates(rates) {
  const shown = {
    "tokens/s": rates.tokens_per_s.toFixed(1), "prompt tokens/s": rates.prompt_tokens_per_s.toFixed(0),
    requests: rates.requests, waiting: rates.waiting, sessions: rates.sessions, replays: rates.replays,
  };
  $("#rates").replaceChildren(...Object.entries(shown).map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
}

function showCharts({ at, pipeline }) {
  const seconds = Math.max(SHORTEST_S, Math.ceil(at - history[0].at));
  const points = (value) => history.map((each) => [each.at - at, value(each)]);
  $("#speed-chart").replaceChildren(chart(seconds, { tokens: points((each) => each.rates.tokens_per_s) }));
  const lines = {};
  for (const { node, span } of pipeline) {
    const same = (stage) => stage.node === node && stage.span[0] === span[0];
    lines[`${node} ${span[0]}–${span[1] - 1}`] = points((each) => each.pipeline.find(same)?.compute_ms ?? 0);
  }
  $("#stage-chart").replaceChildren(chart(seconds, lines));
}

function happened(before, now) {
  if (now === "lost") return "is lost";
  if (now === "replaying") return "is told again what it lacks";
  if (before === "lost") return "is back";
  if (before === "replaying") return "has what it lacked, and goes on";
  return now === "up" ? "takes part again" : "stands by";
}

/** Write down that a node is in another state than it was. */
function noteState(node, at) {
  const before = states.get(node.name);
  states.set(node.name, node.state);
  if (before === undefined || before === node.state) return;
  const time = element("time", {}, new Date(at * 1000).toLocaleTimeString());
  $("#log").prepend(element("li", { className: node.state }, time, `${node.name} ${happened(before, node.state)}`));
  while ($("#log").children.length > MOST_LOG_LINES) $("#log").lastElementChild.remove();
}

const number = (value, digits) => (value === null ? "–" : value.toFixed(digits));
const bytes = (value) => (value === null ? "–" : value >= 1e9 ? `${(value / 1e9).toFixed(1)} GB` : `${Math.round(value / 1e6)} MB`);
