//! `ovms-snapshotter`: containerd's snapshotter and differ for OVMS images, and for ordinary images beside them.
//!
//! ```text
//!  containerd ──gRPC──> snapshots ─┐
//!             ──gRPC──> diff ──────┼── Daemon ── Store (redb), Layout (directories)
//!  shim ──lines──────> bundle ─────┘      │
//!             <──gRPC── content, containers, images
//! ```
//! One thread runs the services; whatever may block runs on others. A snapshot is either ordinary (files, mounted by
//! overlay) or belongs to a machine (disk layers in block-stack form, mounted by a bind that only the shim looks behind).
#![deny(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod bundle;
mod daemon;
mod diff;
mod error;
mod filter;
mod keyed;
mod layout;
mod listen;
mod machine;
mod mounts;
mod ordinary;
mod progress;
pub mod proto;
mod snapshots;
mod store;
#[allow(unsafe_code, reason = "a mapping that is locked in memory")]
mod sys;
mod untar;
mod upload;
mod usage;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use ovms_config::Settings;
use tokio::signal::unix::{signal, SignalKind};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::daemon::Daemon;
use crate::error::{Context, Result};
use crate::listen::Sockets;
use crate::proto::diff::diff_server::DiffServer;
use crate::proto::snapshots::snapshots_server::SnapshotsServer;
use ovms_containerd::MAX_MESSAGE;

/// How long requests may go on after SIGTERM: an unpack that is cut off is done again, so not long.
const GRACE: Duration = Duration::from_secs(10);
/// How long an idle blocking thread is kept.
const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Stack of a blocking thread in bytes.
const THREAD_STACK: usize = 1 << 20;

/// containerd's snapshotter and differ for OVMS images.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Settings file [default: /etc/ovms/ovms.toml if it is there].
    #[arg(long)]
    config: Option<PathBuf>,
    /// Socket of the snapshots and diff services.
    #[arg(long)]
    address: Option<PathBuf>,
    /// Socket of the bundle service, which the shim asks.
    #[arg(long)]
    bundle_address: Option<PathBuf>,
    /// Directory of snapshots and metadata.
    #[arg(long)]
    root: Option<PathBuf>,
    /// containerd's socket.
    #[arg(long)]
    containerd_address: Option<PathBuf>,
    /// error, warn, info, debug or trace, or a filter such as `ovms_snapshotter=debug`.
    #[arg(long, default_value = "info")]
    log_level: String,
    /// How the log on stderr is written.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// One line of text an event.
    Text,
    /// One JSON object an event.
    Json,
}

/// The program `ovms-snapshotter`.
pub fn main() -> ExitCode {
    // The layer worker is this program started again.
    if let Some(code) = ovms_bundle::worker::intercept() {
        return code;
    }
    let args = Args::parse();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("ovms-snapshotter: {}", err.chain());
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    start_log(&args.log_level, args.log_format)?;
    let mut settings = match &args.config {
        Some(path) => Settings::read(path),
        None => Settings::load(),
    }
    .context(|| "cannot use the settings")?;
    let paths = &mut settings.paths;
    let root = args.root.unwrap_or_else(|| paths.state.clone());
    let given = [
        (args.address, &mut paths.snapshotter_socket),
        (args.bundle_address, &mut paths.bundle_socket),
        (args.containerd_address, &mut paths.containerd_socket),
    ];
    for (given, setting) in given {
        if let Some(path) = given {
            *setting = path;
        }
    }
    // What the daemon makes is its own; whatever others may see gets its mode by name.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    machine::ram::locked::raise_limit();
    let sockets = Sockets::open(&settings.paths.snapshotter_socket, &settings.paths.bundle_socket)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(THREAD_KEEP_ALIVE)
        .thread_stack_size(THREAD_STACK)
        .build()
        .context(|| "cannot start the runtime")?;
    let served = runtime.block_on(serve(sockets, root, settings));
    // Requests have had their time; only work that nobody waits for is left, and it starts again.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

async fn serve(sockets: Sockets, root: PathBuf, settings: Settings) -> Result<()> {
    let failed = || "cannot serve the sockets";
    let mut terminate = signal(SignalKind::terminate()).context(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).context(failed)?;
    let daemon = Daemon::open(&root, settings)?;
    let listener = |socket: &std::os::unix::net::UnixListener| {
        let socket = socket.try_clone()?;
        tokio::net::UnixListener::from_std(socket)
    };
    let grpc = listener(&sockets.grpc).context(failed)?;
    let bundle = listener(&sockets.bundle).context(failed)?;

    let (stop, stopping) = tokio::sync::watch::channel(false);
    let mut stopped = stopping.clone();
    let snapshots = SnapshotsServer::new(snapshots::SnapshotsService(Arc::clone(&daemon)));
    let diff = DiffServer::new(diff::DiffService(Arc::clone(&daemon)));
    let mut server = tokio::spawn(
        Server::builder()
            .add_service(snapshots.max_decoding_message_size(MAX_MESSAGE))
            .add_service(diff.max_decoding_message_size(MAX_MESSAGE))
            .serve_with_incoming_shutdown(UnixListenerStream::new(grpc), async move {
                let _sender_gone = stopped.wait_for(|stop| *stop).await;
            }),
    );
    let bundles = tokio::spawn(bundle::serve(bundle, Arc::clone(&daemon), stopping));
    tokio::spawn(machine::ram::relock(Arc::clone(&daemon)));
    tokio::spawn(machine::resume(daemon));
    tracing::info!(root = %root.display(), version = env!("CARGO_PKG_VERSION"), "serving");
    if let Err(err) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::debug!(error = %err, "the service manager cannot be told");
    }

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        ended = &mut server => {
            return ended.context(|| "the gRPC server failed")?.context(|| "the gRPC server ended");
        }
    }
    tracing::info!("stopping");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    let _no_receivers = stop.send(true);
    let both = async { (server.await, bundles.await) };
    if tokio::time::timeout(GRACE, both).await.is_err() {
        tracing::warn!("requests were cut off");
    }
    Ok(())
}

fn start_log(level: &str, format: LogFormat) -> Result<()> {
    // A bare level is meant for the daemon; the libraries below it say what is wrong and no more.
    let directives = match level.parse::<tracing::Level>() {
        Ok(_) => format!("warn,ovms_snapshotter={level}"),
        Err(_) => level.to_owned(),
    };
    let filter: Targets =
        directives.parse().context_kind(error::Kind::Invalid, || format!("{level:?} is no log level"))?;
    let log = tracing_subscriber::registry().with(filter);
    let lines = fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.with(lines.with_ansi(false)).init(),
        LogFormat::Json => log.with(lines.json()).init(),
    }
    Ok(())
}
