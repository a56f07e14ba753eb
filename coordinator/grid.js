// The expert grid: a row per layer, a cell per expert, who serves it. Arrow keys walk it; pointing at a cell explains it.

import { element, shortId, whole } from "./element.js";

const HINT = "Point at an expert to see who serves it, or at a peer to see what it serves.";
const ROOM = [[16, "wide"], [64, "middle"], [Infinity, "tight"]]; // experts per layer, at most

export class ExpertGrid {
  #box;
  #detail;
  #pickPeers; // called with the peer ids a pointed-at expert stands on
  #cells = new Map(); // uid -> cell
  #experts = new Map(); // uid -> what the state says, with its cover and holders
  #grid = []; // rows of uids
  #pointedAt = null;

  constructor(box, detail, pickPeers) {
    this.#box = box;
    this.#detail = detail;
    this.#pickPeers = pickPeers;
    box.addEventListener("pointerover", (event) => this.#pointAt(event.target.closest(".cell")?.dataset.uid ?? null));
    box.addEventListener("pointerleave", () => this.#pointAt(null));
    box.addEventListener("focusin", (event) => this.#focused(event.target));
    box.addEventListener("focusout", () => this.#pointAt(null));
    box.addEventListener("keydown", (event) => this.#walk(event));
    detail.textContent = HINT;
  }

  draw(state) {
    const holders = new Map();
    for (const peer of state.peers) if (peer.state !== "offline") for (const uid of peer.experts) push(holders, uid, peer);
    this.#experts = new Map(state.experts.map((expert) => [expert.uid, { ...expert, holders: holders.get(expert.uid) ?? [] }]));
    this.#lay(state.experts.map((expert) => expert.uid));
    for (const [uid, cell] of this.#cells) this.#fill(cell, this.#experts.get(uid));
    if (this.#pointedAt !== null) this.#explain(this.#experts.get(this.#pointedAt));
  }

  /** Show which experts a peer holds; none: all alike. */
  pick(uids) {
    this.#box.classList.toggle("picking", uids !== null);
    for (const [uid, cell] of this.#cells) cell.classList.toggle("picked", uids !== null && uids.has(uid));
  }

  #lay(uids) {
    if (uids.length === this.#cells.size && uids.every((uid) => this.#cells.has(uid))) return;
    const layers = new Map();
    for (const uid of uids) push(layers, uid.split(".")[0], uid);
    this.#grid = [...layers.values()];
    this.#cells.clear();
    const widest = Math.max(0, ...this.#grid.map((row) => row.length));
    this.#box.dataset.room = ROOM.find(([atMost]) => widest <= atMost)[1];
    this.#box.replaceChildren(...[...layers].map(([layer, row]) =>
      element("div", { class: "layer", role: "row" },
        element("span", { role: "rowheader" }, `Layer ${layer}`),
        element("div", { class: "cells", role: "presentation" }, ...row.map((uid) => this.#cell(uid))))));
    this.#cells.get(uids[0])?.setAttribute("tabindex", "0");
  }

  #cell(uid) {
    const cell = element("div", { class: "cell", role: "gridcell", tabindex: -1, "data-uid": uid }, element("b"), element("small"));
    this.#cells.set(uid, cell);
    return cell;
  }

  #fill(cell, expert) {
    cell.dataset.cover = cover(expert);
    cell.setAttribute("aria-label", inWords(expert));
    if (this.#box.dataset.room === "tight") return;
    const [index, whose] = cell.children;
    index.textContent = expert.uid.split(".")[1];
    whose.textContent = this.#box.dataset.room === "wide" ? tag(expert) : "";
  }

  #focused(target) {
    const cell = target.closest(".cell");
    if (cell === null) return;
    for (const other of this.#cells.values()) other.setAttribute("tabindex", other === cell ? "0" : "-1");
    this.#pointAt(cell.dataset.uid);
  }

  #walk(event) {
    const [down, right] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key] ?? [0, 0];
    const uid = event.target.closest(".cell")?.dataset.uid;
    if ((!down && !right) || uid === undefined) return;
    event.preventDefault();
    const row = this.#grid.findIndex((uids) => uids.includes(uid));
    const next = this.#grid[row + down]?.[this.#grid[row].indexOf(uid) + right];
    if (next !== undefined) this.#cells.get(next).focus();
  }

  #pointAt(uid) {
    if (uid === this.#pointedAt) return;
    this.#pointedAt = uid;
    const expert = uid === null ? undefined : this.#experts.get(uid);
    this.#explain(expert);
    this.#pickPeers(new Set(expert?.holders.map((peer) => peer.peer_id)));
  }

  #explain(expert) {
    this.#detail.textContent = expert === undefined ? HINT : inWords(expert);
  }
}

function cover({ replicas, holders }) {
  if (replicas.length > 1) return "many";
  if (replicas.length === 1) return "one";
  return holders.length ? "held" : "none";
}

function tag({ replicas, holders }) {
  if (replicas.length > 1) return `×${replicas.length}`;
  return (replicas[0] ?? holders[0]?.peer_id ?? "–").slice(0, 4);
}

function inWords({ uid, replicas, holders, primary, version, load }) {
  if (replicas.length === 0 && holders.length === 0) return `Expert ${uid}: nobody holds it.`;
  if (replicas.length === 0) return `Expert ${uid}: held by ${holders.map((peer) => `${shortId(peer.peer_id)} (${peer.state})`).join(", ")}, not serving.`;
  const names = holders.filter((peer) => replicas.includes(peer.peer_id)).map((peer) =>
    `${shortId(peer.peer_id)}${replicas.length > 1 && peer.peer_id === primary ? " (primary)" : ""} on ${peer.device}`);
  return `Expert ${uid}: served by ${names.join(", ")}; version ${whole(version ?? 0)}, ${whole(load)} rows waiting there.`;
}

function push(groups, key, value) {
  if (!groups.has(key)) groups.set(key, []);
  groups.get(key).push(value);
}
