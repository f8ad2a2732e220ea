// What the official JavaScript SDK makes of a gateway, as JSON on standard output: node sdk.mjs URL KEY.
import { createRequire } from "node:module";

const require = createRequire(process.env.SDK_FOLDER + "/");
const { OpenAI } = require("openai");

const [url, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "hello" }];
const failure = (error) => ({
  class: error.constructor.name, status: error.status, code: error.code, param: error.param, requestId: error.requestID,
});

const said = {};

const { data, response, request_id } = await client.chat.completions.create({ model: "fast", messages }).withResponse();
said.chat = { content: data.choices[0].message.content, usage: data.usage, requestId: request_id,
  cache: response.headers.get("x-forebay-cache") };

said.stream = [];
const options = { include_usage: true };
for await (const chunk of await client.chat.completions.create({ model: "fast", messages, stream: true, stream_options: options })) {
  said.stream.push(chunk);
}

const helper = client.chat.completions.stream({ model: "fast", messages, seed: 1 });
said.helper = await helper.finalContent();

const vector = async (options) => (await client.embeddings.create({ model: "vectors", input: ["a", "b"], ...options })).data
  .map((item) => Array.from(item.embedding));
said.embeddings = { packed: await vector(), numbers: await vector({ encoding_format: "float" }) };

said.models = [];
for await (const model of client.models.list()) said.models.push(model.id);

try {
  await client.chat.completions.create({ model: "nope", messages });
} catch (error) {
  said.error = failure(error);
}

try {
  await new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 }).models.list();
} catch (error) {
  said.wrongKey = failure(error);
}

said.broken = { content: "" };
try {
  for await (const chunk of await client.chat.completions.create({ model: "large", messages, stream: true })) {
    said.broken.content += chunk.choices[0].delta.content ?? "";
  }
} catch (error) {
  said.broken.error = failure(error);
}

const abandoned = await client.chat.completions.create({ model: "small", messages, stream: true, seed: 2 });
for await (const chunk of abandoned) {
  if (chunk.choices[0].delta.content) break;
}
said.left = true;

console.log(JSON.stringify(said));
