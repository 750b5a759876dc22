// A cluster of two workers. On HUP each is replaced as the documentation of `cluster` has it: the new one listens, then
// the old one disconnects, which lets its requests finish. There is no timeout but the one below.
const cluster = require("node:cluster");
const fs = require("node:fs");
const http = require("node:http");

function start() {
  return new Promise((resolve, reject) => {
    const worker = cluster.fork();
    worker.once("listening", () => resolve(worker));
    worker.once("exit", (code) => reject(new Error(`a worker ended with ${code}`)));
  });
}

async function replace() {
  for (const old of Object.values(cluster.workers)) {
    await start();
    old.disconnect();
    setTimeout(() => old.kill("SIGKILL"), 30_000).unref();
  }
}

async function lead() {
  let turn = start().then(start);
  process.on("SIGHUP", () => {
    turn = turn.then(replace).catch((error) => console.error("reload failed:", error.message));
  });
  await turn;
}

function serve() {
  const release = fs.readFileSync(process.env.RELEASE_FILE, "utf8");
  if (release === "broken") {
    process.exit(1);
  }
  // As long as the import of an application: nothing else happens in the worker meanwhile.
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1000 * Number(process.env.IMPORT_SECONDS));
  const server = http.createServer((request, response) => {
    const parts = request.url.split("/").filter((part) => part);
    const seconds = parts[0] === "slow" ? Number(parts[1]) : 0;
    const body = `${release} ${parts.at(-1)}`;
    const answer = () => response.writeHead(200, { "content-length": body.length }).end(body);
    seconds ? setTimeout(answer, 1000 * seconds) : answer();
  });
  server.keepAliveTimeout = 75_000;
  const [host, port] = process.env.ADDRESS.split(":");
  server.listen(Number(port), host);
}

cluster.isPrimary ? lead() : serve();
