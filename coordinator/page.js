// The page: one stream in, the document out. `hello` replaces all it shows, `update` adds to it, `beat` says the coordinator lives.

import { LossChart } from "./chart.js";
import { clock, compact, element, percent, shortId, whole, withUnit } from "./element.js";
import { ExpertGrid } from "./grid.js";

const SILENCE_MS = 20_000; // two missed beats: a network that hangs closes nothing
const RETRY_MS = 2_000;
const MAX_LOG_LINES = 200;
const SHOWN_RANGES = 4;
const LOW_UTILISATION = 0.2; // as in peer/chi.py: below it a device is as good as idle

const at = (id) => document.getElementById(id);
const chart = new LossChart(at("loss-chart"), at("loss-readout"));
const grid = new ExpertGrid(at("experts"), at("expert-detail"), pickPeers);
const peerRows = new Map(); // peer id -> row

// ---- the stream

let source;
let silence;

function connect() {
  source?.close();
  source = new EventSource("/events");
  source.addEventListener("hello", (event) => { heard(); hello(JSON.parse(event.data)); });
  source.addEventListener("update", (event) => { heard(); update(JSON.parse(event.data)); });
  source.addEventListener("beat", heard);
  source.addEventListener("error", () => { lost(); clearTimeout(silence); source.close(); silence = setTimeout(connect, RETRY_MS); });
}

function heard() {
  clearTimeout(silence);
  silence = setTimeout(() => { lost(); connect(); }, SILENCE_MS);
  linkIs("live", "Live");
  at("lost").hidden = true;
  at("content").classList.remove("stale");
}

function lost() {
  if (at("link").dataset.link === "lost") return;
  const since = clock(Date.now() / 1000);
  linkIs("lost", "Connection lost");
  at("lost").textContent = `Connection lost at ${since}. What you see is from then; training goes on without the coordinator. Trying again.`;
  at("lost").hidden = false;
  at("content").classList.add("stale");
}

function linkIs(link, text) {
  if (at("link").dataset.link === link) return;
  at("link").dataset.link = link;
  at("link-text").textContent = text;
}

// ---- the document

function hello({ join, state, events, losses }) {
  at("join-command").textContent = `swarmoe peer --join ${join}`;
  at("log").replaceChildren();
  chart.reset(losses);
  draw(state, events);
}

function update({ state, events, losses }) {
  chart.extend(losses);
  draw(state, events);
}

function draw(state, events) {
  document.title = `${state.name} · swarmoe`;
  at("run-name").textContent = state.name;
  at("run-id").textContent = state.run;
  drawFigures(state);
  grid.draw(state);
  drawPeers(state);
  drawTrainers(state.trainers);
  events.forEach(drawEvent);
  at("log-empty").hidden = at("log").childElementCount > 0;
}

function drawFigures({ experts, uncovered, peers, trainers }) {
  const online = peers.filter((peer) => peer.state === "online").length;
  const losses = trainers.map((trainer) => trainer.loss).filter((loss) => loss !== null);
  figure("figure-experts", whole(experts.length - uncovered.length), ` of ${whole(experts.length)}`);
  at("figure-experts").classList.toggle("alarm", uncovered.length > 0 && peers.length > 0);
  figure("figure-peers", whole(online), online < peers.length ? ` of ${whole(peers.length)}` : "");
  figure("figure-trainers", whole(trainers.length), "");
  figure("figure-tokens", compact(sum(trainers.map((trainer) => trainer.tokens_per_s))), "");
  figure("figure-loss", losses.length ? (sum(losses) / losses.length).toFixed(2) : "–", "");
}

function figure(id, value, of) {
  at(id).replaceChildren(value, element("small", {}, of));
}

function drawPeers({ peers, expert_kinds }) {
  const chis = new Map(expert_kinds.flatMap((kind) => kind.peers.map((told) => [told.peer_id, told])));
  const gone = new Set(peerRows.keys());
  const rows = [...peers].sort(byStateThenId).map((peer) => {
    gone.delete(peer.peer_id);
    const row = peerRows.get(peer.peer_id) ?? newPeerRow(peer.peer_id);
    fillPeerRow(row, peer, chis.get(peer.peer_id) ?? null);
    return row;
  });
  gone.forEach((peerId) => peerRows.delete(peerId));
  const body = at("peers").tBodies[0];
  if (rows.length !== body.rows.length || rows.some((row, i) => row !== body.rows[i])) body.replaceChildren(...rows);
  at("peers").hidden = peers.length === 0;
  at("peers-empty").hidden = peers.length > 0;
  at("join-panel").hidden = peers.length > 0;
  at("peers-aside").textContent = peers.length ? [`${whole(peers.length)} known`, ...expert_kinds.map(medianInWords)].join("; ") : "";
}

function medianInWords({ median_utilisation, median_needed_bits_per_s }) {
  if (median_utilisation === null) return "no link measured";
  return `links let devices be busy ${percent(median_utilisation)} of the time, and they could use ${withUnit(median_needed_bits_per_s, "bit/s")} (medians)`;
}

