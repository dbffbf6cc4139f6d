// The chat: streams answers side by side, keeps each as a line of the conversation's file.
import { html, render, useEffect, useReducer, useRef, useState } from "../vendor/htm-preact.mjs";
import { fetchJson, postForm, readPrompt, scoreAnswer, streamAnswer } from "../parts/chat_client.js";
import { Columns, Legend } from "../parts/chat_columns.js";
import { Tree, messagesOf } from "../parts/conversation_tree.js";
import { counted } from "../parts/numbers.js";

const place = document.querySelector("#chat");
const server = place.dataset.server;
const mayAsk = Boolean(server) && place.dataset.may === "yes";
const MOST = 5;
const LOOK_EVERY = 1500; // milliseconds
const SETTINGS = [
  ["temperature", "Temperature", "0.7", "0 takes the likeliest token"],
  ["top_p", "Top p", "", "share of probability that is drawn from"],
  ["top_k", "Top k", "", "likeliest tokens that are drawn from"],
  ["min_p", "Min p", "", "least share of the likeliest token"],
  ["repetition_penalty", "Repetition penalty", "", "1 changes nothing"],
  ["seed", "Seed", "1", "the same for all models"],
  ["max_tokens", "Max tokens", "200", "longest answer"],
  ["stop", "Stop", "", "text that ends an answer"],
];

const kept = (name, usual) => {
  try {
    return JSON.parse(localStorage.getItem(`chat.${name}`)) ?? usual;
  } catch {
    return usual;
  }
};
const keep = (name, value) => localStorage.setItem(`chat.${name}`, JSON.stringify(value));

function shuffled(items) {
  const found = [...items];
  for (let i = found.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [found[i], found[j]] = [found[j], found[i]];
  }
  return found;
}

// Parts of the page that the server draws: replaced by what it would draw now.
async function redraw(...ids) {
  const answer = await fetch(location.href, { headers: { accept: "text/html" } });
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const id of ids) document.getElementById(id).replaceWith(page.getElementById(id));
}

function Settings({ settings, set }) {
  return html`<details class="settings"><summary>Sampling: ${describe(settings)}</summary><div class="picks">
    ${SETTINGS.map(([name, title, usual, help]) => html`<div><label class="block" for="set-${name}">${title}</label>
      <input id="set-${name}" class="full" inputmode=${name === "stop" ? "text" : "decimal"} value=${settings[name] ?? usual}
        aria-describedby="help-${name}" onInput=${(event) => set(name, event.target.value)} />
      <p class="small quiet" id="help-${name}">${help}</p></div>`)}</div></details>`;
}

function describe(settings) {
  const given = SETTINGS.map(([name, title, usual]) => [title.toLowerCase(), settings[name] ?? usual]).filter(([, value]) => value !== "");
  return given.map(([title, value]) => `${title} ${value}`).join(", ");
}

