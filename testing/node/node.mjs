// Does one job after the other: a line of JSON on stdin, a line of JSON on stdout.
import { createInterface } from "node:readline";
import { run } from "./jobs.mjs";

console.log(JSON.stringify({ready: process.version}));
for await (const line of createInterface({input: process.stdin})) {
  console.log(JSON.stringify(await run(JSON.parse(line))));
}
