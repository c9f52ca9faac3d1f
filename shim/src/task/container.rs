//! One container: its machine, its streams and what has become of it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::protobuf::MessageField;
use tokio::sync::watch;
use tracing::warn;

use super::blocking;
use crate::error::{Error, Kind, Result};
use crate::events::{timestamp, Event, Events};
use crate::instance::{Exit, Instance, Press};
use crate::oci::hooks::Hooks;
use crate::stdio::{Stdio, Streams};

/// What a container does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The machine stands at its first instruction.
    Created,
    /// vCPUs run.
    Running,
    /// vCPUs stand still.
    Paused,
    /// The machine has ended.
    Stopped,
}

/// A container that Create has made.
pub(super) struct Container {
    pub(super) id: String,
    pub(super) bundle: PathBuf,
    pub(super) stdio: Stdio,
    pub(super) pid: u32,
    pub(super) instance: Arc<dyn Instance>,
    pub(super) hooks: Hooks,
    /// Held by what may not overlap; see the module's head.
    pub(super) turn: tokio::sync::Mutex<()>,
    status: Mutex<Status>,
    streams: Mutex<Streams>,
    exit: watch::Sender<Option<Exit>>,
}

impl Container {
    pub(super) fn new(
        id: String,
        bundle: PathBuf,
        stdio: Stdio,
        instance: Arc<dyn Instance>,
        hooks: Hooks,
        streams: Streams,
    ) -> Self {
        Self {
            id,
            bundle,
            stdio,
            pid: instance.pid(),
            instance,
            hooks,
            turn: tokio::sync::Mutex::default(),
            status: Mutex::new(Status::Created),
            streams: Mutex::new(streams),
            exit: watch::Sender::new(None),
        }
    }

    pub(super) fn status(&self) -> Status {
        *self.lock_status()
    }

    /// For whoever holds the turn.
    pub(super) fn set_status(&self, status: Status) {
        *self.lock_status() = status;
    }

    fn lock_status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How it ended, if it has.
    pub(super) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for the end.
    pub(super) async fn ended(&self) -> Result<Exit> {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await.map(|exit| *exit);
        ended.ok().flatten().ok_or_else(|| Error::new(Kind::Internal, "the container's record has gone"))
    }

    /// An error unless the machine lives.
    pub(super) fn alive(&self) -> Result<()> {
        if self.exit().is_some() || self.status() == Status::Stopped {
            return Err(Error::new(
                Kind::NotFound,
                format!("process already finished: container {} has ended", self.id),
            ));
        }
        Ok(())
    }

    /// Turns the machine's end into the container's: closes its streams, then says so. Blocks until the turn is free,
    /// so that the exit cannot overtake the start.
    pub(super) fn finish(&self, exit: Exit, events: &Events) {
        let unread = self.streams().end();
        {
            let _turn = self.turn.blocking_lock();
            if exit.oom {
                events.publish(Event::Oom(TaskOOM { container_id: self.id.clone(), ..Default::default() }));
            }
            events.publish(Event::Exit(TaskExit {
                container_id: self.id.clone(),
                id: self.id.clone(),
                pid: self.pid,
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            }));
            self.set_status(Status::Stopped);
            self.exit.send_replace(Some(exit));
        }
        unread.release();
    }

    /// Frees what an ended container holds on the host.
    pub(super) async fn free(self: &Arc<Self>) -> Result<()> {
        let container = self.clone();
        blocking(move || {
            let logger = container.streams().take_logger();
            if let Some(logger) = logger {
                logger.finish();
            }
            container.hooks.poststop(&container.id);
            container.instance.delete()
        })
        .await
    }

    /// Ends the machine by force and frees all.
    pub(super) async fn end_and_free(self: &Arc<Self>) -> Result<()> {
        if self.exit().is_none() {
            let instance = self.instance.clone();
            if let Err(error) = blocking(move || instance.press(Press::Kill)).await {
                warn!(id = self.id, error = error.chain(), "cannot kill the machine");
            }
            self.ended().await?;
        }
        self.free().await
    }
}
