//! The task service without its wire: one context-free method for each RPC, one file for each verb. `service.rs` puts
//! ttrpc around it; tests call it with a stub [`Instance`](crate::instance::Instance) and read the event queue.
//!
//! ```text
//!  Create ─> CREATED ── Start ─> RUNNING ⇄ PAUSED
//!               │                   │        │
//!               └───────────────────┴────────┴── the machine ends ─> STOPPED ── Delete ─> gone
//! ```
//! The map's lock is held for a look-up only. What takes time happens on threads of its own; operations on one
//! container that may not overlap (start, pause, resume, its exit, delete) take turns by the container's `turn`, which
//! is what keeps the events in order. Kill and State never wait for a turn.

mod checkpoint;
mod container;
mod create;
mod delete;
mod exec;
mod kill;
mod pause;
mod resize;
mod start;
mod state;
mod stats;
mod update;
mod wait;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{watch, Notify};
use tracing::error;

use self::container::Container;
use crate::error::{Error, Kind, Result};
use crate::events::Events;
use crate::instance::Maker;

pub use self::checkpoint::Request as CheckpointRequest;
pub use self::container::Status;
pub use self::create::Request as CreateRequest;
pub use self::state::Snapshot;

/// What the map knows of a container.
enum Slot {
    /// Create is at work; the name is taken.
    Creating,
    /// It is there.
    Ready(Arc<Container>),
}

/// The task service of one shim.
pub struct Tasks {
    namespace: String,
    maker: Arc<dyn Maker>,
    events: Events,
    containers: Mutex<HashMap<String, Slot>>,
    /// Told when the shim should end.
    ended: Arc<Notify>,
    making: watch::Sender<Making>,
}

/// Whether machines are being made, and whether more may be.
#[derive(Default)]
struct Making {
    /// The shim ends: no more.
    closed: bool,
    /// How many are between their first trace on the host and their place in the map.
    count: usize,
}

/// What a service is made of.
pub struct Setup {
    /// containerd's namespace.
    pub namespace: String,
    /// Makes the machines.
    pub maker: Arc<dyn Maker>,
    /// Where events go.
    pub events: Events,
    /// Is told when containerd wants the shim to end and nothing lives in it.
    pub ended: Arc<Notify>,
}

impl Tasks {
    /// A service without containers.
    pub fn new(setup: Setup) -> Self {
        let Setup { namespace, maker, events, ended } = setup;
        Self { namespace, maker, events, containers: Mutex::default(), ended, making: watch::Sender::default() }
    }

    /// The map, for a look-up.
    fn map(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container that is there. One that is still being created is not: nerdctl's logger asks for its state while
    /// Create waits for the logger, and tries again only after "not found".
    fn get(&self, id: &str) -> Result<Arc<Container>> {
        match self.map().get(id) {
            Some(Slot::Ready(container)) => Ok(container.clone()),
            Some(Slot::Creating) => Err(Error::new(Kind::NotFound, format!("container {id} is still being created"))),
            None => Err(Error::new(Kind::NotFound, format!("there is no container {id}"))),
        }
    }

    /// A container; machines have no further processes, so `exec_id` must be empty.
    fn get_init(&self, id: &str, exec_id: &str) -> Result<Arc<Container>> {
        let container = self.get(id)?;
        if exec_id.is_empty() {
            return Ok(container);
        }
        Err(Error::new(Kind::NotFound, format!("container {id} has no process {exec_id}: {}", exec::NO_AGENT)))
    }

    /// Ends the shim if no container is left. One that is still being created does not hold it: containerd asks for
    /// the end of a shim whose Create it has given up.
    pub fn shutdown(&self) {
        if !self.map().values().any(|slot| matches!(slot, Slot::Ready(_))) {
            self.ended.notify_one();
        }
    }

    /// Lets no more machines be made and waits for those that are: they are undone. A Create that still resolves its
    /// image has left no trace and is not waited for.
    pub async fn close(&self) {
        self.making.send_modify(|making| making.closed = true);
        // The sender lives as long as this.
        let _ = self.making.subscribe().wait_for(|making| making.count == 0).await;
    }

    /// Ends every machine by force and waits until all is cleaned up: for the signal that ends the shim.
    pub async fn end_all(&self) {
        self.close().await;
        let ids: Vec<String> = self.map().keys().cloned().collect();
        for id in ids {
            let Ok(container) = self.get(&id) else { continue };
            if let Err(error) = container.end_and_free().await {
                error!(id, error = error.chain(), "cannot clean up a container");
            }
        }
    }

    /// Delivers all events so far.
    pub async fn flush(&self) {
        self.events.flush().await;
    }
}

/// Runs blocking work on a thread of its own.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::caused("a worker thread of the shim has failed", error)))
}

#[cfg(test)]
pub(crate) use self::create::{check_args, spec_of};

#[cfg(test)]
mod stub;
#[cfg(test)]
mod tests;
