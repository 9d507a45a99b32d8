// What the tests ask of each official client. A job is a client, a dialect and a feature, and gives
// what an application would see: plain values for the test to compare, and `whole`, the SDK's own
// final object. Runs in Node (node.mjs) and, bundled, in a page (page.mjs).
import Anthropic from "@anthropic-ai/sdk";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { Output, embed, generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const City = z.object({city: z.string(), people: z.number()});
const parameters = {type: "object", properties: {city: {type: "string"}}, additionalProperties: false};
const NAMES = ["get_weather", "get_time"];
const RESULT = "sunny";
const user = content => ({role: "user", content});

// ---- openai ----

const openai = ({url, key, retries = 0}) =>
  new OpenAI({baseURL: `${url}/v1`, apiKey: key, maxRetries: retries, dangerouslyAllowBrowser: true});

const seenInChat = whole => {
  const {message, finish_reason: finish} = whole.choices[0];
  const tools = (message.tool_calls ?? []).map(({id, function: f}) => [id, f.name, JSON.parse(f.arguments)]);
  return {text: message.content ?? "", thinking: message.reasoning_content ?? "", tools, finish,
          tokens: whole.usage?.completion_tokens ?? null, whole};
};

async function drainChat(stream, seen = () => {}) {
  let thinking = "";
  for await (const chunk of stream) {
    thinking += chunk.choices[0]?.delta?.reasoning_content ?? "";
    seen(chunk.choices[0]?.delta?.content);
  }
  return {...seenInChat(await stream.finalChatCompletion()), thinking};
}

const chat = {
  whole: async (o, body) => seenInChat(await openai(o).chat.completions.create(body)),
  streamed: (o, body, seen) => drainChat(openai(o).chat.completions.stream(
    {...body, stream_options: {include_usage: true}}, {signal: o.signal}), seen),
  tools: async (o, body) => {
    const tools = NAMES.map(name => ({type: "function", function: {name, parameters}}));
    const called = await drainChat(openai(o).chat.completions.stream({...body, tools}));
    const {message} = called.whole.choices[0];
    const results = message.tool_calls.map(({id}) => ({role: "tool", tool_call_id: id, content: RESULT}));
    const messages = [...body.messages, message, ...results];
    const answered = await chat.whole(o, {...body, tools, messages});
    return {...called, text: answered.text};
  },
  thinking: (o, body) => chat.streamed(o, {...body, reasoning_effort: "medium"}),
  structured: async (o, body) => {
    const whole = await openai(o).chat.completions.parse(
      {...body, response_format: zodResponseFormat(City, "city")});
    return {parsed: whole.choices[0].message.parsed, whole};
  },
};

const seenInResponse = whole => {
  const of = kind => whole.output.filter(({type}) => type === kind);
  return {text: whole.output_text, tools: of("function_call").map(c => [c.call_id, c.name, JSON.parse(c.arguments)]),
          thinking: of("reasoning").flatMap(({summary}) => summary).map(({text}) => text).join(""),
          finish: whole.status, tokens: whole.usage.output_tokens, whole};
};

async function drainResponse(stream, seen = () => {}) {
  for await (const event of stream) {
    if (event.type === "response.output_text.delta") seen(event.delta);
  }
  return seenInResponse(await stream.finalResponse());
}

const toInput = ({messages, ...body}) => ({...body, input: messages});
const responses = {
  whole: async (o, body) => seenInResponse(await openai(o).responses.create(toInput(body))),
  streamed: (o, body, seen) => drainResponse(
    openai(o).responses.stream(toInput(body), {signal: o.signal}), seen),
  tools: async (o, body) => {
    const tools = NAMES.map(name => ({type: "function", name, parameters, strict: false}));
    const called = await drainResponse(openai(o).responses.stream({...toInput(body), tools}));
    const results = called.tools.map(([id]) => ({type: "function_call_output", call_id: id, output: RESULT}));
    const calls = called.whole.output.map(({parsed_arguments, ...call}) => call);
    const input = [...body.messages, ...calls, ...results];
    const answered = seenInResponse(await openai(o).responses.create({model: body.model, tools, input}));
    return {...called, text: answered.text};
  },
  thinking: async (o, body) => drainResponse(
    openai(o).responses.stream({...toInput(body), reasoning: {effort: "medium", summary: "auto"}})),
  structured: async (o, body) => {
    const whole = await openai(o).responses.parse(
      {...toInput(body), text: {format: zodTextFormat(City, "city")}});
    return {parsed: whole.output_parsed, whole};
  },
};

// ---- @anthropic-ai/sdk ----

const anthropic = ({url, key, retries = 0}) =>
  new Anthropic({baseURL: url, apiKey: key, maxRetries: retries, dangerouslyAllowBrowser: true});

const seenInMessage = whole => {
  const of = (kind, field) => whole.content.filter(({type}) => type === kind).map(b => b[field]).join("");
  return {text: of("text", "text"), thinking: of("thinking", "thinking"), finish: whole.stop_reason,
          tools: whole.content.filter(({type}) => type === "tool_use").map(b => [b.id, b.name, b.input]),
          tokens: whole.usage.output_tokens, whole};
};

async function drainMessage(stream, seen = () => {}) {
  for await (const event of stream) {
    if (event.type === "content_block_delta") seen(event.delta.text);
  }
  return seenInMessage(await stream.finalMessage());
}

const messages = {
  whole: async (o, body) => seenInMessage(await anthropic(o).messages.create({max_tokens: 2048, ...body})),
  streamed: (o, body, seen) => drainMessage(
    anthropic(o).messages.stream({max_tokens: 2048, ...body}, {signal: o.signal}), seen),
  tools: async (o, body) => {
    const tools = NAMES.map(name => ({name, input_schema: parameters}));
    const called = await messages.streamed(o, {...body, tools});
    const results = called.tools.map(([id]) => ({type: "tool_result", tool_use_id: id, content: RESULT}));
    const assistant = {role: "assistant", content: called.whole.content};
    const history = [...body.messages, assistant, user(results)];
    const answered = await messages.whole(o, {...body, tools, messages: history});
    return {...called, text: answered.text};
  },
  thinking: (o, body) => messages.streamed(o, {...body, thinking: {type: "enabled", budget_tokens: 1024}}),
  structured: async (o, body) => {
    const whole = await anthropic(o).messages.parse(
      {max_tokens: 2048, ...body, output_config: {format: zodOutputFormat(City)}});
    return {parsed: whole.parsed_output, whole};
  },
};

// ---- ai, with @ai-sdk/openai and @ai-sdk/anthropic ----

const aiOpenAI = ({url, key}) => createOpenAI({baseURL: `${url}/v1`, apiKey: key});
const AI_MODELS = {
  chat: (o, model) => aiOpenAI(o).chat(model),
  responses: (o, model) => aiOpenAI(o).responses(model),
  messages: ({url, key}, model) => createAnthropic({baseURL: `${url}/v1`, apiKey: key})(model),
};
const AI_THINKING = {
  chat: {openai: {reasoningEffort: "medium"}},
  responses: {openai: {reasoningEffort: "medium", reasoningSummary: "auto"}},
  messages: {anthropic: {thinking: {type: "enabled", budgetTokens: 1024}}},
};

const seenByAI = async answer => ({
  text: await answer.text, thinking: (await answer.reasoningText) ?? "", finish: await answer.finishReason,
  tools: (await answer.toolCalls).map(c => [c.toolCallId, c.toolName, c.input]),
  tokens: (await answer.usage).outputTokens, whole: await answer.content,
});

const ai = dialect => {
  const options = (o, {model, messages}) => ({model: AI_MODELS[dialect](o, model), messages,
    maxRetries: o.retries ?? 0, abortSignal: o.signal});
  const streamed = async (o, body, seen = () => {}, more = {}) => {
    let failure;
    const onError = ({error}) => { failure ??= error; };
    const answer = streamText({...options(o, body), onError, ...more});
    for await (const part of answer.fullStream) {
      if (part.type === "text-delta") seen(part.text);
      if (part.type === "error") failure ??= part.error;
      if (part.type === "abort") failure ??= new DOMException("aborted", "AbortError");
    }
    if (failure) throw failure;
    return answer;
  };
  return {
    whole: async (o, body) => seenByAI(await generateText(options(o, body))),
    streamed: async (o, body, seen) => seenByAI(await streamed(o, body, seen)),
    tools: async (o, body) => {
      const inputSchema = z.object({city: z.string().optional()});
      const tools = Object.fromEntries(NAMES.map(n => [n, tool({inputSchema, execute: () => RESULT})]));
      const providerOptions = {openai: {store: false}};  // else it refers to what is stored
      const answer = await streamed(o, body, undefined, {tools, providerOptions, stopWhen: stepCountIs(2)});
      const [called, answered] = await answer.steps;
      return {...await seenByAI(called), text: answered.text};
    },
    thinking: async (o, body) =>
      seenByAI(await streamed(o, body, undefined, {providerOptions: AI_THINKING[dialect]})),
    structured: async (o, body) => {
      const answer = await generateText({...options(o, body), output: Output.object({schema: City})});
      return {parsed: answer.output, whole: answer.content};
    },
  };
};

// ---- Jobs ----

const CLIENTS = {
  openai: {chat, responses},
  anthropic: {messages},
  ai: {chat: ai("chat"), responses: ai("responses"), messages: ai("messages")},
};
const MODEL = "text-embedding-3-small";
const OTHERS = {
  openai: {
    embeddings: async o => (await openai(o).embeddings.create({model: MODEL, input: "Hi"})).data[0].embedding,
    models: async o => (await openai(o).models.list()).data.map(({id}) => id),
  },
  anthropic: {
    models: async o => (await anthropic(o).models.list()).data.map(({id}) => id),
    count: async (o, body) => (await anthropic(o).messages.countTokens(body)).input_tokens,
  },
  ai: {
    embeddings: async o => (await embed({model: aiOpenAI(o).embedding(MODEL), value: "Hi"})).embedding,
  },
};

// The name of what is thrown, and what else an application may look at.
const described = error => {
  const last = error.lastError ?? error;
  const {status, statusCode, requestID, message} = last;
  const name = last.name?.startsWith("AI_") ? last.name : last.constructor.name;
  return {name, status: status ?? statusCode ?? null,
          requestID: requestID ?? null, message: String(message)};
};

export async function run({client, dialect, feature, model, ...options}) {
  const body = {model, messages: [user(options.prompt ?? "Hi")]};
  const features = CLIENTS[client][dialect] ?? {};
  try {
    if (OTHERS[client][feature]) return {value: await OTHERS[client][feature](options, body)};
    if (feature !== "abort") return await features[feature](options, body);
  } catch (error) {
    return {failed: described(error)};
  }
  const controller = new AbortController();  // leaves at the first text
  let text = "";
  const seen = piece => { text += piece ?? ""; if (text) controller.abort(); };
  try {
    await features.streamed({...options, signal: controller.signal}, body, seen);
  } catch (error) {
    return {text, failed: described(error)};
  }
  return {text};
}
