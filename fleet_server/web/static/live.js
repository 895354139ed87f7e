// Keeps a page fresh: fetches its live part every two seconds and swaps it in when it changed.
// Scroll positions, open <details> and the focus stay. When the server does not answer, it says so and goes on trying.
"use strict";

const EVERY_MS = 2000;
const TIMEOUT_MS = 8000;
const live = document.getElementById("live");
const state = document.getElementById("link-state");
let shown = "";

function lost(yes) {
  state.hidden = !yes;
  state.textContent = yes ? "Server lost – showing what was last known" : "";
  document.body.classList.toggle("lost", yes);
}

function swap(html) {
  const focused = live.contains(document.activeElement) ? document.activeElement.id : "";
  const scrolls = [...live.querySelectorAll(".scroll[id]")].map((e) => [e.id, e.scrollTop, e.scrollLeft]);
  const open = [...live.querySelectorAll("details[open]")].map((e) => e.id);
  live.innerHTML = html;
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  for (const [id, top, left] of scrolls) {
    const element = document.getElementById(id);
    if (element) [element.scrollTop, element.scrollLeft] = [top, left];
  }
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

async function refresh() {
  try {
    const answer = await fetch(live.dataset.source, { signal: AbortSignal.timeout(TIMEOUT_MS), redirect: "manual" });
    if (answer.status === 401) location.assign("/login");
    if (!answer.ok) throw new Error(String(answer.status));
    const html = await answer.text();
    const selecting = !getSelection().isCollapsed;
    if (html !== shown && !selecting) swap((shown = html));
    lost(false);
  } catch {
    lost(true);
  }
  setTimeout(refresh, EVERY_MS);
}

if (live) setTimeout(refresh, EVERY_MS);
