// The answers to one turn side by side: stamps, colours, votes.
import { html, useState } from "../vendor/htm-preact.mjs";
import { readPrompt } from "./chat_client.js";
import { counted } from "./numbers.js";

// Differences of log-probability to the base, in nats, at which the colour changes.
const STEPS = [[2, "more-2"], [0.5, "more-1"], [-0.5, ""], [-2, "less-1"], [-Infinity, "less-2"]];
const NAMES = "ABCDE";
const signed = (value) => `${value > 0 ? "+" : ""}${value.toFixed(2)}`;

function shade(difference) {
  return STEPS.find(([least]) => difference >= least)[1];
}

export function Legend() {
  return html`<p class="legend small" aria-label="Colours of tokens">
    <span class="quiet">log-probability against the base:</span>
    <span class="tok less-2">below −2</span><span class="tok less-1">−2 to −0.5</span>
    <span class="tok">about equal</span>
    <span class="tok more-1">+0.5 to +2</span><span class="tok more-2">above +2</span>
    <span class="quiet">nats; numbers are in each table of tokens</span></p>`;
}

function Tokens({ column, scores }) {
  return html`<div class="answer-text tokens">${column.tokens.map((token, i) => {
    const difference = scores.own[i] - scores.base[i];
    const title = `${JSON.stringify(token.text)}: ${scores.own[i].toFixed(2)} here, ${scores.base[i].toFixed(2)} under the base, difference ${signed(difference)}`;
    return html`<span class="tok ${shade(difference)}" title=${title}>${token.text}</span>`;
  })}</div>`;
}

function TokenTable({ column, scores }) {
  const heads = scores ? ["token", "id", "here", "base", "difference"] : ["token", "id", "log-probability"];
  return html`<details class="small"><summary>Tokens (${column.ids.length})</summary>
    <div class="scroll token-table" tabindex="0" role="region" aria-label="tokens of ${column.model}"><table>
    <thead><tr>${heads.map((head, i) => html`<th scope="col" class=${i ? "" : "text"}>${head}</th>`)}</tr></thead>
    <tbody>${column.tokens.map((token, i) => html`<tr><td class="text"><code>${JSON.stringify(token.text)}</code></td><td>${column.ids[i]}</td>
      ${scores
        ? [scores.own[i].toFixed(3), scores.base[i].toFixed(3), signed(scores.own[i] - scores.base[i])].map((x) => html`<td>${x}</td>`)
        : html`<td>${token.logprob.toFixed(3)}</td>`}</tr>`)}</tbody></table></div></details>`;
}

function Prompt({ server, model, asked }) {
  const [shown, show] = useState(null);
  const read = async () => {
    try {
      show(await readPrompt(server, model, asked));
    } catch (error) {
      show({ problem: error.message });
    }
  };
  if (!shown) return html`<button type="button" class="plain" onClick=${read}>show</button>`;
  if (shown.problem) return html`<span class="bad">${shown.problem}</span>`;
  return html`<button type="button" class="plain" onClick=${() => show(null)}>hide</button>
    <pre class="prompt" tabindex="0">${shown.text}</pre><pre class="prompt" tabindex="0">${shown.ids.join(" ")}</pre>`;
}

function Stamp({ column, server, asked }) {
  const { stamp } = column;
  const adapter = stamp.is_base ? [stamp.fingerprint] : [`adapter ${stamp.fingerprint}`, `step ${stamp.step?.toLocaleString("en-US") ?? "?"}`];
  const facts = [...adapter, `template ${stamp.template}`];
  return html`<div class="stamp small quiet"><span title=${stamp.base}>${stamp.base?.split("/").at(-1)}</span> · ${facts.join(" · ")} · ${(column.prompt_tokens ?? null) === null ? "… prompt tokens" : counted(column.prompt_tokens, "prompt token")}
    ${server && asked && html` <${Prompt} key=${column.model} server=${server} model=${column.model} asked=${asked} />`}</div>`;
}

const ENDS = { stop: "ended", length: "cut at max tokens", stopped: "stopped by you" };

function Column({ column, name, hidden, colours, scores, picked, onPick, server, asked }) {
  const counts = `${counted(column.ids.length, "token")}${column.seconds && !hidden ? `, ${(column.ids.length / column.seconds).toFixed(1)} a second` : ""}`;
  const title = hidden ? name : column.model;
  return html`<article class="panel answer ${picked && !hidden ? "picked" : ""}" aria-label="Answer of ${title}">
    <h3>${title}${column.stamp.is_base && !hidden && title !== "base" ? html` <span class="tag">base</span>` : ""}</h3>
    ${hidden ? html`<div class="stamp small quiet">named after the vote</div>` : html`<${Stamp} column=${column} server=${server} asked=${asked} />`}
    ${column.problem && html`<p class="problem" role="alert">${column.problem}</p>`}
    ${colours && scores && !hidden ? html`<${Tokens} column=${column} scores=${scores} />` : html`<div class="answer-text">${column.text}${column.finish || column.problem ? "" : html`<span class="caret" aria-hidden="true"></span>`}</div>`}
    <div class="answer-foot small quiet"><span>${counts}${column.finish ? `, ${ENDS[column.finish] ?? column.finish}` : ""}</span>
      ${onPick && !hidden && html`<label><input type="radio" name="pick-${onPick.group}" checked=${picked} onChange=${() => onPick(column.model)} /> continue from this</label>`}</div>
    ${!hidden && column.finish && html`<${TokenTable} column=${column} scores=${scores} />`}
  </article>`;
}

// `answers` has columns and, where they are blind, `order`; `vote` is called with a model or "".
export function Columns({ answers, tree, voted, colours, picked, onPick, onVote, server, asked, isServed }) {
  const hidden = Boolean(answers.blind) && voted === undefined;
  const columns = answers.blind ? answers.order.map((model) => answers.columns.find((x) => x.model === model)) : answers.columns;
  const isDone = columns.every((column) => column.finish || column.problem);
  return html`<div class="answers">${columns.map((column, i) => html`<${Column}
      key=${column.model} column=${column} name=${NAMES[i]} hidden=${hidden} colours=${colours}
      scores=${answers.id && tree.scores(answers.id, column.model)} picked=${picked === column.model}
      onPick=${onPick && columns.length > 1 ? Object.assign((model) => onPick(model), { group: answers.id }) : null} server=${isServed(column) ? server : ""} asked=${asked} />`)}</div>
    ${hidden && isDone && answers.id && html`<div class="row vote" role="group" aria-label="Vote">
      <strong>Which is best?</strong>
      ${columns.map((column, i) => html`<button type="button" onClick=${() => onVote(column.model)}>${NAMES[i]}</button>`)}
      <button type="button" onClick=${() => onVote("")}>No difference</button></div>`}
    ${answers.blind && !hidden && html`<p class="small" role="status">${voted ? `You chose ${voted}.` : "You saw no difference."}</p>`}`;
}
