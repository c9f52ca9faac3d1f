//! Start: the vCPUs enter the guest.

use containerd_shim_protos::events::task::TaskStart;

use super::container::Status;
use super::{blocking, Tasks};
use crate::error::{Error, Kind, Result};
use crate::events::Event;

impl Tasks {
    /// Starts a created container and gives its pid.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Precondition`] if it was started before; what the machine says.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32> {
        let container = self.get_init(id, exec_id)?;
        let _turn = container.turn.lock().await;
        match container.status() {
            Status::Created => {}
            Status::Stopped => {
                return Err(Error::new(Kind::Precondition, format!("container {id} has ended before it was started")));
            }
            Status::Running | Status::Paused => {
                return Err(Error::new(Kind::Precondition, format!("container {id} is started already")));
            }
        }
        let instance = container.instance.clone();
        blocking(move || instance.start()).await?;
        container.set_status(Status::Running);
        self.events.publish(Event::Start(TaskStart {
            container_id: id.to_owned(),
            pid: container.pid,
            ..Default::default()
        }));
        let started = container.clone();
        blocking(move || {
            started.hooks.poststart(&started.id, started.pid);
            Ok(())
        })
        .await?;
        Ok(container.pid)
    }
}
