//! The bundle service: the shim asks it to make a mounted snapshot ready to start from.

use std::sync::Arc;

use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::daemon::Daemon;

/// Serves the socket until `stopping`.
pub async fn serve(_listener: UnixListener, _daemon: Arc<Daemon>, mut stopping: watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}
