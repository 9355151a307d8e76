// An HTTP client that counts the bytes of its connection: URL LOG TIMES METHOD:PATH:BYTES...
import fs from "node:fs";
import http from "node:http";

const [url, path, times, ...what] = process.argv.slice(2);
const log = fs.openSync(path, "a");
const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });

const ask = (method, target, size) =>
  new Promise((resolve, reject) => {
    const began = process.hrtime.bigint();
    const headers = size ? { "Content-Length": size } : {};
    const request = http.request(url + target, { method, agent, headers }, (response) => {
      const took = process.hrtime.bigint() - began;
      const { socket } = request;
      response.resume();
      response.on("end", () => {
        socket.then ??= [0, 0];
        const bytes = [socket.bytesWritten - socket.then[0], socket.bytesRead - socket.then[1]];
        socket.then = [socket.bytesWritten, socket.bytesRead];
        const line = [process.pid, method, target, response.statusCode, ...bytes, took].join(" ");
        fs.writeSync(log, `${line}\n`);
        // Not before the socket is free again.
        setImmediate(resolve);
      });
    });
    request.on("error", reject);
    request.end(size ? Buffer.alloc(size) : undefined);
  });

for (let n = 0; n < Number(times); n++) {
  for (const one of what) {
    const [method, target, size] = one.split(":");
    await ask(method, target, Number(size));
  }
}
agent.destroy();
