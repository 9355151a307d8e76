//! Brings the API server's port to the machine's loopback: accepts on a socket that it was given as standard input, which
//! belongs to the machine's network namespace, and connects in its own, the control plane's.

use std::{io, net::SocketAddr, os::fd::AsFd as _};

use anyhow::Context as _;
use tokio::net::{TcpListener, TcpStream};

/// Serves for ever.
///
/// # Errors
/// Standard input is not a listening socket.
pub fn run(target: SocketAddr) -> anyhow::Result<()> {
    let socket = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context("take standard input")?;
    let listener = std::net::TcpListener::from(socket);
    listener.set_nonblocking(true).context("standard input is no socket")?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(async {
            let listener = TcpListener::from_std(listener).context("listen on standard input")?;
            loop {
                match listener.accept().await {
                    Ok((client, _)) => {
                        tokio::spawn(connect(client, target));
                    }
                    Err(error) => {
                        eprintln!("accept: {error}");
                        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    }
                }
            }
        })
}

/// An end that fails closes the other: the client sees what it would see without anybody in between.
async fn connect(mut client: TcpStream, target: SocketAddr) {
    if let Ok(mut server) = TcpStream::connect(target).await {
        let _ = client.set_nodelay(true).and_then(|()| server.set_nodelay(true));
        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
    }
}