const settingsText = (numbers) => Object.entries(numbers).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`).join(", ");

function numbersOf(settings) {
  const found = {};
  for (const [name, , usual] of SETTINGS) {
    const value = settings[name] ?? usual;
    if (value !== "") found[name] = name === "stop" ? value : Number(value);
  }
  const bad = Object.entries(found).find(([, value]) => Number.isNaN(value));
  if (bad) throw new Error(`${bad[0]} is no number`);
  return found;
}

function Branches({ items, shown, what, onShow }) {
  if (items.length < 2) return null;
  const index = items.indexOf(shown);
  const button = (to, text, label) => html`<button type="button" class="plain" disabled=${!items[to]} aria-label=${label} onClick=${() => onShow(items[to])}>${text}</button>`;
  return html`<span class="branches">${button(index - 1, "‹", `Earlier ${what}`)}${what} ${index + 1} of ${items.length}${button(index + 1, "›", `Later ${what}`)}</span>`;
}

function Turn({ step, isFirst, onEdit, onBranch }) {
  const [draft, edit] = useState(null);
  const { turn } = step;
  if (draft) {
    const field = (name, title) => html`<label class="block" for="edit-${name}">${title}</label>
      <textarea id="edit-${name}" value=${draft[name]} onInput=${(event) => edit({ ...draft, [name]: event.target.value })}></textarea>`;
    return html`<form class="turn panel" onSubmit=${(event) => { event.preventDefault(); edit(null); onEdit(draft); }}>
      ${field("text", "Message")}${isFirst && field("context", "Context")}${isFirst && field("system", "System text")}
      <p class="row"><button class="main">Ask this instead</button><button type="button" onClick=${() => edit(null)}>Cancel</button></p></form>`;
  }
  return html`<div class="turn">
    ${turn.system && html`<p class="small quiet">System text: ${turn.system}</p>`}
    <pre class="asked">${turn.text}</pre>
    ${turn.context && html`<details class="small"><summary>Context (${counted(turn.context.length, "letter")})</summary><pre>${turn.context}</pre></details>`}
    <div class="row small quiet">${mayAsk && html`<button type="button" class="plain" onClick=${() => edit({ text: turn.text, context: turn.context, system: turn.system })}>Edit</button>`}
      <${Branches} items=${step.turns} shown=${turn} what="version" onShow=${onBranch} /></div></div>`;
}

function Export({ chat, step }) {
  const [said, say] = useState("");
  const [file, setFile] = useState(kept("file", `${place.dataset.folder}chats.jsonl`));
  const fields = { chat, answers: step.answers.id, model: step.picked };
  const append = async (event) => {
    event.preventDefault();
    try {
      keep("file", file);
      say((await postForm("/act/chat/rows", { ...fields, file, script: "1" })).said);
    } catch (error) {
      say(error.message);
    }
  };
  return html`<details class="small export"><summary>Use as a training row</summary>
    <p class="quiet">The way shown, with the answer of ${step.picked}.</p>
    <form class="row" onSubmit=${append}><a class="button" href="/chat/rows?${new URLSearchParams(fields)}" download>Download</a>
    ${mayAsk && html`<label for="file">or add it to</label><input id="file" value=${file} onInput=${(event) => setFile(event.target.value)} /><button>Add</button>`}
    <span role="status">${said}</span></form></details>`;
}

function Composer({ isFirst, isBusy, models, onSend, onStop }) {
  const [text, setText] = useState("");
  const [context, setContext] = useState("");
  const [system, setSystem] = useState(kept("system", ""));
  const send = (event) => {
    event.preventDefault();
    if (isBusy || !models?.length || !text.trim()) return;
    keep("system", system);
    onSend({ text, context: isFirst ? context : "", system: isFirst ? system : "" });
    setText("");
  };
  return html`<form class="composer" onSubmit=${send}>
    ${isFirst && html`<details open=${Boolean(context || system)}><summary>System text and context</summary>
      <label class="block" for="system">System text</label><textarea id="system" value=${system} placeholder="empty: that of the training" onInput=${(event) => setSystem(event.target.value)}></textarea>
      <label class="block" for="context">Context</label><textarea id="context" value=${context} placeholder="a passage, as rows of a training have it" onInput=${(event) => setContext(event.target.value)}></textarea></details>`}
    <label class="block" for="text">Message</label>
    <textarea id="text" value=${text} onInput=${(event) => setText(event.target.value)}
      onKeyDown=${(event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(event); }}></textarea>
    <p class="row">${isBusy ? html`<button type="button" class="danger" onClick=${onStop}>Stop</button>` : html`<button class="main" disabled=${!models?.length || !text.trim()}>Send</button>`}
    <span class="small quiet">${models?.length === 0 ? "Choose at least one model." : "Ctrl+Enter sends"}</span></p></form>`;
}

function Chat() {
  const state = useRef({ chat: place.dataset.chat, tree: new Tree(), voted: {}, live: null, scored: "", stop: null, problem: "" }).current;
  const [, draw] = useReducer((count) => count + 1, 0);
  const [stamps, setStamps] = useState([]);
  const [chosen, setChosen] = useState(null);
  const [settings, setSettings] = useState(kept("settings", {}));
  const [isBlind, setBlind] = useState(kept("blind", false));
  const [colours, setColours] = useState(kept("colours", true));

  const guarded = (work) => async (...given) => {
    try {
      state.problem = "";
      await work(...given);
    } catch (error) {
      state.problem = error.message;
    }
    draw();
  };

  useEffect(() => {
    guarded(async () => {
      if (state.chat) {
        const { lines, voted } = await fetchJson(`/api/chats/${state.chat}`);
        Object.assign(state, { tree: new Tree(lines), voted });
        draw();
      }
      if (!server) return;
      const found = await fetchStamps();
      const names = found.map((stamp) => stamp.model);
      const before = kept("models", []).filter((name) => names.includes(name));
      setChosen(before.length ? before : names.slice(0, MOST));
    })();
  }, []);

  const fetchStamps = async () => {
    const found = await fetchJson(`/api/stamps/${server}`);
    setStamps(found);
    return found;
  };

  const write = async (line) => {
    const isNew = !state.chat;
    const found = await fetchJson("/api/chats", { chat: state.chat, line });
    state.chat = found.chat;
    state.tree.add(found.line);
    if (isNew) {
      const fields = new URLSearchParams({ chat: state.chat, server });
      history.replaceState(null, "", `/chat?${fields}`);
    }
    return found.line;
  };

  // Another seed each time, or the answers would be the same: draws depend on it alone.
  const ask = async (turn) => {
    if (!chosen?.length) throw new Error("choose at least one model");
    const asked = messagesOf(state.tree.way().slice(0, state.tree.way().findIndex((step) => step.turn.id === turn.id) + 1));
    const numbers = numbersOf(settings);
    if ("seed" in numbers) numbers.seed += state.tree.answers(turn.id).length;
    const found = await fetchStamps();
    const models = found.filter((stamp) => chosen.includes(stamp.model)).slice(0, MOST);
    const begun = performance.now();
    const columns = models.map((stamp) => ({ model: stamp.model, stamp: { ...stamp }, text: "", ids: [], tokens: [], finish: null, prompt_tokens: null }));
    const blind = isBlind && columns.length > 1;
    const order = blind ? { blind, order: shuffled(columns.map((column) => column.model)) } : {};
    state.live = { turn: turn.id, columns, ...order };
    state.stop = new AbortController();
    let waits = false;
    const soon = () => {
      if (waits) return;
      waits = true;
      requestAnimationFrame(() => { waits = false; draw(); });
    };
    draw();
    await Promise.all(columns.map(async (column) => {
      try {
        await streamAnswer(server, { model: column.model, ...asked, ...numbers }, state.stop.signal, (part) => {
          column.text += part.text;
          column.ids.push(...part.ids);
          column.tokens.push(...part.tokens);
          column.finish = part.finish ?? column.finish;
          column.prompt_tokens = part.usage?.prompt_tokens ?? column.prompt_tokens;
          column.stamp.fingerprint = part.fingerprint ?? column.stamp.fingerprint;
          soon();
        });
      } catch (error) {
        if (error.name === "AbortError") column.finish = "stopped";
        else column.problem = error.message;
      }
      column.seconds = (performance.now() - begun) / 1000;
      soon();
    }));
    // A run that trains may have had a newer checkpoint when its answer began.
    if (columns.some(({ model, stamp }) => !found.some((one) => one.model === model && one.fingerprint === stamp.fingerprint))) {
      const now = await fetchStamps().catch(() => []);
      for (const { model, stamp } of columns) stamp.step = [...now, ...found].find((one) => one.model === model && one.fingerprint === stamp.fingerprint)?.step ?? null;
    }
    const line = { kind: "answers", turn: turn.id, server, settings: numbers, columns, ...order };
    Object.assign(state, { live: null, stop: null });
    let answers;
    try {
      answers = await write(line);
    } catch (error) {
      state.tree.add({ ...line, id: `unsaved-${performance.now()}` });
      throw new Error(`these answers are not kept: ${error.message}`);
    }
    draw();
    await redraw("chats");
    if (colours && !blind) await score(answers, asked);
  };

  // Whether the model of an answer is served as it was; another conversation may have others.
  const isServed = ({ model, stamp }) => stamps.some((one) => one.model === model && one.fingerprint === stamp.fingerprint);

  // Scores the answers of all adapters under their base, and keeps the scores.
  const score = async (answers, asked) => {
    const columns = answers.columns.filter((column) => !column.stamp.is_base && column.ids.length && isServed(column) && !state.tree.scores(answers.id, column.model));
    state.scored = answers.id;
    draw();
    try {
      for (const column of columns) {
        const prompt = await readPrompt(server, column.model, asked);
        const [own, base] = await scoreAnswer(server, column, prompt.ids);
        await write({ kind: "scores", answers: answers.id, model: column.model, own, base });
        draw();
      }
    } finally {
      state.scored = "";
      draw();
    }
  };

  const send = guarded(async (fields) => {
    const last = state.tree.way().at(-1);
    const after = last?.answers ? { parent: last.answers.id, chosen: last.picked } : { parent: "", chosen: "" };
    await ask(await write({ kind: "turn", ...after, ...fields }));
  });
  const edit = (step) => guarded(async (fields) => {
    const { parent, chosen: before } = step.turn;
    await ask(await write({ kind: "turn", parent, chosen: before, ...fields }));
  });
  const again = (step) => guarded(() => ask(step.turn));
  const vote = (answers, asked) => guarded(async (winner) => {
    await postForm("/act/vote", { chat: state.chat, answers: answers.id, winner });
    state.voted[answers.id] = winner;
    if (winner) await write({ kind: "pick", answers: answers.id, model: winner });
    draw();
    await redraw("rates");
    if (colours) await score(answers, asked);
  });
  const pick = (answers) => guarded((model) => write({ kind: "pick", answers: answers.id, model }));
  const show = (kind, id, line) => { state.tree.seen[kind][id] = line.id; draw(); };
  const toggle = (name) => {
    const found = chosen.includes(name) ? chosen.filter((x) => x !== name) : [...chosen, name].slice(0, MOST);
    keep("models", found);
    setChosen(found);
  };
  const flip = (name, set) => (event) => { keep(name, event.target.checked); set(event.target.checked); };
  const recolour = guarded(async (event) => {
    keep("colours", event.target.checked);
    setColours(event.target.checked);
    const steps = state.tree.way();
    for (const [i, step] of steps.entries()) {
      if (event.target.checked && mayAsk && step.answers && !(step.answers.blind && state.voted[step.answers.id] === undefined)) {
        await score(step.answers, messagesOf(steps.slice(0, i + 1)));
      }
    }
  });

  const steps = state.tree.way();
  const isBusy = Boolean(state.live);
  return html`<div class="chat">
    ${mayAsk && html`<div class="row chat-bar" role="group" aria-label="Models that answer">
      ${stamps.map(({ model, is_base }) => html`<label class="chip"><input type="checkbox" checked=${chosen?.includes(model)} onChange=${() => toggle(model)} /> ${model}${is_base && model !== "base" ? " (base)" : ""}</label>`)}
      <span class="grow"></span>
      <label><input type="checkbox" checked=${isBlind} onChange=${flip("blind", setBlind)} /> blind vote</label>
      <label><input type="checkbox" checked=${colours} onChange=${recolour} /> colour tokens</label></div>`}
    ${mayAsk && html`<${Settings} settings=${settings} set=${(name, value) => { const found = { ...settings, [name]: value }; keep("settings", found); setSettings(found); }} />`}
    ${colours && steps.length > 0 && html`<${Legend} />`}
    ${steps.map((step, index) => {
      const asked = messagesOf(steps.slice(0, index + 1));
      const isLive = state.live?.turn === step.turn.id;
      const answers = isLive ? state.live : step.answers;
      const isLast = index === steps.length - 1;
      return html`<section key=${step.turn.id} aria-label="Turn ${index + 1}">
        <${Turn} step=${step} isFirst=${index === 0} onEdit=${edit(step)} onBranch=${(turn) => show("turn", step.turn.parent ? `${step.turn.parent} ${step.turn.chosen}` : "", turn)} />
        ${answers && html`<${Columns} answers=${answers} tree=${state.tree} voted=${answers.id ? state.voted[answers.id] : undefined} colours=${colours}
          picked=${isLive ? null : step.picked} onPick=${mayAsk && !isLive ? pick(answers) : null} onVote=${vote(answers, asked)} server=${mayAsk ? server : ""} asked=${asked} isServed=${isServed} />`}
        ${!isLive && html`<div class="row small quiet">
          ${mayAsk && html`<button type="button" class="plain" disabled=${isBusy} onClick=${again(step)}>${answers ? "Answer again" : "Answer this"}</button>`}
          ${answers && state.scored === answers.id && html`<span>the base scores the tokens…</span>`}
          ${answers?.settings && html`<span>${settingsText(answers.settings)}</span>`}
          <${Branches} items=${step.all} shown=${step.answers} what="answers" onShow=${(line) => show("answers", step.turn.id, line)} /></div>`}
        ${isLast && !isLive && step.answers && !(step.answers.blind && state.voted[step.answers.id] === undefined) && html`<${Export} key=${step.answers.id + step.picked} chat=${state.chat} step=${step} />`}
      </section>`;
    })}
    <p class="unseen" role="status">${isBusy ? "The models answer." : steps.length ? "The answers are complete." : ""}</p>
    ${state.problem && html`<p class="problem" role="alert">${state.problem}</p>`}
    ${mayAsk && html`<${Composer} isFirst=${!steps.length} isBusy=${isBusy} models=${chosen} onSend=${send} onStop=${() => state.stop?.abort()} />`}
  </div>`;
}

// While models load, their panel is kept up to date; when they are ready, the page begins.
async function watch() {
  const state = () => document.querySelector("#server").dataset.state;
  while (["loading", "stopping", "unreachable"].includes(state())) {
    await new Promise((wake) => setTimeout(wake, LOOK_EVERY));
    if (document.hidden) continue;
    await redraw("server").catch(() => null); // The studio is started again, say.
    if (state() === "ready") location.reload();
  }
}

place.querySelector(".plain-only").remove();
const app = document.createElement("div");
place.append(app);
if (server || place.dataset.chat) render(html`<${Chat} />`, app);
watch();
