//! Connections: taken, watched over, and brought to an end.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{sleep, timeout};

use super::app::{self, App};
use super::line::Line;

/// How long a client may take to send the headers of a request.
const HEADERS: Duration = Duration::from_secs(30);

/// How long it takes to tell clients that their texts are left.
const GOODBYE: Duration = Duration::from_secs(2);

/// Bytes of a thread's stack: schemas and grammars are read by recursion.
const STACK: usize = 16 << 20;

/// Bytes of a request's head, and of what is read ahead of a body.
const HEAD: usize = 64 << 10;

/// How a server ends.
#[derive(Debug, Clone, Copy)]
pub struct Ending {
    /// How long it says that it is about to end before it takes no more texts, so that routers notice.
    pub notice: Duration,
    /// How long texts in the making may take after that.
    pub limit: Duration,
}

/// A server of HTTP on threads of its own.
pub struct Server {
    thread: JoinHandle<()>,
    address: SocketAddr,
    stop: watch::Sender<bool>,
}

impl Server {
    /// Answers whoever connects to `listener` until SIGTERM comes or [`Server::stop`] is called; at most `connections`
    /// at a time, others wait.
    ///
    /// # Errors
    /// What the system says.
    pub fn start(listener: TcpListener, app: App, connections: usize, ending: Ending) -> Result<Self> {
        listener.set_nonblocking(true).context("cannot listen")?;
        let address = listener.local_addr().context("cannot listen")?;
        let (stop, stopped) = watch::channel(false);
        // Texts are made elsewhere: little is to be done here.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(8)
            .thread_stack_size(STACK)
            .thread_name("http")
            .enable_all()
            .build()
            .context("cannot start the server's threads")?;
        let line = Arc::clone(app.line());
        let router = app::router(app);
        let thread = std::thread::Builder::new().name("server".into()).spawn(move || {
            runtime.block_on(async {
                match tokio::net::TcpListener::from_std(listener) {
                    Ok(listener) => serve(listener, router, &line, connections, ending, stopped).await,
                    Err(error) => tracing::error!("cannot listen: {error}"),
                }
            });
            line.drain();
            runtime.shutdown_timeout(Duration::from_secs(1));
        });
        Ok(Self { thread: thread.context("cannot start the server's thread")?, address, stop })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends the server as SIGTERM does.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Waits until it has ended.
    pub fn wait(self) {
        let _ = self.thread.join();
    }
}

/// Takes connections until it is told to stop, and waits for those that are here.
async fn serve(
    listener: tokio::net::TcpListener,
    router: Router,
    line: &Line,
    connections: usize,
    ending: Ending,
    stopped: watch::Receiver<bool>,
) {
    let (end, ends) = watch::channel(false);
    // Every connection holds a sender: the channel closes with the last of them.
    let (alive, mut all_gone) = mpsc::channel::<()>(1);
    let places = Arc::new(Semaphore::new(connections));
    let leaving = leave(line, ending, stopped);
    tokio::pin!(leaving);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &places) => accepted,
            () = &mut leaving => break,
        };
        let (router, ends, alive) = (router.clone(), ends.clone(), alive.clone());
        tokio::spawn(async move {
            let (stream, place) = accepted;
            connection(stream, router, ends).await;
            drop((place, alive));
        });
    }
    drop((listener, alive));
    line.drain();
    end.send_replace(true);
    if timeout(ending.limit, all_gone.recv()).await.is_err() {
        tracing::warn!("texts in the making are left after {} s", ending.limit.as_secs());
        line.give_up();
        let _ = timeout(GOODBYE, all_gone.recv()).await;
    }
}

/// The next connection, once there is a place for it.
async fn accept(
    listener: &tokio::net::TcpListener,
    places: &Arc<Semaphore>,
) -> (TcpStream, tokio::sync::OwnedSemaphorePermit) {
    let place = Arc::clone(places).acquire_owned().await.expect("the semaphore is never closed");
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, place),
            Err(error) => {
                // Too many open files, most likely: some will close.
                tracing::warn!("cannot take a connection: {error}");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Waits for the end to be asked for, and gives notice of it.
async fn leave(line: &Line, ending: Ending, mut stopped: watch::Receiver<bool>) {
    let told = async { drop(stopped.wait_for(|&stopped| stopped).await) };
    tokio::select! {
        () = told => {}
        () = terminated() => {}
    }
    line.leave();
    tracing::info!("draining: new texts are taken for {} s", ending.notice.as_secs_f32());
    sleep(ending.notice).await;
}

/// SIGTERM.
async fn terminated() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut signal) = signal(SignalKind::terminate()) {
            signal.recv().await;
            return;
        }
    }
    std::future::pending().await
}

/// One connection: requests one after another, until `ends` says that none follows.
async fn connection(stream: TcpStream, router: Router, mut ends: watch::Receiver<bool>) {
    // Tokens are small and must not wait for each other.
    let _ = stream.set_nodelay(true);
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADERS).max_buf_size(HEAD);
    let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(connection);
    // What is waited for would otherwise be borrowed while the connection ends.
    let told = async { drop(ends.wait_for(|&end| end).await) };
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = told => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!("a connection ends: {error}");
    }
}
