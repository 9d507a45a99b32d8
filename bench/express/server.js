// What a web team would write without proxy.py: Express and the vendor's SDK, in the shape of the
// reference proxies it replaces. CORS and one log line per request; no limits, keys, ledger or metrics,
// and no cancellation, so it does less per request than proxy.py does with its defaults.
//
//     ANTHROPIC_API_KEY=… ANTHROPIC_BASE_URL=… PORT=8002 node server.js

import Anthropic from "@anthropic-ai/sdk";
import cors from "cors";
import express from "express";

const anthropic = new Anthropic(); // reads ANTHROPIC_API_KEY and ANTHROPIC_BASE_URL
const app = express();

app.use(cors({ origin: process.env.CORS_ORIGIN?.split(",") ?? "*" }));
app.use(express.json({ limit: "8mb" }));

app.get("/health", (request, response) => {
  response.json({ status: "ok", timestamp: new Date().toISOString() });
});

app.post("/api/anthropic", async (request, response) => {
  const started = Date.now();
  const { model, messages, max_tokens = 1024, stream = true } = request.body;
  try {
    const parameters = { model, messages, max_tokens };
    if (stream) {
      await streamAnswer(parameters, response, started);
    } else {
      response.json(toReply(await anthropic.messages.create(parameters)));
    }
  } catch (error) {
    sendError(response, error);
  }
  console.log(
    JSON.stringify({ time: new Date().toISOString(), path: request.path, model, ms: Date.now() - started }),
  );
});

async function streamAnswer(parameters, response, started) {
  // Opened before the headers, so that a refusal keeps its status.
  const events = await anthropic.messages.create({ ...parameters, stream: true });
  response.setHeader("Content-Type", "text/event-stream");
  response.setHeader("Cache-Control", "no-cache");
  response.setHeader("Connection", "keep-alive");
  let tokenId = 0;
  for await (const event of events) {
    if (event.type !== "content_block_delta" || event.delta.type !== "text_delta") continue;
    const frame = { token: event.delta.text, tokenId };
    if (tokenId === 0) {
      frame.isFirst = true;
      frame.ttfbMs = Date.now() - started;
    }
    tokenId += 1;
    response.write(`data: ${JSON.stringify(frame)}\n\n`);
  }
  response.write(`data: ${JSON.stringify({ token: "", tokenId, isLast: true })}\n\n`);
  response.end("data: [DONE]\n\n");
}

function toReply(message) {
  const content = message.content.map((block) => block.text ?? "").join("");
  const { input_tokens: promptTokens, output_tokens: completionTokens } = message.usage;
  const totalTokens = promptTokens + completionTokens;
  return {
    content,
    finish_reason: "stop",
    usage: { promptTokens, completionTokens, totalTokens },
    choices: [{ index: 0, message: { role: "assistant", content }, finish_reason: "stop" }],
  };
}

function sendError(response, error) {
  const statusCode = error.status ?? 500;
  if (response.headersSent) {
    response.end(`error: ${JSON.stringify({ message: error.message, statusCode })}\n\n`);
  } else {
    response.status(statusCode).json({ error: error.message });
  }
}

app.listen(process.env.PORT ?? 8002, "127.0.0.1");
