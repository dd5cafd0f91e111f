// The box to try a prompt: streams a completion, or the reply of a chat, from the server's
// OpenAI-compatible endpoint; each token shows its probability and the likeliest alternatives.
import { TokenText, meanLogprob, percent } from "./tokens.js";

const TOP = 5;
const $ = (id) => document.getElementById(id);

/** Yields the objects of a stream of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}

/** Returns the tokens of a chunk, each with its name, its log-probability and the likeliest tokens. */
function tokensOf(choice) {
  const { logprobs } = choice;
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((entry) => [entry.token, entry.logprob, entry.top_logprobs.map((top) => [top.token, top.logprob])]);
  }
  return logprobs.tokens.map((token, i) => {
    const top = Object.entries(logprobs.top_logprobs[i] || {}).sort((a, b) => b[1] - a[1]);
    return [token, logprobs.token_logprobs[i], top.slice(0, TOP)];
  });
}

export function setUpPrompt(fetchApi, modelName) {
  const select = $("try-model");
  let offered = "";
  let running = null;

  /** Offers the base model, and the checkpoints that can be sampled from. */
  function update(server, checkpoints) {
    const usable = checkpoints.filter((checkpoint) => checkpoint.kind !== "external_weights");
    const key = JSON.stringify([server.model, usable.map((checkpoint) => checkpoint.path)]);
    if (key === offered) return;
    offered = key;
    const chosen = select.value;
    const base = new Option(`${server.model} (base model)`, server.model);
    const groups = [["sampler_weights", "Checkpoints to sample"], ["weights", "Checkpoints to train on"]].map(([kind, title]) => {
      const group = document.createElement("optgroup");
      group.label = title;
      group.append(...usable.filter((one) => one.kind === kind).map((one) => new Option(modelName(one.path), one.path)));
      return group;
    });
    select.replaceChildren(base, ...groups.filter((group) => group.children.length));
    if ([...select.options].some((option) => option.value === chosen)) select.value = chosen;
    $("mode-chat").disabled = !server.chat;
  }

  function choose(path) {
    select.value = path;
    $("try-prompt").focus();
    $("try").scrollIntoView({ block: "center" });
  }

  function bodyOf() {
    const chat = $("mode-chat").checked;
    const shared = {
      model: select.value, stream: true, max_tokens: Number($("try-tokens").value), temperature: Number($("try-temperature").value),
    };
    const text = $("try-prompt").value;
    return chat
      ? ["v1/chat/completions", { ...shared, messages: [{ role: "user", content: text }], logprobs: true, top_logprobs: TOP }]
      : ["v1/completions", { ...shared, prompt: text, logprobs: TOP }];
  }

  /** Shows Stop in the place of Run, or the reverse; the focus moves along. */
  function swap(busy) {
    const [from, to] = busy ? [$("try-run"), $("try-stop")] : [$("try-stop"), $("try-run")];
    const focused = document.activeElement === from;
    from.hidden = true;
    to.hidden = false;
    if (focused) to.focus();
  }

  async function run() {
    if (running) return;
    const [path, body] = bodyOf();
    const abort = (running = new AbortController());
    const output = $("try-output");
    const inner = document.createElement("span");
    if (body.prompt) {
      const prompt = document.createElement("span");
      prompt.className = "prompt";
      prompt.textContent = body.prompt;
      inner.append(prompt);
    }
    const text = new TokenText(inner);
    output.replaceChildren(inner);
    output.hidden = false;
    output.setAttribute("aria-busy", "true");
    $("try-error").textContent = $("try-status").textContent = "";
    swap(true);
    const logprobs = [];
    const started = performance.now();
    let first = 0, reason = null, stopped = false;
    try {
      const response = await fetchApi(path, {
        method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal: abort.signal,
      });
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        for (const choice of event.choices) {
          reason = choice.finish_reason || reason;
          for (const [name, logprob, top] of tokensOf(choice)) {
            first ||= performance.now();
            logprobs.push(logprob);
            text.add(name, logprob, top);
            output.scrollTop = output.scrollHeight;
          }
        }
      }
    } catch (error) {
      stopped = error.name === "AbortError";
      if (!stopped) $("try-error").textContent = error.status || !(error instanceof TypeError) ? error.message : "The server does not respond.";
    } finally {
      running = null;
      output.setAttribute("aria-busy", "false");
      output.hidden = !logprobs.length && !reason;
      swap(false);
    }
    if (logprobs.length || reason) {
      const seconds = (performance.now() - first) / 1000;
      const parts = [`${logprobs.length} tokens`];
      if (logprobs.length > 1 && seconds > 0) parts.push(`${((logprobs.length - 1) / seconds).toFixed(0)} tokens/s`, `first after ${((first - started) / 1000).toFixed(2)} s`);
      const mean = meanLogprob(logprobs);
      if (mean !== null) parts.push(`mean probability ${percent(mean)}`);
      parts.push(stopped ? "stopped" : reason === "length" ? "reached the number of tokens" : "ended by the model");
      $("try-status").textContent = parts.join(" · ");
    }
  }

  $("try").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  $("try-stop").addEventListener("click", () => running?.abort());
  $("try-prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      $("try").requestSubmit();
    }
  });
  return { update, choose };
}
