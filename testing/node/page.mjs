// The same jobs in a page.
import { run } from "./jobs.mjs";

window.run = run;
