//! State, Pids and Connect: what a container is doing.

use std::path::PathBuf;

use super::container::Status;
use super::{Slot, Tasks};
use crate::error::Result;
use crate::instance::Exit;
use crate::stdio::Stdio;

/// What State answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its bundle is.
    pub bundle: PathBuf,
    /// The VMM's process.
    pub pid: u32,
    /// What it does.
    pub status: Status,
    /// Its streams, as the client named them: CRI opens them again by this.
    pub stdio: Stdio,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
}

impl Tasks {
    /// What a container is doing; never waits.
    ///
    /// # Errors
    /// When there is no such container.
    pub fn state(&self, id: &str, exec_id: &str) -> Result<Snapshot> {
        let container = self.get_init(id, exec_id)?;
        Ok(Snapshot {
            bundle: container.bundle.clone(),
            pid: container.pid,
            status: container.status(),
            stdio: container.stdio.clone(),
            exit: container.exit(),
        })
    }

    /// Processes on the host: the VMM. An ended container has none, but containerd takes an empty list after its own
    /// restart for a leak, so the pid stays until Delete.
    ///
    /// # Errors
    /// When there is no such container.
    pub fn pids(&self, id: &str) -> Result<Vec<u32>> {
        Ok(vec![self.get(id)?.pid])
    }

    /// The pid of a container's VMM; 0 if there is none.
    pub fn connect(&self, id: &str) -> u32 {
        match self.map().get(id) {
            Some(Slot::Ready(container)) => container.pid,
            _ => 0,
        }
    }
}
