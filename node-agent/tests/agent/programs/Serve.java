import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.OutputStream;
import java.net.InetSocketAddress;
import java.util.concurrent.Executors;

/** An HTTP server that logs its requests, without bytes, which it does not know: PORT LOG. */
public class Serve {
    public static void main(String[] args) throws IOException {
        OutputStream log = new FileOutputStream(args[1], true);
        HttpServer server = HttpServer.create(new InetSocketAddress(Integer.parseInt(args[0])), 128);
        server.setExecutor(Executors.newFixedThreadPool(8));
        server.createContext("/", exchange -> answer(exchange, log));
        server.start();
        System.out.println("ready");
    }

    static void answer(HttpExchange exchange, OutputStream log) throws IOException {
        exchange.getRequestBody().readAllBytes();
        String method = exchange.getRequestMethod();
        String path = exchange.getRequestURI().getPath();
        String[] parts = path.split("/");
        int status = parts[1].equals("s") ? Integer.parseInt(parts[2]) : 200;
        int number = Integer.parseInt(parts[parts.length - 1]);
        String line = ProcessHandle.current().pid() + " " + method + " " + path + " " + status + " - - 0\n";
        synchronized (log) {
            log.write(line.getBytes());
        }
        boolean chunked = parts[1].equals("chunked");
        if (parts[1].equals("slow")) {
            try {
                Thread.sleep(number);
            } catch (InterruptedException error) {
                throw new IOException(error);
            }
            number = 2;
        }
        boolean head = method.equals("HEAD");
        if (head) {
            exchange.getResponseHeaders().set("Content-Length", Integer.toString(number));
        }
        boolean none = head || number == 0 || status == 204 || status == 304;
        exchange.sendResponseHeaders(status, chunked ? 0 : none ? -1 : number);
        if (!none) {
            try (OutputStream body = exchange.getResponseBody()) {
                for (int n = 0; n < (chunked ? number : 1); n++) {
                    body.write(new byte[chunked ? 1000 : number]);
                }
            }
        }
        exchange.close();
    }
}
