//! The bundle service: the shim asks it to make a mounted snapshot ready to start from.

use std::sync::Arc;

use ovms_proto::bundle::{FromSnapshotter, ToSnapshotter, MAX_LINE};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::daemon::Daemon;
use crate::error::{Context, Error, Kind, Result};
use crate::machine::{self, Wish};

/// Serves the socket until `stopping`, then lets the requests under way end.
pub async fn serve(listener: UnixListener, daemon: Arc<Daemon>, mut stopping: watch::Receiver<bool>) {
    let mut requests = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    requests.spawn(answer(stream, Arc::clone(&daemon)));
                }
                Err(err) => {
                    // Out of descriptors, most likely: give those that are open time to close.
                    tracing::warn!(error = %err, "cannot accept on the bundle socket");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            },
            Some(_) = requests.join_next() => {}
            () = asked_to_stop(&mut stopping) => break,
        }
    }
    while requests.join_next().await.is_some() {}
}

async fn asked_to_stop(stopping: &mut watch::Receiver<bool>) {
    let _sender_gone = stopping.wait_for(|stop| *stop).await;
}

async fn answer(stream: UnixStream, daemon: Arc<Daemon>) {
    let (from, mut to) = stream.into_split();
    // A client that is gone needs no answer; what was begun for it is of use to the next one.
    let (progress, mut steps) = mpsc::unbounded_channel();
    let tell = move |step: String| {
        let _client_gone = progress.send(step);
    };
    let work = async move {
        let mut line = String::new();
        let read = BufReader::new(from.take(MAX_LINE)).read_line(&mut line).await;
        match read.context_kind(Kind::Invalid, || "the request cannot be read")? {
            // Somebody looked whether the socket is served.
            0 => Ok(None),
            _ => resolve(&daemon, &line, &tell).await.map(Some),
        }
    };
    tokio::pin!(work);
    let last = loop {
        tokio::select! {
            biased;
            Some(step) = steps.recv() => {
                let _client_gone = send(&mut to, &FromSnapshotter::Progress(step)).await;
            }
            done = &mut work => break done,
        }
    };
    while let Ok(step) = steps.try_recv() {
        let _client_gone = send(&mut to, &FromSnapshotter::Progress(step)).await;
    }
    let last = match last {
        Ok(None) => return,
        Ok(Some(resolved)) => resolved,
        Err(err) => {
            tracing::warn!(error = err.chain(), "a machine cannot start");
            FromSnapshotter::Refused { kind: err.refusal(), message: err.chain() }
        }
    };
    if let Err(err) = send(&mut to, &last).await {
        tracing::debug!(error = %err, "a client of the bundle service is gone");
    }
}

async fn resolve(daemon: &Arc<Daemon>, line: &str, tell: &(dyn Fn(String) + Send + Sync)) -> Result<FromSnapshotter> {
    let request = serde_json::from_str(line)
        .map_err(|err| Error::invalid("the request is none of the bundle service").because(err))?;
    let ToSnapshotter::Resolve { namespace, container, source, checkpoint } = request;
    let started = std::time::Instant::now();
    let (source, checkpoint) = (source.as_path(), checkpoint.as_deref());
    let wish = Wish { namespace: &namespace, container: &container, source, checkpoint };
    let resolved = machine::resolve(daemon, wish, tell).await?;
    tracing::info!(namespace, container, bundle = %resolved.bundle.display(), took = ?started.elapsed(), "machine resolved");
    Ok(FromSnapshotter::Resolved { bundle: resolved.bundle, args: resolved.args })
}

async fn send(to: &mut (impl AsyncWriteExt + Unpin), message: &FromSnapshotter) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line).await
}