function newPeerRow(peerId) {
  const row = element("tr");
  row.addEventListener("pointerenter", () => grid.pick(row.uids));
  row.addEventListener("pointerleave", () => grid.pick(null));
  peerRows.set(peerId, row);
  return row;
}

function fillPeerRow(row, peer, chi) {
  row.uids = new Set(peer.experts);
  row.replaceChildren(
    element("td", { title: peer.peer_id }, element("code", {}, shortId(peer.peer_id)), element("span", { class: "endpoint" }, peer.endpoint)),
    element("td", {}, element("span", { class: "state", "data-state": peer.state }, peer.state),
      ...peer.flags.map((flag) => element("span", { class: "flag" }, flag))),
    element("td", { class: "uids", title: `${peer.experts.length} experts: ${peer.experts.join(" ")}` }, uidsInWords(peer.experts)),
    element("td", {}, peer.device, peer.flops_per_s === null ? null : element("span", { class: "endpoint" }, withUnit(peer.flops_per_s, "FLOP/s"))),
    linkCell(peer, chi),
    element("td", { class: "number", "data-label": "Tokens/s" }, compact(peer.throughput_tokens_per_s)),
    element("td", { class: "number", "data-label": "Rows waiting" }, compact(peer.queued_rows)));
}

function linkCell({ up_bits_per_s, down_bits_per_s, latency_ms }, chi) {
  const narrower = up_bits_per_s === null ? null : Math.min(up_bits_per_s, down_bits_per_s);
  const title = narrower === null ? "not measured" : `${withUnit(up_bits_per_s, "bit/s")} up, ${withUnit(down_bits_per_s, "bit/s")} down, `
    + `${Number(latency_ms.toPrecision(3))} ms there and back` + (chi === null ? "" : `; chi ${Number(chi.chi.toPrecision(2))}`);
  return element("td", { class: "number", "data-label": "Link allows", title },
    element("span", { class: chi !== null && chi.utilisation < LOW_UTILISATION ? "low" : null }, chi === null ? "–" : percent(chi.utilisation)),
    narrower === null ? null : element("span", { class: "endpoint" }, withUnit(narrower, "bit/s")));
}

function uidsInWords(uids) {
  if (uids.length === 0) return "none, spare";
  const runs = ranges(uids);
  const shown = runs.slice(0, SHOWN_RANGES).map(([first, last]) => (first === last ? first : `${first}–${last}`));
  return shown.join(", ") + (runs.length > SHOWN_RANGES ? " …" : "");
}

/** Neighbours within a layer as [first, last]; uids come in order. */
function ranges(uids) {
  const runs = [];
  let next = null;
  for (const uid of uids) {
    if (uid === next) runs.at(-1)[1] = uid;
    else runs.push([uid, uid]);
    const [layer, index] = uid.split(".");
    next = `${layer}.${Number(index) + 1}`;
  }
  return runs;
}

function drawTrainers(trainers) {
  at("trainers-empty").hidden = trainers.length > 0;
  at("trainers").replaceChildren(...trainers.map((trainer) =>
    element("li", { "data-line": chart.colourOf(trainer.peer_id) },
      element("p", { class: "who", title: trainer.peer_id }, element("i"), element("code", {}, shortId(trainer.peer_id)),
        trainer.state === "online" ? null : element("span", { class: "state", "data-state": trainer.state }, trainer.state)),
      element("p", {}, "step ", element("strong", {}, whole(trainer.step)), ", ",
        trainer.loss === null ? "no loss yet" : element("strong", {}, trainer.loss.toFixed(3)),
        trainer.loss === null ? null : " bits per byte"),
      element("p", {}, `${compact(trainer.tokens_per_s)} tokens/s, ${(100 * trainer.answered_share).toFixed(1)} % answered`))));
}

function drawEvent({ at_unix_s, text, tone }) {
  at("log").prepend(element("li", { "data-tone": tone },
    element("time", { datetime: new Date(at_unix_s * 1000).toISOString() }, clock(at_unix_s)), element("span", { "data-tone": tone }, text)));
  if (at("log").childElementCount > MAX_LOG_LINES) at("log").lastElementChild.remove();
}

function pickPeers(peerIds) {
  for (const [peerId, row] of peerRows) row.classList.toggle("picked", peerIds.has(peerId));
}

const STATES = ["online", "syncing", "joining", "draining", "offline"];
const byStateThenId = (a, b) => STATES.indexOf(a.state) - STATES.indexOf(b.state) || (a.peer_id < b.peer_id ? -1 : 1);
const sum = (values) => values.reduce((total, value) => total + value, 0);

at("join-copy").hidden = navigator.clipboard === undefined;
at("join-copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(at("join-command").textContent);
  at("join-copy").textContent = "Copied";
});

connect();
