// Asks the models of a server, by way of the studio: streams, scores, prompts.

export class Refusal extends Error {}

async function refused(answer) {
  let said = `status ${answer.status}`;
  try {
    const { error } = await answer.json();
    said = error.message ?? error;
  } catch { /* No JSON: the status says it. */ }
  const wait = answer.headers.get("retry-after");
  return new Refusal(wait ? `${said}; it may be asked again in ${wait} s` : said);
}

export async function fetchJson(path, body, signal) {
  const options = { headers: { accept: "application/json" }, signal };
  if (body) {
    options.method = "POST";
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const answer = await fetch(path, options);
  if (!answer.ok) throw await refused(answer);
  return answer.json();
}

export async function postForm(path, fields) {
  const answer = await fetch(path, {
    method: "POST", body: new URLSearchParams(fields), headers: { accept: "application/json" },
  });
  if (!answer.ok) throw await refused(answer);
  return answer.json();
}

// Calls `onPart({text, ids, tokens, finish, usage, fingerprint})` for each event of an answer.
export async function streamAnswer(server, body, signal, onPart) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true }, logprobs: true, return_token_ids: true };
  const answer = await fetch(`/api/servers/${server}/v1/chat/completions`, {
    method: "POST", body: JSON.stringify(asked), signal,
    headers: { "content-type": "application/json", accept: "text/event-stream" },
  });
  if (!answer.ok) throw await refused(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refusal("the server ended in the middle of this answer");
    const events = (waiting + value).split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      if (!event.trimStart().startsWith("data:")) continue;
      const data = event.trimStart().slice(5).trim();
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new Refusal(found.error.message);
      onPart(partOf(found));
    }
  }
}

function partOf({ choices, usage, system_fingerprint }) {
  const choice = choices[0] ?? {};
  const scores = choice.logprobs?.content ?? [];
  return {
    text: choice.delta?.content ?? "",
    ids: choice.token_ids ?? [],
    tokens: scores.map(({ token, logprob }) => ({ text: token, logprob })),
    finish: choice.finish_reason ?? null,
    usage: usage ?? null,
    fingerprint: system_fingerprint,
  };
}

// The ids of a prompt, and the text that the model reads.
export async function readPrompt(server, model, asked) {
  const { tokens } = await fetchJson(`/api/servers/${server}/tokenize`, { model, ...asked });
  const { prompt } = await fetchJson(`/api/servers/${server}/detokenize`, { model, tokens });
  return { ids: tokens, text: prompt };
}

// The log-probability of each id of an answer under its model and its base, both scored
// in one way: as a prompt. So a difference is one of the models. The fingerprint is that
// of the answer: a run that trains may have moved on since.
export async function scoreAnswer(server, { model, stamp, ids }, prompt) {
  const score = async (name, fingerprint) => {
    const body = { model: name, prompt: [...prompt, ...ids], echo: true, logprobs: 0, max_tokens: 0 };
    const { choices, system_fingerprint } = await fetchJson(`/api/servers/${server}/v1/completions`, body);
    if (fingerprint && system_fingerprint !== fingerprint) {
      throw new Refusal(`${name} is another one now than the one that answered, so its tokens are not coloured`);
    }
    return choices[0].logprobs.token_logprobs.slice(prompt.length);
  };
  return Promise.all([score(model, stamp.fingerprint), score(stamp.base_model, "")]);
}
