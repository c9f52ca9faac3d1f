//! Pause and Resume: the vCPUs stand still and go on.

use containerd_shim_protos::events::task::{TaskPaused, TaskResumed};

use super::container::Status;
use super::{blocking, Tasks};
use crate::error::{Error, Kind, Result};
use crate::events::Event;

impl Tasks {
    /// Stops the vCPUs of a running container; returns when they stand still.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Precondition`] if it does not run; what the machine says.
    pub async fn pause(&self, id: &str) -> Result<()> {
        let container = self.get(id)?;
        let _turn = container.turn.lock().await;
        container.alive()?;
        if container.status() != Status::Running {
            return Err(Error::new(Kind::Precondition, format!("container {id} is not running")));
        }
        let instance = container.instance.clone();
        blocking(move || instance.pause()).await?;
        container.set_status(Status::Paused);
        self.events.publish(Event::Paused(TaskPaused { container_id: id.to_owned(), ..Default::default() }));
        Ok(())
    }

    /// Lets the vCPUs of a paused container go on.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Precondition`] if it is not paused; what the machine says.
    pub async fn resume(&self, id: &str) -> Result<()> {
        let container = self.get(id)?;
        let _turn = container.turn.lock().await;
        container.alive()?;
        if container.status() != Status::Paused {
            return Err(Error::new(Kind::Precondition, format!("container {id} is not paused")));
        }
        let instance = container.instance.clone();
        blocking(move || instance.resume()).await?;
        container.set_status(Status::Running);
        self.events.publish(Event::Resumed(TaskResumed { container_id: id.to_owned(), ..Default::default() }));
        Ok(())
    }
}
