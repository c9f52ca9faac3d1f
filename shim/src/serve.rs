//! The server: one process for each container, alive from `start` until containerd asks for its end.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs, io};

use tokio::runtime::Builder;
use tokio::signal::unix::{signal, SignalKind};
use tokio::sync::Notify;
use tracing::{info, warn};
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::Server;

use crate::cli::Args;
use crate::error::{Error, Result};
use crate::events::{self, Containerd, Events};
use crate::instance::Maker;
use crate::service::Service;
use crate::task::{Setup, Tasks};
use crate::{log, sys};

/// How long the last events may take to be delivered.
const LAST_EVENTS: Duration = Duration::from_secs(5);
/// How long the last answer may take.
const LAST_ANSWER: Duration = Duration::from_millis(200);
/// How long a thread without work lives: an idle shim has none.
const IDLE: Duration = Duration::from_secs(2);

/// Serves the socket on standard input with machines of `maker` until the end.
///
/// # Errors
/// When the process cannot be set up; they are in containerd's log too, if that could be opened.
pub fn serve(args: &Args, maker: Arc<dyn Maker>) -> Result<()> {
    sys::limit_allocator_arenas();
    log::init(args.debug);
    // A session of its own: signals for containerd's terminal are not for this process.
    if let Err(error) = rustix::process::setsid() {
        warn!(%error, "cannot start a session");
    }
    let runtime = Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(IDLE)
        .build()
        .map_err(|e| Error::caused("cannot make the runtime", e))?;
    let result = runtime.block_on(run(args, maker));
    runtime.shutdown_timeout(Duration::from_millis(100));
    if let Some(socket) = &args.socket {
        let _ = fs::remove_file(socket);
    }
    result
}

async fn run(args: &Args, maker: Arc<dyn Maker>) -> Result<()> {
    let stdin = io::stdin();
    let listener = stdin.as_fd().try_clone_to_owned().map_err(|e| Error::caused("there is no socket on stdin", e))?;
    let listener = Listener::try_from(UnixListener::from(listener))
        .map_err(|e| Error::caused("standard input is no listening socket", e))?;
    let (events, queue) = Events::queue();
    let address = env::var("TTRPC_ADDRESS").unwrap_or_default();
    tokio::spawn(events::forward(args.namespace.clone(), queue, Containerd::new(&address)));
    let ended = Arc::new(Notify::new());
    let tasks = Arc::new(Tasks::new(Setup { namespace: args.namespace.clone(), maker, events, ended: ended.clone() }));
    let mut server = Server::new().add_listener(listener).register_service(Service::table(&tasks));
    server.start().await.map_err(|e| Error::caused("cannot serve the task API", e))?;
    info!(id = args.id, version = env!("CARGO_PKG_VERSION"), "the shim serves");

    let mut terminate = signal(SignalKind::terminate()).map_err(|e| Error::caused("cannot catch SIGTERM", e))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| Error::caused("cannot catch SIGINT", e))?;
    tokio::select! {
        () = ended.notified() => tasks.close().await,
        _ = terminate.recv() => tasks.end_all().await,
        _ = interrupt.recv() => tasks.end_all().await,
    }
    if tokio::time::timeout(LAST_EVENTS, tasks.flush()).await.is_err() {
        warn!("containerd has not taken the last events");
    }
    // The answer to Shutdown is on its way: this waits for open connections.
    let _ = tokio::time::timeout(LAST_ANSWER, server.shutdown()).await;
    info!(id = args.id, "the shim ends");
    Ok(())
}
