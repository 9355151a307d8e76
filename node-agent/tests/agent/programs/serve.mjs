// An HTTP server that counts the bytes of its connections: PORT LOG.
import fs from "node:fs";
import http from "node:http";

const [port, path] = process.argv.slice(2);
const log = fs.openSync(path, "a");

const server = http.createServer((request, response) => {
  const socket = request.socket;
  socket.then ??= [0, 0];
  request.resume();
  request.on("end", () => {
    const parts = request.url.split("/");
    const status = parts[1] === "s" ? Number(parts[2]) : 200;
    const number = Number(parts.at(-1));
    // All of it is here, and nothing of the next.
    const read = socket.bytesRead;
    response.on("finish", () => {
      const { bytesWritten } = socket;
      const bytes = [read - socket.then[0], bytesWritten - socket.then[1]];
      socket.then = [read, bytesWritten];
      fs.writeSync(log, `${process.pid} ${request.method} ${request.url} ${status} ${bytes.join(" ")} 0\n`);
    });
    if (parts[1] === "slow") {
      setTimeout(() => response.end("ok"), number);
    } else if (parts[1] === "chunked") {
      response.writeHead(200);
      for (let n = 0; n < number; n++) response.write(Buffer.alloc(1000));
      response.end();
    } else {
      response.writeHead(status, [204, 304].includes(status) ? {} : { "Content-Length": number });
      response.end(request.method === "HEAD" || !number ? undefined : Buffer.alloc(number));
    }
  });
});
server.keepAliveTimeout = 60_000;
server.listen(Number(port), () => console.log("ready"));
